"""The training job: one loop for every optimizer, the comparison around it, and how it is continued.

`run_train` and `resume_train` leave the numbers of a run; `lab/present.py` draws and shows them.
"""

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from emerging_optimizers import create_optimizer
from emerging_optimizers.averaging import WeightAverage
from emerging_optimizers.cli import UsageError
from emerging_optimizers.cli.files import storing, write_atomically
from emerging_optimizers.lab.config import SPIKE_GUARD, Arm, TrainConfig, checked
from emerging_optimizers.lab.data import Text, load_text
from emerging_optimizers.lab.measures import recovery, summary
from emerging_optimizers.lab.model import GPT
from emerging_optimizers.lab.places import TRAINED, Existing, claim
from emerging_optimizers.lab.progress import Watch, print_changes, print_windows, waiting, watching
from emerging_optimizers.lab.record import environment, json_bytes, read_json, reading, sealed, sole_writer, write_json
from emerging_optimizers.lab.runs import RunFolder, RunResult, StepRecord, TrainResult, titles

RUNS = Path("runs")
# What to do about a file that a run cannot be continued without.
_AGAIN = "bring it back, or begin the run again with another --out"


def run_train(
    config: TrainConfig, out: Path | None = None, console: Console | None = None, *, overwrite: bool = False
) -> TrainResult:
    """Trains the same model on the same data with each optimizer and compares them.

    Where the job has a gradient spike, each optimizer runs three times: without the spike, with it, and with it behind
    the spike guard. The first is what the recovery of the others is measured against.

    Args:
        config: The job.
        out: Folder of the run; by default a new one under ``runs/`` named by the time.
        console: Where to show progress.
        overwrite: Whether a run that the folder holds is replaced.

    Returns:
        What each optimizer did, and where the files are.

    Raises:
        UsageError: The folder holds something already, another process writes there, or the job cannot be run as it
            stands: nothing has been written then. Or the disk refuses.
    """
    folder = out or new_folder()
    text = load_text(config.text, config.context)
    arms = {name: config.arm(name) for name in config.optimizers}
    console = console or Console(stderr=True)
    with waiting(console, "eopt train"):
        for name, arm in arms.items():
            for _, variant in _variants(config, name, arm).values():
                make_optimizer(name, variant, make_model(config, text))
    request = {"config": asdict(config), "arms": {name: asdict(arm) for name, arm in arms.items()}}
    files = {"environment.json": environment(config.threads, text), "config.json": request}
    with sole_writer(folder):
        make_room(folder, overwrite)
        write_atomically({folder / name: json_bytes(value) for name, value in files.items()})
        return _compare(folder, config, arms, text, console)


def resume_train(folder: Path, console: Console | None = None) -> TrainResult:
    """Continues a run that was interrupted at any moment; finished optimizers are not run again.

    On the CPU the losses are those of an uninterrupted run, bit for bit.

    Args:
        folder: Folder of the run.
        console: Where to show progress.

    Returns:
        What each optimizer did, and where the files are.

    Raises:
        UsageError: There is no run in the folder, its text has changed, one of its files is damaged, another process
            writes there, or the disk refuses.
    """
    console = console or Console(stderr=True)
    config, arms = read_run(folder)
    text = load_text(config.text, config.context)
    now = environment(config.threads, text)
    with sole_writer(folder):
        with reading(folder / "environment.json", _AGAIN):
            then = dict(read_json(folder / "environment.json"))
            same_text = then["text"]["sha256"] == now["text"]["sha256"]
        if not same_text:
            raise UsageError(f"{text.source} is not the text that {folder} began with (its SHA-256 differs)")
        print_changes(console, then, now)
        return _compare(folder, config, arms, text, console)


def read_run(folder: Path) -> tuple[TrainConfig, dict[str, Arm]]:
    """Reads what a run folder was asked to do."""
    path = folder / "config.json"
    if not os.path.lexists(path):
        raise UsageError(f"{folder} holds no run: {path} is missing")
    with reading(path, _AGAIN):
        stored = read_json(path)
        config = TrainConfig.from_json(stored["config"])
        return config, {name: checked(Arm(**stored["arms"][name])) for name in config.optimizers}


def make_room(folder: Path, overwrite: bool) -> None:
    """Removes the run that a folder holds, if it may; the sole writer of the folder asks, when all else is checked."""
    claim(folder, "train", Existing(overwrite=overwrite))
    if not os.path.lexists(folder / TRAINED):
        return
    config, _ = read_run(folder)
    with storing(folder):
        for title in (title for name in config.optimizers for title in titles(config, name)):
            if (folder / title).is_dir():
                shutil.rmtree(folder / title)
        for name in ("summary.json", "spike.json", "loss.png", "spike.png"):
            (folder / name).unlink(missing_ok=True)


def new_folder() -> Path:
    """For a run that begins now."""
    return RUNS / time.strftime("%Y-%m-%d-%H%M%S")


