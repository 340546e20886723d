"""The report of the lab: one HTML file with the tables and figures of every experiment under a folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from emerging_optimizers.lab import sections as read
from emerging_optimizers.lab.config import UsageError
from emerging_optimizers.lab.page import Section, render
from emerging_optimizers.lab.record import reading, sole_writer, write_atomically


@dataclass(frozen=True)
class Kind:
    """An experiment that the report knows."""

    command: str
    """What makes its result."""
    files: str
    """A pattern under the folder of runs: the file that a finished run leaves."""
    read: Callable[[Path], Section]


KINDS = (
    Kind("eopt spike", "spike*/result.json", read.spike_section),
    Kind("eopt eigenbasis", "eigenbasis*/result.json", read.eigenbasis_section),
    Kind("eopt precision", "precision*/result.json", read.precision_section),
    Kind("eopt tf32", "tf32*/result.json", read.tf32_section),
    Kind("eopt train", "*/summary.json", read.train_section),
)


def write_report(runs: Path, out: Path) -> tuple[Section, ...]:
    """Writes the report of every finished run.

    Args:
        runs: The folder that holds the run folders.
        out: The HTML file; one that is there is replaced.

    Returns:
        The sections of the report.

    Raises:
        UsageError: There is no finished run, a result cannot be read, another report is being written to the file, or
            the disk refuses. Nothing has been written then.

    Example:
        >>> from emerging_optimizers.lab.spike import SpikeConfig, run_spike, save_spike
        >>> config = SpikeConfig(optimizers=("muon",), shape=(4, 3), steps=12, spike_at=(5,), spike_scale=(10.0,))
        >>> files = save_spike(run_spike(config), Path("runs/spike"))
        >>> [section.title for section in write_report(Path("runs"), Path("runs/report.html"))]
        ['Gradient spikes']
    """
    found = {kind: sorted(runs.glob(kind.files)) for kind in KINDS}
    sections = tuple(_read(kind, path) for kind, paths in found.items() for path in paths)
    if not sections:
        commands = ", ".join(f"`{kind.command}`" for kind in KINDS)
        raise UsageError(f"there is no finished run under {runs}; one of {commands} makes one, or give another --runs")
    html = render(sections, [kind.command for kind, paths in found.items() if not paths])
    with sole_writer(out.parent, out.name):
        write_atomically({out: html.encode()})
    return sections


def _read(kind: Kind, path: Path) -> Section:
    with reading(path, f"make it again with `{kind.command}`, or move it away"):
        section = kind.read(path)
        render([section])  # so that what cannot be shown is named
        return section
