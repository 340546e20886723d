import contextlib
import copy
import io
import pickle
import re

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler

from emerging_optimizers import AdamW, Muon, create_optimizer, list_optimizers, plan_parameters
from emerging_optimizers.registry import OPTIMIZERS
from tests.routing.models import MODELS, Experts, GPTLike, frozen, same_weights, train

LR = {"lr": 0.02, "companion_lr": 0.003}


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def rates(name: str) -> dict[str, float]:
    """Learning rates; what is its own companion takes one."""
    return {"lr": LR["lr"]} if name == "adamw" else LR


def lrs(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


# ---- one optimizer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_it_is_one_torch_optimizer_with_every_trainable_parameter_once(kind):
    model = MODELS[kind]()
    optimizer = create_optimizer("muon", model, **LR)
    assert isinstance(optimizer, torch.optim.Optimizer)
    got = {name: p for g in optimizer.param_groups for name, p in zip(g["param_names"], g["params"], strict=True)}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(got)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert got.keys() == trainable.keys()
    assert all(got[name] is p for name, p in trainable.items())


@pytest.mark.parametrize("name", list_optimizers())
def test_groups_follow_the_plan_and_vectors_do_not_decay(name):
    model = GPTLike()
    optimizer = create_optimizer(name, model, **rates(name), weight_decay=0.3, companion_options={"weight_decay": 0.1})
    plan = plan_parameters(model, name, **rates(name))
    for group in optimizer.param_groups:
        for parameter_name, p, reason in zip(group["param_names"], group["params"], group["reasons"], strict=True):
            route = plan[parameter_name]
            assert (group["algorithm"], group["lr"], reason) == (route.optimizer, route.lr, route.reason)
            assert group["weight_decay"] == (0 if p.ndim < 2 else 0.3 if route.optimizer == name else 0.1)


def test_it_trains_every_trainable_parameter_and_no_frozen_one():
    model = frozen()
    before = weights(model)
    train(model, create_optimizer("muon", model, **LR), range(2))
    moved = {n: not torch.equal(p, old) for (n, p), old in zip(model.named_parameters(), before, strict=True)}
    assert moved == {name: p.requires_grad for name, p in model.named_parameters()}


def test_parameters_instead_of_a_model_give_the_class_of_that_name():
    model = GPTLike()
    optimizer = create_optimizer("adamw", model.named_parameters(), lr=0.1, betas=(0.5, 0.6), execution="per_matrix")
    assert type(optimizer) is AdamW
    assert (optimizer.defaults["lr"], optimizer.defaults["betas"], optimizer.execution) == (
        0.1,
        (0.5, 0.6),
        "per_matrix",
    )
    assert type(create_optimizer("Muon", [model.e.weight])) is Muon


@pytest.mark.parametrize("name", ["muon", "soap"])
def test_per_matrix_execution_equals_stacked(name):
    model = GPTLike()
    other = copy.deepcopy(model)
    train(model, create_optimizer(name, model, **LR), range(4))
    train(other, create_optimizer(name, other, **LR, execution="per_matrix"), range(4))
    for stacked, alone in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(stacked, alone, rtol=0, atol=1e-6)


# ---- what is asked for is done or refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"momentun": 0.9}, TypeError, "Muon has no argument 'momentun'; did you mean 'momentum'"),
        ({"companion_options": {"epz": 1}}, TypeError, "AdamW has no argument 'epz'"),
        ({"momentum": 1.5}, ValueError, "momentum=1.5"),
        ({"execution": "fast"}, ValueError, "execution='fast' is not one of stacked, per_matrix, compiled"),
        ({"companion_options": {"lr": 0.1}}, ValueError, "companion_lr"),
    ],
)
def test_an_argument_that_nobody_takes_is_refused_by_name(options, error, message):
    with pytest.raises(error, match=message):
        create_optimizer("muon", GPTLike(), **options)


@pytest.mark.parametrize(("name", "suggestion"), [("Mun", "muon"), ("adamww", "adamw"), ("sopa", "soap")])
def test_an_unknown_optimizer_is_an_error_with_a_suggestion(name, suggestion):
    with pytest.raises(ValueError, match=f"no optimizer '{name}'; did you mean '{suggestion}'"):
        create_optimizer(name, GPTLike())


