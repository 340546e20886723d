"""What `make new` writes passes the tests as it is; what it refuses, it leaves alone."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import new_optimizer

ROOT = Path(__file__).parents[1]
BY_HAND = {
    "emerging_optimizers/orthogonalized_optimizers/tame_muon.py",
    "emerging_optimizers/scalar_optimizers/tame_lion.py",
    "emerging_optimizers/entries.py",
    "tests/cases.py",
    "tests/reference/tame_muon.py",
    "tests/reference/tame_lion.py",
}
FOLLOWING = {"emerging_optimizers/__init__.py", "docs/optimizers.md"}
# In one process, since torch takes seconds to import.
TABLES_AND_TESTS = "import sys, pytest; from tests import tables; tables.main(); sys.exit(pytest.main(sys.argv[1:]))"
SUITES = ("conformance", "package", "optimizers_page")
SELECTED = "tame_ and not float16 or type_checkers or has_a_row or what_follows"


def python(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def changed(folder: Path) -> set[str]:
    """The files of the folder that are not as they are here."""
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    names = [path.relative_to(folder).as_posix() for path in files]
    return {n for n in names if not (ROOT / n).exists() or (ROOT / n).read_bytes() != (folder / n).read_bytes()}


def test_a_new_optimizer_of_each_kind_passes_the_tests_as_it_is_written(tmp_path):
    for name in ("emerging_optimizers", "tests", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)  # with what is compiled of it
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    python(tmp_path, "-m", "tests.new_optimizer", "tame_muon", "matrix")
    python(tmp_path, "-m", "tests.new_optimizer", "tame_lion", "elementwise")
    assert changed(tmp_path) == BY_HAND
    suites = [f"tests/test_{name}.py" for name in SUITES]
    said = python(
        tmp_path, "-c", TABLES_AND_TESTS, "-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", SELECTED, *suites
    )
    assert int(said.rpartition(" passed")[0].split()[-1]) > 100
    assert changed(tmp_path) == BY_HAND | FOLLOWING
    if importlib.util.find_spec("ruff"):
        written = sorted(name for name in BY_HAND | FOLLOWING if name.endswith(".py"))
        python(tmp_path, "-m", "ruff", "check", "--no-cache", *written)
        python(tmp_path, "-m", "ruff", "format", "--no-cache", "--check", *written)


@pytest.mark.parametrize(
    ("name", "kind", "why"),
    [
        ("muon", "matrix", "NAME=muon is taken by muon; give another"),
        ("so_ap", "matrix", "NAME=so_ap is taken by soap; give another"),
        ("spike_watch", "matrix", "NAME=spike_watch is taken by SpikeWatch; give another"),
        ("functions", "elementwise", "NAME=functions is taken by emerging_optimizers/scalar_optimizers/functions.py;"),
        ("", "matrix", "NAME= is not a name of at most 28 small letters"),
        ("2fast", "matrix", "NAME=2fast is not a name of"),
        ("../up", "matrix", "NAME=../up is not a name of"),
        ("lambda", "matrix", "NAME=lambda is not a name of"),
        ("a" * 29, "matrix", "is not a name of"),
        ("fresh", "tensor", "KIND=tensor is none of matrix, elementwise"),
    ],
)
def test_a_name_that_cannot_be_is_refused_in_a_sentence(name, kind, why, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["new", name, kind])
    monkeypatch.setattr(Path, "write_text", None)
    with pytest.raises(SystemExit, match=r"^new: ") as refused:
        new_optimizer.main()
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)
