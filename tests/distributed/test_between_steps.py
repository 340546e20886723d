"""Options that are changed between steps do to sharded parameters what they do in one process."""

from typing import Any

import pytest
import torch
from torch import nn

from emerging_optimizers.engine import packing
from tests.cases import CASES
from tests.distributed.processes import LAYOUTS, make_net, run
from tests.distributed.test_checkpoints import distance, steps

BY_NAME = {case.name: case for case in CASES}
# The values before the third, the fifth and behind the fifth step. With the first a process works on its part of a
# matrix, or of any parameter; with the second somebody needs all of it.
CHANGES: dict[str, tuple[tuple[str, ...], str, tuple[Any, Any, Any]]] = {
    "elements to wholes": (("adamw", "lion"), "cautious", (False, True, False)),
    "elements to a law": (("adamw",), "weight_update_hook", (None, ("update_floor", 0.1), None)),
    "picked rows to wholes": (("dion2", "dion3"), "cautious", (False, True, False)),
    # Where processes cut its blocks, AdamW's average stays in float32.
    "8 bits": (("muon", "dion3"), "state_dtype", ("int8", torch.bfloat16, "int8")),
    "dtypes": (("adamw",), "state_dtype", (torch.bfloat16, None, torch.bfloat16)),
    "views": (("muon", "dion2"), "matrix_view", ("auto", "transposed", "auto")),
}


def trained(name: str, layout: str, option: str, values: tuple[Any, Any, Any]) -> nn.Module:
    """Seven steps, without the parameters that have a view of their own."""
    packing.LEAST = packing.LEAST_ROW = 1  # the parameters of the model are small
    model = make_net()
    LAYOUTS[layout](model)
    two_dimensional = option == "matrix_view" or not BY_NAME[name].elementwise
    taken = [(n, p) for n, p in model.named_parameters() if p.ndim == 2 or not two_dimensional]
    optimizer = BY_NAME[name].make(taken, **{option: values[0]})
    for first, last, value in zip((0, 2, 4), (2, 4, 7), values, strict=True):
        optimizer.param_groups[0][option] = value
        steps(model, optimizer, first, last)
    return model


def compare(layouts: list[str]) -> dict[str, float]:
    """Where a weight is not what it is in one process."""
    found = {}
    for what, (names, option, values) in CHANGES.items():
        for name in names:
            alone = trained(name, "replicated", option, values)
            for layout in layouts:
                model = trained(name, layout, option, values)
                pairs = zip(model.parameters(), alone.parameters(), strict=True)
                found[f"{what}, {name}, {layout}"] = max(distance(p, whole) for p, whole in pairs)
    return {case: far for case, far in found.items() if not far <= 1e-10}


def test_what_lies_elsewhere_after_a_change_is_brought_there() -> None:
    assert run(3, compare, ["fsdp"]) == [{}] * 3


@pytest.mark.slow  # one layout runs every day
@pytest.mark.timeout(600)
def test_what_lies_elsewhere_after_a_change_is_brought_there_in_every_layout() -> None:
    assert run(4, compare, [*LAYOUTS], timeout=500) == [{}] * 4
