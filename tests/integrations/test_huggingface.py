import copy

import pytest
import torch

from emerging_optimizers import create_optimizer
from emerging_optimizers.integrations.huggingface import RoutedFactory, optimizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from tests.integrations.example import equal, load  # noqa: E402 - behind importorskip

example = load("huggingface_trainer")
RATES = {"lr": 2e-3, "companion_lr": 5e-4}
NEEDS = {
    "cosine_with_min_lr": {"lr_scheduler_kwargs": {"min_lr": 1e-4}},
    "cosine_warmup_with_min_lr": {"lr_scheduler_kwargs": {"min_lr": 1e-4}},
    "warmup_stable_decay": {"lr_scheduler_kwargs": {"num_decay_steps": 3}, "warmup_steps": 2},
    "reduce_lr_on_plateau": {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss"},
    "greedy": {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss"},
}
SCHEDULES = [kind.value for kind in transformers.trainer_utils.SchedulerType]


def logged(trainer):
    return [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]


@pytest.fixture(autouse=True)
def _seeded():
    transformers.set_seed(0)


@pytest.mark.parametrize("name", ["muon", "soap"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(name, tmp_path):
    whole, _ = example.main(tmp_path / "whole", name=name)
    stopped, _ = example.main(tmp_path / "parts", stop=3, name=name)
    resumed, _ = example.main(tmp_path / "parts", resume=True, name=name)
    assert not equal(whole, stopped)
    assert equal(whole, resumed)


def test_a_factory_is_no_optimizer_class_and_a_misspelled_name_is_an_error_at_once():
    factory, arguments = optimizer("muon", lr=2e-3)
    assert factory is RoutedFactory
    assert not issubclass(factory, torch.optim.Optimizer)
    assert arguments == {"name": "muon", "lr": 2e-3}
    with pytest.raises(ValueError, match="did you mean 'muon'"):
        optimizer("mouon")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_moves_all_groups_in_proportion_and_the_main_rate_is_logged(schedule, tmp_path):
    settings = {"warmup_steps": 2, **NEEDS.get(schedule, {})}
    trainer = example.make_trainer(
        example.make_model(), tmp_path, lr_scheduler_type=schedule, choice=optimizer("muon", **RATES), **settings
    )
    seen = []

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
            seen.append({group["algorithm"]: group["lr"] for group in optimizer.param_groups})

    trainer.add_callback(Look())
    trainer.train()
    assert len(seen) == example.STEPS
    assert logged(trainer) == pytest.approx([rates["muon"] for rates in seen], rel=1e-12)
    for rates in seen:
        assert rates["adamw"] == pytest.approx(rates["muon"] / 4, rel=1e-12, abs=1e-12)
    assert trainer.optimizer.param_groups[0]["algorithm"] == "muon"


def test_without_lr_the_registry_says_it_and_the_trainers_learning_rate_has_no_effect(tmp_path):
    from emerging_optimizers.registry import entry

    trainer = example.make_trainer(
        example.make_model(), tmp_path, learning_rate=0.7, lr_scheduler_type="constant", choice=optimizer("muon")
    )
    trainer.train()
    assert logged(trainer) == [entry("muon").start] * example.STEPS


def test_an_optimizer_made_outside_trains_the_same(tmp_path):
    model = example.make_model()
    twin = copy.deepcopy(model)
    transformers.set_seed(0)
    example.make_trainer(model, tmp_path, choice=optimizer("muon", **RATES)).train()
    transformers.set_seed(0)
    made = create_optimizer("muon", twin, **RATES)
    example.make_trainer(twin, tmp_path, optimizers=(made, None)).train()
    assert equal(dict(model.named_parameters()), dict(twin.named_parameters()))


@pytest.mark.parametrize(
    "settings", [{"bf16": True}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.1}], ids=str
)
def test_settings_of_the_trainer(settings, tmp_path):
    trainer = example.make_trainer(example.make_model(), tmp_path, choice=optimizer("soap", lr=3e-3), **settings)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert all(torch.tensor(losses).isfinite())
    assert trainer.optimizer.optimizer.guard_events() == {}


def test_model_init_makes_the_optimizer_anew(tmp_path):
    template = example.make_trainer(example.make_model(), tmp_path)
    trainer = transformers.Trainer(
        args=template.args,
        model_init=example.make_model,
        train_dataset=template.train_dataset,
        optimizer_cls_and_kwargs=optimizer("muon", **RATES),
    )
    weights = []
    for _ in range(2):
        trainer.train()
        weights.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    assert equal(*weights)


# ---- PEFT -----------------------------------------------------------------------------------------------------------


def lora():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    return peft.get_peft_model(example.make_model(), config)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT of transformers
def test_the_adapters_of_a_peft_model_train_and_resume(tmp_path):
    def run(folder, callbacks=(), resume=False):
        transformers.set_seed(0)
        model = lora()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer = example.make_trainer(model, folder, callbacks, choice=optimizer("muon", **RATES))
        trainer.train(resume_from_checkpoint=resume)
        return model, before, trainer

    model, before, trainer = run(tmp_path / "whole")
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    groups = trainer.optimizer.param_groups
    taken = {name: group["algorithm"] for group in groups for name in group["param_names"]}
    assert {taken[name] for name in moved} == {"muon"}

    run(tmp_path / "parts", [example.Stop(3)])
    resumed, _, _ = run(tmp_path / "parts", resume=True)
    assert equal(dict(model.named_parameters()), dict(resumed.named_parameters()))
