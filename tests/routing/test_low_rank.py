"""`create_optimizer("spectron", model)` trains a model of low-rank layers: it makes the groups of their factors."""

import copy

import pytest
import torch
from torch import nn

from emerging_optimizers import AdamW, Spectron, create_optimizer, plan_parameters
from emerging_optimizers.lowrank import LowRankLinear, factor_groups, factorize


def factorized(*skip: str) -> nn.Sequential:
    """Embedding, four layers of two heights (one under the name of a fused projection), norm, head."""
    torch.manual_seed(0)
    layers: list[tuple[str, nn.Module]] = [
        ("embed", nn.Embedding(9, 8)),
        ("up", nn.Linear(8, 12)),
        ("act", nn.GELU()),
        ("qkv", nn.Linear(12, 24, bias=False)),
        ("down", nn.Linear(24, 8)),
        ("square", nn.Linear(8, 8)),
        ("norm", nn.LayerNorm(8)),
        ("head", nn.Linear(8, 9)),
    ]
    model = nn.Sequential()
    for name, layer in layers:
        model.add_module(name, layer)
    return factorize(model, rank_ratio=0.5, skip=["head", *skip])


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: range) -> None:
    for step in steps:
        tokens = torch.randint(9, (16,), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(tokens), tokens).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_one_line_is_factor_groups_and_the_companion():
    one, two = factorized(), factorized()
    train(one, [create_optimizer("spectron", one, lr=0.05, companion_lr=0.01)], range(5))
    factors = {m.factors for m in two.modules() if isinstance(m, LowRankLinear)}
    rest = [p for p in two.parameters() if p not in factors]
    groups = [{"params": [p], "weight_decay": 0.01 if p.ndim > 1 else 0.0} for p in rest]
    train(two, [Spectron(factor_groups(two), lr=0.05), AdamW(groups, lr=0.01)], range(5))
    for ours, theirs in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_plan_says_what_is_factors_and_what_is_not():
    plan = plan_parameters(factorized(), "spectron", strict=True)
    assert {r.name: r.factor_rows for r in plan if r.optimizer == "spectron"} == {
        "up.factors": 12, "qkv.factors": 24, "down.factors": 8, "square.factors": 8,
    }  # fmt: skip
    assert {plan[f"{name}.factors"].reason for name in ("up", "qkv")} == {"two factors of a low-rank layer"}
    assert {r.optimizer for r in plan if "factors" not in r.name} == {"adamw"}
    optimizer = create_optimizer("spectron", model := factorized(), lr=0.05, companion_lr=0.01)
    rows = {g["out_features"]: len(g["params"]) for g in optimizer.param_groups if g["algorithm"] == "spectron"}
    assert rows == {12: 1, 24: 1, 8: 2}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_what_was_left_dense_is_not_truncated_unless_that_is_asked_for():
    plan = plan_parameters(factorized("square"), "spectron")
    assert plan["square.weight"].optimizer == "adamw"
    assert plan["square.weight"].reason.startswith("dense in a model of low-rank layers")
    with pytest.raises(ValueError, match=r"(?s)strict=True.*square\.weight.*Name each in overrides"):
        plan_parameters(factorized("square"), "spectron", strict=True)
    asked = plan_parameters(factorized("square"), "spectron", overrides={"square.weight": "spectron"})
    assert (asked["square.weight"].optimizer, asked["square.weight"].factor_rows) == ("spectron", None)


def test_factors_may_be_given_to_the_companion_and_may_be_frozen():
    model = factorized()
    model.up.requires_grad_(False)
    plan = plan_parameters(model, "spectron", overrides={"down.*": "adamw"})
    assert [(plan[f"{n}.factors"].optimizer, plan[f"{n}.factors"].factor_rows) for n in ("up", "down", "qkv")] == [
        ("frozen", None), ("adamw", None), ("spectron", 24),
    ]  # fmt: skip
    train(model, [create_optimizer("spectron", model, plan=plan)], range(2))


def test_a_model_without_such_layers_is_routed_as_ever():
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9))
    assert [r.optimizer for r in plan_parameters(model, "spectron")] == ["adamw", "spectron", "adamw", "adamw", "adamw"]


def test_it_resumes_bitwise():
    model = factorized()
    optimizer = create_optimizer("spectron", model, lr=0.05, companion_lr=0.01)
    train(model, [optimizer], range(3))
    twin = copy.deepcopy(model)
    other = create_optimizer("spectron", twin, lr=0.05, companion_lr=0.01)
    other.load_state_dict(optimizer.state_dict())
    train(model, [optimizer], range(3, 6))
    train(twin, [other], range(3, 6))
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
