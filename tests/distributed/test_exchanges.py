"""How many exchanges a step makes, whatever the number of parameters."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

from emerging_optimizers import create_optimizer
from tests.distributed.processes import fsdp, run

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
    return dict(calls), {str(op): number for op, number in mode.get_comm_counts().items() if "_functional" in str(op)}


@pytest.mark.parametrize("name", ["muon", "soap"])
def test_exchanges_of_a_step_do_not_grow_with_the_model(name: str) -> None:
    few, by_dtensor = run(2, counts, name, 2)[0]
    many, by_dtensor_of_many = run(2, counts, name, 10)[0]
    # To the owners and back; the agreement, and for each of the two groups of vectors and tables their norms.
    assert few == many == {"all_to_all_single": 2, "all_reduce": 3}
    assert by_dtensor == by_dtensor_of_many == {}
