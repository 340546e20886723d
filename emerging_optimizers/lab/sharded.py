"""The training job on several processes of this machine, the model sharded by FSDP2: `eopt train --nproc`.

Every process takes its rows of the batches of `eopt train`, so losses are those of one process up to rounding. The
losses are shown; checkpoints (torch.distributed.checkpoint) are kept, and any number of processes goes on from them.
`examples/fsdp2_train.py` is the same in one file, to be copied.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR

from emerging_optimizers.averaging import WeightAverage
from emerging_optimizers.cli import FailedError, UsageError
from emerging_optimizers.cli.files import write_atomically
from emerging_optimizers.lab.config import Arm, TrainConfig
from emerging_optimizers.lab.data import Text, load_text
from emerging_optimizers.lab.progress import print_windows
from emerging_optimizers.lab.record import environment, json_bytes, read_json, sole_writer
from emerging_optimizers.lab.train import evaluate, lr_factor, make_model, make_optimizer, make_room, read_run


def begin(config: TrainConfig, folder: Path, processes: int, overwrite: bool = False) -> None:
    """Trains with each optimizer on several processes.

    Args:
        config: The job.
        folder: For the request and the checkpoints.
        processes: How many.
        overwrite: Whether a run that the folder holds is replaced.

    Raises:
        UsageError: The folder holds something already, the job cannot be run as it stands, or a process has failed.
    """
    _check(config, processes)
    if config.spike is not None:
        raise UsageError("--spike-at compares runs in one process; leave out --nproc")
    text = load_text(config.text, config.context)
    arms = {name: config.arm(name) for name in config.optimizers}
    for name, arm in arms.items():
        make_optimizer(name, arm, make_model(config, text))
    with sole_writer(folder):
        make_room(folder, overwrite)
        arms_json = {name: asdict(arm) for name, arm in arms.items()}
        request = {"config": asdict(config), "arms": arms_json, "sharded": True}
        files = {"environment.json": environment(config.threads, text), "config.json": request}
        write_atomically({folder / name: json_bytes(value) for name, value in files.items()})
        go_on(folder, config, processes)


def is_sharded(folder: Path) -> bool:
    """Whether a run was begun on several processes."""
    return bool(read_json(folder / "config.json").get("sharded"))


def go_on(folder: Path, config: TrainConfig, processes: int) -> None:
    """Trains from the newest checkpoint of each optimizer; see `begin`."""
    _check(config, processes)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, "-m", "emerging_optimizers.lab.sharded", str(folder)]
    with sole_writer(folder):
        if subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(config.threads)}).returncode:
            raise FailedError(f"a process has failed, its error is above; --resume {folder} goes on from a checkpoint")


def _check(config: TrainConfig, processes: int) -> None:
    if processes < 1 or config.batch % processes:
        raise UsageError(f"--nproc {processes} cannot share --batch {config.batch} in equal parts")


def _train_one(config: TrainConfig, name: str, arm: Arm, text: Text, folder: Path) -> None:
    """One optimizer, on every process."""
    model = make_model(config, text)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = make_optimizer(name, arm, model)
    average = None if config.average is None else WeightAverage(optimizer, config.average)
    parts: dict[str, Any] = {
        "model": model,
        "optimizer": optimizer,
        "schedule": LambdaLR(optimizer, lambda k: lr_factor(config, k)),
    }
    held_out = text.held_out(config.eval_windows, config.context)
    for step in range(_restored(folder, parts) + 1, config.steps + 1):
        ids, targets = (_rows(x) for x in text.batch(config.seed, step, config.batch, config.context))
        loss = model.loss(ids, targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        optimizer.step()
        parts["schedule"].step()
        last = step == config.steps
        if last or step % config.eval_every == 0:
            shown = f"loss {_mean(loss):.3f}  validation {evaluate(model, *held_out, average):.3f}"
            if dist.get_rank() == 0:
                print(f"{name:>12}  step {step}/{config.steps}  {shown}", file=sys.stderr, flush=True)
        if last or step % config.checkpoint_every == 0:
            save(_states(parts), checkpoint_id=folder / f"step-{step:06}")


def _rows(batch: Tensor) -> Tensor:
    """What of a batch this process works on."""
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def _mean(loss: Tensor) -> float:
    """Over all processes, which have equally many rows."""
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def _states(parts: Mapping[str, Any]) -> dict[str, Any]:
    model, optimizer = get_state_dict(parts["model"], parts["optimizer"])
    return {"model": model, "optimizer": optimizer, "schedule": parts["schedule"].state_dict()}


def _restored(folder: Path, parts: Mapping[str, Any]) -> int:
    """Goes back to the newest checkpoint that is whole, `.metadata` being written last; its step, or 0."""
    found = sorted(path.parent for path in folder.glob("step-*/.metadata"))
    if not found:
        return 0
    states = _states(parts)
    load(states, checkpoint_id=found[-1])
    set_state_dict(
        parts["model"], parts["optimizer"], model_state_dict=states["model"], optim_state_dict=states["optimizer"]
    )
    parts["schedule"].load_state_dict(states["schedule"])
    return int(parts["schedule"].last_epoch)


def main(folder: Path) -> None:
    """One of the processes."""
    config, arms = read_run(folder)
    torch.set_num_threads(config.threads)
    dist.init_process_group("gloo")  # the lab's job runs on the CPU
    text = load_text(config.text, config.context)
    if dist.get_rank() == 0:
        print_windows(Console(stderr=True), config, text)
    for name, arm in arms.items():
        _train_one(config, name, arm, text, folder / name)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # a thread of gloo that lets go of a tensor while Python ends takes the process down (pytorch#190489)
