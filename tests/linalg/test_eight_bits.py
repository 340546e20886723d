"""Blocks of 8 bits: the bound that is promised, and what is found again bitwise."""

import pytest
import torch

from emerging_optimizers.linalg.eight_bits import BLOCK, dequantise, quantise, scale_shape

SHAPES = [(5, 512), (40, 64), (6, 300), (2, 3, 700), (1000,), (3, 1)]


def spread_out(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Numbers over many powers of ten, within rows and from row to row."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    within = torch.randn(shape, generator=generator, dtype=torch.float64).mul(2).exp()
    rows = 10 ** torch.empty((*shape[:-1], 1), dtype=torch.float64).uniform_(-40, 30, generator=generator)
    return (x * within * rows).to(dtype)


def largest_of_blocks(x: torch.Tensor) -> torch.Tensor:
    """In the place of each element."""
    pieces = [part.abs().amax(-1, keepdim=True).expand(part.shape) for part in x.split(BLOCK, dim=-1)]
    return torch.cat(pieces, dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_error_is_bounded_and_what_is_read_is_found_again(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for seed in range(20):
        x = spread_out(shape, dtype, seed)
        codes, scales = quantise(x)
        assert codes.dtype == torch.int8
        assert tuple(codes.shape) == shape
        assert scales.dtype == dtype
        assert tuple(scales.shape) == scale_shape(shape)
        read = dequantise(codes, scales)
        size, most = x.abs().double(), largest_of_blocks(x.double())
        bound = 0.0082 * (size * most).sqrt() + 0.00002 * most + 2.0**-100
        assert bool(((read.double() - x.double()).abs() <= bound).all())
        again = quantise(read)
        assert torch.equal(again[0], codes)
        assert torch.equal(again[1], scales)


def test_zeros_stay_and_what_is_not_finite_stays_so() -> None:
    x = torch.zeros(2, 300)
    assert not dequantise(*quantise(x)).any()
    x[0, 5], x[1, 270] = torch.inf, torch.nan
    read = dequantise(*quantise(x))
    assert read[0, :256].isnan().all()
    assert not read[0, 256:].any()
    assert not read[1, :256].any()
    assert read[1, 256:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_numbers_that_there_are_stay_finite(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    x = torch.tensor([0.984, 0.9845, 0.99, 0.9995, 0.9999, 1.0], dtype=dtype)[:, None] * torch.tensor(
        [most, -most / 3], dtype=dtype
    )
    read = dequantise(*quantise(x))
    assert bool(((read / most - x / most).abs() <= 0.0082).all())
    for one, other in zip(quantise(read), quantise(x), strict=True):
        assert torch.equal(one, other)


def test_of_gaussian_numbers_less_is_lost_than_linearly() -> None:
    """Why codes are roots: rows whose elements have sizes of their own, as a moment's do."""
    x = spread_out((64, 256), torch.float64, 0)
    x /= x.abs().amax(-1, keepdim=True)
    linear = (x * 127).round() / 127
    assert (dequantise(*quantise(x)) - x).norm() < 0.5 * (linear - x).norm()
