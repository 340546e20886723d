"""What momentum in bfloat16 and in 8 bits does to the loss of the demo, to bytes of state, and to the time of a step.

`python benchmarks/state_dtype.py` trains the model of the demo with each `state_dtype`, times steps of all in turns and
saves; what is held already is not done again.
"""

import json
import statistics
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from emerging_optimizers.lab.config import TUNED, TrainConfig
from emerging_optimizers.lab.data import Text, load_text
from emerging_optimizers.lab.record import environment, write_json
from emerging_optimizers.lab.train import make_model, make_optimizer, train_one

OUT = Path(__file__).parent / "results" / "state_dtype.json"
SEEDS = (0, 1, 2)
OPTIMIZERS = ("adamw", "muon", "soap", "rekls")
ARMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"state_dtype": "int8"},
    "bfloat16": {"state_dtype": torch.bfloat16},
}
# Timed only, as their numbers are the same.
COMPILED = {f"{arm}, compiled": {**ARMS[arm], "execution": "compiled"} for arm in ("float32", "int8")}
SIZES: dict[str, dict[str, int]] = {"demo": {}, "width 512, depth 4": {"width": 512, "depth": 4, "heads": 8}}
TIMED = (*(("demo", name) for name in OPTIMIZERS[:3]), ("width 512, depth 4", "adamw"), ("width 512, depth 4", "muon"))
ROUNDS = 20


def train(config: TrainConfig, name: str, arm: str, text: Text) -> dict[str, Any]:
    """The demo's job."""
    tuned = TUNED[name]
    run = train_one(config, name, replace(tuned, options={**tuned.options, **ARMS[arm]}), text)
    return {
        "optimizer": name,
        "seed": config.seed,
        "state": arm,
        "loss": round(run.final_loss, 4),
        "state_bytes": run.state_bytes,
    }


def step_times(config: TrainConfig, name: str, text: Text) -> dict[str, Any]:
    """CPU milliseconds of a step of the optimizer and of forward and backward, the arms in turns."""
    made = {}
    for arm, options in {**ARMS, **(COMPILED if name == "adamw" else {})}.items():
        model = make_model(config, text)
        tuned = replace(TUNED[name], options={**TUNED[name].options, **options})
        made[arm] = model, make_optimizer(name, tuned, model)
    found: dict[str, list[float]] = {arm: [] for arm in made}
    model_s: list[float] = []
    for turn in range(ROUNDS + 3):
        batch = text.batch(0, turn + 1, config.batch, config.context)
        for arm, (model, optimizer) in made.items():
            optimizer.zero_grad()
            before = time.process_time()
            model.loss(*batch).backward()
            between = time.process_time()
            optimizer.step()
            if turn >= 3:
                model_s.append(between - before)
                found[arm].append(time.process_time() - between)
    ms = {arm: round(1e3 * statistics.median(times), 3) for arm, times in found.items()}
    return {"optimizer": name, "step_ms": ms, "model_ms": round(1e3 * statistics.median(model_s), 1)}


def main() -> None:
    """Train, time, show, save."""
    torch.set_num_threads(1)
    config = TrainConfig()
    text = load_text(None, config.context)
    found: dict[str, list[dict[str, Any]]] = (
        json.loads(OUT.read_text()) if OUT.exists() else {"losses": [], "times": []}
    )
    trained = {(row["optimizer"], row["seed"], row["state"]) for row in found["losses"]}
    timed = {(row["size"], row["optimizer"]) for row in found["times"]}
    for size, name in TIMED:
        if (size, name) not in timed:
            found["times"].append({"size": size, **step_times(replace(config, **SIZES[size]), name, text)})
            print(found["times"][-1], flush=True)
            write_json(OUT, found)
    for seed, name, arm in product(SEEDS, OPTIMIZERS, ARMS):
        if (name, seed, arm) not in trained:
            found["losses"].append(train(replace(config, seed=seed), name, arm, text))
            print(found["losses"][-1], flush=True)
            write_json(OUT, found)
    write_json(OUT.with_suffix(".environment.json"), environment(1, text))


if __name__ == "__main__":
    main()
