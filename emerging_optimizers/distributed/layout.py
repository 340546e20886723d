"""Which process works on which parameter."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from emerging_optimizers.distributed.dtensor import Spread, is_dtensor, spread_of
from emerging_optimizers.distributed.groups import Peers, peers_of
from emerging_optimizers.distributed.shares import Here, Local, Owned, Share, Span


class Needs(NamedTuple):
    """What an update asks of a parameter.

    Attributes:
        elementwise: each element can be worked on by itself.
        batches: the entries of the first of three axes can be.
        matrices: into how many matrices an entry is cut.
        weights: it reads the weights, or makes new ones.
        cost: of a step of a parameter, in operations.
    """

    elementwise: bool
    batches: bool
    matrices: Callable[[Tensor], int]
    weights: bool
    cost: Callable[[Tensor], float]


class Layout:
    """The owners of an optimizer's parameters; a parameter keeps its owner.

    The same on every process, since each asks for the same parameters in the same order: nothing is exchanged.
    """

    def __init__(self) -> None:
        self._owners: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._loads: dict[Peers, dict[int, float]] = {}

    def shares(self, parameters: Sequence[Tensor], needs: Needs) -> list[Share]:
        """What of some parameters is worked on here."""
        shares: dict[int, Share] = {}
        cut: list[tuple[int, Spread, Peers]] = []
        for i, p in enumerate(parameters):
            if not is_dtensor(p):
                shares[i] = Here(p)
                continue
            spread, peers = spread_of(f"parameter {i}", p), peers_of(p.device_mesh)
            if needs.elementwise or not spread.is_cut or self._is_batch(p, spread, needs):
                shares[i] = Local(p, spread, peers, needs.elementwise)
            else:
                cut.append((i, spread, peers))
        new = []
        for i, _, peers in cut:
            p = parameters[i]
            if p not in self._owners:
                count = _owners(p, len(peers.ranks), needs)
                # By the largest piece, not by the parameter: small pieces of a large one fill up what is left.
                new.append((needs.cost(p) * -(-p.shape[0] // count) / p.shape[0], i, peers, count))
        for cost, i, peers, count in sorted(new, key=lambda x: (-x[0], x[1])):
            self._owners[parameters[i]] = self._spans(parameters[i], peers, count, cost)
        for i, spread, peers in cut:
            shares[i] = Owned(parameters[i], spread, peers, self._owners[parameters[i]], needs.weights)
        return [shares[i] for i in range(len(parameters))]

    @staticmethod
    def _is_batch(p: Tensor, spread: Spread, needs: Needs) -> bool:
        """Whether only the first axis of a batch of matrices is cut."""
        if p.ndim != 3 or not needs.batches or spread.cut_axes != {0}:
            return False
        return needs.matrices(p) == 1 or spread.is_even

    def _spans(self, p: Tensor, peers: Peers, count: int, cost: float) -> list[Span]:
        """Processes that lie behind each other, those with the least to do."""
        loads = self._loads.setdefault(peers, dict.fromkeys(peers.ranks, 0.0))
        blocks = [peers.ranks[k : k + count] for k in range(0, len(peers.ranks) - count + 1, count)]
        ranks = min(blocks, key=lambda some: sum(loads[rank] for rank in some))
        size, each = p.shape[0], -(-p.shape[0] // count)  # as `torch.chunk` cuts: the state is a DTensor of that kind
        spans = [Span(rank, min(size, k * each), min(size, (k + 1) * each)) for k, rank in enumerate(ranks)]
        for span in spans:
            loads[span.rank] += cost * (span.stop - span.start) / each
        return spans


def _owners(p: Tensor, ranks: int, needs: Needs) -> int:
    """Among how many processes a parameter is spread: a batch of matrices among as many as it can."""
    if p.ndim != 3 or not needs.batches or p.shape[0] == 1:
        return 1
    count = min(ranks, p.shape[0])
    return count if needs.matrices(p) == 1 or p.shape[0] % count == 0 else 1
