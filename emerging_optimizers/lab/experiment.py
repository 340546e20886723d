"""What the experiments share: checks of a request, JSON, tables, and the files of a run.

result.json         the request and what came out; the same request gives the same file on one machine
environment.json    what it ran on, and the command line
tables.md           the tables that the terminal shows
*.png               the figures

Nothing here imports torch before files are written, so that ``eopt --help`` answers at once.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from emerging_optimizers.lab.config import UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable


class Result(Protocol):
    """What an experiment makes."""

    @property
    def config(self) -> Any:
        """The request."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""


R = TypeVar("R", bound=Result)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of texts, for a terminal (rich), a Markdown file and a notebook.

    Example:
        >>> table = Table(title="Steps", head=("optimizer", "x100"), rows=(("muon", "1"),))
        >>> print(table.markdown())
        **Steps**
        <BLANKLINE>
        | optimizer | x100 |
        |:--|--:|
        | muon | 1 |
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    labels: int = 1
    """The first columns, which hold words; the others hold numbers."""

    def markdown(self) -> str:
        """The table in Markdown, its title in bold above it."""
        rule = "|" + "".join(":--|" if i < self.labels else "--:|" for i in range(len(self.head)))
        lines = (f"| {' | '.join(cells)} |" for cells in (self.head, *self.rows))
        return "\n".join((f"**{self.title}**", "", next(lines), rule, *lines))

    def _repr_markdown_(self) -> str:
        return self.markdown()

    def __rich__(self) -> "RichTable":
        from rich import box
        from rich.table import Table as RichTable

        table = RichTable(title=self.title, box=box.SIMPLE_HEAD, pad_edge=False)
        for i, heading in enumerate(self.head):
            table.add_column(heading, justify="left" if i < self.labels else "right")
        for cells in self.rows:
            table.add_row(*cells)
        return table


def require_positive(config: object, *names: str) -> None:
    """Refuses a request whose whole numbers of these names are not at least 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise UsageError(f"{_flag(name)} is {getattr(config, name)}; it must be at least 1")


def require_distinct(config: object, *names: str) -> None:
    """Refuses a request that names nothing, or one thing twice, under these names."""
    for name in names:
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            raise UsageError(f"{_flag(name)} must name at least one value, and each of them once")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@contextmanager
def reproducible(config: Any) -> Iterator[None]:
    """A block with the threads of a request, and with its seed for those who draw from torch's own generator."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            yield
    finally:
        torch.set_num_threads(threads)


def rounded(values: Iterable[float]) -> tuple[float, ...]:
    """Six digits: about what float32 holds, and files of half the size."""
    return tuple(float(f"{value:.6g}") for value in values)


def to_json(value: Any) -> Any:
    """A result as JSON: objects and arrays; a number that is not finite becomes null.

    Example:
        >>> to_json({1: (0.5, float("inf"))})
        {'1': [0.5, None]}
    """
    if is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_json(value: Any) -> Any:
    """The inverse of `to_json` up to the classes: arrays become tuples, and a null in an array is NaN.

    Example:
        >>> from_json({"spike": None, "rms": [0.5, None]})
        {'spike': None, 'rms': (0.5, nan)}
    """
    if isinstance(value, Mapping):
        return {key: from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(math.nan if item is None else from_json(item) for item in value)
    return value


def save(
    result: R,
    folder: Path,
    *,
    tables: Iterable[Table],
    figures: Mapping[str, Callable[[R, Path], None]],
    command: Sequence[str],
) -> tuple[Path, ...]:
    """Writes the files of an experiment.

    Args:
        result: What it made.
        folder: Where to; it is made if it is not there, and what it holds from an earlier run is replaced.
        tables: Its tables.
        figures: For the name of each picture, the function that draws it.
        command: The command line.

    Returns:
        The files.

    Raises:
        UsageError: Another process writes into the folder, or the disk refuses.
    """
    from emerging_optimizers.lab.record import environment, json_bytes, sole_writer, write_atomically

    json, surroundings, markdown = (folder / name for name in ("result.json", "environment.json", "tables.md"))
    text = "\n\n".join(table.markdown() for table in tables)
    written = {
        json: json_bytes(result.to_json()),
        surroundings: json_bytes({**environment(result.config.threads), "command": list(command)}),
        markdown: f"{text}\n".encode(),
    }
    pictures = {folder / f"{name}.png": draw for name, draw in figures.items()}
    with sole_writer(folder):
        write_atomically(written)
        for path, draw in pictures.items():
            draw(result, path)
    return json, surroundings, markdown, *pictures


def show(tables: Iterable[Table], files: Iterable[Path] = (), console: "Console | None" = None) -> None:
    """Shows the tables of an experiment and where its files are.

    Args:
        tables: The tables.
        files: The files.
        console: Where to show them; by default the terminal.
    """
    if console is None:
        from rich.console import Console

        console = Console()
    for table in tables:
        console.print(table)
    for path in files:
        console.print(str(path), soft_wrap=True)
