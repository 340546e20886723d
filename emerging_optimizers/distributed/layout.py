"""Which process works on which parameter."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from emerging_optimizers.distributed.dtensor import Spread, is_dtensor, spread_of
from emerging_optimizers.distributed.groups import Peers, peers_of
from emerging_optimizers.distributed.owners import Job, Span, owners_of_batch, share_out
from emerging_optimizers.distributed.shares import CutMatrix, Here, Local, Owned, OwnedShard, Share

WorkT = Literal["elements", "copies", "matrices", "rows", "owned"]
WITH_OWNERS = frozenset({"rows", "owned"})  # where somebody puts something together


class Needs(NamedTuple):
    """What an update asks of a parameter.

    Attributes:
        elementwise: each element can be worked on by itself.
        batches: the entries of the first of three axes can be.
        matrices: into how many matrices an entry of a parameter of some shape is cut.
        weights: it reads the weights, or makes new ones.
        cost: of a step of a parameter of some shape, in operations.
        wide: weights of a low precision are worked on in float32.
        picks: which share of a cut matrix of some shape has to be put together; None: all of it.
        by_rows: there, whether columns must not be cut.
    """

    elementwise: bool
    batches: bool
    matrices: Callable[[Sequence[int]], int]
    weights: bool
    cost: Callable[[Sequence[int]], float]
    wide: bool = False
    picks: Callable[[Sequence[int]], float] | None = None
    by_rows: bool = False


def work_of(spread: Spread, needs: Needs) -> WorkT:
    """What is done with a parameter that processes share.

    Returns:
        "elements": each process works on those that it has; "copies": on all of it; "matrices": on the entries of the
        first axis that it has; "rows": on what it has of a matrix, and somebody puts some of its rows
        together; "owned": somebody puts the whole together.
    """
    if needs.elementwise:
        return "elements"
    if not spread.is_cut:
        return "copies"
    fits = len(spread.shape) == 2 and spread.reaches_all and (spread.cut_axes == {0} or not needs.by_rows)
    if needs.picks is not None and fits:
        return "rows"
    whole = len(spread.shape) == 3 and needs.batches and spread.cut_axes == {0}
    return "matrices" if whole and (needs.matrices(spread.shape) == 1 or spread.is_even) else "owned"


def bytes_each(work: WorkT, needs: Needs, shape: Sequence[int], dtype: torch.dtype) -> tuple[float, float]:
    """What a step sends to owners and back of each element of a parameter of some shape and dtype, in bytes.

    Gradients travel in their own dtype, new weights in theirs, and directions, as rows that are picked, in that of the
    computation.
    """
    own = torch.float32 if needs.wide and dtype.itemsize < 4 else dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if work == "rows" and needs.picks is not None:
        some = needs.picks(shape) * wide.itemsize
        return some, some
    return dtype.itemsize + needs.weights * own.itemsize, (own if needs.weights else wide).itemsize


def job_of(shape: Sequence[int], ranks: int, needs: Needs) -> Job:
    """A parameter that needs owners: a batch of matrices is spread over as many processes as it can."""
    owners = owners_of_batch(shape[0], ranks) if len(shape) == 3 and needs.batches else 1
    if shape[0] % owners and needs.matrices(shape) != 1:
        owners = 1
    return Job(shape[0], round(needs.cost(shape)), owners)


class Asked(NamedTuple):
    """What a group asks of a layout.

    Attributes:
        parameters: those of the group that get a place.
        group: all of it.
        needs: of its update.
        spreads: how those of the group lie that processes share.
    """

    parameters: Sequence[Tensor]
    group: Mapping[str, Any]
    needs: Needs
    spreads: Mapping[Tensor, Spread]

    @property
    def wholes(self) -> list[Tensor]:
        """See `Layout.wholes`."""
        return _wholes(self.group["params"], self.spreads)

    def owned(self) -> list[Tensor]:
        """The parameters that need owners."""
        shared = (p for p in self.parameters if p in self.spreads)
        return [p for p in shared if work_of(self.spreads[p], self.needs) in WITH_OWNERS]


class Layout:
    """How an optimizer's parameters lie, and their owners; a parameter keeps its owner.

    The same on every process, since each asks for the same parameters in the same order: nothing is exchanged. Where
    the shards of parameters are plain tensors, `TensorParallel` knows how they lie.
    """

    def __init__(self) -> None:
        self._spans_of: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._loads: dict[tuple[int, ...], dict[int, int]] = {}

    def peers(self, p: Tensor, group: Mapping[str, Any]) -> Peers | None:
        """The processes that share a parameter of a group; None: this one has it for itself."""
        return peers_of(p.device_mesh) if is_dtensor(p) else None

    def spreads(self, group: Mapping[str, Any]) -> dict[Tensor, Spread]:
        """How those of a group's parameters lie that processes share; all of them ask at the same time."""
        names = group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]
        return {p: spread_of(name, p) for name, p in zip(names, group["params"], strict=False) if is_dtensor(p)}

    def wholes(self, group: Mapping[str, Any]) -> list[Tensor]:
        """A group's parameters in the shapes that they have on all processes together; shared ones without data."""
        return _wholes(group["params"], self.spreads(group))

    def ask(self, parameters: Sequence[Tensor], group: Mapping[str, Any], needs: Needs) -> Asked:
        """For some parameters of a group; the processes ask at the same time."""
        return Asked(parameters, group, needs, self.spreads(group))

    def collected(self, asked: Asked, saved: Mapping[Tensor, Mapping[str, Any]]) -> Mapping[Tensor, Mapping[str, Any]]:
        """What a checkpoint has of the parameters, where it is needed."""
        return saved

    def spans(self, asked: Iterable[Asked]) -> dict[Tensor, list[Span]]:
        """The owners of all parameters that need some: those that they have, and for new ones those that they get."""
        return self._shared_out(asked)[0]

    def settle(self, asked: Iterable[Asked]) -> None:
        """Give new parameters their owners. Those that come together are shared out together."""
        spans, loads = self._shared_out(asked)
        self._spans_of.update(spans)
        self._loads.update(loads)

    def _shared_out(
        self, asked: Iterable[Asked]
    ) -> tuple[dict[Tensor, list[Span]], dict[tuple[int, ...], dict[int, int]]]:
        found: dict[Tensor, list[Span]] = {}
        new: dict[tuple[int, ...], dict[Tensor, Job]] = {}
        for some in asked:
            for p in some.owned():
                if p in self._spans_of:
                    found[p] = self._spans_of[p]
                else:
                    ranks = tuple(sorted(some.spreads[p].ranks))
                    new.setdefault(ranks, {})[p] = self._job(some.spreads[p], some.needs)
        loads = {ranks: {**self._loads.get(ranks, dict.fromkeys(ranks, 0))} for ranks in new}
        for ranks, jobs in new.items():
            for (p, job), spans in zip(jobs.items(), share_out([*jobs.values()], loads[ranks]), strict=True):
                found[p] = spans
                for span in spans:
                    loads[ranks][span.rank] += job.piece(span.stop - span.start)
        return found, loads

    def _job(self, spread: Spread, needs: Needs) -> Job:
        return job_of(spread.shape, len(spread.ranks), needs)

    def shares(self, asked: Asked) -> list[Share]:
        """What of the parameters is worked on here."""
        self.settle([asked])
        return [self._share(p, asked) for p in asked.parameters]

    def _share(self, p: Tensor, asked: Asked) -> Share:
        spread, peers = asked.spreads.get(p), self.peers(p, asked.group)
        if spread is None or peers is None:
            return Here(p)
        work = work_of(spread, asked.needs)
        if work not in WITH_OWNERS:
            return Local(p, spread, peers, work == "elements")
        if work == "rows":
            return CutMatrix(p, spread, peers, self._spans_of[p][0].rank)
        owned = Owned if is_dtensor(p) else OwnedShard
        return owned(p, spread, peers, self._spans_of[p], asked.needs.weights, asked.needs.wide)


def _wholes(parameters: Sequence[Tensor], shared: Mapping[Tensor, Spread]) -> list[Tensor]:
    return [torch.empty(shared[p].shape, device="meta") if p in shared else p for p in parameters]
