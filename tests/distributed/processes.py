"""Running a function in several processes, and models and layouts for it."""

import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

PRELOADED = [
    "torch", "torch.distributed.tensor.parallel", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict",
    "torch._dynamo",  # by the first optimizer of a process, in half a second to a second
    "emerging_optimizers.testing", "tests.cases",
]  # fmt: skip


def run(world: int, function: Callable[..., Any], *args: Any, timeout: float = 100.0) -> list[Any]:
    """What a function returns in each of several processes with a gloo group; raises what one of them raises.

    The function is named by its module, and gets the arguments. A process that does not end is killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_main, args=(rank, world, f"{folder}/store", theirs, function, args))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        found: list[Any] = []
        try:
            for rank, pipe in enumerate(pipes):
                try:
                    found.append(pipe.recv() if pipe.poll(timeout) else (False, f"rank {rank} did not end"))
                except EOFError:
                    found.append((False, f"rank {rank} died"))
        finally:
            for process in processes:
                process.join(5)
                process.kill()
    failures = [text for fine, text in found if not fine]
    if failures:
        raise AssertionError("\n".join(map(str, failures)))
    return [result for _, result in found]


def _main(rank: int, world: int, store: str, pipe: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        result = (True, function(*args))
        dist.barrier()
    except BaseException:
        result = (False, f"rank {rank}: {traceback.format_exc()}")
    pipe.send(result)
    pipe.close()
    if result[0]:
        dist.destroy_process_group()
    os._exit(0)  # threads of a group that others have left may hang


class Net(nn.Module):
    """Every kind of parameter, small: sides that divide and sides that do not, an empty shard on four processes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.odd = nn.Linear(7, 5, bias=False)
        self.narrow = nn.Linear(6, 3, bias=False)
        self.convolution = nn.Conv2d(3, 4, 2)
        self.experts = nn.Parameter(torch.randn(4, 6, 4) / 4)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 9)

    def forward(self, x: Tensor) -> Tensor:
        """Without the parts that only have gradients here."""
        out: Tensor = self.head(self.norm(self.down(torch.tanh(self.up(self.table(x))))))
        return out


def make_net(dtype: torch.dtype = torch.float64) -> nn.Module:
    """The same on each process."""
    torch.manual_seed(0)
    return Net().to(dtype)


def gradients(step: int, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Normal numbers; in some steps not finite, a spike, and missing."""
    generator = torch.Generator().manual_seed(step)
    found = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    if step == 3:
        for name in ("up.weight", "norm.weight", "attention.in_proj_weight"):
            found[name].view(-1)[-1] = torch.inf
        found["experts"][2, 1, 1] = torch.nan
    if step == 4:
        for name in ("down.weight", "experts", "head.bias", "attention.out_proj.weight"):
            found[name] *= 1e4
    if step == 5:
        del found["odd.weight"], found["norm.bias"]
    return found


@lru_cache
def _mesh(*shape: int) -> Any:
    """One for all models of a process: each would make groups of its own, with their threads."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=tuple("abc"[: len(shape)]))


def fsdp(model: nn.Module) -> None:
    """FSDP2: rows, uneven ones and empty shards among them."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=_mesh(dist.get_world_size()))


def hsdp(model: nn.Module) -> None:
    """FSDP2 in two replicas."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=_mesh(2, dist.get_world_size() // 2))


def _parallel(model: nn.Module, mesh: Any) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def tensor_parallel(model: nn.Module) -> None:
    """Two layers cut by columns and by rows; the others are plain."""
    _parallel(model, _mesh(dist.get_world_size()))


def fsdp_and_tensor_parallel(model: nn.Module) -> None:
    """FSDP2 over one dimension of a mesh, tensor parallel over the other."""
    from torch.distributed.fsdp import fully_shard

    mesh = _mesh(2, dist.get_world_size() // 2)
    _parallel(model, mesh["b"])
    fully_shard(model, mesh=mesh["a"])


def _distribute(model: nn.Module, name: str, mesh: Any, *placements: Any) -> nn.Parameter:
    from torch.distributed.tensor import distribute_tensor

    p = nn.Parameter(distribute_tensor(model.get_parameter(name).data, mesh, placements))
    setattr(model, name, p)
    return p


def expert_parallel(model: nn.Module) -> None:
    """Each process has some of the experts; the rest is plain."""
    from torch.distributed.tensor import Shard

    _distribute(model, "experts", _mesh(dist.get_world_size()), Shard(0))


def cut_experts(model: nn.Module) -> None:
    """Each process has a part of each expert."""
    from torch.distributed.tensor import Shard

    _distribute(model, "experts", _mesh(dist.get_world_size()), Shard(2))


def mixed(model: nn.Module) -> None:
    """Experts on some processes, the rest sharded, vectors replicated."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    mesh = _mesh(dist.get_world_size())
    experts = _distribute(model, "experts", mesh, Shard(0))
    vectors = {p for p in model.parameters() if p.ndim == 1}
    fully_shard(model, mesh=mesh, ignored_params={experts, *vectors})


def two_meshes(model: nn.Module) -> None:
    """Experts over pairs of processes, a layer over all in another order, the rest plain."""
    from torch.distributed.tensor import Shard

    pairs = _mesh(2, dist.get_world_size() // 2)
    _distribute(model, "experts", pairs["b"], Shard(0))
    _distribute(model.get_submodule("odd"), "weight", _mesh(dist.get_world_size()), Shard(1))
    _distribute(model.get_submodule("up"), "weight", pairs["a"], Shard(0))


def replicated(model: nn.Module) -> None:
    """As under DistributedDataParallel: every process has everything."""


LAYOUTS: dict[str, Callable[[nn.Module], None]] = {
    f.__name__: f
    for f in (
        fsdp, hsdp, tensor_parallel, fsdp_and_tensor_parallel, expert_parallel, cut_experts, mixed, two_meshes,
        replicated,
    )
}  # fmt: skip
