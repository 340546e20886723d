"""The optimizer from a Hydra config: trains a tiny model, saves, resumes.

    python examples/frameworks/hydra_train.py optimizer.name=muon '~optimizer.betas'

Needs hydra-core. The config is hydra_config.yaml.
"""

import sys
import tempfile
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn

from emerging_optimizers import create_optimizer  # noqa: F401  # what _target_ names; an import error is clearer here


def main(folder, stop=None, resume=False, overrides=()):
    """Train as the config says, or until `stop`; return the weights."""
    with initialize_config_dir(str(Path(__file__).parent.absolute()), version_base=None):
        config = compose("hydra_config", overrides=list(overrides))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 64))
    batches = torch.randint(64, (config.steps, 8))
    optimizer = instantiate(config.optimizer)(model_or_params=model)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, config.steps)

    file = Path(folder, "checkpoint.pt")
    done = 0
    if resume:
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        done = schedule.last_epoch
    for tokens in batches[done:stop]:
        nn.functional.cross_entropy(model(tokens), tokens).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    Path(folder).mkdir(parents=True, exist_ok=True)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    torch.save({key: part.state_dict() for key, part in parts.items()}, file)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        whole = main(Path(scratch, "whole"), overrides=sys.argv[1:])
        main(Path(scratch, "parts"), stop=3, overrides=sys.argv[1:])
        resumed = main(Path(scratch, "parts"), resume=True, overrides=sys.argv[1:])
    print("resumed run equal:", all(torch.equal(whole[name], resumed[name]) for name in whole))
