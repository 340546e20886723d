"""From a dataclass to the arguments of a command.

A field is an option of its name, and its annotation says what it is for: `lr: Annotated[float | None, "..."] = None` is
`--lr FLOAT`. Fields that a class names in `positional` are given without their names.
"""

import argparse
import inspect
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from emerging_optimizers.cli import UsageError

CommandT = TypeVar("CommandT")


class _Parser(argparse.ArgumentParser):
    """One that says what is wrong in a sentence."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; `{self.prog} --help` says what it takes")


def parse(kind: type[CommandT], name: str, words: Sequence[str]) -> CommandT:
    """A command out of the words behind its name; a request for help ends the process with status 0.

    Args:
        kind: a dataclass with fields of str, int, float, bool, or one of them or None.
        name: of the command.
        words: of the command line.

    Raises:
        UsageError: there is no such option, or its value cannot be.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Greet:
        ...     '''Say hello.'''
        ...     who: Annotated[str, "Whom."] = "world"
        ...     times: Annotated[int, "How often."] = 1
        >>> parse(Greet, "greet", ["--times", "2"])
        Greet(who='world', times=2)
    """
    parser = _Parser(
        prog=f"eopt {name}", description=inspect.getdoc(kind), formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    positional = getattr(kind, "positional", ())
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):  # type: ignore[arg-type]  # a dataclass
        hint, text = hints[field.name], ""
        if get_origin(hint) is Annotated:
            hint, text = get_args(hint)
        plain = next((x for x in get_args(hint) if x is not type(None)), hint)
        required = field.default is MISSING
        if not (required or field.default in (None, False)):
            text = f"{text} ({field.default})"
        said: dict[str, Any] = {"help": text.replace("%", "%%")}
        if not required:
            said["default"] = field.default
        if field.name in positional:
            if not required:
                said["nargs"] = "?"
            parser.add_argument(field.name, type=plain, **said)
            continue
        flag = f"--{field.name.rstrip('_').replace('_', '-')}"  # `from` is no name of a field, `from_` is
        said["dest"] = field.name
        if plain is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction if field.default else "store_true", **said)
        else:
            parser.add_argument(flag, type=plain, metavar=plain.__name__.upper(), required=required, **said)
    return countable(kind(**vars(parser.parse_args(words))))


def countable(command: CommandT) -> CommandT:
    """A command as it is, unless one of its whole numbers is larger than torch can take.

    Raises:
        UsageError: one is; the text names its option.
    """
    for field in fields(command):  # type: ignore[arg-type]  # a dataclass
        value = getattr(command, field.name)
        if is_dataclass(value):
            countable(value)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and abs(number) >= 2**63:
                flag = f"--{field.name.replace('_', '-')}"
                raise UsageError(f"{flag} {number} is larger than any number here may be; give less than 2^63")
    return command
