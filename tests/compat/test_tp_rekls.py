"""TpRekls: on shards it is REKLS on the whole, whichever axis is cut and wherever; two gloo processes."""

import copy
import io
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from emerging_optimizers import SpikeWatch, create_optimizer
from emerging_optimizers.legacy_soap.tp_rekls import TpRekls, all_gather_grad_and_kronecker_factors_tp
from emerging_optimizers.soap import REKLS
from tests.distributed.processes import run

# What a process has of each: rows, columns, everything; two of one shape, which share a stack, and a batch.
EVEN = [((16, 8), 0), ((8, 16), 1), ((16, 8), 1), ((12, 6), 0), ((12, 6), 0), ((5, 7), None), ((3, 4, 8), 1)]
# Sides that two does not divide, in pieces of about two thirds and a third; a batch by rows, and a convolution.
UNEVEN = [((7, 4), 0), ((5, 9), 1), ((8, 4), 0), ((5, 4), None), ((3, 7, 4), 0), ((4, 5, 2, 2), 1)]


def normal(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shard(x: Tensor, dim: int | None, rank: int, even: bool = True) -> Tensor:
    if dim is None:
        return x
    axis = dim + (x.ndim == 3)
    cut = x.shape[axis] // 2 if even else (2 * x.shape[axis] + 2) // 3
    return (x.narrow(axis, 0, cut) if rank == 0 else x.narrow(axis, cut, x.shape[axis] - cut)).contiguous()


def make(
    layout: list[tuple[tuple[int, ...], int | None]], even: bool, group: Any, **options: Any
) -> tuple[TpRekls, list[nn.Parameter], REKLS, list[nn.Parameter]]:
    whole = [nn.Parameter(normal(i, shape)) for i, (shape, _) in enumerate(layout)]
    pairs = list(zip(whole, layout, strict=True))
    mine = [nn.Parameter(shard(p.detach(), dim, group.rank(), even).clone()) for p, (_, dim) in pairs]
    members = {dim: [i for i, (_, d) in enumerate(layout) if d == dim] for dim in (0, 1, None)}
    groups = [{"params": [mine[i] for i in some], "partition_dim": dim} for dim, some in members.items()]
    tp = TpRekls(groups, lr=0.02, tp_group=group, fp32_matmul_prec="highest", **options)
    return tp, mine, REKLS([{"params": [whole[i] for i in some]} for some in members.values()], 0.02, **options), whole


def everyone(x: Any) -> list[Any]:
    """What each of the two processes has."""
    found = [None, None]
    dist.all_gather_object(found, x)
    return found


def whole_state(optimizer: TpRekls, p: Tensor) -> dict[str, Tensor]:
    """That of the owner of a parameter; the other process has the same keys, and nothing under them."""
    ours, theirs = everyone(dict(optimizer.state[p]))
    assert ours.keys() == theirs.keys()
    (owner,) = (state for state in (ours, theirs) if all(x.numel() for x in state.values()))
    assert not any(x.numel() for state in (ours, theirs) if state is not owner for x in state.values())
    return owner


def trains_as_one(layout: list[Any], even: bool, options: dict[str, Any]) -> None:
    torch.set_float32_matmul_precision("highest")
    group = dist.new_group([0, 1])
    rank = group.rank()
    tp, mine, one, whole = make(layout, even, group, **options)
    watch = SpikeWatch(tp, every=2)  # what it cannot read of a shard it leaves out
    for step in range(6):
        for i, (p, q, (shape, dim)) in enumerate(zip(mine, whole, layout, strict=True)):
            q.grad = normal(100 * step + i, shape) * (1e4 if step == 3 and i == 1 else 1.0)
            if step == 4 and (i == 0 or dim is None):
                q.grad[..., 0, 0] = torch.nan  # of the first only one process sees it
            p.grad = shard(q.grad, dim, rank, even)
        tp.step()
        one.step()
    for p, q, (_, dim) in zip(mine, whole, layout, strict=True):
        torch.testing.assert_close(p.detach(), shard(q.detach(), dim, rank, even), rtol=1e-4, atol=1e-5)
    replicated = next(p for p, (_, dim) in zip(mine, layout, strict=True) if dim is None)
    ours, theirs = everyone(tp.guard_events())  # each says what it has worked on
    assert all(ours[name] == theirs[name] for name in ours.keys() & theirs.keys())
    assert {**ours, **theirs} == one.guard_events()
    assert whole_state(tp, mine[0])["step"] == tp.state[replicated]["step"] == 5
    watch.close()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo here")
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "spike_guard": 2.0}], ids=["plain", "guarded"])
@pytest.mark.parametrize(("layout", "even"), [(EVEN, True), (UNEVEN, False)], ids=["even", "uneven"])
def test_on_the_shards_of_two_processes_it_is_rekls_on_the_whole(
    layout: list[Any], even: bool, options: dict[str, Any]
) -> None:
    run(2, trains_as_one, layout, even, options)


def with_options_of_groups() -> None:
    """A period has the turns of the whole, l2 decay needs weights on the owner, bases may follow behind a step."""
    for options in (
        {"precondition_frequency": 3, "weight_decay": 0.1, "weight_decay_method": "l2"},
        {"overlap": True, "execution": "per_matrix"},
    ):
        trains_as_one(UNEVEN, False, options)


