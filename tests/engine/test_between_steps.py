"""What people do to an optimizer between two steps: groups, state, options, checkpoints, and what is set around it."""

import copy
import json
import threading
import warnings
from typing import Any
from unittest.mock import patch

import numpy
import pytest
import torch
from torch import Tensor, nn

from emerging_optimizers import AdamW, Lion, create_optimizer
from emerging_optimizers.engine.validate import misspelled
from emerging_optimizers.engine.weight_decay import keep_factor
from emerging_optimizers.linalg.precision import fp32_matmul_precision
from emerging_optimizers.orthogonalized_optimizers.muon import Muon, MuonRule
from emerging_optimizers.soap.soap import SOAP
from tests.cases import CASES, SEEDS, OptimizerCase, parameters, run, set_gradients

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_optimizer = pytest.mark.parametrize("case", SEEDS, ids=str)


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*(shape or (4, 4))))


def clones(tensors: Any) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def same(a: Any, b: Any) -> bool:
    return all(map(torch.equal, a, b))


def state_of(optimizer: torch.optim.Optimizer, p: Tensor) -> list[Tensor]:
    return clones(optimizer.state[p].values())


# ---- groups -----------------------------------------------------------------------------------------------------


@every_optimizer
def test_a_parameter_that_was_taken_out_stays_and_may_come_back(case: OptimizerCase) -> None:
    ps, optimizer = run(case, 2)
    group = optimizer.param_groups[0]
    gone = group["params"].pop(1)
    weight, state = gone.detach().clone(), state_of(optimizer, gone)
    set_gradients(ps, 3)
    optimizer.step()
    assert torch.equal(gone, weight)
    assert same(state_of(optimizer, gone), state)
    assert len(optimizer.state_dict()["state"]) == len(ps) - 1
    group["params"].insert(1, gone)
    set_gradients(ps, 4)
    optimizer.step()
    assert not torch.equal(gone, weight)
    assert not any(map(torch.equal, state_of(optimizer, gone), state)) or case.name == "iso"


@every_optimizer
def test_groups_may_be_reordered_deleted_and_replaced(case: OptimizerCase) -> None:
    """They are what they say now: the same as optimizers of their own."""
    ps, twins = parameters(case), parameters(case)
    half = len(ps) // 2
    rates = {"lr": 0.02}
    optimizer = case.make([{"params": ps[:half]}, {"params": ps[half:], **rates}])
    apart = [case.make(twins[:half]), case.make(twins[half:], **rates)]
    for t in range(1, 6):
        if t == 3:
            optimizer.param_groups.reverse()
        if t == 4:
            optimizer.param_groups[0] = {**optimizer.param_groups[0]}
        if t == 5:
            del optimizer.param_groups[1]
        set_gradients(ps, t)
        set_gradients(twins, t)
        optimizer.step()
        for o in apart[(t == 5) :]:
            o.step()
        assert same(ps, twins), t


def test_a_parameter_moves_between_groups_with_its_state() -> None:
    a, b, twin = matrix(), matrix(), None
    twin = nn.Parameter(a.detach().clone())
    optimizer, other = AdamW([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.01}]), AdamW([twin], lr=0.1)
    for t in range(4):
        if t == 2:
            optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop())
            other.param_groups[0]["lr"] = 0.01
        a.grad, b.grad = torch.randn(4, 4), torch.randn(4, 4)
        twin.grad = a.grad
        optimizer.step()
        other.step()
    assert torch.equal(a, twin)
    assert optimizer.state[a]["step"] == 4


def test_a_replaced_parameter_starts_anew_and_the_old_one_rests() -> None:
    old, new = matrix(), matrix()
    optimizer = Muon([old], lr=0.1)
    old.grad = torch.randn(4, 4)
    optimizer.step()
    weight = old.detach().clone()
    optimizer.param_groups[0]["params"][0] = new
    before = new.detach().clone()
    new.grad = torch.randn(4, 4)
    optimizer.step()
    assert torch.equal(old, weight)
    assert not torch.equal(new, before)


def test_what_a_group_cannot_hold_is_refused_by_name_and_nothing_moves() -> None:
    a, b = matrix(), matrix()
    optimizer = Muon([{"params": [a]}, {"params": [b]}], lr=0.1)
    a.grad, b.grad = torch.randn(4, 4), torch.randn(4, 4)
    optimizer.step()
    before = clones((a, b))
    optimizer.param_groups[1]["params"].append(a)
    with pytest.raises(ValueError, match=r"is in param_groups\[0\] and in param_groups\[1\]"):
        optimizer.step()
    optimizer.param_groups[1]["params"][1] = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"updates matrices.*of shape \(3,\)"):
        optimizer.step()
    assert same((a, b), before)
    optimizer.param_groups[1]["params"].pop()
    optimizer.step()
    assert not any(map(torch.equal, (a, b), before))


