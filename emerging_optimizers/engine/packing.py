"""Averages of gradients in 8 bits (`state_dtype="int8"`): which can be kept so, how they lie, what `state` calls them.

A part of the state becomes two tensors, codes in the shape that it had and a scale for each block of at most 256
elements of a row (`linalg/eight_bits.py`). A row is one of the matrix that a rule works on, or, in an element-wise
rule, all that an entry of the parameter's first axis has. So blocks do not depend on what shares a stack, nor on how
many processes have cut a parameter along its first axis.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from torch import Tensor

from emerging_optimizers.distributed.shares import CutMatrix, Share
from emerging_optimizers.engine.matrix_view import Block
from emerging_optimizers.linalg.eight_bits import BLOCK, dequantise, quantise, scale_shape

INT8 = "int8"
CODES, SCALES = "_int8", "_scale"
# What is smaller is kept in float32, where it takes next to nothing: fewer elements, shorter rows, shorter vectors.
LEAST, LEAST_ROW, LEAST_VECTOR = 4096, 16, 2**20


def named(key: str, end: str) -> str:
    """The key of codes or scales of a part; a key may end in that of a block (".0")."""
    name, dot, block = key.partition(".")
    return name + end + dot + block


def plain_key(key: str) -> str:
    """The key of the part to which codes and scales belong; another key as it is."""
    name, dot, block = key.partition(".")
    return name.removesuffix(CODES).removesuffix(SCALES) + dot + block


def holds_codes(keys: Iterable[Any]) -> bool:
    """Whether some of the keys of a state are those of codes."""
    return any(isinstance(key, str) and key.partition(".")[0].endswith(CODES) for key in keys)


def others_than(keys: Iterable[Any], own: Iterable[Any]) -> set[Any]:
    """The keys that name no part of a state, in whatever form."""
    known = {plain_key(key) for key in own if isinstance(key, str)}
    return {key for key in keys if not isinstance(key, str) or plain_key(key) not in known}


def bears_blocks(share: Share, block: Block) -> bool:
    """Whether averages of a block can be kept in 8 bits: it is large enough, and no process cuts into its rows."""
    if block.item:
        item = share.shape if isinstance(share, CutMatrix) else block.item
        return prod(item) >= LEAST and item[1] >= LEAST_ROW
    if len(share.shape) < 2:
        return prod(share.shape) >= LEAST_VECTOR and not share.cuts_rows(BLOCK)
    large = prod(share.shape) >= LEAST and prod(share.shape[1:]) >= LEAST_ROW
    return large and not share.cuts_rows(BLOCK)


def widened(block: Block, codes: Tensor, scales: Tensor, p: Tensor) -> Tensor:
    """A part of the state of a parameter in the form that it has without `state_dtype`.

    Raises:
        RuntimeError: the scales are not those of such codes.
    """
    if block.item:
        rows = block.restack(codes)
        return block.unstack(dequantise(rows, scales.reshape(scale_shape(rows.shape))), p)
    rows = codes.reshape(_row_shape(codes.shape))
    return dequantise(rows, scales.reshape(scale_shape(rows.shape))).view(codes.shape)


def narrowed(block: Block, x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a part of the state of a parameter, out of the form that it has without `state_dtype`."""
    if not block.item:
        codes, scales = quantise(x.reshape(_row_shape(x.shape)))
        return codes.view(x.shape), scales
    codes, scales = quantise(block.restack(x))
    return block.unstack(codes, p), scales if block.batched else scales[0]


def _row_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Of the rows of a parameter of an element-wise rule."""
    return (shape[0], prod(shape[1:])) if len(shape) > 1 else (prod(shape),)


class Grid(NamedTuple):
    """Items of a stack with their scales.

    Attributes:
        items: of the codes.
        scales: of those.
        width: elements are taken as rows of this length, which blocks cut alike; None: items are matrices.
    """

    items: slice
    scales: slice
    width: int | None

    def of(self, codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Views in which the last axis is cut into blocks."""
        codes, scales = codes[self.items], scales[self.scales]
        if self.width is None:
            return codes, scales
        return codes.view(-1, self.width), scales.view(-1, *scale_shape((self.width,)))


