"""What this library promises of its own cost: linear growth, even steps, quick construction, quick import."""

import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.step.arms import ARMS
from benchmarks.step.run import OURS, Request, load, quartiles, worker
from benchmarks.step.workloads import WORKLOADS

LIMITS = {"growth": 16.5, "evenness": 2.0, "construction": 1.0, "import": 0.1}
GROWTH = (("Muon", (64, 64)), ("Muon", (128, 128)), ("SOAP", (64, 64)))
# Workloads, and how often each of their matrices is there. On a CPU that of GPT-2 has two of twelve layers: four of its
# matrices make most of the work of refreshes, and no step can refresh less than one. Six times as many are the model.
EVENNESS = (("gpt2-soap", 1), ("gpt2-soap", 6), ("small-soap", 1))
CONSTRUCTION = (("AdamW", (256,)), ("Muon", (64, 64)), ("SOAP", (64, 64)))
TENSORS = 2000
IMPORT = "import time, torch; b = time.process_time(); import emerging_optimizers; print(time.process_time() - b)"


def keep(request: Request) -> list[dict[str, Any]]:
    """Each promise with what was measured."""
    found = [growth(name, shape, request) for name, shape in GROWTH]
    found += [evenness(name, times, request) for name, times in EVENNESS if times == 1 or request.device == "cpu"]
    found += [construction(name, shape, request) for name, shape in CONSTRUCTION]
    if request.device == "cpu":
        command = [sys.executable, "-c", IMPORT]
        seconds = [float(subprocess.check_output(command, text=True, cwd=OURS)) for _ in range(request.rounds)]
        found.append(promise("import", "seconds of `import emerging_optimizers` after `import torch`", seconds))
    return found


def growth(name: str, shape: tuple[int, ...], request: Request) -> dict[str, Any]:
    """Time of 256 matrices over time of 16, in turns."""
    taken: list[list[float]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pair = [stack.enter_context(worker(request, folder, f"growth{count}")) for count in (16, 256)]
        for process, count in zip(pair, (16, 256), strict=True):
            load(process, ARMS[name], {})
            process.ask("build", shapes=[[count, shape]])
            process.ask("step", count=3)
        for _ in range(request.rounds):
            steps = (64, 4)  # both do the same work
            taken.append([p.ask("step", count=n)[request.clock] for p, n in zip(pair, steps, strict=True)])
    what = f"time of 256 matrices of {' x '.join(map(str, shape))} over that of 16, {name}"
    return promise("growth", what, [many / few for few, many in taken])


def evenness(workload: str, times: int, request: Request) -> dict[str, Any]:
    """The longest step of a cycle over the median one, where bases are refreshed every tenth step."""
    arm = ARMS["SOAP, every 10"]
    with tempfile.TemporaryDirectory() as folder, worker(request, Path(folder), "evenness") as process:
        load(process, arm, {})
        shapes = WORKLOADS[workload].shapes(request.device)
        process.ask("build", shapes=[[times * count, shape] for count, shape in shapes])
        process.ask("step", count=2 + arm.period)
        cycles = [
            [process.ask("step", count=1)[request.clock] for _ in range(arm.period)] for _ in range(request.rounds)
        ]
    places = [median(place) for place in zip(*cycles, strict=True)]
    what = f"longest step over the median one of a cycle, {arm.name}, {workload}" + f" x {times}" * (times > 1)
    return promise("evenness", what, [max(places) / median(places)])


def construction(name: str, shape: tuple[int, ...], request: Request) -> dict[str, Any]:
    """Seconds of the constructor for many tensors."""
    with tempfile.TemporaryDirectory() as folder, worker(request, Path(folder), "construction") as process:
        load(process, ARMS[name], {})
        seconds = [process.ask("build", shapes=[[TENSORS, shape]])["construct_s"] for _ in range(3)]
    return promise("construction", f"seconds of the constructor of {name} for {TENSORS:,} tensors", seconds)


def promise(kind: str, what: str, values: list[float]) -> dict[str, Any]:
    """A line of the table."""
    found = float(f"{median(values):.4g}")
    spread = [float(f"{value:.4g}") for value in quartiles(values)]
    return {"what": what, "median": found, "quartiles": spread, "limit": LIMITS[kind], "kept": found <= LIMITS[kind]}
