"""Whatever is raised in a step, the weight, state and count of a matrix change together or not at all."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from emerging_optimizers import AdamW, create_optimizer
from emerging_optimizers.engine import optimizer as engine
from emerging_optimizers.orthogonalized_optimizers.muon import Muon
from emerging_optimizers.soap.soap import SOAP
from tests.cases import CASES, SEEDS, OptimizerCase, parameters, set_gradients

every_optimizer = pytest.mark.parametrize("case", SEEDS, ids=str)


class Injected(BaseException):
    """Neither an error of torch's nor of the library's: an interrupt."""


class _Before(TorchDispatchMode):
    """Raises once, before the operator with this number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise Injected
        return func(*args, **(kwargs or {}))


def _all_of(p: Tensor, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.detach().clone(), *(x.clone() for x in optimizer.state[p].values())]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def _made(case: OptimizerCase, **options: Any) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    ps = parameters(case, copies=1)
    optimizer = case.make(ps, **options)
    for t in (1, 2, 3):
        set_gradients(ps, t)
        optimizer.step()
    set_gradients(ps, 4)
    return ps, optimizer


def _operators(case: OptimizerCase, **options: Any) -> int:
    _, optimizer = _made(case, **options)
    counter = _Before(10**9)
    with counter:
        optimizer.step()
    return 10**9 - counter.left


