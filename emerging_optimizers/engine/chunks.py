"""What one call of a rule works on.

A chunk is a list of segments, each a run of items of one row of a bucket: many small matrices in one call, one expert
stack in several, or cache-sized pieces of a vector.
"""

from collections.abc import Iterable, Iterator
from functools import cached_property
from math import prod
from typing import Any, NamedTuple
from weakref import proxy

import torch
from torch import Tensor

from emerging_optimizers.distributed.shares import CutMatrix
from emerging_optimizers.engine.packing import Grid
from emerging_optimizers.linalg.eight_bits import BLOCK

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
# How many ELEMENT_CHUNK they are given at least where state is widened for them: each chunk then costs 100 us of calls
# on codes and scales. (AdamW in 8 bits takes 0.83 x as long, in bfloat16 0.86 x; a larger chunk gains nothing.)
WIDENED = 4
# From how many elements on a view of a piece costs less than copying it to where there is one (3 us, CPU).
OUTBOX_PIECE = 8 * 2**10


class Segment(NamedTuple):
    """Items start to stop of one row of a bucket."""

    row: int
    start: int
    stop: int


class Chunk(list[Segment]):
    """Segments of a bucket, and what is known of them once and for all; not modified after it was made."""

    def __init__(self, bucket: Any, segments: Iterable[Segment]) -> None:
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
        if len(self.runs) > 1 or self._bucket.apart:
            return None
        ((a, b),) = self.runs
        state = self._bucket.state
        return type(state)(*(None if stack is None else stack[a:b] for stack in state))

    @cached_property
    def grids(self) -> list[Grid]:
        """How it is cut into blocks of 8 bits."""
        grids: list[Grid] = self._bucket.packing.grids(self)
        return grids

    @cached_property
    def in_blocks(self) -> tuple[Any, list[Tensor | None]] | None:
        """The state and the scales of its codes, flat, as views of the stacks; None where they are not whole blocks."""
        bucket = self._bucket
        if bucket.ferry is not None or not bucket.packing.scales or [grid.width for grid in self.grids] != [BLOCK]:
            return None
        (grid,) = self.grids
        state = type(bucket.state)(*(stack[grid.items] for stack in bucket.state))
        scales = [bucket.packing.scales.get(name) for name in state._fields]
        return state, [None if x is None else x[grid.scales] for x in scales]

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


def cut(bucket: Any, segments: Iterable[Segment], execution: str) -> Iterator[Chunk]:
    """Some segments of a bucket in the calls of its rule."""
    if execution == "compiled":  # one call
        yield Chunk(bucket, segments)
        return
    if execution == "per_matrix":
        for i, start, stop in segments:
            step = 1 if bucket.item else stop - start
            yield from (Chunk(bucket, [Segment(i, k, k + step)]) for k in range(start, stop, step))
        return
    cap = _cap(bucket, execution)
    chunk: list[Segment] = []
    room = cap
    for i, start, end in segments:
        # A vector whose memory is not in its own order can only be written whole.
        whole = execution == "elements" or not (bucket.item or bucket.parameters[i].is_contiguous())
        piece = end - start if whole else bucket.packing.piece(i, cap) if bucket.packing.scales else cap
        while start < end:
            stop = min(end, start + piece)
            # Half a chunk of elements is one by itself: a view costs less than gathering and scattering.
            alone = not bucket.item and execution != "fused" and 2 * (stop - start) >= cap
            if chunk and (alone or stop - start > room):
                yield Chunk(bucket, chunk)
                chunk, room = [], cap
            chunk.append(Segment(i, start, stop))
            room = 0 if alone else room - (stop - start)
            start = stop
    if chunk:
        yield Chunk(bucket, chunk)


def _cap(bucket: Any, execution: str) -> int:
    """How many items one call takes."""
    numbers = sum(x[:1].numel() for x in bucket.state if x is not None)
    size = max(numbers, torch.Size(bucket.item).numel()) * bucket.dtype.itemsize
    cap = max(1, CHUNK_BYTES // size)
    if isinstance(bucket.shares[0], CutMatrix):  # the same on every process, whatever it has of a matrix
        share = bucket.shares[0]
        return max(1, CHUNK_BYTES * len(share.peers.ranks) // (prod(share.shape) * bucket.dtype.itemsize))
    if not bucket.on_host:
        return cap
    threads = torch.get_num_threads()
    if bucket.item:
        return min(cap, threads * max(1, CPU_CHUNK_BYTES // size))
    if execution != "fused":
        return threads * ELEMENT_CHUNK
    return max(threads, WIDENED) * ELEMENT_CHUNK if bucket.apart else FUSED_CHUNK


def keep_pages() -> None:
    """Have the C library keep what is freed on a CPU, up to 64 MiB, instead of faulting on new pages at every chunk.

    glibc gives blocks back that are longer than the longest which it has seen freed, and memory beyond twice that. A
    block that nobody touches teaches it: 400 small matrices then fault some hundred times in a step of Muon, not 24,000
    times, each of which is a microsecond or two. Of settings in the environment and of other libraries nothing changes.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")  # of 32 MiB on, glibc learns nothing
