"""An optimizer does to sharded parameters what it does to them in one process."""

from collections.abc import Sequence
from functools import partial
from heapq import nlargest
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import nn

from emerging_optimizers import MuonHyperball, create_optimizer, registry
from emerging_optimizers.distributed.dtensor import local_of, spread_of
from emerging_optimizers.distributed.groups import GATHERS
from emerging_optimizers.orthogonalized_optimizers.sinkhorn_muon import SinkhornMuon
from emerging_optimizers.testing import assert_same_as_one_process
from emerging_optimizers.testing.one_process import difference_of, in_one_process, part_of
from tests.cases import CASES
from tests.distributed.processes import LAYOUTS, gradients, make_net, run

BY_NAME = {case.name: case for case in CASES}
# One of each kind: element by element, element by element with a law for all of them, by matrix, with bases that are
# refreshed in turns, from the weight, with a law for the weight, with rows that are picked.
KINDS = ("adamw", "adamw_brake", "muon", "dion2", "dion3", "soap_every_third", "spectron")
# By how much a weight of about 1 may be off after twenty steps. Measured over all cases and layouts were 1.3e-14 and
# 1.6e-5, of SOAP with the published start, whose bases hang on null spaces at first; without it 3e-15 and 2e-6, but for
# Shampoo's square roots (9e-6).
TOLERANCES = {torch.float64: 1e-10, torch.float32: 5e-5}
# In how many tests the sweep over all cases comes.
PARTS = 4
# On how many processes a layout is tried on every day, where that is not two: empty shards, replicas, two dimensions;
# three divide next to nothing.
WORLDS = {
    "fsdp": (3, 4),
    "hsdp": (4,),
    "fsdp_and_tensor_parallel": (4,),
    "mixed": (4,),
    "cut_experts": (2, 3),
    "two_meshes": (4,),
}


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """The case for all parameters that it takes, with the spike guard; a fused projection is cut into its matrices."""
    case = BY_NAME[name]
    vectors = any(len(shape) < 2 for shape in case.shapes)
    taken = [(n, p) for n, p in model.named_parameters() if vectors or p.ndim > 1]
    fused = [(n, p) for n, p in taken if "in_proj_weight" in n]
    plain = [(n, p) for n, p in taken if "in_proj_weight" not in n]
    view = {} if case.elementwise else {"matrix_view": ("split", 8, 8, 8)}
    return case.make([{"params": plain}, {"params": fused, **view}], spike_guard=2.0)


def compare(
    layouts: Sequence[str], names: Sequence[str], steps: int, dtypes: Sequence[torch.dtype] = (torch.float64,)
) -> tuple[list[str], dict[tuple[torch.dtype, str, str], float]]:
    """What differs, in words, and the largest difference of each dtype, layout and case; in each of several processes.

    All layouts in one go: what one process does is the same for them, and so is the count of a rule's operations.
    """
    found, sizes = [], {}
    for name, dtype in product(names, dtypes):
        make_model, make_optimizer = partial(make_net, dtype), partial(optimizer_of, name)
        expected = in_one_process(make_model, make_optimizer, steps=steps, gradients=gradients)
        for layout in layouts:
            try:
                size, parameter, rank = difference_of(
                    expected, make_model, make_optimizer, LAYOUTS[layout], steps=steps, gradients=gradients
                )
            except Exception as error:  # of whatever kind: it is told beside the others
                found.append(f"{layout}, {name}, {dtype}: {type(error).__name__}: {error}")
                continue
            sizes[dtype, layout, name] = size
            if not size <= TOLERANCES[dtype]:
                found.append(f"{layout}, {name}, {dtype}: {parameter} differs by {size:.1e} on rank {rank}")
    return found + [f"{GATHERS.count} tensors were gathered"] * (GATHERS.count > 0), sizes


@pytest.mark.parametrize("world", [2, 3, 4])
def test_sharded_is_as_one_process(world: int) -> None:
    layouts = [name for name in LAYOUTS if world in WORLDS.get(name, (2,))]
    assert [found for found, _ in run(world, compare, layouts, KINDS, 6)] == [[]] * world


