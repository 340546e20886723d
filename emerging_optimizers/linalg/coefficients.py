"""Newton-Schulz coefficient sets, as data.

Each step maps a singular value s to a s + b s^3 + c s^5. A schedule is a list of (a, b, c); it was optimised for
a number of steps, and `band` is where the singular values of a 128 x 64 Gaussian end after that many steps in
float32. Running a schedule for another number of steps is allowed and announced.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from emerging_optimizers.linalg.precision import FP32MatmulPrecT

NSCoeffT = Literal["simple", "quintic", "polar_express", "cans", "aol", "deepseekv4", "cubic5", "custom"]
CoeffIterMode = Literal["cycle", "repeat_last"]
Coefficients = tuple[tuple[float, float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One named coefficient set.

    Attributes:
        sets: (a, b, c) of each step.
        past_the_end: what happens in later steps: start again, or repeat the last polynomial.
        made_for: number of steps it was optimised for; None: any number.
        band: smallest and largest singular value after `made_for` steps (5 where that is None).
        source: where the numbers come from.
        exact: refuse any other number of steps than `made_for`.
        caution: what a user must know before choosing it.
        full_float32: diverges on gradients of low rank where products are rounded to TF32 or bfloat16: refused there.
    """

    sets: Coefficients
    past_the_end: CoeffIterMode
    made_for: int | None
    band: tuple[float, float]
    source: str
    exact: bool = False
    caution: str = ""
    full_float32: bool = False


_SIMPLE = (3.4445, -4.7750, 2.0315)

