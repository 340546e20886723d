"""What of the command line `eopt` needs no `lab` extra: arguments, commands that answer a question, errors."""

from typing import ClassVar


class UsageError(ValueError):
    """A request that cannot be carried out as it stands; the text says what to change.

    Attributes:
        status: with which the command line ends.
    """

    status: ClassVar[int] = 2


class FailedError(UsageError):
    """What was asked for is all right, and something has failed; the text says what, and what to do."""

    status = 1


class StoppedError(UsageError):
    """An interrupt from the keyboard; the text says how to go on."""

    status = 130
