"""Which parts of a tensor each process holds, against index tensors and torch's own shards; who works on what."""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
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

from emerging_optimizers.cost.ledger import Update
from emerging_optimizers.cost.models import MODELS
from emerging_optimizers.distributed.dtensor import Spread, plain, ranks_of, sharding_of
from emerging_optimizers.distributed.owners import Job, Span, least_load, owners_of_batch, share_out
from emerging_optimizers.distributed.plan import Shard, Sharding, coordinates
from emerging_optimizers.distributed.table import WorkPlan, entry_of, unshared


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


def loads_of(jobs: Sequence[Job], spans: Sequence[Sequence[Span]], ranks: int) -> list[int]:
    loads = [0] * ranks
    for job, some in zip(jobs, spans, strict=True):
        assert [entry for s in some for entry in range(s.start, s.stop)] == [*range(job.size)]
        for span in some:
            loads[span.rank] += job.piece(span.stop - span.start)
    return loads


def share(costs: Sequence[int], ranks: int) -> tuple[int, int]:
    """The largest load, and the least that it could be by the bound."""
    jobs = [Job(1, cost) for cost in costs]
    spans = share_out(jobs, dict.fromkeys(range(ranks), 0))
    assert spans == share_out(jobs, dict.fromkeys(range(ranks), 0))
    return max(loads_of(jobs, spans, ranks)), least_load(costs, ranks)


def best(costs: Sequence[int], ranks: int) -> int:
    """By trying everything."""
    return min(max(loads_of([Job(1, c) for c in costs], [[Span(r, 0, 1)] for r in owners], ranks))
               for owners in product(range(ranks), repeat=len(costs)))  # fmt: skip


def test_no_owners_are_below_the_bound() -> None:
    rng = random.Random(0)
    reached = 0
    for _ in range(60):
        costs = [rng.choice((3, 5, 8, 11, 20)) for _ in range(rng.randint(1, 7))]
        ranks = rng.randint(1, 3)
        found, bound = share(costs, ranks)
        least = best(costs, ranks)
        assert bound <= least <= found <= 1.15 * least
        reached += bound == least
    assert reached > 50


@pytest.mark.parametrize("ranks", [8, 64, 256])
@pytest.mark.parametrize("model", ["gpt2-small", "llama-7b", "llama-70b"])
@pytest.mark.parametrize("optimizer", ["muon", "soap", "shampoo", "psgd_pro"])
def test_owners_are_balanced_or_as_even_as_whole_matrices_can_be(optimizer: str, model: str, ranks: int) -> None:
    needs = Update(optimizer).needs
    hidden = [w for w in MODELS[model].weights() if w.is_hidden]
    costs = [round(needs.cost(w.shape)) for w in hidden for _ in range(w.number)]
    found, bound = share(costs, ranks)
    # 70B on 256: 240 large matrices leave 16 ranks for 160 of three eighths of their work: some rank has one of each.
    assert found <= 1.1 * max(sum(costs) / ranks, *costs) or found <= 1.002 * bound


def test_changing_places_helps_where_the_longest_first_does_not() -> None:
    costs = [1379] * 128 + [1000] * 96  # of Shampoo on Llama-7B: the longest first is 1.117
    assert share(costs, 64)[0] / (sum(costs) / 64) < 1.03


def test_a_batch_goes_to_processes_that_lie_behind_each_other() -> None:
    jobs = [Job(1, 100), Job(8, 80, 4), Job(5, 50, 3), Job(1, 3)]
    assert [owners_of_batch(size, 4) for size in (8, 5, 2)] == [4, 3, 2]
    spans = share_out(jobs, dict.fromkeys(range(4, 12), 0))
    assert [[span.rank for span in some] for some in spans] == [[4], [8, 9, 10, 11], [7, 8, 9], [5]]
    assert [span.stop - span.start for span in spans[2]] == [2, 2, 1]


def test_a_process_that_has_work_gets_less() -> None:
    assert share_out([Job(1, 10)] * 3, {0: 25, 1: 0}) == [[Span(1, 0, 1)]] * 3
    with pytest.raises(ValueError, match="1 processes for 2 owners"):
        share_out([Job(2, 2, 2)], {0: 0})
    assert share_out([], {0: 0}) == []
    assert least_load([], 3) == 0


def test_thousands_of_processes_share_out_in_no_time() -> None:
    rng = random.Random(0)
    costs = [rng.choice((3, 50, 80, 1100, 2000)) * 10**9 for _ in range(12000)]
    found, bound = share(costs, 4096)
    assert found <= 1.02 * bound


# --- written down -------------------------------------------------------------------------------------


def test_a_plan_names_owners_bytes_collectives_and_the_matrix_that_is_the_bound() -> None:
    needs = Update("muon").needs
    rows = Sharding((8, 6), (2, 2), (None, Shard(0)))  # two replicas of two shards
    spread = Spread(rows, range(4))
    entry = entry_of("w", spread, needs, [Span(3, 0, 8)], torch.bfloat16)
    assert (entry.owners, entry.ranks, entry.work) == ((3,), (0, 1, 2, 3), "one owner")
    # Half of 48 elements lies elsewhere in the owner's replica; the direction goes, in float32, to three other halves.
    assert (entry.fetched, entry.delivered) == (24 * 2, 72 * 4)
    assert entry.collective == "an all-to-all each way"
    stack = Spread(Sharding((4, 8, 6), (4,), (Shard(1),)), range(4))
    batch = entry_of("e", stack, needs, [Span(r, r, r + 1) for r in range(4)], torch.float32)
    assert (batch.owners, batch.fetched, batch.delivered) == ((0, 1, 2, 3), 3 * 48 * 4, 3 * 48 * 4)
    local = entry_of("l", Spread(Sharding((4, 8, 6), (4,), (Shard(0),)), range(4)), needs, [], torch.float32)
    assert (local.owners, local.collective, local.reason) == ((), "none", "no matrix is cut: each process has some")
    text = str(WorkPlan(entries=(entry, batch, local, unshared("s", ()))))
    assert "One matrix is the bound" not in text
    assert "No parameter is gathered to every rank." in text
    alone = str(WorkPlan(entries=(entry,)))
    assert re.search(r"^w +8x6 +rank 3 +48 B +288 B +an all-to-all each way +it is cut", alone, re.MULTILINE)
    assert "balance 1.00. One matrix is the bound: w (8, 6) has 4.00 times the mean alone." in alone
    assert "is whole on each process" in str(WorkPlan(entries=(unshared("s", ()),)))
