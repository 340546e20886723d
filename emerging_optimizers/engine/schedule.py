"""When the slow part of a state is worked on: integers only."""

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache


class Phase(Enum):
    """What a step does to a slowly changing part of the state, such as an eigenbasis; static."""

    FIRST = "first"
    REFRESH = "refresh"
    REUSE = "reuse"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The phases of a matrix's steps. The ordinary one: every step is REUSE.

    Attributes:
        first: the step, from 1, that makes the first basis; None: none does, and none is refreshed.
        period: steps from one refresh to the next. Matrices take turns within it, so that no step bears all the work.
        ramp: so many steps behind the first one refresh in each; then ever more rarely, down to the period.
        behind: the work of a phase is done after the step instead of in it.
    """

    first: int | None = None
    period: int = 1
    ramp: int = 0
    behind: bool = False

    def phase(self, step: int, turn: int = 0) -> Phase:
        """The phase of the update that is the `step`-th of a matrix, from 1, whose turn in the period is `turn`.

        A refresh before the first one has no effect, but brings the graph of the later ones with it.
        """
        if self.first is None:
            return Phase.REUSE
        since = step - self.first
        if since == 0:
            return Phase.FIRST
        before, now = (turn + turns_taken(k, self.period, self.ramp) for k in (since - 1, since))
        return Phase.REFRESH if now // self.period > before // self.period else Phase.REUSE


EVERY_STEP_ALIKE = Schedule()


@lru_cache  # those of a step are asked for once a matrix
def turns_taken(since: int, period: int, ramp: int) -> int:
    """How many turns have been taken `since` steps after the first basis, where each matrix has one in `period`.

    One a step, and at the start `period * ramp / since`, rounded to the nearest integer and at most all of them: the
    matrix whose last refresh is oldest waits for since / ramp steps. The v-th turn of a step, v > 1, is thus taken as
    long as since <= 2 period ramp / (2 v - 1), and the sum has no rounding of its own.
    """
    return since + sum(max(0, min(since, 2 * period * ramp // (2 * v - 1))) for v in range(2, period + 1))
