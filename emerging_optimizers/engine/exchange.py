"""One step of parameters that are spread over processes: what is owned here is worked on while the next travels."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from emerging_optimizers.distributed.dtensor import local_gradient
from emerging_optimizers.distributed.groups import Peers
from emerging_optimizers.distributed.layout import Layout
from emerging_optimizers.distributed.shares import Local, Owned, Part
from emerging_optimizers.distributed.transport import FAILED, Arrival, Shipment
from emerging_optimizers.engine.alike import Agreement, facts_of
from emerging_optimizers.engine.buckets import Bucket
from emerging_optimizers.engine.commit import Write, commit
from emerging_optimizers.engine.guard import sum_norms
from emerging_optimizers.engine.kept import kept_of, opened
from emerging_optimizers.engine.moving import Movement
from emerging_optimizers.engine.validate import label_of

# How much may travel at a time on an accelerator, where the next shipment travels beside the work on this one. On a CPU
# one shipment is fastest.
SHIPMENT_BYTES = 256 * 2**20

GroupsT = Sequence[Mapping[str, Any]]


class Exchange:
    """The shares of an optimizer that are not all of a parameter.

    Args:
        name: of the optimizer, for messages.
        buckets: with the index of their group.
        shares: of all parameters, in an order that all processes have.
    """

    def __init__(self, name: str, buckets: Sequence[tuple[int, Bucket]], shares: Sequence[Any]) -> None:
        self._name = name
        self._local = [s for s in shares if isinstance(s, Local)]
        self._group = {id(s): index for index, bucket in buckets for s in bucket.shares}
        owned = [s for s in shares if isinstance(s, Owned)]
        self._shipments = _shipments(owned)
        home = {id(s): k for k, shipment in enumerate(self._shipments) for s in shipment.shares}
        self._at_home: list[tuple[int, Bucket]] = []
        self._owned: list[list[tuple[int, Bucket]]] = [[] for _ in self._shipments]
        for index, bucket in buckets:
            at = home.get(id(bucket.shares[0]))
            if not bucket.elsewhere:
                (self._at_home if at is None else self._owned[at]).append((index, bucket))
        self._agreements = _agreements((s.source, s.peers) for s in shares if isinstance(s, Part))

    @classmethod
    def of(cls, name: str, buckets: Sequence[tuple[int, Bucket]], parameters: Iterable[Tensor]) -> "Exchange | None":
        """What the buckets need, for parameters in the order that all processes have; None in one process."""
        found = {id(s.source): s for _, bucket in buckets for s in bucket.shares}
        shares = [found[id(p)] for p in parameters if id(p) in found]
        return cls(name, buckets, shares) if any(isinstance(s, Part) for s in shares) else None

    def agree(self, groups: GroupsT) -> None:
        """Raise on every process where they are about to take different steps."""
        for agreement, members in self._agreements:
            agreement.check(self._name, facts_of(groups, members))

    @staticmethod
    def refuse(name: str, groups: GroupsT, layout: Layout, problem: Exception) -> None:
        """Tell the processes that share parameters why this one cannot take the step; they raise, too."""
        members = ((p, layout.peers(p, group)) for group in groups for p in group["params"])
        for agreement, _ in _agreements((p, peers) for p, peers in members if peers is not None):
            agreement.check(name, {}, problem)

    def step(
        self,
        groups: GroupsT,
        start: Callable[[int, Bucket], None],
        take: Callable[[int, Bucket], Tensor | None],
    ) -> None:
        """Start and take every bucket.

        An error in one is raised when what travels has arrived, here and on the processes that wait for its results.

        Args:
            groups: of the optimizer.
            start: makes what a bucket's state starts with.
            take: the step of a bucket; returns the guard's factors.
        """
        for share in self._local:
            grad = local_gradient(share.source)  # where there is nothing of it, too: it may take an exchange
            if not share.elsewhere:
                share.given = grad
            elif grad is not None and share.kept is not None:
                commit(share.kept.advance([share]))
        try:
            for shipment in self._shipments:
                with opened(kept_of(share for share in shipment.shares if share.weights)):
                    shipment.fetch()
            sum_norms((bucket, groups[index]) for index, bucket in self._at_home)
            problem = self._run(self._at_home, start, take, None, None)
            for shipment, buckets in zip(self._shipments, self._owned, strict=True):
                shipment.arrive()
                problem = self._run(buckets, start, take, shipment, problem)
                shipment.deliver()
            failed = [x for shipment in self._shipments for x in self._land(shipment.land(), groups)]
        finally:
            for share in self._local:
                share.given = None
        if problem is not None:
            raise problem
        if failed:
            raise RuntimeError(
                f"{self._name}: rank {failed[0][0]} could not work on what it owns, {', '.join(n for _, n in failed)}; "
                "its own error says why. Those have not moved, everything else has"
            )

    def _run(
        self,
        buckets: Sequence[tuple[int, Bucket]],
        start: Callable[[int, Bucket], None],
        take: Callable[[int, Bucket], Tensor | None],
        shipment: Shipment | None,
        problem: Exception | None,
    ) -> Exception | None:
        """Start and take some buckets; the first problem.

        Those behind it are taken, too: others may wait for them, and everywhere the same has moved.
        """
        for index, bucket in buckets:
            counts = bucket.counts
            try:
                start(index, bucket)
                factor = take(index, bucket)
                if shipment is not None and factor is not None:
                    _say_what_the_guard_did(shipment, bucket, factor)
            except Exception as error:  # of whatever kind: the others wait for what is owned here
                problem = problem or error
                for share, before, now in zip(bucket.shares, counts, bucket.counts, strict=True):
                    if shipment is not None and before == now and isinstance(share, Owned):
                        shipment.say(share, torch.full((2,), FAILED, device=bucket.device))
        return problem

    def _land(self, arrivals: Iterable[Arrival], groups: GroupsT) -> list[tuple[int, str]]:
        """Move the parts that lie here; whose owner has failed are returned, and stay."""
        failed: list[tuple[int, str]] = []
        by_group: dict[tuple[int, bool], list[Arrival]] = {}
        for arrival in arrivals:
            share = arrival.share
            if share.source.grad is None:
                continue
            words = {rank: float(word[1]) for rank, word in arrival.words.items()} if _looks(share) else {}
            if FAILED in words.values():
                rank = next(rank for rank, word in words.items() if word == FAILED)
                failed.append((rank, label_of(groups, share.source)))
                continue
            some_stay = any(words.values()) or not _looks(share)
            by_group.setdefault((self._group[id(share)], some_stay), []).append(arrival)
        for (index, some_stay), members in by_group.items():
            shares, arrived = [x.share for x in members], [x.part for x in members]
            with opened(kept := kept_of(shares)):
                here = [share.here for share in shares]
                if shares[0].weights:
                    writes: list[Write] = [partial(torch._foreach_copy_, here, arrived)]
                else:
                    writes = Movement(None, groups[index]).land(here, arrived, some_stay)
                commit([*writes, *(write for some in kept if writes for write in some.writes(shares))])
        return failed


def _say_what_the_guard_did(shipment: Shipment, bucket: Bucket, factor: Tensor) -> None:
    skipped = factor == 0
    news = torch.stack([(factor < 1) & ~skipped, skipped], dim=1)
    for row, share in enumerate(bucket.shares):
        if isinstance(share, Owned) and share.grad is not None:
            shipment.say(share, bucket.unit_view(row, news).view(-1, 2).sum(0))


def _looks(share: Owned) -> bool:
    """Whether the host sees what an owner says without waiting."""
    return share.stored.device.type == "cpu"


def _agreements(shared: Iterable[tuple[Tensor, Peers]]) -> list[tuple[Agreement, list[Tensor]]]:
    """With the parameters that are shared, in an order that all processes have."""
    members: dict[Peers, list[Tensor]] = {}
    for p, peers in shared:
        members.setdefault(peers, []).append(p)
    ordered = sorted(members.items(), key=lambda item: item[0].ranks)
    return [(Agreement(peers, some[0].device), some) for peers, some in ordered]


def _shipments(owned: Sequence[Owned]) -> list[Shipment]:
    """Shares of one kind travel together; on an accelerator shape by shape, in shipments of a bounded size."""
    alike: dict[Any, list[Owned]] = {}
    for share in owned:
        alike.setdefault((share.peers, share.weights, share.work.dtype, share.source.dtype), []).append(share)
    return [Shipment(kind[0], some) for kind, shares in alike.items() for some in _bounded(shares)]


def _bounded(shares: Sequence[Owned]) -> list[list[Owned]]:
    by_shape: dict[tuple[int, ...], list[Owned]] = {}
    for share in shares:
        by_shape.setdefault(share.shape, []).append(share)
    found: list[list[Owned]] = [[]]
    room = SHIPMENT_BYTES
    for some in by_shape.values():
        size = sum(prod(share.shape) * share.work.dtype.itemsize for share in some)
        if found[-1] and size > room and not _looks(some[0]):
            found.append([])
            room = SHIPMENT_BYTES
        found[-1] += some
        room -= size
    return found
