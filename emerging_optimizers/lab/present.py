"""What a command leaves and says: the files of a result, its tables in the terminal, and where everything is.

result.json         the request and what came out; the same request gives the same file on one machine
environment.json    what it ran on, and the command line
tables.md           the tables that the terminal shows
*.png               the pictures
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from emerging_optimizers.cli.files import write_atomically
from emerging_optimizers.cli.progress import Progress, Say
from emerging_optimizers.lab.experiment import Result
from emerging_optimizers.lab.places import RESULT, Existing, claim, same_request
from emerging_optimizers.lab.record import environment, json_bytes, read_json, reading, sealed, sole_writer
from emerging_optimizers.lab.runs import GridRow, TrainResult
from emerging_optimizers.lab.views.describe import Table, View
from emerging_optimizers.lab.views.grid import grid_view
from emerging_optimizers.lab.views.train import train_view

R = TypeVar("R", bound=Result)


def carry_out(
    run: Callable[[bool, Say], R],
    view: Callable[[R], View],
    out: Path,
    command: Sequence[str],
    existing: Existing,
    as_json: bool = False,
) -> None:
    """Runs an experiment, writes its files and shows its tables; meanwhile nobody else writes into the folder.

    Args:
        run: Makes the result; told whether it goes on with what the folder holds, and whom to tell how far it is.
        view: What a result shows.
        out: The folder.
        command: The command line.
        existing: What may become of results that are there.
        as_json: Whether tables and files are shown as JSON.
    """
    with sole_writer(out):
        resume = claim(out, command[1], existing)
        with Progress(" ".join(command[:2])) as say:
            result = run(resume, say)
            say("drawing")
            shown = view(result)
            files = save(result, shown, out, command)
    show(shown.tables, files, as_json=as_json)


def in_one_go(kind: Any, config: Any, out: Path, make: Callable[[Say], R]) -> Callable[[bool, Say], R]:
    """An experiment without parts: to go on with it is to read what it has made.

    Args:
        kind: The class of its results.
        config: The request.
        out: The folder.
        make: Runs it, and says how far it is.
    """

    def run(resume: bool, say: Say) -> R:
        if not resume:
            return make(say)
        path = out / RESULT
        with reading(path, "bring it back, or give --overwrite or another --out"):
            result = kind.from_json(read_json(path))
        same_request(out, result.config, config)
        return result

    return run


def save(result: Result, view: View, folder: Path, command: Sequence[str] = ()) -> tuple[Path, ...]:
    """Writes the files of an experiment.

    Args:
        result: What it made.
        view: What it shows.
        folder: Where to; it is made if it is not there, and what it holds from an earlier run is replaced.
        command: The command line, kept with the result.

    Returns:
        The files.

    Raises:
        UsageError: Another process writes into the folder, or the disk refuses.
    """
    json, surroundings, markdown = (folder / name for name in ("result.json", "environment.json", "tables.md"))
    text = "\n\n".join(table.markdown() for table in view.tables)
    written = {
        json: json_bytes(sealed(result.to_json())),
        surroundings: json_bytes({**environment(result.config.threads), "command": list(command)}),
        markdown: f"{text}\n".encode(),
    }
    with sole_writer(folder):
        write_atomically(written)
        pictures = _draw(view, folder)
    return *written, *pictures


def show(
    tables: Iterable[Table], files: Iterable[Path] = (), console: Console | None = None, as_json: bool = False
) -> None:
    """Shows the tables of an experiment and where its files are.

    Args:
        tables: The tables.
        files: The files.
        console: Where to show them; by default the terminal.
        as_json: Whether they are shown as JSON, with all digits.
    """
    if as_json:
        print(
            json_bytes({"tables": [table.to_json() for table in tables], "files": [*map(str, files)]}).decode(), end=""
        )
        return
    console = console or Console()
    for table in tables:
        console.print(table)
    for path in files:
        console.print(str(path), soft_wrap=True)


def present_training(result: TrainResult, console: Console | None = None, as_json: bool = False) -> None:
    """Draws the pictures of a training run into its folder, then shows its tables and where its files are.

    Args:
        result: The run.
        console: Where to show them; by default the terminal.
        as_json: Whether they are shown as JSON.
    """
    folder, view = result.folder, train_view(result)
    spike = {"spike": folder / "spike.png", "recovery": folder / "spike.json"} if result.spiked else {}
    files = {**spike, "figure": folder / "loss.png", "summary": folder / "summary.json", "run": folder}
    with sole_writer(folder):
        _draw(view, folder)
    _say(view, files, console, 8, as_json)


def present_grid(rows: Sequence[GridRow], out: Path, console: Console | None = None, as_json: bool = False) -> None:
    """Draws the picture of a grid beside its results, then shows its table and where its files are.

    Args:
        rows: Every run.
        out: The JSON file of the results.
        console: Where to show them; by default the terminal.
        as_json: Whether they are shown as JSON.
    """
    view = grid_view(rows, out.stem)
    with sole_writer(out.parent, out.name):
        (picture,) = _draw(view, out.parent)
    files = {"results": out, "environment": out.with_suffix(".environment.json"), "figure": picture}
    _say(view, files, console, 12, as_json)


def _draw(view: View, folder: Path) -> tuple[Path, ...]:
    from emerging_optimizers.lab import plots  # here: matplotlib takes two seconds to import

    files = {name: folder / f"{name}.png" for name in view.pictures}
    for name, path in files.items():
        plots.draw(view, name, path)
    return tuple(files.values())


def _say(view: View, files: Mapping[str, Path], console: Console | None, width: int, as_json: bool) -> None:
    """The tables, then a line for each file with its name in front."""
    if as_json:
        show(view.tables, files.values(), as_json=True)
        return
    console = console or Console()
    show(view.tables, console=console)
    for what, path in files.items():
        console.print(f"{what:<{width}} {path}", soft_wrap=True)
