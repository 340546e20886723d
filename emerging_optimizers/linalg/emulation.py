"""Reduced float32 matrix products on a device that has none: what TF32 or bfloat16 hardware would do with them.

Such hardware rounds the operands of a product and adds up in float32. A context here does the same with the operands
and lets the device form an ordinary float32 product, wherever torch's float32 matmul precision allows it:

========================  ===========  ========  ==========
precision in force        "highest"    "high"    "medium"
========================  ===========  ========  ==========
`emulate_tf32`            as it is     TF32      TF32
`emulate_bf16`            as it is     as it is  bfloat16
one inside the other      as it is     TF32      the inner's
========================  ===========  ========  ==========

Rounded are the matrix products of ATen (mm, bmm, addmm, baddbmm, addbmm), to which `@`, `matmul`, `einsum`,
`tensordot` and `linear` lower, in forward and backward passes. Products with a vector, convolutions, fused attention
and factorizations (eigh, QR) are not, nor is a product of any other dtype. torch does not compile inside such a
context: an optimizer with `execution="compiled"` raises there.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from emerging_optimizers.linalg.precision import fp32_matmul_precision, reduced_precision

_ATEN = torch.ops.aten
# The position of the first of the two operands, in every overload.
_FIRST_OPERAND = {
    _ATEN.mm: 0,
    _ATEN.bmm: 0,
    _ATEN.addmm: 1,
    _ATEN.addmm_: 1,
    _ATEN.baddbmm: 1,
    _ATEN.baddbmm_: 1,
    _ATEN.addbmm: 1,
    _ATEN.addbmm_: 1,
}


def round_to_tf32(x: Tensor) -> Tensor:
    """Float32 with 10 mantissa bits: to the nearest, ties away from zero; infinities and NaN as they are.

    Example:
        >>> round_to_tf32(torch.tensor([1 + 2**-11, 1 + 2**-12])) - 1
        tensor([0.0010, 0.0000])
    """
    bits = (x.view(torch.int32) + 0x1000) & ~0x1FFF
    return torch.where(x.isfinite(), bits.view(torch.float32), x)


def round_to_bf16(x: Tensor) -> Tensor:
    """Float32 with 7 mantissa bits: to the nearest, ties to even, as torch casts.

    Example:
        >>> round_to_bf16(torch.tensor([1 + 2**-7, 1 + 2**-8])) - 1
        tensor([0.0078, 0.0000])
    """
    return x.bfloat16().float()


@contextmanager
def emulate_tf32() -> Iterator[None]:
    """Round the operands of float32 matrix products to TF32 where the float32 matmul precision is not "highest".

    The state of the mode belongs to the thread. Contexts nest; where two would round, the inner one does.

    Example:
        >>> third = torch.full((1, 1), 1 / 3)
        >>> one = torch.ones(1, 1)
        >>> with emulate_tf32(), fp32_matmul_precision("high"):
        ...     print(f"{(third @ one).item():.7f}")
        0.3332520
        >>> with emulate_tf32(), fp32_matmul_precision("highest"):
        ...     print(f"{(third @ one).item():.7f}")
        0.3333333

        A whole optimizer step; `fp32_matmul_prec` and `qr_fp32_matmul_prec` say which products are rounded:

        >>> from emerging_optimizers.soap.soap import SOAP
        >>> w = torch.nn.Parameter(torch.zeros(4, 2))
        >>> w.grad = torch.ones(4, 2)
        >>> optimizer = SOAP([w], lr=0.1, fp32_matmul_prec="high")
        >>> with emulate_tf32():
        ...     optimizer.step()
    """
    with _Rounding(round_to_tf32, ("high", "medium")):
        yield


@contextmanager
def emulate_bf16() -> Iterator[None]:
    """Round the operands of float32 matrix products to bfloat16 where the float32 matmul precision is "medium".

    At "high" nothing is rounded; put `emulate_tf32` around it for hardware that has both. Newton-Schulz, which casts by
    itself, multiplies in bfloat16 as on such hardware.

    Example:
        >>> third = torch.full((1, 1), 1 / 3)
        >>> with emulate_bf16(), fp32_matmul_precision("medium"):
        ...     print(f"{(third @ torch.ones(1, 1)).item():.7f}")
        0.3339844
    """
    with reduced_precision("bfloat16"), _Rounding(round_to_bf16, ("medium",)):
        yield


class _Rounding(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """Rounds operands of float32 matrix products at some precisions."""

    def __init__(self, rounded: Callable[[Tensor], Tensor], at: Sequence[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.rounded, self.at = rounded, at

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = _FIRST_OPERAND.get(func.overloadpacket)
        if first is None or args[first].dtype != torch.float32 or _precision_in_force() not in self.at:
            return func(*args, **kwargs)
        operands = [self.rounded(x) for x in args[first : first + 2]]
        # The device's own reduced product would round again, and so would an outer context.
        with fp32_matmul_precision("highest"):
            return func(*args[:first], *operands, *args[first + 2 :], **kwargs)


def _precision_in_force() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # backends were set one by one: the lowest that one of them allows
        chosen = {backend.matmul.fp32_precision for backend in (torch.backends.cuda, torch.backends.mkldnn)}
        return "medium" if "bf16" in chosen else "high" if "tf32" in chosen else "highest"
