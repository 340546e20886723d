"""An interrupt, or memory that runs out, at a random line of a step: every weight with its state and count, or none."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import emerging_optimizers
from tests.cases import SEEDS, OptimizerCase, parameters, set_gradients

PACKAGE = str(Path(emerging_optimizers.__file__).parent)
KINDS = (KeyboardInterrupt, torch.OutOfMemoryError)


class Lines:
    """Counts the lines of the package that run, and raises before one of them."""

    def __init__(self, stop: int = -1, kind: type[BaseException] = KeyboardInterrupt) -> None:
        self.stop, self.kind = stop, kind
        self.count = 0
        self.where = ""

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.count += 1
            if self.count == self.stop:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise self.kind("injected")
        return self

    @contextmanager
    def traced(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self)
        try:
            yield
        finally:
            sys.settrace(before)


def _made(case: OptimizerCase, options: dict[str, Any], steps: int) -> tuple[list[Any], torch.optim.Optimizer]:
    ps = parameters(case, copies=1)
    optimizer = case.make(ps, **options)
    for t in range(1, steps + 1):
        set_gradients(ps, t)
        optimizer.step()
    set_gradients(ps, steps + 1)
    return ps, optimizer


def _all_of(p: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {"weight": p.detach().clone(), **{key: x.clone() for key, x in optimizer.state[p].items()}}


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def assert_all_or_nothing(case: OptimizerCase, options: dict[str, Any], seeds: range) -> None:
    """Raise at a random line of the fourth step, once for each seed; then go on."""
    for _ in range(2):  # what is cached is there the second time, as it will be
        ps, optimizer = _made(case, options, 3)
        old = [_all_of(p, optimizer) for p in ps]
        lines = Lines()
        with lines.traced():
            optimizer.step()
    new = [_all_of(p, optimizer) for p in ps]
    set_gradients(ps, 5)
    optimizer.step()
    last = [_all_of(p, optimizer) for p in ps]
    for seed in seeds:
        draw = random.Random(f"{case} {options} {seed}")
        stop, kind = draw.randrange(1, lines.count + 1), draw.choice(KINDS)
        ps, optimizer = _made(case, options, 3)
        interrupted = Lines(stop, kind)
        with interrupted.traced(), pytest.raises(kind, match="injected"):
            optimizer.step()
        here = f"seed {seed}: {kind.__name__} at line {stop} of {lines.count}, {interrupted.where}"
        moved = []
        for p, before, after in zip(ps, old, new, strict=True):
            now = _all_of(p, optimizer)
            assert _same(now, before) or _same(now, after), here
            moved.append(_same(now, after))
        # Those that have not moved take the same step now, and then all of them the next one, as if nothing had been.
        for p, done in zip(ps, moved, strict=True):
            if done:
                p.grad = None
        optimizer.step()
        assert all(_same(_all_of(p, optimizer), after) for p, after in zip(ps, new, strict=True)), here
        set_gradients(ps, 5)
        optimizer.step()
        assert all(_same(_all_of(p, optimizer), after) for p, after in zip(ps, last, strict=True)), here


ROWS = [(case, {}) for case in SEEDS] + [
    (case, {"spike_guard": 3.0}) for case in SEEDS if case.name in ("adamw", "soap", "muon")
]


@pytest.mark.parametrize(("case", "options"), ROWS, ids=str)
def test_an_error_at_a_random_line_leaves_old_or_new(case: OptimizerCase, options: dict[str, Any]) -> None:
    assert_all_or_nothing(case, options, range(3))


@pytest.mark.slow  # the same at more lines
@pytest.mark.parametrize(("case", "options"), ROWS, ids=str)
def test_an_error_at_many_random_lines_leaves_old_or_new(case: OptimizerCase, options: dict[str, Any]) -> None:
    assert_all_or_nothing(case, options, range(3, 60))
