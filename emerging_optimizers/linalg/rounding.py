"""Rounding float32 so that nothing is lost: what falls away is kept as bits, or decides by chance where to go."""

import sys

import torch
from torch import Tensor

# Which of the two halves of a number in memory has its sign.
_HIGH = int(sys.byteorder == "little")

# A number of float16 that is smaller has fewer digits: they are all multiples of the smallest one.
_SMALLEST_NORMAL, _SMALLEST = 2.0**-14, 2.0**-24


def split_bfloat16_(high: Tensor, low: Tensor, x: Tensor) -> None:
    r"""Write the nearest bfloat16 of `x` into `high`, and the 16 bits that it lacks into `low`.

    .. math:: \mathrm{bits}(x) = 2^{16}\, \mathrm{bits}(\mathrm{high}) + \mathrm{low}, \qquad
        -2^{15} \le \mathrm{low} < 2^{15}

    as integers, so that `join_bfloat16_` finds `x` again, bitwise. Ties go away from zero.

    Args:
        high: bfloat16.
        low: int16, of the same shape.
        x: float32, of the same shape.

    Example:
        >>> high, low = torch.empty(2, dtype=torch.bfloat16), torch.empty(2, dtype=torch.int16)
        >>> split_bfloat16_(high, low, torch.tensor([1.0, 1.001]))
        >>> high.tolist(), low.tolist()
        ([1.0, 1.0], [0, 8389])
    """
    bits = x.view(torch.int32)
    low.copy_(bits)  # the lowest 16
    high.view(torch.int16).copy_((bits + 2**15).bitwise_right_shift_(16))


def join_bfloat16_(x: Tensor, high: Tensor, low: Tensor) -> None:
    """Write the float32 number into `x` that `split_bfloat16_` has split.

    Example:
        >>> x = torch.empty(1)
        >>> join_bfloat16_(x, torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([8389], dtype=torch.int16))
        >>> x
        tensor([1.0010])
    """
    x.view(torch.int32).copy_(high.view(torch.int16)).bitwise_left_shift_(16).add_(low)


def round_stochastically(x: Tensor, noise: Tensor, dtype: torch.dtype) -> Tensor:
    r"""One of the two neighbours of each number in a lower precision, the nearer one more often.

    .. math:: P(\text{the one further from } 0) = (|x| - a) / (b - a) \quad \text{between neighbours } a < b,

    so that the mean is `x`; what the precision has stays as it is, infinities and NaN too.

    Args:
        x: float32, (..., N).
        noise: int32, of the same shape, uniform on 0 ... 65535.
        dtype: bfloat16 or float16.

    Example:
        >>> noise = torch.arange(2**16, dtype=torch.int32)
        >>> rounded = round_stochastically(torch.full((2**16,), 1.001), noise, torch.bfloat16)
        >>> rounded.unique().tolist(), round(rounded.double().mean().item(), 4)
        ([1.0, 1.0078125], 1.001)
    """
    bits = x.view(torch.int32)
    if dtype == torch.bfloat16:
        return (bits + noise).view(torch.bfloat16)[..., _HIGH::2]
    noise = noise >> 3  # 13 bits, which it is that float16 lacks
    rounded = (bits + noise).bitwise_and_(-(2**13)).view(torch.float32)
    steps = (x.abs() * (1 / _SMALLEST) + noise * 2.0**-13).floor_()
    rounded = torch.where(x.abs() < _SMALLEST_NORMAL, (steps * _SMALLEST).copysign_(x), rounded)
    return torch.where(x.isfinite(), rounded, x).to(dtype)
