"""A factorization that fails for one matrix of a stack concerns that matrix alone."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from emerging_optimizers.engine.buckets import Bucket
from emerging_optimizers.linalg import factorizations
from emerging_optimizers.linalg.factorizations import factorized, noting
from tests.cases import CASES, OptimizerCase, distance, parameters, set_gradients

# Where LAPACK is called.
ROUTINES = ((torch.linalg, "eigh"), (torch.linalg, "svd"), (torch, "geqrf"), (torch.linalg, "cholesky_ex"))


class Fault:
    """Lets the first matrix that a routine is given fail, alone and in a stack, and no other one.

    Attributes:
        how: "raises", or "nan" in what is returned.
        in_float64: in that, too.
        spares: so many calls before it chooses.
    """

    def __init__(self, how: str, in_float64: bool) -> None:
        self.how, self.in_float64 = how, in_float64
        self.armed = False
        self.spares = 0
        self.matrix: Tensor | None = None

    def around(self, routine: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self.armed or (x.dtype == torch.float64 and not self.in_float64):
                return routine(x, *args, **kwargs)
            if self.matrix is None and self.spares:
                self.spares -= 1
                return routine(x, *args, **kwargs)
            if self.matrix is None:
                self.matrix = x[-1].float().clone()
            same = [i for i, y in enumerate(x) if y.shape == self.matrix.shape and torch.equal(y.float(), self.matrix)]
            if same and self.how == "raises":
                raise torch.linalg.LinAlgError("did not converge")
            found = routine(x, *args, **kwargs)
            for part in found:
                if part.is_floating_point():
                    part[same] = torch.nan
            return found

        return faulty


@pytest.fixture
def fault(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Fault:
    made = Fault(*request.param)
    for owner, name in ROUTINES:
        monkeypatch.setattr(owner, name, made.around(getattr(owner, name)))
    return made


def calls_a_routine(case: OptimizerCase) -> bool:
    """Whether a step of a row of the table factorizes."""
    muon = case.name in ("muon_qdwh", "muon_svd", "spel_qdwh", "mop", "mop_spectral", "polargrad_svd", "dion2_whole")
    shampoo = case.optimizer == "shampoo" and case.name != "shampoo_no_side"
    iso = case.name in ("iso", "iso_polar")
    return muon or shampoo or iso or case.optimizer == "moso" or ("Q_L" in case.state and case.name != "soap_no_side")


FACTORIZING = [case for case in CASES if calls_a_routine(case)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_table_below_is_complete(case: OptimizerCase, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for owner, name in ROUTINES:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _f=real, _n=name, **k: (calls.append(_n), _f(*a, **k))[1])
    optimizer, ps = _after_two_steps(case)
    calls.clear()
    for t in (3, 4, 5):
        set_gradients(ps, t)
        optimizer.step()
    assert bool(calls) == (case in FACTORIZING)


def _after_two_steps(case: OptimizerCase, **options: Any) -> tuple[torch.optim.Optimizer, list[torch.nn.Parameter]]:
    ps = parameters(case, copies=3)
    optimizer = case.make(ps, **options)
    for t in (1, 2):
        set_gradients(ps, t)
        optimizer.step()
    return optimizer, ps


def _all_of(p: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {"weight": p.detach().clone(), **{key: x.clone() for key, x in optimizer.state[p].items()}}


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def _step_with_fault(
    case: OptimizerCase, fault: Fault, **options: Any
) -> tuple[int, list[dict[str, Tensor]], list[dict[str, Tensor]], list[dict[str, Tensor]], torch.optim.Optimizer]:
    """The step, and all parameters before it, after it, and after it without the fault."""
    for t in (3, 4, 5):  # until one of them factorizes
        (plain, qs), (optimizer, ps) = (_after_two_steps(case, **options) for _ in range(2))
        for s in range(3, t + 1):
            before = [_all_of(p, optimizer) for p in ps]
            fault.armed = False
            set_gradients(qs, s)
            plain.step()
            set_gradients(ps, s)
            fault.armed = s == t
            optimizer.step()
        fault.armed = False
        if fault.matrix is not None:
            after, expected = ([_all_of(p, x) for p in some] for some, x in ((ps, optimizer), (qs, plain)))
            return t, before, after, expected, optimizer
    raise AssertionError("no step has factorized")


@pytest.mark.parametrize("fault", [("raises", True), ("nan", True)], ids=str, indirect=True)
@pytest.mark.parametrize("case", FACTORIZING, ids=str)
def test_a_matrix_that_fails_sits_the_step_out_and_the_others_do_not_notice(case: OptimizerCase, fault: Fault) -> None:
    with pytest.warns(
        UserWarning, match=r"a factorization that the step of parameter \d of shape .* takes has failed"
    ) as told:
        _, before, after, expected, optimizer = _step_with_fault(case, fault)
    assert len([w for w in told if "factorization" in str(w.message)]) == 1
    ((name, events),) = optimizer.guard_events().items()
    failed = int(name.split("[")[-1].rstrip("]"))
    assert events == (0, 1)
    for i, (old, now, other) in enumerate(zip(before, after, expected, strict=True)):
        if i != failed:
            assert _same(now, other), i
        elif case.kwargs.get("overlap"):  # its step was taken; the refresh behind it was not
            assert torch.equal(now["weight"], other["weight"])
            assert all(torch.equal(now[key], old[key]) for key in ("Q_L", "Q_R"))
        else:
            assert _same(now, old)
    optimizer.step()
    assert all(x.isfinite().all() for p in optimizer.param_groups[0]["params"] for x in _all_of(p, optimizer).values())


@pytest.mark.parametrize("fault", [("raises", False), ("nan", False)], ids=str, indirect=True)
@pytest.mark.parametrize("case", FACTORIZING, ids=str)
def test_a_matrix_that_fails_in_float32_is_taken_in_float64(case: OptimizerCase, fault: Fault) -> None:
    _, _, after, expected, optimizer = _step_with_fault(case, fault)
    assert optimizer.guard_events() == {}
    differ = [i for i, (now, other) in enumerate(zip(after, expected, strict=True)) if not _same(now, other)]
    assert len(differ) <= 1
    assert all(x.isfinite().all() for now in after for x in now.values())


@pytest.mark.parametrize("fault", [("raises", True), ("nan", True)], ids=str, indirect=True)
def test_a_law_that_fails_takes_the_state_back_too(fault: Fault) -> None:
    case = OptimizerCase(name="spel_svd", optimizer="spel", kwargs={"lr": 0.1, "orthogonalizer": "svd"})
    fault.spares = 1  # the rule's
    with pytest.warns(UserWarning, match="a factorization"):
        _, before, after, expected, optimizer = _step_with_fault(case, fault)
    assert optimizer.guard_events() == {"param_groups[0]['params'][2]": (0, 1)}
    for i, (old, now, other) in enumerate(zip(before, after, expected, strict=True)):
        assert _same(now, old if i == 2 else other), i


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """No value is looked at."""
    monkeypatch.setattr(Bucket, "on_host", property(lambda self: False))


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("fault", [("nan", True)], ids=str, indirect=True)
@pytest.mark.parametrize(
    "case", [case for case in FACTORIZING if case.name in ("soap", "moso", "iso", "muon_qdwh")], ids=str
)
def test_where_nobody_waits_the_device_keeps_what_was_there(case: OptimizerCase, fault: Fault) -> None:
    _, before, after, expected, optimizer = _step_with_fault(case, fault)
    ((name, events),) = optimizer.guard_events().items()
    failed = int(name.split("[")[-1].rstrip("]"))
    assert events == (0, 1)
    for i, (old, now, other) in enumerate(zip(before, after, expected, strict=True)):
        assert _same(now, old if i == failed else other), i


@pytest.mark.usefixtures("without_code")
@pytest.mark.parametrize("fault", [("raises", True), ("nan", True)], ids=str, indirect=True)
@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("soap", "soap_eigh", "muon_svd")], ids=str)
def test_compiled_steps_let_it_sit_out_too(case: OptimizerCase, fault: Fault) -> None:
    with pytest.warns(UserWarning, match="a factorization"):
        _, before, after, expected, optimizer = _step_with_fault(case, fault, execution="compiled")
    ((name, events),) = optimizer.guard_events().items()
    failed = int(name.split("[")[-1].rstrip("]"))
    assert events == (0, 1)
    for i, (old, now, other) in enumerate(zip(before, after, expected, strict=True)):
        assert _same(now, old if i == failed else other), i


@pytest.mark.parametrize("fault", [("raises", True)], ids=str, indirect=True)
def test_the_guard_raises_where_it_is_to(fault: Fault) -> None:
    case = next(case for case in CASES if case.name == "rekls")
    optimizer, ps = _after_two_steps(case, nonfinite="raise")
    before = [_all_of(p, optimizer) for p in ps]
    set_gradients(ps, 3)
    fault.armed = True
    with pytest.raises(
        torch.linalg.LinAlgError, match=r"the step of parameter 2 of shape \(8, 6\) takes has failed.*'skip'"
    ):
        optimizer.step()
    assert all(_same(_all_of(p, optimizer), old) for p, old in zip(ps, before, strict=True))
    fault.armed = False
    optimizer.step()


@pytest.mark.parametrize("fault", [("raises", True)], ids=str, indirect=True)
def test_a_failed_step_is_one_without_a_gradient(fault: Fault) -> None:
    """State, counts and the guard's means; the next step refreshes."""
    case = next(case for case in CASES if case.name == "rekls")
    (a, ps), (b, qs) = (_after_two_steps(case, spike_guard=2.0) for _ in range(2))
    for t in (3, 4, 5):
        set_gradients(ps, t)
        set_gradients(qs, t, lambda i, t: t == 3 and i == 2)
        fault.armed = t == 3
        with pytest.warns(UserWarning, match="a factorization") if t == 3 else nullcontext():
            a.step()
        fault.armed = False
        b.step()
    assert distance(ps, qs, parameters(case, copies=3)) <= case.batched
    for p, q in zip(ps, qs, strict=True):
        assert torch.equal(a.state[p]["step"], b.state[q]["step"])
        torch.testing.assert_close(a.state[p]["guard_norm"], b.state[q]["guard_norm"])