@every_case
def test_a_resume_is_bitwise_after_a_late_start_and_a_skipped_gradient(case: OptimizerCase, tmp_path: Any) -> None:
    def steps(ps: list[nn.Parameter], optimizer: Any, first: int, last: int) -> None:
        for t in range(first, last):
            set_gradients(ps, t)
            if t == 2:
                ps[1].grad.fill_(float("nan"))
            ps[0].requires_grad_(t > 2)
            if t <= 2:
                ps[0].grad = None
            optimizer.step()

    ps = parameters(case)
    optimizer = case.make(ps)
    steps(ps, optimizer, 1, 5)
    torch.save({"weights": clones(ps), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed = [nn.Parameter(weight) for weight in saved["weights"]]
    other = case.make(resumed)
    other.load_state_dict(saved["optimizer"])
    assert other.guard_events() == optimizer.guard_events() != {}
    steps(ps, optimizer, 5, 8)
    steps(resumed, other, 5, 8)
    assert same(ps, resumed)


# ---- what is set around a step ----------------------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize(
    "setting", ["float64", "bfloat16", "autocast", "inference", "device", "deterministic", "flush"]
)
def test_settings_around_a_step_change_no_number(case: OptimizerCase, setting: str) -> None:
    ps, twins = parameters(case, copies=1), parameters(case, copies=1)
    optimizer, twin = case.make(ps), case.make(twins)
    for t in range(1, 4):
        set_gradients(ps, t)
        set_gradients(twins, t)
        for p in (*ps, *twins) if setting == "flush" else ():
            p.grad.mul_(1e-20)  # its square is a subnormal number
        if t == 3:
            ps[0].grad[..., :1].fill_(float("nan"))
            twins[0].grad[..., :1].fill_(float("nan"))
        twin.step()
        try:
            if setting in ("float64", "bfloat16"):
                torch.set_default_dtype(getattr(torch, setting))
                optimizer.step()
            elif setting == "deterministic":
                torch.use_deterministic_algorithms(True)
                optimizer.step()
            elif setting == "device":
                with torch.device("meta"):
                    optimizer.step()
            elif setting == "flush":
                torch.set_flush_denormal(True)
                optimizer.step()
            else:
                with torch.autocast("cpu", torch.bfloat16) if setting == "autocast" else torch.inference_mode():
                    optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
            torch.use_deterministic_algorithms(False)
            torch.set_flush_denormal(False)
    assert same(ps, twins)
    assert all(same(state_of(optimizer, p), state_of(twin, q)) for p, q in zip(ps, twins, strict=True))
    optimizer.step()  # nothing was left behind that a later step could not write


def test_a_closure_runs_under_the_settings_around_the_step() -> None:
    p = matrix()
    optimizer = AdamW([p], lr=0.1)

    def closure() -> Tensor:
        assert torch.is_autocast_enabled("cpu")
        p.grad = torch.ones(4, 4)
        return p.sum()

    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step(closure)


def test_two_threads_leave_the_matmul_precision_as_they_found_it() -> None:
    before, inside, leave = torch.get_float32_matmul_precision(), threading.Event(), threading.Event()

    def other() -> None:
        try:
            with fp32_matmul_precision("medium"):
                inside.set()
                leave.wait()
        finally:
            inside.set()  # nobody waits for a thread that has raised

    thread = threading.Thread(target=other)
    with fp32_matmul_precision("high"):
        thread.start()
        inside.wait()
    leave.set()
    thread.join()
    assert torch.get_float32_matmul_precision() == before


# ---- state ------------------------------------------------------------------------------------------------------


@every_optimizer
def test_state_that_was_written_in_place_counts(case: OptimizerCase) -> None:
    """Counts too: a state of zeros is that of the first step, bias correction included."""
    if "step" not in case.state or case.optimizer in ("iso", "spectron", "muown"):
        pytest.skip("zeros are no state of it: it keeps factors of the weight, or counts nothing")
    if any(key.startswith("Q_") for key in case.state):
        pytest.skip("its first basis is the identity, not zero")
    ps, optimizer = run(case, 5)
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()
    fresh = [nn.Parameter(p.detach().clone()) for p in ps]
    other = case.make(fresh)
    set_gradients(ps, 6)
    set_gradients(fresh, 6)
    optimizer.step()
    other.step()
    for p, q in zip(ps, fresh, strict=True):
        torch.testing.assert_close(p, q)


def test_a_count_that_is_none_is_refused_by_name() -> None:
    p = matrix()
    optimizer = AdamW([("w", p)], lr=0.1)
    for count in (-1.0, 2.5, float("nan")):
        p.grad = torch.ones(4, 4)
        optimizer.step()
        weight = p.detach().clone()
        optimizer.state[p]["step"].fill_(count)
        with pytest.raises(ValueError, match=r"'step' of .* whole number >= 0"):
            optimizer.step()
        assert torch.equal(p, weight)
        optimizer.state[p]["step"].fill_(3.0)


@every_optimizer
def test_state_that_was_cleared_is_made_again_and_saved(case: OptimizerCase) -> None:
    ps, optimizer = run(case, 1)
    optimizer.state.clear()
    set_gradients(ps, 2)
    optimizer.step()
    assert len(optimizer.state_dict()["state"]) == len(ps)


@every_optimizer
def test_entries_of_others_are_kept_and_saved(case: OptimizerCase) -> None:
    ps, optimizer = run(case, 1)
    optimizer.state["_x"] = 3
    optimizer.state[ps[0]]["z"] = ps[0].detach().clone()
    z = optimizer.state[ps[0]]["z"].clone()
    for t in (2, 3):
        set_gradients(ps, t)
        optimizer.step()
    resumed = [nn.Parameter(p.detach().clone()) for p in ps]
    other = case.make(resumed)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied_ps, copied = copy.deepcopy((ps, optimizer))
    set_gradients(copied_ps, 4)
    copied.step()
    for p, o in ((ps[0], optimizer), (resumed[0], other), (copied_ps[0], copied)):
        assert torch.equal(o.state[p]["z"], z)
        assert o.state["_x"] == 3
        assert "z" in o.state_dict()["state"][0]


def test_where_two_parameters_have_one_name_positions_decide() -> None:
    """As of two models in one optimizer."""

    def make() -> tuple[list[nn.Parameter], Any]:
        ps = [matrix(), matrix()]
        return ps, Muon([{"params": [("weight", p)], "lr": lr} for p, lr in zip(ps, (0.1, 0.2), strict=True)])

    ps, optimizer = make()
    for i, p in enumerate(ps):
        p.grad = torch.full_like(p, i + 1.0)
    optimizer.step()
    others, other = make()
    other.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in other.param_groups] == [0.1, 0.2]
    for p, q in zip(ps, others, strict=True):
        assert torch.equal(optimizer.state[p]["momentum_buffer"], other.state[q]["momentum_buffer"])


