"""An optimizer does to sharded parameters what it does to them in one process."""

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import nn

from emerging_optimizers.distributed.dtensor import local_of, spread_of
from emerging_optimizers.distributed.groups import GATHERS
from emerging_optimizers.testing import assert_same_as_one_process
from emerging_optimizers.testing.one_process import part_of
from tests.cases import CASES
from tests.distributed.processes import LAYOUTS, gradients, make_net, run

BY_NAME = {case.name: case for case in CASES}
# One of each kind: element by element, element by element with a law for all of them, by matrix, with bases that are
# refreshed in turns, from the weight, with a law for the weight.
KINDS = ("adamw", "adamw_brake", "muon", "soap_every_third", "spectron")
# By how much a weight of about 1 may be off after twenty steps. In float32 norms and stacks of other sizes are rounded
# otherwise, and what Newton-Schulz or a factor makes of that is larger.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-3}
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


def compare(layout: str, names: Sequence[str], steps: int, dtype: torch.dtype = torch.float64) -> list[str]:
    """What differs, in words; in each of several processes."""
    found = []
    for name in names:
        try:
            assert_same_as_one_process(
                lambda: make_net().to(dtype),
                lambda model, name=name: optimizer_of(name, model),
                LAYOUTS[layout],
                steps=steps,
                tolerance=TOLERANCES[dtype],
                gradients=gradients,
            )
        except Exception as error:
            found.append(f"{layout}, {name}: {type(error).__name__}: {error}")
    return found + [f"{GATHERS.count} tensors were gathered"] * (GATHERS.count > 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_is_as_one_process(layout: str) -> None:
    world = WORLDS.get(layout, 2)
    assert run(world, compare, layout, KINDS, 6) == [[]] * world


@pytest.mark.slow
@pytest.mark.timeout(6000)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_case_is_as_one_process(layout: str, world: int, dtype: torch.dtype) -> None:
    names = [case.name for case in CASES if case.optimizer != "tp_rekls"]
    assert run(world, compare, layout, names, 20, dtype, timeout=5000) == [[]] * world


def make_two_dtypes() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)))
    model[0].bfloat16()
    model[2].bfloat16()
    return model


def compare_two_dtypes() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def shard_each(model: nn.Module) -> None:
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.children():
            fully_shard(layer, mesh=mesh)

    for name in ("muon", "soap", "spectron"):
        assert_same_as_one_process(
            make_two_dtypes,
            lambda model, name=name: BY_NAME[name].make([*model.parameters()]),
            shard_each,
            steps=3,
            tolerance=5e-3,  # two units in the last place of a bfloat16 weight; a step is 0.05
        )


def test_matrices_of_one_shape_and_two_dtypes() -> None:
    run(2, compare_two_dtypes)


def compare_on_a_part_of_the_world() -> None:
    """As a stage of a pipeline has it: a mesh of two dimensions that is not all of the processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("stage", "replica", "shard"))
    model, alone = make_net(), make_net()
    fully_shard(model, mesh=mesh["replica", "shard"])
    pairs = [(optimizer_of("soap", m), dict(m.named_parameters())) for m in (model, alone)]
    for step in range(4):
        given = gradients(step, {name: p.shape for name, p in alone.named_parameters()})
        for optimizer, named in pairs:
            for name, p in named.items():
                p.grad = part_of(given[name], p)
            optimizer.step()
    for p, whole in zip(model.parameters(), alone.parameters(), strict=True):
        for box in spread_of("p", p).boxes(dist.get_rank()):
            assert torch.allclose(local_of(p)[box.local_slices], whole[box.slices], rtol=0, atol=1e-10)


def test_a_mesh_that_is_a_part_of_the_world() -> None:
    run(4, compare_on_a_part_of_the_world)


def compare_rounded_state() -> None:
    for name in ("soap", "adamw"):
        assert_same_as_one_process(
            make_net,
            lambda model, name=name: BY_NAME[name].make(
                [p for p in model.parameters() if p.ndim == 2], state_dtype=torch.bfloat16
            ),
            LAYOUTS["fsdp"],
            steps=4,
        )


def test_state_in_half_the_memory() -> None:
    run(2, compare_rounded_state)
