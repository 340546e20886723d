"""Whether a learning rate that is best for AdamW is one for the others with `match="adamw"`; docs/migrate.md.

`python -m benchmarks.match [optdigits.tes]` trains a small character GPT, a ViT on digits and a mixture of experts with
every optimizer, fits the best rates and draws docs/images/match.png. Three quarters of an hour on one core; what the
results hold already is not trained again. The digits are scikit-learn's, or, where that is not installed, those of the
file of UCI's "Optical Recognition of Handwritten Digits" that scikit-learn has them from.

Three sweeps of every task. AdamW over its rate and its decay: the best pair is the recipe. Each optimizer over the rate
given to it with a guess of its factor; the factor that moves its best rate onto AdamW's is, as the geometric mean over
tasks with one digit, what the registry holds. The same with that factor, which is what `match="adamw"` does.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emerging_optimizers import create_optimizer, plan_parameters
from emerging_optimizers.lab import tasks
from emerging_optimizers.lab.data import Text, load_text, seeded
from emerging_optimizers.lab.images import Images
from emerging_optimizers.lab.palette import DARK, styles
from emerging_optimizers.lab.record import environment, write_json
from emerging_optimizers.lab.tasks import BATCH, BETAS, CONTEXT, WIDTH, ViT, fit, loss_of, schedule
from emerging_optimizers.lab.views.describe import Table
from emerging_optimizers.registry import OPTIMIZERS

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "match.json"
GUESSES = {"muon": 0.4, "soap": 2.0, "rekls": 2.0, "shampoo": 2.0, "scion": 0.4}  # factors that the first sweep has
TASKS = ("gpt", "digits", "experts")
SEEDS = (0, 1, 2)
STEPS, WARMUP = 150, 40
DECAYS = (0.01, 0.1, 1.0)
START = 0.008  # where the search for AdamW's rate begins
NEAR = (0.5, 1.0, 2.0)
AROUND = (0.25, *NEAR, 4.0)  # times AdamW's best rate: the curves


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: `lr` and `decay` are AdamW's, `factor` is what `Entry.match` is in it."""

    task: str
    optimizer: str
    lr: float
    decay: float
    factor: float
    seed: int


class Result(NamedTuple):
    """Held-out loss after the last step, and the RMS of the update of all matrices half-way, over AdamW's rate."""

    loss: float
    rms: float


# ---- the tasks -------------------------------------------------------------------------------------------------------


@cache
def digits() -> tuple[Tensor, Tensor]:
    """1797 images of 8 x 8 pixels in [0, 1], in a fixed random order, and their labels."""
    if sys.argv[1:]:
        lines = [line for line in Path(sys.argv[1]).read_text().splitlines() if line[:1].isdigit()]
        table = torch.tensor([[int(x) for x in line.split(",")] for line in lines])
        found = Images.of(sys.argv[1], table[:, :64].reshape(-1, 8, 8) / 16, table[:, 64])
    else:
        found = tasks.digits()
    assert found.labels_B is not None
    return found.images_BCHW[:, 0], found.labels_B


@cache
def text() -> Text:
    return load_text(None, CONTEXT)


def make(task: str, seed: int) -> Any:
    """A model with its initial weights."""
    if task == "digits":
        return ViT(seed)
    return tasks.experts(text(), seed) if task == "experts" else tasks.gpt(text(), seed)


