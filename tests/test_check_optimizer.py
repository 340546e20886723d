"""`check_optimizer`: every optimizer of ours passes, and each check finds the fault that it is for."""

import json
from typing import Any

import pytest
import torch
from torch import nn

from emerging_optimizers.lab.__main__ import main
from emerging_optimizers.registry import OPTIMIZERS
from emerging_optimizers.testing import check_optimizer
from emerging_optimizers.testing.conformance import CHECKS, made_by

NAMES = [check.name for check in CHECKS]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ours_pass(name: str) -> None:
    report = check_optimizer(made_by(name), name=name)
    assert [row.name for row in report] == NAMES
    assert all(row.link.startswith("https://docs.p") for row in report)


class Plain(torch.optim.Optimizer):
    """W <- W - lr g, with a buffer, right in every respect that is checked; its relatives have a fault each."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if param_group.get("lr", 0.1) < 0:
            raise ValueError("lr must be >= 0")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.isfinite().all():
                    state = self.state[p]
                    if "sum" not in state:
                        state["sum"] = torch.zeros_like(p)
                    self.move(p, state, group["lr"])
        return loss

    def move(self, p: Any, state: Any, lr: float) -> None:
        state["sum"].add_(p.grad)
        p.sub_(lr * (p.grad + 0.1 * state["sum"]))


class KeepsARate(Plain):
    def move(self, p, state, lr):
        super().move(p, state, self.defaults["lr"])


class WritesGradients(Plain):
    def move(self, p, state, lr):
        p.grad.mul_(1)
        super().move(p, state, lr)


class ForgetsTheLoss(Plain):
    def step(self, closure=None):
        super().step(closure)


class TakesNaN(Plain):
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.data.sub_(0.1 * p.grad)


class DividesByTheNorm(Plain):
    def move(self, p, state, lr):
        p.sub_(lr * p.grad / p.grad.norm())


class MakesDefaultDtype(Plain):
    def move(self, p, state, lr):
        p.sub_((lr * torch.ones(p.shape) * p.grad / 3).to(p.dtype))


class KeepsStateElsewhere(Plain):
    def move(self, p, state, lr):
        self.steps = getattr(self, "steps", 0) + 1
        p.sub_(lr * p.grad / self.steps)


class KeepsAFunction(Plain):
    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.defaults["schedule"] = self.param_groups[0]["schedule"] = lambda step: step


class KeepsParameters(Plain):
    def __init__(self, params, lr=0.1):
        super().__init__(params, lr)
        self.mine = [p for group in self.param_groups for p in group["params"]]

    def step(self, closure=None):
        for p in self.mine:
            if p.grad is not None:
                p.data.sub_(self.param_groups[0]["lr"] * p.grad)


class KeepsEveryGradient(Plain):
    def move(self, p, state, lr):
        self.__dict__.setdefault("seen", []).append(p.grad)
        super().move(p, state, lr)


class DrawsNumbers(Plain):
    def move(self, p, state, lr):
        p.sub_(lr * p.grad * torch.rand(p.shape, generator=torch.Generator().manual_seed(id(self) + id(p))))


class TakesAnyRate(Plain):
    def add_param_group(self, param_group):
        torch.optim.Optimizer.add_param_group(self, param_group)


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (Plain, set()),
        (KeepsARate, {"a learning rate of 0", "the learning rate is read in every step"}),
        (WritesGradients, {"gradients are only read", "expanded gradients"}),
        (ForgetsTheLoss, {"a closure"}),
        (TakesNaN, {"a gradient that is not finite", "a learning rate of 0"}),
        (DividesByTheNorm, {"zero gradients"}),
        (MakesDefaultDtype, {"default device"}),
        (KeepsStateElsewhere, {"a checkpoint resumes", "a flattened checkpoint of DCP"}),
        (KeepsAFunction, {"pickle", "torch.load with weights_only"}),
        (KeepsParameters, {"groups edited between steps", "add_param_group"}),
        (KeepsEveryGradient, {"memory over 200 steps"}),
        (DrawsNumbers, {"the same again"}),
        (TakesAnyRate, {"a wrong learning rate"}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_fault_is_found(kind: Any, found: set[str]) -> None:
    report = check_optimizer(kind, raises=False)
    failed = {row.name for row in report.failures}
    assert found <= failed if found else not failed, str(report)
    assert all(row.reason for row in report.failures)


def test_a_failure_is_an_error_with_the_table() -> None:
    with pytest.raises(AssertionError, match=r"ForgetsTheLoss fails 1 of 1 checks:\na closure +FAILS +step"):
        check_optimizer(ForgetsTheLoss, only=["a closure"])
    with pytest.raises(ValueError, match="only='closures' is no check; there are 'weights move', 'a closure'"):
        check_optimizer(Plain, only=["closures"])


def test_what_is_set_is_put_back() -> None:
    before = torch.get_rng_state()
    check_optimizer(Plain)
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), before)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", "lion"])
    assert "\nlion: 31 of 31 checks pass" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["check", "torch.optim:SGD", "--lr", "0.1", "--json"])
    assert ended.value.code == 1
    told = json.loads(capsys.readouterr().out)
    assert told["subject"] == "torch.optim:SGD"
    assert {row["name"] for row in told["rows"] if row["passed"] is False} >= {"a gradient that is not finite"}
    for subject, wrong in (("lionn", "lionn"), ("torch.optim:Lyon", "names no callable"), ("nowhere:X", "names no")):
        with pytest.raises(SystemExit, match=wrong):
            main(["check", subject])


def test_vectors_are_left_out_where_they_are_refused() -> None:
    def matrices_only(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        assert all(p.ndim == 2 for p in params), "matrices only"
        return Plain(params)

    assert not check_optimizer(matrices_only).failures
