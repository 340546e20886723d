"""DTensor: the one module that imports it, and only once there is one, since the import takes a second."""

import sys
from collections.abc import Sequence
from functools import cached_property, lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from emerging_optimizers.distributed.groups import GATHERS, Peers, new_group, peers_with, ranks_in
from emerging_optimizers.distributed.plan import Box, Shard, Sharding, coordinates

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(x: Any) -> "TypeGuard[DTensor]":
    """Whether a tensor is sharded, or lies as copies, over a device mesh.

    Example:
        >>> import torch
        >>> is_dtensor(torch.zeros(2))
        False
    """
    module = sys.modules.get("torch.distributed.tensor")  # as long as nobody has imported it, there is none
    return module is not None and isinstance(x, module.DTensor)


def plain(name: str, placements: Sequence[Any], ndim: int) -> tuple[Shard | None, ...]:
    """torch's placements as plain data.

    Args:
        name: of the parameter.
        placements: `Replicate`, `Shard` or `_StridedShard`, one for each dimension of a mesh.
        ndim: how many dimensions the tensor has.

    Returns:
        For each a `Shard`, or None for `Replicate`.

    Raises:
        ValueError: another placement, such as `Partial`.

    Example:
        >>> import torch.distributed.tensor as dt
        >>> plain("weight", (dt.Replicate(), dt.Shard(-1)), 2)
        (None, Shard(dim=1, split_factor=1))
    """
    from torch.distributed.tensor import placement_types as kinds

    def one(placement: Any) -> Shard | None:
        if placement.is_replicate():
            return None
        if isinstance(placement, kinds.Shard | kinds._StridedShard):
            dim = placement.dim + ndim if placement.dim < 0 else placement.dim
            return Shard(dim, int(getattr(placement, "split_factor", 1)))
        raise ValueError(
            f"{name} has placement {placement}; a parameter may be Shard or Replicate in each dimension of its mesh, "
            "so redistribute it first"
        )

    return tuple(map(one, placements))


def sharding_of(name: str, x: "DTensor") -> Sharding:
    """How a DTensor lies on its mesh, after the checks that a plan needs.

    Args:
        name: of the parameter.
        x: the parameter.

    Raises:
        ValueError: a placement is `Partial`, the placements may name other elements than are held (`Sharding.check`),
            or this process holds another number of elements than they say.
    """
    mesh = x.device_mesh
    found = Sharding(tuple(x.shape), tuple(mesh.shape), plain(name, x.placements, x.ndim))
    found.check(name)
    if (coordinate := mesh.get_coordinate()) is not None:
        said, held = found.local_shape(tuple(coordinate)), x._local_tensor
        empty = 0 in said and held.numel() == 0  # torch gives an empty one any shape
        if not empty and said != tuple(held.shape):
            raise ValueError(
                f"{name}: a process holds {tuple(held.shape)} of {tuple(x.shape)}, and the placements "
                f"{tuple(map(str, x.placements))} on a mesh of {tuple(mesh.shape)} say {said}; make every sharded "
                "dimension divisible by the sizes of the mesh dimensions that cut it"
            )
    return found


class Spread:
    """How a tensor lies on processes, by their ranks; a DTensor, on those of its mesh.

    Attributes:
        shape: of the whole tensor.
        ranks: of the mesh, in the order of `plan.coordinates`.
        cut_axes: the axes along which it is cut.
        copies: how often the whole is there.
    """

    def __init__(self, sharding: Sharding, ranks: Sequence[int]) -> None:
        self._sharding, self.ranks = sharding, tuple(ranks)
        self.shape = sharding.shape
        self._coordinates = dict(zip(ranks, coordinates(sharding.mesh), strict=True))
        pairs = [*zip(sharding.mesh, sharding.placements, strict=True)]
        self.cut_axes = {shard.dim for size, shard in pairs if shard is not None and size > 1}
        self.copies = prod(size for size, shard in pairs if shard is None)

    @property
    def is_cut(self) -> bool:
        """Whether some process has only a part."""
        return bool(self.cut_axes)

    @cached_property
    def is_even(self) -> bool:
        """Whether all parts are equally large."""
        return len({sum(box.numel for box in self.boxes(rank)) for rank in self.ranks}) == 1

    @cached_property
    def reaches_all(self) -> bool:
        """Whether there is something on every process."""
        return all(self.boxes(rank) for rank in self.ranks)

    @property
    def kind(self) -> Any:
        """What two tensors have in common of which every process has the same parts."""
        return self._sharding, self.ranks

    def boxes(self, rank: int) -> tuple[Box, ...]:
        """What lies on a process."""
        return self._sharding.boxes(self._coordinates[rank])

    def indices(self, rank: int, axis: int) -> Tensor:
        """Which places along an axis lie on a process, in the order in which they lie there."""
        runs = {(box.local[axis], box.starts[axis], box.stops[axis]) for box in self.boxes(rank)}
        return torch.cat([torch.arange(start, stop, device="cpu") for _, start, stop in sorted(runs)])

    def copy_of(self, rank: int) -> tuple[int, ...]:
        """Of which of the copies a process has a part."""
        pairs = zip(self._coordinates[rank], self._sharding.placements, strict=True)
        return tuple(i for i, shard in pairs if shard is None)


