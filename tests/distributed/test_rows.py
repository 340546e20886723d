"""Rules that pick rows of a matrix: only those travel, and what becomes of it is what it is in one process."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from emerging_optimizers import Dion2, Dion3, Muon
from emerging_optimizers.distributed.dtensor import local_of
from emerging_optimizers.engine import Step
from emerging_optimizers.orthogonalized_optimizers.dion2 import Dion2Rule
from emerging_optimizers.testing import assert_same_as_one_process
from emerging_optimizers.testing.one_process import part_of
from tests.distributed.processes import gradients, run
from tests.engine.test_factorizations import ROUTINES, Fault

SHAPES = {"wide": (16, 40), "tall": (40, 16), "square": (24, 24), "again": (24, 24), "odd": (13, 11), "few": (2, 30)}


class Matrices(nn.Module):
    """Wide and tall ones, some that no number of processes divides, one with fewer rows than there are processes."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, shape in SHAPES.items():
            setattr(self, name, nn.Parameter(torch.randn(shape).to(dtype)))


def lay(placements: Callable[[Any], list[Any]], mesh_shape: tuple[int, ...], model: nn.Module) -> None:
    """Cut every matrix of a model."""
    import torch.distributed.tensor as dt
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", mesh_shape)
    for name, p in [*model.named_parameters()]:
        setattr(model, name, nn.Parameter(dt.distribute_tensor(p.data, mesh, placements(dt))))


