"""The demo of the README with three seeds, and what AdamW reaches there when more than its rate is tuned.

`python -m benchmarks.headline` trains AdamW on the demo with every rate of RATES, beta2 of BETAS2 and warm-up of
WARMUPS, on seed 0; the three best run with seeds 1 and 2 too, and the lowest mean is AdamW at its best. AdamW, Muon and
SOAP as `make demo` has them run with the same seeds. benchmarks/results/headline.json holds every run, and what it
holds is not run again.
"""

import statistics
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from emerging_optimizers.lab.config import TrainConfig
from emerging_optimizers.lab.data import load_text
from emerging_optimizers.lab.record import environment, read_json, write_json
from emerging_optimizers.lab.train import train_one

OUT = Path(__file__).parent / "results" / "headline.json"
SEEDS, FINALISTS = (0, 1, 2), 3
RATES, BETAS2, WARMUPS = (1e-3, 2e-3, 4e-3), (0.9, 0.95, 0.99), (10, 50)
DEMO = TrainConfig()


def main() -> None:
    """Train what is missing, save, show."""
    torch.set_num_threads(1)
    text = load_text(None, DEMO.context)
    runs: list[dict[str, Any]] = list(read_json(OUT)["runs"]) if OUT.exists() else []

    def loss(optimizer: str, seed: int, **tuned: float) -> float:
        """At the end; `tuned` is the demo's own where it is empty, else lr, beta2 and warmup."""
        run = {"optimizer": optimizer, **tuned, "seed": seed}
        done = next((row for row in runs if {**row, "loss": 0} == {**run, "loss": 0}), None)
        if done is None:
            arm, config = DEMO.arm(optimizer), replace(DEMO, seed=seed, warmup=int(tuned.get("warmup", DEMO.warmup)))
            if tuned:
                arm = replace(arm, lr=tuned["lr"], options={"betas": (0.9, tuned["beta2"])})
            done = {**run, "loss": round(train_one(config, optimizer, arm, text).final_loss, 4)}
            runs.append(done)
            print(done, flush=True)
            write_json(OUT, {"environment": environment(1, text), "runs": runs})
        return float(done["loss"])

    tried = [{"lr": lr, "beta2": beta2, "warmup": warmup} for beta2, warmup, lr in product(BETAS2, WARMUPS, RATES)]
    best = sorted(tried, key=lambda one: loss("adamw", SEEDS[0], **one))[:FINALISTS]
    table = {f"adamw {one}": [loss("adamw", seed, **one) for seed in SEEDS] for one in best}
    table |= {f"{name} of the demo": [loss(name, seed) for seed in SEEDS] for name in DEMO.optimizers}
    for name, losses in table.items():
        print(f"{name:60}", *losses, f"mean {statistics.mean(losses):.3f}")


if __name__ == "__main__":
    main()
