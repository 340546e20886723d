"""How many exchanges a step makes, whatever the number of parameters, and what is said of it beforehand."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

from emerging_optimizers import create_optimizer, plan_parameters
from emerging_optimizers.distributed.groups import GATHERS
from emerging_optimizers.orthogonalized_optimizers import Muon
from tests.distributed.processes import fsdp, hsdp, make_net, run

EXCHANGES = ("all_to_all_single", "all_reduce", "all_gather", "all_gather_object", "broadcast", "scatter")


def layers(count: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    for k in range(count):
        model.add_module(f"up{k}", nn.Linear(8, 12))
        model.add_module(f"down{k}", nn.Linear(12, 8))
    return model.double()


def counts(name: str, count: int) -> tuple[dict[str, int], dict[str, int]]:
    """Calls of torch.distributed in a step, and what DTensor does by itself."""
    model = layers(count)
    fsdp(model)
    optimizer = create_optimizer(name, model, lr=0.01)
    calls: Counter[str] = Counter()
    originals = {exchange: getattr(dist, exchange) for exchange in EXCHANGES}

    def counted(exchange: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[exchange] += 1
            return originals[exchange](*args, **kwargs)

        return call

    for step in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        if step == 1:
            for exchange in EXCHANGES:
                setattr(dist, exchange, counted(exchange))
        with CommDebugMode() as mode:
            optimizer.step()
    for exchange, original in originals.items():
        setattr(dist, exchange, original)
    assert GATHERS.count == 0
    return dict(calls), {str(op): number for op, number in mode.get_comm_counts().items() if "_functional" in str(op)}


@pytest.mark.parametrize("name", ["muon", "soap"])
def test_exchanges_of_a_step_do_not_grow_with_the_model(name: str) -> None:
    few, by_dtensor = run(2, counts, name, 2)[0]
    many, by_dtensor_of_many = run(2, counts, name, 10)[0]
    # To the owners and back; the agreement, and the norms of vectors and tables.
    assert few == many == {"all_to_all_single": 2, "all_reduce": 2}
    assert by_dtensor == by_dtensor_of_many == {}


def plans() -> tuple[str, str, str, str, str]:
    """Printed by the last process alone before the first step, by all after it; and what is gathered."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    model = make_net()
    hsdp(model)
    optimizer = create_optimizer("muon", model, lr=0.01)
    before = str(optimizer.plan) if dist.get_rank() == 3 else ""
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    other = Muon([p for p in model.parameters() if p.ndim == 2], lr=0.01)
    first = str(other.plan)
    other.step()
    assert str(other.plan) == first

    copied = nn.Linear(4, 4)
    mesh = next(model.parameters()).device_mesh
    copied.weight = nn.Parameter(distribute_tensor(copied.weight.data, mesh, [Replicate(), Replicate()]))
    messages = []
    for strict in (True, False):
        route = plan_parameters(copied, "muon", lr=0.01, overrides={"weight": "muon"})
        optimizer_of_copies = create_optimizer("muon", copied, plan=route, strict=strict)
        copied.weight.grad = distribute_tensor(torch.ones(4, 4), mesh, [Replicate(), Shard(0)])
        try:
            optimizer_of_copies.step()
            messages.append(f"{GATHERS.count} gathered")
        except ValueError as error:
            messages.append(f"{GATHERS.count} gathered: {error}")
    return before, str(optimizer.plan), first, *messages


def test_every_process_prints_the_same_plan_and_nothing_is_gathered() -> None:
    everyone = run(4, plans)
    before, after, of_a_class, strict, lax = everyone[3]
    assert {theirs[1:] for theirs in everyone} == {everyone[3][1:]}
    assert before == after
    assert "up.weight                  12x8     hidden" in after  # routes, then owners
    assert "No parameter is gathered to every rank." in after
    assert "an all-to-all each way" in of_a_class
    assert (
        "0 gathered: RoutedOptimizer: strict=True, and the gradients of weight would be gathered to every rank"
        in strict
    )
    assert lax == "1 gathered"
