"""From the words behind a command of the lab to its dataclass, by tyro; what is wrong is said in a sentence."""

import re
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from emerging_optimizers.cli import UsageError
from emerging_optimizers.cli.arguments import countable

CommandT = TypeVar("CommandT")

NEWEST = Path("newest")

ResumeFolder = Annotated[
    Path | None,
    PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar="[DIR]",
        instance_from_str=lambda words: _named(words[0]) if words else NEWEST,
        is_instance=lambda value: value is None or isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    ),
]


def parsed(kind: type[CommandT], words: Sequence[str], default: CommandT | None = None) -> CommandT:
    """A command of the words behind its name; a request for help ends the process with status 0.

    Raises:
        UsageError: There is no such option, or its value cannot be.
    """
    name = f"eopt {kind.__name__.lower()}"
    given: dict[str, Any] = {} if default is None else {"default": default}
    said = StringIO()
    try:
        with redirect_stderr(said):
            command = tyro.cli(
                kind, args=words, prog=name, config=(tyro.conf.FlagCreatePairsOff,), registry=PLAIN, **given
            )
        return countable(command)
    except SystemExit as end:
        if not end.code:
            raise
    raise UsageError(f"{_in_a_sentence(said.getvalue())}; `{name} --help` says what it takes")


def _in_a_sentence(box: str) -> str:
    """What is in the box that tyro draws around a mistake: what is wrong, and the option that it belongs to."""
    box = box if "╭" in box else box.partition("---")[2]  # without corners its title stands over a line
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip().strip("│|").strip() for line in box.splitlines()]
    parts: list[list[str]] = [[]]
    for line in lines:
        if line and not line.strip("─-+╭╮╰╯"):
            parts.append([])
        elif line and not line.startswith(("╭", "╰", "+")):
            parts[-1].append(line)
    wrong, *more = [part for part in parts if part] or [[box]]
    text = " ".join(wrong).removeprefix("Error parsing config: ").partition(" into tuple type")[0].rstrip(".")
    option = next((part[1] for part in more if len(part) > 1), "")
    if not option:
        return text
    if text.startswith("Error parsing "):
        return f"{option}: {text.partition(': ')[2]}"
    return f"{text} (did you mean {option}?)"


PLAIN = ConstructorRegistry()


@PLAIN.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """An option that may be left out is shown as what it takes, without the words of Python's types."""
    kinds = [kind for kind in get_args(info.type) if kind is not type(None)]
    if len(kinds) != 1 or type(None) not in get_args(info.type) or kinds[0] not in (int, float, str, Path):
        return None
    kind: Any = _named if kinds[0] is Path else kinds[0]
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=kinds[0].__name__.upper(),
        instance_from_str=lambda words: kind(words[0]),
        is_instance=lambda value: value is None or isinstance(value, kinds[0]),
        str_from_instance=lambda value: ["none" if value is None else str(value)],
    )


@PLAIN.primitive_rule
def _path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """An empty word, of a variable that a shell does not know, is not the folder where one stands."""
    if info.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: _named(words[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    )


def _named(word: str) -> Path:
    if not word:
        raise ValueError("it is empty; give a name, or '.' for the folder where you are")
    return Path(word)
