"""The parts of a SOAP step as functions of one matrix, and eigenbases, as the August 2026 release has them.

They are published at `legacy_soap.soap`, `legacy_soap.soap_utils` and `legacy_soap.tp_rekls`. They differ from those of
`published.soap_june` in keeping eigenvalues, and in a second moment that stays as it is.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from emerging_optimizers.distributed.groups import gather, get_pg_size
from emerging_optimizers.linalg.kronecker import conjugate_diagonal
from emerging_optimizers.published.eig import eigh_with_fallback, orthogonal_iteration
from emerging_optimizers.published.soap_june import precondition, update_kl_factors

TensorList = list[Tensor]


def update_kronecker_factors_kl_shampoo(
    kronecker_factor_list: Iterable[Tensor],
    grad: Tensor,
    shampoo_beta: float,
    eigenbasis_list: Iterable[Tensor],
    eigvals_list: Iterable[Tensor],
    eps: float,
    eigval_exp: float = -1.0,
) -> None:
    """The factors of KL-Shampoo; `published.soap_june` has the equation.

    Args:
        kronecker_factor_list: L (M, M) and R (N, N), changed in place.
        grad: (M, N).
        shampoo_beta: decay, in [0, 1).
        eigenbasis_list: Q_L and Q_R.
        eigvals_list: the eigenvalues that belong to them, (M,) and (N,).
        eps: smaller eigenvalues count as this.
        eigval_exp: the power of the eigenvalues.

    Raises:
        TypeError: grad is not a matrix.

    Example:
        >>> L, R = torch.eye(1), torch.eye(2)
        >>> values = [torch.ones(1), torch.tensor([1.0, 2.0])]
        >>> update_kronecker_factors_kl_shampoo([L, R], torch.tensor([[1.0, 2.0]]), 0.0, [L, R.clone()], values, 1e-8)
        >>> L
        tensor([[1.5000]])
    """
    update_kl_factors(kronecker_factor_list, grad, shampoo_beta, eigenbasis_list, eigvals_list, eps, eigval_exp)


@torch.no_grad()
def update_eigenbasis_and_exp_avgs(
    kronecker_factor_list: list[Tensor],
    eigenbasis_list: list[Tensor],
    exp_avg_sq: Tensor,
    exp_avg: Tensor,
    use_eigh: bool = False,
    power_iter_steps: int = 1,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """New eigenvalues and bases, the first moment carried into them, the second moment as it is.

    Args:
        kronecker_factor_list: L (M, M) and R (N, N).
        eigenbasis_list: their bases so far.
        exp_avg_sq: second moment, (M, N).
        exp_avg: first moment in the bases so far, (M, N).
        use_eigh: bases from eigh instead of orthogonal iteration.
        power_iter_steps: orthogonal iterations, >= 1.

    Returns:
        Eigenvalues, bases, the first moment in them, the second moment.

    Example:
        >>> factors, bases = [torch.diag(torch.tensor([1.0, 2.0])), torch.eye(1)], [torch.eye(2), torch.eye(1)]
        >>> update_eigenbasis_and_exp_avgs(factors, bases, torch.zeros(2, 1), torch.zeros(2, 1))[0]
        [tensor([2., 1.]), tensor([1.])]
    """
    if use_eigh:
        eigenvalues, bases = get_eigenbasis_eigh(kronecker_factor_list)
    else:
        eigenvalues, bases = get_eigenbasis_qr(kronecker_factor_list, eigenbasis_list, power_iter_steps)
    return eigenvalues, bases, project_in(project_out(exp_avg, eigenbasis_list), bases), exp_avg_sq


def project_in(x: Tensor, eigenbasis_list: list[Tensor]) -> Tensor:
    r"""Into the bases: :math:`Q_L^\top X Q_R` for a matrix.

    Args:
        x: (D_0, ..., D_N).
        eigenbasis_list: one basis for each dimension.

    Returns:
        The shape of x.

    Example:
        >>> project_in(torch.tensor([[1.0, 2.0]]), [torch.eye(1), torch.eye(2).flip(0)])
        tensor([[2., 1.]])
    """
    return precondition(x, eigenbasis_list, dims=[[0], [0]])


def project_out(x: Tensor, eigenbasis_list: list[Tensor]) -> Tensor:
    r"""Out of the bases: :math:`Q_L X Q_R^\top` for a matrix.

    Args:
        x: (D_0, ..., D_N).
        eigenbasis_list: one basis for each dimension.

    Returns:
        The shape of x.

    Example:
        >>> project_out(torch.tensor([[2.0, 1.0]]), [torch.eye(1), torch.eye(2).flip(0)])
        tensor([[1., 2.]])
    """
    return precondition(x, eigenbasis_list, dims=[[0], [1]])


@torch.no_grad()
def get_eigenbasis_eigh(kronecker_factor_list: Iterable[Tensor]) -> tuple[TensorList, TensorList]:
    """Eigenvalues of each factor, falling, and its eigenvectors.

    Args:
        kronecker_factor_list: symmetric (K, K) matrices, of any sizes.

    Returns:
        Eigenvalues (K,) and eigenvectors (K, K) of each.

    Example:
        >>> get_eigenbasis_eigh([torch.diag(torch.tensor([1.0, 2.0]))])[0]
        [tensor([2., 1.])]
    """
    pairs = [eigh_with_fallback(factor) for factor in kronecker_factor_list]
    return [values for values, _ in pairs], [vectors for _, vectors in pairs]


@torch.no_grad()
def get_eigenbasis_svd(kronecker_factor_list: Iterable[Tensor]) -> TensorList:
    """Left singular vectors of each factor, which are its eigenvectors where it is positive.

    Args:
        kronecker_factor_list: symmetric positive (K, K) matrices, of any sizes.

    Returns:
        The vectors of each, by falling eigenvalue.

    Example:
        >>> get_eigenbasis_svd([torch.diag(torch.tensor([1.0, 2.0]))])[0].abs()
        tensor([[0., 1.],
                [1., 0.]])
    """
    return [torch.linalg.svd(factor).U for factor in kronecker_factor_list]


@torch.no_grad()
def get_eigenbasis_qr(
    kronecker_factor_list: Iterable[Tensor], eigenbasis_list: Iterable[Tensor], power_iter_steps: int = 1
) -> tuple[TensorList, TensorList]:
    r"""Each basis after orthogonal iterations with its factor, sorted by the eigenvalues that it then sees.

    Args:
        kronecker_factor_list: symmetric (K, K) matrices, of any sizes.
        eigenbasis_list: their bases.
        power_iter_steps: iterations, >= 1.

    Returns:
        :math:`\mathrm{diag}(Q^\top K Q)`, falling, and Q of each.

    Example:
        >>> get_eigenbasis_qr([torch.diag(torch.tensor([1.0, 2.0]))], [torch.eye(2)])[0]
        [tensor([2., 1.])]
    """
    eigenvalues, bases = [], []
    for factor, old in zip(kronecker_factor_list, eigenbasis_list, strict=True):
        basis = orthogonal_iteration(factor, old, power_iter_steps)
        values, order = conjugate_diagonal(factor, basis).sort(descending=True)
        eigenvalues.append(values)
        bases.append(basis[:, order])
    return eigenvalues, bases


def all_gather_grad_and_kronecker_factors_tp(
    kronecker_factor_list: list[Tensor], grad: Tensor, partition_dim: int, tp_group: dist.ProcessGroup | None
) -> tuple[Tensor, list[Tensor]]:
    """The whole gradient of a shard, and the whole of each factor that is kept by rows.

    Args:
        kronecker_factor_list: rows of factors.
        grad: a shard of a matrix.
        partition_dim: the axis along which it is one.
        tp_group: the processes that have the others; None: this is all of it.

    Example:
        >>> G, (L,) = all_gather_grad_and_kronecker_factors_tp([torch.eye(2)], torch.ones(2, 3), 0, None)
        >>> G.shape, L.shape
        (torch.Size([2, 3]), torch.Size([2, 2]))
    """
    if get_pg_size(tp_group) == 1:
        return grad, list(kronecker_factor_list)
    return gather(grad, partition_dim, tp_group), [gather(factor, 0, tp_group) for factor in kronecker_factor_list]
