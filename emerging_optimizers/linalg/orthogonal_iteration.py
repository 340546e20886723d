"""Refinement of an eigenbasis: one or more steps of orthogonal iteration."""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from emerging_optimizers.linalg.factorizations import factorized
from emerging_optimizers.linalg.kernels.routes import OrthonormalizerT, orthonormalizer
from emerging_optimizers.linalg.precision import fp32_matmul_precision


def orthogonal_iteration(
    k_BNN: Tensor,
    q_BNN: Tensor,
    steps: int = 1,
    orthonormalize: OrthonormalizerT | None = None,
    *,
    may_wait: bool = True,
) -> Tensor:
    r"""`steps` times :math:`Q \leftarrow \mathrm{qr}(K Q)`, for symmetric K (B, N, N) and orthogonal Q (B, N, N).

    Columns converge to eigenvectors in the order in which they stand, so they are first sorted by their Rayleigh
    quotients, largest first. Source: Golub and Van Loan, Matrix Computations, section 8.2.

    Args:
        k_BNN: positive semi-definite, of any rank.
        q_BNN: the basis so far.
        steps: >= 1.
        orthonormalize: "householder" or "cholesky" (`cholesky_qr`); None: as `kernels/routes.py` says.
        may_wait: let the host look for matrices to which `cholesky_qr` does not apply.

    Example:
        >>> k = torch.diag(torch.tensor([1.0, 3.0]))[None]
        >>> orthogonal_iteration(k, torch.eye(2)[None]).abs()
        tensor([[[0., 1.],
                 [1., 0.]]])
    """
    return iterate(k_BNN, q_BNN, steps, orthonormalize, may_wait=may_wait).basis


class Iterate(NamedTuple):
    """A new basis, and what else was found on the way from the old one Q."""

    basis: Tensor  # B N N
    quotients: Tensor  # B N, diag Q^T K Q
    order: Tensor  # B N, in which Q's columns were taken up
    cross: Tensor | None  # B N N, (Q_new^T K Q[:, order])^T

    def eigenvalues(self, rotation_BNN: Tensor) -> Tensor | None:
        r"""diag(Q_new^T K Q_new) for N^2 operations, given Q^T Q_new; None: not from what is known here."""
        if self.cross is None:
            return None
        return torch.sum(self.cross * _rows(rotation_BNN, self.order), dim=-2)


def iterate(
    k_BNN: Tensor,
    q_BNN: Tensor,
    steps: int = 1,
    orthonormalize: OrthonormalizerT | None = None,
    *,
    wanted: Tensor | None = None,
    crosses: bool = False,
    may_wait: bool = True,
) -> Iterate:
    r"""`orthogonal_iteration`, with `cross` where asked for and one step of Householder leaves it: it is R^T.

    Then K Q is formed in full float32, or what follows from R would be wrong by TF32. A matrix that is not `wanted`
    (B, 1, 1) keeps its basis.

    Everything is written transposed, Q^T K for K Q: QR takes columns that lie in memory one after another, and a CPU
    copies rows eight times as fast as it turns a matrix.

    Example:
        >>> k, q = torch.diag(torch.tensor([1.0, 3.0]))[None], torch.eye(2)[None]
        >>> found = iterate(k, q, crosses=True)
        >>> found.eigenvalues(q.mT @ found.basis)
        tensor([[3., 1.]])
    """
    by_cholesky = (orthonormalize or orthonormalizer(k_BNN)) == "cholesky"
    crosses = crosses and steps == 1 and not by_cholesky
    old_BNN = turned_BNN = q_BNN.mT.contiguous()
    with fp32_matmul_precision("highest") if crosses else nullcontext():
        product = turned_BNN @ k_BNN
    quotients = torch.linalg.vecdot(product, turned_BNN)
    order = quotients.argsort(dim=-1, descending=True)
    product = _rows(product, order)
    if by_cholesky:
        turned_BNN = _rows(turned_BNN, order)
    cross = None
    for step in range(steps):
        product = turned_BNN @ k_BNN if step else product
        if by_cholesky:
            turned_BNN = cholesky_qr(product.mT, turned_BNN.mT, may_wait=may_wait).mT
        else:
            basis, product = factorized("qr", product.mT)
            turned_BNN = basis.mT
            cross = product.mT.tril_() if crosses else None
    del product  # matrices are large
    if wanted is not None:  # exact for 0 and 1; a `where` takes four times as long
        turned_BNN = torch.lerp(old_BNN, turned_BNN, wanted.to(turned_BNN.dtype))
    return Iterate(turned_BNN.mT, quotients, order, cross)


