import dataclasses
import re

import pytest
import torch
from torch import nn

from emerging_optimizers import RoutePlan, plan_parameters
from emerging_optimizers.registry import OPTIMIZERS
from tests.routing.models import MODELS, Experts, GPTLike, HFLike, attention, convolutional, without_embeddings

M, A, NOT = "muon", "adamw", "frozen"


def routes(model: nn.Module, **options) -> dict[str, str]:
    return {route.name: route.optimizer for route in plan_parameters(model, "muon", **options)}


EXPECTED = {
    "untied": {
        "a.weight": (A, "output head: as many rows as the embedding 'b.weight'"),
        "b.weight": (A, "embedding"),
        "c.weight": (A, "embedding"),
        "d.weight": (A, "vector"),
        "d.bias": (A, "vector"),
        "e.weight": (M, "hidden matrix"),
        "e.bias": (A, "vector"),
        "f.weight": (M, "hidden matrix"),
        "f.bias": (A, "vector"),
        "g.weight": (M, "hidden matrix"),
    },
    "tied": {
        "a.weight": (A, "embedding, tied to the output head"),
        "c.weight": (A, "embedding"),
        "e.weight": (M, "hidden matrix"),
        "f.weight": (M, "hidden matrix"),
        "g.weight": (M, "hidden matrix"),
    },
    "hf": {
        "x.weight": (A, "embedding"),
        "y.weight": (M, "hidden matrix"),
        "z.weight": (A, "output head: named by get_output_embeddings()"),
    },
    "experts": {
        "p": (M, "batch of 3 matrices"),
        "q": (A, "table with a leading axis of one"),
        "r": (A, "scalar"),
        "s.weight": (A, "embedding"),
        "t.weight": (A, "output head: the last linear layer of the model"),
    },
    "attention": {
        "0.weight": (A, "embedding"),
        "1.in_proj_weight": (M, "hidden matrix; query, key and value apart"),
        "1.in_proj_bias": (A, "vector"),
        "1.out_proj.weight": (M, "hidden matrix"),
        "1.out_proj.bias": (A, "vector"),
        "2.weight": (A, "output head: as many rows as the embedding '0.weight'"),
    },
    "convolutional": {
        "0.weight": (M, "convolution, as (out, rest)"),
        "1.weight": (A, "vector"),
        "1.bias": (A, "vector"),
        "2.weight": (M, "convolution, as (out, rest)"),
        "4.weight": (A, "output head: the last linear layer of the model"),
    },
    "without embeddings": {
        "0.weight": (M, "hidden matrix"),
        "2.weight": (M, "hidden matrix"),
        "3.weight": (A, "output head: the last linear layer of the model"),
    },
    "frozen": {
        "e.weight": (NOT, "does not require a gradient"),
        "e.bias": (NOT, "does not require a gradient"),
        "f.weight": (M, "hidden matrix"),
    },
}


