"""Blocks of parameters of one item shape, dtype and device, with their state in stacks.

A stack's first axis runs over items: matrices (M, N) for a matrix rule, single elements for an element-wise rule.
Row i is a block of a parameter, nearly always all of it, and owns the items offsets[i] to offsets[i + 1]. A chunk is
what one call of the rule works on: a list of segments, each a run of items of one row. That is all the difference
between many small matrices in one call, one expert stack in several, and cache-sized pieces of a vector.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence, Set
from functools import cached_property, partial
from math import prod
from operator import attrgetter
from typing import Any, NamedTuple
from weakref import proxy

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors  # one call for many tensors, as DDP has it

from emerging_optimizers.engine.commit import Write, commit
from emerging_optimizers.engine.matrix_view import Block, blocks
from emerging_optimizers.engine.parts import rounded_parts
from emerging_optimizers.engine.rule import Rule
from emerging_optimizers.engine.transit import Transit
from emerging_optimizers.engine.validate import label

# Bytes of state in one call of a matrix rule, or of gradient where there is less state: they bound its temporaries.
# With 1 MiB calls begin to count on a CPU (Muon takes 1.11 times as long on 256 x 256, 1.17 times on 192 x 512; SOAP
# 1.07 times), and 8 MiB gain nothing. That is for each thread, as threads share a stack's products out by matrices:
# each has at least one matrix where CHUNK_BYTES allow it. Accelerators, not measured yet, fill up later.
CPU_CHUNK_BYTES = 4 * 2**20
CHUNK_BYTES = 64 * 2**20
# Elements in one call of an element-wise rule, for each thread of a CPU: its temporaries stay in the cache. (64 K to
# 512 K take equally long; with 32 K calls begin to count, 1.2.)
ELEMENT_CHUNK = 128 * 2**10
# The same for torch's kernels, which make at most one temporary: each list that they are given costs 100 us.
FUSED_CHUNK = 8 * ELEMENT_CHUNK
# From how many elements on a view of a piece costs less than copying it to where there is one (3 us, CPU).
OUTBOX_PIECE = 8 * 2**10

# After how many skipped steps in a row a user is told.
LONG_STREAK = 100

_KIND, _SHAPE = attrgetter("dtype", "device"), attrgetter("shape")


class Segment(NamedTuple):
    """Items start to stop of one row of a bucket."""

    row: int
    start: int
    stop: int


class Chunk(list[Segment]):
    """Segments of a bucket, and what is known of them once and for all; not modified after it was made."""

    def __init__(self, bucket: "Bucket", segments: Iterable[Segment]) -> None:
        super().__init__(segments)
        self.places: tuple[Tensor | None, list[Tensor]] = (None, [])  # see `Bucket.outbox`
        self._bucket = proxy(bucket)  # no cycle: a bucket's stacks are large, and are to go when it goes

    @cached_property
    def rows(self) -> list[int]:
        """The row of each segment."""
        return [segment.row for segment in self]

    @cached_property
    def row_indices(self) -> Tensor:
        """`rows` on the device; made once, as a copy from the host is no part of a CUDA graph."""
        return torch.tensor(self.rows, device=self._bucket.device)

    @cached_property
    def lengths(self) -> Tensor:
        """How many items each segment has, on the device."""
        return torch.tensor([stop - start for _, start, stop in self], device=self._bucket.device)

    @cached_property
    def is_whole(self) -> bool:
        """Whether every row that is here is here as a whole."""
        return all(b - a == self._bucket.items(i) for i, a, b in self)

    @cached_property
    def gathers(self) -> bool:
        """Whether these are whole parameters as they are, several of them: one call moves them all."""
        plain = (self._bucket.blocks[i].window is None and not self._bucket.blocks[i].joined for i in self.rows)
        return len(self) > 1 and all(plain) and self.is_whole

    @cached_property
    def opens(self) -> list[int]:
        """Rows of which only the first part is here."""
        return [i for i, start, stop in self if not start and stop < self._bucket.items(i)]

    @cached_property
    def has_wholes(self) -> bool:
        """Whether some rows are here as a whole."""
        return any(stop - start == self._bucket.items(i) for i, start, stop in self)

    @cached_property
    def views(self) -> Any:
        """The state where the items are adjacent and in the dtype of the computation: views of the stacks."""
        if len(self.runs) > 1 or self._bucket.rounded:
            return None
        ((a, b),) = self.runs
        state = self._bucket.state
        return type(state)(*(None if stack is None else stack[a:b] for stack in state))

    @cached_property
    def parts(self) -> Any:
        """The state of each segment, shaped as `targets` has them: a `NamedTuple` of lists of views."""
        bucket = self._bucket
        first = [bucket.offsets[i] + start for i, start, _ in self]
        shapes = [
            bucket.parameters[i].shape if stop - start == bucket.items(i) else (stop - start,)
            for i, start, stop in self
        ]
        return type(bucket.state)(
            *(
                [stack[a : a + prod(shape)].view(shape) for a, shape in zip(first, shapes, strict=True)]
                for stack in bucket.state
            )
        )

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """The items as runs of the stack, adjacent ones merged."""
        runs: list[tuple[int, int]] = []
        for i, start, stop in self:
            first, last = self._bucket.offsets[i] + start, self._bucket.offsets[i] + stop
            if runs and runs[-1][1] == first:
                runs[-1] = (runs[-1][0], last)
            else:
                runs.append((first, last))
        return runs


def keep_pages() -> None:
    """Have the C library keep what is freed on a CPU, up to 64 MiB, instead of faulting on new pages at every chunk.

    glibc gives blocks back that are longer than the longest which it has seen freed, and memory beyond twice that. A
    block that nobody touches teaches it: 400 small matrices then fault some hundred times in a step of Muon, not 24,000
    times, each of which is a microsecond or two. Of settings in the environment and of other libraries nothing changes.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")  # of 32 MiB on, glibc learns nothing


