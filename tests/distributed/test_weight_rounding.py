"""Weights of a low precision that lose nothing are, sharded, what they are in one process."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from emerging_optimizers.distributed.dtensor import is_dtensor, local_of, spread_of
from emerging_optimizers.engine.kept import KEYS
from emerging_optimizers.linalg.rounding import join_bfloat16_
from emerging_optimizers.testing.one_process import part_of
from tests.cases import CASES
from tests.distributed.processes import LAYOUTS, gradients, make_net, run

BY_NAME = {case.name: case for case in CASES}
# Element by element; a direction that is handed out, of picked rows, too; a weight that is.
KINDS = ("adamw", "muon", "dion2", "soap_l2")
STEPS = 6


def make_low() -> nn.Module:
    return make_net().bfloat16()


def optimizer_of(name: str, model: nn.Module, rounding: str) -> torch.optim.Optimizer:
    taken = [(n, p) for n, p in model.named_parameters() if BY_NAME[name].elementwise or p.ndim > 1]
    return BY_NAME[name].make(taken, lr=1e-3, weight_rounding=rounding, spike_guard=2.0)


def train(optimizer: torch.optim.Optimizer, model: nn.Module, shapes: Mapping[str, torch.Size], steps: range) -> None:
    for step in steps:
        given = gradients(step, shapes)
        for name, p in model.named_parameters():
            p.grad = part_of(given[name].bfloat16(), p) if name in given else None
        optimizer.step()


def differences(name: str, rounding: str, alone: nn.Module, model: nn.Module, one: Any, several: Any) -> list[str]:
    """What lies here and is not what it is in one process."""
    found = []
    for (label, whole), p in zip(alone.named_parameters(), model.parameters(), strict=True):
        mine = several.state.get(p, {})
        pairs = [
            ("weight", whole.detach(), p.detach()),
            *((k, one.state[whole][k], mine[k]) for k in KEYS if k in mine),
        ]
        kept = {key: _pieces(theirs, ours) for key, theirs, ours in pairs}
        for k, (a, b) in enumerate(kept["weight"]):
            # The last bits of norms and of products differ; by chance a weight then goes to the other neighbour.
            near = 2.0**-7
            if "weight_bits" in kept:
                (a, b), near = map(_joined, (a, b), kept["weight_bits"][k]), 1e-6
            if off := int(((a - b).abs() > near * a.abs() + 1e-6).sum()):
                found.append(f"{name}, {rounding}: {off} of {a.numel()} weights of {label}")
            if BY_NAME[name].elementwise and rounding == "stochastic" and int((a != b).sum()) > 2:
                found.append(f"{name}, {rounding}: {int((a != b).sum())} weights of {label} went elsewhere")
        if any(not torch.equal(a, b) for a, b in kept.get("rounding_key", ())):
            found.append(f"{name}: the key of {label}")
    return found


def _joined(high: Tensor, low: Tensor) -> Tensor:
    found = torch.empty(high.shape)
    join_bfloat16_(found, high.contiguous(), low)
    return found


def _pieces(whole: Tensor, part: Tensor) -> list[tuple[Tensor, Tensor]]:
    if not is_dtensor(part):
        return [(whole, part)]
    boxes = spread_of("it", part).boxes(dist.get_rank())
    return [(whole[box.slices], local_of(part)[box.local_slices]) for box in boxes]


def compare(layouts: tuple[str, ...]) -> list[str]:
    """Steps with spikes and with gradients that are missing or not finite; then from a checkpoint of one process."""
    found = []
    for layout in layouts:
        for name in KINDS:
            for rounding in ("stochastic", "compensated"):
                alone, model, later = make_low(), make_low(), make_low()
                shapes = {n: p.shape for n, p in alone.named_parameters()}
                LAYOUTS[layout](model)
                one, several = optimizer_of(name, alone, rounding), optimizer_of(name, model, rounding)
                train(one, alone, shapes, range(STEPS))
                train(several, model, shapes, range(STEPS))
                found += [f"{layout}, {x}" for x in differences(name, rounding, alone, model, one, several)]
                later.load_state_dict(alone.state_dict())
                LAYOUTS[layout](later)
                resumed = optimizer_of(name, later, rounding)
                resumed.load_state_dict(one.state_dict())
                train(one, alone, shapes, range(STEPS, STEPS + 2))
                train(resumed, later, shapes, range(STEPS, STEPS + 2))
                found += [f"{layout}, resumed, {x}" for x in differences(name, rounding, alone, later, one, resumed)]
                saved = resumed.state_dict()  # of several, into several
                train(resumed, later, shapes, range(STEPS, STEPS + 1))
                before = [local_of(p).detach().clone() for p in later.parameters()]
                resumed.load_state_dict(saved)
                if not all(torch.equal(x, local_of(p)) for x, p in zip(before, later.parameters(), strict=True)):
                    found.append(f"{layout}, {name}: loading has moved weights")
    return found


def test_rounding_is_as_in_one_process() -> None:
    assert run(2, compare, ("fsdp", "tensor_parallel", "cut_experts"), timeout=300) == [[]] * 2


@pytest.mark.parametrize(
    "layout",
    [
        "mixed",  # with shards that are empty
        # A dimension more than the layouts that every run has.
        pytest.param("hsdp", marks=pytest.mark.slow),
        pytest.param("fsdp_and_tensor_parallel", marks=pytest.mark.slow),
    ],
)
def test_rounding_on_four_processes_is_as_in_one(layout: str) -> None:
    assert run(4, compare, (layout,), timeout=280) == [[]] * 4


def _state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def save(layout: str, folder: str) -> None:
    for name in KINDS:
        for rounding in ("stochastic", "compensated"):
            model = make_low()
            shapes = {n: p.shape for n, p in model.named_parameters()}
            LAYOUTS[layout](model)
            optimizer = optimizer_of(name, model, rounding)
            train(optimizer, model, shapes, range(3))
            dcp.save(_state_of(model, optimizer), checkpoint_id=f"{folder}/{name}-{rounding}")


def load(layout: str, folder: str) -> list[str]:
    found = []
    for name in KINDS:
        for rounding in ("stochastic", "compensated"):
            alone, model = make_low(), make_low()
            shapes = {n: p.shape for n, p in alone.named_parameters()}
            LAYOUTS[layout](model)
            one, several = optimizer_of(name, alone, rounding), optimizer_of(name, model, rounding)
            state = _state_of(model, several)
            dcp.load(state, checkpoint_id=f"{folder}/{name}-{rounding}")
            set_model_state_dict(model, state["model"])
            set_optimizer_state_dict(model, several, state["optimizer"])
            train(one, alone, shapes, range(STEPS))
            train(several, model, shapes, range(3, STEPS))
            found += differences(name, rounding, alone, model, one, several)
    return found


@pytest.mark.parametrize(
    "move",
    [
        (2, "fsdp", 1, "replicated"),
        # A sweep: how state is cut is the same for all its entries, and test_checkpoints.py moves more of them.
        pytest.param((2, "fsdp", 4, "hsdp"), marks=pytest.mark.slow),
        pytest.param((4, "hsdp", 3, "fsdp"), marks=pytest.mark.slow),
        pytest.param((1, "replicated", 2, "tensor_parallel"), marks=pytest.mark.slow),
    ],
    ids=lambda move: "-".join(map(str, move)),
)
def test_what_rounding_keeps_goes_to_other_processes(tmp_path: Path, move: tuple[int, str, int, str]) -> None:
    before, layout, after, other = move
    run(before, save, layout, str(tmp_path), timeout=140)
    assert run(after, load, other, str(tmp_path), timeout=140) == [[]] * after
