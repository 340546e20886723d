"""Weight decay, in the four ways of the published library."""

from typing import Any, Literal

from torch import Tensor

WeightDecayT = Literal["decoupled", "independent", "l2", "palm"]


def keep_factor(method: WeightDecayT, lr: Any, weight_decay: Any) -> Any:
    r"""What the weight is multiplied by before the update is subtracted.

    "decoupled": :math:`1 - \eta\lambda` (Loshchilov and Hutter 2019, arXiv 1711.05101); "independent":
    :math:`1 - \lambda`; "palm": :math:`1 - \eta^2\lambda` (Chowdhery et al. 2022, arXiv 2204.02311); "l2": 1, since
    it adds :math:`\lambda W` to the gradient instead. At a learning rate of 0 nothing decays.
    """
    if isinstance(lr, Tensor) and method == "independent":
        return 1 - weight_decay * (lr != 0).double()
    if method == "decoupled":
        return 1 - lr * weight_decay
    if method == "independent":
        return 1 - weight_decay * (lr != 0)
    if method == "palm":
        return 1 - lr**2 * weight_decay
    return 1.0
