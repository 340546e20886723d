"""Eigenvalues and singular values, under the published names; the mathematics stands in `linalg`."""

import torch
from torch import Tensor

from emerging_optimizers.engine.options import COUNT
from emerging_optimizers.linalg.eigh import eigh_descending
from emerging_optimizers.linalg.kronecker import conjugate_diagonal, project_in
from emerging_optimizers.linalg.power_iteration import power_iteration as _power_iteration

__all__ = ["conjugate", "eigh_with_fallback", "orthogonal_iteration", "power_iteration"]


def eigh_with_fallback(x: Tensor, force_double: bool = False) -> tuple[Tensor, Tensor]:
    r"""Eigenvalues in descending order and eigenvectors as columns, :math:`X = Q \Lambda Q^\top`.

    A matrix on which the solver fails is retried alone, then in float64. One that is not finite returns its diagonal
    and the identity, and does not disturb the others of its batch.

    Args:
        x: (N, N) or (B, N, N), symmetric.
        force_double: decompose in float64; the results have x's dtype.

    Returns:
        Eigenvalues (..., N) and eigenvectors (..., N, N).

    Raises:
        ValueError: `x` is not a square matrix or a batch of them.

    Example:
        >>> eigh_with_fallback(torch.diag(torch.tensor([1.0, 3.0])))[0]
        tensor([3., 1.])
    """
    _check_square("x", x)
    batch = x.reshape(-1, *x.shape[-2:])
    values, vectors = eigh_descending(batch.double() if force_double else batch)
    return values.to(x.dtype).reshape(x.shape[:-1]), vectors.to(x.dtype).reshape(x.shape)


def conjugate(a: Tensor, p: Tensor, diag: bool = False) -> Tensor:
    r""":math:`P^\top A P`, or its diagonal without the product's other entries.

    Args:
        a: (N, N) or (B, N, N).
        p: as many dimensions, (N, K) or (B, N, K).
        diag: return the diagonal only.

    Returns:
        (..., K, K), or (..., K) with `diag`.

    Raises:
        ValueError: neither two matrices that go together nor two batches of them of one length.

    Example:
        >>> conjugate(torch.diag(torch.tensor([1.0, 3.0])), torch.eye(2), diag=True)
        tensor([1., 3.])
    """
    fit = a.ndim == p.ndim and a.shape[:-2] == p.shape[:-2] and a.size(-1) == a.size(-2) == p.size(-2)
    if a.ndim not in (2, 3) or not fit:
        raise ValueError(
            f"conjugate: a of shape {tuple(a.shape)} and p of shape {tuple(p.shape)} do not go together; give "
            "(N, N) and (N, K), or two batches of these of one length"
        )
    return conjugate_diagonal(a, p) if diag else project_in(a, p, p)


def orthogonal_iteration(kronecker_factor: Tensor, eigenbasis: Tensor, power_iter_steps: int) -> Tensor:
    r"""`power_iter_steps` times :math:`Q \leftarrow \mathrm{qr}(K Q)`, columns in the order in which they stand.

    `linalg.orthogonal_iteration`, which SOAP uses, sorts the columns by their eigenvalues first.

    Args:
        kronecker_factor: K, (N, N) or (B, N, N), symmetric.
        eigenbasis: Q, the same shape, orthogonal.
        power_iter_steps: >= 1.

    Returns:
        The new basis, of the same shape.

    Raises:
        ValueError: shapes that differ, or fewer than one step.

    Example:
        >>> orthogonal_iteration(torch.diag(torch.tensor([3.0, 1.0])), torch.eye(2), 1).abs()
        tensor([[1., 0.],
                [0., 1.]])
    """
    _check_square("kronecker_factor", kronecker_factor)
    if eigenbasis.shape != kronecker_factor.shape:
        raise ValueError(
            f"orthogonal_iteration: eigenbasis has shape {tuple(eigenbasis.shape)}; kronecker_factor's "
            f"{tuple(kronecker_factor.shape)} is needed"
        )
    if not COUNT.holds(power_iter_steps):
        raise ValueError(
            f"orthogonal_iteration: power_iter_steps={power_iter_steps!r} is not allowed; give {COUNT.allowed}"
        )
    for _ in range(power_iter_steps):
        eigenbasis = torch.linalg.qr(kronecker_factor @ eigenbasis).Q
    return eigenbasis


def power_iteration(W: Tensor, u: Tensor, k: int = 1, eps: float = 1e-8) -> tuple[Tensor, Tensor, Tensor]:
    r"""Leading singular value and vectors by `k` power iterations; :math:`\sigma = u^\top W v`.

    The value is never above the true one. From a random start one iteration finds about 0.8 of it, on a Gaussian
    matrix; carried over from step to step, as Spectron does, one iteration keeps up.

    Args:
        W: (M, N) or (B, M, N).
        u: (M,) or (B, M), where to start; any length but zero.
        k: iterations, >= 0.
        eps: lower bound of the norms that divide.

    Returns:
        sigma, 0-D or (B,); u (..., M) and v (..., N), of unit length. Of a zero matrix: 0, the start, zeros.

    Raises:
        ValueError: shapes that do not go together, or a negative `k`.

    Example:
        >>> sigma, u, v = power_iteration(torch.diag(torch.tensor([3.0, 1.0])), torch.ones(2), k=10)
        >>> sigma
        tensor(3.)
    """
    if W.ndim not in (2, 3) or u.shape != W.shape[:-1]:
        raise ValueError(
            f"power_iteration: W of shape {tuple(W.shape)} and u of shape {tuple(u.shape)} do not go together; give "
            "(M, N) and (M,), or (B, M, N) and (B, M)"
        )
    if k < 0:
        raise ValueError(f"power_iteration: k={k!r} is not allowed; give an integer >= 0")
    return _power_iteration(W, u, k, eps)


def _check_square(name: str, x: Tensor) -> None:
    if x.ndim not in (2, 3) or x.size(-1) != x.size(-2):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; give (N, N) or (B, N, N)")
    if not x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype}; give floating-point numbers, {name}.float() for instance")
