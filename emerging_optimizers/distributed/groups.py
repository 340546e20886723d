"""A process group: how large it is, where this process stands in it, and what its processes hold together."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def get_pg_size(group: dist.ProcessGroup | None = None) -> int:
    """How many processes a group has; 1 for None, or where torch.distributed has not been set up.

    Example:
        >>> get_pg_size()
        1
    """
    return 1 if group is None or not dist.is_initialized() else group.size()


def get_pg_rank(group: dist.ProcessGroup | None = None) -> int:
    """This process's place in a group; 0 for None, or where torch.distributed has not been set up.

    Example:
        >>> get_pg_rank()
        0
    """
    return 0 if group is None or not dist.is_initialized() else group.rank()


class Gathers:
    """How often this process has put a tensor together on every process of a group. No step does; loading may.

    Attributes:
        count: since it began.
    """

    count = 0


GATHERS = Gathers()


def gather(x: Tensor, dim: int, group: dist.ProcessGroup | None) -> Tensor:
    """The whole of which every process has an equal part along `dim`, on every process."""
    GATHERS.count += 1
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(get_pg_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=dim)


class Peers:
    """The processes of a mesh, which share parameters.

    Attributes:
        group: theirs.
        ranks: their global ranks, in the order of the group.
        rank: this process's.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.ranks: tuple[int, ...] = tuple(dist.get_process_group_ranks(group))
        self.rank = dist.get_rank()

    def __deepcopy__(self, memo: Any) -> "Peers":  # a copy of a state, as `dcp.async_save` makes one, has the same
        return self

    def __reduce__(self) -> Any:
        """By ranks: a process group bears no pickling."""
        return _again, (self.ranks,)

    def sum(self, x: Tensor) -> Tensor:
        """A sum over the processes, the same bits on each."""
        total = x.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def exchange(self, pieces: Sequence[Tensor], counts: Sequence[int]) -> Sequence[Tensor]:
        """Send a flat piece to each process; what each of them has sent here, of which this one knows how much."""
        sent = torch.cat([*pieces])
        received = sent.new_empty(sum(counts))
        dist.all_to_all_single(received, sent, [*counts], [*map(len, pieces)], group=self.group)
        return torch.split(received, [*counts])

    def largest(self, x: Tensor) -> Tensor:
        """The largest of each number over the processes."""
        found = x.clone()
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.group)
        return found

    def everyone(self, x: Any) -> list[Any]:
        """What each process says, in the order of `ranks`; slow, for errors."""
        found: list[Any] = [None] * len(self.ranks)
        dist.all_gather_object(found, x, group=self.group)
        return found


def _again(ranks: tuple[int, ...]) -> Peers:
    """Processes out of a pickle.

    Raises:
        RuntimeError: torch.distributed has not been set up, or has too few processes.
    """
    if not dist.is_initialized() or max(ranks) >= dist.get_world_size():
        raise RuntimeError(
            f"this belongs to processes {', '.join(map(str, ranks))} of torch.distributed; load it there, after "
            "init_process_group"
        )
    return peers_with(ranks)


_made: dict[tuple[int, ...], tuple[dist.ProcessGroup | None, int]] = {}  # how often, in which world
_known: dict[tuple[int, ...], tuple[dist.ProcessGroup | None, Peers]] = {}


@lru_cache(maxsize=4096)  # torch makes the tensor of a mesh anew each time, and every parameter asks
def ranks_in(mesh: Any) -> tuple[int, ...]:
    """The global ranks in a `DeviceMesh`, in its order."""
    return tuple(map(int, mesh.mesh.flatten().tolist()))


def peers_of(mesh: Any) -> Peers:
    """The processes of a `DeviceMesh` of any number of dimensions; all of them ask at the same time."""
    return peers_with(tuple(sorted(ranks_in(mesh))), mesh)


def new_group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """A group of some processes, of which each calls this.

    They meet under its name. Before 2.14 torch names such a group by how many a process has, and processes that are in
    different groups wait for each other under different names; from then on by how many have been made, and counts this
    one, of which others do not know. Here the name follows from the ranks, and torch's count stays as it is.
    """
    world, count = _made.get(ranks, (None, 0))
    count = count + 1 if world is dist.group.WORLD else 1
    _made[ranks] = (dist.group.WORLD, count)
    name = f"emerging_optimizers_{'_'.join(map(str, ranks))}_{count}"
    where: Any = vars(dist.distributed_c10d)
    torchs, made = where["_hash_ranks_to_str"], where["_world"].group_count
    where["_hash_ranks_to_str"] = lambda _: name
    try:
        group: Any = dist.new_group(list(ranks), use_local_synchronization=True)  # a number where this is not in it
    finally:
        where["_hash_ranks_to_str"] = torchs
        where["_world"].group_count = made
    return group


def peers_with(ranks: tuple[int, ...], mesh: Any = None) -> Peers:
    """Some processes by their ranks, and a mesh of them, if there is one; all of them ask at the same time."""
    world, peers = _known.get(ranks, (None, None))
    if peers is None or world is not dist.group.WORLD:  # a later world has groups of its own
        if ranks == tuple(range(dist.get_world_size())):
            group = dist.distributed_c10d._get_default_group()
        elif mesh is not None and mesh.ndim == 1:
            group = mesh.get_group()
        else:
            group = new_group(ranks)
        peers = Peers(group)
        _known[ranks] = (dist.group.WORLD, peers)
    return peers
