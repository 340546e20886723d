"""Pretrain the lab's GPT with every block matrix factorised, by Spectron and by AdamW on the same factors.

    python examples/low_rank_pretraining.py             # a run of 200 steps for each line of the table
    python examples/low_rank_pretraining.py --steps 20  # to try it

Same text, same order of the data, same dense start, which is truncated. The results are kept in OUT as they come, and
a second call goes on from there; `--out` writes elsewhere.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import nn

from emerging_optimizers import AdamW
from emerging_optimizers.lab.config import TrainConfig
from emerging_optimizers.lab.data import load_text
from emerging_optimizers.lab.palette import COLORS, DARK, MARKERS
from emerging_optimizers.lab.record import environment, read_json, write_json
from emerging_optimizers.lab.train import make_model
from emerging_optimizers.lowrank import LowRankLinear, factor_groups, factorize
from emerging_optimizers.orthogonalized_optimizers.spectron import Spectron

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "low_rank.json"
FIGURE = ROOT / "docs" / "images" / "low_rank.png"
RATIOS = (0.25, 0.5)
# The first learning rate is the one to use; the second, four times as large, shows who stays stable.
LEARNING_RATES = {"spectron": (0.1, 0.4), "adamw": (2e-3, 8e-3)}
COMPANION_LR = 4e-3  # of AdamW for embeddings, head and norms beside Spectron, as beside Muon


def make_optimizers(name: str, model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Spectron for the factors and AdamW for the rest, or AdamW for everything."""
    if name == "adamw":
        return [AdamW(model.parameters(), lr=lr)]
    factors = {m.factors for m in model.modules() if isinstance(m, LowRankLinear)}
    rest = [p for p in model.parameters() if p not in factors]
    return [Spectron(factor_groups(model), lr=lr), AdamW(rest, lr=COMPANION_LR)]


def train(config: TrainConfig, name: str, ratio: float, lr: float) -> dict:
    """One run: losses of every step, held-out losses, what it holds in memory."""
    text = load_text(config.text, config.context)
    model = make_model(config, text)
    factorize(model, rank_ratio=ratio, skip=("head",))
    optimizers = make_optimizers(name, model, lr)

    def factor(done: int) -> float:  # linear warm-up, then a linear fall to zero, as in the lab
        return min((done + 1) / config.warmup, (config.steps - done) / (config.steps - config.warmup))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    held_out = text.held_out(config.eval_windows, config.context)
    losses, validation, begin = [], {}, time.process_time()
    for step in range(1, config.steps + 1):
        loss = model.loss(*text.batch(config.seed, step, config.batch, config.context))
        model.zero_grad()
        loss.backward()
        for part in (*optimizers, *schedules):
            part.step()
        losses.append(round(loss.item(), 4))
        if step % config.eval_every == 0 or step == config.steps:
            with torch.no_grad():
                pieces = [
                    model.loss(ids, targets).item()
                    for ids, targets in zip(*(x.split(64) for x in held_out), strict=True)
                ]
            validation[step] = round(sum(pieces) / len(pieces), 4)
    return {
        "optimizer": name,
        "rank_ratio": ratio,
        "lr": lr,
        "parameters": sum(p.numel() for p in model.parameters()),
        "final_loss": validation[config.steps],
        "best_loss": min(validation.values()),
        "largest_rise": round(max(b - min(losses[: i + 1]) for i, b in enumerate(losses)), 4),
        "cpu_s": round(time.process_time() - begin, 1),
        "validation": validation,
        "losses": losses,
    }


def memory(config: TrainConfig, ratio: float) -> dict[str, int]:
    """Bytes of the factorised matrices after one step, with the factors as state (dense) and as weights (native)."""
    text, bytes_of = load_text(config.text, config.context), {}
    for kind in ("dense", "native"):
        model = make_model(config, text)
        if kind == "native":
            factorize(model, rank_ratio=ratio, skip=("head",))
            groups = factor_groups(model)
        else:
            groups = [{"params": [m.weight for m in model.blocks.modules() if isinstance(m, nn.Linear)]}]
        optimizer = Spectron(groups, lr=0.1, rank_ratio=ratio, truncation_tolerance=1.0)
        model.loss(*text.batch(config.seed, 1, config.batch, config.context)).backward()
        optimizer.step()
        state = sum(x.nbytes for entries in optimizer.state.values() for x in entries.values())
        weights = sum(p.nbytes for group in optimizer.param_groups for p in group["params"])
        bytes_of |= {f"{kind}_weight_and_gradient": 2 * weights, f"{kind}_state": state}
    return bytes_of


def plot(runs: list[dict], path: Path) -> None:
    """Loss against parameters, and the training losses of the larger ratio."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for (name, rates), color, marker in zip(LEARNING_RATES.items(), (COLORS[0], DARK), MARKERS, strict=False):
        for lr, line in zip(rates, ("-", "--"), strict=True):
            own = sorted((r for r in runs if (r["optimizer"], r["lr"]) == (name, lr)), key=lambda r: r["parameters"])
            points = [(r["parameters"] / 1e3, r["final_loss"]) for r in own]
            style = {"color": color, "linestyle": line, "label": f"{name}, lr {lr:g}"}
            if points:
                left.plot(*zip(*points, strict=True), marker=marker, **style)
                right.plot(own[-1]["losses"], linewidth=1, **style)
    left.set(
        xlabel="parameters of the model, thousands", ylabel="held-out loss after the last step, nats per character"
    )
    right.set(xlabel="step", ylabel=f"training loss, rank ratio {max(RATIOS):g}", ylim=(1.5, 5))
    right.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Train what is missing, show, save."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", type=int, default=200)
    arguments.add_argument("--out", type=Path, default=OUT)
    arguments.add_argument("--figure", type=Path, default=FIGURE)
    asked = arguments.parse_args()
    torch.set_num_threads(1)
    config = TrainConfig(steps=asked.steps)
    found = read_json(asked.out) if asked.out.exists() else {"steps": config.steps, "memory": {}, "runs": []}
    if found["steps"] != config.steps:
        raise SystemExit(f"{asked.out} holds runs of {found['steps']} steps; give --steps {found['steps']}, or --out")
    plan = [(name, ratio, rates[i]) for i in (0, 1) for ratio in RATIOS for name, rates in LEARNING_RATES.items()]
    done = {(r["optimizer"], r["rank_ratio"], r["lr"]) for r in found["runs"]}
    found["memory"] = {str(ratio): memory(config, ratio) for ratio in RATIOS}
    for run in plan:
        if run not in done:
            found["runs"].append(train(config, *run))
            write_json(asked.out, found)
    write_json(asked.out.with_suffix(".environment.json"), environment(1, load_text(None, config.context)))
    for r in sorted(found["runs"], key=lambda r: (r["rank_ratio"], r["optimizer"], r["lr"])):
        print(
            f"rank ratio {r['rank_ratio']:<5g} {r['optimizer']:<9} lr {r['lr']:<6g} {r['parameters']:>7} parameters  "
            f"loss {r['final_loss']:.3f}  largest rise {r['largest_rise']:.2f}  {r['cpu_s']:.0f} CPU s"
        )
    plot(found["runs"], asked.figure)


if __name__ == "__main__":
    main()