@pytest.mark.parametrize(
    "option", [{"companion_lr": 0.1}, {"companion_options": {}}, {"overrides": {}}, {"strict": True}, {"plan": ()}]
)
def test_what_belongs_to_a_model_is_refused_for_parameters(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} belongs to a model"):
        create_optimizer("adamw", GPTLike().parameters(), **option)


@pytest.mark.parametrize("option", [{"lr": 0.1}, {"companion_lr": 0.1}, {"overrides": {}}])
def test_what_a_plan_decides_is_refused_beside_a_plan(option):
    model = GPTLike()
    with pytest.raises(ValueError, match=f"{next(iter(option))} is decided by the plan"):
        create_optimizer("muon", model, plan=plan_parameters(model, "muon"), **option)


def test_parameters_that_were_replaced_between_steps_are_an_error_in_the_next():
    model = GPTLike()
    optimizer = create_optimizer("muon", model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()  # nothing has a gradient, and nothing is wrong
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(p.detach().clone()))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="the model has other parameters by now under"):
        optimizer.step()


def test_what_waits_is_found_again_where_the_model_has_other_parameters():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    optimizer = create_optimizer("muon", model)
    model[0].weight = torch.nn.Parameter(model[0].weight.detach().clone())  # and not frozen any more
    optimizer.step()
    assert any(p is model[0].weight for group in optimizer.param_groups for p in group["params"])


def test_strict_holds_for_a_plan_that_is_given():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    guessed = plan_parameters(model, "muon")
    assert guessed.fallbacks
    with pytest.raises(ValueError, match=r"(?s)strict=True.*Name each in overrides of plan_parameters"):
        create_optimizer("muon", model, plan=guessed, strict=True)
    named = plan_parameters(model, "muon", overrides={route.name: "muon" for route in guessed.fallbacks})
    create_optimizer("muon", model, plan=named, strict=True)


def test_a_plan_is_followed_with_its_learning_rates():
    model = GPTLike()
    plan = plan_parameters(model, "muon", **LR, overrides={"g.*": "adamw"})
    optimizer = create_optimizer("muon", model, plan=plan)
    assert {n: g["algorithm"] for g in optimizer.param_groups for n in g["param_names"]} == {
        route.name: route.optimizer for route in plan
    }
    assert set(lrs(optimizer)) == {0.02, 0.003}
    with pytest.raises(ValueError, match="does not fit the model"):
        create_optimizer("muon", Experts(), plan=plan)


@pytest.mark.parametrize(("name", "companion"), [("muon", "lion"), ("soap", "adamw")])
def test_a_plan_for_other_optimizers_is_refused_by_name(name, companion):
    model = GPTLike()
    plan = plan_parameters(model, name, lr=0.1, companion=companion)
    with pytest.raises(ValueError, match=r"'(lion|soap)'"):
        create_optimizer("muon", model, plan=plan)


def test_a_matrix_view_that_is_asked_for_is_used():
    optimizer = create_optimizer("muon", Experts(), matrix_view="flatten")
    assert {g["matrix_view"] for g in optimizer.param_groups if g["algorithm"] == "muon"} == {"flatten"}


# ---- learning-rate schedulers ---------------------------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.5**epoch),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, max_lr=[10 * lr for lr in lrs(o)], total_steps=10, cycle_momentum=False
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=2), lr_scheduler.ExponentialLR(o, gamma=0.5)],
        milestones=[2],
    ),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_scheduler_reaches_every_group_in_proportion(kind):
    model = GPTLike()
    optimizer = create_optimizer("muon", model, **LR)
    start = lrs(optimizer)
    scheduler = SCHEDULERS[kind](optimizer)
    for k in range(5):
        train(model, optimizer, range(k, k + 1))
        scheduler.step(*([1.0] if kind == "ReduceLROnPlateau" else []))
    factors = [now / before for now, before in zip(lrs(optimizer), start, strict=True)]
    assert factors[0] != 1
    assert factors == pytest.approx([factors[0]] * len(factors))


