"""What a step of sharded Dion2 sends and takes where only picked rows travel, against whole matrices; docs/field.md.

`python -m benchmarks.rows` steps 12 matrices under FSDP2 on 2 and 4 processes of this machine with gloo, saves the
numbers and prints their table in Markdown; with `show` it prints what was saved. "Wholes" is the same optimizer with an
`update` of its own, for which the owner of a matrix puts all of it together. The two take turns, step by step, in the
same processes; a step is as long as the slowest process takes.
"""

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from benchmarks.distributed import Weights
from emerging_optimizers import Dion2
from emerging_optimizers.engine import Scalars, Step
from emerging_optimizers.lab.record import environment, read_json, write_json
from emerging_optimizers.orthogonalized_optimizers.dion2 import Dion2Rule

OUT = Path(__file__).parent / "results" / "rows.json"
MATRICES = (((6, (256, 1024)), (6, (1024, 256))), ((6, (768, 3072)), (6, (3072, 768))))
FRACTION = 0.25
WARM, ROUNDS = 3, 15


class Wholes(Dion2):
    """Dion2 as of a rule that knows of whole matrices alone."""

    class rule(Dion2Rule):
        """The same step."""

        def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
            """As it is."""
            return super().update(grad, state, t)


def measure(shapes: Sequence[tuple[int, tuple[int, int]]]) -> dict[str, Any]:
    """A row of the table, on every process of the group."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ways = []
    for kind in (Dion2, Wholes):
        model = Weights(shapes)
        fully_shard(model, mesh=mesh)
        ways.append(([*model.parameters()], kind(model.parameters(), lr=0.02, fraction=FRACTION)))
    generator = torch.Generator().manual_seed(1)
    seconds = torch.zeros(2, WARM + ROUNDS)
    sent = torch.zeros(2, dtype=torch.float64)
    original = dist.all_to_all_single

    for turn in range(WARM + ROUNDS):
        gradients = [torch.randn(shape, generator=generator) for count, shape in shapes for _ in range(count)]
        for k in ((0, 1), (1, 0))[turn % 2]:
            parameters, optimizer = ways[k]
            for p, grad in zip(parameters, gradients, strict=True):
                p.grad = distribute_tensor(grad, mesh, p.placements, src_data_rank=None)

            def counted(received: Tensor, given: Tensor, *args: Any, k: int = k, **kwargs: Any) -> Any:
                sent[k] += given.numel() * given.element_size()
                return original(received, given, *args, **kwargs)

            dist.all_to_all_single = counted if turn == 0 else original
            dist.barrier()
            begin = time.perf_counter()
            optimizer.step()
            seconds[k, turn] = time.perf_counter() - begin
    dist.all_to_all_single = original
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    dist.all_reduce(sent)
    far = max(float((a - b).detach().full_tensor().abs().max()) for a, b in zip(*(p for p, _ in ways), strict=True))
    rows, wholes = seconds[:, WARM:]
    return {
        "processes": dist.get_world_size(),
        "matrices": ", ".join(f"{count} of {M} x {N}" for count, (M, N) in shapes),
        "mib": [round(float(x) / 2**20, 2) for x in sent],
        "milliseconds": [round(1000 * float(x.median()), 1) for x in (rows, wholes)],
        "ratio": [round(x, 2) for x in quantiles((rows / wholes).tolist(), n=4)],
        "distance": float(f"{far:.1e}"),
    }


def _main(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    rows = [measure(shapes) for shapes in MATRICES]
    if rank == 0:
        write_json(Path(folder, "rows.json"), rows)
    dist.barrier()
    dist.destroy_process_group()


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of docs/field.md."""
    lines = [
        "| processes | matrices | sent, rows and wholes, MiB | a step, ms | rows / wholes |",
        "|--:|---|--:|--:|--:|",
    ]
    for row in rows:
        sent, times = ("{} and {}".format(*row[name]) for name in ("mib", "milliseconds"))
        ratio = "{1:.2f} ({0:.2f} to {2:.2f})".format(*row["ratio"])
        lines.append(f"| {row['processes']} | {row['matrices']} | {sent} | {times} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, save, show."""
    if sys.argv[1:] != ["show"]:
        rows = []
        for world in (2, 4):
            with tempfile.TemporaryDirectory() as folder:
                mp.spawn(_main, (world, folder), nprocs=world)
                rows += read_json(Path(folder, "rows.json"))
        write_json(OUT, {"environment": {**environment(1), "cores": os.cpu_count()}, "rows": rows})
    print(markdown(read_json(OUT)["rows"]))


if __name__ == "__main__":
    main()