@pytest.mark.parametrize("kind", MODELS)
def test_each_parameter_has_its_route_and_its_reason(kind):
    plan = plan_parameters(MODELS[kind](), "muon")
    for name, (optimizer, reason) in EXPECTED[kind].items():
        assert plan[name].optimizer == optimizer, name
        assert plan[name].reason.startswith(reason), name


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_is_planned_exactly_once_with_its_shape(kind, name):
    model = MODELS[kind]()
    plan = plan_parameters(model, name)
    assert [(r.name, r.shape) for r in plan] == [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    assert len(plan) == len(list(model.parameters()))
    plan.check(model)


@pytest.mark.parametrize(
    ("vocab", "context", "width"),
    [(11, 8, 8), (11, 32, 8), (8, 6, 8), (32, 6, 8)],
    ids=["positions = width", "positions = MLP width", "vocabulary = width", "vocabulary = MLP width"],
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_table_as_long_as_a_layer_is_wide_makes_no_head_of_that_layer(vocab, context, width, tied):
    class HeadLast(GPTLike):
        """The same, with the head where models have it."""

        def __init__(self) -> None:
            super().__init__(vocab, context, width, tied=tied)
            self.z = self._modules.pop("a")

    got = routes(HeadLast())
    assert {name: got[name] for name in ("e.weight", "f.weight", "g.weight")} == dict.fromkeys(
        ("e.weight", "f.weight", "g.weight"), M
    )
    assert got["b.weight"] == got["c.weight"] == got.get("z.weight", A) == A


def test_a_model_that_names_no_head_is_still_planned():
    route = plan_parameters(HFLike(has_head=False), "muon")["z.weight"]
    assert (route.role, route.reason, route.fallback) == (
        "head",
        "output head: the last linear layer of the model",
        True,
    )


def test_convolutions_are_flattened_and_expert_stacks_are_not():
    assert plan_parameters(convolutional(), "muon")["2.weight"].view == "flatten"
    assert plan_parameters(Experts(), "muon")["p"].view == "auto"


def test_an_element_wise_optimizer_takes_everything_and_vectors_do_not_decay():
    plan = plan_parameters(GPTLike(), "lion")
    assert {route.optimizer for route in plan} == {"lion"}
    assert {route.name for route in plan if not route.decays} == {"d.weight", "d.bias", "e.bias", "f.bias"}


def test_learning_rates_are_those_to_start_from_or_the_ones_that_are_given():
    default, given = plan_parameters(GPTLike(), "muon"), plan_parameters(GPTLike(), "muon", lr=0.02, companion_lr=0.3)
    assert (default["e.weight"].lr, default["e.bias"].lr) == (OPTIMIZERS["muon"].start, OPTIMIZERS["adamw"].start)
    assert (given["e.weight"].lr, given["e.bias"].lr) == (0.02, 0.3)
    assert plan_parameters(MODELS["frozen"](), "muon")["e.weight"].lr is None
    with pytest.raises(ValueError, match="'stacked_soap' has no default learning rate; give lr"):
        plan_parameters(GPTLike(), "stacked_soap")


@pytest.mark.parametrize("kind", ["untied", "tied", "hf", "attention", "frozen"])
def test_strict_accepts_a_model_in_which_nothing_is_guessed(kind):
    assert plan_parameters(MODELS[kind](), "muon", strict=True).fallbacks == ()


@pytest.mark.parametrize(
    ("kind", "names"),
    [("without embeddings", ["3.weight"]), ("convolutional", ["4.weight"]), ("experts", ["p", "q", "t.weight"])],
)
def test_strict_refuses_a_guess_until_an_override_settles_it(kind, names):
    assert [route.name for route in plan_parameters(MODELS[kind](), "muon").fallbacks] == names
    with pytest.raises(ValueError, match=rf"(?s)strict=True.*{names[-1]}.*Name each in overrides, or give an example"):
        plan_parameters(MODELS[kind](), "muon", strict=True)
    for choice in (A, M):
        plan = plan_parameters(MODELS[kind](), "muon", strict=True, overrides=dict.fromkeys(names, choice))
        for name in names:
            assert (plan[name].optimizer, plan[name].reason) == (choice, f"override {name!r}")


def test_the_first_override_that_matches_decides():
    got = routes(attention(), overrides={"1.in*weight": A, "1.*weight": M, "2.weight": "Muon"})
    assert (got["1.in_proj_weight"], got["1.out_proj.weight"], got["2.weight"]) == (A, M, M)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overrides": {"e.*": A, "nothing.*": A}}, r"overrides match no parameter: 'nothing\.\*'"),
        ({"overrides": {"e.weight": "lions"}}, r"overrides\['e.weight'\]='lions'.*did you mean 'lion'"),
        ({"overrides": {"f.weigth": A}}, r"'f.weigth' \(nearest: f.weight"),
        ({"overrides": {"*.weight": A, "e.weight": M}}, "decide nothing: 'e.weight'; .*Put the narrower pattern first"),
        ({"overrides": {"re:(": A}}, r"'re:\(' is no regular expression"),
        ({"overrides": {"e.weight": {"optimizer": 3}}}, "=3 is not the name of an optimizer"),
        ({"roles": {"gate": A}}, "there is no role 'gate'; allowed are embedding, position, head"),
        ({"roles": {"vector": M}}, r"roles\['vector'\]='muon' cannot be met: 'd.weight' of shape"),
        ({"overrides": {"e.*": M}}, r"'e.bias' of shape \(32,\) is not a matrix"),
        ({"companion": "soap"}, "companion='soap' updates matrices only; choose an element-wise one: adamw"),
        ({"companion": "adamww"}, "did you mean 'adamw'"),
    ],
)
def test_a_request_that_cannot_be_met_is_an_error_that_says_why(options, message):
    with pytest.raises(ValueError, match=message):
        plan_parameters(GPTLike(), "muon", **options)


