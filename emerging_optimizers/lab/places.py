"""One rule for what a command finds where it is to write.

empty, or not there     the command makes it
results of its own      refused; `--resume` goes on with them, `--overwrite` replaces them
anything else           refused; another `--out`

`eopt report` writes its page anew whatever page of its own stands there, since the page is nothing but the runs.

Nothing here imports torch, so that ``eopt --help`` answers at once.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from emerging_optimizers.cli import UsageError
from emerging_optimizers.cli.files import UNFINISHED
from emerging_optimizers.lab.record import read_json

# The files by which the folder of a command is known: of `eopt train`, of `eopt tf32` before it has ended, and of what
# is made in one go, which says in environment.json whose it is.
TRAINED, UNSAVED, RESULT, ENVIRONMENT = "config.json", "runs.json", "result.json", "environment.json"
# How a page of `eopt report` begins, which may be replaced.
PAGE = b"<!doctype html>\n<!-- eopt report -->\n"


@dataclass(frozen=True, kw_only=True)
class Existing:
    """What a command may do with results that are there already."""

    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise UsageError("--resume goes on with results and --overwrite replaces them; give one of the two")


def claim(out: Path, command: str, existing: Existing) -> bool:
    """Whether a command goes on with what stands at its place; it asks as the `sole_writer` there.

    Args:
        out: The folder, or the file of `eopt grid`.
        command: Its name.
        existing: What it was allowed.

    Returns:
        True: results are there, and `--resume` was given. False: it begins; with `--overwrite` the caller replaces what
        is there.

    Raises:
        UsageError: What is there may be neither gone on with nor replaced. Nothing has been written then.

    Example:
        >>> claim(Path("runs/new"), "spike", Existing())
        False
        >>> Path("notes").mkdir()
        >>> _ = Path("notes/diary.txt").write_text("today")
        >>> claim(Path("notes"), "spike", Existing(overwrite=True))
        Traceback (most recent call last):
            ...
        emerging_optimizers.cli.UsageError: notes holds files not of `eopt spike` (diary.txt); give another --out
    """
    holder = _holder_of_file(out, existing) if command == "grid" else _holder(out, command)
    if holder is None:
        return False
    if holder != command:
        raise UsageError(f"{out} holds {holder}; give another --out")
    if not (existing.resume or existing.overwrite):
        resume = f"--resume {out}" if command == "train" else "--resume"
        raise UsageError(
            f"{out} holds results of `eopt {command}` already; {resume} goes on with them, --overwrite replaces them, "
            "another --out leaves them alone"
        )
    return existing.resume


def same_request(out: Path, there: object, asked: object) -> None:
    """Refuses to go on with results of other settings.

    Args:
        out: Where they are.
        there: Their settings, a dataclass or a mapping.
        asked: The settings of the command.
    """
    one, other = (value if isinstance(value, dict) else vars(value) for value in (there, asked))
    if changed := sorted(key for key in {*one, *other} if one.get(key) != other.get(key)):
        raise UsageError(
            f"{out} holds results of another job (it differs in {', '.join(changed)}); ask for the same, or give "
            "--overwrite or another --out"
        )


def claim_page(out: Path, overwrite: bool) -> None:
    """Refuses to write the page over a file that is none of ours."""
    if overwrite or not out.is_file():
        return
    with out.open("rb") as file:
        if file.read(len(PAGE)) != PAGE:
            raise UsageError(f"{out} is no page of `eopt report`; give --overwrite to replace it, or another --out")


def _holder(out: Path, command: str) -> str | None:
    """The command whose results stand there, words for anything else, None for nothing."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    names = {name for name in names if name != "lock.json" and not name.endswith(UNFINISHED)}
    if not names or (names == {ENVIRONMENT} and _is_of_ours(out / ENVIRONMENT)):
        return None  # all that a full disk has let a command write
    owner = _owner(out, names, command)
    if owner is None:
        shown = ", ".join([*sorted(names)[:3], *(["..."] if len(names) > 3 else [])])
        return f"files not of `eopt {command}` ({shown})"
    return owner if owner == command else f"results of `eopt {owner}`"


def _holder_of_file(out: Path, existing: Existing) -> str | None:
    """The same of the file of `eopt grid`, whose environment and figure stand beside it."""
    there = os.path.lexists(out)
    if not out.name or (there and not out.is_file() and not existing.resume):
        raise UsageError(f"--out {out} is {'a folder' if out.is_dir() else 'no regular file'}; give a file")
    environment, figure = out.with_suffix(".environment.json"), out.with_name(f"{out.stem}.png")
    if out == figure:
        raise UsageError(f"--out {out} is where the figure comes; give a file for the results, as in {out.stem}.json")
    if there:  # what is wrong with one that is to be continued its reader finds out
        return "grid" if existing.resume or _is_of_grid(out) else "no results of `eopt grid` that can be read"
    for path in (environment, figure):
        if os.path.lexists(path) and not (path == environment and _is_of_ours(path)):
            raise UsageError(f"{path} is there already, and would be replaced; move it away, or give another --out")
    return None


def _is_of_grid(out: Path) -> bool:
    try:
        stored = read_json(out)
    except UsageError:
        return False
    return isinstance(stored, dict) and {"job", "best", "runs"} <= {*stored}


def _owner(folder: Path, names: set[str], command: str) -> str | None:
    if TRAINED in names:
        return "train"
    if UNSAVED in names:
        return "tf32"
    if RESULT not in names:
        return None
    try:
        return str(read_json(folder / ENVIRONMENT)["command"][1])
    except (UsageError, LookupError, TypeError):
        return command if command != "train" else None  # of whom it is, its reader finds out


def _is_of_ours(environment: Path) -> bool:
    """Whether a command has written this file of a common name."""
    try:
        return {"torch", "emerging_optimizers"} <= {*read_json(environment)}
    except (UsageError, TypeError):
        return False
