"""Weight decay under the published path and names; `engine.weight_decay` has the equations."""

from typing import get_args

import torch
from torch import Tensor

from emerging_optimizers.engine.weight_decay import WeightDecayT, keep_factor

__all__ = ["WeightDecayMixin", "WeightDecayT"]


class WeightDecayMixin:
    """For optimizers of your own on `torch.optim.Optimizer`: the four kinds of weight decay, one parameter at a time.

    This library's optimizers do not use it: their engine does the same for stacks.

    Attributes:
        weight_decay_method: "decoupled", "independent", "l2" or "palm". Without it: "l2".

    Example:
        >>> class SGD(WeightDecayMixin):
        ...     weight_decay_method = "decoupled"
        >>> p = torch.ones(2)
        >>> SGD()._apply_weight_decay_inplace(p, torch.zeros(2), lr=0.1, weight_decay=0.5)
        >>> p
        tensor([0.9500, 0.9500])
    """

    weight_decay_method: WeightDecayT = "l2"

    @torch.no_grad()
    def _apply_weight_decay_inplace(self, p: Tensor, grad: Tensor, lr: float, weight_decay: float) -> None:
        """Shrink p, or with "l2" add to grad, in place.

        Raises:
            ValueError: an unknown method.
        """
        if self.weight_decay_method not in get_args(WeightDecayT):
            allowed = ", ".join(get_args(WeightDecayT))
            raise ValueError(
                f"{type(self).__name__}: weight_decay_method={self.weight_decay_method!r} is not one of {allowed}"
            )
        if weight_decay == 0:
            return
        if self.weight_decay_method == "l2":
            grad.add_(p, alpha=weight_decay)
        else:
            p.mul_(keep_factor(self.weight_decay_method, lr, weight_decay))
