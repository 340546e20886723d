"""Weights of a low precision that lose nothing: worked on in float32, and rounded when their bucket has taken its step.

Between steps there are the parameters as they are and, with `weight_rounding="compensated"`, the 16 bits that each
bfloat16 lacks to float32. While a bucket steps, its weights are float32 tensors, `Share.work`, and nobody in between
knows that they are not the parameters. What is worked on as a whole by its owner is put together from them, and lands
on them.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise, product
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from emerging_optimizers.distributed.dtensor import whole_of
from emerging_optimizers.distributed.plan import Box
from emerging_optimizers.distributed.shares import Owned, Share
from emerging_optimizers.engine.commit import Write
from emerging_optimizers.linalg.noise import hash_words_, words
from emerging_optimizers.linalg.rounding import join_bfloat16_, round_stochastically, split_bfloat16_

WeightRoundingT = Literal["nearest", "stochastic", "compensated"]
KEYS = ("weight_bits", "rounding_key")
LOW = (torch.bfloat16, torch.float16)
# How many weights are in float32 at a time, unless one parameter has more: on a CPU as many as the C library has memory
# at hand for, so that no page is new.
AT_A_TIME, AT_A_TIME_ON_CPU = 2**24, 2**20
# How many of them one call takes on a CPU, where its temporaries stay in the cache.
PIECE = 2**17


class Kept(ABC):
    """What is stored of some parameters of one low precision, and the same in float32.

    Args:
        shares: of the parameters.

    Attributes:
        wide: float32 tensors shaped like what is stored; from `release` to `open` they only have the shape.
        entries: what `state` has of each parameter beside the rule's.
        starts: the same before the first step.
        rounded_to: of which precision the weights are when they are wide.
        lies_as_stored: whether it lies on processes as the parameter does; otherwise each has the same.
    """

    entries: Sequence[Mapping[str, Tensor]]
    starts: Sequence[Mapping[str, Tensor]]
    lies_as_stored = False
    # What is needed beside the weights while they are wide.
    _spare: Any = None
    _spare_dtype: torch.dtype

    def __init__(self, shares: Sequence[Share]) -> None:
        self._shares = shares
        self._stored = [share.stored for share in shares]
        self._dtype, self._device = self._stored[0].dtype, self._stored[0].device
        self._sizes = [x.numel() for x in self._stored]
        self._count = sum(self._sizes)
        self._was = [(share.source, share.source.shape, self._dtype, share.source.device) for share in shares]
        self.rounded_to = self._dtype
        nothing = torch.zeros((), dtype=torch.float32, device=self._device)
        self._absent = [nothing.expand(x.shape) for x in self._stored]
        self._wide: Tensor | None = None
        for row, share in enumerate(shares):
            share.kept, share.row = self, row
            if share.elsewhere and not isinstance(share, Owned):
                share.work = share.work.float()
        self._show(self._absent)

    def _show(self, wide: list[Tensor]) -> None:
        """Have them worked on."""
        self.wide = wide
        for share in self._shares:
            if not (share.elsewhere or isinstance(share, Owned)):
                share.work = wide[share.row]

    def _shaped(self, flat: Tensor) -> list[Tensor]:
        """Numbers of all the parameters as tensors like what is stored."""
        return [part.view(x.shape) for part, x in zip(torch.split(flat, self._sizes), self._stored, strict=True)]

    def _pieces(self) -> list[slice]:
        """All the numbers, as one call takes them."""
        size = PIECE if self._device.type == "cpu" else AT_A_TIME
        return [slice(a, min(self._count, a + size)) for a in range(0, self._count, size)]

    def fits(self) -> bool:
        """Whether the parameters are still of that kind."""
        return all((p.shape, p.dtype, p.device) == tuple(kind) for p, *kind in self._was)

    def open(self) -> None:
        """Make the float32 weights."""
        if self._wide is None:
            wide = torch.empty(self._count, dtype=torch.float32, device=self._device)
            self._spare = torch.empty(self._count, dtype=self._spare_dtype, device=self._device)
            self._wide = wide
            self._show(self._shaped(wide))
        self._fill(self._wide)

    def release(self) -> None:
        """Give the memory of the float32 weights back."""
        if self._wide is not None:
            self._show(self._absent)
            self._wide = self._spare = None

    @abstractmethod
    def writes(self, shares: Sequence[Share]) -> list[Write]:
        """Store the weights, rounded; `shares` have taken a step. What has not moved stays as it is."""

    def advance(self, shares: Sequence[Share]) -> list[Write]:
        """What of that is written on every process, also where there is nothing of the weights."""
        return []

    @abstractmethod
    def _fill(self, wide: Tensor) -> None:
        """The weights in float32, as one after the other."""


class Compensated(Kept):
    """bfloat16 with "weight_bits" (int16, shaped like what is stored): float32, in two parts."""

    lies_as_stored = True

    def __init__(self, shares: Sequence[Share]) -> None:
        super().__init__(shares)
        self._spare_dtype, self.rounded_to = self._dtype, torch.float32
        self._strides = [torch.empty_like(x, device="meta").stride() for x in self._stored]
        self._bits = torch.zeros(self._count, dtype=torch.int16, device=self._device)
        self.entries = [{"weight_bits": bits} for bits in self._shaped(self._bits)]
        self.starts = [{"weight_bits": torch.zeros((), dtype=torch.int16, device="cpu")}] * len(shares)

    def _shaped(self, flat: Tensor) -> list[Tensor]:
        """Each in its parameter's own order of memory, as in float32: sums in another have other last bits."""
        parts = zip(torch.split(flat, self._sizes), self._stored, self._strides, strict=True)
        return [part.as_strided(x.shape, strides) for part, x, strides in parts]

    def _fill(self, wide: Tensor) -> None:
        torch._foreach_copy_(self._shaped(self._spare), self._stored)
        for i in self._pieces():
            join_bfloat16_(wide[i], self._spare[i], self._bits[i])

    def writes(self, shares: Sequence[Share]) -> list[Write]:
        """Both parts."""
        return [self._split, partial(torch._foreach_copy_, self._stored, self._shaped(self._spare))]

    def _split(self) -> None:
        assert self._wide is not None
        for i in self._pieces():
            split_bfloat16_(self._spare[i], self._bits[i], self._wide[i])


