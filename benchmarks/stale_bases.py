"""What bases that have not seen their gradient cost: `overlap=True` and rare refreshes on the demo's job.

`python benchmarks/stale_bases.py stale` trains the demo's model with SOAP, while the learning rate warms up for fewer
or more steps and through a gradient spike; half an hour on one core. `python benchmarks/stale_bases.py ramp` compares
rare refreshes that begin dense (`refresh_ramp`) with those that do not, and with a shorter period that has as many
refreshes in the run; an hour. Each saves after every row, and does not train again what the results hold.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from emerging_optimizers.engine import Phase
from emerging_optimizers.lab.config import TUNED, TrainConfig
from emerging_optimizers.lab.data import load_text
from emerging_optimizers.lab.record import environment, read_json, write_json
from emerging_optimizers.lab.train import train_one
from emerging_optimizers.soap.soap import SOAPRule

RESULTS = Path(__file__).parent / "results"
RARE: dict[str, Any] = {"precondition_frequency": 10}
JOBS: dict[str, dict[str, Any]] = {
    "warm-up 10": {},
    "warm-up 40": {"warmup": 40},
    "warm-up 80": {"warmup": 80},
    "warm-up 10, spike": {"spike_at": 60, "spike_scale": 1000.0},
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """Runs that differ in their seed."""

    options: dict[str, Any]
    job: str
    optimizer: str = "soap"
    seeds: tuple[int, ...] = (0, 1)
    refreshes: int | None = None
    """Of each matrix, where that is compared."""


def stale() -> Iterator[Row]:
    """Overlap, rare refreshes, and rare refreshes with shorter updates, in every job."""
    for options in ({}, {"overlap": True}, RARE, {**RARE, "max_update_rms": 1.0}, {**RARE, "max_update_rms": 0.3}):
        for job in JOBS:
            yield Row(options=options, job=job)


def ramp() -> Iterator[Row]:
    """Half the warm-up, all of it, none; as many refreshes without a ramp; what suits the other warm-up."""
    for optimizer, frequency, job, ramps, seeds in (
        ("soap", 10, "warm-up 10", (5, 10, 0), (0, 1, 2)),
        ("soap", 10, "warm-up 40", (20, 40, 0), (0, 1, 2)),
        ("soap", 10, "warm-up 10", (20,), (0, 1, 2)),
        ("soap", 25, "warm-up 10", (5, 10, 20, 0), (0, 1)),
        ("soap", 25, "warm-up 40", (20, 40, 0), (0, 1)),
        ("rekls", 10, "warm-up 10", (5, 10, 0), (0, 1)),
        ("rekls", 10, "warm-up 40", (20, 0), (0, 1)),
    ):
        for length in ramps:
            options = {"precondition_frequency": frequency, "refresh_ramp": length}
            yield Row(options=options, job=job, optimizer=optimizer, seeds=seeds, refreshes=refreshes(options))
        if 0 in ramps and (optimizer, frequency) == ("soap", 10):  # as many refreshes as with half the warm-up
            ramped = {"precondition_frequency": frequency, "refresh_ramp": ramps[0]}
            options = {"precondition_frequency": evenly(refreshes(ramped)), "refresh_ramp": 0}
            yield Row(options=options, job=job, optimizer=optimizer, seeds=seeds, refreshes=refreshes(options))


def refreshes(options: dict[str, Any]) -> int:
    """How many bases a matrix whose turn comes first gets in a run."""
    rule = SOAPRule(**options)
    steps = range(1, TrainConfig().steps + 1)
    return sum(rule.schedule.phase(step) is not Phase.REUSE for step in steps)


def evenly(count: int) -> int:
    """The longest period with at least as many refreshes."""
    periods = range(1, TrainConfig().steps)
    return max(f for f in periods if refreshes({"precondition_frequency": f, "refresh_ramp": 0}) >= count)


def main() -> None:
    """Train, show, save."""
    (table,) = sys.argv[1:] if sys.argv[1:] in (["stale"], ["ramp"]) else sys.exit(__doc__)
    out = RESULTS / {"stale": "stale_bases.json", "ramp": "refresh_ramp.json"}[table]
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = read_json(out) if out.exists() else []
    text = load_text(None, TrainConfig().context)
    for row in {"stale": stale, "ramp": ramp}[table]():
        which = {"optimizer": row.optimizer, "refreshes": row.refreshes} if row.refreshes else {}
        which |= {"options": row.options, "job": row.job}
        if any({**known, **which} == known for known in rows):
            continue
        arm = TUNED[row.optimizer]
        losses = []
        for seed in row.seeds:
            config = replace(TrainConfig(), seed=seed, **JOBS[row.job])
            run = train_one(config, row.optimizer, replace(arm, options={**arm.options, **row.options}), text)
            losses.append(round(run.final_loss, 4))
        rows.append({**which, "losses": losses})
        print(rows[-1], flush=True)
        write_json(out, rows)
        write_json(out.with_suffix(".environment.json"), environment(1, text))


if __name__ == "__main__":
    main()
