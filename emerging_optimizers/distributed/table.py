"""What several processes do with an optimizer's parameters, written down: owners, bytes, collectives, and why."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod

import torch

from emerging_optimizers.columns import in_columns
from emerging_optimizers.distributed.dtensor import Spread
from emerging_optimizers.distributed.layout import WITH_OWNERS, Needs, bytes_each, job_of, work_of
from emerging_optimizers.distributed.owners import Span, least_load
from emerging_optimizers.distributed.shares import within

# A table of more rows than this groups what repeats over layers.
WHOLE = 60

NOTHING, NORMS, ALL_TO_ALL = "none", "all-reduce of norms", "an all-to-all each way"
ROWS = f"{NORMS}, {ALL_TO_ALL}"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is done with one parameter.

    Attributes:
        name: of the parameter.
        shape: of all of it.
        work: where: "one owner", "several owners", or "where it lies".
        loads: (rank, operations of a step there) of each owner; empty: it is worked on where it lies.
        ranks: the processes that share it; empty: it is not shared.
        fetched: bytes that travel to owners in a step, all processes together; where rows are picked, as many as if
            they were spread evenly over the processes.
        delivered: bytes that travel back.
        collective: in which it takes part; one moves everything of its kind, however many parameters there are, or
            everything of a shape where rows are picked.
        reason: why.
    """

    name: str
    shape: tuple[int, ...]
    work: str
    loads: tuple[tuple[int, int], ...] = ()
    ranks: tuple[int, ...] = ()
    fetched: int = 0
    delivered: int = 0
    collective: str = NOTHING
    reason: str

    @property
    def owners(self) -> tuple[int, ...]:
        """The ranks of its owners."""
        return tuple(rank for rank, _ in self.loads)


@dataclass(frozen=True, kw_only=True)
class WorkPlan:
    """What is done with each parameter of an optimizer, the same on every process. Prints as a table.

    Attributes:
        entries: one for each parameter.
    """

    entries: tuple[Entry, ...]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, name: str) -> Entry:
        """What is done with a parameter."""
        return next(entry for entry in self.entries if entry.name == name)

    @property
    def is_shared(self) -> bool:
        """Whether processes share a parameter."""
        return any(entry.ranks for entry in self.entries)

    def balance(self, ranks: tuple[int, ...]) -> float:
        """The most operations that one of some processes has as an owner, over the mean or over the largest matrix.

        That is 1 at best, and where they own nothing.
        """
        loads, pieces = self._loads(ranks)
        least = max(sum(pieces) / len(ranks), max(pieces, default=0))
        return max(loads) / least if least else 1.0

    def _loads(self, ranks: tuple[int, ...]) -> tuple[list[int], list[int]]:
        """The operations of each process, and of each piece."""
        loads, pieces = dict.fromkeys(ranks, 0), []
        for entry in self.entries:
            for rank, cost in entry.loads if entry.ranks == ranks else ():
                loads[rank] += cost
                pieces.append(cost)
        return [*loads.values()], pieces

    def __str__(self) -> str:
        if not self.is_shared:
            return "Every parameter is whole on each process, and nothing is exchanged."
        rows: dict[tuple[str, ...], list[Entry]] = {}
        for entry in self.entries:
            shape = "x".join(map(str, entry.shape)) or "scalar"
            cells = (layer_name(entry.name, len(self)), shape, entry.collective, entry.reason)
            rows.setdefault(cells, []).append(entry)
        lines = [("parameter", "shape", "worked on by", "fetch", "delivery", "collective", "why")]
        for (name, shape, collective, reason), alike in rows.items():
            owners = sorted({rank for entry in alike for rank in entry.owners})
            who = f"{'rank' if len(owners) == 1 else 'ranks'} {in_runs(owners)}" if owners else "each, where it lies"
            fetched, delivered = sum(x.fetched for x in alike), sum(x.delivered for x in alike)
            count = f"  {len(alike)} x" if len(alike) > 1 else ""
            lines.append((name + count, shape, who, _bytes(fetched), _bytes(delivered), collective, reason))
        shared = dict.fromkeys(entry.ranks for entry in self.entries if entry.loads)
        return "\n".join([*in_columns(lines), *map(self._in_words, shared), "No parameter is gathered to every rank."])

    def _in_words(self, ranks: tuple[int, ...]) -> str:
        """How even the owners' work is, and what is in the way."""
        loads, pieces = self._loads(ranks)
        mean, most, largest = sum(pieces) / len(ranks), max(loads), max(pieces)
        text = (
            f"Owners among ranks {in_runs(ranks)}: whoever has the least to do, by counted operations. The one "
            f"with the most has {most:.3g}, the mean is {mean:.3g}; balance {self.balance(ranks):.2f}"
        )
        if largest > mean:
            owned = (entry for entry in self.entries if entry.ranks == ranks and entry.loads)
            entry = max(owned, key=lambda entry: max(cost for _, cost in entry.loads))
            text += (
                f". One matrix is the bound: {entry.name} {entry.shape} has {largest / mean:.2f} times the mean alone"
            )
        least = least_load(pieces, len(ranks))
        if least > 1.005 * max(mean, largest):
            text += f". Whole matrices cannot be shared out below {least / max(mean, largest):.2f}"
        return text + "."


