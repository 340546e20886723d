r"""Dion2: Muon that orthogonalizes only the rows, or columns, whose momentum has grown longest.

.. math::
    B_t &= M_{t-1} + G_t \\
    K_t &= \text{the } \lceil f n \rceil \text{ of the } n \text{ rows of } B_t \text{ with the largest } \ell_1
        \text{ norms} \\
    U_t[K_t] &= s \, \mathrm{NS}(B_t[K_t]), \qquad U_t = 0 \text{ elsewhere} \\
    M_t[K_t] &= \mu B_t[K_t], \qquad M_t = B_t \text{ elsewhere} \\
    W_t &= (1 - \eta\lambda) W_{t-1} - \eta \, U_t

A row that is left out keeps all of its momentum, so that nothing is lost and its turn comes (error feedback); what has
been used fades. Of a matrix with more rows than columns the columns are chosen. With f = 1 it is Muon with a
sum of gradients for its momentum. s is Muon's scale: with `scale_mode="spectral"` the RMS of an update is sqrt(f).

Newton-Schulz of k x N instead of M x N takes f^2 times the products, of the Gram matrix f^3 times. Where processes have
cut a matrix, each keeps its part of the momentum, and only what is chosen travels to the owner and back
(docs/distributed.md).

For large models whose step waits for Newton-Schulz. State: one tensor, 4 bytes a parameter.

References:
    Ahn et al. 2025, Dion2: A Simple Method to Shrink Matrix in Muon, arXiv 2512.16928.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Annotated, Any, ClassVar, NamedTuple, Unpack

import torch
from torch import Tensor

from emerging_optimizers.engine import Scalars, Step
from emerging_optimizers.engine.options import (
    POSITIVE,
    Check,
    ExtraScaleFactor,
    LearningRate,
    MatrixParams,
    Momentum,
    NewtonSchulzSteps,
    Option,
    ScaleMode,
    WeightDecay,
    WeightDecayMethod,
    given,
)
from emerging_optimizers.engine.parts import Part
from emerging_optimizers.engine.rows import Rows
from emerging_optimizers.engine.rule import PicksRows
from emerging_optimizers.orthogonalized_optimizers.muon import MuonRule
from emerging_optimizers.orthogonalized_optimizers.orthogonalizer import (
    CoefficientType,
    NewtonSchulzPrecision,
    OrthogonalizerOptions,
    PolarOptimizer,
    UseSyrk,
)

# Neither a sum nor an average: rows fade when they are used.
UnusedMomentum_BMN = Annotated[Tensor, Part("B M N", rounds=True)]


class Dion2State(NamedTuple):
    """The sum of gradients that have not been used up."""

    momentum_buffer: UnusedMomentum_BMN


@dataclass(frozen=True, kw_only=True)
class Dion2Rule(PicksRows, MuonRule):
    """The polar factor of the longest rows or columns."""

    State: ClassVar[type[Any]] = Dion2State
    reads: ClassVar[tuple[str, ...]] = ("momentum", "extra_scale_factor")
    fraction: float = 0.25

    def update_rows(self, grad: Tensor, state: Any, t: Scalars, rows: Rows) -> Step:
        """See the module's equations."""
        sum_BMN = state.momentum_buffer + grad
        M, N = rows.shape(grad)
        turned = M > N
        rows_BMN = sum_BMN.mT if turned else sum_BMN
        chosen = rows.longest(rows_BMN, self.count(min(M, N)), turned=turned)
        chosen_KN = chosen.take(rows_BMN)
        (O,) = chosen.whole(lambda x_BKN: (self.orthogonalize(x_BKN, t),), chosen_KN)
        direction_BMN = chosen.put(torch.zeros_like(rows_BMN), O * self.scale((M, N), t))
        momentum_BMN = chosen.put(rows_BMN, chosen_KN * t.momentum)
        if turned:
            direction_BMN, momentum_BMN = direction_BMN.mT, momentum_BMN.mT
        return Step(direction_BMN, Dion2State(momentum_BMN))

    def orthogonalize(self, x_BMN: Tensor, t: Any) -> Tensor:
        """O of the chosen rows, without scale; a subclass of the optimizer may have another."""
        return self.polar(x_BMN)

    def count(self, rows: int) -> int:
        """How many of so many rows are chosen."""
        return ceil(self.fraction * rows)

    def share_of(self, shape: Sequence[int]) -> float:
        """Of the shorter side."""
        return self.count(min(shape)) / min(shape)


Fraction = Annotated[
    float,
    Option(
        Check(lambda v: POSITIVE.holds(v) and v <= 1, "a number in (0, 1]"),
        "share of the rows or columns that is orthogonalized in a step, in (0, 1]; at least one is.",
    ),
]
UsedMomentum = Annotated[Momentum, "what is left of the momentum of a row after its use, in [0, 1)."]


class Dion2(PolarOptimizer):
    """Dion2; the equations are in this module's docstring.

    Update: s O of the longest rows or columns of a sum of gradients, zero elsewhere
    When to use it: Muon where the time of Newton-Schulz counts
    When not to use it: where the loss counts: on the demo it ended at 2.02 to 2.10 and Muon at 1.74

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(4, 8))
        >>> optimizer = Dion2([w], lr=0.1, fraction=0.25)
        >>> w.grad = torch.randn(4, 8)
        >>> optimizer.step()
        >>> int(w.abs().amax(dim=1).count_nonzero())
        1
    """

    rule = Dion2Rule

    def __init__(
        self,
        params: MatrixParams,
        lr: LearningRate = 2e-3,
        momentum: UsedMomentum = 0.95,
        weight_decay: WeightDecay = 0.01,
        *,
        fraction: Fraction = 0.25,
        weight_decay_method: WeightDecayMethod = "decoupled",
        fp32_matmul_prec: NewtonSchulzPrecision = "medium",
        coefficient_type: CoefficientType = "quintic",
        num_ns_steps: NewtonSchulzSteps = 5,
        scale_mode: ScaleMode = "spectral",
        extra_scale_factor: ExtraScaleFactor = 1.0,
        use_syrk: UseSyrk = False,
        **options: Unpack[OrthogonalizerOptions],
    ) -> None:
        super().__init__(**given(locals()))

    @classmethod
    def _check_choice(cls, group: Mapping[str, Any]) -> None:
        super()._check_choice(group)
        if group["nesterov"]:
            raise ValueError(
                f"{cls.__name__}: nesterov=True is not possible, a used row has no step ahead; leave it out"
            )
