"""Which optimizer a role goes to by default: the matrix optimizer or its companion; docs/routing.md.

`python -m benchmarks.role_defaults` trains small models in which one role is taken by AdamW or by a matrix optimizer
and nothing else differs. Forty minutes on one core; what the results hold already is not trained again. It needs peft,
Pillow and scikit-learn.

The rates of the matrix optimizer and of the companion are found once, with the role where it goes by default. The
role's own rate is found for each arm on three seeds. The losses that are compared come from five other seeds, at that
rate: an arm is better where it is with every one of them. A role that stays as it was drawn shows how much its training
is worth there at all.
"""

import _pydecimal
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.match import NEAR, SEEDS, WARMUP, Runs, batch, held_out, make, search, text
from emerging_optimizers import create_optimizer
from emerging_optimizers.lab import tasks
from emerging_optimizers.lab.data import Text, load_text, seeded
from emerging_optimizers.lab.record import environment
from emerging_optimizers.lab.tasks import BASE_STEPS, BATCH, BETAS, CONTEXT, RANK, WIDTH, ViT, fit, loss_of
from emerging_optimizers.lab.views.describe import Table
from emerging_optimizers.routing.roles import TREATMENTS

OUT = Path(__file__).parent / "results" / "role_defaults.json"
STEPS, DECAY = 100, 0.01
START = 0.008  # where each search for a rate begins
AROUND = (0.25, *NEAR)
FRESH = (3, 4, 5, 6, 7)  # seeds that have found no rate
HELD_OUT = 1000  # a seed of no run


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: `main` takes hidden matrices, `by` the role; `a_lr` is AdamW's for LoRA's A, where it takes that."""

    task: str
    main: str
    by: str
    lr: float
    companion_lr: float
    role_lr: float
    a_lr: float | None = None
    seed: int = 0


class Result(NamedTuple):
    """Held-out loss after the last step."""

    loss: float


# ---- the tasks -------------------------------------------------------------------------------------------------------


class ConvBlock(nn.Module):
    """That of Liu et al. 2022: filters of 3 x 3 for each channel, then a perceptron for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BHWC = self.norm(self.filters(x_BCHW).permute(0, 2, 3, 1))
        return x_BCHW + self.down(F.gelu(self.up(y_BHWC))).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Two blocks on 4 x 4 patches."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.patch = nn.Conv2d(1, WIDTH, 2, 2)
            self.blocks = nn.Sequential(ConvBlock(), ConvBlock())
            self.norm = nn.LayerNorm(WIDTH)
            self.head = nn.Linear(WIDTH, 10)

    def loss(self, images_BHW: Tensor, labels_B: Tensor) -> Tensor:
        x_BCHW = self.blocks(self.patch(images_BHW[:, None]))
        return F.cross_entropy(self.head(self.norm(x_BCHW.mean((2, 3)))), labels_B)


@cache
def base(task: str, seed: int) -> nn.Module:
    """A model that AdamW has trained."""
    return tasks.pretrained(tasks.Task(partial(make, task), partial(batch, task), partial(held_out, task)), seed)


def adapted(task: str, seed: int) -> nn.Module:
    """One of three such models, frozen, with LoRA's factors."""
    return tasks.with_lora(base(task, seed % 3), seed)


@cache
def code() -> Text:
    """A module of Python's, in the characters of the text that the GPT is trained on, which is prose."""
    return replace(tasks.in_characters_of(text(), load_text(_pydecimal.__file__, CONTEXT)), source="_pydecimal")


