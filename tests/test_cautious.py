"""Cautious updates and cautious weight decay, for every optimizer that has an update of its own."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from emerging_optimizers import Iso, Muon, Muown, Spectron, SpikeWatch
from emerging_optimizers.engine.weight_decay import cautious, cautious_keep
from emerging_optimizers.registry import OPTIMIZERS, entry
from tests.cases import CASES, SEEDS, OptimizerCase

REWRITES = ("iso", "muown", "spectron")
MASKED = {"cautious": True}
DECAYING = {"weight_decay": 0.3, "weight_decay_method": "cautious"}


def first_case(name: str) -> OptimizerCase:
    return next(case for case in CASES if case.optimizer == name and not case.warns)


def weights(dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.rand(6, 6, dtype=dtype, generator=generator) - 0.4) for _ in range(3)]


def gradients(t: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(t)
    return [torch.randn(6, 6, dtype=dtype, generator=generator) for _ in range(3)]


def run(name: str, steps: int = 4, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, list[Any]]:
    ps = weights(dtype)
    if name == "sinkhorn_muon":
        for p in ps:
            p.data.fill_(1 / 6)
    optimizer = entry(name).load()(ps, **{**first_case(name).kwargs, **options})
    for t in range(1, steps + 1):
        for p, grad in zip(ps, gradients(t, dtype), strict=True):
            p.grad = grad
        optimizer.step()
    return optimizer, ps


# Laws of their own move the weight by something else than the update, at a learning rate of 0 too.
PLAIN = [case.optimizer for case in SEEDS if case.rests]


@pytest.mark.parametrize("name", PLAIN)
def test_a_step_is_the_masked_and_lengthened_update(name: str) -> None:
    """By the definition, from one step more of the same optimizer without it."""
    plain, ps = run(name, steps=3, weight_decay=0.0)
    masked, qs = run(name, steps=3, weight_decay=0.0)
    for group in masked.param_groups:
        group["cautious"] = True
    before = [p.detach().clone() for p in ps]
    for p, q, grad in zip(ps, qs, gradients(9), strict=True):
        p.grad, q.grad = grad, grad.clone()
    plain.step()
    masked.step()
    for old, p, q, grad in zip(before, ps, qs, gradients(9), strict=True):
        update = old - p
        agrees = update * grad > 0
        expected = old - update * agrees / max(float(agrees.double().mean()), 1e-3)
        torch.testing.assert_close(q.detach(), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", PLAIN)
def test_decay_takes_only_the_elements_that_go_towards_zero(name: str) -> None:
    plain, ps = run(name, steps=3, weight_decay=0.0)
    decaying, qs = run(name, steps=3, weight_decay=0.0)
    for group in decaying.param_groups:
        group["weight_decay"], group["weight_decay_method"] = 0.3, "cautious"
    before = [p.detach().clone() for p in ps]
    for p, q, grad in zip(ps, qs, gradients(9), strict=True):
        p.grad, q.grad = grad, grad.clone()
    plain.step()
    decaying.step()
    rate = 0.3 * plain.param_groups[0]["lr"]
    for old, p, q in zip(before, ps, qs, strict=True):
        shrunk = torch.where((old - p) * old >= 0, old * rate, 0)
        torch.testing.assert_close(q.detach(), p - shrunk, rtol=1e-6, atol=1e-12)
        assert 0 < int((shrunk != 0).sum()) < old.numel()


@pytest.mark.parametrize("options", [MASKED, DECAYING], ids=["update", "decay"])
@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n not in REWRITES])
def test_it_is_one_law_however_it_runs(name: str, options: dict[str, Any]) -> None:
    _, stacked = run(name, **options)
    _, alone = run(name, execution="per_matrix", **options)
    for p, q in zip(stacked, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [MASKED, DECAYING], ids=["update", "decay"])
@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "soap"])
def test_a_copy_goes_on_bit_for_bit(name: str, options: dict[str, Any]) -> None:
    optimizer, ps = run(name, dtype=torch.float32, **options)
    assert optimizer.state_dict()["param_groups"][0]["cautious"] is options.get("cautious", False)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in ps]
    twin = entry(name).load()(twins, **first_case(name).kwargs)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q, grad in zip(ps, twins, gradients(7, torch.float32), strict=True):
        p.grad, q.grad = grad, grad.clone()
    optimizer.step()
    twin.step()
    assert all(map(torch.equal, ps, twins))


@pytest.mark.parametrize("option", ["cautious", "weight_decay_method"])
@pytest.mark.parametrize("cls", [Iso, Muown, Spectron])
def test_an_optimizer_that_makes_the_weight_anew_refuses_it(cls: Any, option: str) -> None:
    with pytest.raises(ValueError, match=f"{cls.__name__}: {option}=.* makes the weight anew"):
        cls(weights(), **{option: True if option == "cautious" else "cautious"})


def test_a_rate_of_zero_moves_nothing_and_a_graphs_rate_is_a_tensor() -> None:
    for options in (MASKED, DECAYING):
        _, at_rest = run("muon", lr=0.0, **options)
        assert all(map(torch.equal, at_rest, weights()))
        _, number = run("muon", **options)
        _, tensor = run("muon", capturable=True, **options)
        for p, q in zip(number, tensor, strict=True):
            torch.testing.assert_close(p, q)


def test_signs_are_compared_where_a_product_underflows() -> None:
    """1e-23 times -1e-23 is no number of float32 but zero, which would say that they agree."""
    small = torch.full((1, 2), 1e-23)
    assert torch.equal(cautious(small, 2 * small), small)
    assert torch.equal(cautious_keep(0.5, -small, small), torch.ones(1, 2))
    assert torch.equal(cautious_keep(0.5, small, small), torch.full((1, 2), 0.5))


def test_a_law_of_the_users_comes_behind_it() -> None:
    optimizer, ps = run("soap", weight_update_hook="hyperball", **MASKED)
    assert all(p.norm().item() == pytest.approx(w.norm().item()) for p, w in zip(ps, weights(), strict=True))
    assert optimizer.param_groups[0]["cautious"]


def test_the_watch_takes_cautious_decay_out_of_the_update() -> None:
    """The update of Muon has an RMS of the learning rate, whatever the decay."""
    ps = weights()
    optimizer = Muon([("w", ps[0])], lr=0.1, fp32_matmul_prec="highest", orthogonalizer="qdwh", **DECAYING)
    with SpikeWatch(optimizer, every=1) as watch:
        ps[0].grad = gradients(1)[0]
        optimizer.step()
    assert watch.latest["w"]["update_rms"] == pytest.approx(1, rel=1e-6)


def test_a_law_that_modifies_in_place_decays_weights_of_half_precision_too() -> None:
    """A factor next to one has to be told from it before it meets the weight."""

    class Nothing:
        def pre_weight_update_inplace(self, p: Tensor, update: Tensor) -> None:
            update.zero_()

        def post_weight_update_inplace(self, p: Tensor, before: None) -> None:
            pass

    w = torch.nn.Parameter(torch.full((6, 6), 1.0, dtype=torch.bfloat16))
    optimizer = Muon([w], lr=0.003, weight_update_hook=Nothing(), **{**DECAYING, "weight_decay": 0.9})
    w.grad = torch.ones_like(w)
    optimizer.step()
    assert bool((w < 1).all())
