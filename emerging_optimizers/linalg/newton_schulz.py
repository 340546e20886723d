"""Newton-Schulz iteration: the polar factor of a stack of matrices by matrix products alone."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from emerging_optimizers.linalg.coefficients import Coefficients
from emerging_optimizers.linalg.kernels.routes import calls, gram_blocks
from emerging_optimizers.linalg.kernels.spare import Spare
from emerging_optimizers.linalg.kernels.symmetric import gram, symmetric_product


def newton_schulz(
    x_BMN: Tensor,
    coefficients: Coefficients,
    *,
    compute_dtype: torch.dtype | None = None,
    eps: float | None = None,
    transpose: bool | None = None,
    total: Callable[[Tensor], Tensor] | None = None,
    use_syrk: bool = False,
) -> Tensor:
    r"""Map every singular value of every matrix towards 1 and keep its singular vectors.

    .. math::
        X_0 = X / \|X\|_F, \qquad A = X_k X_k^\top, \qquad
        X_{k+1} = a_k X_k + (b_k A + c_k A^2) X_k

    Where it is measured to be cheaper and as exact, some steps share one Gram matrix, as in `gram_newton_schulz`
    (`kernels/routes.py`).

    Args:
        x_BMN: (B, M, N), floating point. Not modified.
        coefficients: one (a, b, c) a step.
        compute_dtype: dtype of the products (the normalisation keeps the input's); None: the input's.
        eps: lower bound of the norm that divides. None: the norm is taken of the matrix divided by its largest
            entry, so that the result does not depend on the scale of the input, and a zero matrix stays zero.
        transpose: take the Gram matrices of the columns, X^T X; None: where M > N, so that they are the small ones.
        total: for matrices of which this process holds some columns (with `transpose`: rows): the sum of a tensor over
            the processes. None: they are all here.
        use_syrk: A and b A + c A^2 by the kernel for symmetric products, which computes half of them; False: where
            `kernels/routes.py` has measured it to pay.

    Returns:
        (B, M, N) in the input's dtype.

    Raises:
        ValueError: `use_syrk` where there is no kernel: off CUDA devices, without triton, for float64.

    Example:
        >>> from emerging_optimizers.linalg.coefficients import coefficients
        >>> x = newton_schulz(torch.randn(3, 8, 4), coefficients("quintic", 5))
        >>> bool((torch.linalg.svdvals(x) - 1).abs().max() < 0.2)
        True
    """
    turned = x_BMN.size(-2) > x_BMN.size(-1) if transpose is None else transpose
    steps, dtype = len(coefficients), compute_dtype or x_BMN.dtype
    if total is not None:  # every process makes the same calls
        x = unit_norm_of_parts(x_BMN, eps, total).to(dtype)
        return _in_blocks(x, coefficients, (1,) * steps, use_syrk, turned, total).to(x_BMN.dtype)
    blocks = gram_blocks(_wide(x_BMN, turned), dtype, steps)
    return _by_calls(x_BMN, coefficients, blocks, dtype, eps, use_syrk, turned)


def newton_schulz_step(
    x_BMN: Tensor,
    a: float,
    b: float,
    c: float,
    total: Callable[[Tensor], Tensor] | None = None,
    use_syrk: bool = False,
    turned: bool = False,
) -> Tensor:
    """One step of `newton_schulz`, (a I + b A + c A^2) X with A = X X^T; `turned`: X (a I + ...) with A = X^T X."""
    return _in_blocks(x_BMN, ((a, b, c),), (1,), use_syrk, turned, total)


def _wide(x: Tensor, turned: bool) -> Tensor:
    """The matrices with the side that the Gram matrix spans as their rows, as views: products take them as they lie."""
    return x.mT if turned else x


def _times(polynomial: tuple[float, Tensor], x: Tensor, turned: bool, spare: Spare) -> Tensor:
    """(i I + Q) X; `turned`: X (i I + Q^T), as Q is symmetric in exact arithmetic only.

    i X is added by baddbmm, never folded into Q as i I: in bfloat16 that costs 3 x the error.
    """
    i, q_BMM = polynomial
    first, second = (x, q_BMM.mT) if turned else (q_BMM, x)
    out = torch.baddbmm(x, first, second, beta=i, out=spare.take(x.shape))
    spare.give(q_BMM)
    spare.give(x)
    return out


def _polynomial(gram_BMM: Tensor, b: float, c: float, use_syrk: bool, out: Tensor | None = None) -> Tensor:
    """b A + c A^2 of a symmetric A."""
    if not c:
        return gram_BMM * b
    return symmetric_product(gram_BMM, gram_BMM, gram_BMM, beta=b, alpha=c, use_syrk=use_syrk, out=out)


def unit_norm_of_parts(x_BMN: Tensor, eps: float | None, total: Callable[[Tensor], Tensor]) -> Tensor:
    """Matrices of which every process holds a part, divided by their Frobenius norms.

    The squares are summed in float64, where those of the smallest float32 numbers do not vanish.
    """
    squares = total(x_BMN.double().square().sum(dim=(-2, -1), keepdim=True))
    norm = squares.sqrt().clamp_min(torch.finfo(x_BMN.dtype).tiny if eps is None else eps)
    return (x_BMN / norm).to(x_BMN.dtype)


def gram_newton_schulz(
    x_BMN: Tensor,
    coefficients: Coefficients,
    *,
    compute_dtype: torch.dtype | None = None,
    restart: int = 2,
    use_syrk: bool = False,
) -> Tensor:
    r"""The same map as `newton_schulz`, iterated on the small Gram matrix: cheaper where one side is much the longer.

    .. math::
        R_0 = X X^\top, \qquad P_k = a_k I + b_k R_k + c_k R_k^2, \qquad R_{k+1} = P_k R_k P_k, \qquad
        X \leftarrow P_{K-1} \cdots P_0 X

    Only the first and the last product touch the long side. Squared singular values lose digits, so after every
    `restart` steps the product is applied and R formed anew.

    Args:
        x_BMN: (B, M, N), floating point. Not modified.
        coefficients: one (a, b, c) a step.
        compute_dtype: dtype of the products; None: the input's.
        restart: steps on one Gram matrix, >= 1.
        use_syrk: as in `newton_schulz`.

    Returns:
        (B, M, N) in the input's dtype.

    References:
        Zhang, Amsel, Chen and Dao 2026, Gram Newton-Schulz (tridao.me/blog/2026/gram-newton-schulz).

    Example:
        >>> from emerging_optimizers.linalg.coefficients import coefficients
        >>> x = gram_newton_schulz(torch.randn(3, 4, 32), coefficients("quintic", 5))
        >>> bool((torch.linalg.svdvals(x) - 1).abs().max() < 0.2)
        True
    """
    turned = x_BMN.size(-2) > x_BMN.size(-1)
    full, rest = divmod(len(coefficients), restart)
    blocks = (restart,) * full + (rest,) * (rest > 0)
    return _by_calls(x_BMN, coefficients, blocks, compute_dtype or x_BMN.dtype, None, use_syrk, turned)


def _by_calls(
    x_BMN: Tensor,
    coefficients: Coefficients,
    blocks: Sequence[int],
    dtype: torch.dtype,
    eps: float | None,
    use_syrk: bool,
    turned: bool,
) -> Tensor:
    """Normalizes and iterates, as many matrices at a time as the device takes best."""
    parts = [
        # The normalized matrices are given away unnamed: a name would keep them through all steps.
        _in_blocks(_unit_norm(x, eps).to(dtype), coefficients, blocks, use_syrk, turned).to(x_BMN.dtype)
        for x in calls(x_BMN, dtype)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _in_blocks(
    x: Tensor,
    coefficients: Coefficients,
    blocks: Sequence[int],
    use_syrk: bool,
    turned: bool,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The steps in blocks, each on one Gram matrix. Several blocks may write over `x`.

    Nothing of a block has a name here, which would keep it alive.
    """
    spare = Spare()
    first = 0
    for size in blocks:
        sets = coefficients[first : first + size]
        x = _times(_composed(_wide(x, turned), sets, use_syrk, total, spare), x, turned, spare)
        first += size
    return x


def _composed(
    x_BMN: Tensor,
    coefficients: Coefficients,
    use_syrk: bool,
    total: Callable[[Tensor], Tensor] | None,
    spare: Spare,
) -> tuple[float, Tensor]:
    """Steps on one Gram matrix: i and Q of their product i I + Q, which are never folded into one."""
    square = (*x_BMN.shape[:-1], x_BMN.size(-2))
    gram_BMM = gram(x_BMN, use_syrk=use_syrk, out=spare.take(square))
    if total is not None:
        gram_BMM = total(gram_BMM)
    (a, b, c), *later = coefficients
    i, p = a, _polynomial(gram_BMM, b, c, use_syrk, spare.take(square))
    q = p
    for next_a, b, c in later:
        half = symmetric_product(p, gram_BMM, gram_BMM, beta=a)
        gram_BMM = symmetric_product(half, p, half, beta=a)
        a, p = next_a, _polynomial(gram_BMM, b, c, use_syrk)
        q = symmetric_product(p, q, q, beta=a) + i * p
        i = a * i
    spare.give(gram_BMM)
    return i, q


def _unit_norm(x: Tensor, eps: float | None) -> Tensor:
    if eps is not None:
        return x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(eps)
    # Not abs(): a stack less to allocate, and on a CPU the pages of each new one cost as much as its numbers.
    peak = torch.maximum(x.amax(dim=(-2, -1), keepdim=True), -x.amin(dim=(-2, -1), keepdim=True))
    x = x / torch.where(peak > 0, peak, 1)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_min(1)
    return x / norm if x.requires_grad else x.div_(norm)
