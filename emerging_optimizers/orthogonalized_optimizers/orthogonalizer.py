r"""What Muon and its relatives share: the choice of an orthogonalizer.

====================  =============================================  ==================================================
orthogonalizer        method                                         settings
====================  =============================================  ==================================================
newton_schulz         odd polynomials of X by matrix products        `accuracy`, or `coefficient_type`, `num_ns_steps`,
                                                                     `custom_coefficient_sets`; `fp32_matmul_prec`
gram_newton_schulz    the same polynomials, on the small Gram side   the same
qdwh                  weighted Halley iteration, QR and Cholesky     none: exact to rounding, at the dtype of the state
svd                   singular value decomposition                   none: exact to rounding, at the dtype of the state
====================  =============================================  ==================================================

Each maps the singular values of a matrix to 1 or near it, and keeps its singular vectors; `docs/orthogonalizers.md` has
error bounds and costs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Unpack, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from emerging_optimizers.engine.options import (
    COUNT,
    FLAG,
    MATMUL_PRECISION,
    POSITIVE,
    Check,
    EngineOptions,
    Option,
    described,
    given,
    one_of,
    optional,
)
from emerging_optimizers.engine.rule import Where
from emerging_optimizers.engine.weight_decay import WeightDecayT
from emerging_optimizers.linalg.coefficients import (
    SCHEDULES,
    Coefficients,
    NSCoeffT,
    announce_coefficients,
    check_coefficients,
    coefficients,
    minimax,
)
from emerging_optimizers.linalg.kernels.syrk import no_syrk
from emerging_optimizers.linalg.newton_schulz import gram_newton_schulz, newton_schulz
from emerging_optimizers.linalg.polar import polar_qdwh, polar_svd
from emerging_optimizers.linalg.precision import FP32MatmulPrecT, newton_schulz_in_words, reduced_dtype
from emerging_optimizers.orthogonalized_optimizers.momentum import MomentumRule
from emerging_optimizers.orthogonalized_optimizers.orthogonalized_optimizer import OrthogonalizedOptimizer

# docs/orthogonalizers.md: how far TF32 and bfloat16 carry a singular value past what the polynomials say. It holds
# at "medium" also where that is float32, so that a program that runs on one machine runs on every other.
LEAST_ACCURACY = 0.05

OrthogonalizerT = Literal["newton_schulz", "gram_newton_schulz", "qdwh", "svd"]


NewtonSchulzPrecision = Annotated[
    FP32MatmulPrecT,
    Option(
        MATMUL_PRECISION,
        'Newton-Schulz in bfloat16 where the device multiplies it fast, else float32 ("medium"; `repr` says which, '
        '`linalg.precision` how that is decided), TF32 where the device has it ("high") or float32 ("highest"). '
        "float64 parameters are computed in float64.",
    ),
]
CoefficientType = Annotated[
    NSCoeffT,
    Option(
        one_of(*SCHEDULES, "custom"),
        '"quintic" (5 steps), "simple" (any), "polar_express" (8), "cans" (5), "aol" (4), "deepseekv4" (10), "cubic5" '
        '(5) or "custom". Another number of steps than a set is made for is announced by a warning; "cubic5" '
        'refuses it. "cans" diverges on gradients of low rank where products are rounded, and is refused unless '
        '`fp32_matmul_prec="highest"`. "aol" follows nearly rank-one gradients with the wrong sign, as published, and '
        "a warning says so.",
    ),
]
UseSyrk = Annotated[
    bool,
    Option(
        FLAG,
        "the symmetric products of Newton-Schulz by a triton kernel that computes half of them: on CUDA devices with "
        "triton, for bfloat16 and float32 (not float64); elsewhere True is refused. At "
        'fp32_matmul_prec="highest" the kernel does without tensor cores, and is right rather than fast.',
    ),
]


@described
class OrthogonalizerOptions(EngineOptions, total=False):
    """Keyword arguments of every optimizer that orthogonalizes by choice, beyond `EngineOptions`."""

    orthogonalizer: Annotated[
        OrthogonalizerT,
        Option(
            one_of(*get_args(OrthogonalizerT)),
            '"newton_schulz", "gram_newton_schulz" (the same map, cheaper where one side is much the longer), "qdwh" '
            'or "svd" (exact). Per group.',
            default="newton_schulz",
        ),
    ]
    accuracy: Annotated[
        float | None,
        Option(
            optional(Check(lambda v: POSITIVE.holds(v) and v < 1, "a number in (0, 1)")),
            "instead of `coefficient_type` and `num_ns_steps`: the fewest steps that take every singular value of at "
            "least 1e-3 of the Frobenius norm to within this distance of 1 (`linalg.coefficients.minimax`), in (0, 1) "
            'and at least 0.05 unless `fp32_matmul_prec="highest"`. 0.6 takes 4 steps, 0.15 takes 5. None: they count. '
            "Per group.",
            default=None,
        ),
    ]
    custom_coefficient_sets: Annotated[
        Sequence[tuple[float, float, float]] | None,
        Option(
            Check(
                lambda v: v is None or (len(v) > 0 and all(len(abc) == 3 for abc in v)),
                "None, or a list of (a, b, c)",
            ),
            'the (a, b, c) of each step for coefficient_type="custom", cycled. Per group.',
            default=None,
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class PolarRule(MomentumRule):
    """The choice of an orthogonalizer for a rule's `update`, as `polar`."""

    orthogonalizer: OrthogonalizerT = "newton_schulz"
    coefficient_type: NSCoeffT = "quintic"
    num_ns_steps: int = 5
    accuracy: float | None = None
    custom_coefficient_sets: Coefficients | None = None
    use_syrk: bool = False

    def obstacle(self, where: Where) -> str | None:
        """A kernel for symmetric products that cannot be had; a singular value decomposition, which asks the host."""
        wide = torch.float64 if where.dtype == torch.float64 else torch.float32  # of the state
        if self.use_syrk and (reason := no_syrk(where.device, self._compute_dtype(wide, where.device))):
            return reason
        if where.capturable and self.orthogonalizer == "svd":
            return "the host checks the success of orthogonalizer='svd'; give 'qdwh', which is as exact"
        return super().obstacle(where)

    def _compute_dtype(self, dtype: torch.dtype, device: torch.device) -> torch.dtype:
        return reduced_dtype(device) if self.fp32_matmul_prec == "medium" and dtype == torch.float32 else dtype

    def polar(self, x_BMN: Tensor) -> Tensor:
        """The polar factor of each matrix; Newton-Schulz in `reduced_dtype` at "medium", but not for float64."""
        if self.orthogonalizer == "qdwh":
            return polar_qdwh(x_BMN)
        if self.orthogonalizer == "svd":
            return polar_svd(x_BMN)
        iterate = newton_schulz if self.orthogonalizer == "newton_schulz" else gram_newton_schulz
        if self.accuracy is not None:
            sets = minimax(self.accuracy)
        else:
            sets = coefficients(self.coefficient_type, self.num_ns_steps, self.custom_coefficient_sets)
        dtype = self._compute_dtype(x_BMN.dtype, x_BMN.device)
        return iterate(x_BMN, sets, compute_dtype=dtype, use_syrk=self.use_syrk)


