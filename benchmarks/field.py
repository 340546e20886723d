"""What the optimizers and laws of docs/field.md do to the demo's loss, each at its own learning rate.

`python benchmarks/field.py [ARM ...]` trains the demo with each arm, over its rates with seed 0, then at the best of
them with two more seeds, and saves each run. An arm is an optimizer, options, and what stands beside the optimizer.
`python benchmarks/field.py steps` times a step of an optimizer alone on three matrices of GPT-2 small, in a minute.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from emerging_optimizers import ScheduleFree, WeightAverage, create_optimizer
from emerging_optimizers.lab.config import TUNED, TrainConfig
from emerging_optimizers.lab.data import Text, load_text
from emerging_optimizers.lab.record import environment, write_json
from emerging_optimizers.lab.train import evaluate, lr_factor, make_model
from emerging_optimizers.registry import get_optimizer_cls

OUT = Path(__file__).parent / "results" / "field.json"
STEPS = OUT.with_name("field_steps.json")
SEEDS = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """An arm.

    Attributes:
        optimizer: registry name, with the options that the lab has for it.
        rates: learning rates; of a matrix optimizer, with the companion's at the lab's.
        options: further arguments of `create_optimizer`.
        beside: made for the optimizer, and evaluated in the place of the weights.
        stays: the learning rate warms up and stays; otherwise it falls to zero.
    """

    optimizer: str
    rates: tuple[float, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    beside: Callable[[torch.optim.Optimizer], Any] | None = None
    stays: bool = False


ADAMW, MUON = (1e-3, 2e-3, 4e-3), (2e-3, 4e-3, 8e-3)
WITHOUT_MOMENTUM: dict[str, dict[str, Any]] = {
    "adamw": {"betas": (0.0, 0.999)},
    "muon": {"momentum": 0.0, "nesterov": False, "companion_options": {"betas": (0.0, 0.999)}},
}
# A hundred times the default, of which 200 steps show nothing.
DECAY: dict[str, Any] = {"weight_decay": 1.0}
CAUTIOUS_DECAY: dict[str, Any] = {**DECAY, "weight_decay_method": "cautious"}


def _average(optimizer: torch.optim.Optimizer) -> WeightAverage:
    return WeightAverage(optimizer, 0.95)


def _muon(**options: Any) -> Compared:
    return Compared(optimizer="muon", rates=(4e-3,), options=options)


ARMS: dict[str, Compared] = {
    "adamw": Compared(optimizer="adamw", rates=ADAMW),
    "muon": Compared(optimizer="muon", rates=MUON),
    "adamw, cautious": Compared(optimizer="adamw", rates=ADAMW, options={"cautious": True}),
    "muon, cautious": _muon(cautious=True),
    "mars": Compared(optimizer="mars", rates=(2e-3, 4e-3)),
    "muon_mix": Compared(optimizer="muon_mix", rates=(4e-3,)),
    "dion3": Compared(optimizer="dion3", rates=(2e-3,)),
    "muon, row floor 10": _muon(weight_update_hook=("row_update_floor", 10.0)),
    "adamw, average 0.95": Compared(optimizer="adamw", rates=(2e-3,), beside=_average),
    "muon, average 0.95": Compared(optimizer="muon", rates=(4e-3,), beside=_average),
    "muon, rate stays, average 0.95": Compared(optimizer="muon", rates=(4e-3,), beside=_average, stays=True),
    "splus": Compared(optimizer="splus", rates=(0.1,)),
    "adamw, schedule-free": Compared(
        optimizer="adamw", rates=(2e-3, 4e-3), options=WITHOUT_MOMENTUM["adamw"], beside=ScheduleFree, stays=True
    ),
    "muon, schedule-free": Compared(
        optimizer="muon", rates=(4e-3,), options=WITHOUT_MOMENTUM["muon"], beside=ScheduleFree, stays=True
    ),
    "dion2": Compared(optimizer="dion2", rates=(2e-3, 4e-3, 8e-3)),
    "muon, update floor 10": _muon(weight_update_hook=("update_floor", 10.0)),
    "dion2, momentum 0.8": Compared(optimizer="dion2", rates=(4e-3,), options={"momentum": 0.8}),
    "adamw, decay 1": Compared(optimizer="adamw", rates=(2e-3,), options=DECAY),
    "adamw, cautious decay 1": Compared(optimizer="adamw", rates=(2e-3,), options=CAUTIOUS_DECAY),
    "muon, decay 1": _muon(**DECAY),
    "muon, cautious decay 1": _muon(**CAUTIOUS_DECAY),
}


def train(config: TrainConfig, arm: Compared, lr: float, text: Text) -> dict[str, Any]:
    """The demo's job."""
    model = make_model(config, text)
    tuned = TUNED[arm.optimizer]
    optimizer = create_optimizer(
        arm.optimizer, model, lr=lr, companion_lr=tuned.companion_lr, **{**tuned.options, **arm.options}
    )
    beside = None if arm.beside is None else arm.beside(optimizer)
    schedule = LambdaLR(
        optimizer, lambda done: min(1.0, (done + 1) / config.warmup) if arm.stays else lr_factor(config, done)
    )
    step_s = []
    for step in range(1, config.steps + 1):
        loss = model.loss(*text.batch(config.seed, step, config.batch, config.context))
        optimizer.zero_grad()
        loss.backward()
        before = time.process_time()
        optimizer.step()
        step_s.append(time.process_time() - before)
        schedule.step()
    held_out = text.held_out(config.eval_windows, config.context)
    found = {"seed": config.seed, "lr": lr, "loss": round(evaluate(model, *held_out, beside), 4)}
    if beside is not None:
        found["loss_of_the_weights"] = round(evaluate(model, *held_out), 4)
    return {**found, "step_ms": round(1e3 * statistics.median(step_s), 1)}