@every_optimizer
def test_entries_of_others_before_the_first_step_are_kept_and_saved(case: OptimizerCase) -> None:
    """Also where a key is no string; what one has that loads is nothing of its own."""
    ps = parameters(case)
    optimizer = case.make(ps)
    kept = {"z": torch.ones(2), 7: torch.ones(1)}
    optimizer.state[ps[0]].update(kept)
    resumed = [nn.Parameter(p.detach().clone()) for p in ps]
    other = case.make(resumed)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied_ps, copied = copy.deepcopy((ps, optimizer))
    later_ps, later = copy.deepcopy((copied_ps, copied))
    for own, o in ((ps, optimizer), (resumed, other), (copied_ps, copied), (later_ps, later)):
        set_gradients(own, 1)
        o.step()
        assert all(map(torch.equal, own, ps))
        assert {key: o.state_dict()["state"][0][key].tolist() for key in kept} == {"z": [1, 1], 7: [1]}


# ---- gradients that overflow ------------------------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("size", [1e17, 1e20])
@pytest.mark.parametrize("beside", [1.0, float("nan")], ids=["alone", "beside_nan"])
def test_a_gradient_that_overflows_leaves_finite_weights(case: OptimizerCase, size: float, beside: float) -> None:
    ps, optimizer = run(case, 3)
    set_gradients(ps, 4)
    ps[0].grad.mul_(size)
    ps[-1].grad.mul_(beside)
    optimizer.step()
    if size > 1e17:
        assert next(iter(optimizer.guard_events().values()))[1] == 1
    for t in (5, 6, 7):
        set_gradients(ps, t)
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in ps)
    assert all(bool(x.isfinite().all()) for p in ps for x in optimizer.state[p].values())


