"""Sharded parameters whose state lies in the host's memory take the steps that they take without it, bit for bit."""

from typing import Any

import torch

from emerging_optimizers.distributed.dtensor import local_of
from emerging_optimizers.engine import offload
from tests.cases import CASES
from tests.distributed.processes import LAYOUTS, make_net, run
from tests.distributed.test_checkpoints import steps
from tests.engine.test_offload import Late

BY_NAME = {case.name: case for case in CASES}


def compare(layout: str) -> list[str]:
    found = []
    for name in ("adamw", "muon", "soap", "spectron"):
        both: list[Any] = []
        for place in (None, "cpu"):
            ferry = offload._FERRIES[torch.device("cpu")] = Late(torch.device("cpu"))
            model = make_net()
            LAYOUTS[layout](model)
            taken = [(n, p) for n, p in model.named_parameters() if BY_NAME[name].elementwise or p.ndim > 1]
            optimizer = BY_NAME[name].make(taken, spike_guard=2.0, offload=place)
            steps(model, optimizer, 0, 6)
            assert (ferry.fetches > 0) == (place == "cpu")
            both.append((model, optimizer))
        (one, here), (other, there) = both
        for (label, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
            pairs = [(p, q), *((x, there.state[q][key]) for key, x in here.state.get(p, {}).items())]
            if not all(torch.equal(local_of(x.detach()), local_of(y.detach())) for x, y in pairs):
                found.append(f"{name}: {label}")
    return found


def test_sharded() -> None:
    assert run(2, compare, "fsdp") == [[], []]
