"""What the policies of `clip_gradients` do to a run with bad batches: a small GPT on the demo's text, Muon with AdamW.

`python -m benchmarks.clipping` trains without clipping, with one norm of all gradients, and with one for each rule, and
saves after each run. In every 20th of 100 steps the targets are random tokens, and the loss counts 100 times.
"""

import json
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from emerging_optimizers.clipping import clip_gradients
from emerging_optimizers.lab.config import TrainConfig
from emerging_optimizers.lab.data import load_text
from emerging_optimizers.lab.record import environment, write_json
from emerging_optimizers.lab.train import evaluate, lr_factor, make_model, make_optimizer

OUT = Path(__file__).parent / "results" / "clipping.json"
SEEDS = (0, 1, 2)
STEPS, EVERY, TIMES, MAX_NORM = 100, 20, 100.0, 1.0
SIZE: dict[str, Any] = {
    "width": 32,
    "depth": 2,
    "heads": 2,
    "batch": 8,
    "context": 32,
    "warmup": 10,
    "eval_windows": 64,
}
ARMS = {"none": None, "global": "global", "rule": "rule"}


def run(seed: int, policy: str | None, bad: bool) -> dict[str, object]:
    """The held-out loss at the end, and the norms of the last step."""
    config = TrainConfig(optimizers=("muon",), steps=STEPS, seed=seed, **SIZE)
    text = load_text(None, config.context)
    model = make_model(config, text)
    optimizer = make_optimizer("muon", config.arm("muon"), model)
    schedule = LambdaLR(optimizer, lambda done: lr_factor(config, done))
    for step in range(STEPS):
        ids, targets = text.batch(seed, step, config.batch, config.context)
        spoilt = bad and step % EVERY == EVERY - 1
        if spoilt:
            targets = targets.flatten()[torch.randperm(targets.numel())].view_as(targets)
        loss = model.loss(ids, targets) * (TIMES if spoilt else 1.0)
        optimizer.zero_grad()
        loss.backward()
        norms = {} if policy is None else clip_gradients(optimizer, MAX_NORM, policy)
        optimizer.step()
        schedule.step()
    found = evaluate(model, *text.held_out(config.eval_windows, config.context))
    return {"loss": round(found, 4), "norms": {key: round(x.item(), 3) for key, x in norms.items()}}


def main() -> None:
    """Run what is not there yet."""
    torch.set_num_threads(1)
    saved = json.loads(OUT.read_text()) if OUT.exists() else {"environment": environment(1), "runs": {}}
    for bad, seed, (name, policy) in product((True, False), SEEDS, ARMS.items()):
        key = f"{name}, {'bad batches' if bad else 'clean'}, seed {seed}"
        if key not in saved["runs"]:
            torch.manual_seed(seed)
            saved["runs"][key] = run(seed, policy, bad)
            write_json(OUT, saved)


if __name__ == "__main__":
    main()
