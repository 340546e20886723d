"""A Hugging Face Trainer with Muon: trains a tiny GPT-2, saves, resumes.

    python examples/frameworks/huggingface_trainer.py

Needs transformers and accelerate. No download: the model is made from a config.
"""

import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from emerging_optimizers.integrations.huggingface import optimizer

STEPS = 8


class Stop(TrainerCallback):
    """Ends the training early, as a time limit does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def make_model():
    """A GPT-2 of two layers."""
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def make_trainer(model, folder, callbacks=(), optimizers=(None, None), choice=None, **arguments):
    """A Trainer of STEPS steps on random tokens."""
    tokens = torch.randint(64, (64, 16), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    settings = {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    return Trainer(
        model,
        TrainingArguments(str(folder), max_steps=STEPS, per_device_train_batch_size=4, **{**settings, **arguments}),
        train_dataset=rows,
        eval_dataset=rows[:4],
        callbacks=list(callbacks),
        optimizers=optimizers,
        optimizer_cls_and_kwargs=choice,
    )


def main(folder, stop=None, resume=False, name="muon", lr=2e-3):
    """Train for STEPS steps, or until `stop`; return the weights and the learning rates that were logged."""
    set_seed(0)
    model = make_model()
    trainer = make_trainer(
        model,
        folder,
        callbacks=[] if stop is None else [Stop(stop)],
        lr_scheduler_type="cosine",
        choice=optimizer(
            name, lr=lr
        ),  # in your own code: Trainer(..., optimizer_cls_and_kwargs=optimizer(name, lr=lr))
    )
    trainer.train(resume_from_checkpoint=resume)
    rates = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    return {name: p.detach().clone() for name, p in model.named_parameters()}, rates


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        whole, rates = main(Path(scratch, "whole"))
        main(Path(scratch, "parts"), stop=3)
        resumed, _ = main(Path(scratch, "parts"), resume=True)
    print("learning rates:", [round(rate, 6) for rate in rates])
    print("resumed run equal:", all(torch.equal(whole[name], resumed[name]) for name in whole))
