"""The TF32 experiment on a job of a few steps: what it asks for, what it keeps, what it repeats."""

import json
from dataclasses import replace

import pytest

from emerging_optimizers.lab.config import UsageError
from emerging_optimizers.lab.present import save
from emerging_optimizers.lab.tf32 import TF32Config, TF32Result, TF32Run, run_tf32, train_once
from emerging_optimizers.lab.views.tf32 import tf32_view

CONFIG = TF32Config(optimizers=("rekls",), seeds=(3,), steps=12, spike_at=4)


@pytest.fixture
def small_model(tiny, monkeypatch):
    """The job of the experiment with a model on which a run takes a second."""
    job = TF32Config.job
    size = {name: getattr(tiny, name) for name in ("batch", "context", "width", "depth", "heads", "eval_windows")}
    monkeypatch.setattr(TF32Config, "job", lambda *args: replace(job(*args), **size))


def fake(config, run):
    """A run without training: the loss tells the run."""
    loss = 2 + 0.25 * (run.precision == "tf32") + 0.5 * run.spike + run.seed
    return replace(run, final_loss=loss, losses={"12": loss}, update_rms=(1.0,) * config.steps)


def filled(config):
    return TF32Result(
        config=config,
        runs=tuple(
            fake(config, TF32Run(optimizer=o, form=f, spike=s, seed=seed, precision=p))
            for o in config.optimizers
            for f in ("published", "default")
            for s in (False, True)
            for seed in config.seeds
            for p in ("float32", "tf32")
        ),
    )


@pytest.mark.usefixtures("small_model")
def test_a_run_trains_with_the_published_form_and_a_spike():
    run = TF32Run(optimizer="rekls", form="published", spike=True, seed=3, precision="tf32")
    done = train_once(CONFIG, run)
    assert done.key == run.key
    assert len(done.update_rms) == CONFIG.steps
    assert done.losses == {"12": done.final_loss}


@pytest.mark.usefixtures("small_model")
def test_tf32_changes_a_run_and_float32_repeats():
    run = TF32Run(optimizer="rekls", form="default", spike=False, seed=3, precision="float32")
    exact = train_once(CONFIG, run)
    assert train_once(CONFIG, run) == exact
    rounded = train_once(CONFIG, replace(run, precision="tf32"))
    assert rounded.final_loss != exact.final_loss  # the norms, which are kept to four digits, may be the same
    assert rounded.final_loss == pytest.approx(exact.final_loss, abs=0.05)


def test_the_table_pairs_the_precisions_seed_by_seed():
    result = filled(replace(CONFIG, seeds=(0, 1)))
    row = result.rows[1]
    assert (row.form, row.spike, row.float32, row.differences) == ("published", True, (2.5, 3.5), (0.25, 0.25))
    (table,) = tf32_view(result).tables
    assert table.texts[0][-1] == "+0.250  +0.250"


def test_it_survives_json_and_writes_its_files(tmp_path):
    result = filled(CONFIG)
    assert TF32Result.from_json(json.loads(json.dumps(result.to_json()))) == result
    assert {path.name for path in save(result, tf32_view(result), tmp_path)} == {
        "result.json",
        "environment.json",
        "tables.md",
        "tf32.png",
    }


def test_finished_runs_are_not_repeated_and_another_job_is_refused(tmp_path):
    out = tmp_path / "result.json"
    out.write_text(json.dumps(filled(CONFIG).to_json()))
    assert run_tf32(CONFIG, out) == filled(CONFIG)  # no training: it would give other losses
    with pytest.raises(UsageError, match="another job"):
        run_tf32(replace(CONFIG, steps=13), out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizers": ("muon",)}, "names muon; known are soap_kl, rekls"),
        ({"seeds": ()}, "--seeds must name"),
        ({"spike_at": 500}, "--spike-at 500 needs a step"),
    ],
)
def test_a_wrong_request_is_refused(change, message):
    with pytest.raises(UsageError, match=message):
        replace(TF32Config(), **change)
