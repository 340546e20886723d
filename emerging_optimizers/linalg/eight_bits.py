"""Numbers in 8 bits, with one scale for each block of a row: fine near zero, coarse near the largest of the block."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import threshold

BLOCK = 256  # elements of a row with one scale
_TOP = 127**2
_SMALLEST = 2.0**-100  # a block whose largest number is smaller is zero
# Keeps 10 binary digits of a float32 scale (Veltkamp), so that a scale times 127^2 has no rounding of its own.
_SPLIT = 2**14 + 1
# The largest scale of so many digits of which 127^2 is finite.
_LARGEST = {
    dtype: math.ldexp(math.floor(math.ldexp(torch.finfo(dtype).max / _TOP, digits - power)), power - digits)
    for dtype, digits, power in ((torch.float32, 10, 115), (torch.float64, 39, 1011))
}


def scale_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Of the scales of a tensor of some shape, which has one axis or more.

    Example:
        >>> scale_shape((3, 300)), scale_shape((256,))
        ((3, 2), (1,))
    """
    return *shape[:-1], -(-shape[-1] // BLOCK)


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    r"""Codes and scales of a tensor; `dequantise` makes numbers of them again.

    .. math:: c = \mathrm{sign}(x)\, \mathrm{round} \sqrt{|x| / s}, \qquad s = \max |x| / 127^2,
        \qquad \hat x = s\, c\, |c|,

    the maximum over a block of at most 256 consecutive elements of the last axis. The error is at most

    .. math:: |\hat x - x| \le 0.0082 \sqrt{|x| \max |x|} + 0.00002 \max |x| + 2^{-100},

    0.8 % of the largest number of a block and less of smaller ones. What `dequantise` returns is found again bitwise.
    A block that is not finite becomes NaN.

    Args:
        x: (..., N), N >= 1, float32 or float64.

    Returns:
        Codes, int8, (..., N), and scales, in the dtype of `x`, (..., ceil(N / 256)).

    Example:
        >>> codes, scales = quantise(torch.tensor([1.0, -0.5, 0.001, 0.0]))
        >>> codes.tolist(), [round(x, 4) for x in dequantise(codes, scales).tolist()]
        ([127, -90, 4, 0], [0.9998, -0.5021, 0.001, 0.0])
    """
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(scale_shape(x.shape), dtype=x.dtype, device=x.device)
    quantise_(codes, scales, x)
    return codes, scales


def quantise_(codes: Tensor, scales: Tensor, x: Tensor) -> None:
    """`quantise` into tensors that there are."""
    for part, code, scale in zip(_in_blocks(x), _in_blocks(codes), _of_blocks(scales, x.shape[-1]), strict=True):
        roots = part.abs()
        exact = _scales_of(roots.amax(dim=-1, keepdim=True))
        scale.copy_(exact)
        roots.mul_(exact.reciprocal_().nan_to_num_(0, 0, 0)).sqrt_().round_()
        # By a product: `copysign` takes as long as four other passes on a CPU.
        code.copy_(roots.mul_(part.sign()))


def _scales_of(largest: Tensor) -> Tensor:
    """Of blocks whose largest numbers are given, which are overwritten; NaN where they are not finite."""
    below = _SMALLEST * (1 - torch.finfo(largest.dtype).eps / 2)
    half = threshold(largest, below, 0.0, inplace=True).div_(2 * _TOP)  # of the whole one `wide` could overflow
    wide = half * _SPLIT
    return wide.sub_(wide - half).mul_(2).clamp_max_(_LARGEST[largest.dtype])


def dequantise(codes: Tensor, scales: Tensor) -> Tensor:
    """The numbers, in the dtype of the scales.

    Args:
        codes: int8, (..., N).
        scales: (..., ceil(N / 256)), float32 or float64.

    Example:
        >>> dequantise(torch.tensor([2, -3], dtype=torch.int8), torch.tensor([0.5]))
        tensor([ 2.0000, -4.5000])
    """
    x = codes.to(scales.dtype)
    x.mul_(x.abs())
    for part, scale in zip(_in_blocks(x), _of_blocks(scales, codes.shape[-1]), strict=True):
        part.mul_(scale)
    return x


def _in_blocks(x: Tensor) -> Iterator[Tensor]:
    """Views of the last axis: (..., blocks, elements) of those of full length, and (..., elements) of a shorter one.

    What is one block is no view of itself: compiled, writing into a view of an argument makes a copy.
    """
    n = x.shape[-1]
    full = n // BLOCK * BLOCK
    if n <= BLOCK:
        yield x
        return
    yield x[..., :full].unflatten(-1, (-1, BLOCK))  # type: ignore[no-untyped-call]  # untyped in torch
    if full < n:
        yield x[..., full:]


def _of_blocks(scales: Tensor, n: int) -> Iterator[Tensor]:
    """The same blocks' scales, by which they can be multiplied."""
    full = n // BLOCK
    if n <= BLOCK:
        yield scales
        return
    yield scales[..., :full, None]
    if n % BLOCK:
        yield scales[..., full:]
