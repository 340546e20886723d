"""A LightningModule with Muon under OneCycleLR: trains a tiny model, saves, resumes.

    python examples/frameworks/lightning_module.py

Needs lightning. `configure_optimizers` returns one optimizer, so Lightning stays in automatic mode.
"""

import tempfile
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from emerging_optimizers import create_optimizer

EPOCHS = 4


class Model(lightning.LightningModule):
    """A table, two hidden layers, a head."""

    def __init__(self, name="muon", lr=5e-3):
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(64, 16)
        self.backbone = nn.Sequential(nn.Linear(16, 16), nn.GELU())
        self.neck = nn.Sequential(nn.Linear(16, 16), nn.GELU())
        self.head = nn.Linear(16, 64)

    def training_step(self, tokens, index):
        """Learn to repeat."""
        logits = self.head(self.neck(self.backbone(self.embedding(tokens))))
        return nn.functional.cross_entropy(logits, tokens)

    def configure_optimizers(self):
        """One optimizer and its schedule."""
        optimizer = create_optimizer(self.hparams.name, self, lr=self.hparams.lr)
        # The peak of each group is its own rate: one number would give all groups the same.
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            total_steps=int(self.trainer.estimated_stepping_batches),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Stop(lightning.Callback):
    """Ends the training early, as a time limit does."""

    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_start(self, trainer, module):
        trainer.should_stop = trainer.current_epoch + 1 == self.epochs


def data():
    """Four batches of eight tokens."""
    tokens = torch.randint(64, (32,), generator=torch.Generator().manual_seed(0))
    return DataLoader(tokens, batch_size=8)


def main(folder, stop=None, resume=False, callbacks=(), logger=False, model=Model, **arguments):
    """Train for EPOCHS epochs, or until `stop`; return the weights."""
    lightning.seed_everything(0, verbose=False)
    module = model(**arguments)
    saver = ModelCheckpoint(folder, save_last=True)
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=logger,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[saver, *callbacks, *([] if stop is None else [Stop(stop)])],
    )
    trainer.fit(module, data(), ckpt_path=Path(folder, "last.ckpt") if resume else None)
    return {name: p.detach().clone() for name, p in module.named_parameters()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        whole = main(Path(scratch, "whole"))
        main(Path(scratch, "parts"), stop=2)
        resumed = main(Path(scratch, "parts"), resume=True)
    print("resumed run equal:", all(torch.equal(whole[name], resumed[name]) for name in whole))