class PolarOptimizer(OrthogonalizedOptimizer):
    """The base of optimizers with a `PolarRule`: ranges, defaults and warnings of the orthogonalizer's settings."""

    rule = PolarRule
    # Of options that not every class has an argument for.
    preset = {"nesterov": False, "use_syrk": False}
    ranges = {"coefficient_type": one_of(*SCHEDULES, "custom"), "num_ns_steps": COUNT, "use_syrk": FLAG}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float,
        weight_decay: float,
        *,
        nesterov: bool = False,
        weight_decay_method: WeightDecayT = "decoupled",
        **options: Unpack[OrthogonalizerOptions],
    ) -> None:
        super().__init__(**given(locals()))

    def __repr__(self) -> str:
        casting = [group for group in self.param_groups if self.casts(group)]
        return super().__repr__() + newton_schulz_in_words(p.device for group in casting for p in group["params"])

    @classmethod
    def casts(cls, group: Mapping[str, Any]) -> bool:
        """Whether a group's Newton-Schulz multiplies in what "medium" is on a device."""
        return group["fp32_matmul_prec"] == "medium" and "newton_schulz" in group["orthogonalizer"]

    @classmethod
    def _check_choice(cls, group: Mapping[str, Any]) -> None:
        if (
            group["accuracy"] is None
            and group["coefficient_type"] == "custom"
            and group["custom_coefficient_sets"] is None
        ):
            raise ValueError(
                f"{cls.__name__}: coefficient_type='custom' needs custom_coefficient_sets, a list of (a, b, c); or "
                f"choose one of {', '.join(SCHEDULES)}"
            )
        iterates = "newton_schulz" in group["orthogonalizer"]
        if group["use_syrk"] and not iterates:
            raise ValueError(
                f"{cls.__name__}: use_syrk=True is about the products of Newton-Schulz, and "
                f"orthogonalizer={group['orthogonalizer']!r} has none; give use_syrk=False"
            )
        precision: FP32MatmulPrecT = group["fp32_matmul_prec"] if iterates else "highest"
        if group["accuracy"] is not None:
            cls._check_accuracy(group["accuracy"], precision, group["orthogonalizer"])
        else:
            check_coefficients(group["coefficient_type"], group["num_ns_steps"], precision)

    @classmethod
    def _check_accuracy(cls, accuracy: float, precision: FP32MatmulPrecT, orthogonalizer: OrthogonalizerT) -> None:
        if "newton_schulz" not in orthogonalizer:
            raise ValueError(
                f"{cls.__name__}: accuracy={accuracy} chooses steps of Newton-Schulz, and orthogonalizer="
                f"{orthogonalizer!r} is exact to rounding; leave accuracy out"
            )
        if accuracy < LEAST_ACCURACY and precision != "highest":
            raise ValueError(
                f"{cls.__name__}: accuracy={accuracy} cannot be had with fp32_matmul_prec={precision!r}, which "
                f"moves singular values by up to {LEAST_ACCURACY}; give at least that, or fp32_matmul_prec='highest'"
            )

    @classmethod
    def _announce(cls, group: Mapping[str, Any]) -> None:
        if group["accuracy"] is None and "newton_schulz" in group["orthogonalizer"]:
            announce_coefficients(group["coefficient_type"], group["num_ns_steps"])
