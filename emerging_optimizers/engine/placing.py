"""Where the state of each parameter stands: in which bucket, in which row; and following what users do to it."""

from collections.abc import Callable, Container, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import fields
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emerging_optimizers.distributed.dtensor import is_dtensor, whole_of
from emerging_optimizers.distributed.layout import Asked, Layout
from emerging_optimizers.distributed.shares import Total
from emerging_optimizers.distributed.table import WorkPlan, entry_of, unshared
from emerging_optimizers.engine.buckets import Bucket
from emerging_optimizers.engine.exchange import Exchange
from emerging_optimizers.engine.filling import adopt, fill_buckets, homes_in, keys_of, needs
from emerging_optimizers.engine.kept import KEYS
from emerging_optimizers.engine.packing import CODES, SCALES, holds_codes, named, others_than, widened
from emerging_optimizers.engine.parts import lost
from emerging_optimizers.engine.rule import Rule, translated
from emerging_optimizers.engine.validate import label, label_of, place

# Options that shape the state of whatever rule.
_SHAPING = (
    "matrix_view",
    "state_dtype",
    "offload",
    "weight_rounding",
    "weight_update_hook",
    "weight_decay_method",
    "cautious",
)
_StatesT = MutableMapping[Any, Any]


class Wanted(NamedTuple):
    """A group that needs places.

    Attributes:
        group: of the optimizer.
        rule: of the group.
        owner: the class that messages name.
        check: raises for a parameter that the rule cannot update.
    """

    group: dict[str, Any]
    rule: Rule
    owner: str
    check: Callable[[], None]