class Stochastic(Kept):
    """Weights rounded by noise that is a hash of "rounding_key" (0-D int64) and of the place in the parameter.

    The key grows by one with each step that has a gradient for its parameter, also if the guard skips it, so that the
    noise depends on nothing else.

    Args:
        shares: of the parameters.
        indices: of the parameters in their group, by which their keys start apart.
    """

    def __init__(self, shares: Sequence[Share], indices: Sequence[int]) -> None:
        super().__init__(shares)
        self._keys = torch.tensor(indices, dtype=torch.int64, device=self._device) << 32
        self._spare_dtype = torch.int32
        self.entries = [{"rounding_key": self._keys[row]} for row in range(len(shares))]
        self.starts = [{"rounding_key": key} for key in self._keys.clone()]
        runs = [(row, start, length) for row, share in enumerate(shares) for start, length in runs_of(share)]
        ends = [*accumulate(length for _, _, length in runs)]
        # Element q of all is element q + offset of its parameter.
        offsets = [_wrapped(start + length - end) for (_, start, length), end in zip(runs, ends, strict=True)]
        self._offsets = torch.tensor(offsets, dtype=torch.int32, device=self._device)
        self._rows = torch.tensor([row for row, _, _ in runs], dtype=torch.int64, device=self._device)
        self._cuts = [self._cut(piece, ends) for piece in self._pieces()]
        # Rows that were asked for last, and the same on the device.
        self._members: tuple[tuple[int, ...], Tensor] = ((), self._keys[:0])

    def _fill(self, wide: Tensor) -> None:
        torch._foreach_copy_(self.wide, self._stored)
        keys = hash_words_(hash_words_(words(self._keys)) + words(self._keys >> 32))
        bases = keys[self._rows] + self._offsets
        for piece, runs, lengths in self._cuts:
            noise, base = self._spare[piece], bases[runs] + _wrapped(piece.start)
            torch.arange(len(noise), out=noise)
            noise.add_(base if len(base) == 1 else base.repeat_interleave(lengths, output_size=len(noise)))
            hash_words_(noise).bitwise_and_(0xFFFF)

    def writes(self, shares: Sequence[Share]) -> list[Write]:
        """The weights, and the keys of those that have taken a step."""
        return [self._round, *self.advance(shares)]

    def advance(self, shares: Sequence[Share]) -> list[Write]:
        """The keys alone."""
        rows = tuple(sorted({share.row for share in shares if share.kept is self}))
        if self._members[0] != rows:  # made once: a CUDA graph copies nothing from the host
            self._members = rows, torch.tensor(rows, dtype=torch.int64, device=self._device)
        return [partial(self._keys.index_add_, 0, self._members[1], torch.ones_like(self._members[1]))]

    def _cut(self, piece: slice, ends: Sequence[int]) -> tuple[slice, slice, Tensor]:
        """A piece of all elements, the runs that it is in, and how many elements of each."""
        runs = slice(bisect_right(ends, piece.start), bisect_left(ends, piece.stop) + 1)
        inside = [min(end, piece.stop) for end in ends[runs]]
        lengths = [end - before for before, end in pairwise([piece.start, *inside])]
        return piece, runs, torch.tensor(lengths, dtype=torch.int64, device=self._device)

    def _round(self) -> None:
        assert self._wide is not None
        rounded = round_stochastically(self._wide, self._spare, self._dtype)
        torch._foreach_copy_(self._stored, self._shaped(rounded))


