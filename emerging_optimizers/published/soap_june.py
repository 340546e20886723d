"""The parts of a SOAP step as functions of one matrix, and eigenbases, as the June 2026 release has them.

They are published at `soap.soap` and `soap.soap_utils`. `SOAP` itself works on stacks and uses none of them;
`published.soap_august` has the forms of the later release.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from emerging_optimizers.linalg.eigenbasis import kl_sides
from emerging_optimizers.linalg.kernels.symmetric import gram
from emerging_optimizers.linalg.kronecker import conjugate_diagonal
from emerging_optimizers.published.eig import eigh_with_fallback, orthogonal_iteration

TensorList = list[Tensor]


def init_kronecker_factors(grad_shape: Sequence[int], device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Zero factors L (M, M) and R (N, N) in float32.

    Args:
        grad_shape: (M, N).
        device: of the factors.

    Returns:
        L and R.

    Raises:
        TypeError: not two dimensions.

    Example:
        >>> [tuple(factor.shape) for factor in init_kronecker_factors((2, 3))]
        [(2, 2), (3, 3)]
    """
    if len(grad_shape) != 2:
        raise TypeError(f"init_kronecker_factors: grad_shape={tuple(grad_shape)} is not that of a matrix (M, N)")
    left, right = (torch.zeros(size, size, dtype=torch.float32, device=device) for size in grad_shape)
    return left, right


@torch.no_grad()
def update_kronecker_factors(kronecker_factor_list: list[Tensor], grad: Tensor, shampoo_beta: float) -> None:
    r""":math:`L \leftarrow \beta L + (1 - \beta) G G^\top` and :math:`R \leftarrow \beta R + (1 - \beta) G^\top G`.

    Args:
        kronecker_factor_list: L (M, M) and R (N, N), changed in place.
        grad: G, (M, N).
        shampoo_beta: decay, in [0, 1).

    Example:
        >>> L, R = init_kronecker_factors((1, 2))
        >>> update_kronecker_factors([L, R], torch.tensor([[1.0, 2.0]]), shampoo_beta=0.0)
        >>> L
        tensor([[5.]])
    """
    for factor, side in zip(kronecker_factor_list, (grad, grad.mT), strict=True):
        factor.lerp_(side @ side.mT, 1 - shampoo_beta)


@torch.no_grad()
def update_kronecker_factors_kl_shampoo(
    kronecker_factor_list: list[Tensor],
    grad: Tensor,
    shampoo_beta: float,
    eigenbasis_list: list[Tensor],
    eps: float,
    eigval_exp: float = -1.0,
) -> None:
    r"""Factors of KL-Shampoo, each from the gradient whitened by the other one as it was.

    .. math::
        L \leftarrow \beta L + \frac{1 - \beta}{N} G Q_R \Lambda_R^p Q_R^\top G^\top, \qquad
        R \leftarrow \beta R + \frac{1 - \beta}{M} G^\top Q_L \Lambda_L^p Q_L^\top G, \qquad
        \Lambda = \max(\mathrm{diag}(Q^\top K Q), \epsilon)

    Args:
        kronecker_factor_list: L (M, M) and R (N, N), changed in place.
        grad: G, (M, N).
        shampoo_beta: decay, in [0, 1).
        eigenbasis_list: Q_L and Q_R.
        eps: smaller eigenvalues count as this.
        eigval_exp: p.

    Raises:
        TypeError: grad is not a matrix.

    Example:
        >>> L, R = torch.eye(1), torch.eye(2)
        >>> bases = [torch.eye(1), torch.eye(2)]
        >>> update_kronecker_factors_kl_shampoo([L, R], torch.tensor([[1.0, 2.0]]), 0.0, bases, eps=1e-8)
        >>> L
        tensor([[2.5000]])
    """
    values = [conjugate_diagonal(K, Q) for K, Q in zip(kronecker_factor_list, eigenbasis_list, strict=True)]
    update_kl_factors(kronecker_factor_list, grad, shampoo_beta, eigenbasis_list, values, eps, eigval_exp)


@torch.no_grad()
def update_kl_factors(
    factors: Iterable[Tensor],
    grad: Tensor,
    shampoo_beta: float,
    bases: Iterable[Tensor],
    eigenvalues: Iterable[Tensor],
    eps: float,
    power: float,
) -> None:
    """`update_kronecker_factors_kl_shampoo` with eigenvalues that are known."""
    if grad.ndim != 2:
        raise TypeError(f"KL-Shampoo's factors are those of a matrix; grad has shape {tuple(grad.shape)}")
    (Q_L, Q_R), (values_L, values_R) = bases, eigenvalues
    roots = ((values.clamp_min(eps) ** (power / 2))[None] for values in (values_L, values_R))
    left_BMN, right_BMN = kl_sides(grad[None], Q_L[None], Q_R[None], *roots)
    for factor, side in zip(factors, (left_BMN, right_BMN.mT), strict=True):
        factor.lerp_(gram(side)[0], 1 - shampoo_beta)


