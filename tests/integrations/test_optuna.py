import pytest

pytest.importorskip("optuna", reason="optuna is not installed")

from tests.integrations.example import equal, load

example = load("optuna_sweep")


def test_a_sweep_that_goes_on_finds_the_same_weights(tmp_path):
    whole = example.main(tmp_path / "whole")
    example.main(tmp_path / "parts", stop=4)
    assert len(list((tmp_path / "parts").glob("*.pt"))) <= 4
    resumed = example.main(tmp_path / "parts", resume=True)
    assert equal(whole, resumed)
