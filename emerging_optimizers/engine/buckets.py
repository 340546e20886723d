"""Stacks of the state of parameters of one item shape, dtype and device, and the ways in and out of them.

A stack's first axis runs over items: matrices (M, N) for a matrix rule, single elements for an element-wise rule.
Row i is a block of a parameter, nearly always all of it, and owns the items offsets[i] to offsets[i + 1].
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors  # one call for many tensors, as DDP has it

from emerging_optimizers.distributed.shares import Part, Share
from emerging_optimizers.engine.chunks import OUTBOX_PIECE, Chunk, Segment, cut
from emerging_optimizers.engine.commit import Write
from emerging_optimizers.engine.kept import entries_of
from emerging_optimizers.engine.matrix_view import Block
from emerging_optimizers.engine.offload import Coming, PiecesT, ferry_of, looking_ahead, pinned_for
from emerging_optimizers.engine.packing import CODES, INT8, SCALES, Packing, named
from emerging_optimizers.engine.parts import rounded_parts
from emerging_optimizers.engine.rule import Rule
from emerging_optimizers.engine.units import Units
from emerging_optimizers.linalg.eight_bits import BLOCK, dequantise, quantise

_DTYPE = attrgetter("dtype")
_KIND, _SHAPE = attrgetter("dtype", "device"), attrgetter("shape")


class Bucket(Units):
    """Units and the stacks of their state."""

    def __init__(
        self,
        rows: Sequence[tuple[Share, Block]],
        rule: Rule,
        rounded: torch.dtype | str | None = None,
        offload: bool = False,
    ) -> None:
        """Stacks for rows.

        Args:
            rows: blocks of shares.
            rule: of the group.
            rounded: the dtype in which the parts are kept that say `rounds`, or "int8"; None: that of the others.
            offload: stacks lie in the host's memory.
        """
        super().__init__(rows, "step" in rule.reads)
        self.ferry = ferry_of(self.device) if offload and not self.elsewhere else None
        device = self.device if self.ferry is None else torch.device("cpu")
        self.state = rule.init((self.offsets[-1], *self.item), self.dtype, device)
        rounds = [] if rounded is None else rounded_parts(self.state, rounded == INT8)
        self.rounded = bool(rounds)
        kept = torch.int8 if rounded == INT8 else rounded
        self.state = self.state._replace(**{name: getattr(self.state, name).to(kept) for name in rounds})
        # Chunks whose state is on its way, by their ids, which no other chunk gets while they stand here.
        self._coming: dict[int, tuple[Chunk, Coming]] = {}
        self._first: Chunk | None = None  # what was asked for first in the last step
        like = torch.empty(0, dtype=self.dtype, device=device)
        # The scales of what is in 8 bits, which starts at zero.
        eighths = rounds if rounded == INT8 else ()
        self.packing = Packing(item=self.item, offsets=self.offsets, shapes=self.shapes, names=eighths, like=like)
        if self.ferry is not None:
            self.state = type(self.state)(*(pinned_for(stack, self.device) for stack in self.state))
            self.packing.move(partial(pinned_for, device=self.device))
        self.kind = self.kind_of(rule)
        self.whole = Chunk(self, (Segment(i, 0, self.items(i)) for i in range(len(rows))))
        self._whole_chunks: dict[str, list[Chunk]] = {}
        self._part_chunks: tuple[Any, list[Chunk]] = (None, [])  # what was asked for last
        self._outbox = torch.empty(0, dtype=self.dtype, device=self.device)
        # Which stacks are shaped like the gradient, for any gradient: a square matrix's factors are so by accident.
        shape = (1, 2, 3)[: 1 + len(self.item)]
        probe = rule.init(shape, self.dtype, torch.device("meta"))._asdict()
        like_grad = {name for name, x in probe.items() if x is not None and x.shape == shape}
        self.views: list[dict[str, Tensor]] = [self._views(i, like_grad) for i in range(len(rows))]
        self._sharded = [share for share in self.shares if isinstance(share, Part)]
        # What `state` holds of them.
        self.published = [self._publish(i, views) for i, views in enumerate(self.views)]

    def _views(self, i: int, like_grad: set[str]) -> dict[str, Tensor]:
        """The state of row i under its checkpoint keys, as views of the stacks."""
        p, block, first, last = self.parameters[i], self.blocks[i], self.offsets[i], self.offsets[i + 1]
        views: dict[str, Tensor] = {}
        if self.step.numel():
            views["step" + block.key] = self.unit_view(i, self.step)
        for name, stack in self.state._asdict().items():
            if stack is None:
                continue
            rows, key = stack[first:last], name + block.key
            view = block.unstack(rows, p) if name in like_grad else rows if block.batched else rows[0]
            if name not in self.packing.scales:
                views[key] = view
            else:
                views[named(key, CODES)] = view
                views[named(key, SCALES)] = self.packing.scales_of(i, name, block.batched)
        return views

    def packed(self, i: int) -> list[str]:
        """The keys that parts of the state of row i would have if they were not kept in 8 bits."""
        return [name + self.blocks[i].key for name in self.packing.scales]

    def block_of(self, i: int, key: str) -> int:
        """How many elements of a row stand behind each number of an entry of the state of row i."""
        return BLOCK if key in {named(whole, SCALES) for whole in self.packed(i)} and not self.item else 1

    def _publish(self, i: int, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With what is kept of the weight, which stands under the same keys in each of its blocks."""
        share = self.shares[i]
        return {**{key: share.publish(view, self.block_of(i, key)) for key, view in views.items()}, **entries_of(share)}

    def kind_of(self, rule: Rule) -> Any:
        """What makes a rule's state what it is, and its turns; as it compares."""
        parts = rule.init((1, *self.item), self.dtype, torch.device("meta"))._asdict()
        shapes = {name: None if x is None else x.shape for name, x in parts.items()}
        return type(rule), rule.elementwise, "step" in rule.reads, rule.schedule.period, shapes

    def start_guard(self) -> None:
        """Allocate the running means of the spike guard, and publish them beside the rule's state."""
        if self.guard:
            return
        names = ("guard_norm", "guard_weight")
        self.guard = {name: torch.zeros(self.units, dtype=self.dtype, device=self.device) for name in names}
        for i, (views, published) in enumerate(zip(self.views, self.published, strict=True)):
            new = {name + self.blocks[i].key: self.unit_view(i, stack) for name, stack in self.guard.items()}
            views |= new
            published |= self._publish(i, new)

    def fits(self) -> bool:
        """Whether every parameter still is what its stacks were made for."""
        kinds = set(map(_KIND, self.parameters))
        alike = kinds == {(self.param_dtype, self.device)} and list(map(_SHAPE, self.parameters)) == self.shapes
        return alike and all(share.fits() for share in self._sharded) and all(kept.fits() for kept in self.kept)

    def turns_of(self, i: int, period: int) -> Iterator[tuple[Segment, int]]:
        """Row i in runs of items that share a turn of the period; a batch of matrices takes all turns."""
        here, of = self.shares[i].indices or (range(1), 1)
        each = self.items(i) // max(1, len(here))  # matrices of an entry of the parameter's first axis
        items = of * each
        runs = min(period, items)
        starts = [k * items // runs for k in range(runs)]
        for first, last in _stretches(here):
            at = (here.index(first)) * each - first * each
            for k, start in enumerate(starts):
                a, b = max(start, first * each), min(((k + 1) * items) // runs, last * each)
                if a < b:
                    yield Segment(i, a + at, b + at), (self.turns[i] + k * period // runs) % period

    def chunks(self, segments: Sequence[Segment], execution: str) -> list[Chunk]:
        """Cut some segments into the calls of the rule."""
        if segments is not self.whole:
            asked = (execution, tuple(segments))
            if self._part_chunks[0] != asked:
                self._part_chunks = (asked, list(cut(self, segments, execution)))
            return self._part_chunks[1]
        if execution not in self._whole_chunks:
            self._whole_chunks[execution] = list(cut(self, segments, execution))
        return self._whole_chunks[execution]

    @property
    def apart(self) -> bool:
        """Whether what is stored is not what is computed with."""
        return self.rounded or self.ferry is not None

    def _stored(self, chunk: Chunk) -> dict[str, list[tuple[Tensor, ...]]]:
        """The pieces of the stacks that a chunk covers, by the names of parts."""
        return {
            name: self.packing.pieces(chunk.grids, name, stack)
            if name in self.packing.scales
            else [(stack[a:b],) for a, b in chunk.runs]
            for name, stack in self.state._asdict().items()
            if stack is not None
        }

    def fetched(self, chunks: Sequence[Chunk]) -> Iterator[Chunk]:
        """Chunks, while the state of the next one is on its way to the device."""
        if self.ferry is None:
            yield from chunks
            return
        self._first = chunks[0] if chunks else None
        for chunk, following in looking_ahead(chunks):
            for some in (chunk, following):
                if some is not None and id(some) not in self._coming:
                    self._fetch(some)
            yield chunk

    def _fetch(self, chunk: Chunk) -> None:
        assert self.ferry is not None
        self._coming[id(chunk)] = chunk, self.ferry.fetch(self._stored(chunk))

    def release(self) -> None:
        """With what has been fetched and was not needed."""
        super().release()
        self._coming.clear()

    def fetch_first(self) -> None:
        """Begin to bring what the next step needs first, if it is as in the last one."""
        self._coming.clear()
        if self.ferry is not None and self._first is not None:
            self._fetch(self._first)

    def _brought(self, chunk: Chunk) -> PiecesT:
        """What is stored of a chunk, where steps compute."""
        if self.ferry is None:
            return self._stored(chunk)
        if id(chunk) not in self._coming:
            self._fetch(chunk)
        return self.ferry.land(self._coming.pop(id(chunk))[1])

    def read(self, chunk: Chunk) -> Any:
        """The chunk's state: views of the stacks where its items are adjacent, else copies."""
        if chunk.views is not None:
            return chunk.views
        parts = {name: self._wide_part(name, pieces) for name, pieces in self._brought(chunk).items()}
        return type(self.state)(*map(parts.get, self.state._fields))

    def _wide_part(self, name: str, pieces: Sequence[tuple[Tensor, ...]]) -> Tensor:
        """What is computed with, of stored pieces."""
        packed = name in self.packing.scales
        wide = self.packing.wide(pieces) if packed else [x.to(self.dtype) for (x,) in pieces]
        return wide[0] if len(wide) == 1 else torch.cat(wide)

    def read_lists(self, chunk: Chunk) -> tuple[Any, list[Write]]:
        """The chunk's state as a kernel takes it, which writes into it, and what then stores it."""
        if not self.apart:
            return chunk.parts, []
        wide: dict[str, Tensor] = {}
        lists: dict[str, list[Tensor]] = chunk.parts._asdict()
        for name, stored in self._brought(chunk).items():
            if self.ferry is not None or getattr(self.state, name).dtype != self.dtype:
                wide[name] = self._wide_part(name, stored)
                pieces = torch.split(wide[name], [*map(Tensor.numel, lists[name])])
                lists[name] = [x.view(part.shape) for x, part in zip(pieces, lists[name], strict=True)]
        new = type(self.state)(*map(wide.get, self.state._fields))
        return type(self.state)(**lists), [partial(self.write, chunk, new)]

    def as_kept(self, state: Any) -> Any:
        """A chunk's new state as `read` will find it once it is written."""
        if not self.rounded:
            return state

        def part(name: str, x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            if name in self.packing.scales:
                return dequantise(*quantise(x))
            return x.to(getattr(self.state, name).dtype).to(self.dtype)

        return type(state)(*(part(name, x) for name, x in state._asdict().items()))

    def write(self, chunk: Chunk, state: Any) -> None:
        """Copy a chunk's new state into the stacks, in place; what is None stays."""
        views = chunk.views or [None] * len(state)
        kept = {name for name, new, view in zip(state._fields, state, views, strict=True) if new is view}
        pairs = [
            pair
            for name, pieces in self._stored(chunk).items()
            if name not in kept
            for pair in self._new_pieces(name, pieces, getattr(state, name))
        ]
        if self.ferry is not None:
            self.ferry.send(pairs)
            return
        for target, piece in pairs:
            if not _is_same(piece, target):
                target.copy_(piece)

    def _new_pieces(
        self, name: str, pieces: Sequence[tuple[Tensor, ...]], new: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Stored pieces of a part, each with what it is to be."""
        row = 0
        for piece in pieces:
            count = piece[0].numel() if not self.item else len(piece[0])
            value = new[row : row + count]
            row += count
            if name in self.packing.scales:
                yield from zip(piece, quantise(value.reshape(piece[0].shape)), strict=True)
            else:
                yield piece[0], value

    def stack(self, chunk: Chunk, tensors: Mapping[int, Tensor | None]) -> Tensor:
        """Tensors shaped like the parameters, by their row, as one stack in the state's dtype; none: zeros."""
        if chunk.gathers:
            whole = [x for i in chunk.rows if (x := tensors.get(i)) is not None]
            if len(whole) == len(chunk):
                flat: Tensor = _flatten_dense_tensors(whole)  # type: ignore[no-untyped-call]  # untyped in torch
                return flat.view(-1, *self.item).to(self.dtype)
        pieces = []
        for i, start, stop in chunk:
            x = tensors.get(i)
            if x is None:
                pieces.append(torch.zeros((stop - start, *self.item), dtype=self.dtype, device=self.device))
            else:
                pieces.append(self.blocks[i].stack(x)[start:stop].to(self.dtype))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def targets(self, chunk: Chunk, stack: Tensor, members: Container[int]) -> tuple[list[Tensor], list[Tensor]]:
        """The parts of the parameters that a chunk covers, and the parts of `stack` that belong to them.

        Segments of parameters that are not in `members` are left out.
        """
        if chunk.gathers and all(i in members for i in chunk.rows):
            parts = [self.parameters[i] for i in chunk.rows]
            if self.on_host and stack.numel() < len(parts) * OUTBOX_PIECE:
                return parts, self.outbox(chunk, stack, parts)
            return parts, list(_unflatten_dense_tensors(stack.reshape(-1), parts))  # type: ignore[no-untyped-call]  # as above
        parts = []
        values: list[Tensor] = []
        row = 0
        for i, start, stop in chunk:
            p, piece = self.parameters[i], stack[row : row + stop - start]
            row += stop - start
            if i not in members:
                continue
            block = self.blocks[i].of(p)
            if stop - start == self.items(i):
                parts.append(block)
                values.append(piece.reshape(block.shape))
            elif block.ndim == 4 and not self.blocks[i].joined:  # parts of each matrix of a batch: not always one view
                parts += [block[divmod(k, block.size(1))] for k in range(start, stop)]
                values += piece
            else:
                parts.append((block if self.item else block.view(-1))[start:stop])
                values.append(piece.reshape(parts[-1].shape))
        return parts, values

    def pieces(self, chunk: Chunk, tensors: Mapping[int, Tensor] | Sequence[Tensor]) -> list[Tensor]:
        """A chunk's parts of contiguous tensors shaped like their parameters: all of one, or elements in a row."""
        if chunk.is_whole:
            return [tensors[i] for i in chunk.rows]
        return [
            tensors[i] if stop - start == self.items(i) else tensors[i].view(-1)[start:stop] for i, start, stop in chunk
        ]

    def outbox(self, chunk: Chunk, stack: Tensor, parts: list[Tensor]) -> list[Tensor]:
        """A copy of `stack` in pieces shaped like `parts`, for small ones, of which new views cost more."""
        count = stack.numel()
        if self._outbox.numel() < count:
            self._outbox = torch.empty(count, dtype=self.dtype, device=self.device)
        flat = self._outbox[:count]
        if chunk.places[0] is not self._outbox:
            pieces = _unflatten_dense_tensors(flat, parts)  # type: ignore[no-untyped-call]  # as above
            chunk.places = (self._outbox, list(pieces))
        flat.copy_(stack.reshape(-1))
        return chunk.places[1]

    def by_unit(self, chunk: Chunk, stack: Tensor) -> list[Tensor]:
        """A stack over a chunk as stacks whose first axis runs over units; no segment may cut a parameter."""
        if self.item:
            return [stack]
        return [piece[None] for piece in torch.split(stack, [stop - start for _, start, stop in chunk])]

    def map_units(self, chunk: Chunk, function: Callable[..., Tensor], *stacks: Tensor) -> Tensor:
        """A function of stacks whose first axis runs over units, on stacks over a chunk."""
        pieces = zip(*(self.by_unit(chunk, x) for x in stacks), strict=True)
        found = [function(*some).reshape(-1, *self.item) for some in pieces]
        return found[0] if len(found) == 1 else torch.cat(found)

    def wide(self, parts: list[Tensor]) -> list[Tensor]:
        """Parts of parameters or gradients in the dtype of the computation; themselves where that is theirs."""
        return as_dtype(parts, self.dtype)

    def spread(self, chunk: Chunk, stack: Tensor) -> Tensor:
        """A stack over units as it broadcasts against a chunk: (B, 1, 1), or (K,), or 0-D for one vector."""
        if self.item:
            return torch.cat([stack[a:b] for a, b in chunk.runs]).view(-1, *(1 for _ in self.item))
        if len(chunk) == 1:
            return stack[chunk[0].row]
        # With its size known, the result is allocated without waiting for the device.
        total = sum(stop - start for _, start, stop in chunk)
        return stack[chunk.row_indices].repeat_interleave(chunk.lengths, output_size=total)


def as_dtype(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Tensors in a dtype; themselves where that is theirs."""
    return tensors if set(map(_DTYPE, tensors)) == {dtype} else [x.to(dtype) for x in tensors]


def _stretches(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as half-open ranges."""
    start = 0
    for k in range(1, len(indices) + 1):
        if k == len(indices) or indices[k] != indices[k - 1] + 1:
            yield indices[start], indices[k - 1] + 1
            start = k


def _is_same(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors of one shape begin at the same number; by their storages, which a tensor without data has."""
    storages = [z.untyped_storage()._cdata for z in (x, y)]
    return bool(x.storage_offset() == y.storage_offset() and storages[0] == storages[1])
