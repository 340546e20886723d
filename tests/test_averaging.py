"""Averages of weights beside any optimizer: exact means, exchanged bit for bit, resumed bit for bit."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

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


@pytest.mark.parametrize(("decay", "expected"), [(1.0, 11 / 4), (0.5, 2 / 15 + 2 * 4 / 15 + 3 * 8 / 15)])
def test_a_weight_whose_gradients_begin_late_counts_before_as_it_was(decay: float, expected: float) -> None:
    early, late = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = torch.optim.SGD([early, late], lr=1.0)
    WeightAverage(optimizer, decay)
    steps, begins = (20, 10) if decay == 1 else (4, 1)
    for step in range(steps):
        early.grad, late.grad = -torch.ones(2), -torch.ones(2) if step >= begins else None
        optimizer.step()
    assert optimizer.state[late]["average"].tolist() == pytest.approx([expected] * 2)


def test_schedule_free_of_a_weight_whose_gradients_begin_late() -> None:
    """Its average has only a share of the first step, as in the paper where gradients before are zero."""
    early, late = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([early, late], lr=1.0)
    ScheduleFree(optimizer, beta=0.5)
    for step in range(4):
        early.grad, late.grad = -torch.ones(1), -torch.ones(1) if step == 3 else None
        optimizer.step()
    assert (optimizer.state[late]["average"].item(), late.item()) == (0.25, 0.625)


@pytest.mark.parametrize("layer", [lambda o: WeightAverage(o, 0.9), ScheduleFree], ids=["average", "schedule-free"])
def test_a_step_that_the_user_compiles(layer: Any) -> None:
    """Compiled with it, ScheduleFree's writes came in another order, and weights were 0.1 off after three steps."""
    models = [net(), net()]
    for model, wrap in zip(models, (lambda step: step, torch.compile), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        averaged = layer(optimizer)
        optimizer.step = wrap(optimizer.step)  # type: ignore[method-assign]  # as a user would call it
        train(model, optimizer, range(4))
        averaged.eval()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@every_maker
def test_a_copy_of_an_optimizer_and_its_average_goes_on(make: Any, copied: Any) -> None:
    model = net()
    optimizer = make(model)
    average = WeightAverage(optimizer, 0.9)
    train(model, optimizer, range(2))
    others = copied((model, optimizer, average))
    for here, steps, layer in ((model, optimizer, average), others):
        train(here, steps, range(2, 4))
        layer.eval()
    assert all(map(torch.equal, model.parameters(), others[0].parameters()))
    assert optimizer.param_groups[0]["averaged_steps"] == others[1].param_groups[0]["averaged_steps"] == 4


@every_maker
@pytest.mark.parametrize("layer", [lambda o: WeightAverage(o, 0.9), ScheduleFree], ids=["average", "schedule-free"])
def test_through_the_states_of_distributed_checkpoints(make: Any, layer: Any) -> None:
    """Which keep entries and groups and nothing else, and of an optimizer's entries those that it has here."""
    parts = []
    for _ in range(2):
        model = net(torch.bfloat16)
        optimizer = make(model)
        parts.append((model, optimizer, layer(optimizer)))
    (model, optimizer, average), (other, resumed, again) = parts
    train(model, optimizer, range(3))
    saved = copy.deepcopy((get_model_state_dict(model), get_optimizer_state_dict(model, optimizer)))
    set_model_state_dict(other, saved[0])
    set_optimizer_state_dict(other, resumed, saved[1])
    for m, o in ((model, optimizer), (other, resumed)):
        train(m, o, range(3, 6))
    for x in (average, again):
        x.eval()
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_checkpoint_that_lacks_the_weights_of_training_is_refused() -> None:
    """As torch.distributed.checkpoint reads one of mode "eval"; schedule-free makes them out of what it has."""
    for layer in (WeightAverage, ScheduleFree):
        model, other = net(), net()
        pair = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other)]
        average, again = map(layer, pair)
        (*_, trained) = train(model, pair[0], range(3))
        average.eval()
        saved = copy.deepcopy(pair[0].state_dict())
        for state in saved["state"].values():
            state.pop("trained_weight", None)
        other.load_state_dict(model.state_dict())
        if layer is WeightAverage:
            with pytest.raises(ValueError, match=r"written in mode 'eval', .* Nothing has changed"):
                pair[1].load_state_dict(saved)
            assert not pair[1].state
        else:
            pair[1].load_state_dict(saved)
            again.train()
            assert all(map(torch.equal, other.parameters(), trained))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float64), (torch.float64, torch.bfloat16)], ids=str)
