"""QK-Clip on several processes: maxima count together, and each scales what lies on it."""

import math

import pytest

from tests.distributed.processes import run
from tests.qk_clip import models

# Maxima of products in float32 of about 10, of which tensor parallelism adds the parts of the layer before in another
# order: 1e-5 of the factors at most.
TOLERANCE = 1e-5


@pytest.mark.parametrize("kind", ["replicated", "fsdp", "tensor_parallel"])
def test_two_processes_are_as_one(kind):
    check(kind, run(2, models.compared, kind))


@pytest.mark.slow  # two processes are in every run
@pytest.mark.parametrize("kind", ["hsdp", "both"])
def test_four_processes_are_as_one(kind):
    check(kind, run(4, models.compared, kind))


def check(kind, found):
    for one in found:
        assert one["error"] < TOLERANCE
        here, whole = one["maxima"]
        assert all(here[name] == pytest.approx(whole[name], rel=TOLERANCE) for name in whole)
        assert one["events"][0] == one["events"][1] != {}
        assert one["local"]["0.q_proj.weight"] == {"replicated": (16, 16), "both": (4, 16)}.get(kind, (8, 16))


def test_logits_that_are_not_finite_on_one_process_clip_nothing():
    assert run(2, models.of_nan) == [({"0": [math.inf] * 4}, {})] * 2


def test_other_modules_on_another_process_are_an_error():
    assert all(
        "the processes have different attention modules; give as group=" in said for said in run(2, models.differing)
    )
