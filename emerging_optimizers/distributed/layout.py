"""Which process works on which parameter."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from emerging_optimizers.distributed.dtensor import Spread, is_dtensor, spread_of
from emerging_optimizers.distributed.groups import Peers, peers_of
from emerging_optimizers.distributed.shares import Here, Local, Owned, OwnedShard, Share, Span


class Needs(NamedTuple):
    """What an update asks of a parameter.

    Attributes:
        elementwise: each element can be worked on by itself.
        batches: the entries of the first of three axes can be.
        matrices: into how many matrices an entry of a parameter of some shape is cut.
        weights: it reads the weights, or makes new ones.
        cost: of a step of a parameter of some shape, in operations.
        wide: weights of a low precision are worked on in float32.
    """

    elementwise: bool
    batches: bool
    matrices: Callable[[Sequence[int]], int]
    weights: bool
    cost: Callable[[Sequence[int]], float]
    wide: bool = False


class Layout:
    """How an optimizer's parameters lie, and their owners; a parameter keeps its owner.

    The same on every process, since each asks for the same parameters in the same order: nothing is exchanged. Where
    the shards of parameters are plain tensors, `TensorParallel` knows how they lie.
    """

    def __init__(self) -> None:
        self._spans_of: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._loads: dict[Peers, dict[int, float]] = {}

    def peers(self, p: Tensor, group: Mapping[str, Any]) -> Peers | None:
        """The processes that share a parameter of a group; None: this one has it for itself."""
        return peers_of(p.device_mesh) if is_dtensor(p) else None

    def spreads(self, group: Mapping[str, Any]) -> dict[Tensor, Spread]:
        """How those of a group's parameters lie that processes share; all of them ask at the same time."""
        names = group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]
        return {p: spread_of(name, p) for name, p in zip(names, group["params"], strict=False) if is_dtensor(p)}

    def wholes(self, group: Mapping[str, Any]) -> list[Tensor]:
        """A group's parameters in the shapes that they have on all processes together; shared ones without data."""
        spreads = self.spreads(group)
        return [torch.empty(spreads[p].shape, device="meta") if p in spreads else p for p in group["params"]]

    def collected(
        self, group: Mapping[str, Any], saved: Mapping[Tensor, Mapping[str, Any]], needs: Needs
    ) -> Mapping[Tensor, Mapping[str, Any]]:
        """What a checkpoint has of some parameters of a group, where it is needed."""
        return saved

    def shares(self, parameters: Sequence[Tensor], group: Mapping[str, Any], needs: Needs) -> list[Share]:
        """What of some parameters of a group is worked on here."""
        shares: dict[int, Share] = {}
        cut: list[tuple[int, Spread, Peers]] = []
        spreads = self.spreads(group)
        for i, p in enumerate(parameters):
            spread, peers = spreads.get(p), self.peers(p, group)
            if spread is None or peers is None:
                shares[i] = Here(p)
            elif needs.elementwise or not spread.is_cut or self._is_batch(spread, needs):
                shares[i] = Local(p, spread, peers, needs.elementwise)
            else:
                cut.append((i, spread, peers))
        new = []
        for i, spread, peers in cut:
            if parameters[i] not in self._spans_of:
                shape = spread.shape
                count = self._owners(shape, len(peers.ranks), needs)
                # By the largest piece, not by the parameter: small pieces of a large one fill up what is left.
                new.append((needs.cost(shape) * -(-shape[0] // count) / shape[0], i, shape[0], peers, count))
        for cost, i, size, peers, count in sorted(new, key=lambda x: (-x[0], x[1])):
            self._spans_of[parameters[i]] = self._spans(size, peers, count, cost)
        for i, spread, peers in cut:
            p = parameters[i]
            owned = Owned if is_dtensor(p) else OwnedShard
            shares[i] = owned(p, spread, peers, self._spans_of[p], needs.weights, needs.wide)
        return [shares[i] for i in range(len(parameters))]

    @staticmethod
    def _is_batch(spread: Spread, needs: Needs) -> bool:
        """Whether only the first axis of a batch of matrices is cut."""
        if len(spread.shape) != 3 or not needs.batches or spread.cut_axes != {0}:
            return False
        return needs.matrices(spread.shape) == 1 or spread.is_even

    def _owners(self, shape: Sequence[int], ranks: int, needs: Needs) -> int:
        """Among how many processes a parameter is spread: a batch of matrices among as many as it can."""
        if len(shape) != 3 or not needs.batches or shape[0] == 1:
            return 1
        count = min(ranks, shape[0])
        return count if needs.matrices(shape) == 1 or shape[0] % count == 0 else 1

    def _spans(self, size: int, peers: Peers, count: int, cost: float) -> list[Span]:
        """Processes that lie behind each other, those with the least to do."""
        loads = self._loads.setdefault(peers, dict.fromkeys(peers.ranks, 0.0))
        blocks = [peers.ranks[k : k + count] for k in range(0, len(peers.ranks) - count + 1, count)]
        ranks = min(blocks, key=lambda some: sum(loads[rank] for rank in some))
        each = -(-size // count)  # as `torch.chunk` cuts: the state is a DTensor of that kind
        spans = [Span(rank, min(size, k * each), min(size, (k + 1) * each)) for k, rank in enumerate(ranks)]
        for span in spans:
            loads[span.rank] += cost * (span.stop - span.start) / each
        return spans
