"""Train a small GPT on characters under FSDP2, save, and go on with any number of processes.

    torchrun --nproc-per-node 2 examples/fsdp2_train.py --steps 20
    torchrun --nproc-per-node 4 examples/fsdp2_train.py --steps 40 --resume
    python examples/fsdp2_train.py --steps 60 --resume --optimizer soap

One process, or several under torchrun: gloo on a CPU, NCCL on GPUs. The losses are the same whatever the number is, up
to rounding, since all processes together work on the same batch. Needs nothing but torch and this library.
"""

import argparse
import os
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from emerging_optimizers import create_optimizer

BATCH, CONTEXT, WIDTH, HEADS, BLOCKS = 16, 64, 128, 4, 4
WARMUP = 10  # steps


class Block(nn.Module):
    """Causal attention and a perceptron, each added to the residual stream."""

    def __init__(self):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        """One layer."""
        h = self.attention_norm(x)
        q, k, v = (m(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for m in (self.query, self.key, self.value))
        x = x + self.output(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    """Logits of the next character."""

    def __init__(self, vocabulary):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary, bias=False)

    def forward(self, ids):
        """Of each position."""
        x = self.token(ids) + self.position.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def set_up():
    """Join the other processes, if there are any; return this one's device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    if "RANK" in os.environ:  # torchrun says who this is and where the others are
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def batch_of(text, step, device):
    """This process's rows of the batch of a step. The batch depends on the step alone, so a resumed run needs no state
    of a data loader, and every number of processes sees the same."""
    starts = torch.randint(len(text) - CONTEXT, (BATCH,), generator=torch.Generator().manual_seed(step))
    mine = starts.chunk(dist.get_world_size())[dist.get_rank()]
    rows = text[mine[:, None] + torch.arange(CONTEXT + 1)].to(device)
    return rows[:, :-1], rows[:, 1:]


def save(folder, step, model, optimizer, schedule):
    """Every process writes what it holds."""
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save({**states, "schedule": schedule.state_dict()}, checkpoint_id=folder / f"step-{step:06}")


def checkpoints(folder):
    """The whole ones, oldest first. The file .metadata is written last: where it is, the checkpoint is whole."""
    return sorted(path.parent for path in folder.glob("step-*/.metadata"))


def load_newest(folder, model, optimizer, schedule):
    """Go back to the newest checkpoint, by whatever number of processes it was written; return its step, or 0."""
    found = checkpoints(folder)
    if not found:
        return 0
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    states["schedule"] = schedule.state_dict()
    dcp.load(states, checkpoint_id=found[-1])  # into these tensors, each process its part
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    schedule.load_state_dict(states["schedule"])
    return schedule.last_epoch


def mean_over_processes(loss):
    """Of equally many rows each."""
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def train(asked, device):
    """Train up to a step; return the losses of the steps that were taken here."""
    if BATCH % dist.get_world_size():
        raise SystemExit(f"a batch of {BATCH} rows cannot be split evenly among {dist.get_world_size()} processes")
    if not asked.resume and checkpoints(asked.out):
        raise SystemExit(f"{asked.out} holds checkpoints of another run; go on with --resume, or give another --out")
    dist.barrier()  # all have looked, before the first of them saves
    characters = "\n\n".join(topics[name] for name in sorted(topics))  # CPython's language reference
    number = {character: k for k, character in enumerate(sorted(set(characters)))}
    text = torch.tensor([number[character] for character in characters])

    torch.manual_seed(0)  # the same weights everywhere, before they are cut
    model = GPT(len(number)).to(device)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    # After fully_shard, which replaces the parameters. Matrices go to the optimizer of this name, the rest to AdamW.
    optimizer = create_optimizer(asked.optimizer, model, lr=asked.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min(1.0, (done + 1) / WARMUP))
    done = load_newest(asked.out, model, optimizer, schedule) if asked.resume else 0

    losses = []
    for step in range(done + 1, asked.steps + 1):
        ids, targets = batch_of(text, step, device)
        loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()  # FSDP2 averages the gradients of all processes
        optimizer.step()
        schedule.step()
        losses.append(mean_over_processes(loss))
        if dist.get_rank() == 0:
            print(f"step {step}  loss {losses[-1]:.6f}", flush=True)
        if step % asked.save_every == 0 or step == asked.steps:
            save(asked.out, step, model, optimizer, schedule)
    return losses


def main():
    """Read the command line, train."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--optimizer", default="soap", help="a name from `eopt list`")
    arguments.add_argument("--lr", type=float, help="by default each optimizer starts from its own")
    arguments.add_argument("--steps", type=int, default=60, help="where training ends, counted from the beginning")
    arguments.add_argument("--save-every", type=int, default=20, help="steps between checkpoints")
    arguments.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out, if any")
    arguments.add_argument("--out", type=Path, default=Path("runs/fsdp2"), help="folder of the checkpoints")
    device = set_up()
    try:
        train(arguments.parse_args(), device)
        dist.barrier()  # gloo's threads let go of the last tensors, which they could not while Python ends
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
