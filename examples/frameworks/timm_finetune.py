"""timm's `create_optimizer_v2` with Muon and layer decay, under timm's schedule: trains a tiny ViT, saves, resumes.

    python examples/frameworks/timm_finetune.py

Needs timm. No download: the model starts at random.
"""

import tempfile
from pathlib import Path

import torch
from timm.models import VisionTransformer
from timm.scheduler import CosineLRScheduler
from torch import nn

from emerging_optimizers.integrations.timm import create_optimizer_v2  # in place of timm.optim's

STEPS = 8


def make_model():
    """A ViT of two layers."""
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=8)


def main(folder, stop=None, resume=False, opt="muon", lr=5e-3, **arguments):
    """Train for STEPS steps, or until `stop`; return the weights."""
    torch.manual_seed(0)
    model = make_model()
    images, labels = torch.randn(STEPS, 8, 3, 16, 16), torch.randint(8, (STEPS, 8))
    optimizer = create_optimizer_v2(model, opt=opt, lr=lr, weight_decay=0.05, **{"layer_decay": 0.75, **arguments})
    schedule = CosineLRScheduler(optimizer, t_initial=STEPS, warmup_t=2, warmup_lr_init=1e-4, t_in_epochs=False)

    file = Path(folder, "checkpoint.pt")
    done = 0
    if resume:
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["done"]
    schedule.step_update(done)
    for step in range(done, STEPS if stop is None else stop):
        nn.functional.cross_entropy(model(images[step]), labels[step]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step_update(step + 1)
    Path(folder).mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": step + 1}, file)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        whole = main(Path(scratch, "whole"))
        main(Path(scratch, "parts"), stop=3)
        resumed = main(Path(scratch, "parts"), resume=True)
    print("resumed run equal:", all(torch.equal(whole[name], resumed[name]) for name in whole))