def _wrapped(x: int) -> int:
    """As int32 has it."""
    return (x + 2**31) % 2**32 - 2**31


def runs_of(share: Share) -> list[tuple[int, int]]:
    """Of what is stored, in its order: where runs of elements begin in the whole parameter, and how long they are."""
    found = sorted(run for box in share.boxes() if box.numel for run in _runs_in(box, share.shape, share.stored.shape))
    return [(start, length) for _, start, length in found]


def _runs_in(box: Box, shape: Sequence[int], stored: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """The runs of a box: where each begins in what is stored and in the whole, and how long it is."""
    axis = max(0, len(shape) - 1)
    while axis and box.shape[axis] == shape[axis] == stored[axis]:
        axis -= 1
    length = prod(box.shape[axis:])
    for index in product(*map(range, box.shape[:axis])):
        at = [*index, *(0 for _ in shape[axis:])]
        place, start = (
            sum((i + first) * prod(sizes[k + 1 :]) for k, (i, first) in enumerate(zip(at, firsts, strict=True)))
            for sizes, firsts in ((stored, box.local), (shape, box.starts))
        )
        yield place, start, length


def keep(shares: Sequence[Share], indices: Sequence[int], kinds: Sequence[Any], rounding: WeightRoundingT) -> None:
    """Have parameters of a low precision worked on in float32, those of one kind together.

    Args:
        shares: of parameters of a group.
        indices: theirs in the group.
        kinds: what else has to be the same of those that are worked on together.
        rounding: of the group; "nearest" leaves everything as it is.
    """
    together: dict[Any, list[list[int]]] = {}
    for k, (share, kind) in enumerate(zip(shares, kinds, strict=True)):
        stored = share.stored
        if rounding == "nearest" or stored.dtype not in LOW:
            continue
        bundles = together.setdefault((kind, share.kind, stored.dtype, stored.device), [[]])
        most = AT_A_TIME_ON_CPU if stored.device.type == "cpu" else AT_A_TIME
        if bundles[-1] and stored.numel() + sum(shares[j].stored.numel() for j in bundles[-1]) > most:
            bundles.append([])
        bundles[-1].append(k)
    for members in (bundle for bundles in together.values() for bundle in bundles):
        some = [shares[k] for k in members]
        if rounding == "compensated":
            Compensated(some)
        else:
            Stochastic(some, [indices[k] for k in members])


def entries_of(share: Share) -> dict[str, Tensor]:
    """What `state` holds of a share beside the rule's."""
    if share.kept is None:
        return {}
    entries: Mapping[str, Tensor] = share.kept.entries[share.row]
    return {key: share.publish_stored(x) if share.kept.lies_as_stored else x for key, x in entries.items()}


def localized(share: Share, value: Tensor) -> Tensor:
    """What belongs here of an entry that is saved; the processes ask for the same at the same time."""
    return share.localize_stored(value) if share.kept.lies_as_stored else whole_of(value)


def kept_of(shares: Iterable[Share]) -> list[Kept]:
    """What is worked on in float32 of some shares."""
    return list({id(share.kept): share.kept for share in shares if share.kept is not None}.values())


@contextmanager
def opened(kept: Sequence[Kept]) -> Iterator[None]:
    """Float32 weights in `Share.here`, as long as the block runs."""
    try:
        for some in kept:
            some.open()
        yield
    finally:
        for some in kept:
            some.release()
