"""Processes decide alike, and whatever is wrong on one of them is an error on all of them."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from emerging_optimizers import SpikeWatch, create_optimizer
from emerging_optimizers.distributed.dtensor import local_of
from emerging_optimizers.distributed.groups import new_group
from emerging_optimizers.linalg.precision import reduced_precision
from emerging_optimizers.testing.one_process import part_of
from tests.distributed.processes import fsdp, gradients, make_net, mixed, run


def meet() -> None:
    """Some make a group of their own first, as the owners of matrices do; then all but one make one together."""
    rank = dist.get_rank()
    for _ in range(rank):
        new_group((rank,))
    for _ in range(2):
        if rank != 0:
            total = torch.ones(1)
            dist.all_reduce(total, group=new_group((1, 2)))
            assert float(total) == 2
    total = torch.ones(1)
    dist.all_reduce(total, group=dist.new_group())  # which torch names by how many have been made
    assert float(total) == 3


def test_processes_meet_in_a_group_whatever_others_they_are_in() -> None:
    run(3, meet, timeout=30)


def sharded(name: str = "muon", **options: Any) -> tuple[nn.Module, Any]:
    """A model under FSDP2 and its optimizer."""
    model = make_net()
    fsdp(model)
    return model, create_optimizer(name, model, lr=0.01, **options)


def give_gradients(model: nn.Module, step: int = 0) -> None:
    given = gradients(step, {name: p.shape for name, p in model.named_parameters()})
    for name, p in model.named_parameters():
        p.grad = part_of(given[name], p) if name in given else None


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [local_of(p).clone() for p in model.parameters()]


def error_of(model: nn.Module, optimizer: Any, spoil: Callable[[], None]) -> tuple[str, bool, str]:
    """What a step raises after one that went well, whether weights stayed, and what the step after it raises."""
    give_gradients(model)
    optimizer.step()
    give_gradients(model)
    before = weights(model)
    undo = spoil()
    try:
        optimizer.step()
        message = "nothing"
    except Exception as error:  # its text is what is asked for
        message = f"{type(error).__name__}: {error}"
    stayed = all(map(torch.equal, before, weights(model)))
    if undo is not None:
        undo()
    give_gradients(model)
    try:
        optimizer.step()
        after = "nothing"
    except Exception as error:  # its text is what is asked for
        after = f"{type(error).__name__}: {error}"
    return message, stayed, after


def missing() -> Any:
    model, optimizer = sharded()

    def spoil() -> None:
        if dist.get_rank() == 1:
            model.up.weight.grad = None

    return error_of(model, optimizer, spoil)


def other_rate() -> Any:
    model, optimizer = sharded("soap")

    def spoil() -> Callable[[], None]:
        before = optimizer.param_groups[0]["lr"]
        optimizer.param_groups[0]["lr"] = before * (1 + dist.get_rank())
        return lambda: optimizer.param_groups[0].update(lr=before)

    return error_of(model, optimizer, spoil)


def other_medium() -> Any:
    """Processes on CPUs of two kinds, of which one multiplies bfloat16 fast."""
    model, optimizer = sharded()

    def spoil() -> Callable[[], None]:
        block = reduced_precision("bfloat16" if dist.get_rank() else "float32")
        block.__enter__()
        return lambda: block.__exit__(None, None, None)

    return error_of(model, optimizer, spoil)


def bad_option() -> Any:
    model, optimizer = sharded()

    def spoil() -> Callable[[], None]:
        before = optimizer.param_groups[0]["momentum"]
        if dist.get_rank() == 1:
            optimizer.param_groups[0]["momentum"] = 2.0
        return lambda: optimizer.param_groups[0].update(momentum=before)

    return error_of(model, optimizer, spoil)


def not_finite() -> Any:
    model, optimizer = sharded(nonfinite="raise")

    def spoil() -> None:
        if dist.get_rank() == 0:
            local_of(model.down.weight.grad).view(-1)[0] = torch.inf

    return error_of(model, optimizer, spoil)


def failing_owner() -> Any:
    """The rule of one process raises for what it owns."""
    from emerging_optimizers.engine import run as engine_run

    model, optimizer = sharded()

    def spoil() -> Callable[[], None]:
        call = engine_run.call

        def fail(*args: Any) -> Any:
            raise torch.OutOfMemoryError("no memory left")

        if dist.get_rank() == 1:
            engine_run.call = fail
        return lambda: setattr(engine_run, "call", call)

    return error_of(model, optimizer, spoil)


def failing_part() -> Any:
    """One process cannot work on the experts that lie there; behind them come elements whose norms all sum up."""
    from emerging_optimizers.engine import run as engine_run

    model = make_net()
    mixed(model)
    optimizer = create_optimizer("muon", model, lr=0.01, overrides={"experts": "muon"})

    def spoil() -> Callable[[], None]:
        call = engine_run.call

        def fail(rule: Any, grad: torch.Tensor, *args: Any) -> Any:
            if dist.get_rank() == 1 and grad.shape[1:] == (6, 4):
                raise torch.OutOfMemoryError("no memory left")
            return call(rule, grad, *args)

        engine_run.call = fail
        return lambda: setattr(engine_run, "call", call)

    return error_of(model, optimizer, spoil)


def other_model() -> Any:
    """Processes that made different optimizers."""
    model = make_net()
    fsdp(model)
    names = {"overrides": {"up.weight": "adamw"}} if dist.get_rank() == 1 else {}
    optimizer = create_optimizer("muon", model, lr=0.01, **names)
    give_gradients(model)
    try:
        optimizer.step()
    except Exception as error:  # its text is what is asked for
        return f"{type(error).__name__}: {error}"
    return "nothing"


def late() -> Any:
    """The optimizer is made before the model is sharded; then its groups are pointed at the new parameters."""
    model = make_net()
    optimizer = create_optimizer("muon", model, lr=0.01)
    fsdp(model)
    give_gradients(model)
    try:
        optimizer.step()
        message = "nothing"
    except Exception as error:  # its text is what is asked for
        message = f"{type(error).__name__}: {error}"
    new = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [new[name] for name in group["param_names"]]
    optimizer.step()
    other, early = sharded()
    give_gradients(other)
    early.step()
    return message, all(map(torch.equal, weights(model), weights(other)))


def counted() -> Any:
    """What the guard has counted: all know it, one may ask alone, and new stacks, copies and checkpoints keep it."""
    model, optimizer = sharded(spike_guard=2.0)
    for step in range(5):
        give_gradients(model, step)
        optimizer.step()
    first = optimizer.guard_events() if dist.get_rank() == 0 else {}
    for group in optimizer.param_groups:
        group["state_dtype"] = torch.bfloat16  # new stacks
    give_gradients(model, 3)
    optimizer.step()
    again = copy.deepcopy(optimizer)
    again.load_state_dict(optimizer.state_dict())
    return first, optimizer.guard_events(), again.guard_events()


def captured() -> Any:
    """Steps that a graph is to repeat."""
    try:
        sharded(capturable=True)
    except ValueError as error:
        return str(error)
    return "nothing"


def watched() -> Any:
    """A watch over parameters that are not whole here."""
    try:
        SpikeWatch(sharded()[1])
    except ValueError as error:
        return str(error)
    return "nothing"


_ALL = (
    missing, other_rate, other_medium, bad_option, not_finite, failing_owner, failing_part, other_model, late,
    counted, captured, watched,
)  # fmt: skip
SCENARIOS = {f.__name__: f for f in _ALL}


def everything() -> dict[str, Any]:
    """All scenarios, in each process."""
    return {name: scenario() for name, scenario in SCENARIOS.items()}


@pytest.fixture(scope="module")
def happened() -> list[dict[str, Any]]:
    return run(2, everything)


@pytest.mark.parametrize(
    ("scenario", "here", "there"),
    [
        ("missing", r"the gradient of .*up.weight.* is there on rank 0 and missing on rank 1", None),
        ("other_rate", r"param_groups\[0\]\['lr'\] is 0.01 on rank 0 and 0.02 on rank 1", None),
        ("other_medium", r"'medium' .* is torch.float32 on rank 0 and torch.bfloat16 on rank 1", None),
        ("bad_option", r"rank 1 cannot take this step.*momentum", r"momentum=2.0"),
        ("not_finite", r"the gradient of .*down.weight.* is not finite", r"rank 0 cannot take.*down.weight"),
    ],
)
def test_what_is_wrong_on_one_process_is_an_error_on_all_and_nothing_moves(
    happened: list[dict[str, Any]], scenario: str, here: str, there: str | None
) -> None:
    for rank, pattern in enumerate((here, there or here)):
        message, stayed, after = happened[rank][scenario]
        assert re.search(pattern, message), message
        assert stayed
        assert after == "nothing"


def test_what_an_owner_could_not_work_on_stays_and_everyone_hears_of_it(happened: list[dict[str, Any]]) -> None:
    ours, _, after = happened[1]["failing_owner"]
    theirs, _, after_there = happened[0]["failing_owner"]
    assert "no memory left" in ours
    assert re.search(r"rank 1 could not work on what it owns, .*weight", theirs), theirs
    assert after == after_there == "nothing"


def test_a_part_that_fails_keeps_nobody_waiting(happened: list[dict[str, Any]]) -> None:
    for rank, message in enumerate(("nothing", "OutOfMemoryError: no memory left")):
        said, stayed, after = happened[rank]["failing_part"]
        assert said == message
        assert not stayed  # everything else has moved
        assert after == "nothing"


def test_parameters_that_were_replaced_are_an_error_and_the_new_ones_work(happened: list[dict[str, Any]]) -> None:
    for rank in (0, 1):
        message, alike = happened[rank]["late"]
        assert "fully_shard" in message
        assert alike


def test_all_know_what_the_guard_has_counted(happened: list[dict[str, Any]]) -> None:
    first, then, again = happened[0]["counted"]
    assert set(first.values()) == {(1, 0), (0, 1), (1, 1)}
    assert sum(skipped for _, skipped in then.values()) == 2 * sum(skipped for _, skipped in first.values())
    assert then == again == happened[1]["counted"][1] == happened[1]["counted"][2]


def test_a_graph_of_sharded_parameters_is_refused(happened: list[dict[str, Any]]) -> None:
    assert "capturable=True is not possible for sharded parameters" in happened[0]["captured"]


def test_a_watch_over_sharded_parameters_is_refused(happened: list[dict[str, Any]]) -> None:
    assert "is sharded" in happened[0]["watched"]


def test_other_routes_are_an_error(happened: list[dict[str, Any]]) -> None:
    for rank in (0, 1):
        assert "rank 0" in happened[rank]["other_model"]
        assert "rank 1" in happened[rank]["other_model"]