def test_raise_raises_for_a_gradient_that_overflows() -> None:
    p = matrix()
    optimizer = SOAP([p], lr=0.1, nonfinite="raise")
    p.grad = torch.full((4, 4), 1e20)
    with pytest.raises(ValueError, match="has a norm above"):
        optimizer.step()


@pytest.mark.parametrize("capturable", [False, True])
def test_a_hundred_skips_in_a_row_are_told_once(capturable: bool) -> None:
    p, q = matrix(), matrix()
    optimizer = Muon([("p", p), ("q", q)], lr=0.1, capturable=capturable)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for t in range(220):
            p.grad = torch.full((4, 4), float("nan"))
            q.grad = torch.full((4, 4), float("nan" if t < 60 else 1.0))
            optimizer.step()
            if t < 90:
                assert not seen
    assert len(seen) == 1
    assert "'p' of shape (4, 4)" in str(seen[0].message)
    assert optimizer.guard_events() == {"p": (0, 220), "q": (0, 60)}


def test_guard_events_survive_copies_moves_and_checkpoints() -> None:
    p = matrix()
    optimizer = SOAP([("p", p)], lr=0.1)
    p.grad = torch.full((4, 4), float("inf"))
    optimizer.step()
    _, copied = copy.deepcopy((p, optimizer))
    assert copied.guard_events() == {"p": (0, 1)}
    other = SOAP([("p", matrix())], lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    assert other.guard_events() == {"p": (0, 1)}
    p.data = p.data.double()
    p.grad = torch.full((4, 4), float("inf"), dtype=torch.float64)
    optimizer.step()
    assert optimizer.guard_events() == {"p": (0, 2)}


# ---- options ----------------------------------------------------------------------------------------------------

WAYS = ["constructor", "group", "later", "checkpoint"]


def with_option(way: str, name: str, value: Any) -> AdamW:
    p = matrix()
    if way == "constructor":
        return AdamW([p], **{"lr": 0.1, name: value})
    if way == "group":
        return AdamW([{"params": [p], name: value}], lr=0.1)
    optimizer = AdamW([p], lr=0.1)
    p.grad = torch.ones(4, 4)
    if way == "later":
        optimizer.param_groups[0][name] = value
        optimizer.step()
        return optimizer
    saved = optimizer.state_dict()
    saved["param_groups"][0][name] = value
    optimizer.load_state_dict(saved)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("lr", numpy.float32(0.5), 0.5),
        ("lr", numpy.array(0.5), 0.5),
        ("weight_decay", torch.tensor(0.5), 0.5),
        ("weight_decay", 0, 0),
        ("betas", [0.5, 0.75], (0.5, 0.75)),
        ("betas", numpy.array([0.5, 0.75]), (0.5, 0.75)),
        ("betas", (numpy.float64(0.5), torch.tensor(0.75)), (0.5, 0.75)),
        ("weight_decay_method", numpy.str_("l2"), "l2"),
        ("nesterov", numpy.bool_(True), True),
    ],
    ids=str,
)
def test_options_are_taken_alike_wherever_they_are_set(way: str, name: str, value: Any, meant: Any) -> None:
    optimizer = with_option(way, name, value)
    assert optimizer.param_groups[0][name] == meant
    assert type(optimizer.param_groups[0][name]) is type(meant)
    json.dumps(optimizer.state_dict()["param_groups"])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "value"), [("lr", "0.1"), ("betas", "ab"), ("betas", 3), ("betas", [0.1]), ("eps", None), ("nesterov", 1)]
)
def test_options_are_refused_in_the_same_words(way: str, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"AdamW: {name}=.* is not allowed; give "):
        with_option(way, name, value)


@pytest.mark.parametrize("name", ["weight_decay_scale", "no_weight_decay", "lr_scale", "lr0", "initial_lr", "wd", "id"])
def test_own_keys_in_groups_are_the_users(name: str) -> None:
    assert with_option("group", name, 3).param_groups[0][name] == 3
    assert with_option("later", name, 3).param_groups[0][name] == 3


@pytest.mark.parametrize(
    ("name", "meant"),
    [("weight_deacy", "weight_decay"), ("beta", "betas"), ("LR", "lr"), ("nesterv", "nesterov"), ("epss", "eps")],
)
@pytest.mark.parametrize("way", ["group", "later"])
def test_a_misspelled_option_in_a_group_is_refused(way: str, name: str, meant: str) -> None:
    assert misspelled(name, ["lr", "betas", "eps", "weight_decay", "nesterov"]) == meant
    with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
        with_option(way, name, 0.1)


