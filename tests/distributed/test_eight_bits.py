"""Averages in 8 bits are, sharded, what they are in one process, and go to any number of processes."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

from emerging_optimizers.distributed.dtensor import is_dtensor, local_of
from emerging_optimizers.engine import packing
from tests.cases import CASES
from tests.distributed.processes import LAYOUTS, make_net, run
from tests.distributed.test_checkpoints import FLAT, distance, state_of, steps

BY_NAME = {case.name: case for case in CASES}
KINDS = ("adamw", "muon", "dion3", "soap")


def made(name: str, layout: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    packing.LEAST = packing.LEAST_ROW = 1  # the parameters of the model are small
    model = make_net()
    LAYOUTS[layout](model)
    taken = [(n, p) for n, p in model.named_parameters() if BY_NAME[name].elementwise or p.ndim > 1]
    return model, BY_NAME[name].make(taken, state_dtype="int8", spike_guard=2.0)


def far(model: nn.Module, optimizer: torch.optim.Optimizer, name: str) -> float:
    """From six steps in one process; every matrix has its momentum in 8 bits."""
    alone, reference = made(name, "replicated")
    steps(alone, reference, 0, 6)
    for p, whole in zip(model.parameters(), alone.parameters(), strict=True):
        ours, theirs = optimizer.state.get(p, {}), reference.state.get(whole, {})
        assert ours.keys() == theirs.keys()
        assert p.ndim < 2 or {"exp_avg_int8", "momentum_buffer_int8"} & ours.keys()
        for key in ours:
            if is_dtensor(ours[key]):
                assert ours[key].shape == theirs[key].shape
    return max(distance(p, whole) for p, whole in zip(model.parameters(), alone.parameters(), strict=True))


def compare(layout: str) -> dict[str, float]:
    found = {}
    for name in KINDS:
        model, optimizer = made(name, layout)
        steps(model, optimizer, 0, 6)
        found[name] = far(model, optimizer, name)
    return {name: x for name, x in found.items() if not x <= 1e-10}


@pytest.mark.parametrize(("layout", "world"), [("fsdp", 3), ("expert_parallel", 2)])
def test_sharded_is_as_one_process(layout: str, world: int) -> None:
    assert run(world, compare, layout) == [{}] * world


def save(folder: str) -> None:
    for name in KINDS:
        model, optimizer = made(name, "fsdp")
        steps(model, optimizer, 0, 3)
        dcp.save(state_of(model, optimizer, flat=True), checkpoint_id=f"{folder}/{name}")


def load(folder: str) -> dict[str, float]:
    found = {}
    for name in KINDS:
        model, optimizer = made(name, "fsdp")
        state = state_of(model, optimizer, flat=True)
        dcp.load(state, checkpoint_id=f"{folder}/{name}")
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=FLAT)
        steps(model, optimizer, 3, 6)
        found[name] = far(model, optimizer, name)
    return {name: x for name, x in found.items() if not x <= 1e-10}


def test_a_run_goes_on_with_other_processes(tmp_path: Path) -> None:
    run(2, save, str(tmp_path), timeout=300)
    assert run(3, load, str(tmp_path), timeout=300) == [{}] * 3


def cut_within_rows() -> list[tuple[bool, tuple[int, ...]]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from emerging_optimizers import AdamW

    mesh = init_device_mesh("cpu", (2,))
    found = []
    for columns in (1024, 1000):
        p = nn.Parameter(distribute_tensor(torch.ones(8, columns), mesh, [Shard(1)]))
        p.grad = distribute_tensor(torch.ones(8, columns), mesh, [Shard(1)])
        optimizer = AdamW([p], state_dtype="int8")
        optimizer.step()
        state = optimizer.state[p]
        scale = state.get("exp_avg_scale", p)
        found.append(("exp_avg_int8" in state, (*scale.shape, *local_of(scale).shape)))
    return found


def test_where_processes_cut_a_block_the_average_stays_in_float32() -> None:
    expected = [(True, (8, 4, 8, 2)), (False, (8, 1000, 8, 500))]
    assert run(2, cut_within_rows) == [expected] * 2
