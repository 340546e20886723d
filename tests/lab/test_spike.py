"""The spike experiment: the published table, the rows of a stack, the JSON, the command."""

import io
import json
import math
import signal

import pytest
import torch
from rich.console import Console

from emerging_optimizers.lab.__main__ import main
from emerging_optimizers.lab.config import UsageError
from emerging_optimizers.lab.experiment import interrupted_behind
from emerging_optimizers.lab.measures import recovery_steps, settled_steps
from emerging_optimizers.lab.present import save, show
from emerging_optimizers.lab.spike import (
    SpikeArmResult,
    SpikeConfig,
    SpikeResult,
    Trajectory,
    run_spike,
)
from emerging_optimizers.lab.spike_arms import RECOVERY, SpikeArm, find_arm
from emerging_optimizers.lab.views.spike import comparison_table, spike_view
from emerging_optimizers.registry import OPTIMIZERS, entry

SCALES = (1e2, 1e3, 1e4, 1e5)

# Steps to recovery of the published library, measured on a CPU; None: not within the run.
ON_CPU = {
    "adamw": {10: (7, 13, 26, 40), 50: (9, 19, 33, 47), 100: (15, 28, 42, 60)},
    "laprop": {10: (4, 4, 4, 4), 50: (1, 1, 1, 1), 100: (1, 1, 1, 1)},
    "muon": {10: (1, 1, 1, 1), 50: (1, 1, 1, 1), 100: (1, 1, 1, 1)},
    "soap-published": {10: (25, 41, 65, 85), 50: (25, 46, 71, 99), 100: (30, 54, 77, 84)},
    "rekls-published": {10: (23, 42, 70, 87), 50: (25, 45, 71, 99), 100: (28, 54, 72, None)},
}
# A spike of 1e5 after 10 steps of REKLS gave 148 on the GPU, and no CPU has come near it.
NOT_REPEATED = ("rekls", 10, 1e5)

SMALL = SpikeConfig(optimizers=("adamw", "soap"), shape=(8, 6), steps=40, spike_at=(10, 20), spike_scale=(1e1, 1e3))


@pytest.fixture(scope="module")
def small() -> SpikeResult:
    return run_spike(SMALL)


@pytest.mark.parametrize("name", ON_CPU)
def test_recovery_agrees_with_the_published_table(name):
    """Within 15 %, or 2 steps, of what the published library needs on a CPU or on a GPU, whichever is nearer.

    20 % for REKLS: its published start follows rounding errors, and one cell moves from 60 to 72 with the BLAS.
    """
    share = 0.2 if name == "rekls-published" else 0.15
    (arm,) = run_spike(SpikeConfig(optimizers=(name,))).arms
    ours = {(row.spike_at, row.spike_scale): row.recovery for row in arm.rows}
    off = {}
    for at in (10, 50, 100):
        for scale, cpu in zip(SCALES, ON_CPU[name][at], strict=True):
            cell = (arm.arm.optimizer, at, scale)
            gpu = None if cell == NOT_REPEATED else RECOVERY[arm.arm.optimizer][at][scale]
            published = [steps for steps in (cpu, gpu) if steps is not None]
            found = ours[at, scale]
            if found is None or min(abs(found - p) - max(2, share * p) for p in published) > 0:
                off[at, scale] = (found, published)
    assert not off


