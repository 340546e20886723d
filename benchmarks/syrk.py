"""The kernel for symmetric products against torch's full ones, for tables in `linalg/kernels`; needs a CUDA device.

`python benchmarks/syrk.py` times A A^T and b A + c A^2 of stacks, every route in turn, and prints and saves the median
over rounds in milliseconds: of torch, and of each choice of tiles. What wins by more than the spread of the rounds goes
into `TILES` (syrk_triton.py) and `SYRK` (routes.py).
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from emerging_optimizers.lab.record import write_json
from emerging_optimizers.linalg.kernels.syrk_triton import TILES, launch
from emerging_optimizers.linalg.precision import FP32MatmulPrecT, fp32_matmul_precision

OUT = Path(__file__).parent / "results" / "syrk.json"
ROUNDS = 20
SHAPES = ((64, 256, 1024), (24, 768, 768), (24, 768, 3072), (8, 2048, 2048), (4, 2048, 8192), (2, 4096, 4096))
# Side, depth, warps, stages.
TRIED: dict[str, list[tuple[int, int, int, int]]] = {
    "bf16": [(64, 64, 4, 3), (64, 64, 4, 4), (128, 32, 4, 4), (128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 4)],
    "tf32": [(64, 32, 4, 3), (64, 32, 4, 4), (128, 32, 4, 3), (128, 32, 8, 3), (128, 16, 8, 4)],
    "ieee": [(32, 32, 4, 2), (64, 16, 4, 2), (64, 16, 8, 2), (64, 32, 8, 2)],
}
PRECISIONS: dict[str, FP32MatmulPrecT] = {"bf16": "medium", "tf32": "high", "ieee": "highest"}


def milliseconds(work: Callable[[], Tensor]) -> float:
    """Of one call, between two events of the device."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def main() -> None:
    """Measure, show, save."""
    results: dict[str, dict[str, float]] = {}
    for kind, choices in TRIED.items():
        assert TILES[kind] in choices
        for B, M, K in SHAPES:
            a = torch.randn(B, M, K, device="cuda").to(torch.bfloat16 if kind == "bf16" else torch.float32)
            gram = a @ a.mT
            for name, x, c in (("A A^T", a, None), ("b A + c A^2", gram, gram)):
                routes: dict[str, Callable[[], Tensor]] = {
                    "torch": partial(torch.baddbmm, gram, x, x.mT, beta=0 if c is None else 0.5, alpha=0.5),
                    **{
                        str(tiles): partial(launch, x, c, 0.5, 0.5, tf32=kind == "tf32", tiles=tiles)
                        for tiles in choices
                    },
                }
                with fp32_matmul_precision(PRECISIONS[kind]):
                    times: dict[str, list[float]] = {route: [] for route in routes}
                    for _ in range(ROUNDS + 3):
                        for route, work in routes.items():
                            times[route].append(milliseconds(work))
                key = f"{kind} {name} {B} x {M} x {K}"
                results[key] = {route: round(median(values[3:]), 4) for route, values in times.items()}
                print(key, json.dumps(results[key]), flush=True)
    write_json(OUT, {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "milliseconds": results})


if __name__ == "__main__":
    main()