def turned(examples: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Digits by a quarter turn."""
    images_BHW, labels_B = examples
    return images_BHW.rot90(1, (1, 2)), labels_B


def beside_noise(examples: tuple[Tensor, Tensor], seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Digits with three more channels, which say nothing."""
    images_BHW, labels_B = examples
    noise_BCHW = torch.rand(len(images_BHW), 3, 8, 8, generator=seeded(seed + HELD_OUT, step))
    return torch.cat([images_BHW[:, None], noise_BCHW], 1), labels_B


@cache
def photographs() -> Tensor:
    """The two of scikit-learn, (2, 3, 427, 640), in [-0.5, 0.5]."""
    from sklearn.datasets import load_sample_images

    return torch.stack([torch.tensor(image).permute(2, 0, 1) / 255 - 0.5 for image in load_sample_images().images])


def crops(count: int, columns: slice, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Pieces of 16 x 16 pixels by quarter turns; the labels say of which photograph, and how far turned."""
    windows = photographs()[..., columns].unfold(2, 16, 1).unfold(3, 16, 1)
    generator, (rows, places) = seeded(seed, step), windows.shape[2:4]
    which_B, y_B, x_B, turns_B = (torch.randint(n, (count,), generator=generator) for n in (2, rows, places, 4))
    pieces = zip(windows[which_B, :, y_B, x_B], turns_B.tolist(), strict=True)
    return torch.stack([piece_CHW.rot90(turns, (1, 2)) for piece_CHW, turns in pieces]), 2 * turns_B + which_B


class Task(NamedTuple):
    """A role in a model: the model with its initial weights, training examples by seed and step, the held-out ones."""

    role: str
    make: Callable[[int], nn.Module]
    batch: Callable[[int, int], tuple[Tensor, Tensor]]
    held_out: Callable[[], tuple[Tensor, Tensor]]


DIGITS = (partial(batch, "digits"), partial(held_out, "digits"))
TASKS = {
    "ViT, 2 x 2 pixels": Task("patch", ViT, *DIGITS),
    "ViT, 4 x 4 pixels": Task("patch", partial(ViT, side=4), *DIGITS),
    "ViT, noisy channels": Task(
        "patch",
        partial(ViT, side=4, channels=4),
        lambda seed, step: beside_noise(batch("digits", seed, step), seed, step),
        lambda: beside_noise(held_out("digits"), HELD_OUT, 0),
    ),
    "ViT, photographs": Task(
        "patch",
        partial(ViT, side=8, size=16, channels=3),
        lambda seed, step: crops(2 * BATCH, slice(427), seed, step),
        lambda: crops(600, slice(427, None), HELD_OUT, 0),
    ),
    "ConvNeXt": Task("depthwise", ConvNeXt, *DIGITS),
    "GPT with experts": Task(
        "router", partial(make, "experts"), partial(batch, "experts"), partial(held_out, "experts")
    ),
    "LoRA on a GPT": Task(
        "adapter",
        partial(adapted, "gpt"),
        lambda seed, step: code().batch(seed, step, BATCH, CONTEXT),
        lambda: code().held_out(128, CONTEXT),
    ),
    "LoRA on a ViT": Task(
        "adapter",
        partial(adapted, "digits"),
        lambda seed, step: turned(batch("digits", seed, step)),
        lambda: turned(held_out("digits")),
    ),
}


def train(cell: Cell) -> Result:
    """One run."""
    task = TASKS[cell.task]
    model = task.make(cell.seed)
    first = {} if cell.a_lr is None else {"*.lora_A.*": {"optimizer": "adamw", "lr": cell.a_lr}}
    optimizer = create_optimizer(
        cell.main,
        model,
        lr=cell.lr,
        companion_lr=cell.companion_lr,
        companion_options={"betas": BETAS},
        weight_decay=DECAY,
        roles={task.role: cell.by},
        overrides={**first, task.role: {"lr": cell.role_lr}},
    )
    for _ in fit(model, optimizer, partial(task.batch, cell.seed), STEPS):
        pass
    return Result(round(loss_of(model, task.held_out()), 4))


# ---- the comparison --------------------------------------------------------------------------------------------------


def tuned(runs: Runs, cell: Cell, key: str, seeds: tuple[int, ...], around: tuple[float, ...]) -> Cell:
    """The cell with the best value of a rate."""
    found = search(runs, cell, key, seeds, around)
    return replace(cell, **{key: min(found, key=found.__getitem__)})


def arms(runs: Runs, name: str, main: str) -> dict[str, Cell]:
    """Every arm of a role at its best rate, AdamW's first; the rest of the model has the same rates in all.

    Of adapters both matrix optimizers are arms of one comparison, as nothing else is trained.
    """
    role = TASKS[name].role
    by = main if TREATMENTS[role].matrix else "adamw"
    cell = Cell(task=name, main=main, by=by, lr=START, companion_lr=START, role_lr=START)
    if role != "adapter":  # where nothing but the role is trained
        cell = tuned(runs, cell, "lr", SEEDS[:1], NEAR)
        cell = tuned(runs, cell, "companion_lr", SEEDS[:1], NEAR)
    found = {
        by: tuned(runs, replace(cell, by=by, role_lr=START), "role_lr", SEEDS, AROUND)
        for by in ("adamw", *(("muon", "soap") if role == "adapter" else (main,)))
    }
    if role != "adapter":
        found["frozen"] = replace(cell, by="frozen", role_lr=0.0)
    else:
        cell = replace(found["muon"], a_lr=found["adamw"].role_lr, role_lr=START)
        found["muon on B alone"] = tuned(runs, cell, "role_lr", SEEDS, AROUND)
    return found


def summary(runs: Runs) -> list[dict[str, Any]]:
    """A row for each arm; what it needs is trained."""
    rows = []
    for name, task in TASKS.items():
        for main in ("muon",) if task.role == "adapter" else ("muon", "soap"):
            adamws: list[float] = []
            for arm, cell in arms(runs, name, main).items():
                losses = [runs.loss(replace(cell, seed=seed)) for seed in FRESH]
                adamws = adamws or losses
                gaps = [loss - other for loss, other in zip(losses, adamws, strict=True)]
                row = {
                    "role": task.role,
                    "task": name,
                    "rest": "frozen" if task.role == "adapter" else main,
                    "arm": arm,
                }
                row |= {"lr": cell.lr, "companion_lr": cell.companion_lr, "rate": cell.role_lr, "losses": losses}
                row |= {"mean": round(fmean(losses), 4), "spread": round(stdev(losses), 4)}
                row |= {"gap": round(fmean(gaps), 4), "gap_spread": round(stdev(gaps), 4)}
                row["better"] = sum(gap < 0 for gap in gaps)
                rows.append(row)
                print(row, flush=True)
    return rows


def table(found: dict[str, Any]) -> str:
    """That of docs/routing.md."""
    rows = []
    for row in found["rows"]:
        loss = f"{row['mean']:.3f} ± {row['spread']:.3f}"
        gap = (
            ("", "") if row["arm"] == "adamw" else (f"{row['gap']:+.3f} ± {row['gap_spread']:.3f}", f"{row['better']}")
        )
        rows.append(
            (
                f"`{row['role']}`",
                row["task"],
                row["rest"],
                row["arm"],
                f"{row['rate']:.2g}" if row["rate"] else "",
                loss,
                *gap,
            )
        )
    head = ("role", "model", "rest", "the role by", "best rate", "loss", "less AdamW's", f"better, of {len(FRESH)}")
    return Table(title="A role by AdamW and by a matrix optimizer", head=head, rows=rows, labels=4).markdown()


def main() -> None:
    """Train what is missing, save, show."""
    torch.set_num_threads(1)
    about = environment(1, text())  # before anybody edits what is running
    runs = Runs(OUT, train, Cell, Result)
    job = {"steps": STEPS, "warmup": WARMUP, "batch": BATCH, "decay": DECAY, "rank": RANK, "base_steps": BASE_STEPS}
    job |= {"betas": BETAS, "seeds": SEEDS, "fresh_seeds": FRESH, "adapted_to": [code().source, code().sha256]}
    runs.save({"environment": about, "job": job, "rows": summary(runs)})
    print(table(json.loads(OUT.read_text())))


if __name__ == "__main__":
    main()
