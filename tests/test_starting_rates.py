"""Constructors at learning rates at which they do not train, and without one."""

import warnings
from inspect import Parameter, signature
from itertools import pairwise

import pytest
import torch
from torch import nn

from emerging_optimizers import MOP, SOAP, create_optimizer, registry
from emerging_optimizers.registry import OPTIMIZERS

DEFAULTS = {name: signature(known.load()).parameters["lr"].default for name, known in OPTIMIZERS.items()}
PUBLISHED = {name: lr for name, lr in DEFAULTS.items() if lr is not Parameter.empty}
IDLE = [name for name, known in OPTIMIZERS.items() if not known.default_trains]


def weights():
    return [nn.Parameter(torch.eye(4))]


@pytest.fixture
def nothing_said(monkeypatch):
    monkeypatch.setattr(registry, "_CAUTIONED", set())


@pytest.mark.usefixtures("nothing_said")
@pytest.mark.parametrize("name", IDLE)
def test_a_constructor_says_once_that_it_hardly_trains_at_its_published_default(name):
    cls, start = OPTIMIZERS[name].load(), OPTIMIZERS[name].start
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls(weights(), lr=start)
        create_optimizer(name, weights())
        create_optimizer(name, nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10)))
    with pytest.warns(
        UserWarning, match=rf"{cls.__name__}: lr={PUBLISHED[name]:g}, .* give lr, {start:g} to start with"
    ):
        assert cls(weights()).defaults["lr"] == PUBLISHED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls(weights(), lr=PUBLISHED[name])


@pytest.mark.usefixtures("nothing_said")
def test_the_rate_of_a_group_counts():
    with pytest.warns(UserWarning, match="MOP: lr=0.0003"):
        MOP(weights(), lr=3e-4)
    registry._CAUTIONED.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MOP([{"params": weights(), "lr": 0.1}])
        MOP(weights(), lr=torch.tensor(3e-4))  # it is not read


@pytest.mark.usefixtures("nothing_said")
def test_as_an_error_it_comes_every_time():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(UserWarning, match="published default"):
                MOP(weights())


@pytest.mark.parametrize("name", sorted(DEFAULTS.keys() - PUBLISHED.keys()))
def test_without_a_default_the_rate_to_start_from_is_named(name):
    start = OPTIMIZERS[name].start
    remedy = "give lr$" if start is None else f"give lr, {start:g} to start with"
    with pytest.raises(TypeError, match=f"{OPTIMIZERS[name].load().__name__} has no default learning rate; {remedy}"):
        OPTIMIZERS[name].load()(weights())


def test_a_subclass_names_the_rate_of_its_class():
    class Mine(SOAP):
        pass

    with pytest.raises(TypeError, match=r"Mine has no default learning rate; give lr, 0.009"):
        Mine(weights())
    assert Mine(weights(), 0.1).defaults["lr"] == 0.1


def loss_after(name, lr, steps):
    """Of an MLP that learns the labels of another, after some steps of an optimizer that has all its matrices."""
    numbers = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 32, generator=numbers)
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(32, 64, bias=False), nn.GELU(), nn.Linear(64, 32, bias=False))
    labels = teacher(inputs).argmax(1)
    sizes = (32, 64, 64, 32)
    layers = [nn.Linear(m, n, bias=False) for m, n in pairwise(sizes)]
    if name == "spel":  # whose weights are orthogonal
        for layer in layers:
            nn.init.orthogonal_(layer.weight)
    model = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
    optimizer = OPTIMIZERS[name].load()(model.parameters(), lr=lr)
    for _ in range(steps):
        batch = torch.randint(512, (128,), generator=numbers)
        nn.functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return nn.functional.cross_entropy(model(inputs), labels).item()


@pytest.mark.slow  # 400 steps of each; it says something of the published rates
@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_which_published_defaults_do_not_train(name):
    before, after = (loss_after(name, PUBLISHED[name], steps) for steps in (0, 400))
    assert (after > before * 0.94) == (name in IDLE), (before, after)
