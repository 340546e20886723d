"""Plain tensors that are shards of matrices, as tensor parallelism without DTensor has them."""

from collections.abc import Mapping, MutableMapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from emerging_optimizers.distributed.dtensor import Spread, is_dtensor
from emerging_optimizers.distributed.groups import Peers, get_pg_size
from emerging_optimizers.distributed.layout import Asked, Layout, Needs
from emerging_optimizers.distributed.owners import Job
from emerging_optimizers.distributed.plan import Box
from emerging_optimizers.distributed.shares import OwnedShard

_Shape = tuple[int, ...]


class Pieces(Spread):
    """How a tensor lies that is cut along one axis into pieces of any lengths.

    Example:
        >>> spread = Pieces([(3, 4), (2, 4), (1, 4)], axis=0, ranks=(0, 1, 2))
        >>> spread.shape, spread.boxes(1)
        ((6, 4), (Box(starts=(3, 0), stops=(5, 4), local=(0, 0)),))
    """

    def __init__(self, shapes: Sequence[_Shape], axis: int, ranks: Sequence[int]) -> None:
        self.ranks, self.cut_axes, self.copies = tuple(ranks), {axis}, 1
        ends = [*accumulate(shape[axis] for shape in shapes)]
        self.shape = (*shapes[0][:axis], ends[-1], *shapes[0][axis + 1 :])
        self._boxes = {}
        for rank, shape, end in zip(ranks, shapes, ends, strict=True):
            stops = (*shape[:axis], end, *shape[axis + 1 :])
            starts = tuple(stop - size for stop, size in zip(stops, shape, strict=True))
            self._boxes[rank] = (Box(starts, stops, (0,) * len(shape)),)

    def boxes(self, rank: int) -> tuple[Box, ...]:
        """What lies on a process."""
        return self._boxes[rank]

    def copy_of(self, rank: int) -> tuple[int, ...]:
        """There is one."""
        return ()


class TensorParallel(Layout):
    """The owners of parameters of which each process of a group has a shard; their groups say how (`partition_dim`).

    How large the shards are the processes tell one another when there is a new one, all of them at the same time.

    Args:
        group: the processes; the shards lie behind each other in their order.
        by_rows: keys of square matrices of which a checkpoint may have some rows on each process.
    """

    def __init__(self, group: dist.ProcessGroup | None, by_rows: Sequence[str]) -> None:
        super().__init__()
        self._peers = Peers(group) if group is not None and get_pg_size(group) > 1 else None
        self._by_rows = by_rows
        self._known: MutableMapping[Tensor, tuple[Any, Spread]] = WeakIdKeyDictionary()

    def peers(self, p: Tensor, group: Mapping[str, Any]) -> Peers | None:
        """Those of the group, where a matrix is cut."""
        if is_dtensor(p) or group["partition_dim"] is None:
            return super().peers(p, group)
        return self._peers

    def spreads(self, group: Mapping[str, Any]) -> dict[Tensor, Spread]:
        """Of shards, too."""
        found = super().spreads(group)
        if self._peers is None or group["partition_dim"] is None:
            return found
        cut = {
            i: (tuple(p.shape), group["partition_dim"] + (p.ndim == 3 and group["matrix_view"] != "flatten"))
            for i, p in enumerate(group["params"])
            if p not in found
        }
        known, parameters = self._known, group["params"]
        new = {i: kind for i, kind in cut.items() if known.get(parameters[i], (None, None))[0] != kind}
        if new:
            everyone = self._peers.everyone([*new.values()])
            _check(everyone, [*new], group, self._peers)
            for i, *kinds in zip(new, *everyone, strict=True):
                spread = Pieces([shape for shape, _ in kinds], kinds[0][1], self._peers.ranks)
                known[parameters[i]] = new[i], spread
        return {**found, **{parameters[i]: known[parameters[i]][1] for i in cut}}

    def _job(self, spread: Spread, needs: Needs) -> Job:
        """For one owner, also of a batch: what a process has in its checkpoint is then everything, or nothing."""
        return super()._job(spread, needs)._replace(owners=1)

    def collected(self, asked: Asked, saved: Mapping[Tensor, Mapping[str, Any]]) -> Mapping[Tensor, Mapping[str, Any]]:
        """What the checkpoints of the processes have together of the parameters, on the owner of each.

        An owner has whole tensors in its checkpoint and the others tensors without elements, but it may own other
        parameters now. The published one has rows of factors on each process, and the rest whole.
        """
        if self._peers is None or asked.group["partition_dim"] is None:
            return saved
        owned = [share for share in self.shares(asked) if isinstance(share, OwnedShard)]
        shapes = self._peers.everyone([{k: _shape(x) for k, x in saved[share.source].items()} for share in owned])
        keys = [[sorted(entry) for entry in theirs] for theirs in shapes]
        if any(theirs != keys[0] for theirs in keys):
            rank = next(r for r, theirs in zip(self._peers.ranks, keys, strict=True) if theirs != keys[0])
            raise ValueError(
                f"ranks {self._peers.ranks[0]} and {rank} load states of other parameters, or with other keys; load on "
                "each process the checkpoint that it has written"
            )
        theirs_of = dict(zip((share.source for share in owned), zip(*shapes, strict=True), strict=True))
        owner_of = {share.source: share.owner for share in owned}
        return {
            p: self._brought(entry, owner_of[p], theirs_of[p]) if p in owner_of else entry for p, entry in saved.items()
        }

    def _brought(
        self, entry: Mapping[str, Any], owner: int, shapes: Sequence[Mapping[str, _Shape | None]]
    ) -> Mapping[str, Any]:
        """What is saved of a parameter with what its owner lacks, there; elsewhere that has no data."""
        peers = self._peers
        assert peers is not None
        at, here = peers.ranks.index(owner), peers.ranks.index(peers.rank)
        lacking = {key: senders for key in entry if (senders := self._senders(key, [s[key] for s in shapes], at))}
        if not lacking:
            return entry
        sent = {key: entry[key].cpu() for key, senders in lacking.items() if here in senders}
        received: list[Any] | None = [None] * len(peers.ranks) if here == at else None
        dist.gather_object(sent, received, dst=owner, group=peers.group)
        new: dict[str, Any] = {**entry}
        for key, senders in lacking.items():
            if received is not None:
                pieces = [received[k][key] for k in senders]
                new[key] = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-2)
            else:
                shape = shapes[senders[0]][key] or ()
                shape = shape if len(senders) == 1 else (*shape[:-2], shape[-1], shape[-1])
                new[key] = torch.empty(shape, dtype=entry[key].dtype, device="meta")
        return new

    def _senders(self, key: str, shapes: Sequence[_Shape | None], at: int) -> list[int]:
        """The processes that have what the owner, which is process `at`, lacks under a key; none: it lacks nothing."""
        if key in self._by_rows and _are_rows(shapes):
            return [*range(len(shapes))]
        if not _is_empty(shapes[at]):
            return []
        senders = [k for k, shape in enumerate(shapes) if not _is_empty(shape)]
        if not senders:
            raise ValueError(
                f"no process has loaded {key!r} of a sharded parameter, which another one has written: of what it does "
                "not own a process saves tensors without elements. Load on each process the checkpoint that it has "
                "written"
            )
        return senders[:1]


