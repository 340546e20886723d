"""`match="adamw"`: rates and decays of a tuned AdamW, for other optimizers."""

import json
import re
from math import sqrt
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.match import rounded, tables
from emerging_optimizers import create_optimizer, plan_parameters
from emerging_optimizers.registry import OPTIMIZERS
from tests.routing.models import Experts, GPTLike, attention, convolutional, train

ROOT = Path(__file__).parents[2]
FOUND = json.loads((ROOT / "benchmarks" / "results" / "match.json").read_text())
MEASURED = [name for name, known in OPTIMIZERS.items() if known.match is not None]
OTHERS = [name for name in MEASURED if name != "adamw"]
RECIPE = {"lr": 1e-3, "weight_decay": 0.1, "match": "adamw"}


def groups(optimizer: torch.optim.Optimizer, name: str) -> list[dict]:
    return [group for group in optimizer.param_groups if group["algorithm"] == name]


# ---- what is done ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [GPTLike, Experts, attention, convolutional])
@pytest.mark.parametrize("name", MEASURED)
def test_lr_times_decay_is_adamws_in_every_group_and_adamws_own_parameters_get_both_as_they_are(name, make):
    optimizer = create_optimizer(name.upper(), make(), **RECIPE)
    for group in optimizer.param_groups:
        decays = group["weight_decay"] > 0
        assert not decays or group["lr"] * group["weight_decay"] == pytest.approx(1e-4)
        if group["algorithm"] == "adamw":
            assert (group["lr"], group["weight_decay"]) == (1e-3, 0.1 if decays else 0.0)
    assert any(group["weight_decay"] for group in optimizer.param_groups)


@pytest.mark.parametrize("name", OTHERS)
def test_updates_of_every_shape_have_the_same_size(name):
    """The gradients are noise of one size, as the factors by shape suppose."""
    model = nn.ModuleList([nn.Linear(a, b, bias=False) for a, b in ((32, 32), (32, 8), (8, 32))])
    optimizer = create_optimizer(name, model, overrides={"*": name}, **{**RECIPE, "weight_decay": 0.0})
    sizes = []
    for t in range(20):
        before = [p.detach().clone() for p in model.parameters()]
        for k, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(3 * t + k)) / 100
        optimizer.step()
        moved = [p.detach() - q for p, q in zip(model.parameters(), before, strict=True)]
        sizes = [x.square().mean().sqrt().item() for x in moved]
    assert max(sizes) < 1.6 * min(sizes)
    if name in ("muon", "scion"):
        assert sizes == pytest.approx([1e-3 * OPTIMIZERS[name].match] * 3, rel=0.15)


def test_scion_has_a_factor_for_each_shape_and_of_a_stack_that_of_its_matrices():
    plan = plan_parameters(nn.ModuleDict({"up": nn.Linear(8, 32), "down": nn.Linear(32, 8)}), "scion",
                           overrides={"*.weight": "scion"}, lr=1e-3, match="adamw")  # fmt: skip
    unit = OPTIMIZERS["scion"].match * 1e-3
    assert plan["up.weight"].lr == pytest.approx(unit * sqrt(8))
    assert plan["down.weight"].lr == pytest.approx(unit * sqrt(32) * 2)
    assert plan_parameters(Experts(), "scion", lr=1e-3, match="adamw")["p"].lr == pytest.approx(unit * 3)


def test_a_fused_projection_has_the_factor_of_the_matrices_that_it_is_cut_into():
    route = plan_parameters(attention(), "shampoo", match="adamw", lr=1.0)["1.in_proj_weight"]
    assert (route.shape, route.view) == ((24, 8), ("split", 8, 8, 8))
    assert route.factor == route.lr == pytest.approx(OPTIMIZERS["shampoo"].match * sqrt(8))


def test_a_schedule_reaches_every_group_in_proportion():
    model = GPTLike()
    optimizer = create_optimizer("scion", model, **RECIPE)
    start = [group["lr"] for group in optimizer.param_groups]
    schedule = LambdaLR(optimizer, lambda done: 0.5**done)
    for k in range(3):
        train(model, optimizer, range(k, k + 1))
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr / 8 for lr in start])


def test_betas_are_the_companions_and_the_optimizers_own_where_it_has_them():
    for name, own in (("muon", None), ("soap", (0.8, 0.9))):
        optimizer = create_optimizer(name, GPTLike(), betas=(0.8, 0.9), **RECIPE)
        assert groups(optimizer, name)[0].get("betas") == own
        assert {group["betas"] for group in groups(optimizer, "adamw")} == {(0.8, 0.9)}
    optimizer = create_optimizer("soap", GPTLike(), betas=(0.8, 0.9), companion_options={"betas": (0.7, 0.9)}, **RECIPE)
    assert {group["betas"] for group in groups(optimizer, "adamw")} == {(0.7, 0.9)}


def test_what_is_left_out_is_adamws_own():
    adamw, scion = (create_optimizer(name, GPTLike(), match="adamw").param_groups[0] for name in ("adamw", "scion"))
    assert (adamw["lr"], adamw["weight_decay"]) == (OPTIMIZERS["adamw"].start, 0.01)
    assert scion["lr"] * scion["weight_decay"] == pytest.approx(adamw["lr"] * 0.01)