def test_a_learning_rate_that_a_scheduler_sets_to_zero_stops_every_weight():
    model = GPTLike()
    optimizer = create_optimizer("soap", model, **LR, weight_decay=0.1)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda epoch: float(epoch < 2))
    for k in range(2):
        train(model, optimizer, range(k, k + 1))
        scheduler.step()
    still = copy.deepcopy(model)
    train(model, optimizer, range(2, 4))
    assert same_weights(model, still)


# ---- saving and resuming --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_optimizers())
def test_saved_loaded_and_resumed_is_bitwise_equal_to_not_having_stopped(name):
    model = GPTLike()
    optimizer = create_optimizer(name, model, **rates(name))
    train(model, optimizer, range(3))
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    train(model, optimizer, range(3, 6))

    resumed = GPTLike()
    saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    resumed.load_state_dict(saved["model"])
    again = create_optimizer(name, resumed, **rates(name))
    again.load_state_dict(saved["optimizer"])
    train(resumed, again, range(3, 6))
    assert same_weights(model, resumed)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("name", ["muon", "soap"])
def test_a_copy_goes_on_as_the_original_and_apart_from_it(name, duplicate):
    model = GPTLike()
    optimizer = create_optimizer(name, model, **LR, execution="per_matrix")
    train(model, optimizer, range(2))
    other, other_optimizer = duplicate((model, optimizer))
    assert (other_optimizer.execution, str(other_optimizer.plan)) == ("per_matrix", str(optimizer.plan))
    train(model, optimizer, range(2, 4))
    assert not same_weights(model, other)
    train(other, other_optimizer, range(2, 4))
    assert same_weights(model, other)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("name", ["muon", "soap"])
