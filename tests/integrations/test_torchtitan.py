import pytest
import torch

from tests.integrations.example import equal, load

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized"
)  # so it is


@pytest.fixture(scope="module")
def example():
    return load("torchtitan_style")


@pytest.mark.parametrize("name", ["muon", "soap", "adamw"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(name, example, tmp_path):
    changes = {"name": name, **({"companion_lr": None} if name == "adamw" else {})}
    whole = example.main(tmp_path / "whole", **changes)
    stopped = example.main(tmp_path / "parts", stop=3, **changes)
    resumed = example.main(tmp_path / "parts", resume=True, **changes)
    assert not equal(whole, stopped)
    assert equal(whole, resumed)


def made(example, **changes):
    config, _ = example.read(**changes)
    parts = example.whole([example.Part([0], first=True), example.Part([1], last=True)])
    return parts, example.build_optimizers(parts, config)


def test_the_roles_of_parts_are_those_of_the_whole(example):
    _, optimizer = made(example)
    algorithms = {name: group["algorithm"] for group in optimizer.param_groups for name in group["param_names"]}
    assert algorithms["part0.tok_embeddings.weight"] == algorithms["part1.output.weight"] == "adamw"
    assert algorithms["part0.layers.0.0.weight"] == algorithms["part1.layers.1.1.weight"] == "muon"
    assert {group["lr"] for group in optimizer.param_groups} == {5e-3, 2e-3}


def test_a_wrong_name_in_the_config_is_an_error_that_names_it(example):
    with pytest.raises(ValueError, match="did you mean 'muon'"):
        made(example, name="mouon")


def test_groups_that_were_saved_without_names_are_those_in_the_same_place(example):
    """torchtitan 0.3 flattens a checkpoint by itself, and leaves the names out when it puts it together again."""
    parts, optimizer = made(example)
    for p in parts.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    del saved["names"]
    _, other = made(example)
    other.load_state_dict(saved)
    assert all(map(torch.equal, momenta(optimizer), momenta(other)))

    with pytest.raises(ValueError, match=r"parameter 0: .* in the checkpoint, absent here"):
        made(example, name="adamw", companion_lr=None)[1].load_state_dict(saved)


def momenta(optimizer):
    first = optimizer.param_groups[0]
    assert first["algorithm"] == "muon"
    return [optimizer.state[p]["momentum_buffer"] for p in first["params"]]
