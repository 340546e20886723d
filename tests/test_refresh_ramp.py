"""`refresh_ramp`: which steps refresh a basis is a function of integers, so most of it is tested without tensors."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emerging_optimizers import SOAP, KLShampoo, estimate
from emerging_optimizers.engine import Phase
from emerging_optimizers.engine.schedule import turns_taken
from emerging_optimizers.lab.spike import SpikeConfig, run_arm
from emerging_optimizers.lab.spike_arms import SpikeArm
from emerging_optimizers.soap.soap import SOAPRule

FIRST = 2  # the step of the first basis
few = settings(max_examples=40, deadline=None)
PERIODS, RAMPS = st.integers(2, 40), st.integers(0, 60)


def refreshed(period: int, ramp: int, turn: int, steps: int) -> list[int]:
    """The steps after that of the first basis in which a matrix is refreshed, as steps since it."""
    rule = SOAPRule(precondition_frequency=period, refresh_ramp=ramp)
    return [k for k in range(1, steps) if rule.schedule.phase(FIRST + k, turn) is Phase.REFRESH]


@few
@given(period=st.integers(1, 40), step=st.integers(1, 500), turn=st.integers(0, 39))
def test_without_a_ramp_a_turn_comes_once_a_period(period: int, step: int, turn: int) -> None:
    for first_step, first in (("adam", 2), ("eigenbasis", 1)):
        phase = SOAPRule(precondition_frequency=period, first_step=first_step).schedule.phase(step, turn % period)
        due = Phase.REFRESH if (step - first + turn % period) % period == 0 else Phase.REUSE
        assert phase is (Phase.FIRST if step == first else due)


@few
@given(ramp=RAMPS, step=st.integers(1, 500))
def test_a_refresh_in_every_step_has_no_ramp(ramp: int, step: int) -> None:
    assert SOAPRule(refresh_ramp=ramp).schedule.phase(step) is (Phase.FIRST if step == FIRST else Phase.REFRESH)


@few
@given(period=PERIODS, ramp=RAMPS, step=st.integers(1, 3000))
def test_of_the_turns_of_a_step_so_many_come_as_the_law_says(period: int, ramp: int, step: int) -> None:
    """The closed form against a float; a half, where it could err, is exact in it."""
    rule = SOAPRule(precondition_frequency=period, refresh_ramp=ramp)
    taken = [rule.schedule.phase(FIRST + step, turn) is Phase.REFRESH for turn in range(period)]
    assert sum(taken) == max(1, min(period, int(period * ramp / step + 0.5)))
    assert sum(taken) == turns_taken(step, period, ramp) - turns_taken(step - 1, period, ramp)


@few
@given(period=PERIODS, ramp=RAMPS, data=st.data())
def test_every_matrix_is_refreshed_in_every_period_and_in_every_step_of_the_ramp(
    period: int, ramp: int, data: st.DataObject
) -> None:
    steps = refreshed(period, ramp, data.draw(st.integers(0, period - 1)), period * (ramp + 3))
    assert steps[:ramp] == list(range(1, ramp + 1))
    gaps = [b - a for a, b in pairwise([0, *steps])]
    assert max(gaps) <= period
    assert gaps[-1] == period  # for good: the ramp is over
    assert all(gap <= 1.5 * step / max(1, ramp) + 1 for step, gap in zip(steps, gaps, strict=True) if ramp)


@few
@given(period=PERIODS, ramp=st.integers(1, 60), turn=st.integers(0, 39), steps=st.integers(1, 1000))
def test_the_number_of_refreshes_is_the_integral_of_the_law(period: int, ramp: int, turn: int, steps: int) -> None:
    """d + d ln(k / d) up to k = d f; rounding to whole turns takes at most a tenth of that away or adds it."""
    dense, thinning = min(steps, ramp), max(1.0, min(steps, ramp * period) / ramp)
    law = dense + ramp * torch.tensor(thinning).log().item() + max(0, steps - ramp * period) / period
    assert len(refreshed(period, ramp, turn % period, steps + 1)) == pytest.approx(law, rel=0.1, abs=1.5)


def test_a_batch_takes_all_turns_and_a_run_goes_on_as_it_would_have() -> None:
    """As many bases as the law says turn in each step, and a checkpoint in the middle changes nothing."""

    def step(optimizer: SOAP, p: torch.nn.Parameter, t: int) -> int:
        before = optimizer.state[p]["Q_L"].clone() if p in optimizer.state else torch.eye(4).repeat(5, 1, 1)
        p.grad = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(t))
        optimizer.step()
        return int(((optimizer.state[p]["Q_L"] - before).abs().amax((-2, -1)) > 0).sum())

    options = {"lr": 0.1, "precondition_frequency": 5, "refresh_ramp": 2}
    p = torch.nn.Parameter(torch.ones(5, 4, 3))
    optimizer = SOAP([p], **options)
    moved = [step(optimizer, p, t) for t in range(1, 9)]
    assert moved[1:] == [5, 5, 5, 3, 3, 2, 2]
    q = torch.nn.Parameter(p.detach().clone())
    resumed = SOAP([q], **options)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for t in range(9, 25):
        assert step(optimizer, p, t) == step(resumed, q, t)
    assert torch.equal(p, q)


def test_an_estimate_is_that_of_the_steps_after_the_ramp() -> None:
    def flops(ramp: int) -> float:
        matrices = [torch.empty(20, 12, device="meta") for _ in range(4)]
        return estimate(matrices, "soap", seconds=False, precondition_frequency=10, refresh_ramp=ramp).flops

    assert flops(20) == flops(0)


@pytest.mark.parametrize("ramp", [-1, 1.5, None, True])
@pytest.mark.parametrize("cls", [SOAP, KLShampoo])
def test_its_range(cls: type[SOAP | KLShampoo], ramp: object) -> None:
    with pytest.raises(ValueError, match=r"refresh_ramp=.* is not allowed; give an integer >= 0"):
        cls([torch.nn.Parameter(torch.ones(3, 2))], lr=0.1, refresh_ramp=ramp)


@pytest.mark.parametrize("name", ["soap", "rekls"])
@pytest.mark.parametrize("ramp", [0, 10])
def test_after_a_spike_no_update_is_twice_the_largest_before_it(name: str, ramp: int) -> None:
    """At 128 x 64, over two seeds and spikes of 1e2 to 1e5, at most 1.83 with a ramp as without one."""
    config = SpikeConfig(shape=(48, 32), spike_at=(50,), spike_scale=(1e2, 1e5), steps=100)
    options = {"precondition_frequency": 10, "refresh_ramp": ramp}
    _, *spiked = run_arm(config, name, SpikeArm(optimizer=name, options=options)).trajectories
    for run in spiked:
        assert max(run.rms[51:]) < 2 * max(run.rms[20:50])
