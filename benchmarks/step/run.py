"""Rounds: every arm of a workload takes its turn, again and again, each in a process of its own."""

import json
import multiprocessing
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from math import ceil, isfinite
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

import torch
from torch import Tensor

import emerging_optimizers
from benchmarks.step.arms import ARMS, PEERS, Arm
from benchmarks.step.checks import check
from benchmarks.step.floors import floor
from benchmarks.step.worker import serve
from benchmarks.step.workloads import Shapes, Workload, elements
from emerging_optimizers.lab.record import environment

OURS = str(Path(emerging_optimizers.__file__).parents[1])
LONG = 2.0
"""Seconds of a step that is not warmed up a third time; compilers need the second one."""
ROUND_SECONDS = 0.05
"""A turn has as many steps as fill this time."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """How to measure."""

    rounds: int = 7
    threads: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    checkouts: Mapping[str, str] = field(default_factory=dict)
    """Folders of the peers that are run from a checkout."""
    only: Sequence[str] = ()
    """Shell-style patterns of the arms; empty: all but the slow ones."""
    patience: float = 120
    """Seconds after which an arm that has not answered is given up."""

    @property
    def clock(self) -> str:
        """By what a step is timed."""
        return "device" if self.device == "cuda" else "cpu" if self.threads == 1 else "wall"


class ArmError(Exception):
    """An arm cannot be measured; the text says why."""


# torch with its compiler takes ten CPU seconds to import: one process does it, and every worker is a fork of that.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "benchmarks.step.worker"])


class Process:
    """A worker."""

    def __init__(self, request: Request, log: Path) -> None:
        self.patience, self.log = request.patience, log
        self.pipe, end = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=serve, args=(end, str(log), request.threads, request.device))
        self.process.start()
        end.close()

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """The answer to a request."""
        try:
            self.pipe.send((do, request))
            if not self.pipe.poll(self.patience):
                raise ArmError(f"no answer to {do!r} within {self.patience:g} s")
            reply: dict[str, Any] = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(10)
            last = (self.log.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
            raise ArmError(f"its process ended in {do!r} ({self.process.exitcode}): {last[:200]}") from None
        if "error" in reply:
            raise ArmError(reply["error"])
        return reply

    def close(self) -> None:
        """Ends it."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


@contextmanager
def worker(request: Request, folder: Path, name: str) -> Iterator[Process]:
    """A worker for as long as it is needed."""
    process = Process(request, folder / f"{name}.log")
    try:
        yield process
    finally:
        process.close()


def chosen(workload: Workload, request: Request) -> list[Arm]:
    """The arms of a workload that are asked for on this device."""

    def fits(arm: Arm, patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(arm.name.lower(), pattern.lower()) for pattern in patterns)

    mine = [arm for arm in ARMS.values() if arm.family == workload.family and request.device in arm.devices]
    if request.only:
        mine = [arm for arm in mine if fits(arm, request.only)]
    else:
        mine = [arm for arm in mine if not arm.slow and not fits(arm, workload.leave_out)]
    if "before" not in request.checkouts:
        return mine
    # A ratio below 1 of an arm from before: the step takes longer now.
    ours = [arm for arm in mine if arm.peer == "ours"]
    return [x for arm in ours for x in (arm, replace(arm, name=f"{arm.name}, before", peer="before", against=arm.name))]


def load(process: Process, arm: Arm, checkouts: Mapping[str, str]) -> str | None:
    """Imports an arm into its worker and says its version."""
    peer = PEERS[arm.peer]
    path = OURS if arm.peer == "ours" else checkouts.get(arm.peer)
    if path is None and peer.distribution is None:
        raise ArmError(f"no checkout: --peer {arm.peer}=PATH gives one")
    if path is not None and not (Path(path) / peer.module).is_dir():
        raise ArmError(f"the folder of --peer {arm.peer} has no package {peer.module}")
    asked = {"make": arm.make, "kwargs": dict(arm.kwargs), "group": dict(arm.group), "setup": dict(arm.setup)}
    reply = process.ask("load", **asked, path=path, distribution=peer.distribution)
    return reply["version"] or (_revision(path) if path else None)


def prepare(process: Process, arm: Arm, shapes: Shapes, request: Request, folder: Path) -> dict[str, Any]:
    """Everything of an arm but its rounds: construction, first step, memory, check."""
    found = process.ask("build", shapes=shapes)
    found["first_step_s"] = process.ask("step", count=1)["wall"]
    warm = process.ask("step", count=1)
    found["second_step_s"] = warm["wall"]
    if warm["wall"] < LONG or found["first_step_s"] > 2 * warm["wall"]:
        warm = process.ask("step", count=1)
    turns = ceil(ROUND_SECONDS / max(1e-6, arm.period * warm[request.clock]))
    found["steps_a_round"] = arm.period * max(1, min(20, turns))
    found |= process.ask("memory", count=arm.period)

    def update(gradients: list[list[Tensor]], dtype: str, kwargs: dict[str, Any]) -> list[Tensor]:
        inputs, out = folder / "gradients.pt", folder / "update.pt"
        torch.save(gradients, inputs)
        process.ask("update", inputs=str(inputs), out=str(out), dtype=dtype, kwargs=kwargs)
        weights: list[Tensor] = torch.load(out, weights_only=True)
        return weights

    down = process.ask("descends")
    found["check"] = {"against": arm.check or "descent", **down, **check(arm, shapes, update)}
    found["check"]["passes"] &= down["finite"] and down["descends"]
    # A peer that is less exact is timed, and the page says so; one that does not descend is broken.
    if not (found["check"]["passes"] or (arm.peer != "ours" and down["finite"] and down["descends"])):
        raise ArmError(f"its update is wrong, so it was not timed: {json.dumps(found['check'])}")
    process.ask("release")
    return found


