r"""Muown: Muon with the norm of every row under control.

A weight is written as :math:`W = g \odot V / \|V\|_{row}`, a magnitude g for each of its M rows and a direction, and
both are trained, with the gradients that this form has:

.. math::
    u &= W_{t-1} / g_{t-1}, \qquad \nabla_g = \mathrm{rowsum}(G \odot u), \qquad
        \nabla_V = \frac{g_{t-1}}{\|V_{t-1}\|_{row}} (G - u \, \nabla_g) \\
    M_t &= \mu M_{t-1} + (1 - \mu) \nabla_V, \qquad V_t = u \, \|V_{t-1}\|_{row} - \eta \, s \, \mathrm{NS}(N_t) \\
    g_t &= (1 - \eta\lambda) \left( g_{t-1} - \eta \, \mathrm{Adam}(\nabla_g) \right) \\
    W_t &= g_t \, V_t / \|V_t\|_{row}

:math:`N_t` is the momentum or, with nesterov, :math:`(1 - \mu) \nabla_V + \mu M_t`; s is Muon's scale. g and
:math:`\|V\|_{row}` start as the norms of the weight's rows. Weight decay acts on the magnitudes, after their update.

In place of Muon where the norms of rows drift apart or grow. State: one tensor and four columns, 4 + 16 / N bytes a
parameter.

References:
    Lion et al. 2026, Muown: Row-Norm Control for Muon Optimization, arXiv 2605.10797.
"""

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Unpack

import torch
from torch import Tensor
from torch.linalg import vector_norm

from emerging_optimizers.engine import Scalars, Step
from emerging_optimizers.engine.hooks import REPLACE, WeightUpdateHook
from emerging_optimizers.engine.options import (
    NON_NEGATIVE,
    Betas,
    ExtraScaleFactor,
    LearningRate,
    MatrixParams,
    Momentum,
    Nesterov,
    NewtonSchulzSteps,
    Option,
    ScaleMode,
    WeightDecay,
    WeightDecayMethod,
    given,
)
from emerging_optimizers.engine.parts import Part
from emerging_optimizers.engine.weight_decay import WeightDecayT, keep_factor
from emerging_optimizers.linalg.scaling import muon_scale_factor
from emerging_optimizers.orthogonalized_optimizers.momentum import average
from emerging_optimizers.orthogonalized_optimizers.muon import Muon, MuonRule
from emerging_optimizers.orthogonalized_optimizers.orthogonalizer import (
    CoefficientType,
    NewtonSchulzPrecision,
    OrthogonalizerOptions,
    UseSyrk,
)
from emerging_optimizers.scalar_optimizers.adamw import AdamState, adam_direction

# Rows shorter than this count as this long: a row of zeros has no direction yet, and nothing may divide by its norm.
SMALLEST_ROW = 1e-12


Column_BM1 = Annotated[Tensor, Part("B M 1")]


class MuownState(NamedTuple):
    """Magnitudes and norms of the directions, which the first step fills in; momentum; Adam's moments of g."""

    g: Column_BM1
    v_norm: Column_BM1
    momentum_buffer: Annotated[Tensor, Part("B M N", rounds=True)]
    m_g: Column_BM1
    v_g: Column_BM1


class _Adam(NamedTuple):
    betas: Any
    eps: Any
    step: Any


@dataclass(frozen=True, kw_only=True)
class MuownRule(MuonRule):
    """Muon for the directions of the rows, Adam for their magnitudes."""

    State = MuownState
    reads = ("lr", "momentum", "extra_scale_factor", "betas", "adam_eps", "weight_decay", "step", "weight")
    weight_decay_method: WeightDecayT = "decoupled"

    @property
    def weight_law(self) -> WeightUpdateHook[Any]:
        """The weight is made of magnitudes and directions."""
        return REPLACE

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        # No step has been taken where v_norm is zero; the host may not know, as an accelerator skips bad gradients.
        start, rows = state.v_norm == 0, _row_norms(t.weight)
        g, v_norm = torch.where(start, rows, state.g), torch.where(start, rows, state.v_norm)
        u_BMN = t.weight / torch.where(g.abs() < SMALLEST_ROW, SMALLEST_ROW, g)
        grad_g = torch.sum(grad * u_BMN, dim=-1, keepdim=True)
        grad_v = (g / v_norm) * (grad - u_BMN * grad_g)

        momentum_BMN, ahead_BMN = average(grad_v, state.momentum_buffer, t.momentum, nesterov=self.nesterov)
        V_BMN = u_BMN * v_norm - t.lr * self.orthogonalize(ahead_BMN, t)

        adam: Any = _Adam(t.betas, t.adam_eps, t.step)
        direction, (m_g, v_g) = adam_direction(grad_g, AdamState(state.m_g, state.v_g), adam)
        g = keep_factor(self.weight_decay_method, t.lr, t.weight_decay) * (g - t.lr * direction)

        v_norm = _row_norms(V_BMN)
        return Step(g * (V_BMN / v_norm), MuownState(g, v_norm, momentum_BMN, m_g, v_g))

    def orthogonalize(self, x_BMN: Tensor, t: Scalars) -> Tensor:
        """s NS(X); a subclass of the optimizer may have another map."""
        scale = muon_scale_factor(x_BMN.size(-2), x_BMN.size(-1), self.scale_mode)
        return self.polar(x_BMN).mul_(scale * t.extra_scale_factor)  # fresh, so in place


MuownBetas = Annotated[Betas, "decay of Adam's first and second moment of the magnitudes, each in [0, 1)."]


class Muown(Muon):
    """Muown; the equations are in this module's docstring.

    Update: s O for the directions of rows, Adam for their norms
    When to use it: norms of rows drift or grow under Muon
    When not to use it: short runs: it ended at 2.163 on the demo and Muon at 1.741

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2, 2))
        >>> optimizer = Muown([w], lr=0.1)
        >>> w.grad = torch.tensor([[1.0, -1.0], [0.0, 0.0]])  # along the first row's sphere
        >>> optimizer.step()
        >>> torch.allclose(w.norm(dim=1), torch.full((2,), 2.0).sqrt())
        True
    """

    rule = MuownRule

    def __init__(
        self,
        params: MatrixParams,
        lr: Annotated[LearningRate, "learning rate of directions and magnitudes, >= 0."] = 3e-4,
        momentum: Momentum = 0.95,
        weight_decay: Annotated[WeightDecay, "of the magnitudes, >= 0."] = 0.0,
        *,
        betas: MuownBetas = (0.9, 0.95),
        adam_eps: Annotated[float, Option(NON_NEGATIVE, "added to the root of that second moment, >= 0.")] = 1e-8,
        fp32_matmul_prec: NewtonSchulzPrecision = "medium",
        coefficient_type: CoefficientType = "quintic",
        num_ns_steps: NewtonSchulzSteps = 5,
        scale_mode: ScaleMode = "spectral",
        extra_scale_factor: Annotated[ExtraScaleFactor, "multiplies the update of the directions, > 0."] = 1.0,
        use_syrk: UseSyrk = False,
        nesterov: Nesterov = False,
        weight_decay_method: WeightDecayMethod = "decoupled",
        **options: Unpack[OrthogonalizerOptions],
    ) -> None:
        super().__init__(**given(locals()))


def _row_norms(x_BMN: Tensor) -> Tensor:
    return vector_norm(x_BMN, dim=-1, keepdim=True).clamp_min(SMALLEST_ROW)