SCHEDULES: dict[str, Schedule] = {
    "simple": Schedule(
        sets=(_SIMPLE,),
        past_the_end="cycle",
        made_for=None,
        band=(0.68, 1.14),
        source="Jordan et al. 2024, Muon",
    ),
    "quintic": Schedule(
        sets=(
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        past_the_end="cycle",
        made_for=5,
        band=(0.97, 1.04),
        source="You Jiacheng 2025, modded-nanogpt",
    ),
    "polar_express": Schedule(
        sets=(
            (8.2051, -22.9019, 16.4607),
            (4.0664, -2.8612, 0.5184),
            (3.9096, -2.8234, 0.5250),
            (3.2856, -2.4153, 0.4853),
            (2.2779, -1.6198, 0.3985),
            (1.8726, -1.2307, 0.3585),
            (1.8564, -1.2132, 0.3568),
            (1.8750, -1.2500, 0.3750),
        ),
        past_the_end="repeat_last",
        made_for=8,
        band=(0.99, 1.01),
        source="Amsel et al. 2025, Polar Express, arXiv 2505.16932 (safety factor 1.01 folded in)",
    ),
    "cans": Schedule(
        sets=(
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
        past_the_end="repeat_last",
        made_for=5,
        band=(0.88, 1.12),
        source="Grishina et al. 2025, CANS, arXiv 2506.10935",
        # Rank-one 512 x 64: 7.7e3 in bfloat16 (6e7 by the Gram form), 2e2 in TF32; 1.23 in float32. The other sets map
        # the same matrices to at most 1.31 in any of them.
        full_float32=True,
    ),
    "aol": Schedule(
        sets=(
            (4.0098, -7.0585, 2.4635),
            (3.4585, -5.5479, 2.5959),
            (2.7573, -3.2939, 1.4254),
            (2.7215, -3.0494, 1.3169),
        ),
        past_the_end="cycle",
        made_for=4,
        band=(0.98, 1.02),
        source="Boissin et al. 2025, Turbo-Muon, arXiv 2512.04632",
        caution="the set was made for another normalisation than the Frobenius norm. Where one singular value exceeds "
        "0.884 of that norm (a gradient of nearly rank one), its direction is followed with the wrong sign. "
        "coefficient_type='quintic' costs one step more and has no such range",
    ),
    "deepseekv4": Schedule(
        sets=(_SIMPLE,) * 8 + ((2.0, -1.5, 0.5),) * 2,
        past_the_end="repeat_last",
        made_for=10,
        band=(0.99, 1.01),
        source="DeepSeek-V4 2026: eight steps of 'simple', then two that converge",
    ),
    "cubic5": Schedule(
        sets=(
            (3.3656576, -3.3420992, 0.0),
            (2.5744352, -1.4957376, 0.0),
            (2.5368962, -1.4312570, 0.0),
            (2.4418906, -1.2764040, 0.0),
            (2.2230472, -0.9630650, 0.0),
        ),
        past_the_end="repeat_last",
        made_for=5,
        band=(0.77, 1.30),
        source="NVIDIA Emerging-Optimizers 2026, #217: cubic steps, one Gram product less each",
        exact=True,
    ),
}


def check_coefficients(coefficient_type: str, steps: int, precision: FP32MatmulPrecT = "highest") -> None:
    """Raise ValueError for a name, a number of steps or a precision of float32 products that cannot be met."""
    if steps < 1:
        raise ValueError(f"num_ns_steps={steps} is not allowed; give an integer >= 1")
    if coefficient_type not in (*SCHEDULES, "custom"):
        known = ", ".join((*SCHEDULES, "custom"))
        raise ValueError(f"coefficient_type={coefficient_type!r} is not one of {known}")
    schedule = SCHEDULES.get(coefficient_type)
    if schedule and schedule.exact and steps != schedule.made_for:
        raise ValueError(
            f"coefficient_type={coefficient_type!r} is made for {schedule.made_for} steps, {steps} asked for; set "
            f"num_ns_steps={schedule.made_for} or choose another coefficient_type"
        )
    if schedule and schedule.full_float32 and precision != "highest":
        raise ValueError(
            f"coefficient_type={coefficient_type!r} diverges on gradients of low rank where products are rounded, and "
            f"fp32_matmul_prec={precision!r} is asked for; give fp32_matmul_prec='highest', or "
            "coefficient_type='polar_express', which stands bfloat16"
        )


def announce_coefficients(coefficient_type: str, steps: int) -> None:
    """Warn where a schedule is run off the number of steps that it is made for, or has a caution."""
    schedule = SCHEDULES.get(coefficient_type)
    if schedule is None:
        return
    if schedule.made_for not in (None, steps):
        low, high = schedule.band
        warnings.warn(
            f"coefficient_type={coefficient_type!r} is made for {schedule.made_for} steps, {steps} asked for: singular "
            f"values will not end in [{low}, {high}]. Set num_ns_steps={schedule.made_for}, or keep this on purpose.",
            UserWarning,
            stacklevel=2,
        )
    if schedule.caution:
        warnings.warn(f"coefficient_type={coefficient_type!r}: {schedule.caution}.", UserWarning, stacklevel=2)


def coefficients(
    coefficient_type: str, steps: int, custom: Sequence[tuple[float, float, float]] | None = None
) -> Coefficients:
    """The (a, b, c) of each of `steps` steps of a named schedule, or of `custom` (cycled).

    Raises:
        ValueError: unknown name, "custom" without sets, steps < 1, or a schedule that allows one number of steps.

    Example:
        >>> coefficients("simple", 2)
        ((3.4445, -4.775, 2.0315), (3.4445, -4.775, 2.0315))
    """
    check_coefficients(coefficient_type, steps)
    if coefficient_type == "custom":
        if not custom or any(len(abc) != 3 for abc in custom):
            raise ValueError(
                f"coefficient_type='custom' needs custom_coefficient_sets: a list of (a, b, c); given is {custom!r}"
            )
        sets: Coefficients = tuple((float(a), float(b), float(c)) for a, b, c in custom)
        cycle = True
    else:
        schedule = SCHEDULES[coefficient_type]
        sets, cycle = schedule.sets, schedule.past_the_end == "cycle"
    return tuple(sets[k % len(sets) if cycle else min(k, len(sets) - 1)] for k in range(steps))


# What `minimax` takes for the smallest singular value that counts, as a share of the Frobenius norm: what `quintic`
# takes to 0.5 in five steps.
SMALLEST = 1e-3
# Rounded products carry singular values a little past an interval's end, where a polynomial that knows nothing of it
# would throw them far.
_MARGIN = 1.01


@cache
def minimax(accuracy: float) -> Coefficients:
    r"""The fewest steps that take all singular values of at least 1e-3 of the Frobenius norm to within `accuracy` of 1.

    Each step is the odd polynomial of degree 5 that stays nearest to 1 on the interval that the steps before it leave,
    :math:`\min_{a, b, c} \max_{[l, u]} |1 - (a s + b s^3 + c s^5)|`; no other composition of as many is nearer,
    but for a margin of 1 % above u for what rounding adds.

    Args:
        accuracy: in (0, 1).

    References:
        Amsel et al. 2025, The Polar Express, arXiv 2505.16932, theorem 3.1.

    Example:
        >>> [len(minimax(accuracy)) for accuracy in (0.6, 0.15, 0.01)]
        [4, 5, 6]
    """
    sets: list[tuple[float, float, float]] = []
    low, high, error = SMALLEST, 1.0, 1.0
    while error > accuracy:
        abc, error = _nearest_to_one(low, high * _MARGIN)
        sets.append(abc)
        low, high = 1 - error, 1 + error
    return tuple(sets)


def _nearest_to_one(low: float, high: float) -> tuple[tuple[float, float, float], float]:
    """The best odd polynomial of degree 5 on an interval, and its error, by Remez' exchange.

    It errs by the same amount, in turns below and above, at both ends and at its two extrema between them.
    """
    inner = (low + (high - low) / 4, high - (high - low) / 4)
    while True:
        rows = [(x, x**3, x**5, sign) for x, sign in zip((low, *inner, high), (1, -1, 1, -1), strict=True)]
        a, b, c, error = torch.linalg.solve(
            torch.tensor(rows, dtype=torch.float64, device="cpu"), torch.ones(4, dtype=torch.float64, device="cpu")
        ).tolist()
        root = math.sqrt(9 * b * b - 20 * a * c)
        extrema = (math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c)))
        moved = max(abs(x - y) for x, y in zip(inner, extrema, strict=True))
        inner = extrema
        if moved < 1e-6:  # it converges quadratically
            return (a, b, c), error
