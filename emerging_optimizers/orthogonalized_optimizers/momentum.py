r"""What every relative of Muon starts with: momentum, perhaps one step ahead.

.. math::
    M_t &= \mu M_{t-1} + (1 - \mu) G_t \\
    N_t &= M_t \quad\text{or, with nesterov,}\quad (1 - \mu) G_t + \mu M_t

The momentum is an exponential average that starts at zero and is not bias-corrected: most maps that follow do not see
its scale.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from emerging_optimizers.engine import Rule, Scalars, Step, lerp
from emerging_optimizers.engine.parts import Momentum_BMN
from emerging_optimizers.linalg.precision import FP32MatmulPrecT


class MomentumState(NamedTuple):
    """The momentum."""

    momentum_buffer: Momentum_BMN


def average(grad_BMN: Tensor, momentum_BMN: Tensor, mu: Any, *, nesterov: bool) -> tuple[Tensor, Tensor]:
    """The new momentum M, and N, to which the map is applied."""
    momentum_BMN = lerp(momentum_BMN, grad_BMN, 1 - mu)
    return momentum_BMN, lerp(grad_BMN, momentum_BMN, mu) if nesterov else momentum_BMN


@dataclass(frozen=True, kw_only=True)
class MomentumRule(Rule):
    """The momentum is the update; relatives write an `update` of their own, with a map in it."""

    State: ClassVar[type[Any]] = MomentumState
    reads: ClassVar[tuple[str, ...]] = ("momentum",)
    nesterov: bool = False
    fp32_matmul_prec: FP32MatmulPrecT = "highest"

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        momentum_BMN, ahead_BMN = average(grad, state.momentum_buffer, t.momentum, nesterov=self.nesterov)
        return Step(ahead_BMN, MomentumState(momentum_BMN))

    def orthogonalize(self, x_BMN: Tensor, t: Any) -> Tensor:
        """The map alone, which an optimizer's subclass may replace: the update of a momentum without memory.

        A rule whose update is more than momentum and a map overrides this, and its `update` calls it.
        """
        return self.update(x_BMN, MomentumState(torch.zeros_like(x_BMN)), t._replace(momentum=0.0)).direction
