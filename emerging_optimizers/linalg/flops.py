"""Operations that a computation takes, counted call by call; tensors without data will do.

Counted are matrix products, two operations a multiply-add, and LAPACK's factorizations. What runs over elements is left
out: it takes the time of the memory, not of arithmetic.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, register_flop_formula

import emerging_optimizers.linalg.kernels.syrk  # noqa: F401  # makes the operator that has a formula here

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


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    """Of one call of torch's dispatcher."""
    name = func.overloadpacket.__name__
    if name in FACTORIZATIONS:
        *batch, m, n = args[0].shape
        return torch.Size(batch).numel() * FACTORIZATIONS[name](max(m, n), min(m, n))
    count = flop_registry.get(func.overloadpacket)
    return count(*args, **kwargs, out_val=out) if count else 0.0


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
        if func is torch.ops.aten.geqrf.default and args[0].is_meta:  # which torch cannot do without data
            *batch, m, n = args[0].shape
            out = torch.empty_like(args[0]), args[0].new_empty(*batch, min(m, n))
        else:
            out = func(*args, **kwargs)
        self.flops += flops_of(func, args, kwargs, out)
        return out
