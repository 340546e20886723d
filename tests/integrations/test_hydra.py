import pytest
import torch

pytest.importorskip("hydra", reason="hydra-core is not installed")

from tests.integrations.example import equal, load

example = load("hydra_train")


@pytest.mark.parametrize("overrides", [(), ("optimizer.name=muon", "~optimizer.betas")], ids=["soap", "muon"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(overrides, tmp_path):
    whole = example.main(tmp_path / "whole", overrides=overrides)
    stopped = example.main(tmp_path / "parts", stop=3, overrides=overrides)
    resumed = example.main(tmp_path / "parts", resume=True, overrides=overrides)
    assert not equal(whole, stopped)
    assert equal(whole, resumed)


def test_the_config_is_followed_and_leaves_no_types_of_its_own_in_the_checkpoint(tmp_path):
    example.main(tmp_path)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["optimizer"]
    groups = {names[0]: group for names, group in zip(saved["names"], saved["param_groups"], strict=True)}
    assert groups["1.weight"]["betas"] == (0.9, 0.95)
    assert type(groups["1.weight"]["betas"]) is tuple
    assert groups["3.weight"]["initial_lr"] == 2e-3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.betas=[0.9,1.5]", "betas=.* is not allowed"),
        ("optimizer.name=mouon", "did you mean 'muon'"),
        ("+optimizer.bettas=1", "bettas"),
    ],
)
def test_a_wrong_config_is_an_error_that_names_it(override, message, tmp_path):
    with pytest.raises(Exception, match=message):
        example.main(tmp_path, overrides=[override])