@pytest.mark.parametrize(
    ("name", "options", "option", "value"),
    [
        ("soap", {}, "max_precond_dim", 4),
        ("soap", {}, "use_kl_shampoo", True),
        ("soap", {"use_kl_shampoo": True}, "use_kl_shampoo", False),
        ("soap", {"refresh_ramp": 0}, "precondition_frequency", 3),
        ("soap", {}, "matrix_view", ("split", 3)),
        ("soap", {}, "state_dtype", torch.bfloat16),
        ("muon", {}, "matrix_view", ("split", 2, 4)),
        ("muon", {}, "state_dtype", torch.bfloat16),
        ("adaptive_muon", {"momentum": 0.9, "weight_decay": 0.0}, "moment2_method", "normuon"),
        ("spectron", {"rank": 2, "truncation_tolerance": 1.0}, "rank", 3),
        ("signum", {}, "use_shape_scaling", True),
        ("kl_shampoo", {}, "max_precond_dim", 6),
    ],
)
def test_an_option_that_shapes_the_state_is_obeyed_or_refused_by_name(
    name: str, options: dict[str, Any], option: str, value: Any
) -> None:
    p = matrix(6, 8)
    optimizer = create_optimizer(name, [p], lr=0.01, **options)
    for _ in range(3):
        p.grad = torch.randn(6, 8)
        optimizer.step()
    old, weight = optimizer.param_groups[0][option], p.detach().clone()
    optimizer.param_groups[0][option] = value
    p.grad = torch.randn(6, 8)
    refused = ""
    try:
        optimizer.step()
    except ValueError as wrong:
        refused = str(wrong)
    if refused:
        assert option in refused
        assert torch.equal(p, weight)
        optimizer.param_groups[0][option] = value = old
        optimizer.step()
    assert not torch.equal(p, weight)
    q = nn.Parameter(p.detach().clone())
    other = create_optimizer(name, [q], lr=0.01, **{**options, option: value})
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    p.grad = q.grad = torch.randn(6, 8)
    optimizer.step()
    other.step()
    assert torch.equal(p, q)


# ---- a learning rate of zero ------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("tensor", [False, True])
def test_a_step_at_lr_zero_moves_nothing(case: OptimizerCase, tensor: bool) -> None:
    decay = {} if case.name == "laprop_frob" else {"weight_decay": 0.1}  # which would be undone, and says so
    ps, optimizer = run(case, 2, **decay)
    lr = torch.tensor(0.0) if tensor else 0.0
    for group in optimizer.param_groups:
        group["lr"] = lr
    before = clones(ps)
    set_gradients(ps, 3)
    optimizer.step()
    assert same(ps, before)


def test_a_first_step_at_lr_zero_decays_nothing() -> None:
    """DCP takes such a step to make state."""
    p = matrix()
    optimizer = Muon([p], lr=0.0, weight_decay=0.1, weight_decay_method="independent")
    before = p.detach().clone()
    p.grad = torch.zeros(4, 4)
    optimizer.step()
    assert torch.equal(p, before)


def test_a_rate_in_a_tensor_decays_nothing_at_zero_either() -> None:
    """On the device, where the host does not read it."""
    keep = keep_factor("independent", torch.tensor([0.0, 0.1, 1.0]), 0.5)
    assert keep.tolist() == [1.0, 0.5, 0.5]


# ---- checkpoints ------------------------------------------------------------------------------------------------


def test_names_decide_not_positions() -> None:
    names, shape = ["a", "b", "c"], (5, 3)
    ps = {name: matrix(*shape) for name in names}
    optimizer = AdamW([{"params": [("a", ps["a"])], "lr": 0.1}, {"params": [("b", ps["b"]), ("c", ps["c"])]}], lr=0.2)
    for p in ps.values():
        p.grad = torch.randn(shape)
    optimizer.step()
    qs = {name: nn.Parameter(ps[name].detach().clone()) for name in names}
    other = AdamW(
        [{"params": [("module.c", qs["c"]), ("module.b", qs["b"])]}, {"params": [("module.a", qs["a"])]}], lr=9.0
    )
    other.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in other.param_groups] == [0.2, 0.1]
    assert other.param_groups[0]["param_names"] == ["module.c", "module.b"]
    for name in names:
        assert same(state_of(optimizer, ps[name]), state_of(other, qs[name]))
    for wrong in (["a", "b", "d"], ["a", "b"]):
        stranger = AdamW([(name, matrix(*shape)) for name in wrong], lr=0.1)
        with pytest.raises(ValueError, match="absent"):
            stranger.load_state_dict(optimizer.state_dict())
    regrouped = AdamW([(name, matrix(*shape)) for name in names], lr=0.1)
    with pytest.raises(ValueError, match="no group of the checkpoint holds the same"):
        regrouped.load_state_dict(optimizer.state_dict())


