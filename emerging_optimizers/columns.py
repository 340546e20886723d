"""Rows of cells as text."""

from collections.abc import Collection, Sequence


def in_columns(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Rows of cells as lines.

    Args:
        rows: of equally many cells.
        right: the columns whose cells end below each other, as numbers do; those of the others begin so.

    Example:
        >>> in_columns([("a", "shape"), ("bcd", "2x3")])
        ['a    shape', 'bcd  2x3']
        >>> in_columns([("a", "ms"), ("b", "12.5")], right=[1])
        ['a    ms', 'b  12.5']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pads = [str.rjust if k in right else str.ljust for k in range(len(widths))]
    return ["  ".join(pad(x, n) for pad, x, n in zip(pads, row, widths, strict=True)).rstrip() for row in rows]
