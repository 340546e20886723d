"""`make release-check`: builds the wheel and the sdist, looks into them, and uses each in a clean environment.

    make release-check                      # with the Python of .venv
    make release-check PYTHON=python3.13    # with another one
    make release-check ARGS=v0.1.0          # the tag has to be the version's

What was checked stays in dist/. Nothing is published. Torch comes as constraints.txt has it; TORCH_INDEX names another
index for it.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from email.parser import Parser
from pathlib import Path, PurePosixPath

from emerging_optimizers._version import __version__

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
LARGEST = {"wheel": 200_000, "sdist": 1_000_000}  # bytes of one file
NEVER = {"runs", "site", "build", "dist", "generated", "jupyter_execute", "__pycache__", ".git", ".venv", ".ci"}
SDIST = ("LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml", "Makefile", "tests/cases.py")
NAME = "emerging_optimizers"

# A training step and every public name, in which a warning is an error. Torch's own, about itself, are not ours.
USE = f"""
import warnings
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
warnings.simplefilter("error")
from importlib.metadata import version
from importlib.resources import files
import {NAME}
assert version("emerging-optimizers") == {NAME}.__version__ == "{__version__}"
assert "site-packages" in {NAME}.__file__, {NAME}.__file__
assert (files("{NAME}") / "py.typed").is_file()
for name in {NAME}.__all__:
    getattr({NAME}, name)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
x, y = torch.randn(32, 4), torch.randn(32, 2)
for name in ("adamw", "muon", "soap"):
    optimizer = {NAME}.create_optimizer(name, model)
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], (name, losses)
    optimizer.load_state_dict(optimizer.state_dict())
