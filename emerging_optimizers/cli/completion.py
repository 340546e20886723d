"""What a shell needs to complete the words of `eopt`: a script of its own, without a package beside it."""

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from emerging_optimizers.cli import UsageError
from emerging_optimizers.registry import OPTIMIZERS

_SCRIPT = """\
_eopt() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" known="{optimizers}"
  local before="${{word%"${{word##*,}}"}}"
  if [ "$COMP_CWORD" -eq 1 ]; then
    known="{commands}"
  elif [[ "$word" == -* ]]; then
    case "${{COMP_WORDS[1]}}" in
{options}
    esac
  fi
  COMPREPLY=($(compgen -P "$before" -W "$known" -- "${{word##*,}}"))
}}
complete -o default -F _eopt eopt"""
_BEFORE = {"bash": "", "zsh": "autoload -U +X bashcompinit && bashcompinit\n"}


def completion(shell: str, commands: Mapping[str, Iterable[str]]) -> str:
    """The script; it completes commands, their options, names of optimizers (behind a comma too) and files.

    Args:
        shell: bash or zsh.
        commands: the options of each command.

    Raises:
        UsageError: another shell.

    Example:
        >>> completion("bash", {"list": ["--json"]}).splitlines()[-1]
        'complete -o default -F _eopt eopt'
    """
    if shell not in _BEFORE:
        raise UsageError(f"there is no completion for {shell!r}; give {' or '.join(_BEFORE)}")
    cases = (f'      {name}) known="{" ".join(options)}" ;;' for name, options in commands.items())
    script = _SCRIPT.format(optimizers=" ".join(OPTIMIZERS), commands=" ".join(commands), options="\n".join(cases))
    return _BEFORE[shell] + script


def options_of(kind: Any) -> list[str]:
    """The options of a command, which is a dataclass; those of a dataclass in it are its own.

    Example:
        >>> from emerging_optimizers.cli.questions import List
        >>> options_of(List)
        ['--json', '--help']
    """
    return [*_own(kind), "--help"]


def _own(kind: Any) -> list[str]:
    found: list[str] = []
    for field in fields(kind):
        make: Any = field.default_factory
        if is_dataclass(inner := make() if callable(make) else None):
            found += _own(inner)
        elif field.name not in getattr(kind, "positional", ()):
            found.append(f"--{field.name.replace('_', '-')}")
    return found
