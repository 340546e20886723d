"""The command line of the benchmark: `python -m benchmarks.step run --help`."""

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from benchmarks.step.arms import PEERS
from benchmarks.step.workloads import WORKLOADS
from emerging_optimizers.cli import UsageError
from emerging_optimizers.lab.record import read_json, reading, write_json

RESULTS = Path("benchmarks/results")
Words = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Time a step of every installed optimizer, in turns, and hold the results against their floors."""

    workload: Words = ()
    """A workload, or "promises" (growth, construction, import); may be repeated. By default all."""
    arm: Words = ()
    """A pattern of arms, as in "*Muon*"; may be repeated. By default all but those that compile for minutes."""
    peer: Words = ()
    """NAME=PATH: a checkout of published (Emerging-Optimizers), meta (facebookresearch/optimizers) or dion
    (microsoft/dion); may be repeated. before=PATH: an earlier state of this library, of which every arm of ours takes
    a turn too, compared with the arm as it is; then only those run."""
    rounds: int = 7
    """Turns of every arm."""
    threads: int = 1
    """Threads of every process: 1 counts CPU time, more count wall-clock time."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where."""
    out: Path | None = None
    """File of the results; workloads that it holds already are replaced, others kept. By default one under
    benchmarks/results/, named after device and threads, or runs/step_quick.json."""
    quick: bool = False
    """A few minutes: an eighth of the matrices, 3 rounds. To see that it runs, not to quote."""
    minutes: float | None = None
    """Begin no further workload after this time."""
    patience: float = 120
    """Give an arm up that does not answer for so many seconds."""

    def run(self) -> None:
        """Measures workload by workload; what is done is saved."""
        import torch

        from benchmarks.step.promises import keep
        from benchmarks.step.run import Request, measure

        names = self.workload or (*WORKLOADS, "promises")
        if unknown := [name for name in names if name not in (*WORKLOADS, "promises")]:
            raise UsageError(f"--workload {unknown[0]}: there are {', '.join(WORKLOADS)} and promises")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UsageError(f"--device cuda: torch {torch.__version__} finds none; leave it out to measure the CPU")
        request = Request(
            rounds=3 if self.quick else self.rounds,
            threads=self.threads,
            device=self.device,
            checkouts=self.checkouts(),
            only=self.arm,
            patience=self.patience,
        )
        threads = f"{self.threads}_thread{'s' * (self.threads > 1)}"
        name = f"step_cpu_{threads}" if self.device == "cpu" else "step_cuda"
        out = self.out or (Path("runs/step_quick.json") if self.quick else RESULTS / f"{name}.json")
        result: dict[str, dict[str, Any]] = {"workloads": {}, "promises": {}}
        if out.exists():
            with reading(out, "bring it back, move it away, or give another --out"):
                result = {key: dict(read_json(out)[key]) for key in result}
        begin = time.monotonic()
        for name in names:
            if self.minutes is not None and time.monotonic() - begin > 60 * self.minutes:
                print(f"{name}: not begun, {self.minutes:g} minutes are over")
                continue
            print(f"{name}", flush=True)
            if name == "promises":
                result["promises"] = {"found": keep(request)}
            else:
                workload = WORKLOADS[name].quick() if self.quick else WORKLOADS[name]
                result["workloads"][name] = measure(workload, request, lambda line: print(line, flush=True))
            result["request"] = {key: value for key, value in asdict(request).items() if key != "checkouts"}
            ordered = {key: result["workloads"][key] for key in WORKLOADS if key in result["workloads"]}
            write_json(out, {**result, "workloads": ordered})
        from benchmarks.step.render import section

        print(section(out.stem, read_json(out)))
        print(out)

    def checkouts(self) -> dict[str, str]:
        """The folders that --peer names."""
        found = {}
        for word in self.peer:
            name, _, path = word.partition("=")
            if name not in PEERS or not Path(path).is_dir():
                raise UsageError(
                    f"--peer {word}: it must be NAME=PATH, with a folder, and a name of {', '.join(PEERS)}"
                )
            found[name] = path
        return found


@dataclass(frozen=True, kw_only=True)
class Render:
    """Write the results into docs/performance.md and draw their charts."""

    results: tuple[Path, ...] = ()
    """Files of results; by default all step_*.json under benchmarks/results/."""
    page: Path = Path("docs/performance.md")
    """The page."""

    def run(self) -> None:
        """Renders."""
        from benchmarks.step.render import render

        for path in render(self.results or sorted(RESULTS.glob("step_*.json")), self.page, self.page.parent / "images"):
            print(path)


def main() -> None:
    """Runs a command."""
    try:
        tyro.cli(Run | Render, prog="python -m benchmarks.step", description=__doc__).run()
    except UsageError as error:
        sys.exit(f"benchmarks.step: {error}")
