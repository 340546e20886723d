"""A bad gradient leaves no trace; a spike is scaled down before it enters anything; quiet gradients are not touched."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from emerging_optimizers.engine.buckets import Bucket
from tests.cases import CASES, SEEDS, OptimizerCase, distance, parameters, run, set_gradients

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_optimizer = pytest.mark.parametrize("case", SEEDS, ids=str)


@pytest.fixture(params=["host", "device"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """On an accelerator no value is looked at; the same path is run here on the CPU."""
    if request.param == "device":
        monkeypatch.setattr(Bucket, "on_host", property(lambda self: False))
    return request.param


def spoil(p: torch.nn.Parameter, value: float) -> None:
    assert p.grad is not None
    p.grad.view(-1)[0] = value


# Another option of an optimizer is another rule, but what is not finite is found in the same way.
@pytest.mark.parametrize(
    ("case", "bad"),
    [pytest.param(case, torch.nan, id=f"{case}-nan") for case in CASES]
    + [pytest.param(case, torch.inf, id=f"{case}-inf") for case in SEEDS],
)
def test_a_skipped_gradient_is_a_missing_one(case: OptimizerCase, bad: float, where: str) -> None:
    """Weight, moments, factors, bases and step count are those of a run that had no gradient there."""
    ps, missing = parameters(case), parameters(case)
    a, b = case.make(ps), case.make(missing)
    # On an accelerator the host does not know of the skip, so the schedule of SOAP's bases goes on without it, and
    # Spectron, whose first step replaces the weight by its factors, takes a weight that is still there for an edit.
    scheduled = where == "device" and (case.optimizer == "spectron" or {"Q_L", "Q_M"} & {*case.state})
    when = (4,) if scheduled else (1, 4)
    for t in range(1, 7):
        set_gradients(ps, t)
        set_gradients(missing, t, lambda i, t: t in when and i in (0, 3))
        for i in (0, 3) if t in when else ():
            spoil(ps[i], bad)
        a.step()
        b.step()
    if not (scheduled and "precondition_frequency" in case.kwargs):
        assert distance(ps, missing, parameters(case)) <= max(case.batched, 1e-5)
    assert all(torch.isfinite(value).all() for state in a.state.values() for value in state.values())
    if "step" in case.state:
        assert [int(a.state[p]["step"]) for p in ps] == [int(b.state[p]["step"]) for p in missing]
    assert a.guard_events() == {f"param_groups[0]['params'][{i}]": (0, len(when)) for i in (0, 3)}


@every_optimizer
def test_only_the_bad_matrix_of_a_batch_sits_out(case: OptimizerCase, where: str) -> None:
    if case.elementwise:
        pytest.skip("an element-wise rule takes a parameter as one")
    batch = torch.nn.Parameter(torch.randn(3, 5, 4))
    optimizer = case.make([batch], matrix_view="auto")  # StackedSoap has another default
    for t in range(4):
        before = batch.detach().clone()
        batch.grad = torch.randn(3, 5, 4)
        if t == 2:
            batch.grad[1, 0, 0] = float("nan")
        optimizer.step()
        assert [bool((new != old).any()) for new, old in zip(batch.detach(), before, strict=True)] == [
            True,
            t != 2,
            True,
        ]


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_low_precision_parameters_skip_too(case: OptimizerCase, dtype: torch.dtype, where: str) -> None:
    ps, optimizer = run(case, 2, dtype=dtype)
    before = ps[0].detach().clone()
    set_gradients(ps, 3)
    spoil(ps[0], float("inf"))
    optimizer.step()
    assert torch.equal(ps[0], before)
    assert torch.isfinite(ps[1]).all()


@every_optimizer
def test_raise_raises_before_anything_moves_and_propagate_lets_it_in(case: OptimizerCase) -> None:
    ps, optimizer = run(case, 2, nonfinite="raise")
    before, state = copy.deepcopy(ps), copy.deepcopy(optimizer.state_dict()["state"])
    set_gradients(ps, 3)
    spoil(ps[-2], float("nan"))
    with pytest.raises(ValueError, match=r"gradient of parameter .* is not finite.*nonfinite='skip'"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ps, before, strict=True))
    now = optimizer.state_dict()["state"]
    assert all(torch.equal(now[i][key], value) for i, saved in state.items() for key, value in saved.items())
    optimizer.param_groups[0]["nonfinite"] = "propagate"
    optimizer.step()
    assert not all(torch.isfinite(value).all() for value in optimizer.state[ps[-2]].values())
    assert torch.isfinite(ps[0]).all()


def start(case: OptimizerCase, **kwargs: Any) -> tuple[torch.optim.Optimizer, torch.Generator]:
    p = torch.nn.Parameter(torch.zeros(32, 16))
    return case.make([p], lr=1.0, weight_decay=0.0, **kwargs), torch.Generator().manual_seed(0)


def updates(
    optimizer: torch.optim.Optimizer, generator: torch.Generator, steps: int, first: float = 1.0
) -> list[float]:
    """Update RMS of each step for i.i.d. gradients, the first of them `first` times as large."""
    (p,) = optimizer.param_groups[0]["params"]
    rms = []
    for t in range(steps):
        p.grad = torch.randn(32, 16, generator=generator) * (1.0 if t else first)
        before = p.detach().clone()
        optimizer.step()
        rms.append((before - p.detach()).square().mean().sqrt().item())
    return rms


@every_optimizer
def test_with_the_guard_a_spike_passes_in_two_steps(case: OptimizerCase, where: str) -> None:
    if case.optimizer == "iso":
        pytest.skip("it keeps a zero weight at zero")
    # A second moment that is longer than the run takes longer to forget even what the guard lets through.
    memory = {"rmsprop": {"alpha": 0.95}, "ademamix": {"betas": (0.9, 0.95, 0.99)}, "madam": {"betas": (0.9, 0.95)}}
    short = memory.get(case.optimizer, {"betas": (0.9, 0.95)} if {"exp_avg", "exp_avg_sq"} <= {*case.state} else {})
    optimizer, generator = start(case, spike_guard=2.0, **short)
    before = updates(optimizer, generator, 49)
    calm, *spikes = (updates(*copy.deepcopy((optimizer, generator)), 21, scale) for scale in (1.0, 1e2, 1e5))
    for spiked in spikes:
        assert max(spiked) < 2 * max(before[29:] + calm)
        # What is as large as the momentum is as slow as the momentum.
        assert not case.scale_free or all(abs(a / b - 1) < 0.1 for a, b in zip(spiked[2:], calm[2:], strict=True))


@every_optimizer
def test_without_spikes_the_guard_changes_nothing(case: OptimizerCase) -> None:
    assert updates(*start(case, spike_guard=2.0), 60) == updates(*start(case), 60)


def test_the_guard_follows_its_equation(where: str) -> None:
    """Norms 1, 1, 10, 0, 3 with c = 2: let through 1, 1, 2, 0, and then twice the bias-corrected mean of 1, 1, 2."""
    case = next(case for case in SEEDS if case.name == "muon")
    p = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = case.make([p], momentum=0.0, spike_guard=2.0)
    seen = []
    for norm in (1.0, 1.0, 10.0, 0.0, 3.0):
        p.grad = torch.eye(2) * norm / 2**0.5
        optimizer.step()
        seen.append(optimizer.state[p]["momentum_buffer"].norm().item())
    mean = (0.95**2 + 0.95 + 2) / (0.95**2 + 0.95 + 1)
    assert seen == pytest.approx([1, 1, 2, 0, 2 * mean], rel=1e-5)
    assert optimizer.guard_events() == {"param_groups[0]['params'][0]": (2, 0)}


@every_optimizer
def test_guard_state_is_saved_and_resumes_bitwise(case: OptimizerCase) -> None:
    def spiky(ps: list[torch.nn.Parameter], t: int) -> None:
        for i, grad in enumerate(set_gradients(ps, t)):
            if grad is not None and (i + t) % 3 == 0:
                grad.mul_(100)

    through, ps = parameters(case), parameters(case)
    a, b = case.make(through, spike_guard=1.5), case.make(ps, spike_guard=1.5)
    for t in range(1, 7):
        if t == 4:
            assert {"guard_norm", "guard_weight"} <= b.state[ps[0]].keys()
            saved, ps = copy.deepcopy(b.state_dict()), copy.deepcopy(ps)
            b = case.make(ps)
            b.load_state_dict(saved)
        spiky(through, t)
        spiky(ps, t)
        a.step()
        b.step()
    assert all(torch.equal(p, q) for p, q in zip(through, ps, strict=True))


@every_optimizer
def test_the_guard_can_be_turned_on_and_off_in_a_running_group(case: OptimizerCase) -> None:
    ps, optimizer = run(case, 2)
    for t, threshold in ((3, 2.0), (4, None), (5, 2.0)):
        optimizer.param_groups[0]["spike_guard"] = threshold
        set_gradients(ps, t)
        optimizer.step()
    ps[0].data = ps[0].data.double()
    set_gradients(ps, 6)
    optimizer.step()
    assert optimizer.state[ps[0]]["guard_norm"].dtype == torch.float64
    with pytest.raises(ValueError, match=r"spike_guard=0.5 .*> 1"):
        case.make(parameters(case), spike_guard=0.5)
