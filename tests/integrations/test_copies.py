"""What sends an optimizer to another process (Ray, multiprocessing) or copies it."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from emerging_optimizers import create_optimizer
from emerging_optimizers.integrations.huggingface import optimizer as choice

ROOT = Path(__file__).parents[2]


def made(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 64))
    return model, create_optimizer(name, model, lr=3e-3)


def train(model, optimizer, batches):
    for tokens in batches:
        nn.functional.cross_entropy(model(tokens), tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def batches():
    return torch.randint(64, (6, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["muon", "soap"])
@pytest.mark.parametrize(
    "twice", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_a_model_and_its_optimizer_go_on_together(name, twice):
    pair = made(name)
    train(*pair, batches()[:3])
    twin = twice(pair)
    assert all(torch.equal(a, b) for a, b in zip(train(*pair, batches()[3:]), train(*twin, batches()[3:]), strict=True))


def test_another_process_goes_on_bitwise(tmp_path):
    pair = made("soap")
    train(*pair, batches()[:3])
    (tmp_path / "pair").write_bytes(pickle.dumps(pair))
    code = f"""
import pickle, torch
torch.set_num_threads(1)
from tests.integrations.test_copies import batches, train
with open({str(tmp_path / "pair")!r}, "rb") as file:
    pair = pickle.load(file)
torch.save(train(*pair, batches()[3:]), {str(tmp_path / "weights")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=ROOT)
    there = torch.load(tmp_path / "weights", weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(train(*pair, batches()[3:]), there, strict=True))


def test_the_choice_for_a_trainer_can_be_sent():
    factory, arguments = pickle.loads(pickle.dumps(choice("muon", lr=2e-3)))
    model, _ = made("muon")
    assert factory()(model, **arguments).param_groups[0]["lr"] == 2e-3
