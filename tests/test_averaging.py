"""Averages of weights beside any optimizer: exact means, exchanged bit for bit, resumed bit for bit."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from emerging_optimizers import create_optimizer
from emerging_optimizers.averaging import ScheduleFree, WeightAverage
from tests.distributed.processes import run

MAKERS: dict[str, Callable[[nn.Module], Any]] = {
    "muon": lambda model: create_optimizer("muon", model, lr=0.02),
    "soap": lambda model: create_optimizer("soap", model, lr=3e-3, weight_decay=0.1),
    "torch": lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3),
}
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).to(dtype)


def train(model: nn.Module, optimizer: Any, steps: range) -> list[list[torch.Tensor]]:
    """The weights after each step."""
    seen = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
        seen.append([p.detach().clone() for p in model.parameters()])
    return seen


@every_maker
@pytest.mark.parametrize(("decay", "start"), [(0.9, 0), (0.5, 2), (1.0, 0), (1.0, 3), (0.0, 0)])
def test_the_average_is_the_exact_mean(make: Any, decay: float, start: int) -> None:
    model = net()
    optimizer = make(model)
    average = WeightAverage(optimizer, decay, start)
    seen = train(model, optimizer, range(7))[start:]
    shares = [decay ** (len(seen) - 1 - i) if decay else float(i == len(seen) - 1) for i in range(len(seen))]
    for k, p in enumerate(model.parameters()):
        mean = sum(share * w[k].double() for share, w in zip(shares, seen, strict=True)) / sum(shares)
        torch.testing.assert_close(optimizer.state[p]["average"].double(), mean, rtol=1e-5, atol=1e-6)
    before = [p.detach().clone() for p in model.parameters()]
    average.eval()
    assert average.mode == "eval"
    assert all(torch.equal(p, optimizer.state[p]["average"]) for p in model.parameters())
    with pytest.raises(RuntimeError, match=r"call train\(\) before the step. Nothing has moved"):
        optimizer.step()
    average.train()
    assert average.mode == "train"
    assert all(map(torch.equal, model.parameters(), before))


@every_maker
@pytest.mark.parametrize("layer", [lambda o: WeightAverage(o, 0.9), ScheduleFree], ids=["average", "schedule-free"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_is_the_same(make: Any, layer: Any, mode: str, dtype: torch.dtype) -> None:
    """Also in bfloat16, to which torch's optimizers round what they load."""
    model = net(dtype)
    optimizer = make(model)
    whole = layer(optimizer)
    train(model, optimizer, range(6))

    first = net(dtype)
    optimizer_1 = make(first)
    average = layer(optimizer_1)
    train(first, optimizer_1, range(3))
    getattr(average, mode)()
    saved = copy.deepcopy((first.state_dict(), optimizer_1.state_dict()))

    second = net(dtype)
    optimizer_2 = make(second)
    resumed = layer(optimizer_2)
    second.load_state_dict(saved[0])
    optimizer_2.load_state_dict(saved[1])
    assert resumed.mode == mode
    resumed.train()
    train(second, optimizer_2, range(3, 6))
    assert all(map(torch.equal, second.parameters(), model.parameters()))
    whole.eval()
    resumed.eval()
    assert all(map(torch.equal, second.parameters(), model.parameters()))


