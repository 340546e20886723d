"""What `SpikeWatch` costs on the lab's training job: `python benchmarks/watch_cost.py`.

Two copies of a run take their steps in turn, one of them watched at its default interval. A block is as many steps as
lie between two observations, so it holds one. The overhead is the ratio of the medians over blocks of CPU seconds, less
one: of `optimizer.step` with its hooks, and of the whole step (forward, backward, optimizer).
"""

import json
import time
from pathlib import Path
from statistics import median

import torch

from emerging_optimizers import SpikeWatch
from emerging_optimizers.lab.config import TrainConfig
from emerging_optimizers.lab.data import load_text
from emerging_optimizers.lab.record import environment, write_json
from emerging_optimizers.lab.train import make_model, make_optimizer

OUT = Path(__file__).parent / "results" / "watch_cost.json"
BLOCKS = {"adamw": 7, "muon": 7, "soap": 4}
WARMUP = 5


def measure(name: str) -> dict[str, float]:
    """Medians of one optimizer, in milliseconds a step."""
    blocks, config = BLOCKS[name], TrainConfig()
    text = load_text(config.text, config.context)
    runs = []
    for watched in (False, True):
        model = make_model(config, text)
        optimizer = make_optimizer(name, config.arm(name), model)
        watch = SpikeWatch(optimizer, on_alarm=lambda alarm: None) if watched else None
        runs.append((model, optimizer, watch))
    every = runs[1][2].every
    seconds = torch.zeros(2, 2, blocks)  # plain and watched; optimizer and whole step; block
    for step in range(1, WARMUP + blocks * every + 1):
        batch = text.batch(config.seed, step, config.batch, config.context)
        for kind, (model, optimizer, _) in enumerate(runs):
            begin = time.process_time()
            loss = model.loss(*batch)
            optimizer.zero_grad()
            loss.backward()
            before = time.process_time()
            optimizer.step()
            end = time.process_time()
            if step > WARMUP:
                block = (step - WARMUP - 1) // every
                seconds[kind, :, block] += torch.tensor([end - before, end - begin])
    result = {"every": every, "blocks": blocks}
    for part, what in enumerate(("optimizer_step", "whole_step")):
        plain, watched = (1000 * median(seconds[kind, part].tolist()) / every for kind in (0, 1))
        result |= {f"{what}_ms": plain, f"{what}_watched_ms": watched, f"{what}_overhead": watched / plain - 1}
    return {key: round(value, 4) for key, value in result.items()}


def main() -> None:
    """Measure, show, save."""
    torch.set_num_threads(1)
    results = {}
    for name in BLOCKS:
        results[name] = measure(name)
        print(name, json.dumps(results[name]), flush=True)
    write_json(OUT, results)
    write_json(OUT.with_suffix(".environment.json"), environment(1, load_text(None, TrainConfig().context)))


if __name__ == "__main__":
    main()