def measure(workload: Workload, request: Request, say: Callable[[str], None] = print) -> dict[str, Any]:
    """A workload with all its arms, as JSON."""
    shapes = workload.shapes(request.device)
    load_before = os.getloadavg()[0]
    torch.set_num_threads(request.threads if request.device == "cpu" else os.cpu_count() or 1)  # for the checks
    results: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        processes: dict[str, Process] = {}

        def give_up(name: str, error: ArmError) -> None:
            results[name]["error"] = str(error)
            say(f"  {name}: {error}")
            processes.pop(name).close()

        arms = {arm.name: arm for arm in chosen(workload, request)}
        probe = stack.enter_context(worker(request, folder, "rates"))
        for arm in arms.values():
            results[arm.name] = {"peer": arm.peer, "against": arm.against}
            processes[arm.name] = stack.enter_context(worker(request, folder, arm.name.replace(" ", "_")))
            try:
                results[arm.name]["version"] = load(processes[arm.name], arm, request.checkouts)
                results[arm.name] |= prepare(processes[arm.name], arm, shapes, request, folder)
                say(f"  {arm.name}: first step {results[arm.name]['first_step_s']:.2f} s")
            except ArmError as error:
                give_up(arm.name, error)

        seconds: dict[str, list[float]] = {name: [] for name in processes}
        rates: dict[str, list[float]] = {}
        for number in range(request.rounds):
            for kind, (cpu, wall) in probe.ask("rates").items():
                rates.setdefault(kind, []).append(cpu if request.clock == "cpu" else wall)
            for name in list(processes):
                try:
                    taken = processes[name].ask("step", count=results[name]["steps_a_round"])
                    processes[name].ask("release")
                    seconds[name].append(taken[request.clock])
                except ArmError as error:
                    give_up(name, error)
            say(f"  round {number + 1} of {request.rounds}")

    measured = {kind: median(values) for kind, values in rates.items()}
    for name, result in results.items():
        if "error" not in result:
            result["seconds"] = seconds[name]
            result |= {"median_s": median(seconds[name]), "quartiles_s": quartiles(seconds[name])}
            if limit := floor(arms[name].cost, shapes, measured):
                result["floor_s"] = asdict(limit)
    compare(results)
    return {
        "about": workload.about,
        "part": workload.part(request.device),
        "family": workload.family,
        "shapes": [[count, list(shape)] for count, shape in shapes],
        "parameters": elements(shapes),
        "clock": request.clock,
        "rounds": request.rounds,
        "rates": measured,
        "arms": {name: rounded(result) for name, result in results.items()},
        "environment": surroundings(request, load_before),
    }


def compare(results: dict[str, dict[str, Any]]) -> None:
    """Adds to every arm its ratio to the arm that it is compared with: the median over rounds, since the two of a round
    were measured side by side."""
    ran = {name: result for name, result in results.items() if "error" not in result}
    for result in ran.values():
        against = result["against"]
        if against not in ran:
            peers = [
                n for n, r in ran.items() if r["against"] == against and r["peer"] != "ours" and r["check"]["passes"]
            ]
            if not peers:
                continue
            against = min(peers, key=lambda name: ran[name]["median_s"])
        ratios = [mine / its for mine, its in zip(result["seconds"], ran[against]["seconds"], strict=True)]
        result |= {"compared_with": against, "ratio": median(ratios), "ratio_quartiles": quartiles(ratios)}


def quartiles(values: Sequence[float]) -> list[float]:
    """The lower and the upper one."""
    if len(values) < 2:
        return [values[0], values[0]]
    lower, _, upper = quantiles(values, n=4, method="inclusive")
    return [lower, upper]


def rounded(value: Any) -> Any:
    """Five digits of every number; more would be noise."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) and isfinite(value) else value


def surroundings(request: Request, load_before: float) -> dict[str, Any]:
    """What a result depends on; the load says how quiet the machine was (this program itself is 1)."""
    found = environment(request.threads)
    if request.device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    loads = [round(load_before, 2), round(os.getloadavg()[0], 2)]
    return {**found, "load": loads, "date": time.strftime("%Y-%m-%d", time.gmtime())}


def _revision(path: str) -> str | None:
    """The commit of a checkout."""
    command = ["git", "-C", path, "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