def _rows(x_BNN: Tensor, order_BN: Tensor) -> Tensor:
    """The rows of every matrix in an order of its own, as one copy of rows: `gather` looks every entry up."""
    B, N = order_BN.shape
    first = torch.arange(0, B * N, N, device=order_BN.device).unsqueeze(-1)
    return x_BNN.reshape(B * N, N).index_select(0, (order_BN + first).flatten()).view(B, N, N)


# K + d I has the eigenvectors of K and a condition of at most 1 / d: no rank is too low, and a zero matrix leaves Q as
# it is. This d, relative to the norm of K, is little more than the rounding that is in K already.
_DAMPING_EPS = 8
# Two plain passes make columns orthogonal (Yamamoto et al.); shifted ones come before them where the square of the
# condition does not fit into the dtype (Fukaya et al.). Their shift, 11 (N^2 + N (N + 1)) eps, bounds every error that
# there might be; N eps is enough for those that there are, and leaves less to the second.
_SHIFTED_PASSES, _PLAIN_PASSES = 2, 2


def cholesky_qr(product_BNN: Tensor, q_BNN: Tensor, *, may_wait: bool = True) -> Tensor:
    r"""The orthonormal factor of K Q by products, Cholesky factorizations and triangular solves; diag R is positive.

    .. math::
        X = K Q + d\,\|K\| Q, \qquad
        X \leftarrow X D^{-1}, \quad X \leftarrow X R^{-1} \quad\text{with}\quad R^\top R = X^\top X + s I

    four times, where D has the norms of X's columns and s is 0 in the last two. It runs on stacks. Of 80,000 finite
    matrices, of conditions up to 1e12, of ranks down to 0 and after spikes of 1e5, with bases that fit and that do not,
    it failed for one; the others are orthogonal to 2e-6 in float32, as by Householder. A matrix for which it fails goes
    to Householder, for which the host waits until the device knows; where it must not, that matrix keeps Q until the
    next refresh, as one that is not finite always does.

    Args:
        product_BNN: K Q, for positive semi-definite K.
        q_BNN: orthogonal.
        may_wait: False: the host reads nothing, as a CUDA graph and work on a side stream demand.

    References:
        Yamamoto et al. 2015, Roundoff error analysis of the CholeskyQR2 algorithm.
        Fukaya et al. 2020, Shifted Cholesky QR for computing the QR factorization of ill-conditioned matrices.

    Example:
        >>> cholesky_qr(torch.zeros(1, 2, 2), torch.eye(2)[None])
        tensor([[[1., 0.],
                 [0., 1.]]])
    """
    eps = torch.finfo(product_BNN.dtype).eps
    gram = identity = torch.eye(product_BNN.size(-1), dtype=product_BNN.dtype, device=product_BNN.device)
    # By the largest entry first: squares of gradients are small, and their squares would vanish.
    peak = product_BNN.abs().amax(dim=(-2, -1), keepdim=True)
    x = product_BNN / torch.where(peak > 0, peak, 1)
    damping = _DAMPING_EPS * eps * torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = x + torch.where(peak > 0, damping, 1) * q_BNN
    sound = torch.ones_like(peak, dtype=torch.bool)
    with fp32_matmul_precision("highest"):  # TF32 in a Gram matrix is 1e-3 of orthogonality
        for passed in range(_SHIFTED_PASSES + _PLAIN_PASSES):
            x = x / torch.linalg.vector_norm(x, dim=-2, keepdim=True)
            gram = x.mT @ x
            if passed < _SHIFTED_PASSES:
                gram = gram + (identity.size(-1) * eps) * identity
            L, info = torch.linalg.cholesky_ex(gram)
            sound = sound & (info == 0).view(-1, 1, 1)
            x = torch.linalg.solve_triangular(L, x.mT, upper=False).mT
        # The last pass squares what the one before has left.
        left = (gram - identity).abs().amax(dim=(-2, -1), keepdim=True)
    sound = sound & (left < 1e-2)
    out = torch.where(sound, x, q_BNN)
    if may_wait and out.untyped_storage().device.type != "meta":  # a tensor without data (`estimate`) has no answer
        failed = ~sound.flatten()
        if failed.any():
            basis, R = factorized("qr", product_BNN)  # of all, so that its rows are those of the stack
            failed &= basis.isfinite().all(dim=(-2, -1))
            signs = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1, 1).unsqueeze(-2)
            out[failed] = (basis * signs)[failed]
    return out
