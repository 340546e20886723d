"""Weight decay, in the four ways of the published library and in a cautious one."""

from typing import Any, Literal

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
    return 1 - (direction * weight >= 0).to(direction.dtype) * (1 - keep)


def cautious(direction: Tensor, grad: Tensor) -> Tensor:
    r"""The update without the elements whose sign is not the gradient's, and longer for it.

    .. math:: U \circ \phi / \max(\bar\phi, 10^{-3}), \qquad \phi = [U G > 0]

    with the mean of each unit, over which the first axis runs (Liang et al. 2024, Cautious Optimizers, arXiv
    2411.16085).
    """
    agrees = (direction * grad > 0).to(direction.dtype)
    share = agrees.flatten(1).mean(dim=1).clamp_min(1e-3)
    return direction * agrees / share.view(-1, *(1 for _ in direction.shape[1:]))
