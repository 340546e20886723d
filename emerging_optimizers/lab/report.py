"""The report of the lab: one HTML file with the tables and figures of every experiment under a folder."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from emerging_optimizers.cli import UsageError
from emerging_optimizers.cli.files import write_atomically
from emerging_optimizers.lab.config import TrainConfig
from emerging_optimizers.lab.eigenbasis import EigenbasisResult
from emerging_optimizers.lab.gallery import GalleryResult
from emerging_optimizers.lab.page import Section, render
from emerging_optimizers.lab.places import claim_page
from emerging_optimizers.lab.precision import PrecisionResult
from emerging_optimizers.lab.record import read_json, reading, sole_writer
from emerging_optimizers.lab.runs import TrainResult
from emerging_optimizers.lab.spike import SpikeResult
from emerging_optimizers.lab.tf32 import TF32Result
from emerging_optimizers.lab.views.describe import View
from emerging_optimizers.lab.views.eigenbasis import eigenbasis_view
from emerging_optimizers.lab.views.gallery import gallery_view
from emerging_optimizers.lab.views.precision import precision_view
from emerging_optimizers.lab.views.spike import spike_view
from emerging_optimizers.lab.views.tf32 import tf32_view
from emerging_optimizers.lab.views.train import train_view


@dataclass(frozen=True)
class Kind:
    """An experiment that the report knows."""

    name: str
    """Of the command that makes its result."""
    files: str
    """A pattern under the folder of runs: the file that a finished run leaves."""
    read: Callable[[Path], Any]
    """Makes a result of that file."""
    view: Callable[[Any], View]

    @property
    def command(self) -> str:
        """What makes its result."""
        return f"eopt {self.name}"


def _stored(result: type[Any]) -> Callable[[Path], Any]:
    return lambda path: result.from_json(read_json(path))


def _trained(path: Path) -> TrainResult:
    config = TrainConfig.from_json(read_json(path.with_name("config.json"))["config"])
    return TrainResult.read(path.parent, config)


KINDS = (
    Kind("spike", "spike*/result.json", _stored(SpikeResult), spike_view),
    Kind("eigenbasis", "eigenbasis*/result.json", _stored(EigenbasisResult), eigenbasis_view),
    Kind("precision", "precision*/result.json", _stored(PrecisionResult), precision_view),
    Kind("tf32", "tf32*/result.json", _stored(TF32Result), tf32_view),
    Kind("gallery", "gallery*/result.json", _stored(GalleryResult), gallery_view),
    Kind("train", "*/summary.json", _trained, train_view),
)


def write_report(runs: Path, out: Path, *, overwrite: bool = False) -> tuple[Section, ...]:
    """Writes the report of every finished run.

    Args:
        runs: The folder that holds the run folders.
        out: The HTML file; a report that is there is replaced.
        overwrite: Whether any other file is replaced, too.

    Returns:
        The sections of the report.

    Raises:
        UsageError: There is no finished run, a result cannot be read, the file is no report, another one is being
            written to it, or the disk refuses. Nothing has been written then.

    Example:
        >>> from emerging_optimizers.lab.present import save
        >>> from emerging_optimizers.lab.spike import SpikeConfig, run_spike
        >>> config = SpikeConfig(optimizers=("muon",), shape=(4, 3), steps=12, spike_at=(5,), spike_scale=(10.0,))
        >>> result = run_spike(config)
        >>> files = save(result, spike_view(result), Path("runs/spike"))
        >>> [section.view.title for section in write_report(Path("runs"), Path("runs/report.html"))]
        ['Gradient spikes']
    """
    found = {kind: sorted(runs.glob(kind.files)) for kind in KINDS}
    sections = tuple(_read(kind, path) for kind, paths in found.items() for path in paths)
    if not sections:
        commands = ", ".join(f"`{kind.command}`" for kind in KINDS)
        raise UsageError(f"there is no finished run under {runs}; one of {commands} makes one, or give another --runs")
    html = render(sections, [kind.command for kind, paths in found.items() if not paths])
    with sole_writer(out.parent, out.name):
        claim_page(out, overwrite)
        write_atomically({out: html.encode()})
    return sections


def _read(kind: Kind, path: Path) -> Section:
    with reading(path, f"make it again with `{kind.command}`, or move it away"):
        result = kind.read(path)
        section = Section(
            id=path.parent.name,
            view=kind.view(result),
            command=_command(kind.name, result.config),
            environment=_environment(path),
        )
        render([section])  # so that what cannot be shown is named
        return section


def _command(name: str, config: Any) -> str:
    """The command line that asks for a configuration again."""
    default = type(config)()
    words = ["eopt", name]
    for field in fields(config):
        value = getattr(config, field.name)
        if value == getattr(default, field.name):
            continue
        match value:
            case Mapping():
                given = [",".join(f"{key}={x:g}" for key, x in value.items())]
            case tuple() if all(isinstance(x, str) for x in value):
                given = [",".join(value)]
            case tuple():
                given = [str(x) for x in value]
            case _:
                given = [str(value)]
        words += given if field.name == "item" else [f"--{field.name.replace('_', '-')}", *given]
    return shlex.join(words)


def _environment(path: Path) -> dict[str, str]:
    """What stands beside a result about where it comes from, as texts."""

    def text(value: Any) -> str:
        match value:
            case Mapping():
                return ", ".join(f"{key} {x}" for key, x in value.items())
            case list():
                return shlex.join(value)
            case _:
                return str(value)

    stored = read_json(path.with_name("environment.json"))
    return {name.replace("_", " "): text(value) for name, value in stored.items()}