def spread_of(name: str, x: "DTensor") -> Spread:
    """How a DTensor lies; see `sharding_of`."""
    return Spread(sharding_of(name, x), ranks_of(x))


def ranks_of(x: "DTensor") -> tuple[int, ...]:
    """The global ranks of a DTensor's mesh, in the order of `plan.coordinates`."""
    return ranks_in(x.device_mesh)


def piece_of(x: "DTensor", axis: int) -> tuple[int, int]:
    """Into how many pieces tensor parallelism has cut an axis, and with which of them this process computes.

    What FSDP2 has cut beside it (`_StridedShard`) is put together again for the computation.

    Returns:
        The number of pieces, and which of them; 1 and 0 where the axis is not cut.
    """
    mesh = x.device_mesh
    parts, index = 1, 0
    coordinate = mesh.get_coordinate() or [0] * mesh.ndim
    for size, i, shard in zip(mesh.shape, coordinate, plain("", x.placements, x.ndim), strict=True):
        if shard is not None and shard.dim == axis and shard.split_factor == 1:
            parts, index = parts * size, index * size + i
    return parts, index


def local_gradient(p: Tensor) -> Tensor | None:
    """The part of the gradient that belongs to what lies here of a parameter."""
    grad: Any = p.grad
    if grad is None or not is_dtensor(p):
        return grad
    if grad.placements != p.placements or grad.device_mesh != p.device_mesh:
        GATHERS.count += is_gathered(p)
        grad = grad.redistribute(p.device_mesh, p.placements)
    local = grad._local_tensor
    return local.wait() if hasattr(local, "wait") else local


def is_gathered(p: Tensor) -> bool:
    """Whether a gradient is cut where its parameter lies as copies, so that every process gets the whole of it."""
    grad: Any = p.grad
    if not is_dtensor(p) or not is_dtensor(grad):
        return False
    pairs = zip(p.placements, grad.placements, strict=False)
    return any(there.is_replicate() and not (cut.is_replicate() or cut.is_partial()) for there, cut in pairs)


def _spec(mesh: Any, placements: Sequence[Any], shape: Sequence[int], dtype: torch.dtype) -> Any:
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    stride = torch.empty(shape, device="meta").stride()
    return DTensorSpec(mesh, tuple(placements), tensor_meta=TensorMeta(torch.Size(shape), stride, dtype))


def as_sharded(local: Tensor, like: Any, shape: Sequence[int]) -> Tensor:
    """A DTensor around what lies here, with mesh and placements of another."""
    from torch.distributed.tensor import DTensor

    alike = local.dtype == like.dtype and tuple(shape) == tuple(like.shape) and like.is_contiguous()
    spec = like._spec if alike else _spec(like.device_mesh, like.placements, shape, local.dtype)
    return _around(DTensor, local, spec)


def _around(kind: Any, local: Tensor, spec: Any) -> Tensor:
    # `dcp.async_save` copies storages, and stumbles over a view that begins within one. It looks while the DTensor is
    # made, so the view comes afterwards.
    made = kind(torch.empty_like(local), spec, requires_grad=False)
    made._local_tensor = local
    return made


def on_owners(
    view: Tensor, device: torch.device, peers: Peers, owners: tuple[int, ...], shape: Sequence[int]
) -> Tensor:
    """A DTensor that lies on its owners alone, cut along its first axis where there are several."""
    from torch.distributed.tensor import Replicate, Shard

    mesh = _mesh(device.type, owners, peers)
    if view.device.type == "meta":
        view = torch.empty(0 if len(owners) == 1 else (0, *shape[1:]), dtype=view.dtype, device=device)
    spec = _spec(mesh, [Replicate() if len(owners) == 1 else Shard(0)], shape, view.dtype)
    made: Any = _around(_owner_tensor(), view, spec)
    made.peers, made.owners = peers, owners
    return made


