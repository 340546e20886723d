"""What travels in a step: gradients to the owners of whole matrices, and back what becomes of their parts.

One exchange each way moves everything of a shipment: the pieces for each process are packed behind each other.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from emerging_optimizers.distributed.dtensor import local_gradient
from emerging_optimizers.distributed.groups import Peers
from emerging_optimizers.distributed.shares import Owned, Route

# What an owner says where it could not work; what is added to it changes nothing.
FAILED = -torch.inf


class Arrival(NamedTuple):
    """What has come back for a parameter.

    Attributes:
        share: of it.
        part: of the direction, or of the new weight, shaped like what lies here.
        words: (2,) of each owner: how many of its matrices were scaled down, and how many stay where they are, which
            the guard has skipped; or `FAILED`.
    """

    share: Owned
    part: Tensor
    words: dict[int, Tensor]


class _Parcel(NamedTuple):
    """Pieces of a share that go from an owner to a process, or the other way."""

    share: Owned
    routes: list[Route]


class Shipment:
    """Shares of one kind that travel together; every process of `peers` makes the same one, with them in one order."""

    def __init__(self, peers: Peers, shares: Sequence[Owned]) -> None:
        self.peers, self.shares = peers, shares
        self.mine = [share for share in shares if not share.elsewhere]
        me = peers.rank
        self._to_owners = [self._parcels(shares, rank, me, near=True) for rank in peers.ranks]
        self._from_storage = [self._parcels(self.mine, me, rank, near=True) for rank in peers.ranks]
        self._to_storage = [self._parcels(self.mine, me, rank) for rank in peers.ranks]
        self._from_owners = [self._parcels(shares, rank, me) for rank in peers.ranks]
        self._words: dict[int, Tensor] = {}
        # What is known of a share stays known when others join the shipment, which is then another one.
        self._events = torch.stack([share.events for share in shares])
        for share, events in zip(shares, self._events, strict=True):
            share.events = events
        place = {id(share): k for k, share in enumerate(shares)}
        heard = [place[id(share)] for parcels in self._from_owners for share, _ in parcels]
        self._heard = torch.tensor(heard, dtype=torch.int64, device=self._events.device)

    @staticmethod
    def _parcels(shares: Iterable[Owned], owner: int, storage: int, near: bool = False) -> list[_Parcel]:
        """What goes between an owner and a process; with `near` only what is taken from that process."""
        owned = (share for share in shares if share.owns(owner))
        return [
            _Parcel(share, [] if near and not share.is_near(owner, storage) else share.routes(owner, storage))
            for share in owned
        ]

    # ---- to the owners ------------------------------------------------------------------------------------------

    def fetch(self) -> None:
        """Send gradients, and weights where they are read (`Share.here`), to their owners; does not wait."""
        gradients = {share.source: local_gradient(share.source) for share in self.shares}
        dtypes = {g.dtype for g in gradients.values() if g is not None}
        dtypes |= {share.work.dtype for share in self.shares if share.weights}
        dtype = _widest(dtypes or {self.shares[0].source.dtype})
        pieces: list[Tensor] = []
        sizes = []
        for parcels in self._to_owners:
            mine = [x for parcel in parcels for x in self._packed(parcel, gradients)]
            sizes.append(sum(x.numel() for x in mine))
            pieces += mine
        counts = [
            sum(_size(route) * (1 + parcel.share.weights) for parcel in parcels for route in parcel.routes)
            for parcels in self._from_storage
        ]
        self._begin(pieces, sizes, counts, dtype)

    @staticmethod
    def _packed(parcel: _Parcel, gradients: Mapping[Tensor, Tensor | None]) -> list[Tensor]:
        """Pieces of the gradient, zeros where there is none, and of the weight."""
        share, routes = parcel
        grad = gradients[share.source]
        found = [
            torch.zeros(_size(route), dtype=share.stored.dtype, device=share.stored.device)
            if grad is None
            else grad[route.in_storage].reshape(-1)
            for route in routes
        ]
        return found + [share.here[route.in_storage].reshape(-1) for route in routes if share.weights]

    def arrive(self) -> None:
        """Wait for what was sent to this process, and put gradients and weights together."""
        buffers = self._end()
        whole = {
            id(share): torch.empty(share.work.shape, dtype=self._received.dtype, device=self._received.device)
            for share in self.mine
            if share.source.grad is not None
        }
        for parcels, buffer in zip(self._from_storage, buffers, strict=True):
            start = 0
            for share, routes in parcels:
                targets = [whole.get(id(share))] + [share.work] * share.weights
                for target in targets:
                    for route in routes:
                        stop = start + _size(route)
                        if target is not None:
                            target[route.at_owner] = buffer[start:stop].view(route.shape)
                        start = stop
        for share in self.mine:
            share.work.grad = whole.get(id(share))

    # ---- back ---------------------------------------------------------------------------------------------------

    def say(self, share: Owned, word: Tensor) -> None:
        """What all are told of a share of this process, see `Arrival`; zeros, if nothing is said."""
        known = self._words.get(id(share))
        self._words[id(share)] = word if known is None else known + word

    def deliver(self) -> None:
        """Send directions or new weights back to where the parts lie; does not wait."""
        for share in self.mine:
            share.work.grad = None
        dtype = self.shares[0].work.dtype  # of all of them: a mark in a direction bears no cast
        device = self._received.device
        nothing = torch.zeros(2, dtype=dtype, device=device)
        pieces: list[Tensor] = []
        sizes = []
        for parcels in self._to_storage:
            mine = [self._words.get(id(share), nothing).to(dtype) for share, _ in parcels]
            mine += [share.work[route.at_owner].reshape(-1) for share, routes in parcels for route in routes]
            sizes.append(sum(x.numel() for x in mine))
            pieces += mine
        counts = [
            2 * len(parcels) + sum(_size(route) for _, routes in parcels for route in routes)
            for parcels in self._from_owners
        ]
        self._begin(pieces, sizes, counts, dtype)
        self._words.clear()

    def land(self) -> list[Arrival]:
        """Wait for what has come back."""
        buffers = self._end()
        parts: dict[int, Tensor] = {}
        words: dict[int, dict[int, Tensor]] = {id(share): {} for share in self.shares}
        said = [x[: 2 * len(parcels)].view(-1, 2) for x, parcels in zip(buffers, self._from_owners, strict=True)]
        # The owner goes by what it has said, too: in bfloat16 more than 256 matrices are no longer counted exactly.
        self._events.index_add_(0, self._heard, torch.cat(said).clamp(min=0).long())
        for rank, parcels, buffer, of_rank in zip(self.peers.ranks, self._from_owners, buffers, said, strict=True):
            start = 2 * len(parcels)
            for (share, routes), word in zip(parcels, of_rank, strict=True):
                words[id(share)][rank] = word
                for route in routes:
                    stop = start + _size(route)
                    piece = buffer[start:stop].view(route.shape)
                    start = stop
                    if route.shape == share.stored.shape:
                        parts[id(share)] = piece
                        continue
                    part = parts.get(id(share))
                    if part is None:
                        part = parts[id(share)] = piece.new_empty(share.stored.shape)
                    part[route.in_storage] = piece
        for (
            share
        ) in self.shares:  # nothing of some lies here; that has the dtype of the others, which are moved with it
            if id(share) not in parts:
                parts[id(share)] = buffers[0].new_empty(share.stored.shape)
        return [Arrival(share, parts[id(share)], words[id(share)]) for share in self.shares]

    # ---- the exchange -------------------------------------------------------------------------------------------

    def _begin(self, pieces: list[Tensor], sizes: list[int], counts: list[int], dtype: torch.dtype) -> None:
        device = self.shares[0].stored.device
        self._sent = torch.cat([x.to(dtype) for x in pieces]) if pieces else torch.empty(0, dtype=dtype, device=device)
        self._received = torch.empty(sum(counts), dtype=dtype, device=device)
        self._counts = counts
        self._work: Any = dist.all_to_all_single(
            self._received, self._sent, counts, sizes, group=self.peers.group, async_op=True
        )

    def _end(self) -> Sequence[Tensor]:
        self._work.wait()
        del self._sent, self._work
        return torch.split(self._received, self._counts)


def _size(route: Route) -> int:
    return torch.Size(route.shape).numel()


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    first, *rest = dtypes
    for dtype in rest:
        first = torch.promote_types(first, dtype)
    return first
