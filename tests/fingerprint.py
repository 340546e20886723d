"""Twenty steps of every row of the table, bit for bit: recorded before a rebuild, compared after it.

    make fingerprint          # record, on this machine
    make fingerprint-check    # compare; exit status 1 where a number differs

Weights and state of every row, as it is and with the spike guard and a gradient that is not finite, with `maximize`, in
bfloat16, and with gradients that are missing now and then. What is recorded holds on the machine that wrote it.
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.cases import CASES, OptimizerCase, parameters, set_gradients

STEPS = 20
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "guarded": {"spike_guard": 2.0},
    "maximized": {"maximize": True},
    "bfloat16": {},
    "missing": {},
}


def fingerprint(case: OptimizerCase, variant: str) -> list[Tensor]:
    """Weights and state after the steps."""
    weights = parameters(case, torch.bfloat16 if variant == "bfloat16" else torch.float32)
    torch.manual_seed(0)
    optimizer = case.make(weights, **VARIANTS[variant])

    def missing(i: int, t: int) -> bool:
        return variant == "missing" and (i + t) % 5 == 0

    for t in range(1, STEPS + 1):
        set_gradients(weights, t, missing)
        if variant == "guarded" and t == 7 and weights[0].grad is not None:
            weights[0].grad.mul_(float("nan"))
        optimizer.step()
    state = [x for entries in optimizer.state.values() for _, x in sorted(entries.items())]
    return [x.detach().clone() for x in (*weights, *state)]


def everything(tell: Callable[[str], None] = lambda line: None) -> dict[str, list[Tensor]]:
    """The fingerprints of all rows and variants, by their name."""
    found = {}
    for case in CASES:
        tell(case.name)
        found |= {f"{case.name} {variant}": fingerprint(case, variant) for variant in VARIANTS}
    return found


def differences(before: dict[str, list[Tensor]], now: dict[str, list[Tensor]]) -> list[str]:
    """One line for each row that is not the same, with the largest relative distance of a tensor."""
    lines = [f"{name}: only on one side" for name in before.keys() ^ now.keys()]
    for name in before.keys() & now.keys():
        pairs = list(zip(before[name], now[name], strict=False))
        if len(before[name]) != len(now[name]) or any(old.shape != new.shape for old, new in pairs):
            lines.append(f"{name}: other tensors")
        elif far := [_distance(old, new) for old, new in pairs if not _same(old, new)]:
            lines.append(f"{name}: {len(far)} of {len(pairs)} tensors differ, by up to {max(far):.1e} of their norm")
    return sorted(lines)


def _same(old: Tensor, new: Tensor) -> bool:
    return old.dtype == new.dtype and torch.equal(old.nan_to_num(), new.nan_to_num())


def _distance(old: Tensor, new: Tensor) -> float:
    old, new = old.double(), new.double()
    return float((old - new).norm() / old.norm().clamp_min(1e-30))


def main() -> int:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("record", "check"))
    parser.add_argument("--path", type=Path, default=Path("runs/fingerprint.pt"))
    asked = parser.parse_args()
    if asked.what == "check" and not asked.path.exists():
        print(f"there is no {asked.path}; record it at the revision to compare with: make fingerprint")
        return 2
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = everything(lambda name: print(f"\r{name:40}", end="", file=sys.stderr, flush=True))
    print(file=sys.stderr)
    if asked.what == "record":
        asked.path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, asked.path)
        print(f"{len(found)} fingerprints written to {asked.path}")
        return 0
    lines = differences(torch.load(asked.path), found)
    print("\n".join([*lines, f"{len(found)} fingerprints, {len(lines)} differ"]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
