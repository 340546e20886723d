"""`emerging_optimizers.utils.eig` has the published names, arguments and results."""

import inspect

import pytest
import torch

from emerging_optimizers.utils import eig


def symmetric(*shape: int) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x @ x.mT


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("eigh_with_fallback", "(x, force_double=False)"),
        ("conjugate", "(a, p, diag=False)"),
        ("orthogonal_iteration", "(kronecker_factor, eigenbasis, power_iter_steps)"),
        ("power_iteration", "(W, u, k=1, eps=1e-08)"),
    ],
)
def test_signatures(name, arguments):
    signature = inspect.signature(getattr(eig, name))
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(plain)) == arguments


@pytest.mark.parametrize("force_double", [False, True])
@pytest.mark.parametrize("shape", [(5, 5), (3, 5, 5)])
def test_eigh_with_fallback_descends_and_keeps_the_dtype(shape, force_double):
    x = symmetric(*shape)
    values, vectors = eig.eigh_with_fallback(x, force_double)
    assert values.dtype == vectors.dtype == torch.float32
    assert (values.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(vectors * values.unsqueeze(-2) @ vectors.mT, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 5), (3, 5, 5)])
def test_conjugate_and_its_diagonal(shape):
    a, p = symmetric(*shape), torch.randn(shape)
    full = eig.conjugate(a, p)
    torch.testing.assert_close(full, p.mT @ a @ p)
    torch.testing.assert_close(eig.conjugate(a, p, diag=True), full.diagonal(dim1=-2, dim2=-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 5), (3, 5, 5)])
def test_orthogonal_iteration_does_not_sort(shape):
    k = torch.diag(torch.tensor([1.0, 2, 3, 4, 5])).expand(shape)
    q = torch.eye(5).expand(shape)
    torch.testing.assert_close(eig.orthogonal_iteration(k, q, 2).abs(), q)


def test_power_iteration_takes_a_matrix_or_a_batch():
    W, u = torch.randn(3, 6, 4), torch.randn(3, 6)
    batched = eig.power_iteration(W, u, k=4)
    for i in range(3):
        for one, of_many in zip(eig.power_iteration(W[i], u[i], k=4), batched, strict=True):
            torch.testing.assert_close(one, of_many[i])


@pytest.mark.parametrize(
    "call",
    [
        lambda: eig.eigh_with_fallback(torch.ones(3, 4)),
        lambda: eig.conjugate(torch.ones(3, 3), torch.ones(2, 3, 3)),
        lambda: eig.orthogonal_iteration(torch.eye(3), torch.eye(4), 1),
        lambda: eig.orthogonal_iteration(torch.eye(3), torch.eye(3), 0),
        lambda: eig.power_iteration(torch.ones(3, 4), torch.ones(4)),
        lambda: eig.power_iteration(torch.ones(3, 4), torch.ones(3), k=-1),
    ],
)
def test_what_does_not_fit_is_refused_with_its_shape(call):
    with pytest.raises(ValueError, match=r"shape|power_iter_steps|k=-1"):
        call()
