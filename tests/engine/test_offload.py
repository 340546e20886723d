"""`offload="cpu"`: the state in the host's memory, and bitwise the numbers that there are without it."""

import copy
import io
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from emerging_optimizers import SOAP, AdamW, Lion, Muon
from emerging_optimizers.engine import chunks, executors, offload
from tests.cases import CASES, OptimizerCase, run, set_gradients

BY_NAME = {case.name: case for case in CASES}
NAMED = ("adamw", "lion", "laprop", "muon", "soap", "soap_overlap", "rekls", "shampoo", "psgd_pro", "spectron", "iso")
SOME = pytest.mark.parametrize("case", [BY_NAME[name] for name in NAMED if name in BY_NAME], ids=lambda c: c.name)


class Late(offload.Ferry):
    """As a stream is at its slowest: nothing is copied before somebody waits for it, and then everything in order."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.waiting: list[Callable[[], Any]] = []
        self.fetches = self.early = 0

    def fetch(self, pieces: offload.PiecesT) -> offload.Coming:
        self.fetches += 1
        there = {k: [tuple(torch.empty_like(x).fill_(77) for x in some) for some in v] for k, v in pieces.items()}
        for name, part in pieces.items():
            for sources, targets in zip(part, there[name], strict=True):
                self.waiting += [lambda a=a, b=b: b.copy_(a) for a, b in zip(sources, targets, strict=True)]
        return offload.Coming(there, len(self.waiting))

    def land(self, coming: offload.Coming) -> offload.PiecesT:
        self.wait()
        return coming.pieces

    def send(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.waiting += [lambda a=a, b=b: a.copy_(b) for a, b in pairs]

    def wait(self) -> None:
        for copy_ in self.waiting:
            copy_()
        self.waiting.clear()


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Late:
    ferry = Late(torch.device("cpu"))
    monkeypatch.setitem(offload._FERRIES, torch.device("cpu"), ferry)
    return ferry


def same_states(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> bool:
    pairs = zip(one.state.values(), other.state.values(), strict=True)
    return all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in pairs)


def same(ps: list[torch.nn.Parameter], qs: list[torch.nn.Parameter]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(ps, qs, strict=True))


@pytest.mark.parametrize("execution", ["stacked", "per_matrix"])
@SOME
def test_nothing_but_the_place_of_the_state_changes(case: OptimizerCase, execution: str, late: Late) -> None:
    given = {"execution": execution, "missing": lambda i, t: (i, t) == (1, 3)}
    ps, here = run(case, 5, **given)
    qs, there = run(case, 5, offload="cpu", **given)
    assert late.fetches
    assert same(ps, qs)
    assert same_states(here, there)
    assert not late.waiting


@pytest.mark.parametrize("seed", range(8))
def test_state_that_was_fetched_for_a_chunk_that_is_gone_is_given_to_no_other(seed: int) -> None:
    """Matrices of one shape and of many step counts: other chunks in each step, some at the address of one before."""
    missing = {(i, t): random.Random(f"{seed} {i} {t}").random() < 0.4 for i in range(6) for t in range(12)}
    found = []
    for place in (None, "cpu"):
        ps = [torch.nn.Parameter(torch.ones(6, 8)) for _ in range(6)]
        optimizer = AdamW(ps, lr=0.01, offload=place)
        for t in range(12):
            set_gradients(ps, t, lambda i, t: missing[i, t])
            optimizer.step()
        found.append((ps, optimizer))
    (ps, here), (qs, there) = found
    assert same(ps, qs)
    assert same_states(here, there)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "int8"], ids=str)
@pytest.mark.parametrize("make", [Muon, SOAP, AdamW, Lion], ids=lambda m: m.__name__)
def test_with_less_than_float32_too(make: Any, dtype: Any, late: Late, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", 2**15)
    monkeypatch.setattr(chunks, "ELEMENT_CHUNK", 2**12)
    found = []
    for place in (None, "cpu"):
        generator = torch.Generator().manual_seed(0)
        ps = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in ((64, 256), (48, 100), (48, 100))]
        optimizer = make(ps, lr=0.01, state_dtype=dtype, offload=place, spike_guard=2.0)
        for t in range(1, 5):
            set_gradients(ps, t)
            if t == 3:
                ps[1].grad[0, 0] = torch.nan
            optimizer.step()
        found.append((ps, optimizer))
    (ps, here), (qs, there) = found
    assert late.fetches > 8
    assert same(ps, qs)
    assert same_states(here, there)


@pytest.mark.parametrize("name", ["muon", "lion"])
def test_compiled(name: str, late: Late, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "BACKEND", "eager")
    ps, here = run(BY_NAME[name], 3, execution="compiled")
    qs, there = run(BY_NAME[name], 3, execution="compiled", offload="cpu")
    assert late.fetches
    assert same(ps, qs)
    assert same_states(here, there)


def test_checkpoints_and_copies_are_those_that_there_are_without_it(late: Late) -> None:
    ps, here = run(BY_NAME["soap"], 3)
    qs, there = run(BY_NAME["soap"], 3, offload="cpu")
    file = io.BytesIO()
    torch.save(there.state_dict(), file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert saved["param_groups"][0].pop("offload") == "cpu"
    for key, state in here.state_dict()["state"].items():
        assert all(torch.equal(x, saved["state"][key][name]) for name, x in state.items())
    rs = [torch.nn.Parameter(q.detach().clone()) for q in qs]
    resumed = BY_NAME["soap"].make(rs)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["offload"] is None  # a checkpoint may go on elsewhere
    copied, ts = copy.deepcopy((there, qs))
    for t in (4, 5):
        for some, optimizer in ((ps, here), (qs, there), (rs, resumed), (ts, copied)):
            set_gradients(some, t)
            optimizer.step()
    assert same(ps, qs)
    assert same(ps, rs)
    assert same(ps, ts)
    assert same_states(here, there)


def test_it_is_obeyed_from_the_step_on_in_which_it_changes(late: Late) -> None:
    ps, here = run(BY_NAME["adamw"], 2)
    qs, there = run(BY_NAME["adamw"], 2)
    for t, place in enumerate(("cpu", "cpu", None, "cpu"), start=3):
        there.param_groups[0]["offload"] = place
        before = late.fetches
        for some, optimizer in ((ps, here), (qs, there)):
            set_gradients(some, t)
            optimizer.step()
        assert (late.fetches > before) == (place == "cpu")
        assert same(ps, qs)


def fail(*_: Any) -> None:
    raise RuntimeError("on purpose")


def test_an_error_in_a_step_leaves_nothing_behind(late: Late, monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["muon"]
    ps, here = run(case, 2)
    qs, there = run(case, 2, offload="cpu")
    set_gradients(qs, 3)
    with monkeypatch.context() as broken:
        broken.setattr("emerging_optimizers.engine.run.call", fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            there.step()
    assert same_states(here, there)
    for some, optimizer in ((ps, here), (qs, there)):
        set_gradients(some, 3)
        optimizer.step()
    assert same(ps, qs)


def test_what_cannot_be_met_is_refused() -> None:
    with pytest.raises(ValueError, match="None, 'cpu'"):
        Muon([torch.nn.Parameter(torch.eye(4))], lr=0.1, offload="disk")
    with pytest.raises(ValueError, match="capturable=True is not possible with offload"):
        Muon([torch.nn.Parameter(torch.eye(4))], lr=0.1, offload="cpu", capturable=True)


@pytest.mark.gpu
@SOME
def test_on_cuda_the_state_is_pinned_and_all_numbers_are_the_same(case: OptimizerCase) -> None:
    ps, here = run(case, 6, device="cuda")
    qs, there = run(case, 6, device="cuda", offload="cpu")
    assert same(ps, qs)
    for a, b in zip(here.state.values(), there.state.values(), strict=True):
        assert all(torch.equal(x.cpu(), b[key].cpu()) for key, x in a.items())
    big = [x for state in there.state.values() for x in state.values() if x.ndim]
    assert all(x.device.type == "cpu" and x.is_pinned() for x in big)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, "int8"], ids=str)
def test_on_cuda_memory_of_the_device_is_given_back(dtype: Any) -> None:
    peaks = []
    for place in (None, "cpu"):
        ps = [torch.nn.Parameter(torch.zeros(1024, 1024, device="cuda")) for _ in range(64)]
        optimizer = AdamW(ps, offload=place, state_dtype=dtype)
        for t in range(3):
            for p in ps:
                p.grad = torch.full_like(p, t + 1.0)
            optimizer.step()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.memory_allocated())
        del ps, optimizer
    assert peaks[1] < peaks[0] - 64 * 2**20