def test_options_of_rekls_hold_on_shards() -> None:
    run(2, with_options_of_groups)


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError, match=r".+") as caught:
        call()
    return str(caught.value)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def saved_by(optimizer: TpRekls) -> dict[str, Any]:
    """What a process reads from the file that it has written."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    found: dict[str, Any] = torch.load(file, weights_only=True)
    return found


def by_rows(state: dict[str, Tensor], rank: int, without: tuple[str, ...]) -> dict[str, Tensor]:
    """As the published class and our own first one keep it: factors and bases by rows, the rest whole."""
    sides = ("L", "R", "Q_L", "Q_R")
    return {key: x.chunk(2)[rank] if key in sides else x for key, x in state.items() if key not in without}


def resumes() -> list[str]:
    rank, group = dist.get_rank(), dist.new_group([0, 1])

    def fresh(p: Tensor) -> tuple[nn.Parameter, TpRekls]:
        q = nn.Parameter(p.detach().clone())
        return q, TpRekls([{"params": [q], "partition_dim": 0}], lr=0.1, tp_group=group)

    p, tp = fresh(shard(normal(0, (16, 8)), 0, rank))
    for step in range(3):
        p.grad = shard(normal(step, (16, 8)), 0, rank)
        tp.step()
    state = whole_state(tp, p)
    shapes = {key: tuple(x.shape) for key, x in state.items()}
    sides = {"L": (16, 16), "R": (8, 8), "Q_L": (16, 16), "Q_R": (8, 8), "eigvals_L": (16,), "eigvals_R": (8,)}
    assert shapes == {"step": (), "exp_avg": (16, 8), "exp_avg_sq": (16, 8), **sides}

    own = saved_by(tp)
    # Of the other process: then the owner has nothing of it, as where another run has other owners.
    checkpoints = [own, everyone(own)[1 - rank], {**own, "state": {0: state}}]
    # The published class makes the bases of the factors in every step, and our own first one kept no eigenvalues.
    for missing in (("Q_L", "Q_R", "eigvals_L", "eigvals_R"), ("eigvals_L", "eigvals_R"), ()):
        checkpoints.append({**own, "state": {0: by_rows(state, rank, missing)}})
    runs = [(p, tp)]
    for saved in checkpoints:
        q, optimizer = fresh(p)
        optimizer.load_state_dict(copy.deepcopy(saved))
        runs.append((q, optimizer))
    for x, optimizer in runs:
        x.grad = shard(normal(9, (16, 8)), 0, rank)
        optimizer.step()
        torch.testing.assert_close(x, p, rtol=1e-5, atol=1e-6)

    refusals = []
    has_nothing = next(x for x in everyone(own) if not x["state"][0]["L"].numel())
    for saved in (has_nothing, {**own, "state": {}} if rank else own):
        q, optimizer = fresh(p)
        refusals.append(refused(partial(optimizer.load_state_dict, saved)))
        assert not optimizer.state
    return refusals


def test_each_process_loads_what_it_or_an_earlier_release_has_written() -> None:
    for nobody, other in run(2, resumes):
        assert re.search("no process has loaded.*Load on each process the checkpoint that it has written", nobody)
        assert "ranks 0 and 1 load states of other parameters" in other


# ---- refusals -------------------------------------------------------------------------------------------------------


def refusals() -> dict[str, str]:
    rank, group = dist.get_rank(), dist.new_group([0, 1])

    def make(*shapes: tuple[int, ...], **options: Any) -> TpRekls:
        params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
        return TpRekls([{"params": params, "partition_dim": 0}], 0.1, tp_group=group, **options)

    raising = make((4, 4), nonfinite="raise")
    p = raising.param_groups[0]["params"][0]
    p.grad = torch.full((4, 4), torch.nan if rank else 1.0)
    said = {
        "sides": refused(lambda: make((3, 5 - rank))),
        "empty": refused(lambda: make((4, 4), (1 - rank, 5))),
        "count": refused(lambda: make(*[(3, 5)] * (rank + 1))),
        "raise": refused(raising.step),
    }
    assert torch.equal(p, torch.ones(4, 4))
    grouped = TpRekls([p], 0.1, tp_group=group)
    grouped.param_groups[0] |= {"matrix_view": ("heads", 3), "partition_dim": 0}  # which divides neither 4 nor 8
    p.grad = torch.ones(4, 4)
    said["view"] = refused(grouped.step)
    return said


def test_what_is_wrong_is_an_error_on_every_process() -> None:
    both = run(2, refusals)
    for said in both:
        assert "partition_dim=0 and is (3, 5) on rank 0, (3, 4) on rank 1; the shards of a matrix may" in said["sides"]
        assert "parameter 1 has partition_dim=0 and is (1, 5) on rank 0, (0, 5) on rank 1" in said["empty"]
        assert "has 1 new parameters on rank 0 and 2 on rank 1" in said["count"]
        assert "is not finite, and its group says nonfinite='raise'" in said["raise"]
        assert "does not fit 8 rows" in said["view"]
    assert "rank 1 cannot take this step" in both[0]["raise"]


# ---- functions, and one process -------------------------------------------------------------------------------------


def functions() -> None:
    rank, group = dist.get_rank(), dist.new_group([0, 1])
    G, L, R = normal(0, (6, 4)), normal(1, (6, 6)), normal(2, (4, 4))
    for dim in (0, 1):
        grad, factors = all_gather_grad_and_kronecker_factors_tp(
            [L.chunk(2)[rank].contiguous(), R.chunk(2)[rank].contiguous()], G.chunk(2, dim=dim)[rank], dim, group
        )
        assert torch.equal(grad, G)
        assert all(map(torch.equal, factors, (L, R)))


def test_published_functions_gather() -> None:
    run(2, functions)


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
