"""What is counted and guarded by itself: a matrix, or a parameter of an element-wise rule."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from emerging_optimizers.distributed.shares import CutMatrix, Here, Owned, Share
from emerging_optimizers.engine.chunks import Chunk, Segment
from emerging_optimizers.engine.commit import Write, commit
from emerging_optimizers.engine.kept import kept_of
from emerging_optimizers.engine.matrix_view import Block
from emerging_optimizers.engine.rows import CutRows
from emerging_optimizers.engine.transit import Transit

# After how many skipped steps in a row a user is told.
LONG_STREAK = 100
_GRAD = attrgetter("grad")


def state_dtype(p: Tensor) -> torch.dtype:
    """float64 for float64 parameters, else float32."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


class Units:
    """The blocks of parameters of one item shape, a row each, and what is counted of their units.

    A unit is a matrix, or a parameter of an element-wise rule. A parameter that is cut into several blocks of the same
    shape has a row for each.
    """

    def __init__(self, rows: Sequence[tuple[Share, Block]], counts_steps: bool) -> None:
        self.shares = [share for share, _ in rows]
        # The user's parameters, and what is worked on of them here: in one process the same.
        self.sources = [share.source for share in self.shares]
        # Who has the gradients: parameters of one process themselves, since asking hundreds of shares is slow.
        self._holders = self.sources if all(type(share) is Here for share in self.shares) else self.shares
        self.parameters = parameters = [share.work for share in self.shares]
        self.blocks = [block for _, block in rows]
        self.item = item = self.blocks[0].item
        # What of them is worked on in float32 and stored in less; an owner's wholes are put together elsewhere.
        self.kept = kept_of(share for share in self.shares if not isinstance(share, Owned))
        first = self.shares[0]
        self.elsewhere = first.elsewhere
        self.total = first.total
        # Whether a direction is handed out instead of weights being moved.
        self.hands_out = isinstance(first, Owned) and not first.weights
        self.dtype = state_dtype(parameters[0])
        self.device = parameters[0].device
        self.param_dtype = parameters[0].dtype
        self.rounded_to = self.param_dtype if first.kept is None else first.kept.rounded_to
        self.shapes = [p.shape for p in parameters]
        size = max(1, torch.Size(item).numel())
        self.offsets = [0]
        for p, block in zip(parameters, self.blocks, strict=True):
            self.offsets.append(self.offsets[-1] + block.of(p).numel() // size)
        self.counts = [0] * len(parameters)
        self.counted_now = False  # whether `count` is through with the step that is taken
        # Of batches: how many updates fewer each matrix has taken than the one that has taken most.
        self.lags: dict[int, list[int]] = {}
        # When each row's turn comes, for a rule with a period.
        self.turns = [0] * len(parameters)
        self.capturable = False
        self._stores: list[Write] = []  # what stores the weights that are in float32 now
        self.units = self.offsets[-1] if item else len(parameters)
        self.step = torch.zeros(self.units if counts_steps else 0, dtype=torch.float32, device=self.device)
        self.step_version = self.step._version  # another one: somebody has written the counts
        self.guard: dict[str, Tensor] = {}
        self.norms = torch.empty(0, dtype=self.dtype, device=self.device)  # see `guard.sum_norms`
        # How often each unit was scaled down and skipped, and how often it was skipped in a row.
        self.scaled, self.skipped, self.streak = torch.zeros(3, self.units, dtype=torch.int64, device=self.device)
        self.unmoved: Transit | None = None  # see `engine/rounding.py`
        # What was asked for last, which is mostly what is asked for next, with tensors on the device.
        self._units_of: tuple[Any, Tensor | None] = (None, None)
        self._skips_in_a_row = False  # for all that the host knows
        self._told: set[int] = set()
        self.told_of_failures: set[int] = set()
        self._mail: Transit | None = None
        self._streak_mail: Transit | None = None
        self._steps = 0

    def items(self, i: int) -> int:
        """How many items row i owns."""
        return self.offsets[i + 1] - self.offsets[i]

    @property
    def on_host(self) -> bool:
        """Whether the numbers are in the host's memory."""
        return self.device.type == "cpu"

    @property
    def looks(self) -> bool:
        """Whether the host may look at a value: it waits for nothing, and no graph is to repeat the step without it."""
        return self.on_host and not self.capturable

    def rows_of(self, chunk: Chunk, name: Callable[[Tensor], str]) -> CutRows | None:
        """The rows of a chunk's matrices, where only parts of them are here."""
        shares = [share for i in chunk.rows if isinstance(share := self.shares[i], CutMatrix)]
        return CutRows(shares, name) if shares else None

    def gradients(self) -> dict[int, Tensor]:
        """Those that there are, by their rows."""
        return {i: grad for i, grad in enumerate(map(_GRAD, self._holders)) if grad is not None}

    def open(self, members: Sequence[int]) -> None:
        """Make the float32 weights of what is kept in less; `count` rounds and stores them, with those of `members`."""
        for kept in self.kept:
            kept.open()
        self._follow_kept()
        self._stores = self._stores_of(members)

    def _follow_kept(self) -> None:
        if self.kept:
            self.parameters[:] = [share.work for share in self.shares]

    def _stores_of(self, members: Sequence[int]) -> list[Write]:
        shares = [self.shares[i] for i in members]
        return [write for kept in self.kept for write in kept.writes(shares)]

    def release(self) -> None:
        """Give their memory back, which a CUDA graph needs."""
        self._stores = []
        for kept in self.kept:
            if not self.capturable:
                kept.release()
        self._follow_kept()

    def unit_view(self, i: int, stack: Tensor) -> Tensor:
        """What a stack over units holds for row i: (b,) for a batch of b matrices, else 0-D."""
        if self.blocks[i].batched:
            return stack[self.offsets[i] : self.offsets[i + 1]]
        return stack[self.offsets[i] if self.item else i]

    def units_of(self, members: Sequence[int]) -> Tensor:
        """The indices of the units of some parameters."""
        asked, units = tuple(members), self._units_of[1]
        if units is None or self._units_of[0] != asked:
            ranges = [range(self.offsets[i], self.offsets[i + 1]) if self.item else range(i, i + 1) for i in members]
            units = torch.tensor([unit for indices in ranges for unit in indices], device=self.device)
            self._units_of = (asked, units)
        return units

    @property
    def guard_stacks(self) -> dict[str, Tensor]:
        """What the guard keeps of each unit, by name."""
        return {**self.guard, "scaled": self.scaled, "skipped": self.skipped, "streak": self.streak}

    def count(
        self,
        members: Sequence[int],
        factor: Tensor | None,
        news: Mapping[str, Tensor],
        done: Sequence[Sequence[Segment]] | None = None,
    ) -> None:
        """One more update of the parameters `members`, but not of the units whose factor is 0.

        Args:
            members: those with a gradient.
            factor: of each unit; None: 1.
            news: what the guard makes of its stacks.
            done: the chunks that have moved, where an exception has stopped the others; None: all have.
        """
        if done is not None:
            moved = self._moved(done)
            members = [i for i in members if bool(self.unit_view(i, moved).any())]
            stacks = self.guard_stacks
            news = {name: torch.where(moved, new, stacks[name]) for name, new in news.items()}
            factor = moved.to(self.dtype) if factor is None else factor * moved
        stores = self._stores if done is None or not self._stores else self._stores_of(members)
        writes: list[Write] = [*stores, *(partial(self.guard_stacks[name].copy_, new) for name, new in news.items())]
        lags = self.lags
        if factor is not None:
            live = factor > 0
            if self.looks:
                members = [i for i in members if self.unit_view(i, live).any()]
                lags = self._lags_after(members, live)
            if self.step.numel():
                writes.append(partial(self.step.add_, live))
        elif self.step.numel() and members:
            if len(members) == len(self.parameters):
                writes.append(partial(self.step.add_, 1))
            else:
                writes.append(partial(self.step.index_add_, 0, self.units_of(members), self._ones(members)))
        if self._skips_in_a_row and "streak" not in news:
            writes.append(partial(self.streak.index_fill_, 0, self.units_of(members), 0))
        counts = self.counts.copy()
        for i in members:
            counts[i] += 1
        commit([*writes, partial(self._take, counts, lags, "streak" in news or self._skips_in_a_row)])

    def _take(self, counts: list[int], lags: dict[int, list[int]], skips: bool) -> None:
        self.counts, self.lags, self.step_version = counts, lags, self.step._version
        self.counted_now = True
        self._skips_in_a_row = skips and (not self.looks or bool(self.streak.any()))

    def _lags_after(self, members: Sequence[int], live: Tensor) -> dict[int, list[int]]:
        lags = {**self.lags}
        for i in members:
            if self.blocks[i].batched and not bool((moved := self.unit_view(i, live)).all()):
                known = lags.get(i, [0] * len(moved))
                lags[i] = [lag + (not x) for lag, x in zip(known, moved.tolist(), strict=True)]
        return lags

    def set_count(self, i: int, name: str) -> None:
        """Take over the counts of row i that stand in `step`.

        Raises:
            ValueError: one is none; the message calls the parameter `name`.
        """
        steps = self.unit_view(i, self.step)
        self.counts[i] = most = count_of(steps, name)
        self.lags.pop(i, None)
        if steps.ndim and (lags := [most - int(step) for step in steps.tolist()]) and any(lags):
            self.lags[i] = lags

    def counted(self, segment: Segment) -> Iterator[tuple[Segment, int]]:
        """A segment in pieces whose items are at the same update, the one that comes, and its number from 1."""
        i, start, stop = segment
        lags = self.lags.get(i)
        if lags is None:
            yield segment, self.counts[i] + 1
            return
        for k in range(start, stop):
            if k + 1 == stop or lags[k + 1] != lags[k]:
                yield Segment(i, start, k + 1), self.counts[i] - lags[k] + 1
                start = k + 1

    def _ones(self, members: Sequence[int]) -> Tensor:
        return torch.ones(len(self.units_of(members)), dtype=self.step.dtype, device=self.device)

    def _moved(self, done: Iterable[Iterable[Segment]]) -> Tensor:
        """Which units are in these chunks, a parameter that was cut only with its last piece."""
        moved = torch.zeros(self.units, dtype=torch.bool, device=self.device)
        for chunk in done:
            for i, start, stop in chunk:
                if self.item:
                    moved[self.offsets[i] + start : self.offsets[i] + stop] = True
                elif stop == self.items(i):
                    moved[i] = True
        return moved

    def follow_counts(self) -> None:
        """Take over step counts that somebody has written.

        Raises:
            ValueError: a count that is none.
        """
        if self.step._version == self.step_version:
            return
        for i, p in enumerate(self.sources):
            self.set_count(i, f"a parameter of shape {tuple(p.shape)}")
        self.step_version = self.step._version

    def unmoved_share(self) -> float:
        """Which share of its weights a step has left where they were, where that was asked and is known by now."""
        if self.unmoved is None or not self.unmoved.ready:
            return 0.0
        share, self.unmoved = float(self.unmoved.read()), None
        return share

    def skipped_for_long(self) -> list[int]:
        """Rows with a unit that was skipped a hundred times in a row; each is told once."""
        if self.looks:
            streak = self.streak if self._skips_in_a_row else None
        else:  # an accelerator is asked every fiftieth time, and answers fifty steps later: nobody waits
            self._steps += 1
            if self._steps % 50:
                return []
            streak = None if self._streak_mail is None else self._streak_mail.read()
            self._streak_mail = Transit.send(self.streak.clone())
        if streak is None or int(streak.max()) < LONG_STREAK:
            return []
        rows = [i for i in range(len(self.parameters)) if int(self.unit_view(i, streak).max()) >= LONG_STREAK]
        rows = [i for i in rows if i not in self._told]
        self._told.update(rows)
        return rows

    def post(self, flags: Tensor) -> None:
        """Send (units,) flags to the host without waiting for the device."""
        self._mail = Transit.send(flags)

    def flagged(self) -> list[int]:
        """The parameters with a flag in what was posted last, in an earlier step, until they are forgotten."""
        if self._mail is None:
            return []
        flags = self._mail.read()
        return [i for i in range(len(self.parameters)) if self.unit_view(i, flags).any()] if flags.any() else []

    def forget_flags(self) -> None:
        """What was posted has been acted on."""
        self._mail = None


def count_of(step: Tensor, name: str) -> int:
    """The largest of some step counts."""
    counts = step.detach().double().flatten()
    if not bool(((counts >= 0) & (counts == counts.round()) & counts.isfinite()).all()):
        raise ValueError(f"the optimizer state 'step' of {name} is {step.tolist()}; a whole number >= 0 is needed")
    return int(counts.max())