def state_dtype(p: Tensor) -> torch.dtype:
    """float64 for float64 parameters, else float32."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


class Bucket:
    """The parameters, a row each, their stacks, and the ways in and out of them.

    A parameter that is cut into several blocks of the same shape has a row for each.
    """

    def __init__(self, rows: Sequence[tuple[Tensor, Block]], rule: Rule, rounded: torch.dtype | None = None) -> None:
        """`rounded` is the dtype in which the parts are kept that a rule `rounds`; None: that of the others."""
        self.parameters = parameters = [p for p, _ in rows]
        self.blocks = [block for _, block in rows]
        self.item = item = self.blocks[0].item
        self.dtype = state_dtype(parameters[0])
        self.device = parameters[0].device
        self.param_dtype = parameters[0].dtype
        self.shapes = [p.shape for p in parameters]
        size = max(1, torch.Size(item).numel())
        self.offsets = [0]
        for p, block in rows:
            self.offsets.append(self.offsets[-1] + block.of(p).numel() // size)
        self.state = rule.init((self.offsets[-1], *item), self.dtype, self.device)
        rounds = rounded_parts(self.state)
        self.rounded = bool(rounds) and rounded is not None
        if self.rounded:
            self.state = self.state._replace(**{name: getattr(self.state, name).to(rounded) for name in rounds})
        self.kind = self.kind_of(rule)
        self.counts = [0] * len(parameters)
        # When each row's turn comes, for a rule with a period.
        self.turns = [0] * len(parameters)
        self.whole = Chunk(self, (Segment(i, 0, self.items(i)) for i in range(len(parameters))))
        self._whole_chunks: dict[str, list[Chunk]] = {}
        # What was asked for last, which is mostly what is asked for next, with tensors on the device.
        self._part_chunks: tuple[Any, list[Chunk]] = (None, [])
        self._units_of: tuple[Any, Tensor | None] = (None, None)
        self._outbox = torch.empty(0, dtype=self.dtype, device=self.device)
        self.capturable = False
        # What is counted and guarded by itself: a matrix, or a parameter of an element-wise rule.
        self.units = self.offsets[-1] if item else len(parameters)
        self.step = torch.zeros(self.units if "step" in rule.reads else 0, dtype=torch.float32, device=self.device)
        self.step_version = self.step._version  # another one: somebody has written the counts
        self.guard: dict[str, Tensor] = {}
        self._mail: Transit | None = None
        # How often each unit was scaled down and skipped, and how often it was skipped in a row.
        self.scaled, self.skipped, self.streak = torch.zeros(3, self.units, dtype=torch.int64, device=self.device)
        self._skips_in_a_row = False  # for all that the host knows
        self._told: set[int] = set()
        self._streak_mail: Transit | None = None
        self._steps = 0
        self.unmoved: Transit | None = None  # see `engine/rounding.py`
        # Which stacks are shaped like the gradient, for any gradient: a square matrix's factors are so by accident.
        shape = (1, 2, 3)[: 1 + len(item)]
        probe = rule.init(shape, self.dtype, torch.device("meta"))._asdict()
        like_grad = {name for name, x in probe.items() if x is not None and x.shape == shape}
        self.published: list[dict[str, Tensor]] = [self._views(i, like_grad) for i in range(len(parameters))]

    def _views(self, i: int, like_grad: set[str]) -> dict[str, Tensor]:
        """The state of row i under its checkpoint keys, as views of the stacks."""
        p, block, first, last = self.parameters[i], self.blocks[i], self.offsets[i], self.offsets[i + 1]
        views: dict[str, Tensor] = {}
        if self.step.numel():
            views["step" + block.key] = self.unit_view(i, self.step)
        for name, stack in self.state._asdict().items():
            if stack is None:
                continue
            rows = stack[first:last]
            views[name + block.key] = (
                block.unstack(rows, p) if name in like_grad else rows if block.batched else rows[0]
            )
        return views

    def kind_of(self, rule: Rule) -> Any:
        """What makes a rule's state what it is, and its turns; as it compares."""
        parts = rule.init((1, *self.item), self.dtype, torch.device("meta"))._asdict()
        shapes = {name: None if x is None else x.shape for name, x in parts.items()}
        return type(rule), rule.elementwise, "step" in rule.reads, rule.schedule.period, shapes

    @property
    def on_host(self) -> bool:
        """Whether the numbers are in the host's memory."""
        return self.device.type == "cpu"

    @property
    def looks(self) -> bool:
        """Whether the host may look at a value: it waits for nothing, and no graph is to repeat the step without it."""
        return self.on_host and not self.capturable

    def unit_view(self, i: int, stack: Tensor) -> Tensor:
        """What a stack over units holds for row i: (b,) for a batch of b matrices, else 0-D."""
        if self.blocks[i].batched:
            return stack[self.offsets[i] : self.offsets[i + 1]]
        return stack[self.offsets[i] if self.item else i]

    def start_guard(self) -> None:
        """Allocate the running means of the spike guard, and publish them beside the rule's state."""
        if self.guard:
            return
        names = ("guard_norm", "guard_weight")
        self.guard = {name: torch.zeros(self.units, dtype=self.dtype, device=self.device) for name in names}
        for i, views in enumerate(self.published):
            views |= {name + self.blocks[i].key: self.unit_view(i, stack) for name, stack in self.guard.items()}

    @property
    def guard_stacks(self) -> dict[str, Tensor]:
        """What the guard keeps of each unit, by name."""
        return {**self.guard, "scaled": self.scaled, "skipped": self.skipped, "streak": self.streak}

    def fits(self) -> bool:
        """Whether every parameter still is what its stacks were made for."""
        kinds = set(map(_KIND, self.parameters))
        return kinds == {(self.param_dtype, self.device)} and list(map(_SHAPE, self.parameters)) == self.shapes

    # ---- choosing what a call works on --------------------------------------------------------------------------

    def turns_of(self, i: int, period: int) -> Iterator[tuple[Segment, int]]:
        """Row i in runs of items that share a turn of the period; a batch of matrices takes all turns."""
        items = self.items(i)
        runs = min(period, items)
        for k in range(runs):
            turn = (self.turns[i] + k * period // runs) % period
            yield Segment(i, k * items // runs, (k + 1) * items // runs), turn

    def chunks(self, segments: Sequence[Segment], execution: str) -> list[Chunk]:
        """Cut some segments into the calls of the rule."""
        if segments is not self.whole:
            asked = (execution, tuple(segments))
            if self._part_chunks[0] != asked:
                self._part_chunks = (asked, list(self._chunks(segments, execution)))
            return self._part_chunks[1]
        if execution not in self._whole_chunks:
            self._whole_chunks[execution] = list(self._chunks(segments, execution))
        return self._whole_chunks[execution]

    def _chunks(self, segments: Iterable[Segment], execution: str) -> Iterator[Chunk]:
        if execution == "compiled":  # one call
            yield Chunk(self, segments)
            return
        if execution == "per_matrix":
            for i, start, stop in segments:
                step = 1 if self.item else stop - start
                yield from (Chunk(self, [Segment(i, k, k + step)]) for k in range(start, stop, step))
            return
        numbers = sum(x[:1].numel() for x in self.state if x is not None)
        size = max(numbers, torch.Size(self.item).numel()) * self.dtype.itemsize
        cap = max(1, CHUNK_BYTES // size)
        if self.on_host and self.item:
            cap = min(cap, torch.get_num_threads() * max(1, CPU_CHUNK_BYTES // size))
        elif self.on_host:
            cap = FUSED_CHUNK if execution == "fused" else torch.get_num_threads() * ELEMENT_CHUNK
        chunk: list[Segment] = []
        room = cap
        for i, start, end in segments:
            # A vector whose memory is not in its own order can only be written whole.
            whole = execution == "elements" or not (self.item or self.parameters[i].is_contiguous())
            piece = end - start if whole else cap
            while start < end:
                stop = min(end, start + piece)
                # Half a chunk of elements is one by itself: a view costs less than gathering and scattering.
                alone = not self.item and execution != "fused" and 2 * (stop - start) >= cap
                if chunk and (alone or stop - start > room):
                    yield Chunk(self, chunk)
                    chunk, room = [], cap
                chunk.append(Segment(i, start, stop))
                room = 0 if alone else room - (stop - start)
                start = stop
        if chunk:
            yield Chunk(self, chunk)

    def items(self, i: int) -> int:
        """How many items row i owns."""
        return self.offsets[i + 1] - self.offsets[i]

    # ---- in and out of stacks -----------------------------------------------------------------------------------

    def read(self, chunk: Chunk) -> Any:
        """The chunk's state: views of the stacks where its items are adjacent, else copies."""
        if chunk.views is not None:
            return chunk.views

        def part(stack: Tensor | None) -> Tensor | None:
            if stack is None:
                return None
            pieces = [stack[a:b].to(self.dtype) for a, b in chunk.runs]
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

        return type(self.state)(*map(part, self.state))

    def as_kept(self, state: Any) -> Any:
        """A chunk's new state as `read` will find it once it is written."""
        if not self.rounded:
            return state
        kept = zip(state, self.state, strict=True)
        return type(state)(*(x if x is None else x.to(stack.dtype).to(self.dtype) for x, stack in kept))

    def write(self, chunk: Chunk, state: Any) -> None:
        """Copy a chunk's new state into the stacks, in place."""
        views = chunk.views or [None] * len(state)
        for stack, new, view in zip(self.state, state, views, strict=True):
            if stack is None or new is view:
                continue
            row = 0
            for a, b in chunk.runs:
                piece = new[row : row + b - a]
                if not _is_same(piece, target := stack[a:b]):
                    target.copy_(piece)
                row += b - a

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

    def units_of(self, members: Sequence[int]) -> Tensor:
        """The indices of the units of some parameters."""
        asked, units = tuple(members), self._units_of[1]
        if units is None or self._units_of[0] != asked:
            ranges = [range(self.offsets[i], self.offsets[i + 1]) if self.item else range(i, i + 1) for i in members]
            units = torch.tensor([unit for indices in ranges for unit in indices], device=self.device)
            self._units_of = (asked, units)
        return units

    def by_unit(self, chunk: Chunk, stack: Tensor) -> list[Tensor]:
        """A stack over a chunk as stacks whose first axis runs over units; no segment may cut a parameter."""
        if self.item:
            return [stack]
        return [piece[None] for piece in torch.split(stack, [stop - start for _, start, stop in chunk])]

    def spread(self, chunk: Chunk, stack: Tensor) -> Tensor:
        """A stack over units as it broadcasts against a chunk: (B, 1, 1), or (K,), or 0-D for one vector."""
        if self.item:
            return torch.cat([stack[a:b] for a, b in chunk.runs]).view(-1, *(1 for _ in self.item))
        if len(chunk) == 1:
            return stack[chunk[0].row]
        # With its size known, the result is allocated without waiting for the device.
        total = sum(stop - start for _, start, stop in chunk)
        return stack[chunk.row_indices].repeat_interleave(chunk.lengths, output_size=total)

    # ---- counting and adopting ----------------------------------------------------------------------------------

    def count(
        self,
        members: Sequence[int],
        factor: Tensor | None,
        news: Mapping[str, Tensor],
        done: Sequence[Chunk] | None = None,
    ) -> None:
        """One more update of the parameters `members`, but not of the units whose factor is 0.

        Args:
            members: those with a gradient.
            factor: of each unit; None: 1.
            news: what the guard makes of its stacks.
            done: the chunks that have moved, where an exception has stopped the others; None: all have.
        """
        if done is not None:
            moved = self._moved(done)
            members = [i for i in members if bool(self.unit_view(i, moved).any())]
            stacks = self.guard_stacks
            news = {name: torch.where(moved, new, stacks[name]) for name, new in news.items()}
            factor = moved.to(self.dtype) if factor is None else factor * moved
        writes: list[Write] = [partial(self.guard_stacks[name].copy_, new) for name, new in news.items()]
        if factor is not None:
            live = factor > 0
            if self.looks:
                members = [i for i in members if self.unit_view(i, live).any()]
            if self.step.numel():
                writes.append(partial(self.step.add_, live))
        elif self.step.numel() and members:
            if len(members) == len(self.parameters):
                writes.append(partial(self.step.add_, 1))
            else:
                writes.append(partial(self.step.index_add_, 0, self.units_of(members), self._ones(members)))
        if self._skips_in_a_row and "streak" not in news:
            writes.append(partial(self.streak.index_fill_, 0, self.units_of(members), 0))
        counts = self.counts.copy()
        for i in members:
            counts[i] += 1
        commit([*writes, partial(self._take, counts, "streak" in news or self._skips_in_a_row)])

    def _take(self, counts: list[int], skips: bool) -> None:
        self.counts, self.step_version = counts, self.step._version
        self._skips_in_a_row = skips and (not self.looks or bool(self.streak.any()))

    def _ones(self, members: Sequence[int]) -> Tensor:
        return torch.ones(len(self.units_of(members)), dtype=self.step.dtype, device=self.device)

    def _moved(self, done: Iterable[Chunk]) -> Tensor:
        """Which units are in these chunks, a parameter that was cut only with its last piece."""
        moved = torch.zeros(self.units, dtype=torch.bool, device=self.device)
        for chunk in done:
            for i, start, stop in chunk:
                if self.item:
                    moved[self.offsets[i] + start : self.offsets[i] + stop] = True
                elif stop == self.items(i):
                    moved[i] = True
        return moved

    def follow_counts(self) -> None:
        """Take over step counts that somebody has written.

        Raises:
            ValueError: a count that is none.
        """
        if self.step._version == self.step_version:
            return
        for i, p in enumerate(self.parameters):
            self.counts[i] = _count_of(
                self.published[i]["step" + self.blocks[i].key], f"a parameter of shape {tuple(p.shape)}"
            )
        self.step_version = self.step._version

    def unmoved_share(self) -> float:
        """Which share of its weights a step has left where they were, where that was asked and is known by now."""
        if self.unmoved is None or not self.unmoved.ready:
            return 0.0
        share, self.unmoved = float(self.unmoved.read()), None
        return share

    def skipped_for_long(self) -> list[int]:
        """Rows with a unit that was skipped a hundred times in a row; each is told once."""
        if self.looks:
            streak = self.streak if self._skips_in_a_row else None
        else:  # an accelerator is asked every fiftieth time, and answers fifty steps later: nobody waits
            self._steps += 1
            if self._steps % 50:
                return []
            streak = None if self._streak_mail is None else self._streak_mail.read()
            self._streak_mail = Transit.send(self.streak.clone())
        if streak is None or int(streak.max()) < LONG_STREAK:
            return []
        rows = [i for i in range(len(self.parameters)) if int(self.unit_view(i, streak).max()) >= LONG_STREAK]
        rows = [i for i in rows if i not in self._told]
        self._told.update(rows)
        return rows

    def post(self, flags: Tensor) -> None:
        """Send (units,) flags to the host without waiting for the device."""
        self._mail = Transit.send(flags)

    def flagged(self) -> list[int]:
        """The parameters with a flag in what was posted last, in an earlier step, until they are forgotten."""
        if self._mail is None:
            return []
        flags = self._mail.read()
        return [i for i in range(len(self.parameters)) if self.unit_view(i, flags).any()] if flags.any() else []

    def forget_flags(self) -> None:
        """What was posted has been acted on."""
        self._mail = None

    def adopt(self, i: int, saved: Mapping[str, Any], name: str) -> None:
        """Copy a row's state from elsewhere, its parameter's, into the stacks, in the stacks' dtype.

        Entries under other keys are somebody else's.

        Raises:
            ValueError: a key is missing, a shape differs, or a value is none; nothing was copied.
        """
        views, end = self.published[i], self.blocks[i].key
        missing = views.keys() - saved.keys() - {key + end for key in self.guard}
        if missing:
            raise _misfit(name, missing, ())
        values = {key: self._fitting(key, saved[key], view, name) for key, view in views.items() if key in saved}
        count = _count_of(values["step" + end], name) if self.step.numel() else 0
        for key, value in values.items():  # the guard's may be missing: it was turned on since
            if value is not views[key]:
                views[key].copy_(value)
        self.counts[i] = count
        self.step_version = self.step._version

    def _fitting(self, key: str, value: Any, view: Tensor, name: str) -> Tensor:
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"the optimizer state {key!r} of {name} is {value!r}; a tensor of shape {tuple(view.shape)} is needed"
            ) from None
        if value.shape != view.shape:
            if key.startswith("step") and value.numel() == 1:  # one count for a batch of matrices
                return value.reshape(())
            raise ValueError(
                f"the optimizer state {key!r} of {name} has shape {tuple(value.shape)}; {tuple(view.shape)} is needed"
            )
        return value


def _misfit(name: str, missing: Iterable[str], unknown: Iterable[str]) -> ValueError:
    lines = (("missing", sorted(missing)), ("unknown", sorted(map(str, unknown))))
    return ValueError(
        f"the optimizer state of {name} does not fit: "
        + "; ".join(f"{word} {', '.join(keys)}" for word, keys in lines if keys)
        + ". It was written by another optimizer or with other options; delete the parameter's entry to start it anew"
    )


def _count_of(step: Tensor, name: str) -> int:
    """The largest of some step counts."""
    counts = step.detach().double().flatten()
    if not bool(((counts >= 0) & (counts == counts.round()) & counts.isfinite()).all()):
        raise ValueError(f"the optimizer state 'step' of {name} is {step.tolist()}; a whole number >= 0 is needed")
    return int(counts.max())


def _is_same(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors of one shape begin at the same number; by their storages, which a tensor without data has."""
    return x.storage_offset() == y.storage_offset() and x.untyped_storage()._cdata == y.untyped_storage()._cdata


def fill_buckets(
    members: list[tuple[int, Tensor]],
    group: Mapping[str, Any],
    rule: Rule,
    saved: Mapping[Tensor, Mapping[str, Any]],
    others: Set[str] | None = None,
) -> list[Bucket]:
    """Buckets for some parameters of a group, with the state that is saved for them.

    `others` are the only keys that a checkpoint may have beside the rule's; None: any, it is the live state.
    """
    keep_pages()
    kinds: dict[Any, list[tuple[int, Tensor, Block]]] = {}
    for i, p in members:
        for block in blocks(p, rule.elementwise, group["matrix_view"]):
            kinds.setdefault((block.item, p.dtype, p.device), []).append((i, p, block))
    turns = _turns(group, rule)
    buckets = []
    for rows in kinds.values():
        bucket = Bucket([(p, block) for _, p, block in rows], rule, group["state_dtype"])
        bucket.turns = [turns.get((i, block.key), 0) for i, _, block in rows]
        if group["spike_guard"] is not None or any(
            "guard_norm" + block.key in saved.get(p, {}) for _, p, block in rows
        ):
            bucket.start_guard()
        buckets.append(bucket)
    keys = keys_of(buckets)
    names = {p: label(group, i, p) for i, p in members}
    for p, state in saved.items():
        unknown = set() if others is None else state.keys() - keys[p] - others
        missing = {key for key in keys[p] - state.keys() if not key.startswith("guard_")}
        if unknown or (missing and (others is not None or keys[p] & state.keys())):
            raise _misfit(names[p], missing, unknown)
    for bucket in buckets:
        for row, p in enumerate(bucket.parameters):
            if bucket.published[row].keys() & saved.get(p, {}).keys():
                bucket.adopt(row, saved[p], names[p])
    return buckets


def keys_of(buckets: Iterable[Bucket]) -> dict[Tensor, set[str]]:
    """The keys of the state of each parameter in some buckets."""
    keys: dict[Tensor, set[str]] = {}
    for bucket in buckets:
        for p, views in zip(bucket.parameters, bucket.published, strict=True):
            keys.setdefault(p, set()).update(views)
    return keys


def _turns(group: Mapping[str, Any], rule: Rule) -> dict[tuple[int, str], int]:
    """When the turn of each block comes: blocks of one shape are spread evenly over the rule's period.

    A function of the group's parameters alone, so that it is the same after a checkpoint, and for those who join later.
    """
    if rule.schedule.period == 1:
        return {}
    by_shape: dict[tuple[int, ...], list[tuple[int, str]]] = {}
    for i, p in enumerate(group["params"]):
        for block in blocks(p, rule.elementwise, group["matrix_view"]) if p.numel() else ():
            by_shape.setdefault(block.item, []).append((i, block.key))
    everyone = [row for rows in by_shape.values() for row in rows]
    return {row: k % rule.schedule.period for k, row in enumerate(everyone)}
