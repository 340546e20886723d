"""The same law by different routes: stacked, per matrix, compiled, on each device, and the float64 references."""

import warnings

import pytest
import torch

from emerging_optimizers import registry
from emerging_optimizers.engine import executors
from emerging_optimizers.linalg.kronecker import conjugate_diagonal
from tests.cases import CASES, SEEDS, OptimizerCase, distance, parameters, run, set_gradients
from tests.goldens import CASES as GOLDENS
from tests.goldens import GoldenCase, golden, golden_reference, golden_start, gradient
from tests.reference import make_reference

# What inductor's code is run for in every test run, one rule on elements and one on matrices; a graph with an
# eigendecomposition or a QR takes up to a minute and a half, so that for the others `make test-all` does.
GENERATED = ("adamw", "muon")


def ragged(i: int, t: int) -> bool:
    """Some gradients are missing in some steps, one until the fourth."""
    return (i + t) % 5 == 0 or (i == 1 and t < 4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stacked_equals_per_matrix(case: OptimizerCase, device: torch.device) -> None:
    stacked, _ = run(case, 8, device=device, missing=ragged)
    alone, _ = run(case, 8, device=device, missing=ragged, execution="per_matrix")
    tolerance = case.batched if device.type == "cpu" else max(case.batched, 1e-3)
    assert distance(stacked, alone, parameters(case, device=device)) <= tolerance


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stacked_equals_per_matrix_in_float64(case: OptimizerCase) -> None:
    stacked, _ = run(case, 8, dtype=torch.float64, missing=ragged)
    alone, _ = run(case, 8, dtype=torch.float64, missing=ragged, execution="per_matrix")
    assert distance(stacked, alone, parameters(case, torch.float64)) < 1e-7


@pytest.mark.parametrize("case", [case for case in CASES if case.reference], ids=str)
def test_it_equals_the_reference(case: OptimizerCase, device: torch.device) -> None:
    ps, optimizer = run(case, 8, dtype=torch.float64, device=device)
    start = parameters(case, torch.float64)
    for p, initial, i in zip(ps, start, range(len(ps)), strict=True):
        if p.ndim != 2 and not case.elementwise:
            continue
        reference = make_reference(case.optimizer, **case.kwargs)
        if "precondition_frequency" in case.kwargs:
            ((bucket, row),) = optimizer._places.homes[p]
            reference.turn = bucket.turns[row]
        mine = parameters(case, torch.float64)
        weight = initial.detach()
        for t in range(1, 9):
            mine[i].data.copy_(weight)
            grad = set_gradients(mine, t)[i]
            assert grad is not None
            weight = reference.step(weight, grad)
        assert distance([p], [weight], [initial]) < 1e-6


@pytest.mark.parametrize(("name", "case"), GOLDENS.items(), ids=list(GOLDENS))
def test_it_agrees_with_the_golden_values(name: str, case: GoldenCase) -> None:
    p = torch.nn.Parameter(golden_start(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about the coefficient set; test_conformance expects it
        optimizer = registry.entry(case.optimizer).load()([p], **case.kwargs)
    reference, weight = golden_reference(name), golden_start(name)
    moved = []
    for t in range(1, 6):
        before = p.detach().clone()
        p.grad = gradient(t)
        optimizer.step()
        moved.append(float((before - p.detach()).square().mean().sqrt()))
        if t == 1 and case.null_angle is not None:
            # The golden run's null vectors of the first factor are an accident of rounding; go on from them.
            weight = reference.step(weight, gradient(1)).float()
            assert torch.allclose(p, weight, atol=case.tolerance)
            p.data.copy_(weight)
            for key in ("exp_avg", "exp_avg_sq", "L", "R", "Q_L", "Q_R"):
                optimizer.state[p][key].copy_(getattr(reference, key))
                if f"eigvals_{key}" in optimizer.state[p]:
                    values = conjugate_diagonal(getattr(reference, key), getattr(reference, f"Q_{key}"))
                    optimizer.state[p][f"eigvals_{key}"].copy_(values)
    expected = golden(name)
    assert float((p.detach().double() - expected.final).abs().max()) <= case.tolerance
    assert moved == pytest.approx(expected.update_rms, abs=case.tolerance)
    # The golden runs are June's; August keeps the eigenvalues.
    assert optimizer.state[p].keys() - {"eigvals_L", "eigvals_R"} == expected.state.keys()


def schedule(t: int) -> float:
    return 0.05 * (1 - t / 10)


def compiled_or_slow(case: OptimizerCase, backend: str, guard: float) -> list[pytest.MarkDecorator]:
    """A graph costs a second to trace and up to ninety to generate code for; `make test-all` does them all.

    With the guard each rule is traced in every run, and without it those that see the guard's scale, the element-wise.
    """
    generated = backend == "inductor" and case.optimizer not in GENERATED
    traced_already = not (guard or case.elementwise or case.optimizer in GENERATED)
    return [pytest.mark.slow] if generated or traced_already else []


@pytest.mark.parametrize(
    ("case", "backend", "guard"),
    [
        pytest.param(
            case, backend, guard, id=f"{case}-{backend}-{guard:g}", marks=compiled_or_slow(case, backend, guard)
        )
        for case in SEEDS
        for backend in ("eager", "inductor")
        for guard in (0.0, 2.0)
    ],
)
def test_compiled_equals_eager(
    case: OptimizerCase, backend: str, guard: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Along a schedule, with decay, and with gradients that are missing, not finite or a spike. Graphs are made early.

    torch.compile freezes a float lr at its second value, and drops alpha from add_(a @ b, alpha=...).
    """
    monkeypatch.setattr(executors, "BACKEND", backend)
    torch._dynamo.reset()
    ends, graphs = [], []
    for execution in ("stacked", "compiled"):
        ps = parameters(case, torch.float64, device)
        optimizer = case.make(ps, weight_decay=0.1, spike_guard=guard or None, execution=execution)
        for t in range(1, 7):
            set_gradients(ps, t, ragged)
            if t == 4:
                ps[0].grad.view(-1)[0] = torch.nan
                ps[3].grad.mul_(1e3)
            for group in optimizer.param_groups:
                group["lr"] = schedule(t)
            optimizer.step()
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        ends.append(ps)
    assert distance(*ends, parameters(case, torch.float64, device)) < 1e-8
    assert graphs[5] < graphs[6]
    if case.elementwise:  # pieces of all lengths share a graph: but for one element, and with a factor of the guard's
        assert graphs[-1] - graphs[5] <= 4
    else:
        assert graphs[7:] == [graphs[7]] * 5


def test_a_step_inside_a_users_compiled_function_equals_eager() -> None:
    case = next(case for case in CASES if case.name == "muon")
    eager, _ = run(case, 5, schedule=schedule, weight_decay=0.1)
    ps = parameters(case)
    optimizer = case.make(ps, weight_decay=0.1)
    step = torch.compile(optimizer.step)
    for t in range(1, 6):
        set_gradients(ps, t)
        optimizer.param_groups[0]["lr"] = schedule(t)
        step()
    assert distance(ps, eager, parameters(case)) == 0
