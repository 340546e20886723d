"""What a process works on of a parameter: all of it, the part that lies here, or a whole that it owns.

In one process a parameter is `Here`, and nothing moves. A sharded one (a DTensor) is `Local` where the part that lies
on this process can be worked on by itself: elements, or matrices none of which is cut. Otherwise it is `Owned`: one of
the processes that share it puts the whole together, works on it, and hands out what becomes of its parts. A batch of
matrices is spread over several owners. Where plain tensors are shards, it is an `OwnedShard`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emerging_optimizers.distributed.dtensor import (
    Spread,
    as_sharded,
    cut_out,
    is_sharded,
    local_of,
    on_owners,
    whole_of,
)
from emerging_optimizers.distributed.groups import Peers
from emerging_optimizers.distributed.owners import Span
from emerging_optimizers.distributed.plan import Box


@dataclass(frozen=True)
class Total:
    """A sum over the processes among which a unit is spread; `copies` of each hold the same."""

    peers: Peers
    copies: int

    def __call__(self, x: Tensor) -> Tensor:
        return self.peers.sum(x / self.copies)

    def count(self, x: Tensor) -> Tensor:
        """A sum of whole numbers, which is exact."""
        return self.peers.sum(x) // self.copies


class Share:
    """What the engine knows of a parameter's place.

    Attributes:
        source: the user's parameter.
        work: what is worked on, with its gradient in `grad`; of what is elsewhere a tensor without data.
        elsewhere: nothing of it is worked on here.
        indices: which entries of the parameter's first axis are worked on here, and of how many; None: all.
        total: see `Total`; None: a unit is not spread.
        counted: over which processes the guard's counts are summed up, when somebody asks; None: all know them.
        events: (2,) how often matrices were scaled down, and skipped, where owners say it; None: it is counted here.
        kind: shares of one kind may stand in one stack.
        stored: what lies here of the parameter, and its `shape` is that of all of it.
        kept: how what is stored is worked on in float32 (`engine/kept.py`), where that is asked for; `row`: its place
            there.
    """

    source: Tensor
    work: Tensor
    stored: Tensor
    shape: tuple[int, ...]
    elsewhere: bool = False
    indices: tuple[Sequence[int], int] | None = None
    total: Total | None = None
    counted: Total | None = None
    events: Tensor | None = None
    kind: Any = None
    kept: Any = None
    row: int = 0

    @property
    def grad(self) -> Tensor | None:
        """The gradient of what is worked on."""
        return self.work.grad

    @property
    def here(self) -> Tensor:
        """What lies here, in float32 where it is worked on in that; only while it is."""
        return self.stored if self.kept is None else self.kept.wide[self.row]

    def boxes(self) -> tuple[Box, ...]:
        """Which parts of the whole lie here."""
        return (Box((0,) * len(self.shape), self.shape, (0,) * len(self.shape)),)

    def fits(self) -> bool:
        """Whether the parameter still lies as it did."""
        return True

    def cuts_rows(self, length: int) -> bool:
        """Whether processes cut into stretches of `length` elements of an entry of the parameter's first axis."""
        return False

    def publish(self, view: Tensor, block: int = 1) -> Tensor:
        """What `state` holds of a view of a stack; of one with a number for each `block` elements of a row."""
        return view

    def localize(self, value: Tensor, view: Tensor, block: int = 1) -> Tensor:
        """What of a saved tensor belongs into a view of a stack; the processes ask for the same at the same time."""
        return whole_of(value)

    def publish_stored(self, local: Tensor) -> Tensor:
        """What `state` holds of a tensor that lies as the parameter does."""
        return local

    def localize_stored(self, value: Tensor) -> Tensor:
        """What of such a saved tensor belongs here."""
        return whole_of(value)


