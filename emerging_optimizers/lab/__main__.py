"""``eopt``: the command line; also ``python -m emerging_optimizers.lab``.

Commands that answer a question stand in `cli.questions` and need nothing but the package. Those of the lab stand in
`commands` and need what the extra `lab` installs.
"""

import contextlib
import difflib
import os
import signal
import sys
from collections.abc import Sequence
from threading import Event
from types import FrameType

from emerging_optimizers._version import __version__
from emerging_optimizers.cli import FailedError, StoppedError, UsageError
from emerging_optimizers.cli.arguments import parse
from emerging_optimizers.cli.completion import completion, options_of
from emerging_optimizers.cli.questions import QUESTIONS, show

# What help says of the lab's commands, whose own texts cannot be read without the extra; a test compares them.
LAB = {
    "train": "Train a small GPT on real text with several optimizers and compare them.",
    "grid": "Run each optimizer over its learning rates.",
    "spike": "Send one gradient that is far too large through each optimizer: recovery and aftershock.",
    "eigenbasis": "Follow SOAP's eigenbases around a gradient spike, in float32 and in emulated reduced precision.",
    "precision": "Measure eigenvalues and KL updates in float32 and in emulated reduced precision over the spectrum's "
    "range.",
    "tf32": "Train with SOAP and REKLS in float32 and in emulated TF32, with and without a spike, and compare the "
    "losses.",
    "gallery": "Train a small task with a tuned AdamW and with matrix optimizers, three seeds each.",
    "report": "Put the results of every finished run into one HTML file, with tables and interactive figures.",
}


# What torch says where memory has run out, or where nobody could have so much.
_TOO_LARGE = (
    "allocate memory",
    "out of memory",
    "storage size calculation overflowed",
    "integer multiplication overflow",
)


class Ended(SystemExit):
    """The end of the command line with a message, which has been shown."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(status)
        self.message = message

    def __str__(self) -> str:
        return self.message


# Whether an interrupt has arrived in the process `eopt`.
_interrupted = Event()


def command() -> None:
    """The process `eopt`.

    What fails behind an interrupt is the interrupt: what an import of torch makes of one is any error at all. And when
    all has been said the end of the process takes moments, in which an interrupt changes nothing.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else whoever started it has it ignored
        signal.signal(signal.SIGINT, _interrupt)
    try:
        main()
    except Exception as error:  # of whatever kind an interrupt becomes on its way
        if not _interrupted.is_set():
            raise
        raise _ended(str(error), 1) from None
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _interrupted.set()
    signal.default_int_handler(number, frame)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command.

    Args:
        argv: The arguments; by default those of the process.

    Raises:
        SystemExit: With status 2 for a request that cannot be carried out as it stands, 1 where something has failed,
            130 after an interrupt; a message has been written to the standard error.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal without some character shows a question mark in its place
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has seen enough, as in `eopt list | head`
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UsageError as error:
        raise _ended(str(error), error.status) from None
    except KeyboardInterrupt:
        raise _ended("interrupted", StoppedError.status) from None
    except OSError as error:
        raise _ended(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""), 1) from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or any(words in str(error).lower() for words in _TOO_LARGE):
            raise _ended(f"what was asked for is too large for the memory ({_first_sentence(error)})", 1) from None
        raise


def run(args: list[str]) -> None:
    """Runs the command that the words name."""
    if not args or args[0] in ("-h", "--help", "help"):
        print(help_text())
        if not args:
            raise UsageError("no command is given")
        return
    if "--version" in args:
        if "--json" in args:
            from emerging_optimizers.cli.versions import versions

            show(versions(), as_json=True)
        else:
            print(f"eopt {__version__}")
        return
    name, words = args[0].lower(), args[1:]
    if name == "completion" and words and words[0] in ("-h", "--help"):
        print("usage: eopt completion [bash|zsh]; source <(eopt completion bash) completes words in this shell")
    elif name == "completion":
        print(completion(" ".join(words) or "bash", _options()))
    elif name in QUESTIONS:
        parse(QUESTIONS[name], name, words).run()
    elif name in LAB:
        _lab_command(name, words)
    else:
        close = difflib.get_close_matches(
            name, [*LAB, *QUESTIONS, "completion", "--version", "--help"], n=1, cutoff=0.7
        )
        hint = f"; did you mean {close[0]!r}?" if close else ";"
        if name.startswith("-") and not close:
            hint = "; options stand behind the command, as in `eopt list --json`."
        raise UsageError(f"there is no command {args[0]!r}{hint} `eopt --help` lists them")


def _lab_command(name: str, words: list[str]) -> None:
    try:
        from emerging_optimizers.lab.commands import COMMANDS
        from emerging_optimizers.lab.parsing import parsed
    except ImportError as missing:
        if (missing.name or "").startswith("emerging_optimizers"):
            raise
        raise FailedError(
            f"`eopt {name}` needs {missing.name}; pip install 'emerging-optimizers[lab]' installs what the lab needs"
        ) from None
    parsed(COMMANDS[name], words).run(words)


def _options() -> dict[str, list[str]]:
    """The options of each command, of those of the lab where it is installed."""
    lab: dict[str, list[str]] = {name: [] for name in LAB}
    with contextlib.suppress(ImportError):
        from emerging_optimizers.lab.commands import COMMANDS

        lab = {name: options_of(kind) for name, kind in COMMANDS.items()}
    return {name: options_of(kind) for name, kind in QUESTIONS.items()} | lab | {"completion": []}


def help_text() -> str:
    """What there is."""
    questions = {name: (kind.__doc__ or "").splitlines()[0] for name, kind in QUESTIONS.items()}
    width = max(map(len, (*LAB, *questions)))
    lines = ["usage: eopt COMMAND ...; eopt COMMAND --help says what it takes", "", "questions:"]
    lines += [f"  {name:{width}}  {text}" for name, text in questions.items()]
    lines += [f"  {'completion':{width}}  Print what bash (or zsh) completes words by, for `source`."]
    lines += ["", "experiments (pip install 'emerging-optimizers[lab]'):"]
    lines += [f"  {name:{width}}  {text}" for name, text in LAB.items()]
    return "\n".join([*lines, "", "eopt --version says which version this is; with --json also of what is around it."])


def _first_sentence(error: BaseException) -> str:
    """Of torch's words, which go on with where in torch that was."""
    text = str(error).partition("\n")[0].rpartition("DefaultCPUAllocator: ")[2].partition(". ")[0]
    return text or type(error).__name__


def _ended(message: str, status: int) -> Ended:
    if _interrupted.is_set() and status != StoppedError.status:
        message, status = "interrupted", StoppedError.status
    text = f"eopt: {message}"
    print(text, file=sys.stderr)
    return Ended(text, status)


if __name__ == "__main__":
    command()
