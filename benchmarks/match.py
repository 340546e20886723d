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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emerging_optimizers import create_optimizer, plan_parameters
from emerging_optimizers.lab.data import Text, load_text, seeded
from emerging_optimizers.lab.model import GPT, Block
from emerging_optimizers.lab.palette import DARK, styles
from emerging_optimizers.lab.record import environment, write_json
from emerging_optimizers.lab.views.describe import Table
from emerging_optimizers.registry import OPTIMIZERS

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "match.json"
GUESSES = {"muon": 0.4, "soap": 2.0, "rekls": 2.0, "shampoo": 2.0, "scion": 0.4}  # factors that the first sweep has
TASKS = ("gpt", "digits", "experts")
SEEDS = (0, 1, 2)
STEPS, WARMUP, BATCH, CONTEXT, WIDTH, HEADS = 150, 40, 16, 64, 64, 4
DEPTH = {"gpt": 2, "experts": 1}
BETAS = (0.9, 0.95)
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


class ExpertBlock(Block):
    """The GPT's block with four experts in place of its perceptron, of which the router takes two for a character."""

    def __init__(self, width: int, heads: int, generator: torch.Generator) -> None:
        super().__init__(width, heads)
        del self.mlp_in, self.mlp_out
        self.router = nn.Linear(width, 4, bias=False)
        self.experts_up = nn.Parameter(torch.empty(4, 2 * width, width))
        self.experts_down = nn.Parameter(torch.empty(4, width, 2 * width))
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, 0, 0.02, generator=generator)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        y_SD = self.mlp_norm(x_BTD).flatten(0, 1)
        gates, chosen = self.router(y_SD).softmax(-1).topk(2)
        gates_SE = torch.zeros(len(y_SD), 4).scatter(1, chosen, gates / gates.sum(-1, keepdim=True))
        hidden_ESH = F.gelu(y_SD @ self.experts_up.mT)
        out_SD = torch.einsum("esd,se->sd", hidden_ESH @ self.experts_down.mT, gates_SE)
        return x_BTD + out_SD.view_as(x_BTD)


class ViT(nn.Module):
    """Patches of `side` x `side` pixels of an image of `size` x `size`."""

    def __init__(self, seed: int, *, side: int = 2, size: int = 8, channels: int = 1) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.patch = nn.Conv2d(channels, WIDTH, side, side)
            self.position = nn.Parameter(torch.randn((size // side) ** 2, WIDTH) * 0.02)
            layer = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
            self.layers = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, **layer) for _ in range(2))
            self.norm = nn.LayerNorm(WIDTH)
            self.head = nn.Linear(WIDTH, 10)

    def loss(self, images: Tensor, labels_B: Tensor) -> Tensor:
        images_BCHW = images if images.ndim == 4 else images[:, None]
        x_BTD = self.patch(images_BCHW).flatten(2).mT + self.position
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return F.cross_entropy(self.head(self.norm(x_BTD.mean(1))), labels_B)


@cache
def digits() -> tuple[Tensor, Tensor]:
    """1797 images of 8 x 8 pixels in [0, 1], in a fixed random order, and their labels."""
    try:
        from sklearn.datasets import load_digits

        images, labels = map(torch.tensor, load_digits(return_X_y=True))
    except ModuleNotFoundError:
        if not sys.argv[1:]:
            sys.exit("the digits need scikit-learn: pip install scikit-learn, or name UCI's optdigits.tes")
        lines = [line for line in Path(sys.argv[1]).read_text().splitlines() if line[:1].isdigit()]
        table = torch.tensor([[int(x) for x in line.split(",")] for line in lines])
        images, labels = table[:, :64], table[:, 64]
    order = torch.randperm(len(images), generator=seeded(0, 0))
    return images[order].view(-1, 8, 8).float() / 16, labels[order]


@cache
def text() -> Text:
    return load_text(None, CONTEXT)


def make(task: str, seed: int) -> Any:
    """A model with its initial weights."""
    if task == "digits":
        return ViT(seed)
    size = {"context": CONTEXT, "width": WIDTH, "depth": DEPTH[task], "heads": HEADS}
    model = GPT(vocabulary=len(text().vocabulary), **size, seed=seed)
    if task == "experts":
        generator = seeded(seed, -1)
        model.blocks = nn.ModuleList(ExpertBlock(WIDTH, HEADS, generator) for _ in range(DEPTH[task]))
    return model


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
    for step in fit(model, optimizer, partial(batch, cell.task, cell.seed), STEPS):
        if step == STEPS // 2 - 1:
            before = [p.detach().clone() for p in matrices]
        if step == STEPS // 2:
            with torch.no_grad():
                moved = torch.cat([(p - q).flatten() for p, q in zip(matrices, before, strict=True)])
            rms = moved.square().mean().sqrt().item() / (cell.lr * schedule(step - 1, STEPS))
    return Result(loss_of(model, held_out(cell.task)), round(rms, 3))


def schedule(done: int, steps: int) -> float:
    """What a rate is multiplied by: a line up, then half a cosine down."""
    return min((done + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * max(0, done - WARMUP) / (steps - WARMUP)))


def fit(model: Any, optimizer: torch.optim.Optimizer, batches: Callable[[int], Any], steps: int) -> Iterator[int]:
    """Train; the number of every step that is done, from 1."""
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(schedule, steps=steps))
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        model.loss(*batches(step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield step
        rates.step()


@torch.no_grad()
def loss_of(model: Any, examples: tuple[Tensor, Tensor]) -> float:
    """With four digits, infinite where it is not finite."""
    loss = model.loss(*examples).item()
    return round(loss, 4) if math.isfinite(loss) else math.inf


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