def newest_run() -> Path:
    """The run under ``runs/`` that began last."""
    configs = sorted(RUNS.glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    if not configs:
        raise UsageError(f"there is no run under {RUNS.resolve()}; name one: --resume DIR")
    return configs[-1].parent


def train_one(
    config: TrainConfig,
    name: str,
    arm: Arm,
    text: Text,
    *,
    folder: RunFolder | None = None,
    watch: Watch | None = None,
) -> RunResult:
    """Trains with one optimizer: the only training loop of the lab.

    Args:
        config: The job.
        name: Name of the optimizer in the registry.
        arm: Its learning rates and options.
        text: What to learn.
        folder: Where to keep metrics and checkpoints, and to continue from; None keeps nothing.
        watch: Called after each step.

    Returns:
        The steps and their cost.
    """
    with _threads(config.threads):
        model = make_model(config, text)
        optimizer = make_optimizer(name, arm, model)
        if arm.lr is None:
            own = next(group for group in optimizer.param_groups if group["algorithm"] == name)
            arm = replace(arm, lr=float(own["lr"]))
        average = None if config.average is None else WeightAverage(optimizer, config.average)
        schedule = LambdaLR(optimizer, lambda done: lr_factor(config, done))
        parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
        job = {"optimizer": name, "arm": asdict(arm), **asdict(config)}
        steps = folder.restore(parts, job) if folder else []
        held_out = text.held_out(config.eval_windows, config.context)

        past = steps[-1] if steps else StepRecord(step=0)
        for step in range(past.step + 1, config.steps + 1):
            weights = [p.detach().clone() for p in model.parameters()]
            wall, cpu = time.perf_counter(), time.process_time()
            loss = model.loss(*text.batch(config.seed, step, config.batch, config.context))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
            if config.spike is not None and step == config.spike[0] + 1:
                for p in model.parameters():
                    if p.grad is not None:
                        p.grad.mul_(config.spike[1])
            before = time.process_time()
            optimizer.step()
            after = time.process_time()
            rates = tuple(float(group["lr"]) for group in optimizer.param_groups)
            schedule.step()
            past = StepRecord(
                step=step,
                loss=loss.item(),
                lr=rates,
                optimizer_s=past.optimizer_s + after - before,
                cpu_s=past.cpu_s + time.process_time() - cpu,
                wall_s=past.wall_s + time.perf_counter() - wall,
            )
            past = replace(past, update_rms=_distance_rms(weights, list(model.parameters())))
            if step % config.eval_every == 0 or step == config.steps:
                past = replace(past, validation_loss=evaluate(model, *held_out, average))
            steps.append(past)
            if folder:
                folder.append(past)
                if step % config.checkpoint_every == 0 or step == config.steps:
                    folder.save(step, parts, job)
            if watch:
                watch(past)

    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return RunResult(
        optimizer=name,
        arm=arm,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        state_bytes=sum(tensor.nbytes for tensor in tensors),
        steps=tuple(steps),
    )


def make_model(config: TrainConfig, text: Text) -> GPT:
    """The model of a job, with its initial weights."""
    return GPT(
        vocabulary=len(text.vocabulary),
        context=config.context,
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        seed=config.seed,
    )


def make_optimizer(name: str, arm: Arm, model: GPT) -> torch.optim.Optimizer:
    """The optimizer of an arm."""
    try:
        return create_optimizer(name, model, lr=arm.lr, companion_lr=arm.companion_lr, **arm.options)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{name}: {error}") from error


def _compare(folder: Path, config: TrainConfig, arms: Mapping[str, Arm], text: Text, console: Console) -> TrainResult:
    """Runs what is not finished yet, then writes what the runs came to."""
    print_windows(console, config, text)
    for name, arm in arms.items():
        for title, (job, variant) in _variants(config, name, arm).items():
            run = RunFolder(folder / title)
            if not os.path.lexists(run.result):
                with watching(console, title, config.steps, config.batch * config.context) as watch:
                    result = train_one(job, name, variant, text, folder=run, watch=watch)
                write_json(run.result, sealed(asdict(result)))
            run.finished(name, job.steps)  # a damaged result is named before others have trained for nothing
    found = TrainResult.read(folder, config)
    written = {folder / "summary.json": json_bytes(summary(found.runs))}
    if found.spiked:
        written[folder / "spike.json"] = json_bytes(recovery(found.spiked))
    write_atomically(written)
    return found


def _variants(config: TrainConfig, name: str, arm: Arm) -> dict[str, tuple[TrainConfig, Arm]]:
    """The runs of an optimizer, by the name of their folder; the first is without a spike."""
    guarded = replace(arm, options={**arm.options, "spike_guard": SPIKE_GUARD})
    runs = ((replace(config, spike_at=None, spike_scale=None), arm), (config, arm), (config, guarded))
    return dict(zip(titles(config, name), runs, strict=False))


def lr_factor(config: TrainConfig, done: int) -> float:
    """Linear warm-up, then a linear fall to zero, after a number of steps done."""
    return min((done + 1) / config.warmup, (config.steps - done) / (config.steps - config.warmup))


@torch.no_grad()
def _distance_rms(before: list[Tensor], after: list[Tensor]) -> float:
    """RMS of a difference over the elements of all tensors."""
    norms = torch._foreach_norm(torch._foreach_sub(before, after))
    return float(torch.stack(norms).norm()) / sum(p.numel() for p in after) ** 0.5


@torch.no_grad()
def evaluate(model: GPT, ids_BT: Tensor, targets_BT: Tensor, average: WeightAverage | None = None) -> float:
    """Mean loss, 64 windows at a time, with the average of the weights where there is one."""
    if average is not None:
        average.eval()
    total = 0.0
    for start in range(0, len(ids_BT), 64):
        ids, targets = ids_BT[start : start + 64], targets_BT[start : start + 64]
        total += model.loss(ids, targets).item() * len(ids)
    if average is not None:
        average.train()
    return total / len(ids_BT)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