class Packing:
    """The scales of a bucket whose averages are kept in 8 bits.

    Args:
        item: of the bucket.
        offsets: of its rows.
        shapes: of its parameters.
        names: of the parts.
        like: of the dtype and on the device of the computation.
    """

    def __init__(
        self,
        item: tuple[int, ...],
        offsets: Sequence[int],
        shapes: Sequence[Sequence[int]],
        names: Iterable[str],
        like: Tensor,
    ) -> None:
        self._item, self._offsets = item, offsets
        self._rows = [_row_shape(shape) for shape in shapes]
        # Rows that whole blocks fill are taken as rows of one block, so that parameters are worked on together, and a
        # vector in pieces.
        self._widths = [BLOCK if len(rows) == 1 or rows[-1] % BLOCK == 0 else rows[-1] for rows in self._rows]
        self._starts = [0]
        for rows in self._rows:
            self._starts.append(self._starts[-1] + prod(scale_shape(rows)))
        shape = scale_shape((offsets[-1], *item)) if item else (self._starts[-1],)
        self.scales = {name: like.new_zeros(shape) for name in names}

    def move(self, place: Callable[[Tensor], Any]) -> None:
        """Have the scales somewhere else."""
        self.scales = {name: place(scale) for name, scale in self.scales.items()}

    def piece(self, i: int, cap: int) -> int:
        """How many elements of row i of an element-wise rule make a piece of about `cap`: no block is cut."""
        return max(1, cap // self._widths[i]) * self._widths[i]

    def grids(self, segments: Iterable[tuple[int, int, int]]) -> list[Grid]:
        """How the segments of a chunk lie; neighbours that are cut alike are one."""
        found: list[Grid] = []
        for grid in (grid for segment in segments for grid in self._grids_of(*segment)):
            last = found[-1] if found else None
            if last is not None and last.items.stop == grid.items.start and last.width == grid.width:
                items = slice(last.items.start, grid.items.stop)
                found[-1] = Grid(items, slice(last.scales.start, grid.scales.stop), grid.width)
            else:
                found.append(grid)
        return found

    def _grids_of(self, i: int, start: int, stop: int) -> Iterator[Grid]:
        """Of a segment: the rows that are all alike, and what is left of a vector."""
        first = self._offsets[i]
        if self._item:
            yield Grid(slice(first + start, first + stop), slice(first + start, first + stop), None)
            return
        width = self._widths[i]
        each, left = -(-width // BLOCK), (stop - start) % width
        a, b = (self._starts[i] + k // width * each for k in (start, stop))
        if start < stop - left:
            yield Grid(slice(first + start, first + stop - left), slice(a, b), width)
        if left:
            yield Grid(slice(first + stop - left, first + stop), slice(b, b + 1), left)

    def pieces(self, grids: Sequence[Grid], name: str, codes: Tensor) -> list[tuple[Tensor, ...]]:
        """The codes and scales of a chunk."""
        return [grid.of(codes, self.scales[name]) for grid in grids]

    def wide(self, pieces: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
        """Their numbers, as pieces of a stack."""
        return [x if self._item else x.view(-1) for x in (dequantise(*piece) for piece in pieces)]

    def scales_of(self, i: int, name: str, batched: bool) -> Tensor:
        """Those of row i, as `state` has them."""
        if self._item:
            rows = self.scales[name][self._offsets[i] : self._offsets[i + 1]]
            return rows if batched else rows[0]
        return self.scales[name][self._starts[i] : self._starts[i + 1]].view(scale_shape(self._rows[i]))


def unpacked(saved: Mapping[str, Any], keys: Iterable[str], block: Block, p: Tensor, whole: Any) -> dict[str, Any]:
    """What is saved of a parameter, with parts in 8 bits in float32 where they are now needed so.

    Args:
        saved: its state.
        keys: those that are needed.
        block: of the parameter.
        p: the parameter.
        whole: makes all of a tensor of one that is spread.

    Raises:
        ValueError: scales are missing, or do not fit.
    """
    found = dict(saved)
    for key in keys:
        codes, scales = named(key, CODES), named(key, SCALES)
        if key in saved or codes not in saved:
            continue
        try:
            found[key] = widened(block, whole(saved[codes]), whole(saved[scales]), p)
        except (KeyError, RuntimeError):
            raise ValueError(
                f"the optimizer state {codes!r} needs {scales!r}, with a scale for each block of at most {BLOCK} "
                "elements of a row"
            ) from None
    return found