def test_a_distributed_checkpoint_without_a_process_group_resumes_equal(name, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = GPTLike()
    optimizer = create_optimizer(name, model, **LR)
    train(model, optimizer, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    resumed = copy.deepcopy(model)
    train(model, optimizer, range(3, 6))

    again = create_optimizer(name, resumed, **LR)
    set_optimizer_state_dict(resumed, again, saved, options=options)
    train(resumed, again, range(3, 6))
    assert same_weights(model, resumed)


@pytest.mark.parametrize(
    ("saved_as", "difference"),
    [
        ({"overrides": {"g.weight": "adamw"}}, "g.weight: adamw in the checkpoint, muon here"),
        ({"overrides": {"[efg].weight": "adamw"}}, "f.weight: adamw in the checkpoint, muon here"),
        ({"overrides": {"c.weight": "muon", "e.weight": "adamw"}}, "c.weight: muon in the checkpoint, adamw here"),
        ({"companion": "lion"}, "e.bias: lion in the checkpoint, adamw here"),
    ],
    ids=["one moved", "all moved", "two swapped", "companion"],
)
def test_a_changed_route_is_an_error_that_lists_the_difference_and_changes_nothing(saved_as, difference):
    other = GPTLike()
    saving = create_optimizer("muon", other, **LR, **saved_as)
    train(other, saving, range(2))

    model = GPTLike()
    optimizer = create_optimizer("muon", model, **LR)
    train(model, optimizer, range(2))
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    with pytest.raises(ValueError, match=re.escape(difference)):
        optimizer.load_state_dict(saving.state_dict())
    train(model, optimizer, range(2, 4))
    train(twin, twin_optimizer, range(2, 4))
    assert same_weights(model, twin)


def test_a_parameter_that_the_checkpoint_does_not_have_is_listed():
    small, large = nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    optimizer = create_optimizer("adamw", large)
    with pytest.raises(ValueError, match=r"1\.weight: absent in the checkpoint, adamw here"):
        optimizer.load_state_dict(create_optimizer("adamw", small).state_dict())


def test_state_never_goes_to_a_parameter_of_another_name():
    layers = {name: nn.Linear(4, 4, bias=False) for name in "xy"}
    one, other = nn.ModuleDict(layers), nn.ModuleDict({name: copy.deepcopy(layers[name]) for name in "yx"})
    saving, loading = (create_optimizer("muon", model, overrides={"*": "muon"}) for model in (one, other))
    for k, p in enumerate(one.parameters()):
        p.grad = torch.full((4, 4), k + 1.0)
    saving.step()
    with contextlib.suppress(ValueError):  # refusing the order is as good as following the names
        loading.load_state_dict(saving.state_dict())
        for name in "xy":
            want, got = saving.state[one[name].weight], loading.state[other[name].weight]
            assert torch.equal(want["momentum_buffer"], got["momentum_buffer"])


# ---- groups that are added later ------------------------------------------------------------------------------------


def test_an_added_group_of_parameters_that_the_model_does_not_have_must_say_its_algorithm():
    optimizer = create_optimizer("muon", GPTLike(), **LR)
    groups = len(optimizer.param_groups)
    with pytest.raises(ValueError, match=r'needs "algorithm", a name of list_optimizers\(\)'):
        optimizer.add_param_group({"params": [("new", nn.Parameter(torch.ones(3, 3)))], "lr": 0.1})
    assert len(optimizer.param_groups) == groups


def test_parameters_that_join_the_model_are_routed_and_their_rates_are_in_proportion():
    model = GPTLike()
    optimizer = create_optimizer("muon", model, **LR, weight_decay=0.3)
    model.h = nn.Linear(8, 8)
    before = len(optimizer.param_groups)
    optimizer.add_param_group({"params": list(model.h.parameters()), "lr": LR["lr"] / 10})
    added = optimizer.param_groups[before:]
    assert [(g["algorithm"], g["param_names"], g["weight_decay"]) for g in added] == [
        ("muon", ["h.weight"], 0.3),
        ("adamw", ["h.bias"], 0.0),
    ]
    assert [g["lr"] for g in added] == pytest.approx([LR["lr"] / 10, LR["companion_lr"] / 10])
    before = [p.detach().clone() for p in model.h.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not any(map(torch.equal, model.h.parameters(), before))
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.add_param_group({"params": list(model.h.parameters())})


@pytest.mark.parametrize("algorithm", list_optimizers())
def test_an_added_group_with_an_algorithm_follows_it(algorithm):
    optimizer = create_optimizer("muon", GPTLike(), **LR)
    p = nn.Parameter(torch.ones(3, 3))
    optimizer.add_param_group({"params": [("new", p)], "algorithm": algorithm, "lr": 0.1})
    p.grad = torch.eye(3)
    optimizer.step()
    assert not torch.equal(p.detach(), torch.ones(3, 3))
    alone = nn.Parameter(torch.ones(3, 3))
    alone.grad = torch.eye(3)
    create_optimizer(algorithm, [alone], lr=0.1).step()
    assert torch.equal(p, alone)


def test_an_added_group_without_a_learning_rate_has_the_one_to_start_from():
    optimizer = create_optimizer("muon", GPTLike(), **LR)
    optimizer.add_param_group({"params": [("new", nn.Parameter(torch.ones(3, 3)))], "algorithm": "muon"})
    optimizer.add_param_group({"params": [("newer", nn.Parameter(torch.ones(3, 3)))], "algorithm": "soap"})
    assert lrs(optimizer)[-2:] == [OPTIMIZERS["muon"].start, OPTIMIZERS["soap"].start]
    with pytest.raises(ValueError, match="'stacked_soap' has no default learning rate"):
        optimizer.add_param_group({"params": [("last", nn.Parameter(torch.ones(3, 3)))], "algorithm": "stacked_soap"})


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"algorithm": "muon", "params": [("v", nn.Parameter(torch.ones(3)))]}, "'v' of shape"),
        ({"algorithm": "mun", "params": [("w", nn.Parameter(torch.ones(3, 3)))]}, "did you mean 'muon'"),
        ({"algorithm": "muon", "momentun": 0.5, "params": [("w", nn.Parameter(torch.ones(3, 3)))]}, "momentun"),
    ],
    ids=["vector", "algorithm", "option"],
)
def test_an_added_group_that_cannot_be_followed_is_refused_whole(group, message):
    optimizer = create_optimizer("muon", GPTLike(), **LR)
    groups = len(optimizer.param_groups)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({**group, "lr": 0.1})
    assert len(optimizer.param_groups) == groups


def test_a_checkpoint_of_a_compiled_or_wrapped_model_loads_into_the_bare_one() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3))
    optimizer = create_optimizer("muon", model)
    saved = optimizer.state_dict()
    for prefix in ("_orig_mod.", "module.", "module._orig_mod."):
        saved["names"] = [[prefix + name for name in names] for names in saved["names"]]
        optimizer.load_state_dict(saved)
        saved = create_optimizer("muon", model).state_dict()


