import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from emerging_optimizers import create_optimizer
from emerging_optimizers.integrations import loggers
from emerging_optimizers.integrations.loggers import log_spikes

ROOT = Path(__file__).parents[2]


class Kept:
    def __init__(self):
        self.calls = []

    def log(self, values, step):
        self.calls.append((step, dict(values)))


def run(logger, steps=24, spike=22, optimizer=None, **options):
    """A run with a spike; the alarms."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 16), nn.Linear(16, 64))
    optimizer = create_optimizer("muon", model, lr=2e-3) if optimizer is None else optimizer(model.parameters())
    alarms = []
    with log_spikes(optimizer, logger, every=10, on_alarm=alarms.append, **options):
        for step, tokens in enumerate(torch.randint(64, (steps, 16)), start=1):
            loss = nn.functional.cross_entropy(model(tokens), tokens)
            (1000 * loss if step == spike else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
    return alarms


def test_an_observation_is_one_call_and_an_alarm_another():
    kept = Kept()
    alarms = run(kept)
    observations = [(step, values) for step, values in kept.calls if not next(iter(values)).startswith("alarm/")]
    assert [step for step, _ in observations] == [10, 20, 22]
    assert all("update_rms/1.weight" in values for _, values in observations)
    logged = {(step, name): value for step, values in kept.calls for name, value in values.items() if "alarm/" in name}
    assert logged == {(a.step, f"alarm/{a.measure}/{a.parameter}"): a.value for a in alarms}
    assert (22, "alarm/grad_norm/1.weight") in logged


def test_without_on_alarm_it_is_a_warning():
    w = nn.Parameter(torch.ones(4))
    optimizer = create_optimizer("adamw", [("w", w)], lr=0.1)
    with log_spikes(optimizer, Kept()):
        w.grad = torch.full((4,), float("inf"))
        with pytest.warns(RuntimeWarning, match="grad_norm of w is inf"):
            optimizer.step()


def test_what_is_under_way_at_the_end_is_logged_and_nothing_after_it():
    kept = Kept()
    w = nn.Parameter(torch.ones(4))
    optimizer = create_optimizer("adamw", [("w", w)], lr=0.1)
    watch = log_spikes(optimizer, kept, every=1)
    watch._buffer.add_scalar("late/w", 1.0, 7)  # as an accelerator has it, whose numbers come after the step
    watch.close()
    assert kept.calls == [(7, {"late/w": 1.0})]
    w.grad = torch.ones(4)
    optimizer.step()
    assert len(kept.calls) == 1


def test_the_training_does_not_change():
    def weights(watched):
        torch.manual_seed(0)
        w = nn.Parameter(torch.randn(8, 4))
        optimizer = create_optimizer("soap", [("w", w)], lr=0.1)
        watch = log_spikes(optimizer, Kept(), every=1) if watched else None
        for _ in range(5):
            w.grad = w.detach().cos()
            optimizer.step()
        if watch is not None:
            watch.close()
        return w.detach()

    assert torch.equal(weights(True), weights(False))


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = loggers.tensorboard(tmp_path)
    alarms = run(logger)
    logger.writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("update_rms/1.weight")] == [10, 20, 22]
    assert [event.step for event in events.Scalars("alarm/grad_norm/1.weight")] == [22]
    (alarm,) = (a for a in alarms if a.measure == "grad_norm" and a.parameter == "1.weight")
    assert events.Scalars("alarm/grad_norm/1.weight")[0].value == pytest.approx(alarm.value, rel=1e-6)


def test_wandb(tmp_path, monkeypatch):
    package = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(ValueError, match="no run is under way"):
        loggers.wandb()
    with package.init(mode="offline", dir=tmp_path, project="test") as started:
        started.log({"loss": 1.0}, step=1000)  # the run's own steps do not matter
        run(loggers.wandb())
        summary = dict(started.summary)
    assert summary["optimizer_step"] == 22
    assert "update_rms/1.weight" in summary
    assert "alarm/grad_norm/1.weight" in summary
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert file.stat().st_size > 1000


def test_wandb_names_its_axis():
    class Run:
        def __init__(self):
            self.axes, self.rows = {}, []

        def define_metric(self, name, step_metric):
            self.axes[name] = step_metric

        def log(self, row):
            self.rows.append(row)

    kept = Run()
    logger = loggers.wandb(kept, axis="steps")
    logger.log({"a/b": 1.0}, 3)
    logger.log({"a/b": 2.0, "c": 3.0}, 2)
    assert kept.axes == {"a/b": "steps", "c": "steps"}
    assert kept.rows == [{"a/b": 1.0, "steps": 3}, {"a/b": 2.0, "c": 3.0, "steps": 2}]


def test_mlflow(tmp_path, monkeypatch):
    package = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    package.set_tracking_uri((tmp_path / "store").as_uri())
    package.set_experiment("test")
    with package.start_run() as started:
        run(loggers.mlflow())
        run(loggers.mlflow(), steps=10, optimizer=torch.optim.AdamW)  # parameters without names
    client = package.MlflowClient()
    history = client.get_metric_history(started.info.run_id, "update_rms/1.weight")
    assert [metric.step for metric in history] == [10, 20, 22]
    names = client.get_run(started.info.run_id).data.metrics
    assert "update_rms/param_groups_0___params___0_" in names


def test_mlflow_gets_at_most_a_thousand_at_once():
    class Module:
        sizes = []

        def log_metrics(self, values, step, run_id):
            self.sizes.append(len(values))

    loggers._Mlflow(Module(), None).log({f"m{i}": 0.0 for i in range(2500)}, 1)
    assert Module.sizes == [1000, 1000, 500]


def test_nothing_is_imported_before_it_is_needed_and_a_package_that_is_missing_is_named():
    code = """
import json, sys
from emerging_optimizers.integrations import huggingface, loggers, timm, torch_arguments
packages = {"tensorboard": "tensorboard('runs')", "wandb": "wandb()", "mlflow": "mlflow()"}
said = [name for name in (*packages, "transformers", "timm") if name in sys.modules]
for package, call in packages.items():
    sys.modules[package] = None
    try:
        eval(f"loggers.{call}")
    except ModuleNotFoundError as error:
        said.append(str(error))
print(json.dumps(said))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert json.loads(done.stdout) == [
        f"loggers.{package} needs the package {package}, which is not installed: pip install {package}"
        for package in ("tensorboard", "wandb", "mlflow")
    ]