@pytest.mark.parametrize("name", ["adamw", "laprop", "muon", "soap", "rekls"])
def test_a_row_of_a_stack_is_a_run_alone(name):
    spike = (12, 1e3)
    config = SpikeConfig(optimizers=(name,), shape=(16, 8), steps=40, spike_at=(5, 12), spike_scale=(1e2, 1e3))
    (arm,) = run_spike(config).arms

    generator = torch.Generator().manual_seed(0)
    alone = torch.nn.Parameter(torch.zeros(16, 8))
    optimizer = entry(name).load()([alone], lr=1.0, weight_decay=0.0, **find_arm(name).options)
    rms, norms = [], []
    for step in range(40):
        alone.grad = torch.randn(16, 8, generator=generator) * (1e3 if step == 12 else 1)
        before = alone.detach().clone()
        optimizer.step()
        update = before - alone.detach()
        rms.append(update.square().mean().sqrt())
        norms.append(torch.linalg.matrix_norm(update, ord=2))
    row = arm.trajectory(spike)
    torch.testing.assert_close(torch.tensor(row.rms), torch.stack(rms), rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(torch.tensor(row.spectral_norm), torch.stack(norms), rtol=2e-3, atol=1e-5)
    assert arm.trajectory((5, 1e2)).rms[:5] == arm.no_spike.rms[:5]


def test_singular_values_at_the_steps_asked_for(small):
    for arm in small.arms:
        for trajectory in arm.trajectories:
            assert list(trajectory.singular_values) == [10, 11, 20, 21, 31]
            for step, values in trajectory.singular_values.items():
                assert len(values) == 6
                assert list(values) == sorted(values, reverse=True)
                assert values[0] == pytest.approx(trajectory.spectral_norm[step - 1], rel=1e-4)


def test_a_result_comes_back_from_json(small):
    stored = json.loads(json.dumps(small.to_json(), allow_nan=False))
    assert SpikeResult.from_json(stored) == small
    assert [row["aftershock"] for row in stored["table"]] == [row.aftershock for row in small.rows]


def test_the_same_seed_gives_the_same_json(small):
    assert run_spike(SMALL).to_json() == small.to_json()


@pytest.mark.slow  # both processes import torch
def test_more_processes_change_no_number(small):
    assert run_spike(SMALL, processes=2).to_json() == small.to_json()


def test_an_update_that_is_not_finite_is_null_in_json():
    diverged = Trajectory(spike=None, rms=(1.0,), spectral_norm=(math.inf,), singular_values={1: (math.nan,)})
    arm = SpikeArmResult(name="adamw", arm=SpikeArm(optimizer="adamw"), trajectories=(diverged,))
    stored = json.loads(json.dumps(SpikeResult(config=SMALL, arms=(arm,)).to_json(), allow_nan=False))
    (trajectory,) = stored["arms"][0]["trajectories"]
    assert (trajectory["spectral_norm"], trajectory["singular_values"]) == ([None], {"1": [None]})
    assert SpikeResult.from_json(stored).to_json() == stored


def test_measures_of_a_trajectory_that_is_written_down():
    steady = [0.2] * 60
    spiked = [0.2] * 8 + [0.3, 0.2, 0.5, 0.9, 0.21, 4.0, 0.6] + [0.2] * 45

    def trajectory(spike, rms):
        return Trajectory(spike=spike, rms=tuple(rms), spectral_norm=tuple(rms), singular_values={})

    arm = SpikeArmResult(
        name="a",
        arm=SpikeArm(optimizer="a"),
        trajectories=(trajectory(None, steady), trajectory((10, 1e3), spiked)),
    )
    (row,) = arm.rows
    assert (row.before, row.at_spike, row.aftershock) == (0.3, 0.5, 4.0)
    assert (row.recovery, row.settled) == (2, 5)


def test_recovery_counts_from_the_step_after_the_spike():
    assert recovery_steps([9.0] + 40 * [1.0], 0) == 1
    assert settled_steps([9.0] + 40 * [1.0], 0, steady=1.0) == 1
    assert recovery_steps([1.0, 9.0, 0.0, 30.0], 1) is None
    assert settled_steps([1.0, 9.0, 1.0, 3.0], 1, steady=1.0) is None


def test_the_command_writes_result_and_figures(tmp_path, capsys):
    words = "--optimizers adamw,lion,rekls-published --shape 8 6 --steps 40 --spike-at 10 20 --spike-scale 100 1000"
    main(["spike", *words.split(), "--processes", "1", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {
        *("result.json", "environment.json", "tables.md"),
        *("warmup.png", "sweep.png", "aftershock.png", "spectra.png"),
    }
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["command"][:2] == ["eopt", "spike"]
    assert {"torch", "cpu", "revision", "threads"} <= set(environment)
    result = SpikeResult.from_json(json.loads((tmp_path / "result.json").read_text()))
    assert (tmp_path / "tables.md").read_text() == "\n\n".join(x.markdown() for x in spike_view(result).tables) + "\n"
    assert [arm.name for arm in result.arms] == ["adamw", "lion", "rekls-published"]
    assert result.config.spike_scale == (100.0, 1000.0)
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("Aftershock", "rekls-published", "x1000"))


def test_one_spike_is_drawn_too(tmp_path):
    config = SpikeConfig(optimizers=("adamw",), shape=(4, 3), steps=12, spike_at=(5,), spike_scale=(10.0,))
    result = run_spike(config)
    save(result, spike_view(result), tmp_path / "new")
    assert len(list((tmp_path / "new").glob("*.png"))) == 4


def test_the_tables_show_the_numbers_of_the_result(small):
    console = Console(record=True, width=140, file=io.StringIO())
    show(spike_view(small).tables, console=console)
    text = console.export_text()
    for row in small.rows:
        assert f"{row.recovery or '>'}" in text
        assert f"{row.aftershock:.2f}" in text


def test_the_published_numbers_stand_beside_ours():
    asked = SpikeConfig(
        optimizers=("soap", "soap-guarded", "lion"), shape=(4, 3), steps=40, spike_at=(10, 20), spike_scale=(1e2, 10.0)
    )
    table = comparison_table(run_spike(asked))
    cells = {(row[0], row[1]): row[2:] for row in table.texts}
    assert cells["soap", "10"][:2] == ["- 25", "-"]
    assert [len(x.split()) for x in cells["soap", "10"][2:]] == [2, 2]
    assert cells["", "20"][0] == "-"
    assert cells["lion", "10"][3] == "-"


def test_the_guard_and_the_published_start_are_variants_of_a_name():
    assert find_arm("lion-guarded", 3.0) == SpikeArm(optimizer="lion", options={"spike_guard": 3.0})
    options = {"betas": (0.9, 0.95), "first_step": "eigenbasis", "spike_guard": 2.0}
    assert find_arm("REKLS-published-guarded").options == options
    for name in OPTIMIZERS:
        if name not in ("soap", "rekls"):
            with pytest.raises(UsageError, match=f"names '{name}-published'; {name} runs as {name}, {name}-guarded"):
                find_arm(f"{name}-published")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"spike_at": (199,)}, "--spike-at 199 needs a step before the spike and one after it in --steps 200"),
        ({"spike_at": ()}, "--spike-at must name at least one value"),
        ({"spike_scale": (10.0, 10.0)}, "--spike-scale must name"),
        ({"spike_scale": (0.0,)}, "--spike-scale must be positive"),
        ({"spectrum_at": (0,)}, "--spectrum-at 0 is not one of the steps 1 to 200"),
        ({"shape": (0, 4)}, "--shape 0 4 is no matrix"),
        ({"optimizers": ()}, "--optimizers must name"),
        ({"steps": 0}, "--steps is 0"),
    ],
)
def test_a_request_that_cannot_be_carried_out(asked, message):
    with pytest.raises(UsageError, match=message):
        SpikeConfig(**asked)