def test_a_name_that_only_looks_like_a_wrappers_is_another_one() -> None:
    def made(names: list[str]) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.Module()
        for name in names:
            path, _, leaf = name.rpartition(".")
            inside = model
            for part in filter(None, path.split(".")):
                inside.add_module(part, torch.nn.Module())
                inside = inside.get_submodule(part)
            inside.register_parameter(leaf, torch.nn.Parameter(torch.zeros(4, 4)))
        return model, create_optimizer("adamw", model)

    names = ["a", "module.a"]
    (model, optimizer), (other, loaded) = made(names), made(names[::-1])
    for k, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, k + 1.0)
    optimizer.step()
    loaded.load_state_dict(optimizer.state_dict())
    for name, p in model.named_parameters():
        assert torch.equal(loaded.state[other.get_parameter(name)]["exp_avg"], optimizer.state[p]["exp_avg"])


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_of_torchs_adamw_loads_and_goes_on_as_torch_does(tied: bool) -> None:
    model, other = GPTLike(tied=tied), GPTLike(tied=tied)
    other.load_state_dict(model.state_dict())
    theirs = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.8, 0.9), weight_decay=0.0)
    train(model, theirs, range(3))
    other.load_state_dict(model.state_dict())
    ours = create_optimizer("adamw", other, lr=1e-5, weight_decay=0.0)
    ours.load_state_dict(theirs.state_dict())
    assert {(group["lr"], group["betas"]) for group in ours.param_groups} == {(3e-3, (0.8, 0.9))}
    train(model, theirs, range(3, 6))
    train(other, ours, range(3, 6))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="the routes of the checkpoint differ"):
        create_optimizer("muon", other, **LR).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("rename", [{"": "trunk."}, {"b.": "trunk.b.", "": "trunk."}, lambda name: f"trunk.{name}"])
def test_a_checkpoint_of_a_renamed_model_loads(rename) -> None:
    model = GPTLike()
    optimizer = create_optimizer("soap", model, **LR)
    train(model, optimizer, range(3))
    other = nn.ModuleDict({"trunk": copy.deepcopy(model)})
    resumed = create_optimizer("soap", other, **LR)
    with pytest.raises(ValueError, match=r"b.weight: adamw in the checkpoint, absent here"):
        resumed.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(optimizer.state_dict(), rename=rename)
    train(model, optimizer, range(3, 5))
    train(other["trunk"], resumed, range(3, 5))
    assert same_weights(model, other)
    nameless = copy.deepcopy(optimizer.state_dict())
    del nameless["names"]
    with pytest.raises(ValueError, match="rename: the parameters of this checkpoint have no names"):
        resumed.load_state_dict(nameless, rename=rename)


def test_rare_refreshes_begin_dense_over_half_of_the_warmup() -> None:
    for given, ramp in (({"warmup": 41}, 21), ({"warmup": 41, "refresh_ramp": 5}, 5), ({"refresh_ramp": 0}, 0)):
        optimizer = create_optimizer("soap", GPTLike(), precondition_frequency=10, **given)
        assert optimizer.param_groups[0]["refresh_ramp"] == ramp
    assert create_optimizer("soap", GPTLike(), warmup=40).param_groups[0]["refresh_ramp"] == 0  # nothing is rare
    matrix = [nn.Parameter(torch.ones(2, 2))]
    assert create_optimizer("rekls", matrix, precondition_frequency=2, warmup=4).refresh_ramp == 2
    assert create_optimizer("splus", matrix, warmup=4).refresh_ramp == 2  # every hundredth step, if nothing is said
    assert create_optimizer("soap", matrix, recipe="vyas", warmup=4).refresh_ramp == 2  # every tenth
    assert create_optimizer("soap", matrix, recipe="vyas").refresh_ramp == 0
    create_optimizer("muon", GPTLike(), warmup=40)
    with pytest.warns(UserWarning, match="precondition_frequency=10 from the first step on.* Give warmup="):
        create_optimizer("soap", GPTLike(), precondition_frequency=10)
    with pytest.raises(ValueError, match=r"warmup=0\.5 is not allowed; give a number of steps >= 0, or None"):
        create_optimizer("soap", GPTLike(), warmup=0.5)
