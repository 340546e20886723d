r"""Dion3 (NorDion2): Dion2 by rows, with a second moment for each row as in NorMuon.

.. math::
    B_t &= M_{t-1} + G_t, \qquad
    K_t = \text{the } \lceil f M \rceil \text{ rows of } B_t \text{ with the largest } \ell_1 \text{ norms} \\
    O_t &= \mathrm{NS}(B_t[K_t]), \qquad
    v_t[K_t] = \beta_2 v_{t-1}[K_t] + (1 - \beta_2)\, \mathrm{mean}_N(O_t^2) \\
    \hat O_t &= O_t / (\sqrt{v_t[K_t]} + \epsilon), \qquad
    U_t[K_t] = s \, \hat O_t \, \|O_t\|_F / \|\hat O_t\|_F, \qquad U_t = 0 \text{ elsewhere} \\
    M_t[K_t] &= \mu B_t[K_t], \qquad M_t = B_t, \; v_t = v_{t-1} \text{ elsewhere} \\
    W_t &= (1 - \eta\lambda) W_{t-1} - \eta \, U_t

Rows, the neurons of a layer (out, in), are chosen whatever the shape. v starts at zero without a correction, so a row
in its first use moves further than one with a history. s is Muon's scale; f, momentum and cost are as in `dion2`.

State: one tensor and a number for each row, 4 bytes a parameter.

References:
    Amsel et al. 2026, Dion3: Full-Stack Orthogonal Updates, arXiv 2608.11612.
    Li et al. 2025, NorMuon: Making Muon more efficient and scalable, arXiv 2510.05491.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Unpack

import torch
from torch import Tensor

from emerging_optimizers.engine import Scalars, Step, lerp
from emerging_optimizers.engine.options import (
    FRACTION,
    Eps,
    ExtraScaleFactor,
    LearningRate,
    MatrixParams,
    NewtonSchulzSteps,
    Option,
    ScaleMode,
    WeightDecay,
    WeightDecayMethod,
    given,
)
from emerging_optimizers.engine.parts import Part
from emerging_optimizers.engine.rows import Rows
from emerging_optimizers.linalg.scaling import with_norm_of
from emerging_optimizers.orthogonalized_optimizers.dion2 import (
    Dion2,
    Dion2Rule,
    Fraction,
    UnusedMomentum_BMN,
    UsedMomentum,
)
from emerging_optimizers.orthogonalized_optimizers.orthogonalizer import (
    CoefficientType,
    NewtonSchulzPrecision,
    OrthogonalizerOptions,
    UseSyrk,
)


class Dion3State(NamedTuple):
    """The sum of gradients that have not been used up, and the second moment of each row."""

    momentum_buffer: UnusedMomentum_BMN
    moment2_buffer: Annotated[Tensor, Part("B M 1")]


@dataclass(frozen=True, kw_only=True)
class Dion3Rule(Dion2Rule):
    """The polar factor of the longest rows, each divided by its second moment."""

    State = Dion3State
    reads = ("momentum", "extra_scale_factor", "beta2", "eps")

    def update_rows(self, grad: Tensor, state: Any, t: Scalars, rows: Rows) -> Step:
        """See the module's equations."""
        sum_BMN, moment2_BM1 = state.momentum_buffer + grad, state.moment2_buffer
        M, N = rows.shape(grad)
        chosen = rows.longest(sum_BMN, self.count(M))
        chosen_KN = chosen.take(sum_BMN)

        def normalized(x_BKN: Tensor, v_BK1: Tensor) -> tuple[Tensor, Tensor]:
            O = self.orthogonalize(x_BKN, t)
            v_BK1 = lerp(v_BK1, O.square().mean(dim=-1, keepdim=True), 1 - t.beta2)
            return with_norm_of(O, O / (v_BK1.sqrt() + t.eps)) * self.scale((M, N), t), v_BK1

        U, v_K1 = chosen.whole(normalized, chosen_KN, chosen.take(moment2_BM1))
        direction_BMN = chosen.put(torch.zeros_like(sum_BMN), U)
        momentum_BMN = chosen.put(sum_BMN, chosen_KN * t.momentum)
        return Step(direction_BMN, Dion3State(momentum_BMN, chosen.put(moment2_BM1, v_K1)))

    def share_of(self, shape: Sequence[int]) -> float:
        """Of the rows."""
        return self.count(shape[0]) / shape[0]


class Dion3(Dion2):
    """Dion3; the equations are in this module's docstring.

    Update: s O / √v of the longest rows at the norm of O, v by row; zero elsewhere
    When to use it: as Dion2, where rows see gradients of different sizes
    When not to use it: where the loss counts, as for Dion2: on the demo it ended at 2.10

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(8, 4))
        >>> optimizer = Dion3([w], lr=0.1, fraction=0.25)
        >>> w.grad = torch.randn(8, 4)
        >>> optimizer.step()
        >>> int(w.abs().amax(dim=1).count_nonzero())
        2
    """

    rule = Dion3Rule

    def __init__(
        self,
        params: MatrixParams,
        lr: LearningRate = 2e-3,
        momentum: UsedMomentum = 0.95,
        weight_decay: WeightDecay = 0.01,
        *,
        fraction: Fraction = 0.25,
        beta2: Annotated[float, Option(FRACTION, "decay of the second moment, in [0, 1).")] = 0.95,
        eps: Annotated[Eps, "added to the root of the second moment, >= 0."] = 1e-8,
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
