"""Three steps on some processes, save, three more on others under another layout: as six steps in one process."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from emerging_optimizers import SOAP
from emerging_optimizers.distributed.dtensor import is_dtensor, local_of, spread_of
from emerging_optimizers.testing.one_process import part_of
from tests.distributed.processes import LAYOUTS, gradients, make_net, run
from tests.distributed.test_layouts import optimizer_of

NAMES = ("adamw", "muon", "dion3", "soap", "rekls", "shampoo", "psgd_pro", "spectron")
GATHERED = ("adamw", "soap")  # also as one whole state on rank 0
MOVES = [
    (2, "fsdp", 4, "fsdp_and_tensor_parallel"),
    (4, "hsdp", 2, "tensor_parallel"),
    (2, "mixed", 3, "fsdp"),
    (3, "fsdp", 1, "replicated"),
    (1, "replicated", 2, "cut_experts"),
]
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def made(name: str, layout: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = make_net()
    LAYOUTS[layout](model)
    return model, optimizer_of(name, model)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        given = gradients(step, {name: p.shape for name, p in model.named_parameters()})
        for name, p in model.named_parameters():
            p.grad = part_of(given[name], p) if name in given else None
        optimizer.step()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, flat: bool) -> dict[str, Any]:
    options = FLAT if flat else StateDictOptions()
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def save(layout: str, folder: str, names: Sequence[str]) -> None:
    for name in names:
        model, optimizer = made(name, layout)
        steps(model, optimizer, 0, 3)
        for flat in (False, True):
            dcp.save(state_of(model, optimizer, flat), checkpoint_id=f"{folder}/{name}-{flat}")
        if name not in GATHERED:
            continue
        full = get_optimizer_state_dict(model, optimizer, options=FULL)
        weights = get_model_state_dict(model, options=FULL)
        if dist.get_rank() == 0:
            torch.save({"model": weights, "optimizer": full}, f"{folder}/{name}.pt")


def load(layout: str, folder: str, names: Sequence[str]) -> dict[str, float]:
    """How far weights are from those of one process, for each way to load."""
    found = {}
    for name in names:
        alone, reference = made(name, "replicated")
        steps(alone, reference, 0, 6)
        for how in ("flat", "nested", "full", "broadcast")[: 4 if name in GATHERED else 2]:
            model, optimizer = made(name, layout)
            if how in ("flat", "nested"):
                state = state_of(model, optimizer, how == "flat")
                dcp.load(state, checkpoint_id=f"{folder}/{name}-{how == 'flat'}")
                options = FLAT if how == "flat" else StateDictOptions()
                set_model_state_dict(model, state["model"])
            else:
                options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=how == "broadcast")
                reads = how == "full" or dist.get_rank() == 0
                state = {"model": {}, "optimizer": {}}
                if reads:
                    state = torch.load(f"{folder}/{name}.pt", weights_only=True)
                set_model_state_dict(model, state["model"], options=options)
            set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
            steps(model, optimizer, 3, 6)
            found[f"{name}, {how}"] = max(
                distance(p, whole) for p, whole in zip(model.parameters(), alone.parameters(), strict=True)
            )
    return found


def distance(p: Tensor, whole: Tensor) -> float:
    if not is_dtensor(p):
        return float((p - whole).detach().abs().max())
    pairs = [(local_of(p)[box.local_slices], whole[box.slices]) for box in spread_of("p", p).boxes(dist.get_rank())]
    return max((float((a - b).detach().abs().max()) for a, b in pairs), default=0.0)


def go_through(folder: str, move: tuple[int, str, int, str], names: Sequence[str]) -> None:
    before, layout, after, other = move
    run(before, save, layout, folder, names, timeout=600)
    for found in run(after, load, other, folder, names, timeout=600):
        assert {key: far for key, far in found.items() if not far <= 1e-10} == {}


@pytest.mark.parametrize("move", [MOVES[0], MOVES[3]], ids=lambda move: "-".join(map(str, move)))
def test_a_run_goes_on_with_other_processes(tmp_path: Path, move: tuple[int, str, int, str]) -> None:
    go_through(str(tmp_path), move, GATHERED)


@pytest.mark.slow  # a sweep; two moves of two optimizers are in every run
@pytest.mark.parametrize("move", MOVES, ids=lambda move: "-".join(map(str, move)))
def test_a_run_of_every_kind_goes_on(tmp_path: Path, move: tuple[int, str, int, str]) -> None:
    go_through(str(tmp_path), move, NAMES)


def save_asynchronously(folder: str) -> float:
    model, optimizer = made("soap", "fsdp")
    steps(model, optimizer, 0, 3)
    group = dist.new_group(backend="gloo")  # training goes on with the other one
    future = dcp.async_save(state_of(model, optimizer, False), checkpoint_id=folder, process_group=group)
    steps(model, optimizer, 3, 4)
    future.result()
    again, other = made("soap", "fsdp")
    state = state_of(again, other, False)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(again, state["model"])
    set_optimizer_state_dict(again, other, state["optimizer"])
    steps(again, other, 3, 4)
    return max(
        float((local_of(a) - local_of(b)).detach().abs().max()) if local_of(a).numel() else 0.0
        for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_a_checkpoint_is_written_while_training_goes_on(tmp_path: Path) -> None:
    assert run(2, save_asynchronously, str(tmp_path)) == [0.0, 0.0]


def die_while_saving(folder: str) -> None:
    """Rank 1 is killed in the middle of the second save."""
    model, optimizer = made("soap", "fsdp")
    steps(model, optimizer, 0, 3)
    dcp.save(state_of(model, optimizer, False), checkpoint_id=f"{folder}/1")
    steps(model, optimizer, 3, 4)
    state = state_of(model, optimizer, False)
    if dist.get_rank() == 1:
        write = dcp.FileSystemWriter.write_data

        def killed(*args: Any, **kwargs: Any) -> Any:
            write(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        dcp.FileSystemWriter.write_data = killed  # type: ignore[method-assign]  # for this process alone
    dcp.save(state, checkpoint_id=f"{folder}/2")


def go_on(folder: str) -> float:
    model, optimizer = made("soap", "fsdp")
    state = state_of(model, optimizer, False)
    dcp.load(state, checkpoint_id=f"{folder}/1")
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    steps(model, optimizer, 3, 6)
    alone, reference = made("soap", "replicated")
    steps(alone, reference, 0, 6)
    return max(distance(p, whole) for p, whole in zip(model.parameters(), alone.parameters(), strict=True))


def test_a_killed_process_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"rank 1 died"):
        run(2, die_while_saving, str(tmp_path))
    assert all(far <= 1e-10 for far in run(2, go_on, str(tmp_path)))


def first_state_of_zero_gradients() -> list[float]:
    """How far weights have moved while torch asks for the state."""
    model, optimizer = made("soap", "fsdp")
    before = [local_of(p).clone() for p in model.parameters()]
    get_optimizer_state_dict(model, optimizer)
    return [float((a - local_of(b)).abs().sum()) for a, b in zip(before, model.parameters(), strict=True)]


def test_asking_for_the_state_moves_nothing() -> None:
    assert not any(map(any, run(2, first_state_of_zero_gradients)))


def experts_of_one_process() -> None:
    """Each expert is two heads, so each entry of the parameter's first axis has two matrices of state."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    generator = torch.Generator().manual_seed(0)
    start, first, second = torch.randn(3, 4, 10, 4, generator=generator, dtype=torch.float64)

    def make(p: nn.Parameter) -> torch.optim.Optimizer:
        return SOAP([{"params": [p], "matrix_view": ("heads", 2)}], lr=0.1)

    whole = nn.Parameter(start.clone())
    alone = make(whole)
    whole.grad = first
    alone.step()
    p = nn.Parameter(distribute_tensor(whole.data, init_device_mesh("cpu", (2,)), [Shard(0)]))
    sharded = make(p)
    sharded.load_state_dict(alone.state_dict())
    for q, optimizer in ((whole, alone), (p, sharded)):
        q.grad = part_of(second, q)
        optimizer.step()
    rank = dist.get_rank()
    assert torch.equal(local_of(p), whole[2 * rank : 2 * rank + 2])


def test_experts_of_several_matrices_go_from_one_process_to_two() -> None:
    run(2, experts_of_one_process)
