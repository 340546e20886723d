"""Accelerate's FSDP2, which makes parameters DTensors after the optimizer was made and points its groups at them.

Accelerate has FSDP2 on accelerators alone. Two processes on a CPU go through the same code where its state says so.
"""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

pytest.importorskip("accelerate", reason="accelerate is not installed")

from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from emerging_optimizers import AdamW, create_optimizer
from emerging_optimizers.distributed.dtensor import is_dtensor, whole_of
from tests.distributed.processes import run

BATCH = torch.arange(24.0).view(3, 8) / 24


def make() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    model[1].weight.requires_grad_(False)
    return model


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "class":  # made from parameters
        return AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    return create_optimizer(name, model, lr=0.01)


def accelerator() -> Accelerator:
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, MASTER_ADDR="127.0.0.1")
    found = Accelerator(cpu=True)
    found.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False
    )
    found.state.distributed_type = DistributedType.FSDP
    return found


def train(model: nn.Module, frozen: nn.Module, optimizer: Any, backward: Any, unfreeze: bool) -> list[Tensor]:
    """Six steps; a layer is thawed in the middle."""
    for step in range(6):
        if step == 3 and unfreeze:
            frozen.weight.requires_grad_(True)
        backward(model(BATCH).square().sum())
        optimizer.step()
        optimizer.zero_grad()
    return [whole_of(p.detach()) for p in model.parameters()]


def compare() -> dict[str, Any]:
    """For each optimizer: whether the groups have DTensors, and how far weights are from those of one process."""
    found = {}
    for name in ("muon", "soap", "adamw", "class"):
        alone, model = make(), make()
        one, several = optimizer_of(name, alone), optimizer_of(name, model)
        accelerate = accelerator()
        model, prepared = accelerate.prepare(model, several)
        expected = train(alone, alone[1], one, Tensor.backward, name != "class")
        weights = train(model, model[1], prepared, accelerate.backward, name != "class")
        sharded = all(is_dtensor(p) for group in several.param_groups for p in group["params"])
        moved = not torch.equal(weights[2], make()[1].weight)
        found[name] = sharded, moved, max(float((a - b).abs().max()) for a, b in zip(weights, expected, strict=True))
    return found


def test_parameters_that_become_dtensors_work_from_the_next_step_on() -> None:
    for found in run(2, compare, timeout=200):
        for name, (sharded, moved, far) in found.items():
            assert sharded, name
            assert moved == (name != "class"), name
            assert far <= 1e-5, name
