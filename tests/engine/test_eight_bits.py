"""`state_dtype="int8"`: averages in blocks of 8 bits, in every execution, through checkpoints and changes of groups."""

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from emerging_optimizers import SOAP, AdamW, Iso, Lion, Muon
from emerging_optimizers.engine import RuleOptimizer, chunks, executors, packing
from emerging_optimizers.engine.parts import parts_of
from emerging_optimizers.linalg.eight_bits import dequantise, quantise
from tests.cases import CASES, OptimizerCase, distance, parameters, run, set_gradients

BY_NAME = {case.name: case for case in CASES}
NAMED = ("adamw", "lion", "ademamix", "muon", "soap", "soap_overlap", "laprop", "moso", "oblique_sgd", "psgd_pro")
SOME = pytest.mark.parametrize("case", [BY_NAME[name] for name in NAMED if name in BY_NAME], ids=lambda c: c.name)
SHORT = pytest.mark.parametrize("make", [Muon, SOAP, AdamW, Lion], ids=lambda m: m.__name__)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small a parameter is, its averages are kept in 8 bits."""
    for limit in ("LEAST", "LEAST_ROW", "LEAST_VECTOR"):
        monkeypatch.setattr(packing, limit, 1)


def train(optimizer: torch.optim.Optimizer, ps: list[torch.nn.Parameter], steps: range) -> None:
    for t in steps:
        set_gradients(ps, t)
        optimizer.step()


def twin(ps: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone()) for p in ps]


def same(ps: list[torch.nn.Parameter], qs: list[torch.nn.Parameter]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(ps, qs, strict=True))


@pytest.mark.usefixtures("tiny")
@SOME
def test_averages_are_codes_and_scales_and_the_rest_is_as_it_was(case: OptimizerCase) -> None:
    ps, optimizer = run(case, 3, state_dtype="int8")
    _, exact = run(case, 3)
    (parts,) = {tuple(parts_of(type(bucket.state)).items()) for _, bucket in optimizer._places.buckets}
    rounds = {key for key, part in parts if part.rounds and part.start != "identity"}
    for p, q in zip(ps, exact.state, strict=True):
        state, expected = optimizer.state[p], exact.state[q]
        assert {packing.plain_key(key) for key in state} == expected.keys()
        for key, value in expected.items():
            if key in rounds:
                codes, scales = state[key + "_int8"], state[key + "_scale"]
                assert codes.dtype == torch.int8
                assert codes.shape == value.shape
                assert scales.dtype == torch.float32
                assert bool(codes.any())
                assert bool(scales.any())
            else:
                assert state[key].dtype == value.dtype
                assert state[key].shape == value.shape


@pytest.mark.usefixtures("tiny")
@SOME
def test_weights_follow_those_of_a_float32_state(case: OptimizerCase) -> None:
    exact, _ = run(case, 5)
    rounded, _ = run(case, 5, state_dtype="int8")
    assert distance(rounded, exact, parameters(case)) < 0.05


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("execution", ["per_matrix", "compiled"])
@SHORT
def test_executions_round_alike(make: Any, execution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "BACKEND", "eager")
    case = BY_NAME[make.__name__.lower()]
    stacked, _ = run(case, 4, state_dtype="int8")
    other, _ = run(case, 4, state_dtype="int8", execution=execution)
    # Float32 that differs in its last bit can round to neighbouring codes.
    assert distance(other, stacked, parameters(case)) < 2e-2


def large(make: Any) -> list[torch.nn.Parameter]:
    """Rows that blocks fill, shorter and longer ones; for element-wise rules a vector with a rest."""
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(64, 256), (48, 512), (64, 100), (64, 100), (20, 300), (16, 40, 3, 3), (3, 32, 64)]
    shapes += [(2**20 + 7,), (50,)] if make in (AdamW, Lion) else []
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


@pytest.mark.parametrize("make", [AdamW, Lion], ids=lambda m: m.__name__)
def test_one_compiled_pass_makes_the_codes_that_quantise_makes(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "BACKEND", "eager")
    generator = torch.Generator().manual_seed(0)
    ps = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((64, 256), (16, 2, 512))]
    qs = twin(ps)
    exact = make(ps, lr=0.01, execution="compiled")
    optimizer = make(qs, lr=0.01, execution="compiled", state_dtype="int8")
    train(exact, ps, range(1, 2))
    train(optimizer, qs, range(1, 2))
    assert same(ps, qs)
    ((_, bucket),) = optimizer._places.buckets
    assert all(chunk.in_blocks is not None for chunk in bucket.chunks(bucket.whole, "elements"))
    for p, q in zip(ps, qs, strict=True):
        codes, scales = quantise(exact.state[p]["exp_avg"].reshape(p.shape[0], -1))
        assert torch.equal(optimizer.state[q]["exp_avg_int8"].view(codes.shape), codes)
        assert torch.equal(optimizer.state[q]["exp_avg_scale"], scales)
    # A parameter that sits the step out keeps everything bit for bit; the other moves.
    before = copy.deepcopy([{**optimizer.state[q], "weight": q.detach()} for q in qs])
    set_gradients(qs, 2)
    assert qs[0].grad is not None
    qs[0].grad.view(-1)[3] = torch.nan
    optimizer.step()
    after = [{**optimizer.state[q], "weight": q.detach()} for q in qs]
    moved = [
        {key for key in old if not torch.equal(old[key], new[key])} for old, new in zip(before, after, strict=True)
    ]
    assert moved[0] <= {"skipped"}
    assert {"weight", "exp_avg_int8", "exp_avg_scale"} <= moved[1]


@SHORT
def test_chunks_change_no_number(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ps = large(make)
    qs = twin(ps)
    train(make(ps, lr=0.01, state_dtype="int8"), ps, range(1, 4))
    monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", 1)
    monkeypatch.setattr(chunks, "ELEMENT_CHUNK", 1000)
    train(make(qs, lr=0.01, state_dtype="int8"), qs, range(1, 4))
    if make in (AdamW, Lion):
        assert same(ps, qs)
    else:  # one matrix a call is not bitwise the stack
        torch.testing.assert_close(ps, qs, rtol=1e-3, atol=1e-5)


def test_what_is_small_stays_in_float32() -> None:
    shapes = [(64, 64), (63, 64), (1024, 8), (4096,), (2**20,)]
    ps = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = AdamW(ps, state_dtype="int8")
    train(optimizer, ps, range(1, 2))
    assert ["exp_avg_int8" in optimizer.state[p] for p in ps] == [True, False, False, False, True]
    assert optimizer.state[ps[1]]["exp_avg"].dtype == torch.float32


def test_a_quarter_of_the_momentum() -> None:
    ps = [torch.nn.Parameter(torch.zeros(64, 256))]
    optimizer = Muon(ps, state_dtype="int8")
    train(optimizer, ps, range(1, 2))
    assert sum(x.nbytes for x in optimizer.state[ps[0]].values()) == 64 * 256 + 64 * 4


@pytest.fixture(params=["live", "saved", "copied", "pickled"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    return request.param


@SHORT
def test_a_resumed_run_is_the_run(make: Any, way: str) -> None:
    ps = large(make)
    whole = make(ps, lr=0.01, state_dtype="int8")
    train(whole, ps, range(1, 4))
    qs = twin(ps)
    resumed: RuleOptimizer = make(qs, lr=0.01)
    if way == "copied":
        resumed, qs = copy.deepcopy((whole, ps))
    elif way == "pickled":
        file = io.BytesIO()
        torch.save((whole, ps), file)
        resumed, qs = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    elif way == "saved":
        file = io.BytesIO()
        torch.save(whole.state_dict(), file)
        resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    else:
        resumed.load_state_dict(whole.state_dict())
    assert resumed.param_groups[0]["state_dtype"] == "int8"
    for p, q in zip(ps, qs, strict=True):
        assert whole.state[p].keys() == resumed.state[q].keys()
        assert all(torch.equal(x, resumed.state[q][key]) for key, x in whole.state[p].items())
    train(whole, ps, range(4, 7))
    train(resumed, qs, range(4, 7))
    assert same(ps, qs)


@SHORT
def test_a_float32_checkpoint_goes_on_in_8_bits_and_back(make: Any) -> None:
    ps = large(make)
    whole = make(ps, lr=0.01)
    train(whole, ps, range(1, 4))
    saved = copy.deepcopy(whole.state_dict())
    for group in saved["param_groups"]:
        del group["state_dtype"]  # as published: the option is the optimizer's own
    qs = twin(ps)
    packed = make(qs, lr=0.01, state_dtype="int8")
    packed.load_state_dict(saved)
    wide = {key for key in whole.state[ps[0]] if key in ("exp_avg", "momentum_buffer")}
    assert not wide & packed.state[qs[0]].keys()
    assert {key + "_int8" for key in wide} < packed.state[qs[0]].keys()
    train(whole, ps, range(4, 5))
    train(packed, qs, range(4, 5))
    assert distance(qs, ps, large(make)) < 0.02

    saved = copy.deepcopy(packed.state_dict())
    for group in saved["param_groups"]:
        del group["state_dtype"]
    rs = twin(qs)
    back = make(rs, lr=0.01)
    back.load_state_dict(saved)
    assert back.state[rs[0]].keys() == whole.state[ps[0]].keys()
    for key in wide:
        codes, scales = (packed.state[qs[4]][key + end] for end in ("_int8", "_scale"))
        assert torch.equal(back.state[rs[4]][key], dequantise(codes, scales))


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("nonfinite", ["skip", "spike"])
@SHORT
def test_a_skipped_matrix_keeps_its_state_bit_for_bit(make: Any, nonfinite: str) -> None:
    ps = large(make)[2:4]
    optimizer = make(ps, lr=0.01, state_dtype="int8", spike_guard=2.0 if nonfinite == "spike" else None)
    train(optimizer, ps, range(1, 4))
    before = {key: value.clone() for key, value in optimizer.state[ps[0]].items()}
    other = {key: value.clone() for key, value in optimizer.state[ps[1]].items()}
    set_gradients(ps, 4)
    ps[0].grad[0, 0] = torch.nan
    optimizer.step()
    ours, theirs = optimizer.state[ps[0]], optimizer.state[ps[1]]
    assert all(torch.equal(value, before[key]) for key, value in ours.items() if not key.startswith("guard"))
    assert not all(torch.equal(value, other[key]) for key, value in theirs.items())


def test_one_of_a_batch_that_is_skipped_keeps_its_state() -> None:
    w = torch.nn.Parameter(torch.randn(3, 64, 100))
    optimizer = SOAP([w], lr=0.01, state_dtype="int8")
    train(optimizer, [w], range(1, 3))
    before = {key: value.clone() for key, value in optimizer.state[w].items()}
    set_gradients([w], 3)
    w.grad[1, 5, 5] = torch.inf
    optimizer.step()
    for key, value in optimizer.state[w].items():
        assert torch.equal(value[1], before[key][1]), key
        assert not torch.equal(value[0], before[key][0]), key


def test_what_is_not_finite_goes_on_where_it_is_asked_for() -> None:
    w = torch.nn.Parameter(torch.randn(64, 64))
    optimizer = AdamW([w], state_dtype="int8", nonfinite="propagate")
    w.grad = torch.full((64, 64), torch.nan)
    optimizer.step()
    assert optimizer.state[w]["exp_avg_scale"].isnan().all()
    assert w.isnan().all()


@SHORT
def test_the_option_is_obeyed_from_the_step_on_in_which_it_changes(make: Any) -> None:
    ps = large(make)
    optimizer = make(ps, lr=0.01)
    train(optimizer, ps, range(1, 3))
    wide = {key for key in optimizer.state[ps[0]] if key in ("exp_avg", "momentum_buffer")}
    group = optimizer.param_groups[0]
    for dtype in ("int8", torch.bfloat16, "int8", None):
        group["state_dtype"] = dtype
        optimizer.step()
        keys = optimizer.state[ps[0]].keys()
        assert all((key + "_int8" in keys) == (dtype == "int8") != (key in keys) for key in wide)
        assert not [key for key in keys if key.endswith("_scale")] or dtype == "int8"
    optimizer.add_param_group({"params": [new := torch.nn.Parameter(torch.randn(64, 64))], "state_dtype": "int8"})
    new.grad = torch.ones(64, 64)
    optimizer.step()
    assert all(key + "_int8" in optimizer.state[new] for key in wide)


def test_numbers_survive_a_change_to_float32_and_to_another_view() -> None:
    w = torch.nn.Parameter(torch.randn(128, 128))
    optimizer = Muon([w], lr=0.01, state_dtype="int8")
    train(optimizer, [w], range(1, 3))
    expected = dequantise(optimizer.state[w]["momentum_buffer_int8"], optimizer.state[w]["momentum_buffer_scale"])
    group = optimizer.param_groups[0]
    group["state_dtype"] = None
    w.grad = None
    optimizer.step()
    assert torch.equal(optimizer.state[w]["momentum_buffer"], expected)
    group["state_dtype"] = "int8"
    optimizer.step()
    group["matrix_view"] = "transposed"
    optimizer.step()
    codes, scales = (optimizer.state[w]["momentum_buffer_" + end] for end in ("int8", "scale"))
    found = dequantise(codes.mT.contiguous(), scales).mT
    assert (found - expected).norm() < 0.01 * expected.norm()
    assert not torch.equal(found, expected)


def test_another_view_before_a_copys_first_step_passes_over_entries_of_others() -> None:
    w = torch.nn.Parameter(torch.randn(64, 64))
    optimizer = Muon([w], lr=0.01)
    train(optimizer, [w], range(1, 3))
    optimizer.state[w][3] = optimizer.state[w]["a_scale"] = "somebody's"
    twin = copy.deepcopy(optimizer)
    (v,) = twin.param_groups[0]["params"]
    v.grad = torch.ones(64, 64)
    twin.param_groups[0]["matrix_view"] = "transposed"
    twin.step()
    assert twin.state[v][3] == twin.state[v]["a_scale"] == "somebody's"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@pytest.mark.parametrize("shape", [(64, 64), (64, 96)], ids=str)
def test_another_view_before_a_copys_first_step_is_refused_by_name(copied: Any, shape: tuple[int, int]) -> None:
    w = torch.nn.Parameter(torch.randn(*shape))
    optimizer = Muon([w], lr=0.01, state_dtype="int8")
    train(optimizer, [w], range(1, 3))
    twin = copied(copied(optimizer))
    (v,), before = twin.param_groups[0]["params"], w.detach().clone()
    v.grad = torch.ones(shape)
    twin.param_groups[0]["matrix_view"] = "transposed"
    with pytest.raises(ValueError, match=r"had matrix_view='auto' when the optimizer was copied, and has 'transposed'"):
        twin.step()
    assert torch.equal(v, before)
    twin.param_groups[0]["matrix_view"] = "auto"
    twin.step()
    twin.param_groups[0]["matrix_view"] = "transposed"
    twin.step()


def test_entries_that_somebody_replaces_are_taken_over() -> None:
    w = torch.nn.Parameter(torch.randn(64, 64))
    optimizer = Muon([w], lr=0.01, state_dtype="int8")
    train(optimizer, [w], range(1, 3))
    state = optimizer.state[w]
    state["momentum_buffer_int8"] = torch.ones(64, 64, dtype=torch.int8)
    state["momentum_buffer_scale"] = torch.full((64, 1), 0.5)
    w.grad = None
    optimizer.step()
    assert (optimizer.state[w]["momentum_buffer_int8"] == 1).all()
    assert (optimizer.state[w]["momentum_buffer_scale"] == 0.5).all()
    optimizer.state[w]["momentum_buffer_int8"] = torch.ones(64, 64)
    with pytest.raises(ValueError, match=r"torch\.int8 is needed"):
        optimizer.step()


def test_codes_without_scales_are_refused() -> None:
    w = torch.nn.Parameter(torch.randn(64, 64))
    optimizer = Muon([w], lr=0.01, state_dtype="int8")
    train(optimizer, [w], range(1, 3))
    saved = copy.deepcopy(optimizer.state_dict())
    scales = saved["state"][0].pop("momentum_buffer_scale")
    with pytest.raises(ValueError, match="momentum_buffer_scale"):
        optimizer.load_state_dict(saved)
    saved["state"][0]["momentum_buffer_scale"] = scales[:5]
    with pytest.raises(ValueError, match="momentum_buffer_scale"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    ("make", "dtype", "says"),
    [(Muon, torch.int8, '"int8"'), (Muon, "int4", '"int8"'), (Iso, "int8", "nothing bears rounding")],
)
def test_what_cannot_be_met_is_refused(make: Any, dtype: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make([torch.nn.Parameter(torch.eye(4))], lr=0.1, state_dtype=dtype)


@pytest.mark.usefixtures("tiny")
def test_no_update_after_a_spike_is_above_twice_the_largest_before() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.zeros(16, 48))
    optimizer = SOAP([w], lr=1.0, weight_decay=0.0, state_dtype="int8")
    sizes = []
    for t in range(120):
        w.grad = torch.randn(16, 48, generator=generator) * (1e5 if t == 40 else 1)
        before = w.detach().clone()
        optimizer.step()
        sizes.append(float((w.detach() - before).square().mean().sqrt()))
    assert max(sizes[40:]) < 2 * max(sizes[:40])


def test_a_foreign_entry_stays() -> None:
    w = torch.nn.Parameter(torch.randn(64, 64))
    optimizer = Muon([w], lr=0.01)
    train(optimizer, [w], range(1, 3))
    mine: Tensor = torch.ones(3)
    optimizer.state[w]["temperature_scale"] = mine
    optimizer.param_groups[0]["state_dtype"] = "int8"
    optimizer.step()
    assert optimizer.state[w]["temperature_scale"] is mine