@every_maker
def test_a_checkpoint_of_weights_in_another_precision(make: Any, dtypes: Any) -> None:
    """The precision of z and of the average is that of the weights that are here."""
    models = [net(dtype) for dtype in dtypes]
    optimizers = [make(m) for m in models]
    for optimizer in optimizers:
        ScheduleFree(optimizer)
    train(models[0], optimizers[0], range(2))
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for p, old in zip(models[1].parameters(), models[0].parameters(), strict=True):
        state, was = optimizers[1].state[p], optimizers[0].state[old]
        assert (state["z"].dtype, state["average"].dtype) == (p.dtype, torch.promote_types(p.dtype, torch.float32))
        assert torch.equal(state["average"], was["average"].to(state["average"].dtype))
    train(models[1], optimizers[1], range(2, 4))


def test_complex_weights_and_inference_mode() -> None:
    w = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    optimizer = torch.optim.SGD([w], lr=1.0)
    average = WeightAverage(optimizer, 1.0)
    for _ in range(3):
        w.grad = torch.tensor([-1 - 2j, 1j])
        with torch.inference_mode():
            optimizer.step()
            average.eval()
            assert w.tolist()[0].imag > 0
            average.train()
        w.grad = None
    optimizer.step()  # outside: nothing that inference mode made may be written then
    average.eval()
    assert w.tolist() == [2.25 + 4.5j, -2.25j]


@pytest.mark.parametrize("layer", [WeightAverage, ScheduleFree])
def test_a_step_that_a_cuda_graph_records_is_refused(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: the question is answered for it."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layer(optimizer)
    monkeypatch.setattr("emerging_optimizers.averaging.is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="which would repeat its share in the average"):
        train(model, optimizer, range(1))
    assert all(map(torch.equal, model.parameters(), net().parameters()))


def test_a_second_average_is_refused() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    WeightAverage(optimizer)
    for layer in (WeightAverage, ScheduleFree):
        with pytest.raises(ValueError, match="this SGD has an average already, and its state has room for one"):
            layer(optimizer)
    WeightAverage(copy.deepcopy(optimizer))


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
    wrapper = object.__new__(type("Wrapper", (torch.optim.Optimizer,), {}))  # as accelerate has one: without hooks
    with pytest.raises(TypeError, match=r"optimizer is a Wrapper; give .* not what wraps it"):
        ScheduleFree(wrapper)
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


def evaluated() -> list[list[list[float]]]:
    """Losses of a sharded model and of one process; between steps the average is evaluated without gradients."""
    from torch.distributed.fsdp import fully_shard

    found = []
    for layer in (lambda o: WeightAverage(o, 0.5), ScheduleFree):
        pair = []
        for shard in (False, True):
            model = net(torch.float64)
            if shard:
                fully_shard(model)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
            averaged, losses = layer(optimizer), []
            x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            for _ in range(3):
                loss = model(x).square().mean()
                loss.backward()
                optimizer.step(), optimizer.zero_grad()
                losses.append(loss.item())
                for exchange in (averaged.eval, averaged.train):
                    exchange()
                    with torch.no_grad():
                        losses.append(model(x).square().mean().item())
            pair.append(losses)
        found.append(pair)
    return found


def test_a_sharded_model_trains_on_after_its_average_was_evaluated() -> None:
    """FSDP2 keeps the root's gathered weights after an evaluation, and trained at the average in the next step."""
    for found in run(2, evaluated):
        for alone, shards in found:
            assert shards == pytest.approx(alone, rel=1e-9)


def test_averages_of_a_sharded_model_are_those_of_one_process() -> None:
    assert all(distance < 1e-5 for found in run(2, sharded) for distance in found)
