r"""SinkhornMuon: Muon on matrices with nonnegative entries and given sums of rows and columns.

.. math::
    W_t = S\big((1 - \eta\lambda) \log W_{t-1} - \eta\, U_t\big)

for Muon's update U and the Sinkhorn-Knopp map S of `linalg.sinkhorn`: rows of W sum to max(1, N / M), columns to
max(1, M / N), so that a square W is doubly stochastic. The learning rate is the relative change of an entry, weight
decay draws W towards the matrix of equal entries, and an entry that is zero stays zero.

The published law has W in place of log W. S takes exponentials, so each step then flattens the weight, by 1 / N near
equal entries, whatever its gradient is: without a gradient W forgets itself in a few steps. `law="published"` is that.

For mixing matrices, such as those of residual streams. State: one tensor, 4 bytes a parameter.

References:
    Xie et al. 2025, mHC: Manifold-Constrained Hyper-Connections, arXiv 2512.24880.
    Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Unpack, get_args

import torch
from torch import Tensor

from emerging_optimizers.distributed.dtensor import whole_of
from emerging_optimizers.engine.hooks import WeightUpdateHook
from emerging_optimizers.engine.options import (
    COUNT,
    POSITIVE,
    ExtraScaleFactor,
    LearningRate,
    MatrixParams,
    Momentum,
    Nesterov,
    NewtonSchulzSteps,
    Option,
    PositiveEps,
    ScaleMode,
    WeightDecay,
    WeightDecayMethod,
    given,
    one_of,
)
from emerging_optimizers.engine.validate import label
from emerging_optimizers.linalg.sinkhorn import sinkhorn, sums
from emerging_optimizers.orthogonalized_optimizers.muon import Muon, MuonRule
from emerging_optimizers.orthogonalized_optimizers.orthogonalizer import (
    CoefficientType,
    NewtonSchulzPrecision,
    OrthogonalizerOptions,
    UseSyrk,
)

SinkhornLawT = Literal["logarithmic", "published"]


@dataclass(frozen=True)
class SinkhornHook(WeightUpdateHook[Any]):
    """The map as the last arrow of a step."""

    matrices_only = True
    num_iters: int
    eps: float
    law: SinkhornLawT

    def move(self, weight: Tensor, update: Tensor, keep: Any, lr: Any) -> Tensor:
        x = weight if self.law == "published" else weight.log()
        return sinkhorn(x * keep - lr * update, self.num_iters, self.eps)


@dataclass(frozen=True, kw_only=True)
class SinkhornMuonRule(MuonRule):
    """Muon, and the map."""

    num_iters: int = 20
    eps: float = 1e-8
    law: SinkhornLawT = "logarithmic"

    @property
    def weight_law(self) -> SinkhornHook:
        """The map."""
        return SinkhornHook(self.num_iters, self.eps, self.law)


SinkhornMuonParams = Annotated[
    MatrixParams,
    "matrices or batches of matrices, (name, tensor) pairs, or groups. Each has to be what the map makes: "
    "nonnegative, rows and columns with their sums. `utils.SinkhornMapper` makes it.",
]
DoublyStochasticTolerance = Annotated[
    float, Option(POSITIVE, "how far the sums of a weight may be off when it is given, > 0.")
]
Law = Annotated[
    SinkhornLawT, Option(one_of(*get_args(SinkhornLawT)), '"logarithmic", or "published", which flattens weights.')
]


class SinkhornMuon(Muon):
    """SinkhornMuon; the equations are in this module's docstring.

    Raises:
        ValueError: a value out of its range, or a parameter that the map has not made.

    Example:
        >>> w = torch.nn.Parameter(torch.full((2, 2), 0.5))
        >>> optimizer = SinkhornMuon([w], lr=0.1)
        >>> w.grad = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> optimizer.step()
        >>> bool(w[0, 0] < 0.5), w.sum(dim=0).round(decimals=4)
        (True, tensor([1., 1.], grad_fn=<RoundBackward1>))
    """

    rule = SinkhornMuonRule

    def __init__(
        self,
        params: SinkhornMuonParams,
        lr: Annotated[LearningRate, "learning rate, >= 0; about the relative change of an entry."] = 3e-4,
        momentum: Momentum = 0.95,
        weight_decay: WeightDecay = 0.01,
        *,
        num_iters: Annotated[int, Option(COUNT, "iterations of the map, >= 1.")] = 20,
        eps: Annotated[PositiveEps, "smaller sums of rows and columns count as this, > 0."] = 1e-8,
        doubly_stochastic_tolerance: DoublyStochasticTolerance = 0.1,
        law: Law = "logarithmic",
        nesterov: Nesterov = False,
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
    @torch.no_grad()
    def _announce(cls, group: Mapping[str, Any]) -> None:
        super()._announce(group)
        for i, p in enumerate(group["params"]):
            if not p.numel():
                continue
            p = whole_of(p)
            columns, rows = sums(*p.shape[-2:])
            off = max(float((p.sum(dim=-2) - columns).abs().max()), float((p.sum(dim=-1) - rows).abs().max()))
            given = f"SinkhornMuon: {label(group, i, p)}"
            if bool((p < 0).any()):
                raise ValueError(
                    f"{given} has negative entries, down to {float(p.min()):.3g}; give SinkhornMapper()(p)"
                )
            if not off <= group["doubly_stochastic_tolerance"]:
                raise ValueError(
                    f"{given} has rows that should sum to {rows:.3g} and columns that should sum to {columns:.3g}, and "
                    f"one is off by {off:.3g}; doubly_stochastic_tolerance={group['doubly_stochastic_tolerance']} is "
                    "allowed. Give SinkhornMapper()(p)"
                )
