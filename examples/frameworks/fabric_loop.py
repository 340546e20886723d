"""A loop of your own under Lightning Fabric, with Muon: accumulation, clipping, a schedule, save, resume.

    python examples/frameworks/fabric_loop.py

Needs lightning.
"""

import tempfile
from pathlib import Path

import torch
from lightning.fabric import Fabric, seed_everything
from torch import nn
from torch.utils.data import DataLoader

from emerging_optimizers import create_optimizer

STEPS = 8  # of the optimizer; each takes two batches


def main(folder, stop=None, resume=False, name="muon", lr=5e-3, precision="32-true"):
    """Train for STEPS steps, or until `stop`; return the weights."""
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    seed_everything(0, verbose=False)
    model = nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 64))
    tokens = torch.randint(64, (16 * STEPS,))
    optimizer = create_optimizer(name, model, lr=lr)  # of the plain model; setup wraps both
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    model, optimizer = fabric.setup(model, optimizer)
    data = fabric.setup_dataloaders(DataLoader(tokens, batch_size=8))

    file = Path(folder, "checkpoint.ckpt")
    state = {"model": model, "optimizer": optimizer, "schedule": schedule.state_dict(), "done": 0}
    if resume:
        fabric.load(file, state)
        schedule.load_state_dict(state["schedule"])
    for index, batch in enumerate(data):
        if index < 2 * state["done"]:
            continue
        accumulating = index % 2 == 0
        with fabric.no_backward_sync(model, enabled=accumulating):
            fabric.backward(nn.functional.cross_entropy(model(batch), batch) / 2)
        if accumulating:
            continue
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        state["done"] += 1
        if state["done"] == stop:
            fabric.save(file, {**state, "schedule": schedule.state_dict()})
            break
    return {name: p.detach().clone() for name, p in model.named_parameters()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        whole = main(Path(scratch, "whole"))
        main(Path(scratch, "parts"), stop=3)
        resumed = main(Path(scratch, "parts"), resume=True)
    print("resumed run equal:", all(torch.equal(whole[name], resumed[name]) for name in whole))
