"""Attention modules of several kinds, small, and a module run in several processes."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from emerging_optimizers import QKClip
from emerging_optimizers.distributed.dtensor import whole_of
from tests.distributed.processes import _mesh


class Grouped(nn.Module):
    """Query and key projections apart; `groups` key heads."""

    def __init__(self, width: int = 16, heads: int = 4, groups: int = 2) -> None:
        super().__init__()
        self.num_heads, self.size = heads, width // heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj, self.v_proj = (nn.Linear(width, groups * self.size, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Causal attention."""
        q, k, v = (m(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for m in (self.q_proj, self.k_proj, self.v_proj))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(x.transpose(1, 2).flatten(2))


class Fused(nn.Module):
    """As in nanoGPT: one projection, logits by hand."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.n_head = heads
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Causal attention."""
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, -1))
        logits = (q @ k.mT) * q.shape[-1] ** -0.5
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        weights = logits.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        return self.c_proj((weights @ v).transpose(1, 2).flatten(2))


def net(*layers: nn.Module) -> nn.Module:
    """Layers of this file, each with its own weights, the same in every process."""
    torch.manual_seed(0)
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.5)
    return model


def batch(rows: int = 4, seed: int = 1) -> Tensor:
    """Sequences."""
    return torch.randn(rows, 8, 16, generator=torch.Generator().manual_seed(seed))


@contextmanager
def alone() -> Iterator[None]:
    """As in one process."""
    known, dist.is_initialized = dist.is_initialized, lambda: False
    try:
        yield
    finally:
        dist.is_initialized = known


def compared(kind: str) -> dict[str, Any]:
    """A clip over sharded weights, each process with its part of the batch, and one process with all of both."""
    model, whole, x = net(Grouped(), Grouped()), net(Grouped(), Grouped()), batch()
    clip = QKClip(model, threshold=4.0)  # made before the parameters are sharded
    here, world = x[dist.get_rank() :: dist.get_world_size()], dist.get_world_size()
    run: nn.Module = model
    if kind == "replicated":
        run = nn.parallel.DistributedDataParallel(model)
    elif kind in ("fsdp", "hsdp"):
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=_mesh(world) if kind == "fsdp" else _mesh(2, world // 2))
    else:
        here = _parallel(model, x, kind)
    run(here)
    clip.step()
    weights = {name: whole_of(p.detach()) for name, p in model.named_parameters()}
    with alone():
        expected = QKClip(whole, threshold=4.0)
        whole(x)
        expected.step()
    return {
        "error": max(float((weights[name] - p).abs().max()) for name, p in whole.named_parameters()),
        "maxima": (clip.maxima(), expected.maxima()),
        "events": (clip.events(), expected.events()),
        "local": {name: tuple(getattr(p, "_local_tensor", p).shape) for name, p in model.named_parameters()},
    }


def _parallel(model: nn.Module, x: Tensor, kind: str) -> Tensor:
    """Heads on several processes; "both": and FSDP2 over them."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan: dict[str, Any] = {f"*.{name}": ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
    plan["*.o_proj"] = RowwiseParallel()
    if kind == "tensor_parallel":
        parallelize_module(model, _mesh(dist.get_world_size()), plan)
        return x
    mesh = _mesh(2, 2)
    parallelize_module(model, mesh["b"], plan)
    fully_shard(model, mesh=mesh["a"])
    return x[dist.get_rank() // 2 :: 2]


def of_nan() -> tuple[dict[str, Any], dict[str, Any]]:
    """What a clip makes of logits that are not finite on one process of two."""
    clip = QKClip(net(Grouped()), threshold=4.0, measure=False)
    clip.observe("0", [math.nan, 5.0, math.inf, math.nan] if dist.get_rank() else [5.0, math.nan, 5.0, 3.0])
    clip.step()
    return clip.maxima(), clip.events()


def differing() -> str:
    """What a clip says where processes have different modules."""
    model = net(*[Grouped() for _ in range(1 + dist.get_rank())])
    clip = QKClip(model)
    model(batch())
    try:
        clip.step()
    except ValueError as error:
        return str(error)
    return "no error"