class Here(Share):
    """A parameter of one process: worked on where it is."""

    def __init__(self, p: Tensor) -> None:
        self.source = self.work = self.stored = p
        self.shape = tuple(p.shape)

    @property
    def grad(self) -> Tensor | None:
        """The parameter's own."""
        return self.source.grad


class Part(Share):
    """What a process has of a sharded parameter.

    Attributes:
        peers: the processes of its mesh.
    """

    def __init__(self, p: Any, spread: Spread, peers: Peers) -> None:
        self.source, self.peers, self._spread = p, peers, spread
        self.shape = spread.shape
        self.stored = local_of(p)

    def boxes(self) -> tuple[Box, ...]:
        """On this process."""
        return self._spread.boxes(self.peers.rank)

    def fits(self) -> bool:
        """Whether what is stored is what was there."""
        return local_of(self.source) is self.stored

    def publish_stored(self, local: Tensor) -> Tensor:
        """Sharded like the parameter."""
        return as_sharded(local, self.source, self.shape)

    def localize_stored(self, value: Tensor) -> Tensor:
        """Its own part of it."""
        if is_sharded(value, like=self.source):
            return local_of(value)
        value = whole_of(value)
        return cut_out(value, self.boxes(), self.stored) if value.shape == self.shape else value

    def _shape(self, view: Tensor) -> tuple[int, ...]:
        """Of the state of all entries of the first axis, of which a view has those that are worked on here."""
        if self.indices is None or not view.ndim:
            return tuple(view.shape)
        here, of = self.indices
        return view.shape[0] * of // len(here), *view.shape[1:]

    def _entries(self, value: Tensor, view: Tensor) -> Tensor:
        """Of such a state those that are worked on here; a value of another shape as it is."""
        if self.indices is None or not view.ndim or value.shape != self._shape(view):
            return value
        here, of = self.indices
        return value.view(of, value.shape[0] // of, *value.shape[1:])[list(here)].flatten(0, 1)


class Local(Part):
    """The part of a sharded parameter that lies here, worked on by itself.

    Args:
        p: the parameter.
        spread: how it lies.
        peers: the processes of its mesh.
        by_element: whether its elements are worked on by themselves; otherwise the entries of its first axis.
    """

    given: Tensor | None = None  # the part of the gradient that lies here, as long as a step takes

    def __init__(self, p: Tensor, spread: Spread, peers: Peers, by_element: bool) -> None:
        super().__init__(p, spread, peers)
        self._by_element = by_element
        self._boxes = self.boxes()
        # A rule is not asked to work on no matrix; elements are counted, since their norms are summed.
        self.elsewhere = not by_element and not self._boxes
        self.work = torch.empty(p.shape, dtype=p.dtype, device="meta") if self.elsewhere else self.stored.detach()
        cut = by_element and spread.is_cut
        self.total = Total(peers, spread.copies) if cut else None
        self.counted = Total(peers, spread.copies) if spread.is_cut and not by_element else None
        here = [k for box in self._boxes for k in range(box.starts[0], box.stops[0])] if p.ndim else []
        self.indices = (here, p.shape[0]) if spread.is_cut and not by_element and here else None
        self.kind = ("local", peers, spread.copies) if cut else ("local", self.elsewhere)

    def cuts_rows(self, length: int) -> bool:
        """As of any share; only of one that is worked on by elements."""
        cut = self._spread.cut_axes
        if cut <= {0} and len(self.shape) > 1:
            return False
        if len(self.shape) > 2:
            return True
        boxes = [box for rank in self._spread.ranks for box in self._spread.boxes(rank)]
        return any(box.starts[-1] % length or box.stops[-1] % length for box in boxes)

    @property
    def grad(self) -> Tensor | None:
        """What is given."""
        return self.given

    def publish(self, view: Tensor, block: int = 1) -> Tensor:
        """Sharded like the parameter."""
        if not view.ndim or not self._spread.is_cut:
            return view
        here = (
            torch.empty((0, *view.shape[1:]), dtype=view.dtype, device=self.stored.device) if self.elsewhere else view
        )
        return as_sharded(here, self.source, _in_blocks(self.shape, block) if self._by_element else self._shape(view))

    def localize(self, value: Tensor, view: Tensor, block: int = 1) -> Tensor:
        """Its own part of it."""
        there = is_sharded(value, like=self.source)
        value = local_of(value) if there else whole_of(value)
        if self.elsewhere or there:
            return view if self.elsewhere else value
        if self._by_element and view.ndim and self._spread.is_cut and value.shape == _in_blocks(self.shape, block):
            boxes = [Box(*(_in_blocks(x, block) for x in box)) for box in self._boxes]
            return cut_out(value, boxes, self.stored if block == 1 else view)
        return self._entries(value, view)


class CutMatrix(Local):
    """The part of a matrix that lies here, where a rule asks for some of its rows as wholes (`engine/rows.py`).

    Its state lies with it. What of that is not shaped like the matrix has a number, or some, for each row, and columns
    are not cut.

    Args:
        p: the parameter.
        spread: how it lies.
        peers: the processes of its mesh; each has a part.
        owner: who puts the rows together.
    """

    def __init__(self, p: Tensor, spread: Spread, peers: Peers, owner: int) -> None:
        super().__init__(p, spread, peers, by_element=True)
        self.spread, self.owner = spread, owner
        self.kind = ("rows", peers, spread.kind)  # one stack has the same parts of matrices on every process

    def _shape(self, view: Tensor) -> tuple[int, ...]:
        return self.shape if view.shape == self.stored.shape else (self.shape[0], *view.shape[1:])

    def publish(self, view: Tensor, block: int = 1) -> Tensor:
        """Sharded like the parameter."""
        return as_sharded(view, self.source, self._shape(view)) if view.ndim else view

    def localize(self, value: Tensor, view: Tensor, block: int = 1) -> Tensor:
        """Its own part of it."""
        if is_sharded(value, like=self.source):
            return local_of(value)
        value = whole_of(value)
        if not view.ndim or value.shape != self._shape(view):
            return value
        boxes: Sequence[Box] = self._boxes
        if value.shape != self.shape:  # of whole rows
            rows = [(box.starts[0], box.stops[0], box.local[0]) for box in boxes]
            boxes = [Box((start, 0), (stop, value.shape[1]), (local, 0)) for start, stop, local in rows]
        return cut_out(value, boxes, view)


class Route(NamedTuple):
    """A box that goes between a process that stores it and its owner: where it lies on both."""

    at_owner: tuple[slice, ...]
    in_storage: tuple[slice, ...]
    shape: tuple[int, ...]


class Owned(Part):
    """A sharded parameter that is worked on as a whole.

    Args:
        p: the parameter.
        spread: how it lies.
        peers: the processes of its mesh.
        spans: its owners, in the order of the entries that they own; one owner has all.
        weights: whether the owner needs the weights, and hands out new ones; otherwise it hands out a direction.
        wide: whether weights of a low precision are worked on in float32.
    """

    events: Tensor

    def __init__(
        self, p: Tensor, spread: Spread, peers: Peers, spans: Sequence[Span], weights: bool, wide: bool
    ) -> None:
        super().__init__(p, spread, peers)
        self.weights = weights
        self.spans = {span.rank: span for span in spans}
        self.is_batch = len(spans) > 1
        mine = self.spans.get(peers.rank)
        if mine is not None and mine.start == mine.stop:
            mine = None
        self.elsewhere = mine is None
        self.events = torch.zeros(2, dtype=torch.int64, device=self.stored.device)
        # The direction is handed out in the dtype in which it was computed.
        dtype = p.dtype if (weights and not wide) or p.dtype == torch.float64 else torch.float32
        shape = (mine.stop - mine.start, *self.shape[1:]) if mine is not None and self.is_batch else self.shape
        self.work = torch.zeros(shape, dtype=dtype, device="meta" if self.elsewhere else self.stored.device)
        self.work.grad_dtype = None
        self.indices = (range(mine.start, mine.stop), self.shape[0]) if self.is_batch and mine is not None else None
        # What travels apart does not stand in one stack, which would wait for both.
        self.kind = ("elsewhere" if self.elsewhere else "owned", peers, weights, p.dtype, self.shape)

    def owns(self, rank: int) -> bool:
        """Whether a process works on some of it."""
        span = self.spans.get(rank)
        return span is not None and span.start < span.stop

    def publish(self, view: Tensor, block: int = 1) -> Tensor:
        """A DTensor on the owners alone, of which other processes hold nothing."""
        return on_owners(view, self.stored.device, self.peers, tuple(self.spans), self._shape(view))

    def localize(self, value: Tensor, view: Tensor, block: int = 1) -> Tensor:
        """What this process owns of it."""
        there = is_sharded(value, like=self.publish(view))
        value = local_of(value) if there else whole_of(value)
        return view if self.elsewhere else value if there else self._entries(value, view)

    def routes(self, owner: int, storage: int) -> list[Route]:
        """What lies on a process and belongs to an owner."""
        span = self.spans.get(owner)
        if span is None:
            return []
        cut = (within(box, span) if self.is_batch else box for box in self._spread.boxes(storage))
        first = span.start if self.is_batch else 0
        return [_route(box, first) for box in cut if box is not None and box.numel]

    def is_near(self, owner: int, storage: int) -> bool:
        """Whether a process is the one that brings its part to the owner: the copy that is in the owner's replica."""
        return self._spread.copy_of(owner) == self._spread.copy_of(storage)


class OwnedShard(Owned):
    """A parameter of which every process has a shard that is a plain tensor; it has one owner."""

    def __init__(
        self, p: Tensor, spread: Spread, peers: Peers, spans: Sequence[Span], weights: bool, wide: bool
    ) -> None:
        super().__init__(p, spread, peers, spans, weights, wide)
        (self.owner,) = self.spans
        self._was = p.shape, p.dtype, p.device

    def fits(self) -> bool:
        """Whether the shard is what it was; in its place users may have put other numbers."""
        return (self.source.shape, self.source.dtype, self.source.device) == self._was

    def publish(self, view: Tensor, block: int = 1) -> Tensor:
        """The state of all of it on its owner, and tensors without elements elsewhere."""
        return torch.empty(0, dtype=view.dtype, device=self.stored.device) if self.elsewhere else view

    def localize(self, value: Tensor, view: Tensor, block: int = 1) -> Tensor:
        """It is what belongs here."""
        return view if self.elsewhere else value

    def publish_stored(self, local: Tensor) -> Tensor:
        """A shard, too."""
        return local

    def localize_stored(self, value: Tensor) -> Tensor:
        """A shard, too."""
        return value


def _in_blocks(shape: Sequence[int], block: int) -> tuple[int, ...]:
    """Of a shape or place in a parameter, with one number for each `block` elements of its rows."""
    if block == 1:
        return tuple(shape)
    *first, row = shape if len(shape) < 2 else (shape[0], prod(shape[1:]))
    return *first, -(-row // block)


def within(box: Box, span: Span) -> Box | None:
    """The part of a box that is in a span of the first axis."""
    start, stop = max(box.starts[0], span.start), min(box.stops[0], span.stop)
    if start >= stop:
        return None
    moved = start - box.starts[0]
    return Box((start, *box.starts[1:]), (stop, *box.stops[1:]), (box.local[0] + moved, *box.local[1:]))


def _route(box: Box, first: int) -> Route:
    starts = (box.starts[0] - first, *box.starts[1:])
    at_owner = tuple(slice(a, a + n) for a, n in zip(starts, box.shape, strict=True))
    return Route(at_owner, box.local_slices, box.shape)
