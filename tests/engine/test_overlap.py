"""`overlap`: the refresh after the step. The law is in the table; here are its edges, and the stream it runs on."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch

from emerging_optimizers import REKLS, SOAP, SOAPMuon, SpikeWatch, estimate
from emerging_optimizers.engine.ahead import Ahead
from emerging_optimizers.engine.rule import Where
from emerging_optimizers.soap.kl_soap import KlSoapV3
from emerging_optimizers.soap.preconditioners import KlSoapPreconditioner
from tests.cases import CASES, OptimizerCase, distance, parameters, run, set_gradients

TABLE = [case for case in CASES if case.kwargs.get("overlap")]
SOAP_OVERLAP = next(case for case in TABLE if case.name == "soap_overlap")


def late(i: int, t: int) -> bool:
    """One gradient comes in the third step, another is missing once."""
    return (i == 1 and t < 3) or (i == 2 and t == 4)


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_a_basis_has_not_seen_the_gradient_that_it_rotates(case: OptimizerCase) -> None:
    """Of two second gradients the bases before them know nothing; after the step they differ."""
    ps, optimizer = run(case, 1)
    qs, other = run(case, 1, overlap=False)
    assert distance(ps, qs, parameters(case)) < 1e-6  # the first update is in no basis
    assert torch.equal(other.state[qs[0]]["Q_L"], torch.eye(len(qs[0])))
    first = optimizer.state[ps[0]]["Q_L"].clone()
    values = first.T @ optimizer.state[ps[0]]["L"] @ first
    assert float((values - values.diagonal().diag()).abs().max()) < 1e-5 * float(values.max())
    set_gradients(ps, 2)
    optimizer.step()
    refreshed = not torch.equal(optimizer.state[ps[0]]["Q_L"], first)
    every_step = case.kwargs.get("precondition_frequency", 1) == 1
    assert refreshed == (every_step or case.kwargs.get("refresh_ramp", 0) > 0)  # a ramp begins with every step


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_a_skipped_matrix_is_not_refreshed_either(case: OptimizerCase) -> None:
    ps, optimizer = run(case, 4)
    batch = torch.nn.Parameter(torch.randn(3, 5, 4))
    optimizer.add_param_group({"params": [batch]})
    for t in (5, 6, 7):
        set_gradients(ps, t)
        batch.grad = torch.randn(3, 5, 4)
        optimizer.step()
    before = {p: {key: x.clone() for key, x in optimizer.state[p].items()} for p in (ps[0], batch)}
    ps[0].grad.fill_(torch.nan)
    batch.grad[1] = torch.inf
    optimizer.step()
    assert all(torch.equal(optimizer.state[ps[0]][key], x) for key, x in before[ps[0]].items())
    for key, x in before[batch].items():
        assert torch.equal(optimizer.state[batch][key][1], x[1])
        assert case.kwargs.get("precondition_frequency", 1) > 1 or not torch.equal(optimizer.state[batch][key][2], x[2])


@pytest.mark.usefixtures("without_code")
def test_compiled_equals_eager() -> None:
    options: dict[str, Any] = {"dtype": torch.float64, "missing": late}
    eager, _ = run(SOAP_OVERLAP, 5, **options)
    compiled, _ = run(SOAP_OVERLAP, 5, **options, execution="compiled")
    assert distance(compiled, eager, parameters(SOAP_OVERLAP, torch.float64)) < 1e-8


def test_it_may_be_turned_on_and_off() -> None:
    """No state is its own."""
    ps, optimizer = run(SOAP_OVERLAP, 3)
    qs, ordinary = run(SOAP_OVERLAP, 3, overlap=False)
    assert optimizer.state[ps[0]].keys() == ordinary.state[qs[0]].keys()
    for t in range(4, 8):
        for each, weights in ((optimizer, ps), (ordinary, qs)):
            each.param_groups[0]["overlap"] = not each.param_groups[0]["overlap"]
            set_gradients(weights, t)
            each.step()
    assert all(torch.isfinite(p).all() for p in (*ps, *qs))


def test_a_watch_and_an_estimate_know_it() -> None:
    ps = parameters(SOAP_OVERLAP)
    optimizer = SOAP_OVERLAP.make(ps)
    with SpikeWatch(optimizer, every=1) as watch:
        for t in range(1, 4):
            set_gradients(ps, t)
            optimizer.step()
    assert {measures["basis_age"] for measures in watch.latest.values()} == {0}
    layer = torch.nn.Linear(64, 32, bias=False)
    costs = [estimate(layer, "soap", overlap=overlap, seconds=False) for overlap in (False, True)]
    assert len({(cost.state_bytes, cost.flops) for cost in costs}) == 1


def weight() -> torch.nn.Parameter:
    w = torch.nn.Parameter(torch.ones(3, 2))
    w.grad = torch.ones(3, 2)
    return w


def test_what_is_not_possible_is_said() -> None:
    for make in (SOAP, REKLS):
        with pytest.raises(ValueError, match=r"overlap=True is not possible with first_step='eigenbasis'.*'adam'"):
            make([weight()], lr=0.1, overlap=True, first_step="eigenbasis")
    for rule in (REKLS([weight()], lr=0.1, overlap=True), SOAPMuon([weight()], lr=0.1, use_eigh=True, overlap=True)):
        found = rule._checked_rule(0).obstacle(Where(torch.float32, torch.device("cuda")))
        assert found is not None
        assert "use_eigh=False" in found

    class Own(KlSoapPreconditioner):
        pass

    class OwnSoap(KlSoapV3):
        PreconditionerCls = Own

    OwnSoap([weight()], lr=0.1)
    options: Any = {"overlap": True}
    with pytest.raises(ValueError, match="not possible with the PreconditionerCls Own"):
        OwnSoap([weight()], lr=0.1, **options)


def test_whatever_reads_the_state_waits_for_it() -> None:
    class Watched(Ahead):
        def __init__(self) -> None:
            super().__init__()
            self.streams = {torch.device("cuda"): None}
            self.waits = 0

        def wait(self) -> None:
            self.waits += 1

    w = weight()
    optimizer = SOAP([w], lr=0.1, overlap=True)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer._ahead = watched = Watched()
    for reads in (
        lambda: optimizer.state[w],
        optimizer.step,
        optimizer.state_dict,
        lambda: optimizer.load_state_dict(saved),
        lambda: copy.deepcopy(optimizer),
        lambda: pickle.dump(optimizer, io.BytesIO()),
    ):
        before = watched.waits
        reads()
        assert watched.waits > before
    assert copy.deepcopy(optimizer)._ahead is not watched


@pytest.mark.gpu
@pytest.mark.parametrize("execution", ["stacked", "per_matrix", "compiled"])
@pytest.mark.parametrize("case", [case for case in TABLE if not case.optimizer.startswith("rekls")], ids=str)
def test_on_cuda_a_stream_of_its_own_makes_the_same_numbers(case: OptimizerCase, execution: str) -> None:
    if execution == "compiled" and case is not SOAP_OVERLAP:
        pytest.skip("one of the table is enough to compile")
    options: dict[str, Any] = {"dtype": torch.float64, "missing": late}
    expected, _ = run(case, 8, **options)
    found, optimizer = run(case, 8, **options, device="cuda", execution=execution)
    assert distance(found, expected, parameters(case, torch.float64)) < 1e-6
    (stream,) = optimizer._ahead.streams.values()
    assert stream != torch.cuda.current_stream()


@pytest.mark.gpu
def test_on_cuda_a_step_does_not_wait_for_the_refresh_and_the_state_does() -> None:
    """A device that is busy on the other stream: the weights are there before, the bases after."""
    w = torch.nn.Parameter(torch.randn(512, 512, device="cuda"))
    optimizer = SOAP([w], lr=0.1, overlap=True)
    for _ in range(4):
        w.grad = torch.randn_like(w)
        optimizer.step()
    (stream,) = optimizer._ahead.streams.values()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(2_000_000_000)  # about a second
    w.grad = torch.randn_like(w)
    basis = optimizer.__dict__["state"][w]["Q_L"]
    old, before = basis.clone(), torch.cuda.Event()
    torch.cuda.current_stream().synchronize()
    optimizer._follow_user = lambda: None  # it waits for the last refresh, which here is a sleep
    optimizer.step()
    before.record()
    before.synchronize()
    assert not stream.query()
    assert torch.equal(basis, old)
    assert not torch.equal(optimizer.state[w]["Q_L"], old)


@pytest.mark.gpu
def test_on_cuda_eigh_is_refused() -> None:
    with pytest.raises(ValueError, match="use_eigh=True on CUDA"):
        REKLS([torch.nn.Parameter(torch.ones(2, 2, device="cuda"))], lr=0.1, overlap=True)
