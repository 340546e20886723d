"""Products that are known to be symmetric: half of each need not be computed."""

from typing import Any

import torch
from torch import Tensor

from emerging_optimizers.linalg.kernels.routes import least_block, takes_syrk
from emerging_optimizers.linalg.kernels.syrk import syrk


def gram(x_BMK: Tensor, *, use_syrk: bool = False, out: Tensor | None = None) -> Tensor:
    """X X^T of every matrix; `use_syrk` asks for the triton kernel. `out` is memory for it, which may be left aside.

    Example:
        >>> gram(torch.tensor([[[3.0, 4.0]]]))
        tensor([[[25.]]])
    """
    if use_syrk or takes_syrk(x_BMK):
        return syrk(x_BMK)
    if (least := least_block(x_BMK)) is not None:
        return _stack_by_blocks(x_BMK, x_BMK, None, 1.0, 1.0, least, out)
    return torch.bmm(x_BMK, x_BMK.mT, out=out)  # not `@`, which copies the transposed operand of a stack of one matrix


def symmetric_product(
    x_BMM: Tensor,
    y_BMM: Tensor,
    plus_BMM: Tensor,
    *,
    beta: float,
    alpha: float = 1.0,
    use_syrk: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    r""":math:`\beta P + \alpha X Y` of symmetric matrices that commute, as polynomials of one matrix do.

    `out` is memory for it, and of none of the three; it may be left aside.

    Example:
        >>> a = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])
        >>> symmetric_product(a, a, a, beta=-1.0)
        tensor([[[3., 3.],
                 [3., 3.]]])
    """
    if x_BMM is y_BMM and (use_syrk or takes_syrk(x_BMM)):
        return syrk(x_BMM, plus_BMM, alpha=alpha, beta=beta)
    if (least := least_block(x_BMM)) is not None:
        return _stack_by_blocks(x_BMM, y_BMM, plus_BMM, beta, alpha, least, out)
    return torch.baddbmm(plus_BMM, x_BMM, y_BMM, beta=beta, alpha=alpha, out=out)


def _stack_by_blocks(
    x_BMK: Tensor,
    y_BMK: Tensor,
    plus_BMM: Tensor | None,
    beta: float,
    alpha: float,
    least: int,
    out_BMM: Tensor | None,
) -> Tensor:
    if out_BMM is None:
        out_BMM = x_BMK.new_empty(x_BMK.size(0), x_BMK.size(1), x_BMK.size(1))
    by_blocks_(x_BMK, y_BMK, plus_BMM, beta, alpha, least, out_BMM)
    return out_BMM


# One operator for a stack: a large matrix is a thousand products, each of which would be run by itself on tensors
# without data. By `Library`, of which a call costs 7 us; `torch.library.custom_op` costs 130.
_LIBRARY = torch.library.Library("emerging_optimizers", "FRAGMENT")  # type: ignore[no-untyped-call]  # untyped in torch
_LIBRARY.define(  # type: ignore[no-untyped-call]  # as above
    "by_blocks_(Tensor x_BMK, Tensor y_BMK, Tensor? plus_BMM, float beta, float alpha, int least, Tensor(a!) out_BMM)"
    " -> ()"
)
by_blocks_ = torch.ops.emerging_optimizers.by_blocks_


@torch.library.impl(_LIBRARY, "by_blocks_", "CompositeExplicitAutograd")
def _(
    x_BMK: Tensor, y_BMK: Tensor, plus_BMM: Tensor | None, beta: float, alpha: float, least: int, out_BMM: Tensor
) -> None:
    for i, out_MM in enumerate(out_BMM):
        _by_blocks(x_BMK[i], y_BMK[i], None if plus_BMM is None else plus_BMM[i], beta, alpha, out_MM, least)


@torch.library.register_fake("emerging_optimizers::by_blocks_", lib=_LIBRARY)  # type: ignore[untyped-decorator]  # as above
def _(*_: Any) -> None:
    """What it writes has been made."""


def flops_by_blocks(rows: int, depth: int, least: int) -> int:
    """Operations of one matrix's X Y^T by blocks: of the blocks that are multiplied, and not mirrored.

    Example:
        >>> flops_by_blocks(8, 5, least=4) / (2 * 8 * 8 * 5)
        0.75
    """
    half = rows // 2
    if half < least:
        return 2 * rows * rows * depth
    rest = rows - half
    return 2 * half * rest * depth + flops_by_blocks(half, depth, least) + flops_by_blocks(rest, depth, least)


def _by_blocks(
    x_MK: Tensor, y_MK: Tensor, plus_MM: Tensor | None, beta: float, alpha: float, out_MM: Tensor, least: int
) -> None:
    """The lower left block is multiplied, the upper right one mirrors it, those on the diagonal are products alike."""
    half = x_MK.size(0) // 2
    if half < least:
        _product(x_MK, y_MK, plus_MM, beta, alpha, out_MM)
        return
    upper, lower = slice(half), slice(half, None)
    for rows, columns in ((lower, upper), (upper, upper), (lower, lower)):
        part = None if plus_MM is None else plus_MM[rows, columns]
        out = out_MM[rows, columns]
        if rows is columns:
            _by_blocks(x_MK[rows], y_MK[columns], part, beta, alpha, out, least)
        else:
            _product(x_MK[rows], y_MK[columns], part, beta, alpha, out)
    out_MM[upper, lower] = out_MM[lower, upper].mT


def _product(x_MK: Tensor, y_NK: Tensor, plus_MN: Tensor | None, beta: float, alpha: float, out_MN: Tensor) -> None:
    if plus_MN is None:
        torch.mm(x_MK, y_NK.mT, out=out_MN)
    else:
        torch.addmm(plus_MN, x_MK, y_NK.mT, beta=beta, alpha=alpha, out=out_MN)
