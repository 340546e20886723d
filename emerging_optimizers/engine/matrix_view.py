"""How a parameter is cut into the items of a stack."""

from typing import Any

from torch import Tensor

MATRIX_VIEWS = ("auto", "flatten")


def item_shape(p: Tensor, elementwise: bool, view: Any = "auto") -> tuple[int, ...]:
    """The shape of one item: () for an element-wise rule, (M, N) for a matrix rule.

    A 2-D parameter is one matrix. A 3-D parameter is a batch of matrices along its first axis (experts), unless
    `view="flatten"`. Anything else is flattened to (out, rest): a convolution's weight, and a vector to one column.
    """
    if elementwise:
        return ()
    if p.ndim == 3 and view == "auto":
        return tuple(p.shape[1:])
    rows = p.shape[0] if p.ndim else 1
    return (rows, p.numel() // rows)


def as_items(x: Tensor, item: tuple[int, ...]) -> Tensor:
    """The tensor as a stack (items, *item): a view where its strides allow one."""
    return x.reshape(-1, *item)
