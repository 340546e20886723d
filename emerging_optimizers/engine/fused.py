"""torch's kernels that update lists of tensors in one pass over memory, and what they can be made to say.

The tensors of one place in the lists have one dtype and as many elements, and are contiguous.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

DEVICES = ("cpu", "cuda")


def adam_(
    weights: list[Tensor],
    grads: list[Tensor],
    moments: list[Tensor],
    squares: list[Tensor],
    *,
    betas: tuple[float, float],
    eps: float,
    step: float,
    lr: float,
    keep: float,
) -> None:
    """M <- beta1 M + (1 - beta1) G, V <- beta2 V + (1 - beta2) G^2, W <- keep W - lr M' / (sqrt(V') + eps), in place.

    M' = M / (1 - beta1^step) and V' = V / (1 - beta2^step); a step of infinity: the moments as they are. Any numbers
    will do: with beta1 = 0, where `moments` may be `grads`, the gradient itself is divided by its size.
    """
    # The kernel knows decoupled decay only, 1 - lr weight_decay, which can say any `keep` unless lr is 0.
    if not lr and keep != 1:
        torch._foreach_mul_(weights, keep)
    torch._fused_adamw_(
        weights,
        grads,
        moments,
        squares,
        [],
        [torch.full((), step, dtype=torch.float32, device=weights[0].device)] * len(weights),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=(1 - keep) / lr if lr else 0.0,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


def adam_of_averages_(
    weights: list[Tensor],
    grads: list[Tensor],
    averages: Iterable[tuple[list[Tensor], float, float, float]],
    own: float,
    squares: list[Tensor],
    *,
    beta2: float,
    eps: float,
    step: float,
    lr: float,
    keep: float,
) -> None:
    """`adam_` with a numerator out of several averages and the gradient, in place.

    N = own G + the sum of factor M over the (M, decay, gain, factor) of `averages`, each M <- decay M + gain G before;
    V <- beta2 V + (1 - beta2) G^2, W <- keep W - lr N / (sqrt(V') + eps).
    """
    # The kernel blends the gradient into what it divides, and corrects for that: a little of it is left out before.
    share = 2**-8
    rest = 1 - share
    sums = list(torch._foreach_mul(grads, (own - share) / rest))
    for moments, decay, gain, factor in averages:
        # Where its momentum is 0, the kernel takes no buffer.
        _sgd_(sums, grads, moments, lr=-factor / rest, momentum=decay or 1e-300, dampening=1 - gain)
    lr *= 1 - rest**step
    adam_(weights, grads, sums, squares, betas=(rest, beta2), eps=eps, step=step, lr=lr, keep=keep)


def accepts(device: torch.device, tensors: Iterable[Tensor]) -> bool:
    """Whether these kernels work there, and in the order in which the tensors lie in memory."""
    return device.type in DEVICES and all(map(Tensor.is_contiguous, tensors))


def subtract_(weights: list[Tensor], directions: list[Tensor], lr: float, keep: float) -> None:
    """W <- keep W - lr U, in place."""
    decay = 1 - keep
    if weights[0].device.type in DEVICES and abs(decay) <= 2**20 * abs(lr):
        _sgd_(weights, directions, [], lr=lr, weight_decay=decay / lr if decay else 0.0)
    else:  # or of U next to nothing is subtracted: the kernel adds decay / lr W to it first
        torch._foreach_mul_(weights, keep)
        torch._foreach_add_(weights, directions, alpha=-lr)


def _sgd_(
    weights: list[Tensor],
    grads: list[Tensor],
    averages: list[Tensor],
    *,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
) -> None:
    torch._fused_sgd_(
        weights,
        grads,
        averages,
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr,
        dampening=dampening,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )


def are_finite(tensors: list[Tensor]) -> bool:
    """Whether all numbers are, on a CPU. False too where finite ones add up to more than their dtype holds."""
    return all(map(math.isfinite, look(tensors)))


def look(tensors: list[Tensor]) -> list[Tensor]:
    """Numbers, 0-D, that are finite only if all of the tensors' are."""
    # A sum only reads, and is finite only if all of its terms are.
    seen = [x.sum() for x in tensors if x.numel() >= 2**14]
    if small := [x for x in tensors if x.numel() < 2**14]:  # one call for all of them; they are written, each as it is
        found = torch.zeros(())
        torch._amp_foreach_non_finite_check_and_unscale_(small, found, torch.ones(()))
        seen.append(1 / (1 - found))  # found is 0 or 1
    return seen
