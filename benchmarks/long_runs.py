"""20,000 steps of every optimizer on a small problem, and float32 beside float64; docs/trust.md shows it.

`python -m benchmarks.long_runs` takes half an hour on one core, saves what came out and writes the page's tables. What
the results hold is not run again: move them away to begin anew. `render` only writes the tables.

The problem is the test suite's, three matrices of 8 x 6: each one's gradient is itself plus normal noise of half a
unit, at a constant learning rate, so that after some hundred steps the weights wander around zero.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emerging_optimizers.cli.files import write_atomically
from emerging_optimizers.lab.record import environment, read_json, write_json
from tests.cases import SEEDS, OptimizerCase, distance, parameters

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "long_runs.json"
PAGE = ROOT / "docs" / "trust.md"
BEGIN, END = "<!-- long runs: begin -->", "<!-- long runs: end -->"
STEPS = 20_000
BASES = ("Q_L", "Q_R", "Q_M", "u", "v")  # whose columns are to be orthonormal; u and v are Iso's
TWICE = ("adamw", "muon", "soap", "rekls", "shampoo", "psgd_pro", "iso")
WHEN = (10, 100, 1000)


def long_run(case: OptimizerCase, steps: int = STEPS) -> dict[str, Any]:
    """What there is to say after so many steps."""
    ps = parameters(_small(case), copies=3)
    optimizer = case.make(ps)
    began = time.perf_counter()
    sizes: set[int] = set()
    away = 0.0
    for t, _ in enumerate(_steps((ps, optimizer), steps=steps), 1):
        if t in (100, steps) or t % 1000 == 0:
            sizes.add(_state_bytes(optimizer))
            away = max([away, *(_from_orthonormal(x) for x in _bases(optimizer))])
    tensors = [x for p in ps for x in (p.detach(), *optimizer.state[p].values())]
    return {
        "steps": steps,
        "seconds": round(time.perf_counter() - began, 1),
        "finite": all(bool(x.isfinite().all()) for x in tensors),
        "from_orthonormal": away if any(True for _ in _bases(optimizer)) else None,
        "state_bytes": sorted(sizes),
        "largest_weight": max(float(p.detach().abs().max()) for p in ps),
        "events": len(optimizer.guard_events()),
    }


def both_precisions(case: OptimizerCase, when: tuple[int, ...] = WHEN) -> dict[str, float]:
    """How far float32 weights are from float64 ones after some steps, relative to how far those have moved."""
    narrow = parameters(_small(case), copies=3)
    wide, start = (parameters(_small(case), torch.float64, copies=3) for _ in range(2))
    a, b = case.make(narrow), case.make(wide)
    found = {}
    for t, _ in enumerate(_steps((narrow, a), (wide, b), steps=max(when)), 1):
        if t in when:
            found[str(t)] = distance(narrow, wide, start)
    return found


def _small(case: OptimizerCase) -> OptimizerCase:
    """With the first of its shapes, of which three make a stack."""
    return replace(case, shapes=case.shapes[:1])


def _steps(*runs: tuple[list[torch.nn.Parameter], torch.optim.Optimizer], steps: int) -> Iterator[None]:
    """Take so many steps with each of some optimizers, all with the same noise; yields behind each."""
    generator = torch.Generator().manual_seed(0)
    for first in range(0, steps, 1000):
        noise = [0.5 * torch.randn(1000, *p.shape, generator=generator) for p in runs[0][0]]
        for t in range(min(1000, steps - first)):
            for ps, optimizer in runs:
                for p, z in zip(ps, noise, strict=True):
                    p.grad = p.detach() + z[t]
                optimizer.step()
            yield


def _bases(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (x for key, x in state.items() if key in BASES)


def _from_orthonormal(basis: Tensor) -> float:
    wide = basis.double()
    return float((wide.mT @ wide - torch.eye(wide.size(-1), dtype=wide.dtype)).abs().max())


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(x.nbytes for state in optimizer.state.values() for x in state.values())


def tables(found: Mapping[str, Any]) -> str:
    """The results as the page has them."""
    about = found["environment"]
    steps = {row["steps"] for row in found["runs"].values()}
    lines = [
        f"torch {about['torch']}, one thread of a CPU, {', '.join(f'{n:,}' for n in sorted(steps))} steps of each.",
        "",
        "| optimizer | finite | largest of \\|QᵀQ − I\\| | bytes of state, from step 100 on | largest weight |",
        "|---|---|--:|--:|--:|",
    ]
    for name, row in found["runs"].items():
        away = "" if row["from_orthonormal"] is None else f"{row['from_orthonormal']:.1e}"
        sizes = ", ".join(f"{size:,}" for size in row["state_bytes"])
        finite = "yes" if row["finite"] else "NO"
        lines.append(f"| `{name}` | {finite} | {away} | {sizes} | {row['largest_weight']:.2g} |")
    lines += [
        "",
        "The weights in float32 beside those in float64, for the same noise: the largest distance of a matrix, "
        "relative to how far it has moved from its start.",
        "",
        "| optimizer | " + " | ".join(f"step {t:,}" for t in WHEN) + " |",
        "|---|" + "--:|" * len(WHEN),
    ]
    for name, apart in found["precisions"].items():
        lines.append(f"| `{name}` | " + " | ".join(f"{apart[str(t)]:.1e}" for t in WHEN) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is not there yet, and write the page."""
    torch.set_num_threads(1)
    found: dict[str, Any] = read_json(OUT) if OUT.exists() else {"runs": {}, "precisions": {}}
    if sys.argv[1:] != ["render"]:
        found["environment"] = environment(1)
        order = sorted(SEEDS, key=lambda case: case.name not in TWICE)
        for kind, names, function in (("runs", None, long_run), ("precisions", TWICE, both_precisions)):
            for case in order:
                if case.name not in found[kind] and (names is None or case.name in names):
                    found[kind][case.name] = function(case)
                    print(kind, case.name, found[kind][case.name], flush=True)
                    write_json(OUT, found)
    page = PAGE.read_text("utf-8")
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    write_atomically({PAGE: f"{head}{BEGIN}\n\n{tables(found)}\n\n{END}{tail}".encode()})


if __name__ == "__main__":
    main()
