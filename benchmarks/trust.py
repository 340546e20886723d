"""What `check_optimizer` finds in other libraries' optimizers, and in ours; docs/trust.md shows it.

`python -m benchmarks.trust` checks all of ours and those of the peers that are installed, each in a process of its own
(ten minutes on one core), saves what came out and writes the page's tables. What the results hold is not checked again:
move them away to begin anew. `render` only writes the tables.
"""

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emerging_optimizers.cli.files import write_atomically
from emerging_optimizers.lab.record import environment, read_json, write_json
from emerging_optimizers.registry import OPTIMIZERS

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "trust.json"
PAGE = ROOT / "docs" / "trust.md"
BEGIN, END = "<!-- checks: begin -->", "<!-- checks: end -->"


@dataclass(frozen=True)
class Peer:
    """An optimizer of another library.

    Attributes:
        make: module:class.
        package: its name in a package index.
        options: what it is called with.
        before: a statement that comes first.
    """

    make: str
    package: str
    options: dict[str, Any] = field(default_factory=dict)
    before: str = ""


# heavyball compiles every step by default, which takes minutes on a CPU and is not what is asked here.
_EAGER = "import heavyball; heavyball.utils.compile_mode = None"
PEERS = (
    Peer("torch.optim:AdamW", "torch"),
    Peer("torch.optim:SGD", "torch", {"lr": 0.01, "momentum": 0.9}),
    Peer("torch.optim:Adafactor", "torch"),
    Peer("torch.optim:Muon", "torch"),
    Peer("heavyball:AdamW", "heavyball", {"lr": 1e-3}, _EAGER),
    Peer("heavyball:Muon", "heavyball", {"lr": 1e-3}, _EAGER),
    Peer("heavyball:SOAP", "heavyball", {"lr": 1e-3}, _EAGER),
    Peer("pytorch_optimizer:SOAP", "pytorch-optimizer", {"lr": 1e-3}),
    Peer("pytorch_optimizer:Shampoo", "pytorch-optimizer", {"lr": 1e-3}),
    Peer("pytorch_optimizer:Lion", "pytorch-optimizer", {"lr": 1e-4}),
    Peer("bitsandbytes.optim:AdamW8bit", "bitsandbytes", {"lr": 1e-3, "min_8bit_size": 16}),
)
ONE = """
import json, sys
from functools import partial
from emerging_optimizers.testing.conformance import check_optimizer, made_by
exec(sys.argv[3])
make = made_by(sys.argv[1])
report = check_optimizer(partial(make, **json.loads(sys.argv[2])), name=sys.argv[1], raises=False)
print("\\n" + json.dumps(report.to_json()))
"""


def checked(subject: str, options: dict[str, Any], before: str = "") -> dict[str, Any]:
    """The report on an optimizer, from a process of its own, which it may take down."""
    command = [sys.executable, "-W", "ignore", "-c", ONE, subject, json.dumps(options), before]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=900)
    except subprocess.TimeoutExpired:
        return {"subject": subject, "error": "no answer within 15 minutes"}
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["no message"])[-1]
        return {"subject": subject, "error": f"ended with {ran.returncode}: {last[:200]}"}
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def measure() -> dict[str, Any]:
    """Ours, then the peers that are installed."""
    held = read_json(OUT) if OUT.exists() else {"ours": [], "peers": []}
    known = {report["subject"]: report for report in (*held["ours"], *held["peers"]) if "error" not in report}
    found: dict[str, Any] = {"environment": environment(1), "versions": {}, "ours": [], "peers": []}
    for name in OPTIMIZERS:
        found["ours"].append(known.get(name) or checked(name, {}))
        print(name, passed(found["ours"][-1]), flush=True)
    for peer in PEERS:
        try:
            found["versions"][peer.package] = importlib.metadata.version(peer.package)
        except importlib.metadata.PackageNotFoundError:
            print(f"{peer.make}: {peer.package} is not installed", flush=True)
            continue
        found["peers"].append(known.get(peer.make) or checked(peer.make, peer.options, peer.before))
        print(peer.make, passed(found["peers"][-1]), flush=True)
        write_json(OUT, found)
    return found


def passed(report: dict[str, Any]) -> str:
    """How many checks, of those that apply."""
    if "error" in report:
        return str(report["error"])
    applied = [row for row in report["rows"] if row["passed"] is not None]
    return f"{sum(row['passed'] for row in applied)} of {len(applied)}"


def tables(found: dict[str, Any]) -> str:
    """How many checks each passes, and what the others say."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(found["versions"].items()))
    lines = [
        f"Versions: {versions}; {found['environment']['platform'].split('-')[0]}, Python "
        f"{found['environment']['python']}, on the CPU, in one process.",
        "",
        "| optimizer | checks passed | what fails |",
        "|---|--:|---|",
    ]
    worst = {passed(report) for report in found["ours"]}
    lines.append(f"| ours, all {len(found['ours'])} | {', '.join(sorted(worst))} each | {_failures(found['ours'])} |")
    lines += [f"| `{r['subject'].replace(':', '.')}` | {passed(r)} | {_failures([r])} |" for r in found["peers"]]
    names = [(row["name"], row["link"]) for row in found["ours"][0]["rows"]]
    lines += ["", "The checks: " + ", ".join(f"[{name}]({link})" for name, link in names) + "."]
    return "\n".join(lines)


def _failures(reports: Iterable[dict[str, Any]]) -> str:
    rows = [row for report in reports for row in report.get("rows", ()) if row["passed"] is False]
    said = [f"{row['name']}: {row['reason']}".replace("|", "\\|").replace("<", "&lt;") for row in rows]
    return "<br>".join(dict.fromkeys(said)) or "nothing"


def main() -> None:
    """Check, save, write the tables."""
    if sys.argv[1:] not in ([], ["render"]):
        sys.exit(__doc__)
    if not sys.argv[1:]:
        write_json(OUT, measure())
    before, rest = PAGE.read_text().split(BEGIN)
    behind = rest.split(END)[1]
    write_atomically({PAGE: f"{before}{BEGIN}\n\n{tables(read_json(OUT))}\n\n{END}{behind}".encode()})
    print(PAGE)


if __name__ == "__main__":
    main()
