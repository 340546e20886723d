"""A config in the style of torchtitan, and one optimizer for several model parts: trains, saves, resumes.

    python examples/frameworks/torchtitan_style.py

Needs neither torchtitan nor several processes. The parts of a pipeline run one after the other, and are saved by
torch.distributed.checkpoint. The config is torchtitan_config.toml.
"""

import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from emerging_optimizers import create_optimizer

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass(kw_only=True)
class OptimizerConfig:
    """The section [optimizer]: torchtitan's fields, and a rate of its own for AdamW."""

    name: str = "muon"
    lr: float = 4e-3
    companion_lr: float | None = None
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    implementation: str = "fused"


def whole(model_parts):
    """All parts under one roof, so that roles are found in the whole: a head is as tall as another part's table."""
    return nn.ModuleDict({f"part{k}": part for k, part in enumerate(model_parts)})


def build_optimizers(parts, config):
    """One optimizer for all parts, as the config says."""
    adams = {"betas": (config.beta1, config.beta2), "eps": config.eps}
    return create_optimizer(
        config.name,
        parts,
        lr=config.lr,
        companion_lr=config.companion_lr,
        weight_decay=config.weight_decay,
        fused=config.implementation == "fused",  # torch's arguments that mean nothing here may be given
        foreach=config.implementation == "foreach",
        **(adams if config.name == "adamw" else {"companion_options": adams}),
    )


class Part(nn.Module):
    """Some layers of a decoder, with the embedding if it is the first part and the head if it is the last."""

    def __init__(self, layers, first=False, last=False):
        super().__init__()
        self.tok_embeddings = nn.Embedding(64, 16) if first else None
        self.layers = nn.ModuleDict({str(k): nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16)) for k in layers})
        self.output = nn.Linear(16, 64, bias=False) if last else None

    def forward(self, x):
        """Tokens or hidden states, to hidden states or logits."""
        h = x if self.tok_embeddings is None else self.tok_embeddings(x)
        for up, down in self.layers.values():
            h = h + down(nn.functional.gelu(up(h)))
        return h if self.output is None else self.output(h)


def read(**changes):
    """The sections of the config, with changes of [optimizer]."""
    sections = tomllib.loads(Path(__file__).with_name("torchtitan_config.toml").read_text())
    return OptimizerConfig(**{**sections["optimizer"], **changes}), sections


def main(folder, stop=None, resume=False, **changes):
    """Train as the config says, or until `stop`; return the weights."""
    config, sections = read(**changes)
    steps, warmup = sections["training"]["steps"], sections["lr_scheduler"]["warmup_steps"]
    torch.manual_seed(0)
    parts = whole([Part([0], first=True), Part([1, 2]), Part([3], last=True)])
    optimizer = build_optimizers(parts, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warmup + 1)))
    batches = torch.randint(64, (steps, 8))

    def state():
        flat = get_optimizer_state_dict(parts, optimizer, options=FLAT)
        return {"model": parts.state_dict(), "optimizer": flat, "schedule": schedule.state_dict()}

    done = 0
    if resume:
        saved = state()  # what dcp fills in place
        dcp.load(saved, checkpoint_id=folder)
        parts.load_state_dict(saved["model"])
        set_optimizer_state_dict(parts, optimizer, saved["optimizer"], options=FLAT)
        schedule.load_state_dict(saved["schedule"])
        done = schedule.last_epoch
    for tokens in batches[done:stop]:
        h = tokens
        for part in parts.values():
            h = part(h)
        nn.functional.cross_entropy(h, tokens).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    if stop is not None:
        dcp.save(state(), checkpoint_id=folder)
    return {name: p.detach().clone() for name, p in parts.named_parameters()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        straight = main(Path(scratch, "whole"))
        main(Path(scratch, "parts"), stop=3)
        resumed = main(Path(scratch, "parts"), resume=True)
    print("resumed run equal:", all(torch.equal(straight[name], resumed[name]) for name in straight))
