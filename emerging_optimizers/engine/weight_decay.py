"""Weight decay, in the four ways of the published library and in a cautious one."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

WeightDecayT = Literal["decoupled", "independent", "l2", "palm", "cautious"]


def keep_factor(method: WeightDecayT, lr: Any, weight_decay: Any) -> Any:
    r"""What the weight is multiplied by before the update is subtracted.

    "decoupled": :math:`1 - \eta\lambda` (Loshchilov and Hutter 2019, arXiv 1711.05101); "independent":
    :math:`1 - \lambda`; "palm": :math:`1 - \eta^2\lambda` (Chowdhery et al. 2022, arXiv 2204.02311); "l2": 1, since
    it adds :math:`\lambda W` to the gradient instead; "cautious": as "decoupled", for the elements that `cautious_keep`
    chooses. At a learning rate of 0 nothing decays.
    """
    if isinstance(lr, Tensor) and method == "independent":
        return 1 - weight_decay * (lr != 0).double()
    if method in ("decoupled", "cautious"):
        return 1 - lr * weight_decay
    if method == "independent":
        return 1 - weight_decay * (lr != 0)
    if method == "palm":
        return 1 - lr**2 * weight_decay
    return 1.0


def cautious_keep(keep: Any, weight: Tensor, direction: Tensor) -> Tensor:
    r"""The factor of each element: `keep` where update and weight agree in sign, :math:`U W \ge 0`, else 1.

    There the update takes the element towards zero anyway, as decay does (Chen et al. 2025, Cautious Weight Decay,
    arXiv 2510.12402).
    """
    return 1 - (direction.sign() * weight >= 0).to(direction.dtype) * (1 - keep)  # their product may underflow


def cautious(direction: Tensor, grad: Tensor) -> Tensor:
    r"""The update without the elements whose sign is not the gradient's, and longer for it.

    .. math:: U \circ \phi / \max(\bar\phi, 10^{-3}), \qquad \phi = [U G > 0]

    with the mean of each unit, over which the first axis runs (Liang et al. 2024, Cautious Optimizers, arXiv
    2411.16085).
    """
    # 1 or 0, by signs, since their product may underflow; in one memory, since new memory costs most.
    agrees = direction.sign().mul_(grad).gt_(0)
    share = agrees.flatten(1).mean(dim=1).clamp_min(1e-3)
    return agrees.mul_(direction).div_(share.view(-1, *(1 for _ in direction.shape[1:])))


class WeightDecayMixin:
    """A base of every optimizer here, and for optimizers of your own: weight decay of one parameter.

    It is for a `step` that you write yourself; the engine does the same for stacks.

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

    weight_decay_method: WeightDecayT

    @torch.no_grad()
    def _apply_weight_decay_inplace(self, p: Tensor, grad: Tensor, lr: float, weight_decay: float) -> None:
        """Shrink p, or with "l2" add to grad, in place.

        Raises:
            ValueError: an unknown method, or "cautious", which has to know the update.
        """
        method: Any = getattr(self, "weight_decay_method", "l2")
        allowed = [name for name in get_args(WeightDecayT) if name != "cautious"]
        if method not in allowed:
            raise ValueError(
                f"{type(self).__name__}: weight_decay_method={method!r} is not one of {', '.join(allowed)}"
            )
        if weight_decay == 0:
            return
        if method == "l2":
            grad.add_(p, alpha=weight_decay)
        else:
            p.mul_(keep_factor(method, lr, weight_decay))
