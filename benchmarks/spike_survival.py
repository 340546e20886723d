"""Do SOAP, SOAP-KL and REKLS survive a gradient spike, at any precision? Seeds x shapes x precisions.

    python benchmarks/spike_survival.py [--seeds 5] [--processes 2]

Two questions, each on i.i.d. Gaussian gradients, lr 1, no weight decay:

aftershock  No guard, spikes of 1e2 to 1e5 after 50 and 100 steps: the largest update RMS after the spike's step over
            the largest in the 30 steps before it. In float32, in TF32 where the defaults allow it (the refresh of the
            bases), and in TF32 everywhere (`fp32_matmul_prec="high"`).
agreement   Guard 2, spikes of 1e2 and 1e5 after 50 steps: the largest relative difference of the update RMS between
            TF32 everywhere and float32 everywhere, from step 10 on.

TF32 is emulated: the operands of products are rounded. Results and environment go to benchmarks/results/.
"""

import argparse
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from emerging_optimizers.lab.present import show
from emerging_optimizers.lab.record import environment, write_json
from emerging_optimizers.lab.spike import SpikeConfig, Trajectory, run_arm
from emerging_optimizers.lab.spike_arms import SpikeArm
from emerging_optimizers.lab.views.describe import Table
from emerging_optimizers.linalg.emulation import emulate_tf32

OUT = Path(__file__).parent / "results" / "spike_survival.json"
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "SOAP": ("soap", {}),
    "SOAP-KL": ("soap", {"use_kl_shampoo": True}),
    "REKLS": ("rekls", {}),
}
SHAPES = ((128, 64), (64, 128), (96, 96))
FLOAT32 = {"fp32_matmul_prec": "highest", "qr_fp32_matmul_prec": "highest"}
TF32 = {"fp32_matmul_prec": "high", "qr_fp32_matmul_prec": "high"}
PRECISIONS: dict[str, dict[str, str]] = {"float32": FLOAT32, "TF32, defaults": {}, "TF32 everywhere": TF32}


def trajectories(name: str, config: SpikeConfig, precision: dict[str, str], **options: Any) -> tuple[Trajectory, ...]:
    """Every scenario of one optimizer at one precision."""
    optimizer, own = ARMS[name]
    with ExitStack() as stack:
        if precision is not FLOAT32:
            stack.enter_context(emulate_tf32())
        return run_arm(
            config, name, SpikeArm(optimizer=optimizer, options={**own, **precision, **options})
        ).trajectories


def aftershock(name: str, shape: tuple[int, int], seed: int, precision: str) -> dict[str, Any]:
    """The worst spike of a sweep without a guard."""
    config = SpikeConfig(optimizers=("soap",), shape=shape, seed=seed, spike_at=(50, 100), steps=180)
    worst = {}
    for run in trajectories(name, config, PRECISIONS[precision])[1:]:
        assert run.spike is not None
        at, scale = run.spike
        worst[max(run.rms[at + 1 :]) / max(run.rms[at - 30 : at])] = (at, scale)
    ratio = max(worst)
    return {"ratio": ratio, "spike": worst[ratio]}


def agreement(name: str, shape: tuple[int, int], seed: int) -> dict[str, Any]:
    """The largest relative difference of the update RMS between TF32 and float32, guarded, from step 10 on."""
    config = SpikeConfig(
        optimizers=("soap",), shape=shape, seed=seed, spike_at=(50,), spike_scale=(1e2, 1e5), steps=140
    )
    exact, rounded = (trajectories(name, config, precision, spike_guard=2.0) for precision in (FLOAT32, TF32))
    difference = max(
        abs(y - x) / x for a, b in zip(exact, rounded, strict=True) for x, y in zip(a.rms[9:], b.rms[9:], strict=True)
    )
    return {"difference": difference}


def run(job: tuple[str, tuple[int, int], int, str]) -> dict[str, Any]:
    """One line of the results."""
    name, shape, seed, what = job
    measured = agreement(name, shape, seed) if what == "agreement" else aftershock(name, shape, seed, what)
    return {"optimizer": name, "shape": shape, "seed": seed, "what": what, **measured}


def tables(rows: list[dict[str, Any]]) -> Iterator[Table]:
    """For each optimizer and shape the worst of the seeds."""

    def worst(what: str, key: str, form: str) -> list[list[str]]:
        chosen = [
            [
                row[key]
                for row in rows
                if (row["optimizer"], row["what"]) == (name, what) and tuple(row["shape"]) == shape
            ]
            for name, shape in product(ARMS, SHAPES)
        ]
        return [[format(max(values), form) for values in chosen]]

    names = [f"{name} {m}x{n}" for name, (m, n) in product(ARMS, SHAPES)]
    columns = [*(worst(what, "ratio", ".2f")[0] for what in PRECISIONS), worst("agreement", "difference", ".2%")[0]]
    yield Table(
        title="Largest update after a spike over the largest before it, no guard; TF32 against float32, guard 2",
        head=("", *PRECISIONS, "agreement, guard 2"),
        rows=[(name, *cells) for name, *cells in zip(names, *columns, strict=True)],
    )


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    jobs = list(product(ARMS, SHAPES, range(args.seeds), (*PRECISIONS, "agreement")))
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        rows = list(pool.map(run, jobs))
    write_json(args.out, {"environment": environment(1), "rows": rows})
    show(tables(rows), [args.out])


if __name__ == "__main__":
    main()
