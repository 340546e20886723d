"""What a step costs each rank of large meshes, on paper.

`python -m benchmarks.scale` counts, saves the numbers and prints the table of docs/distributed.md in Markdown; with
`show` it prints what was saved. Nothing is timed: rates of links and products are given, and stand in the file.
"""

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from emerging_optimizers.cost.ledger import Mesh
from emerging_optimizers.cost.scale import Machine, Row, Scale, at_scale, markdown
from emerging_optimizers.lab.record import read_json, write_json

OUT = Path(__file__).parent / "results" / "scale.json"
# Of an accelerator with 400 TFLOP/s of bfloat16 products in practice and a 400 Gbit/s link. SOAP's products are
# float32, where such a device has about an eighth of that.
RATES: dict[str, float | None] = {"muon": None, "soap": 50.0}


class Case(NamedTuple):
    """A model on a mesh.

    Attributes:
        model: its name.
        mesh: SHARDSxTENSOR, or REPLICASxSHARDSxTENSOR.
        tokens: of a step, in units of 2^20.
        expert_parallel: see `at_scale`.
    """

    model: str
    mesh: str
    tokens: float = 4
    expert_parallel: int = 1


CASES = (
    Case("gpt2-small", "8", 0.5),
    Case("gpt2-small", "64", 0.5),
    Case("llama-7b", "8"),
    Case("llama-7b", "8x8"),
    Case("llama-7b", "32x8"),
    Case("llama-70b", "8x8"),
    Case("llama-70b", "32x8"),
    Case("llama-70b", "8x32x8", 16),
    Case("llama-70b", "512x8", 16),
    Case("moe-256", "256", 16, 64),
    Case("moe-256", "256x8", 64, 64),
    Case("moe-256", "512x8", 64, 256),
)


def main() -> None:
    """Count, save, show."""
    if sys.argv[1:] == ["show"]:
        print(markdown(map(restored, read_json(OUT))))
        return
    found = []
    begun = time.perf_counter()
    for case in CASES:
        for optimizer, rate in RATES.items():
            machine = Machine(tokens=int(case.tokens * 2**20), optimizer_tflops=rate)
            found.append(
                at_scale(case.model, optimizer, case.mesh, expert_parallel=case.expert_parallel, machine=machine)
            )
    write_json(OUT, [asdict(scale) for scale in found])
    print(markdown(found))
    print(f"{len(found)} plans in {time.perf_counter() - begun:.0f} s")


def restored(saved: dict[str, Any]) -> Scale:
    """The inverse of `dataclasses.asdict` followed by JSON."""
    rows = tuple(Row(**{**row, "names": tuple(row["names"]), "shape": tuple(row["shape"])}) for row in saved["rows"])
    return Scale(**{**saved, "mesh": Mesh(*saved["mesh"]), "machine": Machine(**saved["machine"]), "rows": rows})


if __name__ == "__main__":
    main()