def test_schedule_free_is_the_papers() -> None:
    """Against its three lines in float64, with a warm-up, over plain gradient descent."""
    model = net(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layer = ScheduleFree(optimizer, beta=0.8)
    w = [p.detach().clone() for p in model.parameters()]
    z, x, squares = [t.clone() for t in w], [t.clone() for t in w], 0.0
    for step in range(8):
        lr = 0.1 * min(1, (step + 1) / 4)
        optimizer.param_groups[0]["lr"] = lr
        squares += lr**2
        for k, p in enumerate(model.parameters()):
            p.grad = torch.sin(3 * p.detach())
            y = 0.2 * z[k] + 0.8 * x[k]
            torch.testing.assert_close(p.detach(), y, rtol=1e-12, atol=1e-12)
            z[k] = z[k] - lr * torch.sin(3 * y)
            x[k] = x[k] + lr**2 / squares * (z[k] - x[k])
        optimizer.step()
    layer.eval()
    for p, mean in zip(model.parameters(), x, strict=True):
        torch.testing.assert_close(p.detach(), mean, rtol=1e-12, atol=1e-12)


@every_maker
def test_a_weight_without_a_gradient_has_no_average_until_it_gets_one(make: Any) -> None:
    model = net()
    optimizer = make(model)
    average = WeightAverage(optimizer, 0.9)
    last = [*model.parameters()][-2]
    for p in model.parameters():
        p.grad = None if p is last else torch.ones_like(p)
    optimizer.step()
    average.eval()
    average.train()
    train(model, optimizer, range(2))  # torch's own would miss its moments, were an entry made before them
    assert "average" in optimizer.state[last]


def test_low_precision_is_averaged_in_float32() -> None:
    model = net(torch.bfloat16)
    optimizer = create_optimizer("muon", model, lr=0.02)
    average = WeightAverage(optimizer, 1.0)
    seen = train(model, optimizer, range(4))
    p = next(model.parameters())
    mean = sum(w[0].double() for w in seen) / 4
    torch.testing.assert_close(optimizer.state[p]["average"].double(), mean, rtol=1e-6, atol=1e-6)
    average.eval()
    assert torch.equal(p, optimizer.state[p]["average"].bfloat16())


def test_a_step_that_raises_is_taken_back_by_train() -> None:
    model = net()
    optimizer = create_optimizer("adamw", model, lr=0.02, nonfinite="raise")
    free = ScheduleFree(optimizer)
    (*_, before) = train(model, optimizer, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    next(model.parameters()).grad.fill_(float("nan"))
    with pytest.raises(ValueError, match="nothing has moved"):
        optimizer.step()
    free.train()
    assert all(map(torch.equal, model.parameters(), before))
    after = optimizer.state_dict()
    assert all(
        torch.equal(torch.as_tensor(x), torch.as_tensor(after["state"][i][key]))
        for i, entries in state["state"].items()
        for key, x in entries.items()
    )


def test_what_is_wrong_is_named() -> None:
    optimizer = torch.optim.SGD(net().parameters(), lr=0.1)
    for wrong, match in (
        ({"decay": 1.5}, r"decay=1.5 is not allowed; give a number in \[0, 1\]"),
        ({"decay": "0.9"}, "decay='0.9'"),
        ({"start": -1}, "start=-1"),
        ({"start": True}, "start=True"),
    ):
        with pytest.raises(ValueError, match=match):
            WeightAverage(optimizer, **wrong)
    with pytest.raises(ValueError, match="beta=1 is not allowed"):
        ScheduleFree(optimizer, beta=1)
    with pytest.raises(TypeError, match="optimizer is a Sequential"):
        WeightAverage(net())  # type: ignore[arg-type]  # the mistake
    ScheduleFree(optimizer)
    with pytest.raises(RuntimeError, match="call the closure yourself"):
        optimizer.step(lambda: torch.zeros(()))


def sharded() -> list[float]:
    """How far averages of a sharded model are from those of one process."""
    from torch.distributed.fsdp import fully_shard

    from emerging_optimizers.testing.one_process import part_of

    far = []
    for layer in (lambda o: WeightAverage(o, 0.9), ScheduleFree):
        alone, model = net(), net()
        fully_shard(model)
        pair = [create_optimizer("muon", m, lr=0.02) for m in (alone, model)]
        layers = [layer(optimizer) for optimizer in pair]
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            for p, q in zip(alone.parameters(), model.parameters(), strict=True):
                p.grad = torch.randn(p.shape, generator=generator)
                q.grad = part_of(p.grad, q)
            for optimizer in pair:
                optimizer.step()
        for x in layers:
            x.eval()
        pairs = zip(alone.parameters(), model.parameters(), strict=True)
        far.append(max(float((p - q.full_tensor()).abs().max()) for p, q in pairs))
    return far


def test_averages_of_a_sharded_model_are_those_of_one_process() -> None:
    assert all(distance < 1e-5 for found in run(2, sharded) for distance in found)
