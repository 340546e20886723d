"""Writes that belong together: either none of them has begun, or all of them happen, whatever is raised in between."""

from collections.abc import Callable, Sequence
from operator import call

# One call of torch's that writes in place, as a `partial`; or a function that may be called again after it has raised.
Write = Callable[[], object]


def commit(writes: Sequence[Write]) -> None:
    """Make all the writes, in order. An exception that arrives in between (Ctrl-C, say) is raised when all are made."""
    made: list[object] = []
    try:
        # Nothing of this line is Python: no signal is handled between a call and the note that it has been made.
        made.extend(map(call, writes))
    except BaseException:
        for write in writes[len(made) :]:
            write()
        raise
