"""`make mutate`: breaks a line of the package at random, and looks whether a test that runs this line notices.

    make mutate                                # 100 mutants of engine/, linalg/ and distributed/
    make mutate ARGS="--count 20 --seed 7"     # others
    make mutate ARGS="--seed 0 --only 12,55"   # some of a sample again, after a test was written

A mutant is one change: a comparison, an arithmetic operator, a number, `and`, a negated condition, a statement that is
left out. A file is drawn by its lines of code, then a place in it, but for the triton kernel (syrk_triton.py), which no
CPU runs. Everything happens in a copy in a temporary folder.

Which tests run a line is found out once, by coverage (minutes; kept in .coverage.mutate until the package changes): one
parametrization of every test, then a second, up to five, as many as begin within LOOKING seconds. A mutant is given
those that run its line, the quickest and those of the nearest file first, as many as fit into 20 seconds
(`--seconds`), up to the first failure. What no test notices is printed, and saved with all the rest in
benchmarks/results/mutants.json; docs/trust.md explains it.
"""

import argparse
import ast
import fnmatch
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = "emerging_optimizers"
FOLDERS = ("engine", "linalg", "distributed")
TESTS = (
    "tests/linalg", "tests/engine", "tests/distributed", "tests/compat", "tests/test_equivalence.py",
    "tests/test_properties.py", "tests/test_hooks.py", "tests/test_cautious.py", "tests/test_clipping.py",
    "tests/test_averaging.py", "tests/test_conformance.py", "tests/test_kl_eigenvalues.py",
    "tests/test_orthogonalized.py", "tests/test_psgd.py", "tests/test_reductions.py", "tests/test_refresh_ramp.py",
    "tests/test_riemannian.py", "tests/test_scalar_functions.py", "tests/test_sinkhorn_muon.py",
    "tests/test_spectron.py", "tests/test_starting_rates.py", "tests/routing/test_layouts.py", "tests/qk_clip",
)  # fmt: skip
RESULT = ROOT / "benchmarks" / "results" / "mutants.json"
SEEN, TIMES = ROOT / ".coverage.mutate", ROOT / ".coverage.mutate.json"
PARAMETRIZATIONS = 5  # of one test function
LOOKING = 480  # seconds: tests that have not begun by then are not looked at
ONE_TEST, ONE_MUTANT = 60, 240  # seconds: a test that hangs is a failure; more are not spent on a mutant

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Add, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change of one file: what stands from `start` to `end` (in bytes) becomes `after`."""

    file: str
    line: int
    last: int
    kind: str
    before: str
    after: str
    start: int
    end: int


# ---- changes ---------------------------------------------------------------------------------------------------------


def changes(node: ast.AST) -> Iterator[tuple[str, str]]:
    """What may stand in place of a node, and which kind of change that is."""
    match node:
        case ast.Compare(left, [op], [right]):
            yield "comparison", ast.unparse(ast.Compare(left, [COMPARISONS[type(op)]()], [right]))
        case ast.BinOp(left, op, right) if type(op) in ARITHMETIC:
            yield "arithmetic", ast.unparse(ast.BinOp(left, ARITHMETIC[type(op)](), right))
        case ast.BoolOp(op, values):
            yield "and/or", ast.unparse(ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values))
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield "not/minus", ast.unparse(operand)
        case ast.Constant(bool(value)):
            yield "constant", str(not value)
        case ast.Constant(int(value)):
            yield "constant", str(value + 1)
        case ast.Constant(float(value)):
            yield "constant", repr(2 * value or 1.0)
        case ast.IfExp(test, body, other):
            yield "negated", ast.unparse(ast.IfExp(ast.UnaryOp(ast.Not(), test), body, other))
        case ast.Return(value) if value is not None and not (isinstance(value, ast.Constant) and value.value is None):
            yield "left out", "return None"
        case ast.Expr(ast.Call() | ast.Await()) | ast.AugAssign() | ast.Raise() | ast.Continue() | ast.Break():
            yield "left out", "pass"
        case ast.Assign([ast.Attribute() | ast.Subscript()]):  # a name that is lost fails at once
            yield "left out", "pass"


def walked(node: ast.AST) -> Iterator[tuple[ast.AST, ast.stmt]]:
    """Every node whose change can matter, with the statement it belongs to."""

    def inside(node: ast.AST, statement: ast.stmt | None) -> Iterator[tuple[ast.AST, ast.stmt]]:
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_params", "bases", "keywords_of_class"):
                continue
            for child in value if isinstance(value, list) else [value]:
                # Invariants hold, messages are words, and a module's `if` is about type checkers or optional packages.
                skipped = isinstance(child, ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom)
                skipped = skipped or isinstance(node, ast.Raise)
                skipped = skipped or (isinstance(child, ast.If) and isinstance(node, ast.Module))
                if not isinstance(child, ast.AST) or skipped:
                    continue
                belongs = child if isinstance(child, ast.stmt) else statement
                if belongs is not None:
                    yield child, belongs
                yield from inside(child, belongs)

    return inside(node, None)


def mutants(path: Path, file: str) -> list[Mutant]:
    """Every mutant of a file."""
    text = path.read_text()
    lines = [0, *itertools.accumulate(len(line.encode()) for line in text.splitlines(keepends=True))]
    found = []

    def add(node: Any, statement: ast.stmt, kind: str, after: str) -> None:
        start, end = lines[node.lineno - 1] + node.col_offset, lines[node.end_lineno - 1] + node.end_col_offset
        before = text.encode()[start:end].decode()
        if isinstance(node, ast.expr):
            after = f"({after})"
        last = max(node.end_lineno, statement.lineno)
        found.append(Mutant(file, statement.lineno, last, kind, before, after, start, end))

    for node, statement in walked(ast.parse(text)):
        for kind, after in changes(node):
            add(node, statement, kind, after)
        if isinstance(node, ast.If | ast.While):
            add(node.test, statement, "negated", f"not ({ast.unparse(node.test)})")
        if isinstance(node, ast.comprehension):
            for test in node.ifs:
                add(test, statement, "negated", f"not ({ast.unparse(test)})")
    return found


# ---- which test runs which line --------------------------------------------------------------------------------------


def digest() -> str:
    """Of the package and the tests: what is known about lines holds for these alone."""
    tests = [path for name in TESTS for path in [ROOT / name, *(ROOT / name).rglob("*.py")] if path.is_file()]
    files = sorted([*(ROOT / PACKAGE).rglob("*.py"), *tests])
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def rounds(functions: Iterable[list[Any]]) -> list[Any]:
    """One parametrization of every test, drawn at random, then another of those that have one, and so on."""
    rng = random.Random(0)
    drawn = [rng.sample(some, min(len(some), PARAMETRIZATIONS)) for some in functions]
    return [some[k] for k in range(PARAMETRIZATIONS) for some in drawn if k < len(some)]


class Few:
    """A plugin of pytest: a few parametrizations of each test, as many as time allows, and how long they take."""

    def __init__(self, limit: float) -> None:
        self.seconds: dict[str, float] = {}
        self.end = time.monotonic() + limit
        self.left = 0

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        functions = defaultdict(list)
        for item in items:
            functions[item.nodeid.partition("[")[0]].append(item)
        kept = rounds(functions.values())
        config.hook.pytest_deselected(items=[item for item in items if item not in {*kept}])
        items[:] = kept

    def pytest_runtest_protocol(self, item: Any) -> bool | None:
        if time.monotonic() < self.end:
            return None  # pytest runs it
        self.left += 1
        return True

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration


def look(args: Sequence[str] = ()) -> None:
    """Runs the tests once, and keeps which line each of them runs."""
    import pytest

    few = Few(LOOKING)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "coverage.ini"
        sources = "\n  ".join(f"{PACKAGE}.{name}" for name in FOLDERS)
        config.write_text(f"[run]\nsource_pkgs =\n  {sources}\ndata_file = {SEEN}\n")
        words = ["-q", "-m", "not slow", "--cov", f"--cov-config={config}", "--cov-context=test", "--cov-report="]
        status = pytest.main([*words, *TESTS, *args], plugins=[few])
    if status != 0:
        raise SystemExit("mutate: the tests fail as they are, so that no mutant can be judged")
    print(f"mutate: {len(few.seconds)} tests looked at, {few.left} left when time was up", flush=True)
    TIMES.write_text(json.dumps({"digest": digest(), "seconds": few.seconds}))


@dataclass(frozen=True)
class Seen:
    """Which tests run a line, how long they take, and which lines are not counted."""

    runs: dict[str, dict[int, set[str]]]
    seconds: dict[str, float]
    excluded: dict[str, set[int]]

    def tests(self, mutant: Mutant) -> set[str]:
        """The tests that run a mutant's line; those of its file where it runs at import.

        Processes of a group are not seen line by line, so what is distributed is given all tests of it.
        """
        lines = self.runs.get(mutant.file, {})
        found = set[str]().union(*(lines.get(k, ()) for k in range(mutant.line, mutant.last + 1)))
        found = found or set().union(*lines.values())
        if "/distributed/" in mutant.file:
            found |= {name for name in self.seconds if name.startswith("tests/distributed/")}
        return found

    def chosen(self, mutant: Mutant, seconds: float) -> list[str]:
        """Of those tests as many as fit into so many seconds, one at least: the quickest first.

        Those of a file named after the mutant's, which ask for what it promises, count as if they took a tenth.
        """
        name = Path(mutant.file).stem

        def order(test: str) -> float:
            nearest = name in Path(test.partition("::")[0]).stem
            return self.seconds.get(test, 0.0) * (0.1 if nearest else 1.0)

        tests = sorted(sorted(self.tests(mutant)), key=order)
        until = itertools.accumulate(self.seconds.get(test, 0.0) for test in tests)
        return [test for k, (test, end) in enumerate(zip(tests, until, strict=True)) if k == 0 or end <= seconds]


def seen() -> Seen:
    """What `look` has kept, of the tests that it has run to their end."""
    from coverage import Coverage

    cover = Coverage(data_file=str(SEEN), config_file=str(ROOT / "pyproject.toml"))
    cover.load()
    data = cover.get_data()
    seconds = json.loads(TIMES.read_text())["seconds"]
    runs: dict[str, dict[int, set[str]]] = {}
    excluded = {}
    for name in data.measured_files():
        if any(fnmatch.fnmatch(name, left) for left in cover.get_option("report:omit")):  # type: ignore[union-attr]
            continue
        file = str(Path(name).relative_to(ROOT))
        contexts = data.contexts_by_lineno(name)
        runs[file] = {k: {c.rpartition("|")[0] for c in some} & seconds.keys() for k, some in contexts.items()}
        excluded[file] = {*cover.analysis2(name)[2]}
    return Seen(runs, seconds, excluded)


# ---- a sample --------------------------------------------------------------------------------------------------------


def sample(count: int, seed: int, excluded: dict[str, set[int]]) -> list[Mutant]:
    """Mutants drawn at random: a file of those that coverage knows by its lines, a place in it that is not excluded."""
    rng = random.Random(seed)
    every = {}
    for file in sorted(excluded):
        some = [m for m in mutants(ROOT / file, file) if not excluded[file] & {m.line, m.last}]
        if some:
            every[file] = some
    weights = [len((ROOT / file).read_text().splitlines()) for file in every]
    drawn: dict[Mutant, None] = {}
    while len(drawn) < min(count, sum(map(len, every.values()))):
        (file,) = rng.choices([*every], weights)
        drawn[rng.choice(every[file])] = None
    return [*drawn]


def _run(copy: Path, names: list[str], log: Path) -> None:
    """In a process of its own, with torch imported already."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.setsid()
    os.chdir(copy)
    sys.path[:] = [str(copy), *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
    os.environ["PYTHONPATH"] = str(copy)
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", PACKAGE)]:
        del sys.modules[name]
    import pytest

    words = ["-x", "-q", "-p", "no:cacheprovider", f"--timeout={ONE_TEST}", "--no-header", "--tb=line", *names]
    status = pytest.main(words)
    sys.stdout.flush()
    os._exit(int(status))


def judged(mutant: Mutant, names: list[str], copy: Path) -> str:
    """Whether a mutant is noticed by these tests; "uncovered" where there is none."""
    if not names:
        return "uncovered"
    path, log = copy / mutant.file, copy / "log.txt"
    whole = path.read_bytes()
    path.write_bytes(whole[: mutant.start] + mutant.after.encode() + whole[mutant.end :])
    process = multiprocessing.get_context("fork").Process(target=_run, args=(copy, names, log))
    try:
        process.start()
        process.join(ONE_MUTANT)
        if process.is_alive():  # its tests are many, and all that have run passed
            os.killpg(process.pid or 0, 9)
            process.join()
            return "survived"
    finally:
        path.write_bytes(whole)
    if process.exitcode in (4, 5) and "ImportError while loading conftest" not in log.read_text():
        raise SystemExit(f"mutate: pytest ended with status {process.exitcode}: {log.read_text()}")
    return "killed" if process.exitcode else "survived"


def environment() -> dict[str, str]:
    """What the figures hold for."""
    import torch

    return {"python": platform.python_version(), "torch": torch.__version__, "system": platform.system()}


def main(args: Sequence[str] | None = None) -> int:
    """Draws, judges, prints and saves."""
    parser = argparse.ArgumentParser(prog="make mutate ARGS=...", description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--only", default="", help="numbers of mutants of the sample, as it prints them")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long the tests of a mutant may take")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the result is saved")
    told = parser.parse_args(args)
    if not TIMES.exists() or json.loads(TIMES.read_text())["digest"] != digest():
        print("mutate: finding out which test runs which line (minutes)", flush=True)
        subprocess.run([sys.executable, "-c", "from tests.mutate import look; look()"], cwd=ROOT, check=True)
    # So that the processes of the mutants have them.
    import pytest  # noqa: F401 - loaded once, for the processes that are forked
    import torch._dynamo
    import torch.distributed.fsdp  # noqa: F401 - loaded once, for the processes that are forked

    known = seen()
    drawn = dict(enumerate(sample(told.count, told.seed, known.excluded)))
    if told.only:
        drawn = {int(k): drawn[int(k)] for k in told.only.split(",")}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns("__pycache__", ".*", "runs", "site", "results")
        shutil.copytree(ROOT, copy, ignore=ignored)
        for k, mutant in drawn.items():
            start = time.perf_counter()
            names, every = known.chosen(mutant, told.seconds), len(known.tests(mutant))
            verdict = judged(mutant, names, copy)
            found.append({"number": k, "verdict": verdict, "tests": len(names), "of": every, **asdict(mutant)})
            head = f"{k:4d} {verdict:9} {time.perf_counter() - start:4.0f} s {len(names):4d} of {every:4d} tests"
            print(f"{head}  {mutant.file}:{mutant.line}  {mutant.before!r} -> {mutant.after!r}", flush=True)
            if not told.only:
                save(told.out, {"seed": told.seed, "seconds": told.seconds}, found)
    report(found)
    return 0


def save(path: Path, told: dict[str, Any], found: list[dict[str, Any]]) -> None:
    """After every mutant: a sample that is cut off is a smaller sample."""
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"environment": environment(), **told, "mutants": found}
    path.write_text(json.dumps(result, indent=1) + "\n")


def report(found: list[dict[str, Any]]) -> None:
    """How many were noticed, by folder."""
    verdicts = Counter((m["file"].split("/")[1], m["verdict"] == "killed") for m in found)
    for folder in FOLDERS:
        killed, all_ = verdicts[folder, True], verdicts[folder, True] + verdicts[folder, False]
        print(f"mutate: {folder}: {killed} of {all_} were noticed")
    killed = sum(m["verdict"] == "killed" for m in found)
    print(f"mutate: {killed} of {len(found)} were noticed, {killed / max(len(found), 1):.0%}")


if __name__ == "__main__":
    sys.exit(main())
