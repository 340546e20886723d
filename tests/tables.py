"""What follows from the rows of `entries.py` and the their classes: tables of the pages, imports for type checkers.

    make tables          # writes them

A page says where a table goes, `<!-- make tables: PACKAGE PACKAGE -->`, and the table's first line which cells it has.
"""

import inspect
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from emerging_optimizers.registry import OPTIMIZERS, Entry

ROOT = Path(__file__).parents[1]
INIT = ROOT / "emerging_optimizers" / "__init__.py"
PAGES = (ROOT / "docs" / "optimizers.md",)
LONG, SHORT = 224, 160  # sides of the matrix whose state is measured; no default rank or block is one of them
RANK = 64  # Spectron's default for such a matrix
OPTIONS = {"spectron": {"truncation_tolerance": 1.0}}  # without it half of a random matrix is refused


def said(cls: type, label: str) -> str:
    """What the docstring of a class says behind a label at the beginning of a line."""
    found = re.search(rf"^{label}: (.+(?:\n {{4}}.+)*)", inspect.getdoc(cls) or "", re.MULTILINE)
    if found is None:
        raise ValueError(f"the docstring of {cls.__name__} has no line {label!r}, as scalar_optimizers/lion.py has")
    return " ".join(found[1].split())


@cache
def _sizes(name: str, M: int, N: int) -> Counter[str]:
    """How often each size occurs in the state of an (M, N) matrix, in numbers for each of the weight's."""
    p = torch.nn.Parameter(0.02 * torch.randn(M, N, generator=torch.Generator().manual_seed(0)))
    optimizer = OPTIMIZERS[name].load()([p], lr=1.0, **OPTIONS.get(name, {}))
    optimizer._init_group(optimizer.param_groups[0], skip_non_grad_params=False)
    letters = {M: "M", N: "N", RANK: "r"}
    named = {"MN": "1", "MM": "M/N", "NN": "N/M", "Mr": "r/N", "Nr": "r/M"}
    matrices = [x for x in optimizer.state[p].values() if x.ndim == 2 and 1 not in x.shape]
    return Counter(named["".join(sorted(letters[n] for n in x.shape))] for x in matrices)


def state(name: str, unit: int = 1) -> str:
    """State for each number of an (M, N) weight, in numbers of `unit` bytes; S, T: its shorter and longer side."""
    tall, wide = _sizes(name, LONG, SHORT), _sizes(name, SHORT, LONG)
    if tall != wide:  # which is about the shorter side, the N of the tall one
        tall = Counter({size.replace("M", "T").replace("N", "S"): count for size, count in tall.items()})
    terms = [f"{count * unit} {size}" for size, count in sorted(tall.items())]
    return " + ".join(term.removesuffix(" 1").removeprefix("1 ") for term in terms)


def linked(paper: str) -> str:
    """Papers, with links to arXiv."""
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[\1](https://arxiv.org/abs/\1)", paper)


CELLS: dict[str, Callable[[str, Entry], str]] = {
    "name": lambda name, entry: f"`{name}`",
    "update": lambda name, entry: said(entry.load(), "Update"),
    "when to use it": lambda name, entry: said(entry.load(), "When to use it"),
    "paper": lambda name, entry: linked(entry.paper),
    "state": lambda name, entry: state(name),
}


def _table(found: re.Match[str]) -> str:
    head, packages, cells = found[1], found[2].split(), found[3].strip("| ").split(" | ")
    rows = [
        "| " + " | ".join(CELLS[cell](name, entry) for cell in cells) + " |\n"
        for package in packages
        for name, entry in sorted(OPTIMIZERS.items())
        if entry.path.startswith(f"emerging_optimizers.{package}.")
    ]
    return head + "".join(rows)


def page(text: str) -> str:
    """A page with its tables."""
    return re.sub(r"(<!-- make tables: (.+) -->\n\n(\|.+\|)\n\|[-|]+\|\n)(?:\|.*\n)*", _table, text)


def exports(text: str) -> str:
    """`emerging_optimizers/__init__.py` with the imports that tell type checkers what `_HOMES` finds."""
    lines = []
    for module, cls in sorted({tuple(entry.path.split(":")) for entry in OPTIMIZERS.values()}):
        line = f"    from {module} import {cls} as {cls}\n"
        fits = len(line) <= 121  # as ruff breaks it
        lines.append(line if fits else f"    from {module} import (\n        {cls} as {cls},\n    )\n")
    return re.sub(r"(if TYPE_CHECKING:  # make tables\n)(?: +.+\n)*", lambda found: found[1] + "".join(lines), text)


def files() -> dict[Path, str]:
    """Each file as it should be."""
    return {INIT: exports(INIT.read_text()), **{path: page(path.read_text()) for path in PAGES}}


def main() -> None:
    """Write what has changed."""
    for path, text in files().items():
        if text != path.read_text():
            path.write_text(text)
            print(f"tables: {path.relative_to(ROOT)} is written")


if __name__ == "__main__":
    main()