@every_optimizer
@pytest.mark.parametrize("what", ["negative", "absent", "nan", "none", "no_state", "option", "no_groups"])
def test_a_damaged_checkpoint_is_refused_and_nothing_changes(case: OptimizerCase, what: str) -> None:
    ps, optimizer = run(case, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    first = saved["state"][0]
    key = "step" if "step" in first else case.state[0]
    if what in ("negative", "nan"):
        if key != "step":
            pytest.skip("it counts no steps")
        first[key].fill_(-2.0 if what == "negative" else float("nan"))
    elif what == "absent":
        del first[key]
        if not first:
            first["other"] = torch.zeros(1)
    elif what == "none":
        first[key] = None
    elif what == "no_state":
        saved["state"][0] = None
    elif what == "option":
        saved["param_groups"][0]["lr"] = -1.0
    else:
        del saved["param_groups"]
    before, weights = [state_of(optimizer, p) for p in ps], clones(ps)
    lr = optimizer.param_groups[0]["lr"]
    match = {"option": "lr=-1.0", "no_groups": "'param_groups'"}.get(what, "parameter 0 of shape")
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == lr
    assert all(same(state_of(optimizer, p), state) for p, state in zip(ps, before, strict=True))
    set_gradients(ps, 3)
    optimizer.step()
    assert not any(map(torch.equal, ps, weights))


def test_a_checkpoint_of_another_rule_is_refused() -> None:
    ps = [matrix(), matrix()]
    adam, lion = AdamW([ps[0]], lr=0.1), Lion([ps[1]], lr=0.1)
    for p in ps:
        p.grad = torch.ones(4, 4)
    adam.step()
    lion.step()
    with pytest.raises(ValueError, match="unknown exp_avg_sq"):
        lion.load_state_dict(adam.state_dict())


def test_spectron_resumes_bitwise_after_its_weight_was_written(tmp_path: Any) -> None:
    def steps(p: nn.Parameter, optimizer: Any, first: int, last: int) -> None:
        for t in range(first, last):
            p.grad = torch.randn(6, 8, generator=torch.Generator().manual_seed(t))
            optimizer.step()

    for wait in (0, 1, 2):
        p = matrix(6, 8)
        optimizer = create_optimizer("spectron", [p], lr=0.1, rank=6)
        steps(p, optimizer, 0, 3)
        p.data.add_(0.1 * torch.randn(6, 8))
        steps(p, optimizer, 3, 3 + wait)
        q = nn.Parameter(p.detach().clone())
        other = create_optimizer("spectron", [q], lr=0.1, rank=6)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        steps(p, optimizer, 3 + wait, 8)
        steps(q, other, 3 + wait, 8)
        assert torch.equal(p, q), wait


# ---- weights in low precision -----------------------------------------------------------------------------------


def test_updates_that_are_rounded_away_are_told_once() -> None:
    lost, kept = (nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = AdamW([{"params": [lost], "lr": 1e-4}, {"params": [kept], "lr": 1e-1}], lr=1.0, weight_decay=0.0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(300):
            for p in (lost, kept):
                p.grad = torch.randn(64, 64).bfloat16()
            optimizer.step()
    assert [str(w.message)[:60] for w in seen] == ["AdamW: 100% of the weights in param_groups[0] that were look"]


def test_execution_is_obeyed_from_the_next_step_on() -> None:
    """Of it follows the way of a group's chunks, which is chosen when the group is checked."""
    weights = [torch.nn.Parameter(torch.ones(4, 3)) for _ in range(3)]
    optimizer = Muon(weights, lr=0.1)
    for execution, calls in (("stacked", 1), ("per_matrix", 3)):
        optimizer.execution = execution
        for w in weights:
            w.grad = torch.randn(4, 3)
        with patch.object(MuonRule, "update", autospec=True, side_effect=MuonRule.update) as update:
            optimizer.step()
        assert update.call_count == calls
