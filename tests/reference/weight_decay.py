"""Four ways to shrink a weight, each as one equation.

l2            G <- G + wd W              (the penalty's gradient; enters every moment)
decoupled     W <- W - lr wd W           (Loshchilov and Hutter, 2019, arXiv 1711.05101)
independent   W <- W - wd W              (the learning rate plays no part)
palm          W <- W - lr^2 wd W         (Chowdhery et al., 2022, arXiv 2204.02311)
"""

from torch import Tensor

METHODS = ("decoupled", "independent", "l2", "palm")


def decay_gradient(grad: Tensor, weight: Tensor, weight_decay: float, method: str) -> Tensor:
    """The gradient with the l2 penalty's own gradient added; the other methods leave it alone."""
    if method not in METHODS:
        raise ValueError(f"unknown weight decay {method!r}; one of {METHODS}")
    if method == "l2":
        return grad + weight_decay * weight
    return grad


def decay_weight(weight: Tensor, lr: float, weight_decay: float, method: str) -> Tensor:
    """The weight after its own shrinkage, before the update is subtracted."""
    if method == "decoupled":
        return weight - lr * weight_decay * weight
    if method == "independent":
        return weight - weight_decay * weight
    if method == "palm":
        return weight - lr**2 * weight_decay * weight
    if method == "l2":
        return weight
    raise ValueError(f"unknown weight decay {method!r}; one of {METHODS}")
