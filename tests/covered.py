"""The end of `make coverage`: lines and branches of the package that the tests run, each of which has to be 95 %."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

LEAST = 95.0


def judged(totals: Mapping[str, float]) -> tuple[int, str]:
    """The exit status, and what is said, for the totals of coverage's JSON."""
    shares = {
        "lines": (totals["covered_lines"], totals["num_statements"]),
        "branches": (totals["covered_branches"], totals["num_branches"]),
    }
    words, status = [], 0
    for name, (run, all_) in shares.items():
        share = 100 * run / max(all_, 1)
        words.append(f"{run:,} of {all_:,} {name} ({share:.1f} %)")
        if share < LEAST:
            words[-1] += f", fewer than {LEAST:.0f} %"
            status = 1
    return status, f"coverage: {'; '.join(words)}"


def main() -> int:
    """Reads .coverage."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "coverage.json"
        subprocess.run([sys.executable, "-m", "coverage", "json", "-q", "-o", str(out)], check=True)
        status, words = judged(json.loads(out.read_text())["totals"])
    print(words)
    return status


if __name__ == "__main__":
    sys.exit(main())
