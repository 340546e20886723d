"""The recipes of `eopt gallery`, and the figures and tables of docs/gallery.md.

`python -m benchmarks.gallery [ITEM ...]` tries recipes of each optimizer of an item, on seed 0: the rates that the
registry says to start from, WIDE drawn ones, and then, one after the other, NEAR ones near the best so far; of AdamW,
MORE of those. The best FINALISTS run again with another seed, and the lowest mean of both is the recipe. Every
optimizer gets the same draws, and all that a draw says: two rates, two betas, decay, warm-up. What trials/ITEM.json
holds is not run again.

`python -m benchmarks.gallery --page [ITEM ...]` runs `eopt gallery` for each item that is not in runs/ yet, copies its
picture into docs/images/gallery/ and its result into benchmarks/results/gallery/, and writes its tables below its
picture in docs/gallery.md, where somebody has written a section with the picture.
"""

import math
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from emerging_optimizers.lab.config import BASELINE
from emerging_optimizers.lab.experiment import to_json
from emerging_optimizers.lab.gallery import ITEMS, TRIALS, Recipe, Trial, train, trials
from emerging_optimizers.lab.record import environment, write_json
from emerging_optimizers.lab.tasks import OPEN
from emerging_optimizers.registry import OPTIMIZERS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "gallery.md"
RESULTS = ROOT / "benchmarks" / "results" / "gallery"
WIDE, NEAR, MORE, FINALISTS, AGAIN = 4, 4, 9, 2, 4
DRAWN = {  # what is no rate
    "beta1": (0.8, 0.9, 0.95),
    "beta2": (0.9, 0.95, 0.99, 0.999),
    "weight_decay": (0.0, 0.01, 0.1),
    "warmup": (0.05, 0.1, 0.2, 0.4),
}
START = {"companion_lr": 4e-3, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.01, "warmup": 0.1}
RATES = ("lr", "companion_lr")


def drawn(draw: random.Random, start: Recipe) -> Recipe:
    """Rates up to a factor of 8 away from where they start."""
    rates = {key: getattr(start, key) * 8 ** draw.uniform(-1, 1) for key in RATES}
    return replace(start, **rates, **{key: draw.choice(values) for key, values in DRAWN.items()})


def near(draw: random.Random, best: Recipe) -> Recipe:
    """Rates up to a factor of 2.5 away, and each of the others drawn again with a probability of 0.3."""
    rates = {key: getattr(best, key) * 2.5 ** draw.uniform(-1, 1) for key in RATES}
    others = {key: draw.choice(values) for key, values in DRAWN.items() if draw.random() < 0.3}
    return replace(best, **rates, **others)


def tune(name: str) -> None:
    """Try what has not been tried."""
    item, task = ITEMS[name], OPEN[name](None)

    def loss(optimizer: str, recipe: Recipe, seed: int) -> float:
        begun = time.process_time()
        found = train(task, item, optimizer, recipe, seed, item.steps).losses[-1]
        print(f"{time.process_time() - begun:5.1f} s  {found:8.4f}  {name} {optimizer} {seed} {recipe}", flush=True)
        return found

    path = TRIALS / f"{name}.json"
    found = {optimizer: [*tried] for optimizer, tried in trials(name).items()} if path.exists() else {}
    for optimizer in item.optimizers:
        draw = random.Random(name)  # the same for every optimizer
        start = Recipe(lr=OPTIMIZERS[optimizer].start or math.nan, **START)
        tried = found.setdefault(optimizer, [])
        for k in range(1 + WIDE + NEAR + (MORE if optimizer == BASELINE else 0)):
            best = min(tried[:k], key=lambda trial: trial.losses["0"], default=None)
            recipe = start if best is None else drawn(draw, start) if k <= WIDE else near(draw, best.recipe)
            recipe = Recipe(**{key: float(f"{value:.3g}") for key, value in asdict(recipe).items()})
            if k == len(tried):
                tried.append(Trial(recipe=recipe, losses={"0": loss(optimizer, recipe, 0)}))
                save(path, found)
            assert tried[k].recipe == recipe
        for trial in sorted(tried, key=lambda trial: trial.losses["0"])[:FINALISTS]:
            if str(AGAIN) not in trial.losses:
                again = replace(trial, losses={**trial.losses, str(AGAIN): loss(optimizer, trial.recipe, AGAIN)})
                tried[tried.index(trial)] = again
                save(path, found)


def save(path: Path, found: dict[str, list[Trial]]) -> None:
    """What has been tried so far."""
    write_json(path, {"environment": environment(1), "trials": to_json(found)})


def page(names: Iterable[str]) -> None:
    """Pictures, results, and the tables of the page."""
    for name in names:
        folder = ROOT / "runs" / f"gallery-{name}"
        if not (folder / "result.json").exists():
            out = ("--out", str(folder.relative_to(ROOT)))
            subprocess.run(
                [sys.executable, "-m", "emerging_optimizers.lab", "gallery", name, *out], cwd=ROOT, check=True
            )
        shutil.copy(folder / "gallery.png", ROOT / "docs" / "images" / "gallery" / f"{name}.png")
        shutil.copy(folder / "result.json", RESULTS / f"{name}.json")
        shutil.copy(folder / "environment.json", RESULTS / f"{name}.environment.json")
        before, picture, section = PAGE.read_text().partition(f"(images/gallery/{name}.png)\n")
        _, heading, after = section.partition("\n## ")
        if picture:
            tables = (folder / "tables.md").read_text().strip()
            PAGE.write_text(f"{before}{picture}\n{tables}\n{heading}{after}")
        else:
            print(f"{name}: docs/gallery.md has no section with its picture")


def main() -> None:
    """Try, or write."""
    torch.set_num_threads(1)
    names = [word for word in sys.argv[1:] if word != "--page"] or [*ITEMS]
    if "--page" in sys.argv:
        return page(names)
    for name in names:
        tune(name)


if __name__ == "__main__":
    main()
