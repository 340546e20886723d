"""torch's kernels that update lists of tensors in one pass over memory, and what they can be made to say.

The tensors of one place in the lists have one dtype and as many elements, and are contiguous. Nothing is written when a
function here is called: it returns the writes, which `commit` makes.
"""

import threading
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors  # one call for many tensors, as DDP has it

from emerging_optimizers.engine.commit import Write
from emerging_optimizers.engine.scalars import share_of

DEVICES = ("cpu", "cuda")
# Tensors of fewer elements are gathered before they are looked at, so many at a time: a call costs as much as 20,000
# elements, and what is gathered is read from the cache.
_SMALL = 2**14
_GATHERED = 32
# Elements of a piece that stays in the cache between two kernels.
_PIECE = 2**17


def adam_(
    weights: list[Tensor],
    grads: list[Tensor],
    moments: list[Tensor] | None,
    squares: list[Tensor],
    *,
    betas: tuple[float, float],
    eps: float,
    step: float,
    lr: float,
    keep: float,
) -> list[Write]:
    """M <- beta1 M + (1 - beta1) G, V <- beta2 V + (1 - beta2) G^2, W <- keep W - lr M' / (sqrt(V') + eps), in place.

    M' = M / (1 - beta1^step) and V' = V / (1 - beta2^step); a step of infinity: the moments as they are. Any numbers
    will do: with beta1 = 0, where `moments` may be None, the gradient itself is divided by its size. `keep` is 1 where
    `lr` is 0.
    """
    if moments is None:
        if weights[0].device.type == "cpu" and max(map(Tensor.numel, grads)) > _PIECE:
            weights, grads, squares = map(_cut, (weights, grads, squares))
        moments = _scratch(grads)
    call = partial(
        torch._fused_adamw_,
        weights,
        grads,
        moments,
        squares,
        [],
        [torch.full((), step, dtype=torch.float32, device=weights[0].device)] * len(weights),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=(1 - keep) / lr if lr else 0.0,  # the kernel knows decoupled decay, which can say any `keep`
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
    return [call]


class _Held(threading.local):
    """Where kernels write what nobody needs; each thread of the host has its own."""

    def __init__(self) -> None:
        self.by_kind: dict[tuple[torch.dtype, torch.device], Tensor] = {}


_HELD = _Held()


def _scratch(like: list[Tensor]) -> list[Tensor]:
    """Finite numbers, in tensors that may be written. On a CPU it is one for all, which stays in the cache."""
    kind = (like[0].dtype, like[0].device)
    held = _HELD.by_kind if type(like[0].data) is Tensor else {}  # a fake tensor belongs to its mode alone
    on_host = kind[1].type == "cpu"
    count = max(map(Tensor.numel, like)) if on_host else sum(map(Tensor.numel, like))
    if kind not in held or held[kind].numel() < count:
        held[kind] = torch.zeros(count, dtype=kind[0], device=kind[1])
    if on_host:  # where the kernel takes one tensor after the other, and asks each weight for its length
        return [held[kind]] * len(like)
    pieces: Iterable[Tensor] = _unflatten_dense_tensors(held[kind][:count], like)  # type: ignore[no-untyped-call]  # untyped in torch
    return list(pieces)


def _cut(tensors: list[Tensor]) -> list[Tensor]:
    """Pieces for which a scratch tensor stays in the cache."""
    return [piece for x in tensors for piece in torch.split(x.view(-1), _PIECE)]


def sign_of_average_(
    weights: list[Tensor],
    grads: list[Tensor],
    averages: list[Tensor],
    betas: tuple[float, float],
    *,
    lr: float,
    keep: float,
) -> list[Write]:
    """W <- keep W - lr sign(beta1 M + (1 - beta1) G), M <- beta2 M + (1 - beta2) G, in place."""
    ahead, own = ([share_of(1 - beta, averages[0])] * len(averages) for beta in betas)
    directions = list(torch._foreach_lerp(averages, grads, ahead))
    torch._foreach_sign_(directions)
    return [partial(torch._foreach_lerp_, averages, grads, own), *subtract_(weights, directions, lr, keep)]


def forget_scratch() -> None:
    """Drop what kernels have written for nobody; needed where that may not be finite."""
    _HELD.by_kind.clear()


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
) -> list[Write]:
    """`adam_` with a numerator out of several averages and the gradient, in place.

    N = own G + the sum of factor M over the (M, decay, gain, factor) of `averages`, each M <- decay M + gain G before;
    V <- beta2 V + (1 - beta2) G^2, W <- keep W - lr N / (sqrt(V') + eps).
    """
    # The kernel blends the gradient into what it divides, and corrects for that: a little of it is left out before.
    share = 2**-8
    rest = 1 - share
    sums = list(torch._foreach_mul(grads, (own - share) / rest))
    writes = [
        # Where its momentum is 0, the kernel takes no buffer.
        _sgd_(sums, grads, moments, lr=-factor / rest, momentum=decay or 1e-300, dampening=1 - gain)
        for moments, decay, gain, factor in averages
    ]
    lr *= 1 - rest**step
    return [*writes, *adam_(weights, grads, sums, squares, betas=(rest, beta2), eps=eps, step=step, lr=lr, keep=keep)]


def accepts(device: torch.device, tensors: Iterable[Tensor]) -> bool:
    """Whether these kernels work there, and in the order in which the tensors lie in memory."""
    return device.type in DEVICES and all(map(Tensor.is_contiguous, tensors))


def subtract_(weights: list[Tensor], directions: list[Tensor], lr: float, keep: float) -> list[Write]:
    """W <- keep W - lr U, in place."""
    decay = 1 - keep
    if weights[0].device.type in DEVICES and abs(decay) <= 2**20 * abs(lr):
        return [_sgd_(weights, directions, [], lr=lr, weight_decay=decay / lr if decay else 0.0)]

    new: list[Tensor] = []

    def make() -> None:  # or of U next to nothing is subtracted: the kernel adds decay / lr W to it first
        new[:] = torch._foreach_add(torch._foreach_mul(weights, keep), directions, alpha=-lr)

    return [make, partial(torch._foreach_copy_, weights, new)]


def _sgd_(
    weights: list[Tensor],
    grads: list[Tensor],
    averages: list[Tensor],
    *,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
) -> Write:
    return partial(
        torch._fused_sgd_,
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


def are_below(tensors: list[Tensor], limit: float) -> bool:
    """Whether each norm, or that of several tensors together, is at most a limit, on a CPU; that of a NaN is not."""
    return all(square <= limit * limit for square in map(float, squares(tensors)))


def squares(tensors: list[Tensor]) -> list[Tensor]:
    """Squared norms that bound those of all the tensors, 0-D each; the tensors are only read."""
    small = [x if x.ndim == 1 else x.reshape(-1) for x in tensors if x.numel() < _SMALL]
    found = [] if len(small) == len(tensors) else [_square(x) for x in tensors if x.numel() >= _SMALL]
    for start in range(0, len(small), _GATHERED):
        pieces = small[start : start + _GATHERED]
        found.append(_square(torch.cat(pieces) if len(pieces) > 1 else pieces[0]))
    return found


def _square(x: Tensor) -> Tensor:
    # In the cache the dot product takes half the time of `vector_norm`; beyond it what follows is 2 % slower (AVX-512).
    if x.numel() <= _PIECE and x.dtype in (torch.float32, torch.float64) and x.is_contiguous():
        flat = x.view(-1)
        return torch.dot(flat, flat)
    return torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)).square_()
