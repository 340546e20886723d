"""What bases that have not seen their gradient cost: `overlap=True` and rare refreshes on the demo's job.

`python benchmarks/stale_bases.py` trains the demo's model with SOAP, while the learning rate warms up for fewer or more
steps and through a gradient spike, and saves. Half an hour on one core.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from emerging_optimizers.lab.config import TUNED, TrainConfig
from emerging_optimizers.lab.data import load_text
from emerging_optimizers.lab.record import environment, write_json
from emerging_optimizers.lab.train import train_one

OUT = Path(__file__).parent / "results" / "stale_bases.json"
SEEDS = (0, 1)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"overlap": True},
    {"precondition_frequency": 10},
    {"precondition_frequency": 10, "max_update_rms": 1.0},
    {"precondition_frequency": 10, "max_update_rms": 0.3},
)
JOBS: dict[str, dict[str, Any]] = {
    "warm-up 10": {},
    "warm-up 40": {"warmup": 40},
    "warm-up 80": {"warmup": 80},
    "warm-up 10, spike": {"spike_at": 60, "spike_scale": 1000.0},
}


def main() -> None:
    """Train, show, save."""
    torch.set_num_threads(1)
    rows = []
    text = load_text(None, TrainConfig().context)
    arm = TUNED["soap"]
    for options in OPTIONS:
        for job, changes in JOBS.items():
            losses = []
            for seed in SEEDS:
                config = replace(TrainConfig(), seed=seed, **changes)
                run = train_one(config, "soap", replace(arm, options={**arm.options, **options}), text)
                losses.append(round(run.final_loss, 4))
            rows.append({"options": options, "job": job, "losses": losses})
            print(rows[-1], flush=True)
    write_json(OUT, rows)
    write_json(OUT.with_suffix(".environment.json"), environment(1, text))


if __name__ == "__main__":
    main()
