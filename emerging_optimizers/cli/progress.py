"""How far a command is, on the standard error: a line that renews itself on a terminal, a few plain lines elsewhere."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from typing import IO, Any, Self

from emerging_optimizers.cli import UsageError

Say = Callable[[str], object]


def quiet(_: str) -> None:
    """Says nothing."""


# Who waits shorter than that is told nothing.
PATIENCE_S = 3.0
# Elsewhere than on a terminal, where lines stay: the first ones soon, then one a minute.
LINES_S = (PATIENCE_S, 10.0, 30.0)
EVERY_S = 60.0


class Progress:
    """A block that may take long; a thread of its own tells, so that nothing has to report for it.

    Args:
        what: The command.
        stream: Where to; by default the standard error.

    Example:
        >>> with Progress("eopt tf32") as progress:
        ...     progress("run 3 of 16")  # nothing is shown before three seconds have passed
    """

    def __init__(self, what: str, stream: IO[str] | None = None) -> None:
        self._what, self._stream = what, stream or sys.stderr
        self._text, self._shown = "", False
        self._begun = time.monotonic()
        self._ended = threading.Event()
        self._terminal = self._stream.isatty()
        self._thread = threading.Thread(target=self._tell, daemon=True)

    def __call__(self, text: str) -> None:
        """Says how far it is, as in "run 3 of 16"."""
        self._text = text

    def __enter__(self) -> Self:
        self._begun = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._terminal and self._shown:
            self._write("\r\x1b[K")

    def _tell(self) -> None:
        lines = iter(LINES_S)
        due = next(lines)
        while not self._ended.wait(max(0.0, due - self._seconds)):
            seconds = self._seconds
            line = ", ".join(x for x in (self._text, f"{seconds:.0f} s") if x)
            self._write(f"\r\x1b[K{self._what}: {line}" if self._terminal else f"{self._what}: {line}\n")
            self._shown = True
            due = seconds + 1 if self._terminal else next(lines, seconds + EVERY_S)

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._begun

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads: no reason to end the work
            self._stream.write(text)
            self._stream.flush()


def asked(command: str, answer: Callable[[], Any]) -> Any:
    """What a question has for an answer; a request that cannot be met is a `UsageError`."""
    try:
        with Progress(f"eopt {command}"):
            return answer()
    except UsageError:
        raise
    except (ValueError, TypeError, RuntimeError, OverflowError, OSError) as error:
        raise UsageError(" ".join(str(error).split()) or type(error).__name__) from error
