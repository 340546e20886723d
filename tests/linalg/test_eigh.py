import math

import pytest
import torch
from torch import Tensor

from emerging_optimizers.linalg.eigh import eigh_descending


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], k: Tensor) -> None:
    """Two decompositions of one stack, each right up to the rounding of its own.

    An eigensolver returns the decomposition of a matrix within n eps ||K|| of K, which one depends on the machine, and
    on where a row of the stack lies in memory. Eigenvalues move by no more than that (Weyl), eigenvectors, apart from
    their signs, by no more than that over the distance to the nearest other eigenvalue (Davis and Kahan).
    """
    (values, vectors), (exact, directions) = found, expected
    rounding = 2 * k.size(-1) * torch.finfo(k.dtype).eps * exact.abs().amax(dim=-1, keepdim=True)
    assert ((values - exact).abs() <= rounding).all()
    apart = (exact.unsqueeze(-1) - exact.unsqueeze(-2)).abs()
    gap = apart.masked_fill(apart == 0, math.inf).amin(dim=-1)
    signs = (vectors * directions).sum(dim=-2, keepdim=True).sign()
    assert (torch.linalg.vector_norm(vectors * signs - directions, dim=-2) <= 2**0.5 * rounding / gap).all()


def symmetric(batch: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.randn(batch, n, n + 2, generator=torch.Generator().manual_seed(n), dtype=dtype)
    return g @ g.mT


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("batch", "n"), [(1, 1), (1, 8), (3, 5), (2, 33)])
def test_eigenvalues_fall_and_the_columns_reconstruct_the_matrix(batch, n, dtype, tolerance):
    k = symmetric(batch, n, dtype)
    values, vectors = eigh_descending(k)
    assert values.shape == (batch, n)
    assert (values.diff(dim=-1) <= 0).all()
    scale = {"rtol": 0, "atol": tolerance * float(values.max())}
    torch.testing.assert_close(vectors * values.unsqueeze(-2) @ vectors.mT, k, **scale)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(n, dtype=dtype).expand_as(k), rtol=0, atol=tolerance)


def test_a_stack_equals_its_matrices_one_by_one():
    k = symmetric(4, 7)
    alone = [torch.cat(parts) for parts in zip(*(eigh_descending(matrix[None]) for matrix in k), strict=True)]
    assert_same(eigh_descending(k), (alone[0], alone[1]), k)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_row_that_is_not_finite_leaves_the_other_rows_as_they_are(bad):
    k = symmetric(3, 6)
    values, vectors = eigh_descending(k)
    k[1, 2, 2] = bad
    found = eigh_descending(k)
    assert_same((found[0][[0, 2]], found[1][[0, 2]]), (values[[0, 2]], vectors[[0, 2]]), k[[0, 2]])


@pytest.mark.parametrize("entry", [(2, 2), (0, 1)], ids=str)
@pytest.mark.parametrize("base", ["dense", "identity"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_returns_the_identity_and_its_diagonal(bad, base, entry):
    """LAPACK raises for some of these, and for the others returns NaN without a word."""
    i, j = entry
    k = symmetric(2, 4) if base == "dense" else torch.eye(4).repeat(2, 1, 1)
    k[1, i, j] = k[1, j, i] = bad
    values, vectors = eigh_descending(k)
    assert torch.equal(vectors[1], torch.eye(4))
    torch.testing.assert_close(values[1], k[1].diagonal(), rtol=0, atol=0, equal_nan=True)


def test_a_row_that_is_not_wanted_returns_the_identity_and_its_diagonal():
    k = symmetric(2, 4)
    expected = eigh_descending(k)
    values, vectors = eigh_descending(k, torch.tensor([True, False]).view(2, 1, 1))
    assert_same((values[:1], vectors[:1]), (expected[0][:1], expected[1][:1]), k[:1])
    assert torch.equal(values[1], k[1].diagonal())
    assert torch.equal(vectors[1], torch.eye(4))


def test_a_row_that_fails_in_float32_is_taken_in_float64(monkeypatch):
    k, real = symmetric(3, 5), torch.linalg.eigh
    values, vectors = eigh_descending(k.double())

    def fails_in_float32(x: Tensor) -> tuple[Tensor, Tensor]:
        if x.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return real(x)

    monkeypatch.setattr(torch.linalg, "eigh", fails_in_float32)
    found = eigh_descending(k)
    assert {part.dtype for part in found} == {torch.float32}
    assert_same(found, (values.float(), vectors.float()), k)