# Who cannot: the weight starts at zero, which these leave or refuse.
FROM_ZERO = {"iso": "does not move a weight that is zero", "muon_hyperball": "whose weight starts at zero.*is zero and"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_runs_or_says_why_it_cannot(name):
    config = SpikeConfig(optimizers=(name,), shape=(6, 4), spike_at=(4,), spike_scale=(1e3,), steps=8, warmup_steps=4)
    if name in FROM_ZERO:
        with pytest.raises(UsageError, match=f"^{name} cannot run this experiment.*{FROM_ZERO[name]}"):
            run_spike(config)
        return
    plain, spiked = run_spike(config).arms[0].trajectories
    assert all(x is not None and x > 0 for x in (*plain.rms, *spiked.rms))
    assert plain.rms[:4] == spiked.rms[:4]


def test_an_unknown_optimizer_ends_the_command(tmp_path):
    with pytest.raises(SystemExit, match=r"no optimizer 'mion'; did you mean 'muon'.*also takes .*soap-published"):
        main(["spike", "--optimizers", "mion", "--out", str(tmp_path)])


@pytest.mark.parametrize("fails", [False, True])
def test_an_interrupt_waits_for_processes_to_have_begun(fails):
    """One whose start is cut short complains by itself, behind the sentence of the command."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # of a run in the background it is ignored
    begun = []

    def start():
        with interrupted_behind():
            signal.raise_signal(signal.SIGINT)
            begun.append("all of it")
            if fails:
                raise OSError

    try:
        with pytest.raises(KeyboardInterrupt):
            start()
        assert begun
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