@pytest.mark.slow  # the table; one of each kind is in every run
@pytest.mark.timeout(6000)
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("world", [2, 4])
def test_every_case_is_as_one_process(world: int, part: int) -> None:
    names = [case.name for case in CASES if case.optimizer != "tp_rekls"][part::PARTS]
    layouts = [name for name in LAYOUTS if world >= min(WORLDS.get(name, (2,)))]
    outcome = run(world, compare, layouts, names, 20, [*TOLERANCES], timeout=5000)
    sizes = outcome[0][1]
    for dtype in TOLERANCES:
        largest = nlargest(5, ((size, *where) for (kind, *where), size in sizes.items() if kind == dtype))
        print(f"\n{dtype}, of {len(sizes)} comparisons the largest differences: {largest}")
    assert [found for found, _ in outcome] == [[]] * world


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


class Smallest(nn.Module):
    """Matrices of fewer rows than there are processes, a vector of one number, a scalar, a matrix of none."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"row": (1, 6), "rows": (2, 5), "square": (5, 5), "vector": (1,), "scalar": (), "none": (0, 4)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, dtype=torch.float64)))


def make_smallest() -> nn.Module:
    torch.manual_seed(0)
    return Smallest()


def by_rows(model: nn.Module) -> None:
    """Every parameter of a module cut along its first axis; a scalar lies everywhere."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name, p in [*model.named_parameters()]:
        placement = Shard(0) if p.ndim else Replicate()
        setattr(model, name, nn.Parameter(distribute_tensor(p.data, mesh, [placement])))


def compare_smallest(names: Sequence[str]) -> None:
    """With the defaults of each class, for what it takes, and beside a companion."""

    def by_class(name: str, model: nn.Module) -> torch.optim.Optimizer:
        vectors = BY_NAME[name].elementwise
        return registry.entry(name).load()([p for p in model.parameters() if vectors or p.ndim == 2], lr=0.01)

    def routed(name: str, model: nn.Module) -> torch.optim.Optimizer:
        rates = {"lr": 0.002} if BY_NAME[name].elementwise else {"lr": 0.01, "companion_lr": 0.002}
        return create_optimizer(name, model, **rates)

    for name, make in product(names, (by_class, routed)):
        try:
            assert_same_as_one_process(make_smallest, partial(make, name), by_rows, steps=4)
        except Exception as error:  # of whatever kind: it is told of which optimizer it is
            raise AssertionError(f"{name}, {make.__name__}") from error


def test_empty_shards_and_scalars() -> None:
    run(3, compare_smallest, ["adamw", "muon", "muon_hyperball", "soap"])


@pytest.mark.slow  # one of each kind runs every day
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("world", [2, 4])
def test_empty_shards_and_scalars_of_every_optimizer(world: int) -> None:
    names = [name for name in registry.list_optimizers() if name != "tp_rekls"]
    run(world, compare_smallest, names, timeout=1000)


class Mixing(nn.Module):
    """A matrix whose rows and columns sum to one, one row of which is zero but for an entry."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.0, 0.0, 1.0], [0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]).double())


def look_at_weights() -> list[str]:
    """What is asked of a weight when an optimizer is made is asked of all of it, and answered alike everywhere."""
    assert_same_as_one_process(Mixing, lambda model: SinkhornMuon(model.parameters(), lr=0.1), by_rows, steps=4)
    said = []
    for cls, weight in ((MuonHyperball, torch.zeros(3, 3)), (SinkhornMuon, torch.diag(torch.tensor([1.0, 1.0, 2.0])))):
        model = Mixing()
        model.weight = nn.Parameter(weight.double())
        by_rows(model)
        with pytest.raises(ValueError, match="parameter 0") as raised:
            cls(model.parameters(), lr=0.1)
        said.append(str(raised.value))
    return said


def test_weights_are_looked_at_whole() -> None:
    said = run(3, look_at_weights)
    assert said == [said[0]] * 3
    assert "is zero" in said[0][0]
    assert "off by 1" in said[0][1]