"""
TINY = "--optimizers adamw,muon --steps 3 --batch 2 --context 8 --width 16 --depth 1 --heads 2 --eval-every 3"
TINY += " --eval-windows 4 --warmup 1 --checkpoint-every 3"


class Bad(Exception):
    """What is wrong with the release."""


def demand(holds: object, words: str) -> None:
    """Raises `Bad` with the words unless something holds."""
    if not holds:
        raise Bad(words)


# ---- what is in the files --------------------------------------------------------------------------------------------


def looked_into(kind: str, sizes: Mapping[str, int], expected: set[str]) -> None:
    """Looks at the names and sizes of the files of a wheel or sdist.

    Args:
        kind: wheel or sdist.
        sizes: the bytes of each file, by its path from the root of the archive (of the sdist's folder).
        expected: files that have to be there.

    Raises:
        Bad: one is missing, too large, or has no business there.
    """
    demand(not (gone := sorted(expected - {*sizes})), f"the {kind} lacks {', '.join(gone)}")
    for name, size in sizes.items():
        demand(size <= LARGEST[kind], f"the {kind} has {name} with {size} bytes; at most {LARGEST[kind]} are allowed")
        demand(not NEVER & {*PurePosixPath(name).parts}, f"the {kind} has {name}, which belongs to no release")
        inside = kind == "sdist" or name.split("/")[0] in (NAME, f"{NAME}-{__version__}.dist-info")
        demand(inside, f"the wheel has {name}, which is outside of the package")


def metadata(text: str) -> None:
    """Looks at the metadata of the wheel."""
    said = Parser().parsestr(text)
    needs = said.get_all("Requires-Dist", [])
    demand(said["Version"] == __version__, f"the metadata has version {said['Version']}, the package {__version__}")
    demand(said["License-Expression"] == "Apache-2.0", "the metadata has no License-Expression")
    always = [need for need in needs if "extra ==" not in need]
    demand(len(always) == 1 and always[0].startswith("torch>="), f"the package needs {always}, and should torch alone")
    demand("lab" in said.get_all("Provides-Extra", []), "the metadata has no extra 'lab'")


def package_files() -> set[str]:
    """The files of the package that belong to the release: those that git knows, where there is git."""
    done = subprocess.run(["git", "ls-files", NAME], cwd=ROOT, capture_output=True, text=True)
    known = done.stdout.splitlines() or [str(p.relative_to(ROOT)) for p in (ROOT / NAME).rglob("*.py")]
    return {*known, f"{NAME}/py.typed"}


def contents(wheel: Path, sdist: Path) -> None:
    """Looks into both."""
    with zipfile.ZipFile(wheel) as file:
        info = f"{NAME}-{__version__}.dist-info"
        sizes = {one.filename: one.file_size for one in file.infolist() if not one.is_dir()}
        needed = {f"{info}/licenses/LICENSE", f"{info}/entry_points.txt", f"{info}/METADATA"}
        looked_into("wheel", sizes, package_files() | needed)
        metadata(file.read(f"{info}/METADATA").decode())
    with tarfile.open(sdist) as file:
        sizes = {m.name.partition("/")[2]: m.size for m in file.getmembers() if m.isfile()}
        looked_into("sdist", sizes, package_files() | {*SDIST})


def changelog(text: str) -> None:
    """The version has a dated section, and what comes after it a place."""
    demand(re.search(r"^## \[Unreleased\]$", text, re.MULTILINE), "CHANGELOG.md has no section [Unreleased]")
    dated = rf"^## \[{re.escape(__version__)}\] - \d{{4}}-\d\d-\d\d$"
    demand(re.search(dated, text, re.MULTILINE), f"CHANGELOG.md has no section '## [{__version__}] - YYYY-MM-DD'")


# ---- in use ----------------------------------------------------------------------------------------------------------


def run(*words: str | Path, cwd: Path, status: int = 0) -> str:
    """Runs a command outside of the repository, and returns what it said; another status is `Bad`."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([*map(str, words)], cwd=cwd, env=env, capture_output=True, text=True)
    said = done.stdout + done.stderr
    demand(done.returncode == status, f"{' '.join(map(str, words))[:200]}: status {done.returncode}\n{said}")
    return said


def in_use(artifact: Path, place: Path, say: Callable[[str], None] = print) -> None:
    """Installs a wheel or an sdist into an environment of its own, and uses it, without the lab's extra and with it."""
    bin_ = place / "env" / ("Scripts" if os.name == "nt" else "bin")
    python, eopt = bin_ / "python", bin_ / "eopt"
    run(sys.executable, "-m", "venv", place / "env", cwd=place)
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    if index := os.environ.get("TORCH_INDEX"):
        run(*pip, "--index-url", index, "torch", cwd=place)
    run(*pip, artifact, cwd=place)
    say(f"release-check: {artifact.name} with " + run(python, "-V", cwd=place).strip())
    run(python, "-c", USE, cwd=place)
    run(python, "-m", "pip", "check", cwd=place)
    types(python, place)
    demand(run(eopt, "--version", cwd=place) == f"eopt {__version__}\n", "eopt --version does not say the version")
    demand("soap" in run(eopt, "list", cwd=place), "eopt list does not list")
    said = run(eopt, "train", cwd=place, status=1)
    demand("pip install 'emerging-optimizers[lab]'" in said, f"without the extra `eopt train` says: {said}")
    run(*pip, f"{artifact}[lab]", cwd=place)
    run(eopt, "train", *TINY.split(), "--out", place / "run", cwd=place)
    demand(list((place / "run").glob("*.png")), "eopt train drew nothing")


def types(python: Path, place: Path) -> None:
    """Pyright reads what users write beside the installed package, as an editor does."""
    shutil.copy(ROOT / "tests" / "reference" / "typed_use.py", place / "use.py")
    (place / "pyrightconfig.json").write_text('{"typeCheckingMode": "standard", "include": ["use.py"]}')
    run(sys.executable, "-m", "basedpyright", "--pythonpath", python, cwd=place)


def main(tags: Sequence[str] = ()) -> int:
    """Does all of it, and returns the exit status."""
    try:
        for tag in tags:
            demand(tag == f"v{__version__}", f"the tag is {tag}, and the version {__version__}")
        changelog((ROOT / "CHANGELOG.md").read_text())
        shutil.rmtree(DIST, ignore_errors=True)
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            run(sys.executable, "-m", "build", "--outdir", DIST, ROOT, cwd=place)
            (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
            print(f"release-check: {wheel.name}, {wheel.stat().st_size} bytes; {sdist.name}, {sdist.stat().st_size}")
            run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist, cwd=place)
            contents(wheel, sdist)
            for artifact in (wheel, sdist):
                with tempfile.TemporaryDirectory(dir=place) as own:
                    in_use(artifact, Path(own))
    except Bad as found:
        print(f"release-check: {found}", file=sys.stderr)
        return 1
    print(f"release-check: {__version__} is good to be released")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
