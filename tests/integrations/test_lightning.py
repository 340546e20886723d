import pytest
import torch
from torch import nn

lightning = pytest.importorskip("lightning", reason="lightning is not installed")

from lightning.pytorch.callbacks import (  # noqa: E402 - behind importorskip
    BackboneFinetuning,
    BaseFinetuning,
    LearningRateMonitor,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers.logger import DummyLogger  # noqa: E402 - behind importorskip

from emerging_optimizers import create_optimizer  # noqa: E402 - behind importorskip
from emerging_optimizers.integrations.loggers import log_spikes  # noqa: E402 - behind importorskip
from tests.integrations.example import equal, load  # noqa: E402 - behind importorskip

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        ".*treespec, LeafSpec",  # Lightning's use of torch
        "The 'train_dataloader' does not have many workers",
        "Checkpoint directory .* exists and is not empty",
        "SWA is currently only supported every epoch",  # it takes the place of the schedule
        "Swapping scheduler",
    )
]

example = load("lightning_module")


class Unfreeze(BaseFinetuning):
    """The backbone joins in the second epoch."""

    def __init__(self, at=1):
        super().__init__()
        self.at = at

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == self.at:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)


class Constant(example.Model):
    """Without a schedule, which knows only the groups of its start."""

    def __init__(self, companion_lr=None, **arguments):
        super().__init__(**arguments)

    def configure_optimizers(self):
        return create_optimizer(
            self.hparams.name, self, lr=self.hparams.lr, companion_lr=self.hparams.companion_lr
        )  # fmt: skip


def three_runs(tmp_path, **arguments):
    def made():
        return {key: [f() for f in value] if key == "callbacks" else value for key, value in arguments.items()}

    whole = example.main(tmp_path / "whole", **made())
    stopped = example.main(tmp_path / "parts", stop=2, **made())
    resumed = example.main(tmp_path / "parts", resume=True, **made())
    assert not equal(whole, stopped)
    return whole, resumed


@pytest.mark.parametrize("name", ["muon", "soap"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(name, tmp_path):
    assert equal(*three_runs(tmp_path, name=name))


def test_stochastic_weight_averaging(tmp_path):
    averages = []
    for lrs in (1e-3, [1e-3, 2e-4, 2e-4]):  # one for all groups, or one for each
        averages.append(example.main(tmp_path, callbacks=[StochasticWeightAveraging(lrs, swa_epoch_start=2)]))
    plain = example.main(tmp_path)
    assert not equal(averages[0], plain)
    assert not equal(*averages)


class Look(lightning.Callback):
    """What each parameter has at the end of an epoch."""

    def __init__(self):
        self.epochs = []

    def on_train_epoch_end(self, trainer, module):
        (optimizer,) = trainer.optimizers
        rates = {
            name: (group["algorithm"], group["lr"]) for group in optimizer.param_groups for name in group["param_names"]
        }
        self.epochs.append((rates, module.backbone[0].weight.detach().clone()))


def test_a_backbone_that_is_unfrozen_trains_by_the_rules_of_its_roles(tmp_path):
    look = Look()
    example.main(tmp_path, callbacks=[Unfreeze(), look], model=Constant, companion_lr=1e-3)
    (before, frozen), (after, moved), *_ = look.epochs
    assert "backbone.0.weight" not in before
    assert not torch.equal(frozen, moved)
    # A tenth of the first group's rate, as BaseFinetuning has it, and the companion's in proportion.
    assert after["neck.0.weight"] == ("muon", 5e-3)
    assert after["backbone.0.weight"] == ("muon", pytest.approx(5e-4))
    assert after["backbone.0.bias"] == ("adamw", pytest.approx(1e-4))


def test_finetuning_resumes_bitwise(tmp_path):
    assert equal(*three_runs(tmp_path, callbacks=[Unfreeze], model=Constant))


def test_backbone_finetuning_raises_the_rate_of_the_last_group_alone(tmp_path):
    """It sets `param_groups[-1]`; the backbone's matrices stay at the rate with which they joined."""
    look = Look()
    callback = BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda epoch: 2.0)
    example.main(tmp_path, callbacks=[callback, look], model=Constant)
    weights = [rates["backbone.0.weight"][1] for rates, _ in look.epochs[1:]]
    biases = [rates["backbone.0.bias"][1] for rates, _ in look.epochs[1:]]
    assert weights == pytest.approx([5e-4] * 3)
    assert biases == pytest.approx([5e-4, 1e-3, 2e-3])


def test_the_monitor_shows_the_names_of_the_groups(tmp_path):
    lines = []

    class Keep(DummyLogger):
        def log_metrics(self, metrics, step):
            lines.append(metrics)

    example.main(tmp_path, callbacks=[LearningRateMonitor("step")], logger=Keep())
    names = {name for line in lines for name in line if name.startswith("lr-")}
    assert "lr-RoutedOptimizer/muon: hidden matrices" in names
    assert len(names) == 3


def test_the_monitor_shows_groups_that_join(tmp_path):
    example.main(tmp_path, callbacks=[LearningRateMonitor("step"), Unfreeze()], model=Constant, logger=DummyLogger())


@pytest.mark.parametrize(
    "settings", [{"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 2}], ids=str
)
def test_settings_of_the_trainer(settings, tmp_path):
    module = example.Model()
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, example.data())
    assert trainer.global_step == (2 if "accumulate_grad_batches" in settings else 4)
    assert all(p.isfinite().all() for p in module.parameters())
    assert isinstance(module.head, nn.Linear)


class Kept:
    def __init__(self):
        self.calls = []

    def log(self, values, step):
        self.calls.append((step, set(values)))


class Watched(lightning.Callback):
    def __init__(self, logger):
        self.logger = logger

    def on_train_start(self, trainer, module):
        self.watch = log_spikes(trainer.optimizers[0], self.logger, every=4)

    def on_train_end(self, trainer, module):
        self.watch.close()


def test_a_watch_sees_the_steps_of_lightning(tmp_path):
    kept = Kept()
    example.main(tmp_path, callbacks=[Watched(kept)])
    assert [step for step, _ in kept.calls] == [4, 8, 12, 16]
    assert all("ns_residual/neck.0.weight" in names for _, names in kept.calls)
