"""`check_optimizer` on sharded parameters: copies, pickles, files and edits of what is spread over processes."""

from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from emerging_optimizers.registry import OPTIMIZERS
from emerging_optimizers.soap.tp_rekls import TpRekls
from emerging_optimizers.testing.conformance import check_optimizer, made_by
from tests.distributed.processes import run

BY_DEFAULT = ("adamw", "soap")


def failures(name: str) -> list[Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return check_optimizer(
        made_by(name), layout=lambda x: distribute_tensor(x, mesh, [Shard(0)]), raises=False
    ).failures


def slow_unless(name: str) -> Any:
    return pytest.param(name, marks=[] if name in BY_DEFAULT else pytest.mark.slow)


@pytest.mark.parametrize("name", [slow_unless(name) for name in OPTIMIZERS])
def test_sharded_parameters_pass_too(name: str) -> None:
    assert run(2, failures, name, timeout=280) == [[], []]


def failures_of_plain_shards() -> list[Any]:
    """Of TpRekls, whose shards are no DTensors."""
    rank, group = dist.get_rank(), dist.group.WORLD
    return check_optimizer(
        lambda params: TpRekls([{"params": params, "partition_dim": 0}], lr=0.01, tp_group=group),
        layout=lambda x: x.tensor_split(2)[rank].clone(),
        raises=False,
    ).failures


@pytest.mark.slow  # tests/compat/test_tp_rekls.py asks much of it in every run
def test_plain_shards_pass_too() -> None:
    assert run(2, failures_of_plain_shards, timeout=280) == [[], []]
