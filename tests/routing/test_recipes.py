"""Recipes have their sources' numbers; those of Muon also make their sources' first updates."""

import warnings
from math import sqrt

import pytest
import torch
from torch import Tensor, nn

from emerging_optimizers import create_optimizer
from emerging_optimizers.lab.__main__ import main
from emerging_optimizers.routing.recipes import RECIPES, find_recipe
from tests.routing.models import GPTLike, train

MAIN = {  # lr, decay, momentum or betas
    ("keller-jordan", "muon"): (0.02, 0.0, 0.95),
    ("moonlight", "muon"): (1e-3, 0.1, 0.95),
    ("nanochat", "muon"): (0.02, 0.0, 0.95),
    ("soap-muon-and-beyond", "muon"): (None, 0.1, 0.9),
    ("soap-muon-and-beyond", "soap"): (None, 0.1, (0.9, 0.95)),
    ("vyas", "soap"): (3e-3, 0.01, (0.95, 0.95)),
}
COMPANION = {  # lr, decay, betas, epsilon
    "keller-jordan": (3e-4, 0.0, (0.9, 0.95), 1e-10),
    "moonlight": (1e-3, 0.1, (0.9, 0.95), 1e-8),
    "nanochat": (4e-3, 0.0, (0.8, 0.95), 1e-10),
}


def make(recipe: str, name: str, model: nn.Module, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sixteen steps of Polar Express are announced
        return create_optimizer(name, model, recipe=recipe, **options)


@pytest.mark.parametrize(("recipe", "name"), [(r, name) for r, known in RECIPES.items() for name in known.options])
def test_a_recipe_has_the_numbers_of_its_source_and_trains(recipe: str, name: str) -> None:
    lr, decay, momentum = MAIN[recipe, name]
    model = GPTLike()
    optimizer = make(recipe, name, model)
    group = optimizer.param_groups[0]
    assert group["algorithm"] == name
    assert (group["weight_decay"], group.get("momentum", group.get("betas"))) == (decay, momentum)
    assert lr is None or group["lr"] == lr
    if recipe in COMPANION:
        side = next(g for g in optimizer.param_groups if "a.weight" in g["param_names"])
        assert (side["lr"], side["weight_decay"], side["betas"], side["eps"]) == COMPANION[recipe]
    train(model, optimizer, range(2))


def test_what_is_said_goes_before_the_recipe_and_rates_keep_their_proportion() -> None:
    optimizer = make("keller-jordan", "muon", GPTLike(), lr=0.04, momentum=0.9, weight_decay=0.2)
    assert {(g["algorithm"], g["lr"]) for g in optimizer.param_groups} == {("muon", 0.04), ("adamw", 6e-4)}
    assert (optimizer.param_groups[0]["momentum"], optimizer.param_groups[0]["weight_decay"]) == (0.9, 0.2)
    assert make("moonlight", "muon", [nn.Parameter(torch.ones(2, 2))]).param_groups[0]["lr"] == 1e-3
    rates = {g["name"]: g["lr"] for g in make("nanochat", "muon", GPTLike()).param_groups}
    assert rates["adamw: embeddings"] == 0.2


def test_an_unknown_recipe_and_one_of_another_optimizer_are_refused() -> None:
    with pytest.raises(ValueError, match="no recipe 'moonlite'; did you mean 'moonlight'"):
        create_optimizer("muon", GPTLike(), recipe="moonlite")
    with pytest.raises(ValueError, match="recipe='vyas' is for 'soap', not for 'muon'"):
        create_optimizer("muon", GPTLike(), recipe="vyas")
    with pytest.raises(ValueError, match="no optimizer 'mun'"):
        find_recipe("vyas", "mun")


def jordan(gradients: list[Tensor], beta: float) -> Tensor:
    """The direction of the last of some steps, as the write-up of 2024 gives it, in float64."""
    m = torch.zeros_like(gradients[0], dtype=torch.float64)
    for g in gradients:
        m = beta * m + (1 - beta) * g.double()
    x = (1 - beta) * gradients[-1].double() + beta * m
    x = x / x.norm()
    x = x.mT if (tall := x.shape[0] > x.shape[1]) else x
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


@pytest.mark.parametrize("shape", [(24, 8), (8, 24)])
@pytest.mark.parametrize(
    ("recipe", "scale"),
    [
        ("keller-jordan", lambda rows, columns: sqrt(max(1, rows / columns))),
        ("nanochat", lambda rows, columns: sqrt(max(1, rows / columns))),
        ("moonlight", lambda rows, columns: 0.2 * sqrt(max(rows, columns))),
    ],
)
def test_muons_updates_are_those_of_the_source(recipe: str, scale, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator) for _ in range(3)]
    p = nn.Parameter(torch.zeros(shape))
    optimizer = make(recipe, "muon", [p], fp32_matmul_prec="highest", weight_decay=0.0)
    for g in gradients:
        before = p.detach().clone()
        p.grad = g
        optimizer.step()
    moved = (before - p.detach()) / optimizer.param_groups[0]["lr"]
    torch.testing.assert_close(moved.double(), scale(*shape) * jordan(gradients, 0.95), rtol=1e-3, atol=1e-3)


def test_the_command_line_lists_them(capsys) -> None:
    main(["recipes"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in RECIPES)


def test_a_recipe_for_embeddings_also_serves_a_model_that_has_none() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    assert {g["algorithm"] for g in make("nanochat", "muon", model).param_groups} == {"muon", "adamw"}
    own = make("nanochat", "muon", GPTLike(), overrides={"embedding": {"lr": 0.1}})
    assert {g["name"]: g["lr"] for g in own.param_groups}["adamw: embeddings"] == 0.1
    wide = make("nanochat", "muon", GPTLike(), overrides={"*": {"lr": 0.3}})
    assert {g["lr"] for g in wide.param_groups} == {0.3}
