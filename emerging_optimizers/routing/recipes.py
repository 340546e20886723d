"""Named sets of hyper-parameters, each as its source gives it."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

from emerging_optimizers import registry


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a source trains with.

    Attributes:
        source: where the numbers stand.
        options: for each optimizer of the recipe its options; "lr" is the source's learning rate, if it has one.
        companion: options of the AdamW beside it, "lr" among them where the source says it.
        overrides: as in `plan_parameters`.
    """

    source: str
    options: Mapping[str, Mapping[str, Any]]
    companion: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)


def _adams_size(momentum: float) -> float:
    """The root mean square of an average of independent signs of size 1 with this decay: that of AdamW's update."""
    return sqrt((1 - momentum) / (1 + momentum))


# The one step that all of them take five times: (3.4445, -4.7750, 2.0315).
_JORDANS_STEPS = {"coefficient_type": "simple", "num_ns_steps": 5}
_JORDAN = {
    **_JORDANS_STEPS,
    "lr": 0.02,
    "momentum": 0.95,
    "nesterov": True,
    "scale_mode": "shape_scaling",
    "weight_decay": 0.0,
}

RECIPES: dict[str, Recipe] = {
    "keller-jordan": Recipe(
        source="Jordan et al. 2024, github.com/KellerJordan/Muon, muon.py at 00ba60d",
        options={"muon": _JORDAN},
        companion={"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0},
    ),
    "moonlight": Recipe(
        source="Liu et al. 2025, arXiv 2502.16982; github.com/MoonshotAI/Moonlight, examples/toy_train.py at abaa96e",
        options={
            "muon": {
                **_JORDANS_STEPS,
                "lr": 1e-3,
                "momentum": 0.95,
                "nesterov": True,
                "scale_mode": "spectral",
                "extra_scale_factor": 0.2,
                "weight_decay": 0.1,
            }
        },
        companion={"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1},
    ),
    "nanochat": Recipe(
        source="Karpathy 2025, github.com/karpathy/nanochat, nanochat/gpt.py at 025c432, for a width of 768",
        options={"muon": _JORDAN},
        companion={"lr": 4e-3, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.0},
        overrides={"embedding": {"lr": 0.2}},
    ),
    "soap-muon-and-beyond": Recipe(
        source="NVIDIA 2026, SOAP, Muon, and Beyond, arXiv 2607.20548, as issue 259 of Emerging-Optimizers lists it",
        options={
            "muon": {
                "coefficient_type": "polar_express",
                "num_ns_steps": 16,
                "momentum": 0.9,
                "extra_scale_factor": _adams_size(0.9),
                "weight_decay": 0.1,
            },
            "soap": {"use_kl_shampoo": True, "weight_decay": 0.1},
        },
        companion={"weight_decay": 0.1},
    ),
    "vyas": Recipe(
        source="Vyas et al. 2024, arXiv 2409.11321; github.com/nikhilvyas/SOAP",
        options={
            "soap": {
                "lr": 3e-3,
                "betas": (0.95, 0.95),
                "shampoo_beta": 0.95,
                "eps": 1e-8,
                "precondition_frequency": 10,
                "weight_decay": 0.01,
            }
        },
        companion={"betas": (0.95, 0.95), "eps": 1e-8, "weight_decay": 0.01},
    ),
}


def find_recipe(recipe: str, name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        ValueError: there is none, or it says nothing about the optimizer `name`.

    Example:
        >>> find_recipe("moonlight", "muon").options["muon"]["extra_scale_factor"]
        0.2
    """
    found = RECIPES.get(recipe.lower())
    if found is None:
        close = difflib.get_close_matches(recipe.lower(), RECIPES, n=1)
        hint = f"did you mean {close[0]!r}? Known" if close else "known"
        raise ValueError(f"there is no recipe {recipe!r}; {hint} are {', '.join(RECIPES)}")
    registry.entry(name)
    if name.lower() not in found.options:
        raise ValueError(f"recipe={recipe!r} is for {', '.join(map(repr, found.options))}, not for {name!r}")
    return found
