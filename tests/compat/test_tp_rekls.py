"""TpRekls: on shards it is REKLS on the whole, whichever axis is cut; two gloo processes."""

import copy
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from emerging_optimizers import SpikeWatch, create_optimizer
from emerging_optimizers.legacy_soap.tp_rekls import TpRekls, all_gather_grad_and_kronecker_factors_tp
from emerging_optimizers.soap import REKLS

# What a process has of each: rows, columns, everything; two of one shape, which share a stack, and a batch.
LAYOUT = [((16, 8), 0), ((8, 16), 1), ((16, 8), 1), ((12, 6), 0), ((12, 6), 0), ((5, 7), None), ((3, 4, 8), 1)]


def normal(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shard(x: Tensor, dim: int | None, rank: int) -> Tensor:
    return x if dim is None else x.chunk(2, dim=dim - 2)[rank].contiguous()


def make(rank: int, group: Any, **options: Any) -> tuple[TpRekls, list[nn.Parameter], REKLS, list[nn.Parameter]]:
    whole = [nn.Parameter(normal(i, shape)) for i, (shape, _) in enumerate(LAYOUT)]
    mine = [nn.Parameter(shard(p.detach(), dim, rank).clone()) for p, (_, dim) in zip(whole, LAYOUT, strict=True)]
    groups = [
        {"params": [p for p, (_, d) in zip(mine, LAYOUT, strict=True) if d == dim], "partition_dim": dim}
        for dim in (0, 1, None)
    ]
    tp = TpRekls(groups, lr=0.02, tp_group=group, fp32_matmul_prec="highest", **options)
    return tp, mine, REKLS(whole, lr=0.02, **options), whole


def _on_two_ranks(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=120), world_size=2, rank=rank)
    try:
        group = dist.new_group([0, 1])
        for options in ({}, {"weight_decay": 0.1, "spike_guard": 2.0}):
            _trains_as_one(rank, group, options)
        _sharded_state_has_the_published_shapes_and_resumes(rank, group)
        _refusals(group)
        _functions(rank, group)
    finally:
        dist.destroy_process_group()


def _trains_as_one(rank: int, group: Any, options: dict[str, Any]) -> None:
    tp, mine, one, whole = make(rank, group, **options)
    watch = SpikeWatch(tp, every=2)  # what it cannot read of a shard it leaves out
    for step in range(6):
        for i, (p, q, (shape, dim)) in enumerate(zip(mine, whole, LAYOUT, strict=True)):
            q.grad = normal(100 * step + i, shape) * (1e4 if step == 3 and i == 1 else 1.0)
            if step == 4 and i in (0, 5):
                q.grad[..., 0, 0] = torch.nan  # of the first only one process sees it
            p.grad = shard(q.grad, dim, rank)
        tp.step()
        one.step()
    for p, q, (_, dim) in zip(mine, whole, LAYOUT, strict=True):
        torch.testing.assert_close(p.detach(), shard(q.detach(), dim, rank), rtol=1e-4, atol=1e-5)
    counts = [int(x) for x in torch.tensor(list(tp.guard_events().values())).sum(dim=0)]
    assert counts == [int(x) for x in torch.tensor(list(one.guard_events().values())).sum(dim=0)]
    assert tp.state[mine[0]]["step"] == tp.state[mine[5]]["step"] == 5
    watch.close()


def _sharded_state_has_the_published_shapes_and_resumes(rank: int, group: Any) -> None:
    p = nn.Parameter(shard(normal(0, (16, 8)), 0, rank))
    tp = TpRekls([{"params": [p], "partition_dim": 0}], lr=0.1, tp_group=group)
    for step in range(3):
        p.grad = shard(normal(step, (16, 8)), 0, rank)
        tp.step()
    shapes = {key: tuple(x.shape) for key, x in tp.state[p].items()}
    half = {"L": (8, 16), "R": (4, 8), "Q_L": (8, 16), "Q_R": (4, 8)}
    whole = {"eigvals_L": (16,), "eigvals_R": (8,)}
    assert shapes == {"step": (), "exp_avg": (16, 8), "exp_avg_sq": (16, 8), **half, **whole}

    runs = [(p, tp)]
    # The published class makes the bases of the factors in every step, and our own first one kept no eigenvalues.
    for missing in ("Q_L", "Q_R", "eigvals_L", "eigvals_R"), ("eigvals_L", "eigvals_R"):
        saved = copy.deepcopy(tp.state_dict())
        for key in missing:
            del saved["state"][0][key]
        q = nn.Parameter(p.detach().clone())
        runs.append((q, TpRekls([{"params": [q], "partition_dim": 0}], lr=0.1, tp_group=group)))
        runs[-1][1].load_state_dict(saved)
    for x, optimizer in runs:
        x.grad = shard(normal(9, (16, 8)), 0, rank)
        optimizer.step()
        torch.testing.assert_close(x, p, rtol=1e-5, atol=1e-6)


def _refusals(group: Any) -> None:
    for shape, options, match in (
        ((3, 5), {}, r"a shard of a 6 x 5 matrix.*multiples of the 2 processes"),
        ((4, 4), {"nonfinite": "raise"}, "nonfinite='raise' is not possible with partition_dim=0 over 2 processes"),
        ((4, 4), {"execution": "compiled"}, "execution='compiled' is not possible with partition_dim=0"),
    ):
        with pytest.raises(ValueError, match=match):
            TpRekls([{"params": [nn.Parameter(torch.ones(shape))], "partition_dim": 0}], 0.1, tp_group=group, **options)


def _functions(rank: int, group: Any) -> None:
    G, L, R = normal(0, (6, 4)), normal(1, (6, 6)), normal(2, (4, 4))
    for dim in (0, 1):
        grad, factors = all_gather_grad_and_kronecker_factors_tp(
            [L.chunk(2)[rank].contiguous(), R.chunk(2)[rank].contiguous()], G.chunk(2, dim=dim)[rank], dim, group
        )
        assert torch.equal(grad, G)
        assert all(map(torch.equal, factors, (L, R)))


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo here")
def test_on_the_shards_of_two_processes_it_is_rekls_on_the_whole(tmp_path):
    mp.spawn(_on_two_ranks, args=(str(tmp_path / "store"),), nprocs=2)


@pytest.mark.parametrize("partition_dim", [None, 0, 1])
def test_without_a_group_it_is_rekls(partition_dim):
    p, q = nn.Parameter(normal(0, (6, 4))), nn.Parameter(normal(0, (6, 4)))
    tp = TpRekls([{"params": [p], "partition_dim": partition_dim}], 0.1, tp_group=None, weight_decay_method="palm")
    one = REKLS([q], 0.1, weight_decay_method="palm")
    for step in range(4):
        p.grad, q.grad = normal(step, (6, 4)), normal(step, (6, 4))
        tp.step()
        one.step()
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_model_does_not_say_how_it_is_sharded():
    with pytest.raises(ValueError, match="tp_group is not possible for a model"):
        create_optimizer("tp_rekls", nn.Linear(4, 4), lr=0.1, tp_group=object())


def test_partition_dim_is_checked():
    with pytest.raises(ValueError, match=r"partition_dim=2 .*give one of None, 0, 1"):
        TpRekls([{"params": [nn.Parameter(torch.ones(2, 2))], "partition_dim": 2}], 0.1, tp_group=None)