def test_companion_lr_and_the_rates_and_decays_of_overrides_are_adamws_too():
    overrides = {"e.weight": {"lr": 2e-3, "weight_decay": 0.3}, "f.weight": "soap"}
    optimizer = create_optimizer("muon", GPTLike(), companion_lr=5e-3, overrides=overrides, **RECIPE)
    got = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    muon, soap = OPTIMIZERS["muon"].match, OPTIMIZERS["soap"].match
    assert (got["e.weight"]["lr"], got["e.weight"]["weight_decay"]) == pytest.approx((2e-3 * muon, 0.3 / muon))
    assert (got["f.weight"]["lr"], got["f.weight"]["weight_decay"]) == pytest.approx((1e-3 * soap, 0.1 / soap))
    assert (got["b.weight"]["lr"], got["b.weight"]["weight_decay"]) == (5e-3, 0.1)


def test_a_plan_is_followed_and_what_joins_the_model_later_is_matched_too():
    model = GPTLike()
    plan = plan_parameters(model, "scion", lr=1e-3, match="ADAMW")
    optimizer = create_optimizer("scion", model, plan=plan, weight_decay=0.1, betas=(0.8, 0.9))
    same = create_optimizer("scion", GPTLike(), betas=(0.8, 0.9), **RECIPE)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (g["lr"], g["weight_decay"]) for g in same.param_groups
    ]
    before = len(optimizer.param_groups)
    model.h = nn.Linear(8, 32, bias=False)
    optimizer.add_param_group({"params": list(model.h.parameters())})
    group = optimizer.param_groups[before]
    assert group["lr"] == pytest.approx(plan["e.weight"].lr * OPTIMIZERS["adamw"].start / 1e-3)
    assert group["lr"] * group["weight_decay"] == pytest.approx(0.1 * OPTIMIZERS["adamw"].start)


def test_one_tensor_as_learning_rate_keeps_parameters_of_one_factor_together():
    lr = torch.tensor(1e-3)
    optimizer = create_optimizer("muon", GPTLike(), lr=lr, match="adamw", weight_decay=0.1)
    assert len(optimizer.param_groups) == len(create_optimizer("muon", GPTLike(), **RECIPE).param_groups)
    assert all(group["lr"] is lr for group in groups(optimizer, "adamw"))


def test_the_plan_says_the_factors_above_its_table():
    f = OPTIMIZERS["muon"].match
    header = str(plan_parameters(GPTLike(), "muon", lr=1e-3, match="adamw")).partition("\n")[0]
    assert header == f"match='adamw', lr and decay are AdamW's: muon takes lr x {f:g}, decay / {f:g}"
    header = str(plan_parameters(GPTLike(), "scion", lr=1e-3, match="adamw")).partition("\n")[0]
    assert re.search(r"scion takes lr x [\d.]+ to [\d.]+, decay / [\d.]+ to [\d.]+, by shape$", header)
    assert "match" not in str(plan_parameters(GPTLike(), "muon", lr=1e-3))


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lion", {}, f"'lion' has not been measured; it has for {', '.join(MEASURED)}"),
        ("muon", {"companion": "lion"}, "'lion' has not been measured"),
        ("muon", {"overrides": {"e.weight": "mop"}}, "'mop' has not been measured"),
        ("muon", {"match": "lion"}, "match='lion' is not known; allowed are 'adamw', and None"),
        ("muon", {"match": True}, "match=True is not known"),
        ("muon", {"recipe": "moonlight"}, "match='adamw' and recipe='moonlight'"),
        ("muon", {"extra_scale_factor": 0.2}, "extra_scale_factor=0.2 is not possible with match='adamw'"),
        ("muon", {"weight_decay_method": "independent"}, "weight_decay_method='independent' is not possible"),
        ("soap", {"weight_update_hook": "hyperball"}, "weight_update_hook='hyperball' is not possible"),
        ("muon", {"overrides": {"e.*": {"scale_mode": "shape_scaling"}}}, "e.weight: scale_mode='shape_scaling'"),
        ("scion", {"spectral_radius": 50.0}, "spectral_radius=50.0 is not possible .* measured with 1.0; leave"),
    ],
)
def test_what_has_no_measured_factor_is_refused_by_name(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_optimizer(name, GPTLike(), **{**RECIPE, **options})


def test_it_belongs_to_a_model_and_a_plan_decides_it():
    model = GPTLike()
    with pytest.raises(ValueError, match="match belongs to a model"):
        create_optimizer("muon", [model.e.weight], match="adamw")
    with pytest.raises(ValueError, match="match is decided by the plan"):
        create_optimizer("muon", model, match="adamw", plan=plan_parameters(model, "muon"))


# ---- where the numbers are from -------------------------------------------------------------------------------------


def test_the_registry_has_what_the_sweep_found():
    measured = {name: rounded(factor["best"].values()) for name, factor in FOUND["factors"].items()}
    assert {name: OPTIMIZERS[name].match for name in OTHERS} == measured
    assert OPTIMIZERS["adamw"].match == 1


def test_the_page_has_the_tables_of_the_sweep():
    page = (ROOT / "docs" / "migrate.md").read_text()
    for table in tables(FOUND):
        assert table in page


def test_with_match_the_best_rate_is_adamws_within_a_factor_of_two():
    assert all(0.5 <= row["over adamw"] <= 2 for row in FOUND["rows"])
    assert {row["optimizer"] for row in FOUND["rows"]} == set(MEASURED)