def test_memory_that_runs_out_is_no_failure_of_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("injected")

    for kind in ("eigh", "svd", "qr", "cholesky"):
        made = factorizations._KINDS[kind]._replace(function=full)
        monkeypatch.setitem(factorizations._KINDS, kind, made)
        with pytest.raises(torch.OutOfMemoryError, match="injected"):
            factorized(kind, torch.eye(3)[None])


@pytest.mark.parametrize("kind", ["eigh", "svd", "qr", "cholesky"])
def test_what_is_not_finite_fails_alone(kind: Any) -> None:
    g = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(0))
    x = g @ g.mT + torch.eye(5)
    good = [part.clone() for part in factorized(kind, x)]
    x[1, 2, 2] = torch.inf
    with noting() as failures:
        found = factorized(kind, x)
    assert failures.rows == {1}
    assert all(torch.equal(part[[0, 2]], other[[0, 2]]) for part, other in zip(found, good, strict=True))


def test_listeners_do_not_hear_one_another() -> None:
    bad = torch.full((1, 2, 2), torch.nan)
    with noting() as outer:
        with noting() as inner:
            factorized("svd", bad)
        assert inner.rows == {0}
    assert not outer.rows
    assert copy.copy(inner.mask(2, torch.device("cpu"))).tolist() == [True, False]