@lru_cache(maxsize=4096)
def _mesh(device: str, ranks: tuple[int, ...], peers: Peers) -> Any:
    """Some of the processes, or all."""
    from torch.distributed.device_mesh import DeviceMesh

    if ranks == peers.ranks:
        return DeviceMesh.from_group(peers.group, device)
    if peers.rank not in ranks:
        return DeviceMesh(device, list(ranks), _init_backend=False)
    # torch sends what `set_optimizer_state_dict` is given through the group of the mesh, even if it has one process.
    return DeviceMesh.from_group(new_group(ranks), device)


@lru_cache(maxsize=1)
def _owner_tensor() -> Any:
    from torch.distributed.tensor import DTensor, Replicate

    class OwnerTensor(DTensor):
        """What its owners alone have; the other processes of `peers` hold nothing of it, and get it when all ask."""

        peers: Peers
        owners: tuple[int, ...]

        def redistribute(self, *args: Any, **kwargs: Any) -> Any:
            """The whole, on every process; all of them ask at the same time. (torch's copies stay on the mesh.)"""
            GATHERS.count += 1
            whole = torch.empty(self.shape, dtype=self.dtype, device=self._local_tensor.device)
            parts = [whole] if len(self.owners) == 1 else whole.chunk(len(self.owners))
            for owner, part in zip(self.owners, parts, strict=False):
                if owner == self.peers.rank:
                    part.copy_(self._local_tensor)
                dist.broadcast(part, owner, group=self.peers.group)
            mesh = _mesh(self.device_mesh.device_type, self.peers.ranks, self.peers)
            return DTensor.from_local(whole, mesh, [Replicate()], run_check=False)

        def __deepcopy__(self, memo: Any) -> Any:
            """A copy of what is here, on the same owners."""
            memo[id(self)] = made = _owned_again(self._local_tensor.clone(), *self._where())
            return made

        def __reduce_ex__(self, protocol: Any) -> Any:
            """What is here, and where it belongs; loaded by the same processes."""
            return _owned_again, (self._local_tensor, *self._where())

        def _where(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
            return self.peers.ranks, self.owners, tuple(self.shape)

        @property
        def is_meta(self) -> bool:  # type: ignore[override]  # read only in Python, too
            """Where it holds nothing, `set_optimizer_state_dict` would write into it all the same, were this False."""
            return self.peers.rank not in self.owners

    return OwnerTensor


def _owned_again(local: Tensor, ranks: tuple[int, ...], owners: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """A tensor on its owners out of a copy, a pickle or a file.

    Raises:
        RuntimeError: torch.distributed has not been set up, or has too few processes.
    """
    if not dist.is_initialized() or max(ranks) >= dist.get_world_size():
        raise RuntimeError(
            f"this optimizer state is spread over processes {', '.join(map(str, ranks))}, each of which has saved what "
            "it owns; load it there. For any other number of processes save it with torch.distributed.checkpoint, or "
            "whole (get_optimizer_state_dict with full_state_dict=True)"
        )
    return on_owners(local, local.device, peers_with(ranks), owners, shape)


torch.serialization.add_safe_globals([_owned_again])  # for torch.load(weights_only=True)


def is_sharded(x: Any, like: Any) -> bool:
    """Whether a tensor lies like another one."""
    return is_dtensor(x) and x.device_mesh == like.device_mesh and x.placements == like.placements


def local_of(x: Any) -> Tensor:
    """What lies here of a DTensor; all of another tensor."""
    local: Tensor = x._local_tensor if is_dtensor(x) else x
    return local


def cut_out(whole: Tensor, boxes: Sequence[Box], local: Tensor) -> Tensor:
    """Of a whole tensor the boxes that lie here, shaped like what is stored here."""
    found = torch.empty(local.shape, dtype=whole.dtype, device=local.device)
    for box in boxes:
        found[box.local_slices] = whole[box.slices]
    return found


def whole_of(x: Any) -> Tensor:
    """All of a tensor, on every process that asks; all of those that share it ask at the same time."""
    if not is_dtensor(x):
        return x
    GATHERS.count += not hasattr(x, "owners")  # those count for themselves
    return x.full_tensor()


def norm_of(x: Any) -> float:
    """The norm of all of a tensor; those that share it ask at the same time, and get the same number."""
    square = local_of(x.detach()).norm(dtype=torch.promote_types(x.dtype, torch.float32)).square()
    if is_dtensor(x):
        for group, placement in zip(x.device_mesh.get_all_groups(), x.placements, strict=True):
            if not placement.is_replicate():
                dist.all_reduce(square, group=group)
    return float(square.sqrt())
