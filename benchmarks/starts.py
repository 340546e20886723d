"""The loss of every optimizer at the rates from which it starts: the figure on its page of the site.

`python -m benchmarks.starts` trains the character GPT of the gallery for 100 steps with each name of
`list_optimizers()`, three seeds, as its page says it: `create_optimizer(name, model)`, nothing tuned, a warm-up of ten
steps. Ten minutes on one core. It saves after every run, and does not repeat what the results hold.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from emerging_optimizers import create_optimizer
from emerging_optimizers.lab.data import load_text
from emerging_optimizers.lab.record import environment, read_json, write_json
from emerging_optimizers.lab.tasks import CONTEXT, OPEN, Task, fit, loss_of
from emerging_optimizers.registry import OPTIMIZERS

OUT = Path(__file__).parent / "results" / "starts.json"
SEEDS, STEPS, EVERY, WARMUP = (1, 2, 3), 100, 5, 10


def run(task: Task, name: str, seed: int) -> dict[str, Any]:
    """One optimizer with one seed: held-out losses after every fifth step, CPU seconds of training."""
    model, held_out = task.make(seed), task.held_out()
    # The one without a rate of its own is SOAP on stacks.
    soap, adamw = OPTIMIZERS["soap"].start, OPTIMIZERS["adamw"].start
    rate = {} if OPTIMIZERS[name].start is not None else {"lr": soap, "companion_lr": adamw}
    optimizer = create_optimizer(name, model, **rate)
    losses, spent, begun = [], 0.0, time.process_time()
    for step in fit(model, optimizer, partial(task.batch, seed), STEPS, WARMUP):
        if step % EVERY == 0:
            spent += time.process_time() - begun
            losses.append(loss_of(model, held_out))
            begun = time.process_time()
    return {"optimizer": name, "seed": seed, "losses": losses, "cpu_seconds": round(spent, 2)}


def main() -> None:
    """Train what is missing, save."""
    torch.set_num_threads(1)
    runs: list[dict[str, Any]] = list(read_json(OUT)["runs"]) if OUT.exists() else []
    done = {(row["optimizer"], row["seed"]) for row in runs}
    task = OPEN["gpt"](None)
    for name in OPTIMIZERS:
        for seed in SEEDS:
            if (name, seed) not in done:
                runs.append(run(task, name, seed))
                write_json(OUT, {"environment": environment(1, load_text(None, CONTEXT)), "every": EVERY, "runs": runs})
                print(runs[-1]["optimizer"], seed, runs[-1]["losses"][-1], runs[-1]["cpu_seconds"], flush=True)


if __name__ == "__main__":
    main()
