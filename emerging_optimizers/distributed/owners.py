"""Sharing out whole matrices over processes: integers only, so that every process finds the same owners."""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import accumulate, product
from operator import neg
from typing import NamedTuple


class Job(NamedTuple):
    """A parameter that needs an owner, or several.

    Attributes:
        size: entries of its first axis.
        cost: of its step, in operations.
        owners: among how many processes its entries are spread; 1: it stays whole.
    """

    size: int
    cost: int
    owners: int = 1

    @property
    def largest(self) -> int:
        """The cost of the largest piece."""
        return self.piece(_each(self.size, self.owners))

    @property
    def pieces(self) -> list[int]:
        """The costs of its pieces."""
        return [self.piece(stop - start) for start, stop in _cuts(self.size, self.owners)]

    def piece(self, entries: int) -> int:
        """The cost of some entries."""
        return self.cost * entries // self.size


class Span(NamedTuple):
    """Which entries of a parameter's first axis a process owns."""

    rank: int
    start: int
    stop: int


def owners_of_batch(size: int, ranks: int) -> int:
    """Among how many of some processes the entries of a batch are spread: none of them gets no entry.

    Example:
        >>> owners_of_batch(4, 8), owners_of_batch(9, 4)
        (4, 3)
    """
    return -(-size // _each(size, ranks))


def share_out(jobs: Sequence[Job], loads: Mapping[int, int]) -> list[list[Span]]:
    """Give jobs to processes so that the most that one of them has to do is small.

    The longest piece goes first, and to the process with the least to do; a batch to processes that lie behind each
    other. Then, as long as it helps, a job of the process with the most changes places with a smaller one elsewhere.

    Args:
        jobs: what is to be done.
        loads: of each process by its rank, the cost of what it has to do already.

    Returns:
        Of each job its owners, in the order of the entries that they own.

    Raises:
        ValueError: there is no process, or a batch has more owners than there are.

    Example:
        >>> jobs = [Job(1, cost) for cost in (5, 5, 4, 4, 3, 3, 3)]  # the longest first alone: 15 and 12
        >>> [span.rank for (span,) in share_out(jobs, {0: 0, 1: 0})]
        [0, 1, 1, 1, 0, 0, 0]
    """
    most = max((job.owners for job in jobs), default=1)
    if len(loads) < most:
        raise ValueError(f"share_out: {len(loads)} processes for {most} owners; give a load for each process")
    now, ranks = {**loads}, [*loads]
    heap = [(load, rank) for rank, load in now.items()]
    heapify(heap)
    spans: list[list[Span]] = [[] for _ in jobs]
    # By the largest piece, not by the whole: small pieces of a large batch fill up what is left.
    for i in sorted(range(len(jobs)), key=lambda i: -jobs[i].largest):
        job = jobs[i]
        if job.owners == 1:
            while now[heap[0][1]] != heap[0][0]:  # of a process that has more to do by now
                heappop(heap)
            chosen = [heap[0][1]]
        else:
            blocks = [ranks[k : k + job.owners] for k in range(0, len(ranks) - job.owners + 1, job.owners)]
            chosen = min(blocks, key=lambda block: (max(done := [now[rank] for rank in block]), sum(done)))
        for rank, (start, stop) in zip(chosen, _cuts(job.size, job.owners), strict=True):
            spans[i].append(Span(rank, start, stop))
            now[rank] += job.piece(stop - start)
            heappush(heap, (now[rank], rank))
    _even_out(jobs, spans, now, least_load([x for job in jobs for x in job.pieces], len(ranks)))
    return spans


def least_load(pieces: Iterable[int], ranks: int) -> int:
    """What the process with the most has to do at least, whoever owns what.

    That is the mean, or the largest piece where that is more. And pieces are whole: where there are more than k on each
    process, one has k + 1 of them; and large ones that fit with no other leave the rest to fewer processes (Martello
    and Toth 1990, L2).

    Args:
        pieces: their costs.
        ranks: how many processes there are.

    Example:
        >>> least_load([3] * 7, 4), least_load([10, 10, 10, 4, 4, 4], 4)
        (6, 12)
    """
    costs = sorted(pieces, reverse=True)
    if not costs:
        return 0
    total = [0, *accumulate(costs)]
    low = max(-(-total[-1] // ranks), costs[0])
    for k in range(1, (len(costs) - 1) // ranks + 1):  # of k ranks + 1 pieces some process has k + 1
        low = max(low, total[k * ranks + 1] - total[k * ranks - k])
    high = 2 * low  # the longest first, to the least: that is never more than twice the best
    while low < high:
        middle = (low + high) // 2
        if _processes(costs, total, middle) > ranks:
            low = middle + 1
        else:
            high = middle
    return low


def _each(size: int, owners: int) -> int:
    return -(-size // owners)


def _cuts(size: int, owners: int) -> list[tuple[int, int]]:
    """As `torch.chunk` cuts: the state is a DTensor of that kind."""
    each = _each(size, owners)
    return [(min(size, k * each), min(size, (k + 1) * each)) for k in range(owners)]


def _processes(costs: Sequence[int], total: Sequence[int], capacity: int) -> int:
    """How many processes it takes at least where none may have more to do than `capacity`.

    The costs fall, and `total` sums up the first of them.
    """

    def longer(than: int) -> int:
        return bisect_left(costs, -than, key=neg)

    half = longer(capacity // 2)  # no two of those fit
    needed = half
    for small in {0, *costs[half:]}:
        alone = longer(capacity - small)  # with no piece from `small` on
        room = (half - alone) * capacity - (total[half] - total[alone])  # beside those that are longer than half of it
        rest = total[longer(small - 1)] - total[half]
        needed = max(needed, half + max(0, -(-(rest - room) // capacity)))
    return needed


# --- better than the longest first ------------------------------------------------------------------------------------

_HeldT = tuple[int, tuple[int, ...]]  # the load of a process, and the costs of the jobs that it has alone


class _Holders:
    """Which process has which jobs alone. Those that hold the same are alike, so that thousands take no longer.

    Attributes:
        alike: what processes hold, and which ones.
    """

    def __init__(self, jobs: Sequence[Job], spans: list[list[Span]], loads: dict[int, int]) -> None:
        self._jobs, self._spans, self._loads = jobs, spans, loads
        self._mine: dict[int, list[int]] = {rank: [] for rank in loads}
        for i, job in enumerate(jobs):
            if job.owners == 1:
                self._mine[spans[i][0].rank].append(i)
        self.alike: dict[_HeldT, list[int]] = {}
        for rank in loads:
            self._put(rank)

    def swap(self, one: _HeldT, given: int, other: _HeldT, taken: int) -> None:
        """Let a process that holds this give a job of some cost to another, and take one; 0: it takes none."""
        first, second = self._take(one), self._take(other)
        self._give(first, second, given)
        if taken:
            self._give(second, first, taken)
        self._put(first)
        self._put(second)

    def _put(self, rank: int) -> None:
        costs = tuple(sorted(self._jobs[i].cost for i in self._mine[rank]))
        self.alike.setdefault((self._loads[rank], costs), []).append(rank)

    def _take(self, held: _HeldT) -> int:
        rank = self.alike[held].pop()
        if not self.alike[held]:
            del self.alike[held]
        return rank

    def _give(self, one: int, other: int, cost: int) -> None:
        i = next(i for i in self._mine[one] if self._jobs[i].cost == cost)
        self._mine[one].remove(i)
        self._mine[other].append(i)
        self._spans[i] = [self._spans[i][0]._replace(rank=other)]
        self._loads[one] -= cost
        self._loads[other] += cost


def _even_out(jobs: Sequence[Job], spans: list[list[Span]], loads: dict[int, int], least: int) -> None:
    """Let whole jobs change places until the process with the most has nothing to give."""
    holders = _Holders(jobs, spans, loads)
    for _ in jobs:  # so often at most
        top = max(holders.alike)
        if 1000 * top[0] <= 1001 * least or (found := _best_swap(top, holders.alike)) is None:
            return
        other, given, taken = found
        holders.swap(top, given, other, taken)


def _best_swap(top: _HeldT, alike: Iterable[_HeldT]) -> tuple[_HeldT, int, int] | None:
    """With whom, what is given and what is taken for it (0: nothing), so that the larger of both loads is least."""
    best, found = top[0], None
    for other in alike:
        if other == top:
            continue
        for given, taken in product(sorted({*top[1]}), sorted({0, *other[1]})):
            after = max(top[0] - given + taken, other[0] + given - taken)
            if after < best:
                best, found = after, (other, given, taken)
    return found
