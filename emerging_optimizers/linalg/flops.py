"""Operations that a computation takes, counted call by call; tensors without data will do.

Counted are matrix products, two operations a multiply-add, and LAPACK's factorizations. What runs over elements is left
out: it takes the time of the memory, not of arithmetic.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, register_flop_formula

import emerging_optimizers.linalg.kernels.syrk  # noqa: F401  # makes an operator that has a formula here
from emerging_optimizers.linalg.kernels.symmetric import by_blocks_, flops_by_blocks

# Operations of LAPACK's routines for a matrix (m, n) with m >= n; Golub and Van Loan, Matrix Computations.
FACTORIZATIONS: Mapping[str, Callable[[int, int], float]] = {
    "linalg_qr": lambda m, n: 4 * (m * n**2 - n**3 / 3),
    "geqrf": lambda m, n: 2 * (m * n**2 - n**3 / 3),
    "linalg_householder_product": lambda m, n: 2 * (m * n**2 - n**3 / 3),
    "_linalg_eigh": lambda m, n: 9 * n**3,
    "_linalg_svd": lambda m, n: 14 * m * n**2 + 8 * n**3,
    "linalg_cholesky_ex": lambda m, n: n**3 / 3,
}


@register_flop_formula(torch.ops.emerging_optimizers.syrk)
def _syrk_flops(a_shape: tuple[int, int, int], *_: Any, **__: Any) -> int:
    B, M, K = a_shape
    return B * M * (M + 1) * K  # half of a full product


@register_flop_formula(by_blocks_)
def _by_blocks_flops(
    x_shape: tuple[int, int, int],
    y_shape: Any,
    plus_shape: Any,
    beta: float,
    alpha: float,
    least: int,
    *_: Any,
    **__: Any,
) -> int:
    B, M, K = x_shape
    return B * flops_by_blocks(M, K, least)


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    """Of one call of torch's dispatcher."""
    name = func.overloadpacket.__name__
    if name in FACTORIZATIONS:
        *batch, m, n = args[0].shape
        return torch.Size(batch).numel() * FACTORIZATIONS[name](max(m, n), min(m, n))
    count = flop_registry.get(func.overloadpacket)
    return count(*args, **kwargs, out_val=out) if count else 0.0


def call_without_data(func: Any, args: Any, kwargs: Any) -> Any:
    """A call on tensors that may be of the meta device or fake; also those of ours that torch makes with data alone.

    Of fake tensors it would make real ones, as large, and compute.
    """
    first: Any = args[0] if args else None
    if func.overloadpacket is torch.ops.aten._fused_sgd_ and has_no_data(first[0]):
        return None
    if func is torch.ops.aten.geqrf.default and has_no_data(first):
        *batch, m, n = first.shape
        return torch.empty_like(first), first.new_empty(*batch, min(m, n))
    return func(*args, **kwargs)


def has_no_data(x: Tensor) -> bool:
    """Whether a tensor is of the meta device or fake."""
    return x.is_meta or isinstance(x, FakeTensor)


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """Sums the operations of what runs in it, as `flops`.

    Example:
        >>> with FlopCounter() as counter:
        ...     _ = torch.empty(2, 3, device="meta") @ torch.empty(3, 4, device="meta")
        >>> counter.flops
        48.0
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        key = _key(func, args, kwargs)
        if key is None or (known := _known.get(key)) is None:
            out = call_without_data(func, args, kwargs)
            flops = flops_of(func, args, kwargs, out)
            if key is not None and isinstance(out, Tensor) and out.is_meta:
                _known[key] = tuple(out.shape), out.stride(), out.dtype, flops
        else:
            shape, stride, dtype, flops = known
            out = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        self.flops += flops
        return out


# What a call on tensors without data gives: shape, strides, dtype, operations. torch takes half a millisecond to
# say it, and a step asks the same again and again.
_known: dict[Any, tuple[tuple[int, ...], tuple[int, ...], torch.dtype, float]] = {}


def _key(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """What the result of a call depends on; None: it makes no new tensor, or has arguments that do not say it."""
    if not args or not isinstance(args[0], Tensor) or not _makes_a_tensor(func):
        return None
    try:
        hash(key := (func, *map(_description, (*args, *kwargs.values())), *kwargs))
    except TypeError:  # a list of tensors, say
        return None
    return key


def _description(x: Any) -> Any:
    """An argument as something that compares by value.

    Raises:
        TypeError: there is none.
    """
    if type(x) is Tensor and x.is_meta:
        return x.shape, x.stride(), x.dtype
    items = x if isinstance(x, list | tuple) else [x]
    if any(isinstance(item, Tensor) for item in items):
        raise TypeError
    return type(x), *items


@lru_cache
def _makes_a_tensor(func: Any) -> bool:
    """Whether an operator returns one new tensor, and writes into none."""
    schema = func._schema
    return not schema.is_mutable and [(str(r.type), r.alias_info) for r in schema.returns] == [("Tensor", None)]
