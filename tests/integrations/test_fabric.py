import pytest

pytest.importorskip("lightning", reason="lightning is not installed")

from tests.integrations.example import equal, load

pytestmark = pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec")  # Lightning's use of torch

example = load("fabric_loop")


@pytest.mark.parametrize(("name", "precision"), [("muon", "32-true"), ("soap", "32-true"), ("muon", "bf16-mixed")])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(name, precision, tmp_path):
    whole = example.main(tmp_path / "whole", name=name, precision=precision)
    stopped = example.main(tmp_path / "parts", stop=3, name=name, precision=precision)
    resumed = example.main(tmp_path / "parts", resume=True, name=name, precision=precision)
    assert not equal(whole, stopped)
    assert equal(whole, resumed)