class Places:
    """The stacks of an optimizer, and what they were made for.

    A group keeps its stacks while it has the same parameters, of the same kinds, and a rule with the same state;
    otherwise they are made anew out of `state`, so that they never depend on how the groups came about.

    Attributes:
        buckets: with the index of their group.
        homes: of each parameter, its buckets and the rows in them.
        events: how often parameters were scaled down and skipped in buckets that are gone.
        views_before: of a copy that has no stacks yet, the `matrix_view` that the state of each parameter was made for.
    """

    def __init__(self, name: str, layout: Layout) -> None:
        self._name, self.layout = name, layout
        self.events: dict[Tensor, Tensor] = {}
        self.views_before: dict[Tensor, Any] = {}
        self.forget()

    def forget(self) -> None:
        """Drop the stacks; the next step builds them again from `state`."""
        self.buckets: list[tuple[int, Bucket]] = []
        self.homes: dict[Tensor, list[tuple[Bucket, int]]] = {}
        self.exchange: Exchange | None = None
        self._placed: list[_Placed] = []  # of each group
        self._seen: tuple[list[int], list[str], list[int]] | None = None

    def place(self, wanted: Sequence[Wanted], states: _StatesT, eager: dict[str, Any] | None = None) -> None:
        """Give parameters their places, as groups and `state` are now, and take over what they say.

        All that can raise does so before anything is installed.

        Args:
            wanted: every group.
            states: the optimizer's.
            eager: a group whose frozen parameters get state too.
        """
        stale = self._stale(wanted, states, eager)
        if not stale and self._seen == _seen(states):  # as nearly always
            for _, bucket in self.buckets:
                bucket.follow_counts()
            return
        written = self._written(states, stale)
        asked = {}
        for i in sorted(stale):
            if i < len(wanted):
                wanted[i].check()
                asked[i] = self._asked(wanted[i], states, wanted[i].group is eager)
        self.layout.settle(asked.values())  # groups that come together share out their matrices together
        staged = {i: self._fill(wanted[i], some, states) for i, some in asked.items()}
        # Nothing has changed so far.
        for index, p in written:
            if index not in stale:
                for bucket, row in self.homes[p]:
                    adopt(bucket, row, states[p], label_of([w.group for w in wanted], p))
                states[p] = {**states[p], **self.views(p)}
        for _, bucket in self.buckets:
            bucket.follow_counts()
        if stale:
            self.replace(stale, staged, wanted, states)
        # What was taken over may go, and others come under its ids: then the next step looks again.
        self._seen = None if written else _seen(states)

    def _stale(self, wanted: Sequence[Wanted], states: _StatesT, eager: dict[str, Any] | None) -> set[int]:
        """The groups whose stacks no longer serve."""
        placed = self._placed
        members = [[*map(id, w.group["params"])] for w in wanted]
        stale = {i for i, ids in enumerate(members) if i >= len(placed) or placed[i].members != ids}
        if stale or len(placed) > len(members):
            self._check_twice(wanted)
        stale |= {index for index, bucket in self.buckets if index >= len(members) or not bucket.fits()}
        for index, w in enumerate(wanted):
            if index in stale:
                continue
            before = placed[index]
            changed = before.rule is not w.rule or before.options != _shaping(w.group)
            if changed and not self._keeps(index, w):
                stale.add(index)
            elif w.group is eager or before.waiting:
                lacking = (p for p in w.group["params"] if p not in self.homes)
                if any(_joins(p, states, w.group is eager) for p in lacking):
                    stale.add(index)
        return stale

    def _keeps(self, index: int, wanted: Wanted) -> bool:
        """Whether the stacks of a group also serve a rule that has changed; it is then theirs."""
        placed = self._placed[index]
        if placed.options != _shaping(wanted.group):
            return False
        if any(i == index and bucket.kind != bucket.kind_of(wanted.rule) for i, bucket in self.buckets):
            return False
        self._placed[index] = placed._replace(rule=wanted.rule)
        return True

    def _written(self, states: _StatesT, stale: set[int]) -> list[tuple[int, Tensor]]:
        """The parameters with entries that somebody has replaced, and their groups; those deleted make theirs stale."""
        written = []
        home_of = {id(p): index for index, bucket in self.buckets for p in bucket.sources}
        for p in self.homes:
            if home_of[id(p)] in stale:
                continue
            state, views = states.get(p), self.views(p)
            if not isinstance(state, dict) or not views.keys() & state.keys():  # deleted: it starts anew
                stale.add(home_of[id(p)])
            elif any(state.get(key) is not view for key, view in views.items()):
                written.append((home_of[id(p)], p))
        return written

    def _asked(self, wanted: Wanted, states: _StatesT, frozen_too: bool = False) -> Asked:
        """What a group asks of the layout."""
        joined = [p for p in wanted.group["params"] if _joins(p, states, frozen_too)]
        return self.layout.ask(joined, wanted.group, needs(wanted.rule, wanted.group))

    def plan(self, wanted: Sequence[Wanted], states: _StatesT) -> WorkPlan:
        """What the processes do with each parameter. Nothing is placed, and nothing is exchanged."""
        asked = [self._asked(w, states) for w in wanted]
        spans = self.layout.spans(asked)
        entries = []
        for index, some in enumerate(asked):
            names = {p: place(some.group, index, i) for i, p in enumerate(some.group["params"])}
            for p in some.parameters:
                spread = some.spreads.get(p)
                shared = spread and entry_of(names[p], spread, some.needs, spans.get(p, ()), p.dtype)
                entries.append(shared or unshared(names[p], p.shape))
        return WorkPlan(entries=tuple(entries))

    def _fill(self, wanted: Wanted, asked: Asked, states: _StatesT) -> list[Bucket]:
        """New stacks of a group, with the state that there is."""
        group, rule = wanted.group, wanted.rule
        view_of = self._view_of()
        saved = {}
        for p in asked.parameters:
            if isinstance(state := states.get(p), dict):
                # The blocks of 8 bits are those of the matrices that there were.
                other = p in view_of and view_of[p] != group["matrix_view"]
                if other and p not in self.homes and holds_codes(state):
                    raise ValueError(
                        f"{wanted.owner}: {label_of([group], p)} had matrix_view={view_of[p]!r} when the optimizer was "
                        f"copied, and has {group['matrix_view']!r} before the copy's first step; its 8 bits are those "
                        f"of the matrices that there were. Change it before the copy, or after a step of it"
                    )
                saved[p] = translated(rule, self._wide(p, state) if other and p in self.homes else state)
        try:
            buckets = fill_buckets(asked, rule, saved, self.layout)
            keys = keys_of(buckets)
            for p in {*asked.parameters} & self.homes.keys():
                left = self.views(p).keys() & others_than(saved.get(p, {}), keys[p]) - {*KEYS}
                if left:
                    raise ValueError(f"the optimizer state of {label_of([group], p)} also has {', '.join(left)}")
        except ValueError as wrong:
            ids = [*map(id, group["params"])]
            index = next((i for i, x in enumerate(self._placed) if x.members == ids), None)
            if index is None or not (names := self._placed[index].differences(rule, group)):
                raise
            options = ", ".join(f"{name}={group[name]!r}" for name in names)
            raise ValueError(
                f"{wanted.owner}: param_groups[{index}] now has {options}, and its parameters have "
                f"state of another kind: {wrong}. Set the option back, or clear the state to start anew"
            ) from None
        return buckets

    def _view_of(self) -> dict[Tensor, Any]:
        """The `matrix_view` that the state of each parameter was made for."""
        here = {p: self._placed[i].options[0] for i, bucket in self.buckets for p in bucket.sources}
        return {**self.views_before, **here}

    def past(self) -> tuple[dict[Tensor, Tensor], dict[Tensor, Any]]:
        """What a copy, which makes its own stacks, has to know of these: see `events` and `views_before`."""
        return {p: self.events_of(p) for p in (*self.homes, *self.events)}, self._view_of()

    def _wide(self, p: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state of a parameter that has a place, with what is in 8 bits in float32."""
        found = dict(state)
        for bucket, row in self.homes[p]:
            block, published = bucket.blocks[row], bucket.published[row]
            for key in bucket.packed(row):
                codes, scales = named(key, CODES), named(key, SCALES)
                if all(found.get(x) is published[x] for x in (codes, scales)):
                    found[key] = widened(block, whole_of(found.pop(codes)), whole_of(found.pop(scales)), p)
        return found

    def replace(
        self, stale: Container[int], staged: Mapping[int, list[Bucket]], wanted: Sequence[Wanted], states: _StatesT
    ) -> None:
        """Put new stacks in the place of those of some groups."""
        kept = [(i, bucket) for i, bucket in self.buckets if i not in stale]
        new = [(i, bucket) for i, buckets in staged.items() for bucket in buckets]
        buckets = sorted((*kept, *new), key=itemgetter(0))
        homes = homes_in(bucket for _, bucket in buckets)
        order = {p: None for w in wanted for p in w.group["params"] if p in homes}
        events = {**self.events}
        entries: dict[Tensor, dict[str, Any]] = {}
        for p in {**order, **self.homes}:
            if p in self.homes:
                if self.homes[p] == homes.get(p):
                    continue
                events[p] = self.events_of(p)
            entries[p] = self._entry(p, states.get(p), homes.get(p))
        placed = [
            _Placed(
                [*map(id, w.group["params"])], w.rule, _shaping(w.group), any(p not in homes for p in w.group["params"])
            )
            for w in wanted
        ]
        for _, bucket in new:  # which matrices have lost their state stands in it
            if not bucket.elsewhere and (flags := lost(bucket.state)) is not None:
                bucket.post(flags)
        states.update(entries)
        self.buckets, self.homes, self._placed, self.events = buckets, homes, placed, events
        self.views_before = {}
        self.exchange = Exchange.of(self._name, buckets, chain.from_iterable(w.group["params"] for w in wanted))

    def _entry(self, p: Tensor, state: Any, home: list[tuple[Bucket, int]] | None) -> dict[str, Any]:
        """What `state` has for a parameter whose place is `home` from now on; None: it has none."""
        state = state if isinstance(state, dict) else {}
        mine: Mapping[str, Tensor] = self.views(p) if p in self.homes else {}
        if home is None:  # its entry keeps no stack alive
            return {
                key: mine[key].clone() if mine.get(key) is x and not is_dtensor(x) else x for key, x in state.items()
            }
        views = {key: view for bucket, row in home for key, view in bucket.published[row].items()}
        left = others_than(state, views)
        return {**views, **{key: x for key, x in state.items() if key in left and key not in mine}}

    def start_guards(self, groups: Sequence[Mapping[str, Any]], states: _StatesT) -> None:
        """Running means where a group asks for them."""
        for index, bucket in self.buckets:
            if groups[index]["spike_guard"] is not None and not bucket.guard:
                bucket.start_guard()
                for p in bucket.sources:
                    states[p].update(self.views(p))
                self._seen = None

    def views(self, p: Tensor) -> Mapping[str, Tensor]:
        """The state of a parameter: of all its blocks."""
        home = self.homes[p]
        if len(home) == 1:
            bucket, row = home[0]
            return bucket.published[row]
        return {key: view for bucket, row in home for key, view in bucket.published[row].items()}

    def events_of(self, p: Tensor) -> Tensor:
        """(2,): how often a parameter was scaled down, and skipped, as far as this process knows by itself."""
        total = self.events.get(p, torch.zeros(2, dtype=torch.int64, device="cpu"))
        for bucket, row in self.homes.get(p, ()):
            if (said := bucket.shares[row].events) is not None:
                return total + said.cpu()
            if bucket.elsewhere:
                continue
            total = total + torch.stack([bucket.unit_view(row, n).sum() for n in (bucket.scaled, bucket.skipped)]).cpu()
        return total

    def all_events(self, parameters: Iterable[Tensor]) -> dict[Tensor, Tensor]:
        """`events_of` of some parameters, the same on all processes that share them.

        Where the matrices of a batch lie on several processes, these ask at the same time.
        """
        found = {p: self.events_of(p) for p in parameters}
        counted: dict[Total, list[Tensor]] = {}
        for p, home in self.homes.items():
            if (total := home[0][0].shares[home[0][1]].counted) is not None and p in found:
                counted.setdefault(total, []).append(p)
        for total, members in counted.items():
            sums = total.count(torch.stack([found[p] for p in members]).to(members[0].device)).cpu()
            found.update(zip(members, sums, strict=True))
        return found

    def _check_twice(self, wanted: Sequence[Wanted]) -> None:
        """Raise for a parameter in two groups."""
        where: dict[Tensor, int] = {}
        for index, w in enumerate(wanted):
            for i, p in enumerate(w.group["params"]):
                if where.setdefault(p, index) != index:
                    raise ValueError(
                        f"{self._name}: {label(w.group, i, p)} is in param_groups[{where[p]}] and in "
                        f"param_groups[{index}]; leave it in one of them"
                    )


class _Placed(NamedTuple):
    """What the stacks of a group were made for.

    Attributes:
        members: ids of all of its parameters.
        rule: of the group.
        options: see `_shaping`.
        waiting: whether some parameters, frozen ones, have no place yet.
    """

    members: list[int]
    rule: Rule
    options: tuple[Any, ...]
    waiting: bool

    def differences(self, rule: Rule, group: Mapping[str, Any]) -> list[str]:
        """Names of the options that differ now."""
        names = [name for name, old, new in zip(_SHAPING, self.options, _shaping(group), strict=True) if old != new]
        known = {field.name for field in fields(rule)} & {field.name for field in fields(self.rule)}
        return names + sorted(n for n in known if getattr(rule, n) != getattr(self.rule, n) and n in group)


def _shaping(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(map(group.__getitem__, _SHAPING))


def _joins(p: Tensor, states: Mapping[Any, Any], frozen_too: bool) -> bool:
    """Whether a parameter needs state."""
    return bool(p.numel()) and (p.requires_grad or p.grad is not None or bool(states.get(p)) or frozen_too)


def _seen(states: Mapping[Any, Any]) -> tuple[list[int], list[str], list[int]]:
    """Parameters, keys and tensors of `state`, as three lists; no parameter is hashed."""
    entries = [state for state in states.values() if isinstance(state, dict)]
    tensors = [*map(id, chain.from_iterable(map(dict.values, entries)))]
    return [*map(id, states)], [*chain.from_iterable(entries)], tensors
