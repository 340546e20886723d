"""What a Muon step of sharded matrices takes on several processes of this machine, three ways; docs/distributed.md.

`python -m benchmarks.distributed` times a step of 12 matrices under FSDP2 on 2 and on 4 processes with gloo, saves the
numbers and prints their table in Markdown; with `show` it prints what was saved. The ways take turns, step by step, in
the same processes:

- ours: this library's Muon. Every matrix is worked on by one process.
- torch: `torch.optim.Muon` on the same DTensors.
- gather: every process puts every gradient together (`full_tensor`), works on all matrices (this library's Muon in one
  process), and keeps its rows.

All take five Newton-Schulz steps with the same coefficients, in the precision that the row names. torch.optim.Muon
computes in bfloat16: in rows of float32 the cast is left out (`DTensor.bfloat16` copies), the rest is torch's own code.
A step is as long as the slowest process takes: they start together, after a barrier that is not timed.
"""

import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from emerging_optimizers import Muon
from emerging_optimizers.lab.record import environment, read_json, write_json
from emerging_optimizers.linalg.precision import ReducedPrecisionT, reduced_precision

OUT = Path(__file__).parent / "results" / "distributed.json"
WAYS = ("ours", "torch", "gather")
MATRICES = ((6, (256, 1024)), (6, (1024, 256)))
SMALL = ((6, (128, 512)), (6, (512, 128)))
OPTIONS: dict[str, Any] = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1, "nesterov": True}

Shapes = Sequence[tuple[int, tuple[int, int]]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A table's row.

    Attributes:
        processes: how many.
        matrices: their number and shape.
        precision: of the products: float32 or bfloat16.
        milliseconds: of a step, by way; the median.
        ratios: of a way to ours, in the same round: lower quartile, median, upper quartile.
        collectives: of a step, by way.
        distance: the largest difference of a way's update to ours, over the largest element of the update.
    """

    processes: int
    matrices: Shapes
    precision: str
    milliseconds: Mapping[str, float]
    ratios: Mapping[str, Sequence[float]]
    collectives: Mapping[str, int]
    distance: Mapping[str, float]


class Weights(nn.Module):
    """Matrices, and what `fully_shard` needs of a module."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        whole = [torch.randn(shape, generator=generator) / 32 for count, shape in shapes for _ in range(count)]
        self.matrices = nn.ParameterList(whole)


class Way:
    """An optimizer over sharded matrices of its own."""

    def __init__(self, name: str, shapes: Shapes) -> None:
        self.name = name
        model = Weights(shapes)
        if name == "gather":  # before they are cut
            self.wholes = [nn.Parameter(p.detach().clone()) for p in model.matrices]
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        self.parameters: list[Any] = list(model.parameters())
        kind = torch.optim.Muon if name == "torch" else Muon
        extra = {} if name == "torch" else {"coefficient_type": "simple", "scale_mode": "shape_scaling"}
        self.optimizer = kind(self.wholes if name == "gather" else self.parameters, **OPTIONS, **extra)

    def give(self, gradients: Sequence[Tensor]) -> None:
        """Set the gradients, sharded like the parameters."""
        for p, grad in zip(self.parameters, gradients, strict=True):
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)

    def step(self) -> None:
        """One step."""
        if self.name != "gather":
            self.optimizer.step()
            return
        for whole, p in zip(self.wholes, self.parameters, strict=True):
            whole.grad = p.grad.full_tensor()
        self.optimizer.step()
        rank, world = dist.get_rank(), dist.get_world_size()
        with torch.no_grad():
            for whole, p in zip(self.wholes, self.parameters, strict=True):
                p.to_local().copy_(whole.chunk(world)[rank])