def _check(everyone: Sequence[Sequence[Any]], indices: Sequence[int], group: Mapping[str, Any], peers: Peers) -> None:
    """Raise ValueError, on every process, where tensors are no shards of one matrix."""
    given = f"partition_dim={group['partition_dim']}"
    for rank, theirs in zip(peers.ranks, everyone, strict=True):
        if len(theirs) != len(everyone[0]):
            raise ValueError(
                f"a group with {given} has {len(everyone[0])} new parameters on rank {peers.ranks[0]} and "
                f"{len(theirs)} on rank {rank}; make the same groups on each process of tp_group"
            )
    names = group.get("param_names") or ()
    for k, i in enumerate(indices):
        shapes, axes = zip(*(theirs[k] for theirs in everyone), strict=True)
        others = {
            (axis, len(shape), *shape[:axis], *shape[axis + 1 :]) for shape, axis in zip(shapes, axes, strict=True)
        }
        if len(others) > 1 or not all(map(torch.Size.numel, map(torch.Size, shapes))):
            name = f"parameter {names[i]!r}" if i < len(names) else f"parameter {i}"
            listed = ", ".join(f"{shape} on rank {rank}" for rank, shape in zip(peers.ranks, shapes, strict=True))
            raise ValueError(
                f"{name} has {given} and is {listed}; the shards of a matrix may differ in that dimension, and may not "
                "be empty. Replicate what has too few rows or columns (partition_dim=None)"
            )


def _shape(x: Any) -> _Shape | None:
    return tuple(x.shape) if isinstance(x, Tensor) else None


def _is_empty(shape: _Shape | None) -> bool:
    return shape is not None and 0 in shape


def _are_rows(shapes: Sequence[_Shape | None]) -> bool:
    """Whether they are the rows of a square matrix, or of a stack of them, one behind the other."""
    known = [shape for shape in shapes if shape is not None and len(shape) > 1]
    return len(known) == len(shapes) and sum(shape[-2] for shape in known) == known[0][-1]