def entry_of(name: str, spread: Spread, needs: Needs, spans: Sequence[Span], dtype: torch.dtype) -> Entry:
    """What is done with a parameter that processes share.

    Args:
        name: of it.
        spread: how it lies.
        needs: of its update.
        spans: its owners; none where it needs none.
        dtype: of the parameter and its gradient.
    """
    ranks = tuple(sorted(spread.ranks))
    work = work_of(spread, needs)
    if work not in WITH_OWNERS:
        norms = work == "elements" and spread.is_cut
        return Entry(
            name=name,
            shape=spread.shape,
            work="where it lies",
            ranks=ranks,
            collective=NORMS if norms else NOTHING,
            reason=_REASONS[work],
        )
    job = job_of(spread.shape, len(ranks), needs)
    spans = [span for span in spans if span.start < span.stop]
    boxes = (within(box, span) for span in spans for box in spread.boxes(span.rank))
    held = sum(box.numel for box in boxes if box is not None)
    numel = prod(spread.shape)
    there, back = bytes_each(work, needs, spread.shape, dtype)
    several = len(spans) > 1
    if work == "rows":
        reason = "it is cut, and its update needs some of its rows"
    else:
        reason = "matrices are cut: each goes to one owner" if several else "it is cut, and its update needs the whole"
    return Entry(
        name=name,
        shape=spread.shape,
        work="several owners" if several else "one owner",
        loads=tuple((span.rank, job.piece(span.stop - span.start)) for span in spans),
        ranks=ranks,
        # Each element is fetched from one of its copies, and delivered to all.
        fetched=round((numel - held) * there),
        delivered=round((numel * spread.copies - held) * back),
        collective=ROWS if work == "rows" else ALL_TO_ALL,
        reason=reason,
    )


_REASONS = {
    "elements": "elementwise: each process has its part",
    "copies": "it is not cut: each process has a copy",
    "matrices": "no matrix is cut: each process has some",
}


def unshared(name: str, shape: Sequence[int]) -> Entry:
    """What is done with a parameter that a process has for itself."""
    return Entry(name=name, shape=tuple(shape), work="where it lies", reason="it is not sharded")


# --- words ------------------------------------------------------------------------------------------------------------


def layer_name(name: str, rows: int) -> str:
    """A parameter's name; in a long table without the number of its layer."""
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name) if rows > WHOLE else name


def in_runs(ranks: Iterable[int]) -> str:
    """Rising numbers, in a few words.

    Example:
        >>> in_runs([0, 1, 2, 3, 5]), in_runs(range(0, 64, 8))
        ('0-3, 5', '0, 8, 16, ... (8)')
    """
    numbers = [*ranks]
    runs = [[x for _, x in some] for _, some in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    words = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(words) if len(words) <= 4 else f"{', '.join(words[:3])}, ... ({len(numbers)})"


def _bytes(number: int) -> str:
    if not number:
        return "-"
    size = float(number)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
