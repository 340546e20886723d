"""What `weight_rounding` does to the demo's loss with bfloat16 weights, to bytes, and to the time of a step.

`python benchmarks/weight_rounding.py` trains the demo's model with float32 weights and, in each way of rounding, with
bfloat16 weights and gradients, times steps of the four in turns, and saves. The model computes in float32 from the
weights that are stored, so that nothing differs but them.
"""

import json
import statistics
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import LambdaLR

from emerging_optimizers.lab.config import TUNED, TrainConfig
from emerging_optimizers.lab.data import Text, load_text
from emerging_optimizers.lab.model import GPT
from emerging_optimizers.lab.record import environment, write_json
from emerging_optimizers.lab.train import lr_factor, make_model, make_optimizer

OUT = Path(__file__).parent / "results" / "weight_rounding.json"
SEEDS = (0, 1, 2)
OPTIMIZERS = ("adamw", "muon", "soap")
# Of the weights, and how they are rounded.
ARMS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    **{
        rounding: (torch.bfloat16, {"weight_rounding": rounding})
        for rounding in ("nearest", "stochastic", "compensated")
    },
}
SIZES: dict[str, dict[str, int]] = {"demo": {}, "width 512, depth 4": {"width": 512, "depth": 4, "heads": 8}}
TIMED = (*(("demo", name) for name in OPTIMIZERS), ("width 512, depth 4", "adamw"), ("width 512, depth 4", "muon"))
ROUNDS = 20


class _Model(nn.Module):
    """`GPT.loss` as `functional_call` wants it."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Of a batch."""
        return self.model.loss(ids_BT, targets_BT)


def loss_of(model: GPT, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of a model, computed in float32 from weights of any precision."""
    module = _Model(model)
    loss: Tensor = functional_call(module, {name: p.float() for name, p in module.named_parameters()}, batch)
    return loss


def made(config: TrainConfig, name: str, arm: str, text: Text) -> tuple[GPT, torch.optim.Optimizer]:
    """The model and the optimizer of an arm."""
    dtype, options = ARMS[arm]
    model = make_model(config, text).to(dtype)
    return model, make_optimizer(name, replace(TUNED[name], options={**TUNED[name].options, **options}), model)


def bytes_of(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Of weights and state."""
    state = [x for entry in optimizer.state.values() for x in entry.values() if torch.is_tensor(x)]
    return {"weight_bytes": sum(p.nbytes for p in model.parameters()), "state_bytes": sum(x.nbytes for x in state)}


def train(config: TrainConfig, name: str, arm: str, text: Text) -> dict[str, Any]:
    """The demo's job."""
    model, optimizer = made(config, name, arm, text)
    schedule = LambdaLR(optimizer, lambda done: lr_factor(config, done))
    for step in range(1, config.steps + 1):
        loss = loss_of(model, text.batch(config.seed, step, config.batch, config.context))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    ids, targets = text.held_out(config.eval_windows, config.context)
    with torch.no_grad():
        losses = [float(loss_of(model, pair)) for pair in zip(ids.split(64), targets.split(64), strict=True)]
    sizes = [len(part) for part in ids.split(64)]
    final = sum(x * n for x, n in zip(losses, sizes, strict=True)) / sum(sizes)
    return {
        "optimizer": name,
        "seed": config.seed,
        "weights": arm,
        "loss": round(final, 4),
        **bytes_of(model, optimizer),
    }


def step_times(config: TrainConfig, name: str, text: Text) -> dict[str, Any]:
    """CPU milliseconds of a step alone and of the model's pass, and what a step is of float32's, the arms in turns.

    A ratio is the median of those of single turns, since what else the machine does changes from turn to turn.
    """
    arms = {arm: made(config, name, arm, text) for arm in ARMS}
    steps: dict[str, list[float]] = {arm: [] for arm in arms}
    passes: list[float] = []
    for turn in range(ROUNDS + 3):
        batch = text.batch(0, turn + 1, config.batch, config.context)
        for arm, (model, optimizer) in arms.items():
            optimizer.zero_grad()
            before = time.process_time()
            loss_of(model, batch).backward()
            between = time.process_time()
            optimizer.step()
            if turn >= 3:
                passes.append(between - before)
                steps[arm].append(time.process_time() - between)
    pass_s = statistics.median(passes)

    def ratios(rest: float) -> dict[str, float]:
        """Of the arms, where `rest` seconds come to each step."""
        return {
            arm: round(
                statistics.median((x + rest) / (y + rest) for x, y in zip(own, steps["float32"], strict=True)), 3
            )
            for arm, own in steps.items()
        }

    return {
        "optimizer": name,
        "step_ms": {arm: round(1e3 * statistics.median(own), 3) for arm, own in steps.items()},
        "step_ratio": ratios(0),
        "model_ms": round(1e3 * pass_s, 1),
        "ratio_with_the_pass": ratios(pass_s),
    }


def main() -> None:
    """Train, time, show, save; what is held already is not done again."""
    torch.set_num_threads(1)
    config = TrainConfig()
    text = load_text(None, config.context)
    found: dict[str, list[dict[str, Any]]] = (
        json.loads(OUT.read_text()) if OUT.exists() else {"losses": [], "times": []}
    )
    trained = {(row["optimizer"], row["seed"], row["weights"]) for row in found["losses"]}
    timed = {(row["size"], row["optimizer"]) for row in found["times"]}
    for seed, name, arm in product(SEEDS, OPTIMIZERS, ARMS):
        if (name, seed, arm) not in trained:
            found["losses"].append(train(replace(config, seed=seed), name, arm, text))
            print(found["losses"][-1], flush=True)
            write_json(OUT, found)
    for size, name in TIMED:
        if (size, name) not in timed:
            found["times"].append({"size": size, **step_times(replace(config, **SIZES[size]), name, text)})
            print(found["times"][-1], flush=True)
            write_json(OUT, found)
    write_json(OUT.with_suffix(".environment.json"), environment(1, text))


if __name__ == "__main__":
    main()
