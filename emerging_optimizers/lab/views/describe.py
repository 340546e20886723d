"""The words in which figures and tables are described; nothing here knows how they are drawn.

Nothing here imports torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table as RichTable

# The mark of a curve that has its key's.
OWN = "own"


@dataclass(frozen=True)
class Key:
    """One of the things that are compared: an entry of a picture's legend, and a button of the page."""

    name: str
    color: str
    dash: str = "solid"
    """Of its lines: "solid", "dash", "dot" or "dashdot"."""
    mark: str = "o"
    """Of its points: a marker of matplotlib."""
    note: str = ""
    """What a legend says besides the name."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line of a panel, its points or both. A value that is not finite is a gap."""

    key: str
    y: Sequence[float]
    x: Sequence[float] | None = None
    """By default the steps from 1 on."""
    dash: str | None = None
    """By default the key's; "" leaves out the line."""
    mark: str = ""
    """The marker of the points, if they have one; OWN is the key's."""
    faint: bool = False
    band: tuple[Sequence[float], Sequence[float]] | None = None
    """What is shaded around the line, from below to above."""


@dataclass(frozen=True)
class Panel:
    """Curves over one pair of axes."""

    title: str
    curves: Sequence[Curve]
    lines: Sequence[float] = ()
    """Where a vertical line stands: the step of a spike."""
    levels: Sequence[float] = ()
    """Where a horizontal line lies: a value to compare with."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Panels with common axes. Each view is a set of panels, and the reader of the page chooses among them."""

    title: str
    views: Mapping[str, Sequence[Panel]]
    x: str
    y: str
    log: str = ""
    """Which axes are logarithmic: "", "x", "y" or "xy"."""
    columns: int = 1
    limits: tuple[float | None, float | None] = (None, None)
    """Ends of the vertical axis, where the values alone do not say them."""
    ticks: Mapping[float, str] = field(default_factory=dict)
    """Words along the horizontal axis, in the place of numbers."""
    printed: str | None = None
    """The view on paper, where there is one only; by default the first."""


@dataclass(frozen=True)
class Number:
    """A number of the result and how it is shown."""

    value: float | None
    text: str


Cell = str | tuple[Number, ...]


def number(value: float | None, form: str, mark: str = "") -> tuple[Number, ...]:
    """A cell with one number. The page has all of its digits in the cell's title; one that is not there is a hyphen.

    Args:
        value: The number.
        form: How it is written, as `format` takes it.
        mark: What follows it.

    Example:
        >>> number(0.12345, ".2f", "*")
        (Number(value=0.12345, text='0.12*'),)
    """
    if value is None:
        return (Number(None, "-"),)
    return (Number(value if math.isfinite(value) else None, f"{value:{form}}{mark}"),)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table for a terminal (rich), a Markdown file, a notebook and the page of the report.

    Example:
        >>> table = Table(title="Steps", head=("optimizer", "x100"), rows=(("muon", number(1, "d")),))
        >>> print(table.markdown())
        **Steps**
        <BLANKLINE>
        | optimizer | x100 |
        |:--|--:|
        | muon | 1 |
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    keys: Sequence[str] = ()
    """The key that each row belongs to, for the buttons of the page."""
    labels: int = 1
    """The first columns, which hold words; the others hold numbers."""
    grouped: bool = False
    """Whether the first column, where it repeats itself, is left empty in text."""
    between: str = " / "
    """What stands between the numbers of a cell."""
    dense: bool = False
    """Whether its columns stand close together, since a terminal has no room for more."""

    @property
    def texts(self) -> list[list[str]]:
        """The rows as text."""
        texts = [
            [cell if isinstance(cell, str) else self.between.join(x.text for x in cell) for cell in row]
            for row in self.rows
        ]
        if self.grouped:
            first = [row[0] for row in texts]
            for row, above in zip(texts[1:], first, strict=False):
                row[0] = "" if row[0] == above else row[0]
        return texts

    def markdown(self) -> str:
        """The table in Markdown, its title in bold above it."""
        rule = "|" + "".join(":--|" if i < self.labels else "--:|" for i in range(len(self.head)))
        head = [heading.replace("\n", " ") for heading in self.head]
        lines = (f"| {' | '.join(cells)} |" for cells in (head, *self.texts))
        return "\n".join((f"**{self.title}**", "", next(lines), rule, *lines))

    def to_json(self) -> dict[str, Any]:
        """Its words and numbers; a cell of several numbers is an array, one that is not finite null."""
        rows = [
            [c if isinstance(c, str) else c[0].value if len(c) == 1 else [x.value for x in c] for c in row]
            for row in self.rows
        ]
        return {"title": self.title, "head": [*self.head], "rows": rows}

    def _repr_markdown_(self) -> str:
        return self.markdown()

    def __rich__(self) -> "RichTable":
        from rich import box
        from rich.table import Table as RichTable

        table = RichTable(title=self.title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=self.dense)
        for i, heading in enumerate(self.head):
            words = i < self.labels
            table.add_column(heading, justify="left" if words else "right", no_wrap=words)
        for cells in self.texts:
            table.add_row(*cells)
        return table


@dataclass(frozen=True, kw_only=True)
class View:
    """Everything that an experiment shows, and where."""

    title: str
    question: str = ""
    facts: str = ""
    keys: Sequence[Key]
    parts: Sequence[Table | Figure] = ()
    """Its section of the page, from the top."""
    tables: Sequence[Table] = ()
    """What the terminal and ``tables.md`` show."""
    pictures: Mapping[str, Sequence[Sequence[Figure]]]
    """For each picture file the rows of figures that stand in it."""


def alone(*panels: Panel) -> dict[str, Sequence[Panel]]:
    """The only view of a figure."""
    return {"": panels}