@pytest.mark.parametrize(
    ("case", "options"),
    [(case, {}) for case in SEEDS]
    + [(case, {"spike_guard": 3.0}) for case in SEEDS if case.name in ("adamw", "soap", "muon")],
    ids=str,
)
def test_an_interrupt_at_any_operator_leaves_old_or_new(case: OptimizerCase, options: Any) -> None:
    ps, optimizer = _made(case, **options)
    old = [_all_of(p, optimizer) for p in ps]
    optimizer.step()
    new = [_all_of(p, optimizer) for p in ps]
    count = _operators(case, **options)
    for number in sorted({*range(1, count + 1, max(1, count // 5)), *range(max(1, count - 2), count + 1)}):
        ps, optimizer = _made(case, **options)
        with pytest.raises(Injected), _Before(number):
            optimizer.step()
        for p, before, after in zip(ps, old, new, strict=True):
            now = _all_of(p, optimizer)
            assert _same(now, before) or _same(now, after), f"operator {number} of {count}"
        set_gradients(ps, 5)
        optimizer.step()
        assert all(bool(p.isfinite().all()) for p in ps)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("soap", "geqrf"),
        ("rekls", "linalg.eigh"),
        ("shampoo", "linalg.eigh"),
        ("muon_svd", "linalg.svd"),
        ("moso", "geqrf"),
        ("iso", "geqrf"),
    ],
)
def test_a_failing_factorization_changes_nothing(name: str, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ps, optimizer = _made(next(case for case in CASES if case.name == name))
    old = [_all_of(p, optimizer) for p in ps]

    def fail(*_: Any, **__: Any) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    with monkeypatch.context() as patch:
        patch.setattr(f"torch.{broken}", fail)
        with pytest.warns(UserWarning, match="a factorization"):
            optimizer.step()
    assert all(_same(_all_of(p, optimizer), before) for p, before in zip(ps, old, strict=True))
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in ps)
    assert not any(_same(_all_of(p, optimizer), before) for p, before in zip(ps, old, strict=True))


class _Hook:
    """A law as the published library has it, which fails when it is told to."""

    def __init__(self) -> None:
        self.fails = ""

    def pre_weight_update_inplace(self, p: Tensor, update: Tensor) -> None:
        if self.fails == "pre":
            raise RuntimeError("of the user's")

    def post_weight_update_inplace(self, p: Tensor, before: None) -> None:
        if self.fails == "post":
            raise RuntimeError("of the user's")


@pytest.mark.parametrize("make", [AdamW, Muon, SOAP])
@pytest.mark.parametrize("where", ["pre", "post"])
def test_a_hook_that_raises_takes_the_step_back(make: Callable[..., Any], where: str) -> None:
    hook = _Hook()
    p = torch.nn.Parameter(torch.randn(6, 4))
    optimizer = make([p], lr=0.1, weight_decay=0.1, weight_update_hook=hook)
    for fails in ("", where, ""):
        hook.fails = fails
        p.grad = torch.randn(6, 4)
        before = _all_of(p, optimizer) if fails else []
        if fails:
            with pytest.raises(RuntimeError, match="of the user's"):
                optimizer.step()
            assert _same(_all_of(p, optimizer), before)
        else:
            optimizer.step()


@every_optimizer
@pytest.mark.parametrize("place", ["placing.fill_buckets", "optimizer.BucketStep"])
def test_an_error_where_state_is_made_leaves_a_working_optimizer(
    case: OptimizerCase, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ps, twins = parameters(case, copies=1), parameters(case, copies=1)
    optimizer, twin = case.make(ps), case.make(twins)

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("injected")

    set_gradients(ps, 1)
    with monkeypatch.context() as patch:
        patch.setattr(f"emerging_optimizers.engine.{place}", fail)
        with pytest.raises(MemoryError):
            optimizer.step()
    set_gradients(twins, 1)
    optimizer.step()
    twin.step()
    assert all(map(torch.equal, ps, twins))
    assert all(_same(_all_of(p, optimizer), _all_of(q, twin)) for p, q in zip(ps, twins, strict=True))


@every_optimizer
def test_a_refused_state_is_named_and_can_be_taken_away(case: OptimizerCase) -> None:
    ps = parameters(case, copies=1)
    optimizer = case.make(ps)
    optimizer.state[ps[0]] = {key: torch.zeros(3, 3, 3) for key in case.state}
    set_gradients(ps, 1)
    before = [p.detach().clone() for p in ps]
    with pytest.raises(ValueError, match="parameter 0 of shape"):
        optimizer.step()
    assert all(map(torch.equal, ps, before))
    optimizer.state.clear()
    optimizer.step()
    assert not any(map(torch.equal, ps, before))


_READ_ONLY = """
import sys, numpy, torch
from tests.cases import SEEDS, set_gradients, parameters
for case in SEEDS:
    for options in ({}, {"nonfinite": "propagate"}, {"weight_decay": 0.1, "weight_decay_method": "l2"}):
        if case.name == "muown" and options:
            continue
        try:
            ps = parameters(case, copies=1)
            optimizer = case.make(ps, **options)
        except ValueError:  # an optimizer without this kind of decay
            continue
        for t in (1, 2, 3):
            set_gradients(ps, t)
            for i, p in enumerate(ps):
                if p.ndim:
                    numpy.asarray(p.grad).tofile(f"{i}")
                    p.grad = torch.from_numpy(numpy.memmap(f"{i}", numpy.float32, "r", shape=tuple(p.shape)))
            optimizer.step()
print("all were only read")
"""


def test_gradients_in_read_only_memory_are_only_read(tmp_path: Any) -> None:
    """A write, even of the same value, is a segmentation fault there."""
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{_READ_ONLY}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert found.stdout == "all were only read\n", (found.returncode, found.stderr[-2000:])


@every_optimizer
def test_a_gradient_whose_elements_share_memory_is_an_ordinary_one(case: OptimizerCase) -> None:
    ps, twins = parameters(case, copies=1), parameters(case, copies=1)
    optimizer, twin = case.make(ps), case.make(twins)
    for t in (1, 2, 3):
        for p, q in zip(ps, twins, strict=True):
            p.grad = torch.full((), 0.5 * t).expand(p.shape)
            q.grad = p.grad.clone()
        optimizer.step()
        twin.step()
    for p, q in zip(ps, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_what_moved_before_an_error_has_taken_its_step_and_nothing_else() -> None:
    first, second = torch.nn.Parameter(torch.randn(6, 4)), torch.nn.Parameter(torch.randn(5, 5))
    optimizer = create_optimizer("muon", [first, second], lr=0.1)
    for p in (first, second):
        p.grad = torch.randn_like(p)
    optimizer.step()
    before = _all_of(second, optimizer)
    weight = first.detach().clone()
    real = engine.BucketStep.take

    def fail_at_second(self: Any) -> None:
        if self.bucket.parameters[0] is second:
            raise RuntimeError("injected")
        real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.BucketStep, "take", fail_at_second)
        with pytest.raises(RuntimeError):
            optimizer.step()
    assert not torch.equal(first, weight)
    assert _same(_all_of(second, optimizer), before)
