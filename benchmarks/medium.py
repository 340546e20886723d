"""What "medium" costs on a CPU, in bfloat16 and in float32; the figures of docs/performance.md, "bfloat16 on a CPU".

`python -m benchmarks.medium` measures in three settings, each in a process of its own, and saves: the CPU as it is;
limited to AVX2 by the environment; the same without oneDNN. A quarter of an hour, most of it in bfloat16.

A round steps every optimizer once, on the same weights and gradients; a ratio is that of two of them in one round, in
CPU seconds of one thread, and the figure is its median. `difference`: the norm of the difference between an
orthogonalization in bfloat16 and the same in float32, over the norm. `demo`: the job of `make demo`, Muon alone.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.orthogonalizers import QUINTIC, inputs
from emerging_optimizers.lab.config import TUNED, TrainConfig
from emerging_optimizers.lab.data import load_text
from emerging_optimizers.lab.record import environment, write_json
from emerging_optimizers.lab.train import train_one
from emerging_optimizers.linalg.newton_schulz import newton_schulz
from emerging_optimizers.linalg.precision import reduced_in_words, reduced_precision
from emerging_optimizers.orthogonalized_optimizers import Muon
from emerging_optimizers.soap import SOAP

OUT = Path(__file__).parent / "results" / "medium.json"
SHAPES = ((256, 256), (256, 256), (256, 1024), (512, 512))
ROUNDS = {True: 3, False: 15}  # with an optimizer that multiplies in bfloat16, and without
UNCOUNTED = 2  # SOAP's first basis is made in the second step
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
SETTINGS: dict[str, dict[str, str]] = {"as it is": {}, "AVX2": AVX2, "AVX2, oneDNN off": AVX2}
CPU = torch.device("cpu")
SOAP_OPTIONS = {"lr": 1e-3, "first_step": "adam"}
# Name: how it is made, and what "medium" is while it steps.
OPTIMIZERS: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], str]] = {
    "Muon, medium": (lambda ps: Muon(ps, lr=1e-3), "auto"),
    "Muon, highest": (lambda ps: Muon(ps, lr=1e-3, fp32_matmul_prec="highest"), "auto"),
    "Muon, state in bfloat16": (lambda ps: Muon(ps, lr=1e-3, state_dtype=torch.bfloat16), "auto"),
    "SOAP, medium": (lambda ps: SOAP(ps, fp32_matmul_prec="medium", **SOAP_OPTIONS), "auto"),
    "SOAP, highest": (lambda ps: SOAP(ps, fp32_matmul_prec="highest", **SOAP_OPTIONS), "auto"),
    "SOAP, state in bfloat16": (lambda ps: SOAP(ps, state_dtype=torch.bfloat16, **SOAP_OPTIONS), "auto"),
    "SOAP": (lambda ps: SOAP(ps, **SOAP_OPTIONS), "auto"),
    "Muon, bfloat16 asked for": (lambda ps: Muon(ps, lr=1e-3), "bfloat16"),
    "torch.optim.Muon": (lambda ps: torch.optim.Muon(ps, lr=1e-3), "auto"),
}
BFLOAT16 = ("Muon, bfloat16 asked for", "torch.optim.Muon")
RATIOS = (
    ("Muon, medium", "Muon, highest"),
    ("Muon, state in bfloat16", "Muon, medium"),
    ("SOAP, medium", "SOAP, highest"),
    ("SOAP, state in bfloat16", "SOAP"),
    ("Muon, bfloat16 asked for", "Muon, medium"),
    ("torch.optim.Muon", "Muon, medium"),
)


@contextmanager
def onednn(on: bool) -> Iterator[None]:
    """With torch's oneDNN or without; not its own `flags`, which also set what they warn about."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = on
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def seconds_of(names: Sequence[str], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of a step in every round."""
    made = {}
    for name in names:
        ps = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
        made[name] = (ps, OPTIMIZERS[name][0](ps), OPTIMIZERS[name][1])
    taken: dict[str, list[float]] = {name: [] for name in names}
    for t in range(rounds + UNCOUNTED):
        generator = torch.Generator().manual_seed(t)
        grads = [torch.randn(shape, generator=generator) for shape in SHAPES]
        for name, (ps, optimizer, medium) in made.items():
            for p, grad in zip(ps, grads, strict=True):
                p.grad = grad.clone()
            with reduced_precision(medium):
                begun = time.process_time()
                optimizer.step()
                taken[name].append(time.process_time() - begun)
    return {name: values[UNCOUNTED:] for name, values in taken.items()}


def measure(setting: str) -> dict[str, Any]:
    """The ratios in this process."""
    torch.set_num_threads(1)
    ratios = {}
    with onednn("oneDNN off" not in setting):
        fast = [name for name in OPTIMIZERS if name not in BFLOAT16]
        for names, rounds in ((fast, ROUNDS[False]), (("Muon, medium", *BFLOAT16), ROUNDS[True])):
            taken = seconds_of(names, rounds)
            for over, under in RATIOS:
                if {over, under} <= set(names):
                    rows = [a / b for a, b in zip(taken[over], taken[under], strict=True)]
                    ratios[f"{over} / {under}"] = [round(f(rows), 3) for f in (min, median, max)]
        return {"medium": reduced_in_words(CPU), "capability": torch.backends.cpu.get_cpu_capability(), **ratios}


def differences() -> dict[str, float]:
    """Of bfloat16 from float32."""
    found = {}
    for kind, x in inputs().items():
        exact, rounded = (newton_schulz(x, QUINTIC, compute_dtype=dtype) for dtype in (None, torch.bfloat16))
        found[kind] = round(float((rounded - exact).norm() / exact.norm()), 4)
    return found


def demo() -> list[dict[str, Any]]:
    """Muon's part of `make demo`, and its losses for two seeds."""
    rows = []
    text = load_text(None, TrainConfig().context)
    for seed in (0, 1):
        for medium in ("float32", "bfloat16"):
            with reduced_precision(medium):
                run = train_one(replace(TrainConfig(), seed=seed), "muon", TUNED["muon"], text)
            last = run.steps[-1]
            rows.append(
                {
                    "seed": seed,
                    "medium": medium,
                    "loss": round(run.final_loss, 4),
                    "cpu_s": round(last.cpu_s, 1),
                    "optimizer_s": round(last.optimizer_s, 1),
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure, show, save."""
    if sys.argv[1:]:
        print(json.dumps(measure(sys.argv[1])))
        return
    results: dict[str, Any] = {"shapes": SHAPES, "ratios": "least, median and largest over rounds", "settings": {}}
    for setting, variables in SETTINGS.items():
        command = [sys.executable, "-m", "benchmarks.medium", setting]
        run = subprocess.run(command, env={**os.environ, **variables}, check=True, capture_output=True, text=True)
        results["settings"][setting] = {"environment": variables, **json.loads(run.stdout)}
        print(setting, json.dumps(results["settings"][setting], indent=1), flush=True)
    results["difference"] = differences()
    print(results["difference"], flush=True)
    results["demo"] = demo()
    write_json(OUT, results)
    write_json(OUT.with_suffix(".environment.json"), environment(1, load_text(None, TrainConfig().context)))


if __name__ == "__main__":
    main()
