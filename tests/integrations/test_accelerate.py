import pytest

pytest.importorskip("accelerate", reason="accelerate is not installed")

from tests.integrations.example import equal, load

example = load("accelerate_loop")


@pytest.mark.parametrize("name", ["soap", "muon"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(name, tmp_path):
    whole = example.main(tmp_path / "whole", name=name)
    stopped = example.main(tmp_path / "parts", stop=3, name=name)
    resumed = example.main(tmp_path / "parts", resume=True, name=name)
    assert not equal(whole, stopped)
    assert equal(whole, resumed)
