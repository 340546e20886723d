"""Checks of steps, gradients and groups. An assertion says what users would see."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from emerging_optimizers.distributed.dtensor import local_of, norm_of
from emerging_optimizers.testing.one_process import part_of
from emerging_optimizers.testing.subject import (
    Checks,
    Subject,
    close,
    copies,
    finite,
    give,
    moved_from,
    same,
    train,
)

_OPTIM = "https://docs.pytorch.org/docs/stable/optim.html"
_STEP = "https://docs.pytorch.org/docs/stable/generated/torch.optim.Optimizer.step.html"
_GROUPS = "https://docs.pytorch.org/docs/stable/generated/torch.optim.Optimizer.add_param_group.html"
_AMP = "https://docs.pytorch.org/docs/stable/amp.html"

CHECKS = Checks()


# ---- a step ----------------------------------------------------------------------------------------------------------


@CHECKS.add("weights move", _STEP)
def _(subject: Subject) -> None:
    parameters = subject.parameters()
    before = copies(parameters)
    train(parameters, subject.optimizer(parameters), range(3))
    assert all(moved_from(parameters, before)), "after three steps some weight is where it was"
    assert finite(parameters), "after three steps some weight is not finite"


@CHECKS.add("a closure", _STEP)
def _(subject: Subject) -> None:
    parameters, optimizer = subject.fresh()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((p.square().sum() for p in parameters), start=torch.zeros(()))
        loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert isinstance(loss, Tensor), f"step(closure) returns {type(loss).__name__}, not the loss"
    train(parameters, optimizer, range(1))  # and without one


@CHECKS.add(
    "step hooks", "https://docs.pytorch.org/docs/stable/generated/torch.optim.Optimizer.register_step_pre_hook.html"
)
def _(subject: Subject) -> None:
    parameters, optimizer = subject.fresh()
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(parameters, optimizer, range(2))
    assert seen == 2 * ["before", "after"], f"two steps call {seen}"


@CHECKS.add("a learning rate of 0", _OPTIM)
def _(subject: Subject) -> None:
    parameters, optimizer = subject.trained(2)
    before = copies(parameters)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(parameters, optimizer, range(2, 4))
    assert not any(moved_from(parameters, before)), "weights move at lr=0 (a warm-up's first step, DCP's own step)"


@CHECKS.add("schedulers", "https://docs.pytorch.org/docs/stable/optim.html#how-to-adjust-learning-rate")
def _(subject: Subject) -> None:
    kinds: list[Callable[[Any], Any]] = [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.01, total_steps=5, cycle_momentum=False),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o, [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [2]
        ),
    ]
    for make in kinds:
        parameters, optimizer = subject.fresh()
        schedule = make(optimizer)
        rates = []
        for step in range(4):
            train(parameters, optimizer, range(step, step + 1))
            rates.append(optimizer.param_groups[0]["lr"])
            schedule.step()
        assert len({float(rate) for rate in rates}) > 1, f"{type(schedule).__name__} leaves lr at {rates[0]}"
        assert finite(parameters), f"weights under {type(schedule).__name__} are not finite"
    parameters, optimizer = subject.fresh()
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for step in range(3):
        train(parameters, optimizer, range(step, step + 1))
        plateau.step(1.0)


@CHECKS.add("the learning rate is read in every step", _OPTIM)
def _(subject: Subject) -> None:
    moved = []
    for factor in (1.0, 0.5):
        parameters, optimizer = subject.trained(3)
        before = copies(parameters)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor
        train(parameters, optimizer, range(3, 4))
        moved.append([norm_of(p - x) for p, x in zip(parameters, before, strict=True)])
    ratios = [half / max(whole, 1e-30) for whole, half in zip(*moved, strict=True)]
    assert max(ratios) < 0.95, f"at half the rate weights move {max(ratios):.2f} times as far"


# ---- gradients -------------------------------------------------------------------------------------------------------


@CHECKS.add("gradients are only read", _STEP)
def _(subject: Subject) -> None:
    parameters, optimizer = subject.fresh()
    for step in range(3):
        give(parameters, step)
        grads = [p.grad for p in parameters if p.grad is not None]
        before, versions = copies(grads), [local_of(g)._version for g in grads]
        optimizer.step()
        assert same(grads, before), "a step changes p.grad, which clipping, logging and accumulation read afterwards"
        assert [local_of(g)._version for g in grads] == versions, (
            "a step writes into p.grad, which may be read-only memory (a segmentation fault)"
        )


@CHECKS.add("expanded gradients", _STEP)
def _(subject: Subject) -> None:
    results = []
    for expanded in (True, False):
        parameters, optimizer = subject.fresh()
        for _ in range(2):
            for p in parameters:
                grad = torch.full((), 0.5).expand(p.shape)
                p.grad = part_of(grad if expanded else grad.clone(), p)
            optimizer.step()
        results.append(parameters)
    assert close(*results), "a gradient that is an expanded scalar (of x.sum()) gives other weights than its copy"


@CHECKS.add("missing gradients", _STEP)
def _(subject: Subject) -> None:
    parameters, optimizer = subject.fresh()
    before = copies(parameters)
    for step in range(3):  # the first one may only make state, and signs of two may cancel
        give(parameters, step)
        parameters[0].grad = None
        optimizer.step()
    moved = moved_from(parameters, before)
    assert not moved[0], "a weight without a gradient moves"
    assert all(moved[1:]), "weights beside one without a gradient stay"
    train(parameters, optimizer, range(3, 5))  # it comes later
    assert finite(parameters), "weights are not finite after a gradient came late"


@CHECKS.add("zero gradients", _STEP)
def _(subject: Subject) -> None:
    parameters, optimizer = subject.fresh()
    for p in parameters:
        p.grad = torch.zeros_like(p)
    for _ in range(3):
        optimizer.step()
    assert finite(parameters), "weights are not finite after gradients of zero (an expert without tokens)"
    train(parameters, optimizer, range(3))
    assert finite(parameters), "weights are not finite after gradients of zero and then ordinary ones"


@CHECKS.add("a gradient that is not finite", _AMP)
def _(subject: Subject) -> None:
    for bad in (float("nan"), float("inf")):
        parameters, optimizer = subject.trained(2)
        give(parameters, 2)
        grad = parameters[0].grad
        assert grad is not None
        local_of(grad).view(-1)[0] = bad
        optimizer.step()
        train(parameters, optimizer, range(3, 6))
        assert finite(parameters), f"one {bad} in a gradient leaves weights that are never finite again"


@CHECKS.add("clipping", "https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html")
def _(subject: Subject) -> None:
    parameters, optimizer = subject.fresh()
    for step in range(3):
        give(parameters, step, scale=100.0)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    assert finite(parameters), "weights are not finite"


@CHECKS.add("GradScaler", _AMP)
def _(subject: Subject) -> None:
    parameters, optimizer = subject.trained(1)
    twins, twin = subject.trained(1)
    scaler = torch.amp.grad_scaler.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))  # which makes its scale
    give(parameters, 1, scale=1024.0)
    give(twins, 1)
    scaler.step(optimizer)
    scaler.update()
    twin.step()
    assert close(parameters, twins), "a scaled step is another one"
    before = copies(parameters)
    give(parameters, 2, scale=float("inf"))
    scaler.step(optimizer)
    scaler.update()
    assert not any(moved_from(parameters, before)), "a step whose gradients overflowed is taken"


# ---- groups ----------------------------------------------------------------------------------------------------------


@CHECKS.add("add_param_group", _GROUPS)
def _(subject: Subject) -> None:
    parameters, (late, *_) = subject.parameters(), subject.parameters()
    optimizer = subject.optimizer(parameters)
    train(parameters, optimizer, range(2))
    optimizer.add_param_group({"params": [late]})
    before = copies([late])
    train([*parameters, late], optimizer, range(2, 5))
    assert all(moved_from([late], before)), "a parameter that joins later does not move"


@CHECKS.add("groups edited between steps", _GROUPS)
def _(subject: Subject) -> None:
    parameters, optimizer = subject.trained(2)
    group = optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if p is not parameters[0]]
    before = copies(parameters)
    train(parameters, optimizer, range(2, 5))
    moved = moved_from(parameters, before)
    assert not moved[0], "a parameter that was taken out of its group goes on moving"
    assert all(moved[1:]), "parameters beside one that was taken out stay"


@CHECKS.add("a wrong learning rate", _OPTIM)
def _(subject: Subject) -> str:
    parameters, optimizer = subject.fresh()
    try:
        optimizer.add_param_group({"params": [nn.Parameter(parameters[0].detach().clone())], "lr": -1.0})
        train(parameters, optimizer, range(1))
    except (ValueError, RuntimeError) as refused:
        return f"refused: {' '.join(str(refused).split())[:80]}"
    raise AssertionError("a group with lr=-1.0 is taken without a word")
