r"""Spectron: a weight of low rank, whose update has a bounded spectral norm.

.. math::
    W &= A B^\top, \qquad A \in \mathbb R^{M \times r}, \; B \in \mathbb R^{N \times r} \\
    G_A &= G B, \quad G_B = G^\top A, \qquad M_X \leftarrow \beta M_X + (1 - \beta) G_X
        \quad (X = A, B) \\
    \rho &= \eta / (\sigma_A + \sigma_B + 1), \qquad \sigma_X = \|X\|_2 \text{ by power iteration} \\
    A &\leftarrow k A - \rho\, O_A, \quad B \leftarrow k B - \rho\, O_B, \qquad O_X = \mathrm{NS}(M_X) / c

with k the factor of weight decay and c the largest number to which Newton-Schulz maps a singular value, so that
:math:`\|O_X\|_2 \le 1`. The "+ 1" pays for the product of the two moves: beside weight decay,

.. math:: \|\Delta W\|_2 \le \rho\,(\sigma_A + \sigma_B) + \rho^2 \le \eta \quad\text{for}\quad \eta \le 1.

Power iteration never overestimates a norm. The bound holds as long as it falls short of :math:`\sigma_A + \sigma_B`
by no more than :math:`1 - \rho`; it starts at the exact singular vectors, one iteration a step follows them, and a norm
cannot grow by more than :math:`\rho` in a step. The published draft starts at random vectors, 0.8 of the norm, and has
c = 1, while its Newton-Schulz maps a gradient of rank one to 1.145: its step is this one at c times the learning rate.

Two ways to use it, one law. With a dense weight the factors are optimizer state, in float32 whatever the weight is;
the first step replaces the weight by its truncated singular value decomposition and says how much that loses. With
`LowRankLinear` layers (`emerging_optimizers.lowrank`) the factors are the weight, which is what the paper trains:
no dense weight, gradient or product is ever formed.

For pretraining models whose matrices are meant to stay of low rank. State, numbers for a matrix: dense 2 r (M + N)
+ M + N; factors as weights r (M + N) + M + N.

References:
    Janson, Oyallon and Belilovsky 2026, Stabilizing Native Low-Rank LLM Pretraining, arXiv 2602.12429.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Unpack

import torch
from torch import Tensor

from emerging_optimizers.engine import EngineOptions, Rule, RuleOptimizer, Scalars, Step, lerp
from emerging_optimizers.engine.hooks import REPLACE, WeightUpdateHook
from emerging_optimizers.engine.options import (
    COUNT,
    FRACTION,
    NON_NEGATIVE,
    Check,
    LearningRate,
    MatrixParams,
    NewtonSchulzSteps,
    Option,
    ScheduledCoefficients,
    WeightDecay,
    WeightDecayMethod,
    given,
    optional,
)
from emerging_optimizers.engine.parts import Part, before_first_step
from emerging_optimizers.engine.rule import StartsFromWeight, Where, rule_of
from emerging_optimizers.engine.weight_decay import WeightDecayT, keep_factor
from emerging_optimizers.linalg.coefficients import (
    NSCoeffT,
    announce_coefficients,
    check_coefficients,
    coefficients,
)
from emerging_optimizers.linalg.low_rank import balanced_factors, leading_left, rank_of
from emerging_optimizers.linalg.newton_schulz import newton_schulz
from emerging_optimizers.linalg.power_iteration import power_iteration
from emerging_optimizers.linalg.precision import (
    FP32MatmulPrecT,
    fp32_matmul_precision,
    newton_schulz_in_words,
    reduced_dtype,
)
from emerging_optimizers.orthogonalized_optimizers.orthogonalizer import NewtonSchulzPrecision


class Factor(NamedTuple):
    """One of the two, and what moves with it."""

    value: Tensor  # B M R
    momentum: Tensor  # B M R
    u: Tensor  # B M, estimate of the leading left singular vector


class SpectronState(NamedTuple):
    """Factors behind a dense weight. u_A = 0 marks a matrix whose factors have to be made (again)."""

    factor_A: Annotated[Tensor, Part("B M R")]
    factor_B: Annotated[Tensor, Part("B N R")]
    momentum_A: Annotated[Tensor, Part("B M R")]
    momentum_B: Annotated[Tensor, Part("B N R")]
    u_A: Annotated[Tensor, Part("B M", marks=True)]
    u_B: Annotated[Tensor, Part("B N")]


class FactorState(NamedTuple):
    """Where the parameter is the two factors, A above B: M rows in all, and so is the state."""

    momentum: Annotated[Tensor, Part("B M N")]
    u: Annotated[Tensor, Part("B M")]


@dataclass(frozen=True, kw_only=True)
class SpectronRule(StartsFromWeight):
    """The factors are state behind a dense weight; `FactorRule` is for those that are the weight."""

    reads = ("lr", "momentum_beta", "weight_decay", "step", "weight", "l2")  # l2 decay is that of the factors
    rank: int = 64
    rank_ratio: float | None = None
    truncation_tolerance: float | None = None
    weight_decay_method: WeightDecayT = "decoupled"
    newton_schulz_prec: FP32MatmulPrecT = "medium"  # `fp32_matmul_prec` of a rule would hold for the whole step
    num_ns_steps: int = 5
    num_power_iter: int = 1
    coefficient_type: NSCoeffT = "quintic"
    out_features: int | None = None
    stretch: float = 1.0  # c; follows from the others

    @property
    def weight_law(self) -> WeightUpdateHook[Any]:
        """The weight is the product of the factors, or both of them."""
        return REPLACE

    def init(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
        """Zeros, which is no state yet; `start` makes it."""
        rank = rank_of(shape[-2], shape[-1], self.rank, self.rank_ratio)
        return before_first_step(SpectronState, shape, dtype, device, sizes={"R": rank})

    def start(self, weight: Tensor, labels: Sequence[str]) -> Any:
        """Factors from the truncated singular value decomposition; refuses or announces what that loses."""
        rank = rank_of(weight.size(-2), weight.size(-1), self.rank, self.rank_ratio)
        factors = balanced_factors(weight, rank)
        worst = int(factors.lost.argmax())
        lost = float(factors.lost[worst])
        given = f"rank={self.rank}" if self.rank_ratio is None else f"rank_ratio={self.rank_ratio}"
        text = f"Spectron: {given} keeps {rank} singular values of {labels[worst]}; {lost:.3g} of its norm is lost"
        limit = self.truncation_tolerance
        if limit is not None and lost > limit:
            raise ValueError(
                f"{text}, truncation_tolerance={limit} allowed; nothing has moved. Give a larger rank, or None to go on"
            )
        if limit is None and lost > weight.size(-1) * torch.finfo(weight.dtype).eps:
            more = "" if len(labels) == 1 else f", the most of {len(labels)} matrices of its shape"
            warnings.warn(
                f"{text}{more}. truncation_tolerance={math.ceil(100 * lost) / 100:g} accepts that",
                UserWarning,
                stacklevel=2,
            )
        A, B, u_A, u_B, _ = factors
        return SpectronState(A, B, torch.zeros_like(A), torch.zeros_like(B), u_A, u_B)

    def obstacle(self, where: Where) -> str | None:
        """The host factorises a weight that someone else has written."""
        if where.capturable:
            return "the host factorises a weight that someone else has written; use low-rank layers (factor_groups)"
        return super().obstacle(where)

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations. A weight that is not the product that was written sits the step out."""
        s: SpectronState = state
        A, B = self.move(
            Factor(s.factor_A, s.momentum_A, s.u_A),
            Factor(s.factor_B, s.momentum_B, s.u_B),
            grad @ s.factor_B,
            grad.mT @ s.factor_A,
            t,
        )
        new = SpectronState(A.value, B.value, A.momentum, B.momentum, A.u, B.u)
        weight = A.value @ B.value.mT
        is_product = self._is_product(t.weight, s.factor_A, s.factor_B, t.weight_dtype)
        first = t.step.flatten() == 1  # no product has been written before
        ours = (is_product | first) & s.u_A.any(dim=-1)
        kept = [torch.where(ours.view(-1, *(1 for _ in x.shape[1:])), x, old) for x, old in zip(new, s, strict=True)]
        marked = SpectronState(*kept)._replace(u_A=torch.where(ours.unsqueeze(-1), new.u_A, 0))
        return Step(torch.where(ours.view(-1, 1, 1), weight, t.weight), marked)

    @staticmethod
    def _is_product(weight: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
        """Whether each weight is A B^T but for one rounding to its dtype, in its largest entry and in norm; (B,)."""
        residual = torch.baddbmm(weight, A, B.mT, alpha=-1)
        info = torch.finfo(dtype)
        # A unit in the last place, as chance may have rounded it; 2^-16 of the product itself, where its terms cancel
        # or another kernel forms it.
        share = 1.01 * info.eps + 2**-16
        floor = info.eps * info.tiny  # spacing of float16's subnormals
        largest = _largest(residual) <= share * _largest(weight) + floor
        return largest & (_norm(residual) <= share * _norm(weight) + floor * residual[0].numel() ** 0.5)

    def move(self, A: Factor, B: Factor, grad_A: Tensor, grad_B: Tensor, t: Scalars) -> tuple[Factor, Factor]:
        """Both factors, one step on."""
        keep = keep_factor(self.weight_decay_method, t.lr, t.weight_decay)
        moved = []
        for (value, momentum, u), grad in ((A, grad_A), (B, grad_B)):
            if self.weight_decay_method == "l2":
                grad = grad + t.weight_decay * value
            sigma, u, _ = power_iteration(value * keep, u, self.num_power_iter)
            moved.append((value * keep, lerp(momentum, grad, 1 - t.momentum_beta), u, sigma))
        rho = (t.lr / (moved[0][-1] + moved[1][-1] + 1)).view(-1, 1, 1)
        first, second = (Factor(x - rho * self.orthogonalize(m), m, u) for x, m, u, _ in moved)
        return first, second

    def orthogonalize(self, x_BMR: Tensor) -> Tensor:
        """Newton-Schulz, with no singular value above one."""
        schedule = coefficients(self.coefficient_type, self.num_ns_steps)
        low = self.newton_schulz_prec == "medium" and x_BMR.dtype == torch.float32
        with fp32_matmul_precision(self.newton_schulz_prec):
            polar = newton_schulz(x_BMR, schedule, compute_dtype=reduced_dtype(x_BMR.device) if low else None)
        return polar / self.stretch


@dataclass(frozen=True, kw_only=True)
class FactorRule(SpectronRule):
    """The parameter is the two factors, the `out_features` rows of A above those of B."""

    def init(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
        """Zero momentum; `start` makes the vectors."""
        return before_first_step(FactorState, shape, dtype, device)

    def start(self, weight: Tensor, labels: Sequence[str]) -> Any:
        """The exact leading singular vectors."""
        assert self.out_features is not None
        if self.out_features >= weight.size(-2):
            raise ValueError(
                f"Spectron: out_features={self.out_features} leaves no row for B in {labels[0]}; it is how many of the "
                "parameter's rows are A's. factor_groups(model) sets it"
            )
        A, B = self._split(weight)
        return FactorState(torch.zeros_like(weight), torch.cat([leading_left(A), leading_left(B)], dim=-1))

    def obstacle(self, where: Where) -> str | None:
        """Nothing is factorised."""
        return super().obstacle(where._replace(capturable=False))

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """The same law on the factors' own gradients."""
        parts = (self._split(x) for x in (t.weight, state.momentum, state.u.unsqueeze(-1)))
        A, B = (Factor(value, momentum, u.squeeze(-1)) for value, momentum, u in zip(*parts, strict=True))
        A, B = self.move(A, B, *self._split(grad), t)
        momentum, u = torch.cat([A.momentum, B.momentum], dim=-2), torch.cat([A.u, B.u], dim=-1)
        return Step(torch.cat([A.value, B.value], dim=-2), FactorState(momentum, u))

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert self.out_features is not None
        return x[:, : self.out_features], x[:, self.out_features :]


def _largest(x_BMN: Tensor) -> Tensor:
    return torch.maximum(x_BMN.amax(dim=(-2, -1)), -x_BMN.amin(dim=(-2, -1)))  # a tenth of the time of the inf norm


def _norm(x_BMN: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x_BMN, dim=(-2, -1))


def _largest_stretch(values: Mapping[str, Any]) -> float:
    """The largest number to which Newton-Schulz maps a singular value; normalised, those lie in [0, 1]."""
    x = torch.linspace(0, 1, 10001, dtype=torch.float64, device="cpu")
    for a, b, c in coefficients(values["coefficient_type"], values["num_ns_steps"]):
        x = a * x + b * x**3 + c * x**5
    # Measured in bfloat16: at most 0.5 % above it, from rank one to 128 x 64 and spectra of five decades. It is part of
    # "medium" also where that is float32, so that the step has one length on every machine.
    return float(x.abs().max()) * (1 + (2**-7 if values["fp32_matmul_prec"] == "medium" else 2**-18))


SpectronParams = Annotated[
    MatrixParams,
    "tensors of two or more dimensions, (name, tensor) pairs, or groups. 3-D: a batch of matrices; "
    "convolutions are flattened to (out, rest). `lowrank.factor_groups(model)` makes the groups of a "
    "model whose factors are its weights.",
]
RankRatio = Annotated[
    float | None,
    Option(
        optional(Check(lambda v: NON_NEGATIVE.holds(v) and 0 < v <= 1, "a number in (0, 1]")),
        "r as a share of min(M, N), in (0, 1]; it then stands in for `rank`.",
    ),
]
TruncationTolerance = Annotated[
    float | None,
    Option(
        optional(NON_NEGATIVE),
        "how much of a matrix the first step may lose, as a share of its Frobenius norm. More raises before "
        "anything moves; None: any, with a warning that says how much.",
    ),
]
OutFeatures = Annotated[
    int | None,
    Option(optional(COUNT), "for a parameter that is the two factors, A above B: the rows of A. None: a dense weight."),
]


class Spectron(RuleOptimizer):
    """Spectron; the equations are in this module's docstring.

    Update: A and B of W = A Bᵀ by η O / (‖A‖ + ‖B‖ + 1) each, so that ‖ΔW‖ ≤ η
    When to use it: weights of low rank, from the start or as layers
    When not to use it: weights that need their full rank: the first step cuts it off

    A weight that someone else writes (an average that is swapped in, clipping, `load_state_dict` of the model) is
    noticed on the device: it differs from the product that was written, in its largest entry or in norm, by more than
    rounding explains (0.4 % in bfloat16, 0.05 % in float16, 0.0015 % in float32). It then sits one step out, as it is,
    and the next step factorises it anew with momentum at zero; the host hears of it one step late, so that nothing
    waits for the device. A smaller change is overwritten, and one that is undone before the next step is none.

    A zero matrix starts with A of random orthonormal columns and B = 0, since two zero factors never move. The random
    numbers follow `torch.manual_seed`'s seed and the shape, and leave the generator alone.

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(6, 4))
        >>> optimizer = Spectron([w], lr=0.1, rank=2)
        >>> w.grad = torch.randn(6, 4)
        >>> optimizer.step()
        >>> bool(torch.linalg.matrix_norm(w, 2) <= 0.1), torch.linalg.matrix_rank(w).item()
        (True, 2)
    """

    rule = SpectronRule

    def __init__(
        self,
        params: SpectronParams,
        lr: Annotated[LearningRate, "learning rate, >= 0; up to 1 it bounds the spectral norm of the update."] = 3e-4,
        rank: Annotated[int, Option(COUNT, "r, >= 1; at most min(M, N) is used.")] = 64,
        momentum_beta: Annotated[float, Option(FRACTION, "beta, in [0, 1).")] = 0.9,
        weight_decay: Annotated[WeightDecay, ">= 0, applied to both factors."] = 0.01,
        *,
        weight_decay_method: WeightDecayMethod = "decoupled",
        fp32_matmul_prec: NewtonSchulzPrecision = "medium",
        num_ns_steps: NewtonSchulzSteps = 5,
        num_power_iter: Annotated[int, Option(COUNT, "power iterations a step, >= 1.")] = 1,
        coefficient_type: ScheduledCoefficients = "quintic",
        rank_ratio: RankRatio = None,
        truncation_tolerance: TruncationTolerance = None,
        out_features: OutFeatures = None,
        **engine: Unpack[EngineOptions],
    ) -> None:
        super().__init__(**given(locals()))

    @classmethod
    def _rule(cls, group: Mapping[str, Any]) -> Rule:
        kind = SpectronRule if group["out_features"] is None else FactorRule
        precision = group["fp32_matmul_prec"]
        return rule_of(kind, {**group, "newton_schulz_prec": precision, "stretch": _largest_stretch(group)})

    def __repr__(self) -> str:
        casting = [group for group in self.param_groups if self.casts(group)]
        return super().__repr__() + newton_schulz_in_words(p.device for group in casting for p in group["params"])

    @classmethod
    def casts(cls, group: Mapping[str, Any]) -> bool:
        """Whether a group's Newton-Schulz multiplies in what "medium" is on a device."""
        return bool(group["fp32_matmul_prec"] == "medium")

    @classmethod
    def _check_choice(cls, group: Mapping[str, Any]) -> None:
        check_coefficients(group["coefficient_type"], group["num_ns_steps"], group["fp32_matmul_prec"])
        if group["out_features"] is None and any(hasattr(p, "low_rank_factors") for p in group["params"]):
            raise ValueError(
                "Spectron: a parameter of LowRankLinear is given as if it were a dense weight; give "
                "lowrank.factor_groups(model), which says how many of its rows are A's, or call "
                "create_optimizer('spectron', model)"
            )

    @classmethod
    def _announce(cls, group: Mapping[str, Any]) -> None:
        announce_coefficients(group["coefficient_type"], group["num_ns_steps"])
