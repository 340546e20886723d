"""State in the host's memory (`offload="cpu"`), and its way to the device and back, beside the computation.

On CUDA stacks are pinned, and all copies go over one stream of their own, in the order in which they were asked for, so
what is stored is there before it is fetched again. Elsewhere everything is copied at once. Nothing but where memory
lies and when it is copied depends on this.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
# Of each part of a state, the stored pieces of a chunk: stacks, or codes and scales.
PiecesT = Mapping[str, Sequence[tuple[Tensor, ...]]]


class Coming(NamedTuple):
    """Pieces on their way to the device.

    Attributes:
        pieces: there.
        arrived: an event of the stream of copies; None: they are there.
    """

    pieces: PiecesT
    arrived: Any = None


class Ferry:
    """The copies between the host and a device, of all optimizers of a process.

    Args:
        device: where steps compute.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        self._busy = False
        if device.type == "cuda" and torch.cuda.is_available():  # tensors without data say "cuda" anywhere
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # untyped in torch

    def fetch(self, pieces: PiecesT) -> Coming:
        """Start to bring pieces to the device, behind everything that has been sent back."""
        if self._stream is None:
            copied = partial(torch.Tensor.to, device=self._device, copy=True)
            return Coming({name: [tuple(map(copied, some)) for some in part] for name, part in pieces.items()})
        self._busy = True
        with torch.cuda.stream(self._stream):
            there = {
                name: [tuple(x.to(self._device, non_blocking=True) for x in some) for some in part]
                for name, part in pieces.items()
            }
        return Coming(there, self._stream.record_event())

    def land(self, coming: Coming) -> PiecesT:
        """The pieces, for whatever is launched from here on; the host does not wait."""
        if coming.arrived is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(coming.arrived)
            for x in (x for part in coming.pieces.values() for some in part for x in some):
                x.record_stream(current)
        return coming.pieces

    def send(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Start to copy (target on the host, value on the device), once the values have been computed."""
        pairs = [(target, value.to(target.dtype)) for target, value in pairs]
        if self._stream is None:
            for target, value in pairs:
                target.copy_(value)
            return
        self._busy = True
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for target, value in pairs:
                target.copy_(value, non_blocking=True)
                value.record_stream(self._stream)

    def wait(self) -> None:
        """Make the host wait until what was sent is there."""
        if self._busy:
            self._stream.synchronize()
            self._busy = False


_FERRIES: dict[torch.device, Ferry] = {}


def ferry_of(device: torch.device) -> Ferry:
    """The ferry of a device."""
    if device not in _FERRIES:
        _FERRIES[device] = Ferry(device)
    return _FERRIES[device]


def wait_for_all() -> None:
    """Make the host wait until all state in its memory is that of the last step."""
    for ferry in _FERRIES.values():
        ferry.wait()


def pinned_for(stack: Tensor | None, device: torch.device) -> Tensor | None:
    """A stack in the host's memory; pinned, where copies to the device are to go beside the computation."""
    pins = stack is not None and device.type == "cuda" and torch.cuda.is_available()
    return stack.pin_memory() if pins and stack is not None else stack


def looking_ahead(items: Sequence[T]) -> Iterator[tuple[T, T | None]]:
    """Each item with the next one; behind the last one None."""
    return zip_longest(items, items[1:])


def fetched_ahead(buckets: Sequence[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """Buckets with their indices, while what the next one needs first is on its way to the device."""
    for _, bucket in buckets[:1]:
        bucket.fetch_first()
    for now, following in looking_ahead(buckets):
        if following is not None:
            following[1].fetch_first()
        yield now
