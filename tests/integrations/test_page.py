"""docs/frameworks.md, run as it stands: every block, and every line of its table.

What the page calls yours (the model, the data, the framework's own objects) is made here.
"""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from emerging_optimizers import create_optimizer
from emerging_optimizers.registry import entry

TABLE, *SECTIONS = re.split(r"^## ", (Path(__file__).parents[2] / "docs" / "frameworks.md").read_text(), flags=re.M)
BLOCKS = {text.split("\n")[0]: re.findall(r"^```python\n(.*?)^```", text, re.M | re.S) for text in SECTIONS}
LINES = dict(re.findall(r"^\| \[(.+?)\]\(#.+?\) \| .+? \| `(.+?)`[^`|]*(?:`\w+`)? \|$", TABLE, re.M))
YAML = re.search(r"^```yaml\n(.*?)^```", SECTIONS[list(BLOCKS).index("Hydra")], re.M | re.S)
RUN: set[str] = set()


def code_of(section: str, line: str = "") -> Any:
    """Its blocks, and its line in the table, ahead of which the imports of the blocks are needed."""
    RUN.update((section, line or section))
    imports = re.findall(r"^(?:from|import) .+$", "\n".join(BLOCKS[section]), re.M)
    alone = "\n".join([*imports, f"value = {LINES[line or section]}"]).replace("value = optimizer =", "optimizer =")
    return pytest.mark.parametrize("code", [*BLOCKS[section], alone])


def ran(code: str, **yours: Any) -> dict[str, Any]:
    exec(compile(code, "docs/frameworks.md", "exec"), yours)
    return yours


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 64))


def batches() -> torch.utils.data.DataLoader[torch.Tensor]:
    return torch.utils.data.DataLoader(torch.arange(64), batch_size=8)


def trains(optimizer: Any, model: nn.Module, lr: float = 2e-3) -> None:
    """Matrices by Muon at this learning rate, the rest by AdamW, and a step moves all of them."""
    before = [p.detach().clone() for p in model.parameters()]
    tokens = torch.arange(64)
    nn.functional.cross_entropy(model(tokens), tokens).backward()
    optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    rates = {group["algorithm"]: group["lr"] for group in optimizer.param_groups}
    assert rates.keys() == {"muon", "adamw"}
    assert rates["muon"] == lr


@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "PEFT"])
@code_of("Hugging Face Trainer")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT of transformers
def test_hugging_face(code, adapted, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    shape = {"vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    if adapted:
        peft = pytest.importorskip("peft", reason="peft is not installed")
        adapters = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
        model = peft.get_peft_model(model, adapters)
    settings = {"max_steps": 2, "lr_scheduler_type": "constant", "report_to": "none", "save_strategy": "no"}
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, **settings)
    data = [{"input_ids": row, "labels": row} for row in torch.randint(64, (8, 16))]
    names = ran(code, model=model, args=args, data=data)
    trainer = names.get("trainer") or names["value"]
    trainer.train_dataset = data  # which the line of the table leaves out
    trainer.train()
    assert trainer.optimizer.param_groups[0]["algorithm"] == "muon"
    assert trainer.optimizer.param_groups[0]["lr"] == 2e-3


@code_of("Lightning")
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec", "ignore:The 'train_dataloader' does not have many workers")
def test_lightning(code, tmp_path):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network()

        def training_step(self, tokens, index):
            return nn.functional.cross_entropy(self.network(tokens), tokens)

        def configure_optimizers(self):
            names = ran(code, self=self)
            return names["configure_optimizers"](self) if "configure_optimizers" in names else names["optimizer"]

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, enable_model_summary=False, **quiet
    )
    trainer.fit(Module(), batches())
    assert trainer.global_step == 8
    assert {group["algorithm"] for group in trainer.optimizers[0].param_groups} == {"muon", "adamw"}


@code_of("Fabric")
def test_fabric(code):
    fabric = pytest.importorskip("lightning.fabric", reason="lightning is not installed")
    names = ran(code, model=network(), fabric=fabric.Fabric(accelerator="cpu", devices=1))
    model, optimizer = names.get("value") or (names["model"], names["optimizer"])
    trains(optimizer, model)


@code_of("Accelerate")
def test_accelerate(code):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    names = ran(code, model=network(), data=batches(), accelerator=accelerate.Accelerator(cpu=True))
    model, optimizer, *_ = names.get("value") or (names["model"], names["optimizer"])
    trains(optimizer, model)


@code_of("torchtitan", "torchtitan's style")
def test_torchtitan(code):
    first, *rest = network()
    model_parts = [nn.Sequential(first), nn.Sequential(*rest)]
    parts = nn.ModuleDict({f"part{k}": part for k, part in enumerate(model_parts)})
    config = SimpleNamespace(name="muon", lr=2e-3, weight_decay=0.1)
    names = ran(code, model_parts=model_parts, parts=parts, config=config)
    trains(names.get("value") or names["optimizer"], nn.Sequential(*names["parts"].values()))


@code_of("timm")
def test_timm(code):
    pytest.importorskip("timm", reason="timm is not installed")
    from timm.models import VisionTransformer

    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=8)
    names = ran(code, model=model)
    optimizer = names.get("value") or names["optimizer"]
    model(torch.randn(4, 3, 16, 16)).square().mean().backward()
    optimizer.step()
    rates = sorted({group["lr"] for group in optimizer.param_groups if group["algorithm"] == "muon"})
    assert rates == pytest.approx([2e-3 * 0.75**2, 2e-3 * 0.75])


@pytest.mark.parametrize("code", BLOCKS["Hydra"])
def test_hydra(code):
    pytest.importorskip("hydra", reason="hydra-core is not installed")
    from omegaconf import OmegaConf

    assert YAML
    assert LINES["Hydra"] in YAML[1]
    names = ran(code, model=network(), config=OmegaConf.create(YAML[1]))
    trains(names["optimizer"], names["model"])


@code_of("Optuna")
def test_optuna(code):
    optuna = pytest.importorskip("optuna", reason="optuna is not installed")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
    names = ran(code, model=network(), trial=trial, name="muon", factor=0.5)
    rate = trial.params.get("factor", 0.5) * entry(names["name"]).start
    assert (names.get("value") or names["optimizer"]).param_groups[0]["lr"] == rate


@code_of("Loggers", "TensorBoard, Weights & Biases, MLflow")
def test_loggers(code, tmp_path):
    model = network()
    yours = {"model": model, "optimizer": create_optimizer("muon", model, lr=2e-3)}
    if "value = " in code:
        wandb = pytest.importorskip("wandb", reason="wandb is not installed")
        with wandb.init(mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True)) as run:
            names = ran(code, run=run, **yours)
            trains(names["optimizer"], model)
            names["value"].close()
        return
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        ran(code.replace("...", "train()"), writer=writer, train=lambda: trains(yours["optimizer"], model), **yours)


@code_of("Arguments of torch.optim", "arguments of torch.optim")
def test_arguments_of_torch(code):
    names = ran(code, model=network())
    trains(names.get("value") or names["optimizer"], names["model"], lr=0.02 if "value" in names else 2e-3)


def test_every_block_and_every_line_has_a_test():
    with_code = {section for section, blocks in BLOCKS.items() if blocks}
    assert with_code | LINES.keys() == RUN | {"Hydra"}
    rows = re.findall(r"^\| \[(.+?)\]", TABLE, re.M)
    assert [row for row in rows if row not in LINES] == ["PEFT"]  # whose line is the Trainer's
