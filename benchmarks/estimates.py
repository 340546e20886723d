"""How far `estimate` is from the bytes and the time of real steps, on the workloads of the step benchmark.

`python -m benchmarks.estimates [WORKLOAD ...]` estimates and measures in turns, on one thread, and saves; what the file
has of other workloads is kept.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.step.workloads import WORKLOADS, Workload
from emerging_optimizers import create_optimizer
from emerging_optimizers.cost import estimate
from emerging_optimizers.lab.record import environment, read_json, write_json

OUT = Path(__file__).parent / "results" / "estimates.json"
OPTIMIZERS = {"muon": ("muon",), "soap": ("soap", "rekls"), "elementwise": ("adamw", "laprop", "lion")}
ROUNDS, STEPS = 3, 3


def main() -> None:
    """Estimate, measure, show, save."""
    torch.set_num_threads(1)
    rows = {(row["workload"], row["optimizer"]): row for row in (read_json(OUT) if OUT.exists() else ())}
    for workload in map(WORKLOADS.__getitem__, sys.argv[1:] or WORKLOADS):
        for name in OPTIMIZERS[workload.family]:
            row = {"workload": workload.name, "optimizer": name, **compare(workload, name)}
            rows[workload.name, name] = row
            print(row, flush=True)
            write_json(OUT, list(rows.values()))
    write_json(OUT.with_suffix(".environment.json"), environment(1))


def compare(workload: Workload, name: str) -> dict[str, object]:
    """Predicted and measured bytes of the state, and seconds of a step: medians over the rounds, and of their ratio."""
    parameters = [torch.nn.Parameter(torch.randn(shape) * 0.02) for count, shape in workload.cpu for _ in range(count)]
    optimizer = create_optimizer(name, parameters, lr=1e-3)
    predicted, measured = [], []
    state_bytes = 0
    for _ in range(ROUNDS):
        found = estimate(parameters, name)
        assert found.seconds is not None
        predicted.append(found.seconds)
        state_bytes = found.state_bytes
        measured.append(statistics.median(step(parameters, optimizer) for _ in range(STEPS)))
    held = sum(x.nbytes for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor))
    return {
        "state_bytes_ratio": round(state_bytes / held, 4),
        "predicted_ms": round(1e3 * statistics.median(predicted), 2),
        "measured_ms": round(1e3 * statistics.median(measured), 2),
        "time_ratio": round(statistics.median(p / m for p, m in zip(predicted, measured, strict=True)), 3),
    }


def step(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> float:
    """Seconds of one step on new gradients."""
    for p in parameters:
        p.grad = torch.randn_like(p)
    begun = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