@torch.no_grad()
def update_eigenbasis_and_exp_avgs(
    kronecker_factor_list: list[Tensor],
    eigenbasis_list: list[Tensor],
    exp_avg_sq: Tensor,
    exp_avg: Tensor,
    use_eigh: bool = False,
    power_iter_steps: int = 1,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """New bases, the first moment carried into them, and the second one permuted with the columns.

    `SOAP` carries the second moment too: permuted, it lets updates explode after a gradient spike (docs/spikes.md).

    Args:
        kronecker_factor_list: L (M, M) and R (N, N).
        eigenbasis_list: their bases so far.
        exp_avg_sq: second moment in the bases so far, (M, N).
        exp_avg: first moment in the bases so far, (M, N).
        use_eigh: bases from eigh instead of orthogonal iteration.
        power_iter_steps: orthogonal iterations, >= 1.

    Returns:
        The new bases, the first and the second moment in them.

    Example:
        >>> factors, bases = [torch.diag(torch.tensor([1.0, 2.0])), torch.eye(1)], [torch.eye(2), torch.eye(1)]
        >>> moment = torch.tensor([[3.0], [4.0]])
        >>> update_eigenbasis_and_exp_avgs(factors, bases, moment, moment)[1].abs()
        tensor([[4.],
                [3.]])
    """
    exp_avg = precondition(exp_avg, eigenbasis_list, dims=[[0], [1]])
    bases, exp_avg_sq = sort_eigenbasis_by_approx_eigvals(kronecker_factor_list, eigenbasis_list, exp_avg_sq)
    if use_eigh:
        bases = get_eigenbasis_eigh(kronecker_factor_list)
    else:
        bases = get_eigenbasis_qr(kronecker_factor_list, bases, power_iter_steps)
    return bases, precondition(exp_avg, bases), exp_avg_sq


@torch.no_grad()
def precondition(x: Tensor, eigenbasis_list: list[Tensor] | None = None, dims: list[list[int]] | None = None) -> Tensor:
    r"""Into the bases, :math:`Q_L^\top X Q_R`, or out of them.

    Args:
        x: (D_0, ..., D_N), one basis for each dimension.
        eigenbasis_list: the bases; None: x as it is.
        dims: None or [[0], [0]]: into the bases; [[0], [1]]: out of them.

    Returns:
        The shape of x.

    Example:
        >>> precondition(torch.tensor([[1.0, 2.0]]), [torch.eye(1), torch.eye(2).flip(0)])
        tensor([[2., 1.]])
    """
    for basis in eigenbasis_list or ():
        x = torch.tensordot(x, basis, dims=dims or [[0], [0]])
    return x


@torch.no_grad()
def get_eigenbasis_eigh(kronecker_factor_list: Iterable[Tensor]) -> TensorList:
    """Eigenvectors of each factor, by falling eigenvalue.

    Args:
        kronecker_factor_list: symmetric (K, K) matrices, of any sizes.

    Returns:
        The eigenvectors as columns, (K, K) each.

    Example:
        >>> get_eigenbasis_eigh([torch.diag(torch.tensor([1.0, 2.0]))])[0].abs()
        tensor([[0., 1.],
                [1., 0.]])
    """
    return [eigh_with_fallback(factor)[1] for factor in kronecker_factor_list]


@torch.no_grad()
def get_eigenbasis_qr(
    kronecker_factor_list: Iterable[Tensor], eigenbasis_list: Iterable[Tensor], power_iter_steps: int = 1
) -> TensorList:
    """Each basis after orthogonal iterations with its factor; columns stay in their order.

    Args:
        kronecker_factor_list: symmetric (K, K) matrices, of any sizes.
        eigenbasis_list: their bases, sorted by falling eigenvalue (`sort_eigenbasis_by_approx_eigvals`).
        power_iter_steps: iterations, >= 1.

    Returns:
        The new bases.

    Example:
        >>> get_eigenbasis_qr([torch.diag(torch.tensor([2.0, 1.0]))], [torch.eye(2)])[0].abs()
        tensor([[1., 0.],
                [0., 1.]])
    """
    return [
        orthogonal_iteration(factor, basis, power_iter_steps)
        for factor, basis in zip(kronecker_factor_list, eigenbasis_list, strict=True)
    ]


@torch.no_grad()
def sort_eigenbasis_by_approx_eigvals(
    kronecker_factor_list: TensorList, eigenbasis_list: TensorList, exp_avg_sq: Tensor
) -> tuple[TensorList, Tensor]:
    r"""Columns of each basis, and rows and columns of the second moment, by falling :math:`\mathrm{diag}(Q^\top K Q)`.

    Args:
        kronecker_factor_list: L (M, M) and R (N, N).
        eigenbasis_list: their bases.
        exp_avg_sq: (M, N).

    Returns:
        The sorted bases and the sorted second moment.

    Example:
        >>> factors, bases = [torch.diag(torch.tensor([1.0, 2.0])), torch.eye(1)], [torch.eye(2), torch.eye(1)]
        >>> sort_eigenbasis_by_approx_eigvals(factors, bases, torch.tensor([[3.0], [4.0]]))[1]
        tensor([[4.],
                [3.]])
    """
    bases = []
    for axis, (factor, basis) in enumerate(zip(kronecker_factor_list, eigenbasis_list, strict=True)):
        order = conjugate_diagonal(factor, basis).argsort(descending=True)
        bases.append(basis[:, order])
        exp_avg_sq = exp_avg_sq.index_select(axis, order)
    return bases, exp_avg_sq