def measure(shapes: Shapes, precision: ReducedPrecisionT, rounds: int, warm: int) -> Row:
    """A row, on every process of the group; the times are those of the slowest."""
    generator = torch.Generator().manual_seed(1)
    ways = {name: Way(name, shapes) for name in WAYS}
    before = [p.full_tensor().detach() for p in ways["ours"].parameters]
    seconds = torch.zeros(len(WAYS), warm + rounds)
    counts: dict[str, int] = {}
    updates: dict[str, list[Tensor]] = {}
    uncast = patch.object(DTensor, "bfloat16", DTensor.clone) if precision == "float32" else nullcontext()
    with reduced_precision(precision), uncast:
        for turn in range(warm + rounds):
            gradients = [torch.randn(shape, generator=generator) for count, shape in shapes for _ in range(count)]
            for k in range(len(WAYS)):
                k = (k + turn) % len(WAYS)  # nobody is always behind the same one
                way = ways[WAYS[k]]
                way.give(gradients)
                dist.barrier()
                mode = CommDebugMode()
                with mode if turn == 0 else nullcontext():
                    begin = time.perf_counter()
                    way.step()
                    seconds[k, turn] = time.perf_counter() - begin
                if turn == 0:
                    counts[way.name] = mode.get_total_counts()
                    after = [p.full_tensor().detach() for p in way.parameters]
                    updates[way.name] = [a - b for a, b in zip(after, before, strict=True)]
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    timed = seconds[:, warm:]
    return Row(
        processes=dist.get_world_size(),
        matrices=shapes,
        precision=precision,
        milliseconds={name: round(1000 * median(timed[k].tolist()), 2) for k, name in enumerate(WAYS)},
        ratios={
            name: [round(x, 2) for x in quantiles((timed[k] / timed[0]).tolist(), n=4)]
            for k, name in enumerate(WAYS)
            if k
        },
        collectives=counts,
        distance={name: float(f"{_distance(updates[name], updates['ours']):.1e}") for name in WAYS[1:]},
    )


def _distance(updates: Sequence[Tensor], ours: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(updates, ours, strict=True))


def run(processes: int, cases: Sequence[tuple[Shapes, ReducedPrecisionT]], rounds: int, warm: int = 3) -> list[Row]:
    """The rows of a number of processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_main, (processes, folder, cases, rounds, warm), nprocs=processes)
        return [restored(row) for row in read_json(Path(folder, "rows.json"))]


def _main(
    rank: int, world: int, folder: str, cases: Sequence[tuple[Shapes, ReducedPrecisionT]], rounds: int, warm: int
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    rows = [asdict(measure(shapes, precision, rounds, warm)) for shapes, precision in cases]
    if rank == 0:
        write_json(Path(folder, "rows.json"), rows)
    dist.barrier()
    dist.destroy_process_group()


def restored(saved: dict[str, Any]) -> Row:
    """The inverse of `dataclasses.asdict` followed by JSON."""
    return Row(**{**saved, "matrices": tuple((count, tuple(shape)) for count, shape in saved["matrices"])})


def markdown(rows: Sequence[Row]) -> str:
    """The table of docs/distributed.md."""
    lines = [
        "| processes | matrices | products in | ours, ms | torch.optim.Muon, ms | gather, ms | torch / ours "
        "| gather / ours | collectives: ours, torch, gather |",
        "|--:|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        shapes = ", ".join(f"{count} of {m} x {n}" for count, (m, n) in row.matrices)
        times = " | ".join(f"{row.milliseconds[way]:.1f}" for way in WAYS)
        ratios = " | ".join("{1:.2f} ({0:.2f} to {2:.2f})".format(*row.ratios[way]) for way in WAYS[1:])
        counts = ", ".join(str(row.collectives[way]) for way in WAYS)
        lines.append(f"| {row.processes} | {shapes} | {row.precision} | {times} | {ratios} | {counts} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, save, show."""
    if sys.argv[1:] == ["show"]:
        print(markdown([restored(row) for row in read_json(OUT)["rows"]]))
        return
    surroundings = {**environment(1), "cores": os.cpu_count()}
    precisions: tuple[ReducedPrecisionT, ...] = ("float32", "bfloat16")
    cases = [(shapes, precision) for shapes in (MATRICES, SMALL) for precision in precisions]
    rows = [row for processes in (2, 4) for row in run(processes, cases, rounds=15)]
    found = {"environment": surroundings, "rows": [asdict(row) for row in rows]}
    write_json(OUT, found)
    print(markdown(rows))


if __name__ == "__main__":
    main()