LAYOUTS = {
    "rows": partial(lay, lambda dt: [dt.Shard(0)], (4,)),
    "columns": partial(lay, lambda dt: [dt.Shard(1)], (4,)),
    "replicas": partial(lay, lambda dt: [dt.Replicate(), dt.Shard(0)], (2, 2)),
    "both": partial(lay, lambda dt: [dt.Shard(0), dt.Shard(1)], (2, 2)),
    "rows_twice": partial(lay, lambda dt: [dt.Shard(0), dt.Shard(0)], (2, 2)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "each_alone": {"execution": "per_matrix"},
    "compiled": {"execution": "compiled"},
    "l2, up": {"weight_decay": 0.1, "weight_decay_method": "l2", "maximize": True},
    "low state": {"state_dtype": torch.bfloat16},
    "int8": {"state_dtype": "int8"},
    "offload": {"offload": "cpu"},
    "spikes": {"spike_guard": 1.05},
}


def compare(layouts: Sequence[str], names: Sequence[str]) -> list[str]:
    """Which optimizers, layouts and options differ from one process."""
    from emerging_optimizers.engine import packing

    packing.LEAST = packing.LEAST_ROW = 1  # the matrices are small
    found = []
    for kind, layout, name in product((Dion2, Dion3), layouts, names):
        given = {"fp32_matmul_prec": "highest", "fraction": 0.3, "lr": 0.05, **OPTIONS[name]}
        try:
            assert_same_as_one_process(
                Matrices, lambda m, kind=kind, given=given: kind(m.parameters(), **given), LAYOUTS[layout], steps=4
            )
        except Exception as error:  # of whatever kind: it is told of which options it is
            found.append(f"{kind.__name__}, {layout}, {name}: {type(error).__name__}: {error}")
    return found


def test_several_processes_are_as_one() -> None:
    assert run(4, compare, ["rows", "both"], ["plain", "int8"]) == [[]] * 4


@pytest.mark.slow  # two layouts and some options run every day
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_processes_are_as_one_with_every_option(layout: str) -> None:
    assert run(4, compare, [layout], [*OPTIONS], timeout=1000) == [[]] * 4


def step_of(optimizer: torch.optim.Optimizer, model: nn.Module, step: int = 0) -> None:
    given = gradients(step, {name: torch.Size(SHAPES[name]) for name, _ in model.named_parameters()})
    for name, p in model.named_parameters():
        p.grad = part_of(given[name].to(p.dtype), p)
    optimizer.step()


def traffic(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[int]:
    """How many numbers this process puts into each exchange of a step."""
    sent: list[int] = []
    original = dist.all_to_all_single

    def counted(received: Tensor, given: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(given.numel())
        return original(received, given, *args, **kwargs)

    step_of(optimizer, model)
    dist.all_to_all_single = counted
    try:
        step_of(optimizer, model, 1)
    finally:
        dist.all_to_all_single = original
    return sent


def travels() -> tuple[int, int, int, list[bool]]:
    """Numbers that this process sends in a step of Muon, of Dion2, bytes of the plan; where Dion2's momentum lies."""
    whole, some = Matrices(torch.float32), Matrices(torch.float32)
    for model in (whole, some):
        del model.few, model.odd
        LAYOUTS["rows"](model)
    optimizer = Dion2(some.parameters(), lr=0.01, fraction=0.25)
    counts = sum(traffic(Muon(whole.parameters(), lr=0.01), whole)), sum(traffic(optimizer, some))
    lies = [
        optimizer.state[p]["momentum_buffer"].placements == p.placements
        and local_of(optimizer.state[p]["momentum_buffer"]).shape == local_of(p).shape
        for p in some.parameters()
    ]
    return *counts, sum(entry.fetched + entry.delivered for entry in optimizer.plan), lies


def test_only_the_rows_that_are_picked_travel() -> None:
    everyone = run(4, travels)
    elements = 2 * (16 * 40 + 24 * 24)  # of four matrices; a quarter of the shorter side of each is picked
    words = 4 * 4  # of each matrix to each process
    assert sum(few for _, few, _, _ in everyone) == 2 * elements // 4 + words
    assert sum(all_ for all_, _, _, _ in everyone) >= 2 * elements
    assert {planned for _, _, planned, _ in everyone} == {
        2 * elements // 4 * 3 // 4 * 4
    }  # three quarters leave, 4 bytes
    assert all(all(lies) for *_, lies in everyone)


class Failing(Dion2):
    """It fails where it is told to: in its map, or before a process says of its part how long rows are."""

    fails = ""

    class rule(Dion2Rule):
        """The same, but for that."""

        def orthogonalize(self, x_BMN: Tensor, t: Any) -> Tensor:
            if Failing.fails == "owner":
                raise torch.OutOfMemoryError("no memory left")
            return super().orthogonalize(x_BMN, t)

        def count(self, rows: int) -> int:
            if Failing.fails == "part":
                raise torch.OutOfMemoryError("no memory left")
            return super().count(rows)


def failing(where: str) -> tuple[str, list[str], list[str]]:
    """What a step raises where one process fails, what has moved all the same, and what moves in the next step."""
    model = Matrices()
    LAYOUTS["rows"](model)
    optimizer = Failing(model.named_parameters(), lr=0.01)
    step_of(optimizer, model)
    Failing.fails = where if dist.get_rank() == 1 else ""
    before = parts(model, optimizer)
    try:
        step_of(optimizer, model, 1)
        message = "nothing"
    except Exception as error:  # its text is what is asked for
        message = f"{type(error).__name__}: {error}"
    Failing.fails = ""
    between = parts(model, optimizer)
    step_of(optimizer, model, 1)
    return message, moved(before, between), moved(between, parts(model, optimizer))


def parts(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    """What lies here of weights and their momentum."""
    return {
        name: [local_of(x).clone() for x in (p, optimizer.state[p]["momentum_buffer"])]
        for name, p in model.named_parameters()
    }


def moved(before: dict[str, list[Tensor]], after: dict[str, list[Tensor]]) -> list[str]:
    """Names of matrices of which something has."""
    return [name for name in before if not all(map(torch.equal, before[name], after[name]))]


def test_an_owner_that_fails_is_an_error_on_all_processes() -> None:
    everyone = run(4, failing, "owner")
    names = [*SHAPES]
    for rank, (message, some, others) in enumerate(everyone):
        expected = (
            "no memory left" if rank == 1 else r"rank 1 could not work on the rows that it owns, of (.*); its own"
        )
        found = re.search(expected, message)
        assert found, message
        assert rank == 1 or not any(name in found[1] for name in some)
        assert [name for name in some if name != "few"] == [name for name in everyone[0][1] if name != "few"]
        assert [name for name in others if name != "few"] == [name for name in names if name != "few"]


def test_a_part_that_fails_is_an_error_on_all_processes() -> None:
    for rank, (message, some, others) in enumerate(run(4, failing, "part")):
        assert (
            "no memory left" if rank == 1 else "another process could not work on its part of parameter 'wide'"
        ) in message
        assert {*some} <= {"few"}  # which its owner has worked on as a whole
        assert {*others} >= {*SHAPES} - {"few"}


def unsound() -> tuple[dict[str, tuple[int, int]], list[str]]:
    """What the guard counts where a matrix of each owner cannot be factorized, and what moves."""
    fault = Fault("raises", True)
    for owner, name in ROUTINES:
        setattr(owner, name, fault.around(getattr(owner, name)))
    model = Matrices(torch.float32)
    LAYOUTS["rows"](model)
    optimizer = Dion2(model.named_parameters(), lr=0.01, orthogonalizer="qdwh")
    step_of(optimizer, model)
    before = parts(model, optimizer)
    fault.armed = True
    step_of(optimizer, model, 1)
    return optimizer.guard_events(), moved(before, parts(model, optimizer))


def test_a_matrix_that_cannot_be_factorized_sits_out_on_all_processes() -> None:
    everyone = run(4, unsound)
    for events, some in everyone:
        assert events == everyone[0][0]
        assert set(events.values()) == {(0, 1)}
        assert {*SHAPES} - {"few"} == {*some, *events} - {"few"}
        assert not {*some} & {*events}


class OwnUpdate(Dion2):
    """A rule with a step of its own, which knows of whole matrices alone."""

    class rule(Dion2Rule):
        """Half a step."""

        def update(self, grad: Tensor, state: Any, t: Any) -> Step:
            out = super().update(grad, state, t)
            return out._replace(direction=out.direction / 2)


WHOLES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "cautious": lambda ps: Dion2(ps, lr=0.05, cautious=True),
    "a law": lambda ps: Dion2(ps, lr=0.05, weight_update_hook="hyperball"),
    "a view": lambda ps: Dion2(ps, lr=0.05, matrix_view="transposed"),
    "an update of its own": lambda ps: OwnUpdate(ps, lr=0.05),
}


def wholes() -> list[str]:
    """Where whole matrices are needed, they travel as a whole."""
    found = []
    for name, make in WHOLES.items():
        model = Matrices()
        LAYOUTS["rows"](model)
        reasons = {entry.reason for entry in make(model.parameters()).plan}
        if reasons != {"it is cut, and its update needs the whole"}:
            found.append(f"{name}: {reasons}")
        try:
            assert_same_as_one_process(Matrices, lambda m, make=make: make(m.parameters()), LAYOUTS["rows"], steps=3)
        except Exception as error:  # of whatever kind: it is told beside its name
            found.append(f"{name}: {type(error).__name__}: {error}")
    return found


def test_what_needs_whole_matrices_gets_them() -> None:
    assert run(4, wholes) == [[]] * 4