def test_an_unknown_optimizer_is_an_error_with_a_suggestion():
    with pytest.raises(ValueError, match="no optimizer 'mun'; did you mean 'muon'"):
        plan_parameters(GPTLike(), "mun")


def test_printed_it_is_a_table_of_names_shapes_learning_rates_and_reasons():
    plan = plan_parameters(MODELS["frozen"](), "muon", lr=0.02)
    header, *rows, products = str(plan).splitlines()
    assert products.startswith('Newton-Schulz at "medium" multiplies in ')
    assert header.split() == ["parameter", "shape", "role", "optimizer", "lr", "decay", "reason"]
    assert len(rows) == len(plan)
    for row, route in zip(rows, plan, strict=True):
        assert row.startswith(route.name)
        assert row.endswith(route.reason)
        assert "x".join(map(str, route.shape)) in row
    assert "0.02" in str(plan)


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.qkv = nn.Linear(8, 24)
        self.conv = nn.Conv2d(8, 4, 3, bias=False)
        self.head = nn.Linear(8, 50)


def test_printed_it_says_how_a_matrix_is_cut():
    plan = plan_parameters(Fused(), "muon", lr=0.02)
    header, *rows, _ = str(plan).splitlines()
    assert header.split()[-3:] == ["decay", "view", "reason"]
    assert re.search(r"^qkv.weight .* yes +3 parts +hidden", "\n".join(rows), re.MULTILINE)
    assert re.search(r"^conv.weight .* yes +flat +conv", "\n".join(rows), re.MULTILINE)
    assert re.search(r"^qkv.bias .* no +vector", "\n".join(rows), re.MULTILINE)
    assert "view" not in str(plan_parameters(Fused(), "adamw", lr=0.02)).splitlines()[0]


@pytest.mark.parametrize(
    ("view", "words"),
    [
        ("auto", ""),
        ("transposed", "transposed"),
        (("heads", 6), "6 heads"),
        (("columns", "heads", 2), "columns, 2 heads"),
        (("transposed", "split", 4, 4), "transposed, 2 parts"),
        (("interleaved", 2, 1, 1), "3 gathered"),
    ],
    ids=str,
)
def test_a_view_that_was_edited_is_printed(view, words):
    plan = plan_parameters(Fused(), "muon", lr=0.02)
    routes = [dataclasses.replace(r, view=view) if r.name == "qkv.weight" else r for r in plan]
    line = next(x for x in str(RoutePlan(routes=tuple(routes))).splitlines() if x.startswith("qkv.weight"))
    assert re.search(f" yes +{words} +hidden matrix", line)


@pytest.mark.parametrize("lr", [0.25, torch.tensor(0.25), torch.tensor([0.25])], ids=["number", "0-D", "1-D"])
def test_printed_a_learning_rate_is_a_number_whatever_holds_it(lr):
    assert str(plan_parameters(GPTLike(), "muon", lr=lr, companion_lr=0.5)).count("0.25") == 3


def edit(plan: RoutePlan, **changes) -> RoutePlan:
    first, *rest = plan.routes
    return RoutePlan(routes=(dataclasses.replace(first, **changes), *rest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: RoutePlan(routes=plan.routes[1:]), r"a.weight \(11, 8\) is left over"),
        (
            lambda plan: RoutePlan(routes=(*plan.routes, plan["a.weight"])),
            "a.weight is taken twice: by adamw and adamw",
        ),
        (lambda plan: edit(plan, name="nowhere"), "nowhere is not a parameter of the model"),
        (lambda plan: edit(plan, shape=(8, 11)), r"a.weight has shape \(11, 8\), planned is \(8, 11\)"),
    ],
    ids=["left over", "twice", "unknown", "shape"],
)
def test_a_plan_that_does_not_fit_the_model_says_where(change, message):
    model = GPTLike()
    with pytest.raises(ValueError, match=message):
        change(plan_parameters(model, "muon")).check(model)


def test_a_name_that_is_not_planned_is_a_key_error():
    with pytest.raises(KeyError, match="nowhere"):
        plan_parameters(without_embeddings(), "muon")["nowhere"]
