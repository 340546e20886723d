"""Which parts of a tensor each process holds, against index tensors and torch's own shards; who works on what."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as TorchShard
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from emerging_optimizers.distributed.dtensor import plain, ranks_of, sharding_of
from emerging_optimizers.distributed.plan import Shard, Sharding, balance, coordinates, share_out


def assembled(sharding: Sharding, whole: Tensor, coordinate: tuple[int, ...]) -> Tensor:
    """The local tensor there, put together from its boxes."""
    local = whole.new_full(sharding.local_shape(coordinate), -1)
    for box in sharding.boxes(coordinate):
        assert box.numel == whole[box.slices].numel() > 0
        local[box.local_slices] = whole[box.slices]
    return local


def by_index(sharding: Sharding, whole: Tensor, coordinate: tuple[int, ...]) -> Tensor:
    """The same with `torch.chunk`, one placement after the other."""

    def piece(x: Tensor, parts: int, i: int, dim: int) -> Tensor:
        chunks = torch.chunk(x, parts, dim)
        return chunks[i] if i < len(chunks) else x.narrow(dim, 0, 0)

    for parts, i, shard in zip(sharding.mesh, coordinate, sharding.placements, strict=True):
        if shard is not None:
            pieces = [piece(whole, shard.split_factor, j, shard.dim) for j in range(shard.split_factor)]
            whole = torch.cat([piece(x, parts, i, shard.dim) for x in pieces], shard.dim)
    return whole


def test_boxes_are_what_chunks_of_an_index_tensor_hold() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        shape = tuple(rng.randint(0, 13) for _ in range(rng.randint(1, 3)))
        mesh = tuple(rng.randint(1, 4) for _ in range(rng.randint(1, 3)))
        kinds = [None, *(Shard(d, f) for d in range(len(shape)) for f in (1, 1, 2, 3, 5))]
        sharding = Sharding(shape, mesh, tuple(rng.choice(kinds) for _ in mesh))
        whole = torch.arange(prod(shape)).view(shape)
        coordinate = tuple(map(rng.randrange, mesh))
        local = assembled(sharding, whole, coordinate)
        expected = by_index(sharding, whole, coordinate)
        assert local.numel() == expected.numel(), (sharding, coordinate)
        assert local.numel() == 0 or torch.equal(local, expected), (sharding, coordinate)

        count = torch.zeros(shape, dtype=torch.int64)
        for member in sharding.replica(coordinate):
            for box in sharding.boxes(member):
                count[box.slices] += 1
        assert (count == 1).all(), sharding  # a replica holds the whole once
        assert all(sharding.boxes(c) == sharding.boxes(coordinate) for c in sharding.copies(coordinate))
        assert len(sharding.copies(coordinate)) * len(sharding.replica(coordinate)) == prod(mesh)


# --- against torch ------------------------------------------------------------------------------------


@contextmanager
def pretending(rank: int, mesh: tuple[int, ...], names: tuple[str, ...]) -> Iterator[DeviceMesh]:
    """To be one of many processes that do not exist."""
    dist.init_process_group("fake", rank=rank, world_size=prod(mesh), store=FakeStore())
    try:
        yield init_device_mesh("cpu", mesh, mesh_dim_names=names)
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # it remembers meshes, and with them which process this was


def layer(rows: int, columns: int) -> nn.Module:
    """One whose weight says where its elements come from."""
    model = nn.Sequential(nn.Linear(columns, rows, bias=False))
    model[0].weight = nn.Parameter(torch.arange(float(rows * columns)).view(rows, columns))
    return model


class Experts(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(float(prod(shape))).view(shape))


def fsdp(mesh: DeviceMesh, rows: int, columns: int) -> nn.Module:
    return fully_shard(layer(rows, columns), mesh=mesh)


def tensor_parallel(style: type) -> Callable[..., nn.Module]:
    def make(mesh: DeviceMesh, rows: int, columns: int) -> nn.Module:
        return parallelize_module(layer(rows, columns), mesh["tp"], {"0": style()}, src_data_rank=None)

    return make


def fsdp_with(style: type) -> Callable[..., nn.Module]:
    def make(mesh: DeviceMesh, rows: int, columns: int) -> nn.Module:
        dp = tuple(name for name in mesh.mesh_dim_names or () if name != "tp")
        return fully_shard(tensor_parallel(style)(mesh, rows, columns), mesh=mesh[dp if len(dp) > 1 else dp[0]])

    return make


def fsdp_columns(mesh: DeviceMesh, rows: int, columns: int) -> nn.Module:
    return fully_shard(layer(rows, columns), mesh=mesh, shard_placement_fn=lambda p: TorchShard(1))


def expert_parallel(dim: int) -> Callable[..., nn.Module]:
    def make(mesh: DeviceMesh, *shape: int) -> nn.Module:
        model = Experts(*shape)
        sharded = distribute_tensor(model.weight, mesh["ep"], [TorchShard(0)], src_data_rank=None)
        model.weight = nn.Parameter(sharded)
        return fully_shard(model, mesh=mesh["dp"], shard_placement_fn=lambda p: TorchShard(dim))

    return make


LAYOUTS = {
    "fsdp": (("dp",), (4,), fsdp, (8, 3)),
    "fsdp uneven": (("dp",), (4,), fsdp, (9, 3)),
    "fsdp empty": (("dp",), (4,), fsdp, (2, 5)),
    "fsdp columns": (("dp",), (3,), fsdp_columns, (2, 6)),
    "hsdp": (("replicate", "dp"), (2, 3), fsdp, (7, 2)),
    "colwise": (("tp",), (3,), tensor_parallel(ColwiseParallel), (7, 4)),
    "rowwise": (("tp",), (3,), tensor_parallel(RowwiseParallel), (4, 7)),
    "fsdp x colwise": (("dp", "tp"), (2, 2), fsdp_with(ColwiseParallel), (10, 3)),
    "fsdp x colwise, few rows": (("dp", "tp"), (4, 2), fsdp_with(ColwiseParallel), (4, 3)),
    "fsdp x rowwise": (("dp", "tp"), (3, 2), fsdp_with(RowwiseParallel), (7, 5)),
    "hsdp x colwise": (("replicate", "dp", "tp"), (2, 2, 2), fsdp_with(ColwiseParallel), (12, 3)),
    "experts": (("dp", "ep"), (2, 2), expert_parallel(0), (8, 3, 2)),
    "experts, rows": (("dp", "ep"), (2, 3), expert_parallel(1), (7, 4, 2)),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_boxes_are_what_torch_holds(case: str) -> None:
    names, mesh_shape, make, shape = LAYOUTS[case]
    whole = torch.arange(float(prod(shape))).view(shape)
    for rank, coordinate in enumerate(coordinates(mesh_shape)):
        with pretending(rank, mesh_shape, names) as mesh:
            (p,) = make(mesh, *shape).parameters()
            assert isinstance(p, DTensor)
            sharding = sharding_of("weight", p)
            assert ranks_of(p) == tuple(range(prod(mesh_shape)))
            local = p.to_local()
            if local.numel():
                assert local.shape == sharding.local_shape(coordinate)
                assert torch.equal(local, assembled(sharding, whole, coordinate))
            else:
                assert sharding.boxes(coordinate) == ()


def test_the_check_refuses_what_torch_describes_wrongly_and_nothing_else() -> None:
    refused = 0
    for dp, tp in ((2, 2), (3, 2), (2, 3), (3, 4)):
        for rows in (*range(1, 14), 27):
            wrong, sharding = False, Sharding((rows, 2), (dp, tp), (Shard(0, tp), Shard(0)))
            whole = torch.arange(rows * 2).view(rows, 2)
            for coordinate in coordinates((dp, tp)):  # FSDP2 cuts what tensor parallelism has cut
                held = by_index(Sharding((rows, 2), (tp, dp), (Shard(0), Shard(0))), whole, coordinate[::-1])
                wrong |= not torch.equal(held, assembled(sharding, whole, coordinate))
            if wrong:
                refused += 1
                with pytest.raises(ValueError, match=f"layer.weight: FSDP2 .* divisible by {tp}"):
                    sharding.check("layer.weight")
            else:
                sharding.check("layer.weight")
    assert refused > 2


def test_a_real_wrong_description_is_refused() -> None:
    with pretending(0, (3, 2), ("dp", "tp")) as mesh:
        (p,) = fsdp_with(ColwiseParallel)(mesh, 7, 3).parameters()
        with pytest.raises(ValueError, match=r"0\.weight: FSDP2 over 3 processes"):
            sharding_of("0.weight", p)


def test_what_cannot_be_a_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"w has placement .*; a parameter may be Shard or Replicate"):
        plain("w", (Replicate(), Partial()), 2)
    with pytest.raises(ValueError, match=r"w: Shard\(dim=2.*from 0 to 1"):
        Sharding((3, 3), (2,), (Shard(2),)).check("w")
    with pytest.raises(ValueError, match="1 placements for a mesh of 2"):
        Sharding((3, 3), (2, 2), (None,)).check("w")


def test_local_tensors_of_another_size_are_refused() -> None:
    with pretending(0, (2,), ("dp",)) as mesh:
        odd = DTensor.from_local(torch.zeros(3, 2), mesh, [TorchShard(0)], shape=(8, 2), stride=(2, 1), run_check=False)
        with pytest.raises(ValueError, match=r"w: a process holds \(3, 2\) of \(8, 2\).* say \(4, 2\)"):
            sharding_of("w", odd)


def test_thousands_of_processes_take_no_time() -> None:
    uneven = Sharding((4097, 4096), (64, 64), (Shard(0, 64), Shard(1)))
    uneven.check("w")
    assert sum(box.numel for c in coordinates(uneven.mesh) for box in uneven.boxes(c)) == 4097 * 4096
    both = Sharding((8192, 1024), (64, 64), (Shard(0, 64), Shard(0)))
    both.check("w")
    assert {both.local_shape(c) for c in coordinates(both.mesh)} == {(2, 1024)}


# --- owners -------------------------------------------------------------------------------------------


def transformer(layers: int, *shapes: tuple[int, int]) -> list[float]:
    """Costs of a step: max(M, N) min(M, N)^2."""
    return [float(max(shape) * min(shape) ** 2) for shape in shapes] * layers


MODELS = {
    "gpt2-small": transformer(12, *[(768, 768)] * 4, (3072, 768), (768, 3072)),
    "llama-7b": transformer(32, *[(4096, 4096)] * 4, *[(11008, 4096)] * 2, (4096, 11008)),
    "70b": transformer(80, (8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), *[(28672, 8192)] * 2, (8192, 28672)),
}


@pytest.mark.parametrize("ranks", [8, 64, 256])
@pytest.mark.parametrize("model", MODELS)
def test_owners_are_balanced(model: str, ranks: int) -> None:
    costs = MODELS[model]
    owners = share_out(costs, ranks)
    assert owners == share_out(costs, ranks)
    # 70B on 256: 240 large matrices leave 16 ranks for 160 of two sevenths their work, so some rank has one of each.
    assert balance(costs, owners, ranks) <= (1.15 if (model, ranks) == ("70b", 256) else 1.1)


def test_equal_jobs_are_spread_evenly() -> None:
    for cost in (0.0, 2.0):
        owners = share_out([cost] * 10, 4)
        assert sorted(owners.count(rank) for rank in range(4)) == [2, 2, 3, 3]
        assert owners[:4] == [0, 1, 2, 3]


def test_a_rank_that_has_work_gets_less() -> None:
    assert share_out([1.0, 1.0, 1.0], 2, loads=[2.5, 0.0]) == [1, 1, 1]
    with pytest.raises(ValueError, match="ranks=2 and 1 loads"):
        share_out([1.0], 2, loads=[0.0])
    with pytest.raises(ValueError, match="ranks=0"):
        share_out([1.0], 0)
    assert balance([], [], 3) == balance([0.0], [0], 3) == 1.0
