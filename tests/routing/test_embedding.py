"""`create_optimizer(..., embedding=NAME)`: tables of tokens by a rule of their own."""

import pytest
import torch
from torch import nn

from emerging_optimizers import create_optimizer, plan_parameters
from emerging_optimizers.registry import OPTIMIZERS
from tests.routing.models import GPTLike, same_weights, train

RULES = ("sinkhorn", "oblique_steepest_sgd", "oblique_steepest_adam")


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 20))


@pytest.mark.parametrize("name", RULES)
def test_the_table_goes_to_the_rule_and_the_rest_where_it_went(name):
    optimizer = create_optimizer("muon", model(), embedding=name)
    assert [route.optimizer for route in optimizer.plan] == [name, "muon", "adamw", "adamw", "adamw"]
    (group,) = (g for g in optimizer.param_groups if g["algorithm"] == name)
    assert group["lr"] == OPTIMIZERS[name].start
    assert group["param_names"] == ["0.weight"]
    train(kind := GPTLike(), create_optimizer("muon", kind, embedding=name), range(3))


@pytest.mark.parametrize("name", RULES)
def test_it_is_a_role_by_another_word(name):
    models = [model(), model()]
    said = ({"embedding": name}, {"roles": {"embedding": name}})
    for one, words in zip(models, said, strict=True):
        optimizer = create_optimizer("muon", one, lr=0.01, **words)
        one(torch.arange(5)).square().mean().backward()
        optimizer.step()
        assert {group["lr"] for group in optimizer.param_groups} == {0.01}
    assert same_weights(*models)


@pytest.mark.parametrize("role", ["embedding", "head"])
def test_the_norms_are_those_of_tokens(role):
    plan = plan_parameters(model(), "muon", roles={role: "oblique_steepest_sgd"})
    (route,) = (route for route in plan if route.role == role and "weight" in route.name)
    assert route.options == {"dim": 1}
    plan = plan_parameters(model(), "muon", overrides={role: {"optimizer": "oblique_sgd", "dim": 0, "lr": 1.0}})
    assert any(route.options == {"dim": 0} for route in plan)


def test_a_rate_of_its_own():
    optimizer = create_optimizer("muon", model(), lr=0.01, embedding="sinkhorn", overrides={"embedding": {"lr": 0.3}})
    assert {group["lr"] for group in optimizer.param_groups if group["algorithm"] == "sinkhorn"} == {0.3}


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (model, {"lr": 0.01, "embedding": "oblique_sgd"}, r"says nothing about the learning rate of 'oblique_sgd'"),
        (
            model,
            {"embedding": "sinkhorm"},
            r"^embedding='sinkhorm': there is no optimizer 'sinkhorm'; did you mean 'sinkhorn'",
        ),
        (model, {"embedding": "sinkhorn", "roles": {"embedding": "lion"}}, "say the same twice; give one of them"),
        (lambda: nn.Linear(4, 4), {"embedding": "sinkhorn"}, "the model has no table of tokens"),
        (lambda: [nn.Parameter(torch.eye(3))], {"embedding": "sinkhorn"}, "embedding belongs to a model"),
        (model, {"embedding": "sinkhorn", "match": "adamw", "lr": 0.01}, "for 'sinkhorn' has not been measured"),
    ],
)
def test_what_cannot_be_met_is_named(make, options, match):
    with pytest.raises(ValueError, match=match):
        create_optimizer("muon", make(), **options)


def test_beside_a_plan_it_is_refused():
    table = model()
    with pytest.raises(ValueError, match="embedding is decided by the plan"):
        create_optimizer("muon", table, embedding="sinkhorn", plan=plan_parameters(table, "muon"))
