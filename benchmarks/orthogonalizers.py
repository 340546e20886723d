"""Accuracy and cost of every orthogonalizer, the figures of docs/orthogonalizers.md.

`python benchmarks/orthogonalizers.py` measures and saves.

Band: smallest and largest singular value of the result (float32 input, singular values taken in float64) on a Gaussian
matrix, on one whose singular values fall geometrically to 1e-3 of the largest, and on rank 8 plus noise of 1 %; all
256 x 256. Cost: CPU seconds of one matrix, routes in turn, median over rounds, over the median of quintic with 5 steps.
"""

import json
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from emerging_optimizers.lab.config import TrainConfig
from emerging_optimizers.lab.data import load_text
from emerging_optimizers.lab.record import environment, write_json
from emerging_optimizers.linalg.coefficients import SCHEDULES, coefficients
from emerging_optimizers.linalg.newton_schulz import gram_newton_schulz, newton_schulz
from emerging_optimizers.linalg.polar import polar_qdwh, polar_svd

OUT = Path(__file__).parent / "results" / "orthogonalizers.json"
TIMED = {(256, 256): 15, (768, 3072): 3}
QUINTIC = coefficients("quintic", 5)
ROUTES = {
    **{
        f"newton_schulz {name}, {steps} steps": partial(newton_schulz, coefficients=coefficients(name, steps))
        for name, steps in ((name, schedule.made_for or 5) for name, schedule in SCHEDULES.items())
    },
    "newton_schulz quintic, bfloat16": partial(newton_schulz, coefficients=QUINTIC, compute_dtype=torch.bfloat16),
    "gram_newton_schulz quintic, 5 steps": partial(gram_newton_schulz, coefficients=QUINTIC),
    "gram_newton_schulz quintic, bfloat16": partial(
        gram_newton_schulz, coefficients=QUINTIC, compute_dtype=torch.bfloat16
    ),
    "qdwh": polar_qdwh,
    "svd": polar_svd,
}
BASELINE = "newton_schulz quintic, 5 steps"


def inputs(n: int = 256) -> dict[str, Tensor]:
    """The matrices of the bands, (1, n, n) each."""
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(1, n, n, generator=generator)
    U, _, Vh = torch.linalg.svd(gaussian.double())
    low, left, right = (torch.randn(1, *s, generator=generator) for s in ((n, n), (n, 8), (8, n)))
    return {
        "gaussian": gaussian,
        "condition_1e3": ((U * torch.logspace(0, -3, n, dtype=torch.float64)) @ Vh).float(),
        "rank_8_plus_noise": left @ right / 8**0.5 + 0.01 * low,
    }


def main() -> None:
    """Measure, show, save."""
    torch.set_num_threads(1)
    results: dict[str, dict[str, object]] = {}
    for name, route in ROUTES.items():
        bands = {kind: torch.linalg.svdvals(route(x).double()).flatten() for kind, x in inputs().items()}
        results[name] = {"band": {k: [round(float(s.min()), 4), round(float(s.max()), 4)] for k, s in bands.items()}}
    for shape, rounds in TIMED.items():
        x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
        seconds: dict[str, list[float]] = {name: [] for name in ROUTES}
        for _ in range(rounds + 1):
            for name, route in ROUTES.items():
                begin = time.process_time()
                route(x)
                seconds[name].append(time.process_time() - begin)
        base = median(seconds[BASELINE][1:])
        for name, values in seconds.items():
            results[name][f"cost_{shape[0]}x{shape[1]}"] = round(median(values[1:]) / base, 2)
        results[BASELINE][f"cpu_ms_{shape[0]}x{shape[1]}"] = round(1000 * base, 2)
    for name, result in results.items():
        print(name, json.dumps(result))
    write_json(OUT, results)
    write_json(OUT.with_suffix(".environment.json"), environment(1, load_text(None, TrainConfig().context)))


if __name__ == "__main__":
    main()
