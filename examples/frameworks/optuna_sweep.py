"""A sweep over optimizers and learning rates with Optuna: prunes, saves, is stopped, goes on.

    python examples/frameworks/optuna_sweep.py

Needs optuna.
"""

import tempfile
from pathlib import Path

import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from torch import nn

from emerging_optimizers import create_optimizer
from emerging_optimizers.registry import entry

STEPS = 12
GRID = {"name": ["adamw", "muon", "soap"], "factor": [0.5, 1.0, 2.0]}


def train(trial, folder):
    """The loss of one trial; its model and optimizer are saved."""
    name, factor = (trial.suggest_categorical(key, values) for key, values in GRID.items())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 64))
    # Rates differ between optimizers, so the sweep is over factors on the rate to start from.
    optimizer = create_optimizer(name, model, lr=factor * entry(name).start)
    loss = torch.tensor(0.0)
    for step, tokens in enumerate(torch.randint(64, (STEPS, 32))):
        loss = nn.functional.cross_entropy(model(tokens), tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        trial.report(loss.item(), step)
        if trial.should_prune():
            raise optuna.TrialPruned
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / f"{trial.number}.pt")
    return loss.item()


def main(folder, stop=None, resume=False):
    """Run the grid, or `stop` trials of it; return the weights of the best trial."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / "study.log"))),
        study_name="optimizers",
        load_if_exists=resume,
        sampler=optuna.samplers.GridSampler(GRID, seed=0),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=STEPS // 2),
    )
    study.optimize(lambda trial: train(trial, folder), n_trials=stop)
    return torch.load(folder / f"{study.best_trial.number}.pt", weights_only=True)["model"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        whole = main(Path(scratch, "whole"))
        main(Path(scratch, "parts"), stop=4)
        resumed = main(Path(scratch, "parts"), resume=True)
    print("resumed sweep finds the same weights:", all(torch.equal(whole[name], resumed[name]) for name in whole))