def rates_of(found: list[dict[str, Any]], arm: Compared, seed: int) -> tuple[float, ...]:
    """With the first seed all of an arm's; with others that which was best."""
    if seed == SEEDS[0]:
        return arm.rates
    first = [row for row in found if row["seed"] == SEEDS[0]]
    return (min(first, key=lambda row: row["loss"])["lr"],)


SHAPES, ROUNDS = ((768, 768), (768, 3072), (3072, 768)), 9
TIMED: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("adamw", {}),
    "adamw, cautious": ("adamw", {"cautious": True}),
    "mars": ("mars", {}),
    "muon": ("muon", {}),
    "muon, cautious": ("muon", {"cautious": True}),
    "muon, row floor 10": ("muon", {"weight_update_hook": ("row_update_floor", 10.0)}),
    "muon, update floor 10": ("muon", {"weight_update_hook": ("update_floor", 10.0)}),
    "muon_mix": ("muon_mix", {}),
    "dion2": ("dion2", {}),
    "dion2, half of the rows": ("dion2", {"fraction": 0.5}),
    "dion3": ("dion3", {}),
}


def steps() -> None:
    """CPU time of a step in float32, all arms in turns, in milliseconds; medians."""
    made = {}
    for name, (optimizer, options) in TIMED.items():
        g = torch.Generator().manual_seed(0)
        ps = [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in SHAPES]
        for p in ps:
            p.grad = torch.randn(p.shape, generator=g)
        cls = get_optimizer_cls(optimizer)
        whole = {"fp32_matmul_prec": "highest"} if "fp32_matmul_prec" in cls.ranges else {}
        made[name] = cls(ps, lr=1e-3, **whole, **options)
        made[name].step()
    taken: dict[str, list[float]] = {name: [] for name in made}
    for _, (name, optimizer) in product(range(ROUNDS), made.items()):
        before = time.process_time()
        optimizer.step()
        taken[name].append(time.process_time() - before)
    found = {
        name: {
            "step_ms": round(1e3 * statistics.median(times), 1),
            "over": of,
            "ratio": round(statistics.median(a / b for a, b in zip(times, taken[of], strict=True)), 2),
        }
        for name, times in taken.items()
        for of in ["adamw" if name.startswith("adamw") or name == "mars" else "muon"]
    }
    write_json(STEPS, found)
    write_json(STEPS.with_suffix(".environment.json"), environment(1, None))
    print(json.dumps(found, indent=1))


def main(names: list[str]) -> None:
    """Train, show, save; what is held already is not done again."""
    torch.set_num_threads(1)
    if names == ["steps"]:
        steps()
        return
    config = TrainConfig()
    text = load_text(None, config.context)
    found: dict[str, list[dict[str, Any]]] = json.loads(OUT.read_text()) if OUT.exists() else {}
    write_json(OUT.with_suffix(".environment.json"), environment(1, text))
    for seed, name in product(SEEDS, names or ARMS):
        rows = found.setdefault(name, [])
        for lr in rates_of(rows, ARMS[name], seed):
            if not any((row["seed"], row["lr"]) == (seed, lr) for row in rows):
                rows.append(train(replace(config, seed=seed), ARMS[name], lr, text))
                print(f"{name:32}", rows[-1], flush=True)
                write_json(OUT, found)


if __name__ == "__main__":
    main(sys.argv[1:])
