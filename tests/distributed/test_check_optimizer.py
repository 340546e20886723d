"""`check_optimizer` on sharded parameters: copies, pickles, files and edits of what is spread over processes."""

from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from emerging_optimizers.registry import OPTIMIZERS
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


@pytest.mark.parametrize("name", [slow_unless(name) for name in OPTIMIZERS if name != "tp_rekls"])
def test_sharded_parameters_pass_too(name: str) -> None:
    assert run(2, failures, name) == [[], []]
