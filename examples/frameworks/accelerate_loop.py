"""A loop of your own under Hugging Face Accelerate, with SOAP: gradient accumulation, a schedule, save, resume.

    python examples/frameworks/accelerate_loop.py

Needs accelerate.
"""

import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader

from emerging_optimizers import create_optimizer

STEPS = 8  # of the optimizer; each takes two batches


def main(folder, stop=None, resume=False, name="soap", max_norm=1.0):
    """Train for STEPS steps, or until `stop`; return the weights."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    set_seed(0)
    model = nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 64))
    data = DataLoader(torch.randint(64, (16 * STEPS,)), batch_size=8)
    optimizer = create_optimizer(name, model, lr=5e-3)  # before prepare, which does not change the parameters here
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    model, optimizer, data, schedule = accelerator.prepare(model, optimizer, data, schedule)

    done = 0
    if resume:
        accelerator.load_state(folder)
        done = schedule.scheduler.last_epoch
        data = accelerator.skip_first_batches(data, 2 * done)
    for tokens in data:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(tokens), tokens)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), max_norm)
                done += 1
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients and done == stop:
            accelerator.save_state(folder)
            break
    return {name: p.detach().clone() for name, p in accelerator.unwrap_model(model).named_parameters()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        whole = main(Path(scratch, "whole"))
        main(Path(scratch, "parts"), stop=3)
        resumed = main(Path(scratch, "parts"), resume=True)
    print("resumed run equal:", all(torch.equal(whole[name], resumed[name]) for name in whole))
