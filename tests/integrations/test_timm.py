import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from emerging_optimizers import create_optimizer
from emerging_optimizers.integrations.timm import create_optimizer_v2
from tests.integrations.example import equal, load
from tests.routing.families import _libraries

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")


@pytest.fixture(scope="module")
def example():
    with _libraries():
        return load("timm_finetune")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 10))


def groups(optimizer):
    return [{key: x for key, x in group.items() if key != "params"} for group in optimizer.param_groups]


def test_without_layer_decay_it_is_create_optimizer():
    model = net()
    made = create_optimizer_v2(model, opt="muon", lr=2e-3, weight_decay=0.05, foreach=None, fallback_list=["2.*"])
    same = create_optimizer("muon", model, 2e-3, weight_decay=0.05, overrides={"2.*": "adamw"})
    assert groups(made) == groups(same)


def test_momentum_goes_to_those_that_have_it():
    assert create_optimizer_v2(net(), opt="muon", momentum=0.9).param_groups[0]["momentum"] == 0.9
    assert "momentum" not in create_optimizer_v2(net(), opt="soap", momentum=0.9).param_groups[0]
    assert create_optimizer_v2(net(), opt="muon").param_groups[0]["momentum"] == 0.95


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"filter_bias_and_bn": False, "weight_decay": 0.1}, r"overrides=\{'vector': \{'weight_decay': 0.1\}\}"),
        ({"param_group_fn": list}, "say what differs in overrides"),
        ({"fallback_no_weight_decay": True}, "name the parameters in fallback_list"),
        ({"opt": "lookahead_muon"}, "there is no optimizer 'lookahead_muon'"),
    ],
    ids=str,
)
def test_what_cannot_be_had_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_optimizer_v2(net(), **{"opt": "muon", **arguments})


def test_layer_decay_needs_a_model_and_timm(monkeypatch):
    with pytest.raises(ValueError, match=r"layer_decay=0.7 belongs to a model"):
        create_optimizer_v2(net().parameters(), opt="lion", layer_decay=0.7)
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"layer_decay=0.7 needs timm"):
        create_optimizer_v2(net(), opt="muon", layer_decay=0.7)


@needs_timm
@pytest.mark.parametrize("opt", ["muon", "soap"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(opt, example, tmp_path):
    whole = example.main(tmp_path / "whole", opt=opt)
    stopped = example.main(tmp_path / "parts", stop=3, opt=opt)
    resumed = example.main(tmp_path / "parts", resume=True, opt=opt)
    assert not equal(whole, stopped)
    assert equal(whole, resumed)


@needs_timm
def test_the_rates_fall_from_layer_to_layer_as_timm_has_them(example):
    model = example.make_model()
    optimizer = create_optimizer_v2(
        model, opt="muon", lr=1.0, companion_lr=0.1, layer_decay=0.5, layer_decay_no_opt_scale=0.2
    )
    rates = {n: (g["algorithm"], g["lr"]) for g in optimizer.param_groups for n in g["param_names"]}
    assert rates["head.weight"] == ("adamw", pytest.approx(0.1))
    assert rates["blocks.1.mlp.fc1.weight"] == ("muon", pytest.approx(0.5))
    assert rates["blocks.0.mlp.fc1.weight"] == ("muon", pytest.approx(0.25))
    assert "patch_embed.proj.weight" not in rates  # 0.125: frozen
    assert not model.patch_embed.proj.weight.requires_grad


@needs_timm
def test_layer_decay_goes_with_a_recipe_and_refuses_what_create_optimizer_refuses(example):
    optimizer = create_optimizer_v2(example.make_model(), opt="muon", layer_decay=0.5, recipe="moonlight")
    plain = create_optimizer("muon", example.make_model(), recipe="moonlight")
    rates = {n: g["lr"] for g in optimizer.param_groups for n in g["param_names"]}
    assert rates["blocks.1.mlp.fc1.weight"] == pytest.approx(plain.param_groups[0]["lr"] / 2)
    assert optimizer.param_groups[0]["extra_scale_factor"] == plain.param_groups[0]["extra_scale_factor"]
    with pytest.raises(ValueError, match="give companion_lr"):
        create_optimizer_v2(example.make_model(), opt="muon", lr=0.02, layer_decay=0.5, scale_mode="shape_scaling")


@needs_timm
def test_the_arguments_of_a_timm_script(example):
    script = SimpleNamespace(opt="muon", lr=2e-3, weight_decay=0.05, momentum=0.9, layer_decay=0.75, opt_foreach=True)
    arguments = importlib.import_module("timm.optim").optimizer_kwargs(cfg=script)
    optimizer = create_optimizer_v2(example.make_model(), **arguments)
    first = optimizer.param_groups[0]
    assert (first["algorithm"], first["momentum"], first["weight_decay"]) == ("muon", 0.9, 0.05)


@needs_timm
def test_layer_decay_keeps_overrides_and_what_timm_keeps_from_decaying(example):
    model = example.make_model()
    optimizer = create_optimizer_v2(
        model, opt="muon", lr=1.0, companion_lr=0.1, weight_decay=0.3, layer_decay=0.5,
        overrides={"head.weight": {"lr": 0.01}},
    )  # fmt: skip
    found = {n: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for n in g["param_names"]}
    assert found["head.weight"] == (0.01, 0.3)
    assert found["pos_embed"][1] == found["blocks.0.norm1.weight"][1] == 0.0