def batch(task: str, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """A function of seed and step, the same for every optimizer."""
    if task != "digits":
        return text().batch(seed, step, BATCH, CONTEXT)
    images, labels = digits()
    some = torch.randint(1198, (2 * BATCH,), generator=seeded(seed, step))
    return images[some], labels[some]


def held_out(task: str) -> tuple[Tensor, Tensor]:
    """A third of the digits; of the text 128 windows."""
    return tuple(x[1198:] for x in digits()) if task == "digits" else text().held_out(128, CONTEXT)


def train(cell: Cell) -> Result:
    """One run; a loss that is not finite is infinite."""
    model = make(cell.task, cell.seed)
    matrices = [model.get_parameter(r.name) for r in plan_parameters(model, "muon") if r.optimizer == "muon"]
    here = OPTIMIZERS[cell.optimizer]
    OPTIMIZERS[cell.optimizer] = replace(here, match=cell.factor)
    try:
        optimizer = create_optimizer(
            cell.optimizer, model, lr=cell.lr, weight_decay=cell.decay, betas=BETAS, match="adamw"
        )
    finally:
        OPTIMIZERS[cell.optimizer] = here

    rms = math.nan
    before: list[Tensor] = []
    for step in fit(model, optimizer, partial(batch, cell.task, cell.seed), STEPS, WARMUP):
        if step == STEPS // 2 - 1:
            before = [p.detach().clone() for p in matrices]
        if step == STEPS // 2:
            with torch.no_grad():
                moved = torch.cat([(p - q).flatten() for p, q in zip(matrices, before, strict=True)])
            rms = moved.square().mean().sqrt().item() / (cell.lr * schedule(step - 1, STEPS, WARMUP))
    return Result(round(loss_of(model, held_out(cell.task)), 4), round(rms, 3))


# ---- the sweeps ------------------------------------------------------------------------------------------------------


class Runs:
    """What has been trained, as the file has it; a cell that is not there is trained and saved when it is asked for."""

    def __init__(self, out: Path, train: Callable[[Any], Any], cell: type, result: type) -> None:
        self.out, self.train = out, train
        stored = json.loads(out.read_text())["runs"] if out.exists() else []
        self.results = {
            cell(**{key: row[key] for key in cell.__annotations__}): result(**{key: row[key] for key in result._fields})
            for row in stored
        }

    def loss(self, cell: Any) -> float:
        if cell not in self.results:
            begun = time.process_time()
            self.results[cell] = self.train(cell)
            print(f"{time.process_time() - begun:5.1f} s  {self.results[cell]}  {cell}", flush=True)
            self.save({})
        return self.results[cell].loss

    def mean(self, cell: Any, seeds: Sequence[int]) -> float:
        return fmean(self.loss(replace(cell, seed=seed)) for seed in seeds)

    def save(self, found: dict[str, Any]) -> None:
        rows = [{**asdict(cell), **result._asdict()} for cell, result in self.results.items()]
        write_json(self.out, {**found, "runs": rows})


def search(runs: Runs, cell: Any, key: str, seeds: Sequence[int], around: Sequence[float]) -> dict[float, float]:
    """Mean losses over one number of a cell: times `around`, then further in steps of 2 while the least is an edge."""
    start = getattr(cell, key)
    found = {start * x: runs.mean(replace(cell, **{key: start * x}), seeds) for x in around}
    while (best := min(found, key=found.__getitem__)) in (min(found), max(found)):
        x = best / 2 if best == min(found) else best * 2
        found[x] = runs.mean(replace(cell, **{key: x}), seeds)
    return dict(sorted(found.items()))


def lowest(losses: dict[float, float]) -> float:
    """Where the parabola in log x through the least point and its two neighbours is least."""
    xs = sorted(losses)
    k = min(range(1, len(xs) - 1), key=lambda i: losses[xs[i]])
    left, mid, right = (min(losses[x], 10.0) for x in xs[k - 1 : k + 2])  # a run may diverge
    return xs[k] * 2.0 ** ((left - right) / 2 / (left - 2 * mid + right))


def recipe(runs: Runs, task: str) -> Cell:
    """AdamW's best rate of the grid, over all seeds, at its best decay."""
    cell = Cell(task=task, optimizer="adamw", lr=START, decay=0.1, factor=1.0, seed=0)
    rates = search(runs, cell, "lr", SEEDS[:1], NEAR)
    cell = replace(cell, lr=min(rates, key=rates.__getitem__))
    cell = replace(cell, decay=min(DECAYS, key=lambda decay: runs.loss(replace(cell, decay=decay))))
    rates = search(runs, cell, "lr", SEEDS, NEAR)
    return replace(cell, lr=min(rates, key=rates.__getitem__))


def rounded(factors: Iterable[float]) -> float:
    """The geometric mean, with one digit: what the registry holds."""
    return float(f"{geometric_mean(factors):.1g}")


def summary(runs: Runs) -> dict[str, Any]:
    """Everything that the page says; what it needs is trained."""
    recipes = {task: recipe(runs, task) for task in TASKS}
    adamws = {task: search(runs, recipes[task], "lr", SEEDS, AROUND) for task in TASKS}
    factors = {}
    for name, guess in GUESSES.items():
        best = {}
        for task in TASKS:
            cell = replace(recipes[task], optimizer=name, factor=guess)
            rate = lowest(search(runs, cell, "lr", SEEDS, AROUND))
            best[task] = round(guess * rate / lowest(adamws[task]), 2)
        factors[name] = {"match": rounded(best.values()), "best": best}
        print(name, factors[name], flush=True)
    rows = []
    curves: dict[str, dict[str, dict[float, list[float]]]] = {task: {} for task in TASKS}
    for name, factor in {"adamw": 1.0, **{name: factor["match"] for name, factor in factors.items()}}.items():
        for task in TASKS:
            cell = replace(recipes[task], optimizer=name, factor=factor)
            means = adamws[task] if name == "adamw" else search(runs, cell, "lr", SEEDS, NEAR)
            curves[task][name] = {lr: [runs.loss(replace(cell, lr=lr, seed=seed)) for seed in SEEDS] for lr in means}
            row = {"task": task, "optimizer": name, "best": float(f"{lowest(means):.2g}")}
            row["over adamw"] = round(lowest(means) / lowest(adamws[task]), 2)
            row |= {"loss there": round(means[cell.lr], 3), "lowest loss": round(min(means.values()), 3)}
            row["rms"] = round(fmean(runs.results[replace(cell, seed=seed)].rms for seed in SEEDS), 2)
            rows.append(row)
    job = {"steps": STEPS, "warmup": WARMUP, "batch": BATCH, "context": CONTEXT, "width": WIDTH, "betas": BETAS}
    stated = {task: {"lr": cell.lr, "decay": cell.decay} for task, cell in recipes.items()}
    return {"job": job, "recipes": stated, "factors": factors, "rows": rows, "curves": curves}


# ---- the page --------------------------------------------------------------------------------------------------------


def tables(found: dict[str, Any]) -> tuple[str, str]:
    """Those of docs/migrate.md: the factors, and what they do."""
    first = []
    for name, factor in found["factors"].items():
        best = [factor["best"][task] for task in TASKS]
        spread = f"{max(best) / min(best):.1f}"
        first.append((f"`{name}`", f"{factor['match']:g}", *(f"{x:.2f}" for x in best), spread))
    second = []
    for row in found["rows"]:
        numbers = (f"{row['over adamw']:.2f}", *(f"{row[key]:.3f}" for key in ("loss there", "lowest loss")))
        second.append((f"`{row['optimizer']}`", row["task"], f"{row['best']:g}", *numbers, f"{row['rms']:.2f}"))
    head = ("optimizer", "task", "best rate", "over AdamW's", "loss at AdamW's", "lowest loss", "update RMS / rate")
    factors = ("optimizer", "factor", *(f"best on {task}" for task in TASKS), "largest over smallest")
    matched = Table(title='With match="adamw"', head=head, rows=second, labels=2)
    return Table(title="Factors", head=factors, rows=first).markdown(), matched.markdown()


def draw(found: dict[str, Any], path: Path) -> None:
    """Loss over the rate that was given; bands from the least to the largest of the seeds."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullLocator

    from emerging_optimizers.lab.plots import save_figure

    titles = {"gpt": "character GPT", "digits": "ViT on digits", "experts": "mixture of experts"}
    units = {"gpt": "nats per character", "digits": "nats per image", "experts": "nats per character"}
    figure, panels = plt.subplots(1, 3, figsize=(12.5, 4.6), layout="constrained")
    for axes, (task, curves) in zip(panels, found["curves"].items(), strict=True):
        for name, (color, marker) in styles(list(curves)).items():
            lrs = [float(lr) for lr in curves[name]]
            losses = list(curves[name].values())
            line = {"linestyle": (0, (3, 3)), "zorder": 3} if name == "scion" else {}
            axes.plot(lrs, [fmean(x) for x in losses], color=color, marker=marker, markersize=5, label=name, **line)
            axes.fill_between(lrs, [min(x) for x in losses], [max(x) for x in losses], color=color, alpha=0.12)
        best = next(row["best"] for row in found["rows"] if (row["task"], row["optimizer"]) == (task, "adamw"))
        axes.axvline(best, color=DARK, linewidth=1, linestyle=":", label="AdamW's best, and within a factor of 2")
        axes.axvspan(best / 2, best * 2, color=DARK, alpha=0.06, linewidth=0)
        axes.set_xscale("log")
        ticks = sorted({float(lr) for curve in curves.values() for lr in curve})
        axes.set_xticks(ticks, [f"{lr:g}" for lr in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(titles[task])
        axes.set_xlabel('learning rate given with match="adamw"')
        axes.set_ylabel(f"held-out loss, {units[task]}")
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
    save_figure(figure, path, dpi=150)


def main() -> None:
    """Train what is missing, save, draw."""
    torch.set_num_threads(1)
    runs = Runs(OUT, train, Cell, Result)
    found = summary(runs)
    runs.save(found)
    write_json(OUT.with_suffix(".environment.json"), environment(1, text()))
    draw(json.loads(OUT.read_text()), ROOT / "docs" / "images" / "match.png")
    print("\n\n".join(tables(found)))


if __name__ == "__main__":
    main()
