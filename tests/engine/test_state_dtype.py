"""`state_dtype`: parts of the state in bfloat16, computed with in float32, in every execution, through checkpoints."""

from typing import Any

import pytest
import torch

from emerging_optimizers import SOAP, AdamW, Iso, Lion, Muon
from emerging_optimizers.engine import RuleOptimizer, executors
from tests.cases import CASES, OptimizerCase, distance, parameters, run, set_gradients

ROUNDED = {"momentum_buffer", "exp_avg", "exp_avg_fast", "Q_L", "Q_R", "Q_M"}
NAMED = ("adamw", "lion", "ademamix", "muon", "soap", "soap_kl", "kl_shampoo", "moso", "oblique_sgd", "psgd_pro")
SOME = pytest.mark.parametrize("case", [c for c in CASES if c.name in NAMED], ids=lambda c: c.name)


@SOME
def test_what_is_rounded_and_what_is_not(case: OptimizerCase) -> None:
    _, optimizer = run(case, 3, state_dtype=torch.bfloat16)
    for state in optimizer.state.values():
        for key, value in state.items():
            assert value.dtype == (torch.bfloat16 if key in ROUNDED else torch.float32), key


@SOME
def test_weights_follow_those_of_a_float32_state(case: OptimizerCase) -> None:
    exact, _ = run(case, 5)
    rounded, _ = run(case, 5, state_dtype=torch.bfloat16)
    assert distance(rounded, exact, parameters(case)) < 0.05


@pytest.mark.parametrize("execution", ["per_matrix", "compiled"])
@pytest.mark.parametrize("make", [Muon, SOAP, AdamW, Lion], ids=lambda m: m.__name__)
def test_executions_round_alike(make: Any, execution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if make is not Lion:  # one rule, the shortest, shows that generated code rounds too
        monkeypatch.setattr(executors, "BACKEND", "eager")
    case = next(c for c in CASES if c.name == make.__name__.lower())
    stacked, _ = run(case, 4, state_dtype=torch.bfloat16)
    other, _ = run(case, 4, state_dtype=torch.bfloat16, execution=execution)
    # Float32 that differs in its last bit can round to neighbours in bfloat16.
    assert distance(other, stacked, parameters(case)) < 1e-2


def test_a_resumed_run_is_the_run() -> None:
    def train(optimizer: RuleOptimizer, ps: list[torch.nn.Parameter], steps: range) -> None:
        for t in steps:
            set_gradients(ps, t)
            optimizer.step()

    case = next(c for c in CASES if c.name == "soap")
    ps = parameters(case)
    whole = SOAP(ps, lr=0.1, state_dtype=torch.bfloat16)
    train(whole, ps, range(1, 4))
    saved, copies = whole.state_dict(), [torch.nn.Parameter(p.detach().clone()) for p in ps]
    resumed = SOAP(copies, lr=0.1)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["state_dtype"] is torch.bfloat16
    train(whole, ps, range(4, 7))
    train(resumed, copies, range(4, 7))
    assert all(torch.equal(p, q) for p, q in zip(ps, copies, strict=True))


def test_a_skipped_gradient_leaves_the_rounded_state() -> None:
    w = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = SOAP([w], lr=0.1, state_dtype=torch.bfloat16)
    for _ in range(3):
        w.grad = torch.randn(4, 3)
        optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[w].items()}
    w.grad[0, 0] = torch.nan
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in optimizer.state[w].items())


def test_half_of_the_momentum() -> None:
    ps = [torch.nn.Parameter(torch.zeros(64, 32))]
    optimizer = Muon(ps, state_dtype=torch.bfloat16)
    ps[0].grad = torch.ones(64, 32)
    optimizer.step()
    assert optimizer.state[ps[0]]["momentum_buffer"].nbytes == 64 * 32 * 2


@pytest.mark.parametrize(
    ("make", "dtype", "says"),
    [
        (Muon, torch.float16, "None or torch.bfloat16"),
        (Muon, "bfloat16", "None or torch.bfloat16"),
        (Iso, torch.bfloat16, "nothing bears rounding"),
    ],
)
def test_what_cannot_be_met_is_refused(make: Any, dtype: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make([torch.nn.Parameter(torch.eye(4))], lr=0.1, state_dtype=dtype)
