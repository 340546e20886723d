"""An optimizer does to sharded parameters what it does to them in one process."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from emerging_optimizers.testing import assert_same_as_one_process
from tests.cases import CASES
from tests.distributed.processes import LAYOUTS, gradients, make_net, run

BY_NAME = {case.name: case for case in CASES}
# One of each kind: element by element, element by element with a law for all of them, by matrix, with bases that are
# refreshed in turns, from the weight, with a law for the weight.
KINDS = ("adamw", "adamw_brake", "muon", "soap_every_third", "psgd_pro", "spectron")
# Where it matters how many there are: empty shards, replicas, two dimensions.
WORLDS = {"fsdp": 4, "hsdp": 4, "fsdp_and_tensor_parallel": 4, "mixed": 4}


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """The case for all parameters that it takes, with the spike guard; a fused projection is cut into its matrices."""
    case = BY_NAME[name]
    vectors = any(len(shape) < 2 for shape in case.shapes)
    taken = [(n, p) for n, p in model.named_parameters() if vectors or p.ndim > 1]
    fused = [(n, p) for n, p in taken if "in_proj_weight" in n]
    plain = [(n, p) for n, p in taken if "in_proj_weight" not in n]
    view = {} if case.elementwise else {"matrix_view": ("split", 8, 8, 8)}
    return case.make([{"params": plain}, {"params": fused, **view}], spike_guard=2.0)


def compare(layout: str, names: Sequence[str], steps: int) -> list[str]:
    """What differs, in words; in each of several processes."""
    found = []
    for name in names:
        try:
            assert_same_as_one_process(
                make_net,
                lambda model, name=name: optimizer_of(name, model),
                LAYOUTS[layout],
                steps=steps,
                tolerance=1e-10,
                gradients=gradients,
            )
        except Exception as error:
            found.append(f"{layout}, {name}: {type(error).__name__}: {error}")
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_is_as_one_process(layout: str) -> None:
    world = WORLDS.get(layout, 2)
    assert run(world, compare, layout, KINDS, 8) == [[]] * world


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_case_is_as_one_process(layout: str, world: int) -> None:
    names = [case.name for case in CASES if case.optimizer != "tp_rekls"]
    assert run(world, compare, layout, names, 20, timeout=1500) == [[]] * world
