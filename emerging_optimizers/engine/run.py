"""One step of a bucket, from gradients to weights: guard, chunks, rule, state, weights, and work for the next step."""

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from emerging_optimizers.engine.ahead import Ahead
from emerging_optimizers.engine.buckets import Bucket
from emerging_optimizers.engine.chunks import Chunk, Segment
from emerging_optimizers.engine.commit import Write, commit
from emerging_optimizers.engine.executors import Way, call, refresh, step_elements
from emerging_optimizers.engine.fused import accepts, are_below, forget_scratch, subtract_
from emerging_optimizers.engine.groups import Checked
from emerging_optimizers.engine.guard import Decision, decide, sit_out
from emerging_optimizers.engine.moving import Movement
from emerging_optimizers.engine.parts import lost, parts_of, where_live
from emerging_optimizers.engine.rounding import watch
from emerging_optimizers.engine.rule import Kernel, advance
from emerging_optimizers.engine.scalars import as_tensors, make_scalars
from emerging_optimizers.engine.schedule import Phase
from emerging_optimizers.engine.weight_decay import cautious
from emerging_optimizers.linalg.factorizations import Failures, noting


class BucketStep:
    """What holds for every chunk of a bucket in one step.

    Args:
        bucket: parameters with their stacks.
        checked: what their group asks for.
        group: the hyper-parameters.
        ahead: where work for the next step goes.
        name: of a parameter, for errors.
    """

    def __init__(
        self,
        bucket: Bucket,
        checked: Checked,
        group: Mapping[str, Any],
        ahead: Ahead,
        name: Callable[[Tensor], str] = str,
    ) -> None:
        self.name = name
        self.bucket, self.rule, self.way, self.group, self.ahead = bucket, checked.rule, checked.way, group, ahead
        bucket.capturable = group["capturable"]
        method, decay = group["weight_decay_method"], group["weight_decay"]
        self.move = Movement(checked.law, group)
        # What the guard has decided, and the chunks that have moved.
        self.factor: Tensor | None = None
        self.news: Mapping[str, Tensor] = {}
        self.done: list[Chunk] = []
        self.lazy = False
        # Units that could not be factorized: those that sit the step out, and those whose refresh behind it is put off.
        self.failed: Tensor | None = None
        self.stale: Tensor | None = None
        self.failed_rows: set[int] = set()  # of which the host knows
        # By how much of itself the weight joins the gradient; None: not at all.
        self.l2 = decay if method == "l2" and decay != 0 else None

    def take(self) -> None:
        """Move weights and state.

        Whatever is raised, a chunk has moved as a whole, with its counts, or not at all.
        """
        bucket = self.bucket
        gradients = bucket.gradients()
        if not gradients:
            return
        self.done.clear()
        watched = watch(bucket, gradients) if self.move.moves and not bucket.hands_out else None
        bucket.counted_now = False
        try:
            bucket.open(list(gradients))
            self._take_chunks(gradients)
            if not self.move.moves:  # nothing is stored
                bucket.release()
            self._count(gradients)
        except BaseException:
            if self.done and not bucket.counted_now:
                self._count(gradients, self.done)
            raise
        finally:
            bucket.release()
        if watched is not None and self.factor is None:
            bucket.unmoved = watched.unmoved()
        if any(part.marks for part in parts_of(type(bucket.state)).values()):
            if bucket.ferry is not None:
                bucket.ferry.wait()
            if (flags := lost(bucket.state)) is not None:
                bucket.post(flags)
        if self.rule.schedule.behind and bucket.capturable:  # a graph ends on the stream on which it began
            self.ahead.wait()

    def _take_chunks(self, gradients: Mapping[int, Tensor]) -> None:
        bucket, rule = self.bucket, self.rule
        way = self.way
        if way.plain and not accepts(bucket.device, chain(bucket.parameters, gradients.values())):
            way = way.stacked()
        # Looking costs nothing on the host, least of all at a chunk that is needed anyway: its norm is taken, and the
        # guard is called when that is too large. Until then every factor was one.
        lazy = bucket.looks and self.group["spike_guard"] is None and self.group["nonfinite"] == "skip"
        self.lazy = lazy and bucket.total is None
        if not self.lazy:
            self._decide(gradients)
        for (phase, count), segments in self._by_phase(gradients).items():
            members: Mapping[int, Tensor] = gradients
            if segments is not bucket.whole:
                members = {segment.row: gradients[segment.row] for segment in segments}
                # With one graph for all, those without a gradient are masked: no new graph when they get one.
                if way.cut == "compiled" and rule.schedule.period == 1:
                    segments = bucket.whole
            t = self._element_scalars(count) if way.one_pass or way.plain else None
            if way.one_pass:
                t = as_tensors(t, bucket.device)
            for chunk in bucket.fetched(bucket.chunks(segments, way.cut)):
                self._take_chunk(chunk, members, gradients, (phase, count), way, t)

    def _take_chunk(
        self,
        chunk: Chunk,
        members: Mapping[int, Tensor],
        gradients: Mapping[int, Tensor],
        when: tuple[Phase, int],
        way: Way,
        t: Any,
    ) -> None:
        """Move a chunk. `gradients` are those of the bucket, `members` those of the phase and the count in `when`."""
        if not self._take_plain(chunk, members, when[0], way, t):
            self._take_stacked(chunk, members, gradients, when, way, t)

    def _take_plain(self, chunk: Chunk, members: Mapping[int, Tensor], phase: Phase, way: Way, t: Any) -> bool:
        """Move a chunk whose parameters are taken as they are; False: it has to be stacked, or masked."""
        if not way.plain or self.factor is not None or (way.kernel is None and len(chunk) > 1):
            return False
        grads = self.bucket.wide(self.bucket.pieces(chunk, members))
        if self.lazy and not self._are_small(chunk, grads if chunk.has_wholes else [], members):
            return False
        self._run_plain(chunk, grads, way.kernel, phase, t)
        return True

    def _take_stacked(
        self,
        chunk: Chunk,
        members: Mapping[int, Tensor],
        gradients: Mapping[int, Tensor],
        when: tuple[Phase, int],
        way: Way,
        t: Any,
    ) -> None:
        """Move a chunk as a stack."""
        grad = self.bucket.stack(chunk, members)
        if self.lazy and self.factor is None and not self._are_small(chunk, [grad] * chunk.has_wholes, members):
            self._decide(gradients)
        if way.one_pass:
            self._run_compiled(chunk, grad, members, t)
        else:
            self._run(chunk, grad, members, *when)

    def _are_small(self, chunk: Chunk, wholes: list[Tensor], members: Mapping[int, Tensor]) -> bool:
        """Whether no norm is too large; a parameter that is cut is looked at whole, before its first piece moves."""
        limit = self.rule.largest_norm(self.bucket.dtype)
        return are_below([*wholes, *(members[i] for i in chunk.opens)], limit)

    def _decide(self, gradients: Mapping[int, Tensor]) -> None:
        decision = decide(self.bucket, list(gradients), self.group, self.rule)
        if decision is not None:
            self.factor, self.news = decision

    def _by_phase(self, gradients: Mapping[int, Tensor]) -> dict[tuple[Phase, int], Sequence[Segment]]:
        """What runs together: a phase; pieces of vectors also share their step count, so that it is a number."""
        bucket, rule = self.bucket, self.rule
        shared = "step" in rule.reads and rule.elementwise and not bucket.capturable
        if (
            rule.schedule.period == 1
            and len(gradients) == len(bucket.parameters)
            and min(bucket.counts) == max(bucket.counts)
            and not bucket.lags
        ):
            count = bucket.counts[0] + 1
            return {(rule.schedule.phase(count), count if shared else 0): bucket.whole}
        found: dict[tuple[Phase, int], list[Segment]] = {}
        for i in gradients:
            for run, turn in bucket.turns_of(i, rule.schedule.period):
                for segment, count in bucket.counted(run):
                    segments = found.setdefault((rule.schedule.phase(count, turn), count if shared else 0), [])
                    if segments and segments[-1].row == i and segments[-1].stop == segment.start:
                        segment = Segment(i, segments.pop().start, segment.stop)
                    segments.append(segment)
        return {**found}

    def _run(
        self,
        chunk: Chunk,
        grad: Tensor,
        gradients: Mapping[int, Tensor],
        phase: Phase,
        count: int,
    ) -> None:
        """One call of the rule, from the gradients to the weights.

        The guard's factor scales the gradients of units; where it is 0, neither weight nor state moves.
        """
        bucket, rule, execution = self.bucket, self.rule, self.way.execution
        grad, live = self._masked(chunk, grad, gradients)
        grad, extra = self._given(chunk, grad, live, count)
        t = make_scalars(rule.reads, self.group, extra)
        state = bucket.read(chunk)
        now = Phase.REUSE if rule.schedule.behind else phase
        with noting(bucket.looks) as failures:
            out = call(rule, grad, state, t, now, execution, bucket.rows_of(chunk, self.name))
        sound = self._without(failures, chunk, live)
        if self.group["cautious"]:
            out = out._replace(direction=bucket.map_units(chunk, cautious, out.direction, grad))
        new = out.state if sound is None else where_live(sound, out.state, state)
        movers = self._movers(chunk, gradients, live, sound)
        behind: Callable[[], AbstractContextManager[object]] = nullcontext
        if now is not phase:
            ready = bucket.as_kept(new)
            stacks = (*bucket.state, *bucket.packing.scales.values()) if bucket.ferry is None else ()
            with self.ahead.beside(x for x in (*stacks, *ready, live) if x is not None) as behind:
                with noting(bucket.looks) as failures:
                    new = refresh(rule, ready, phase, execution)
                moved = self._without(failures, chunk, sound, behind=True)
                new = new if moved is None else where_live(moved, new, ready)
        writes = self.move.writes(bucket, chunk, *movers, out.direction)
        new = self._back(self.move.failures, chunk, sound, new, state)

        def write_state() -> None:
            with behind():
                bucket.write(chunk, new)

        self._commit(chunk, [*writes, write_state])

    def _without(self, failures: Failures, chunk: Chunk, live: Tensor | None, *, behind: bool = False) -> Tensor | None:
        """Which units move, without the matrices that could not be factorized; those are noted.

        Raises:
            LinAlgError: the group has nonfinite="raise". With "propagate" the stand-ins go in.
        """
        bucket = self.bucket
        failed = failures.mask(sum(b - a for a, b in chunk.runs), bucket.device)
        if failed is None or self.group["nonfinite"] == "propagate":
            return live
        found = torch.zeros(bucket.units, dtype=torch.bool, device=bucket.device)
        row = 0
        for a, b in chunk.runs:
            found[a:b] = failed[row : row + b - a]
            row += b - a
        if failures.rows:
            rows = {i for i in chunk.rows if bool(bucket.unit_view(i, found).any())}
            if self.group["nonfinite"] == "raise":
                names = ", ".join(self.name(bucket.sources[i]) for i in sorted(rows))
                raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]  # documented, and not in `__all__`
                    f"a factorization that the step of {names} takes has failed in float32 and in float64; with "
                    "nonfinite='skip' such a matrix sits the step out"
                )
            self.failed_rows |= rows
        if not behind:
            self.failed = found if self.failed is None else self.failed | found
        elif failures.rows:  # flags of a side stream are not read here
            self.stale = found if self.stale is None else self.stale | found
        sound = ~failed.view(-1, *(1 for _ in bucket.item))
        return sound if live is None else live & sound

    def _back(self, failures: Failures, chunk: Chunk, live: Tensor | None, new: Any, old: Any) -> Any:
        """The new state, but the old one where the law of the weight has failed."""
        moved = self._without(failures, chunk, live)
        return new if moved is live or moved is None else where_live(moved, new, old)

    def _movers(
        self, chunk: Chunk, members: Mapping[int, Tensor], live: Tensor | None, sound: Tensor | None
    ) -> tuple[Mapping[int, Tensor], Tensor | None]:
        """The rows whose weights move, and which units of them.

        Rows that fail are left out where they are matrices of their own: a mask is another kernel, whose last bit would
        tell the others.
        """
        rows = self.failed_rows.intersection(chunk.rows)
        others = {i: grad for i, grad in members.items() if i not in rows}
        alone = not self.bucket.hands_out and not any(self.bucket.blocks[i].batched for i in rows)
        if rows and alone and any(i in others for i in chunk.rows):
            return others, live
        return members, sound

    def failed_for_the_first_time(self) -> list[int]:
        """Rows with a matrix that could not be factorized, for all that the host knows; each is told once."""
        rows = self.failed_rows - self.bucket.told_of_failures
        self.bucket.told_of_failures |= rows
        return sorted(rows)

    def _count(self, gradients: Mapping[int, Tensor], done: list[Chunk] | None = None) -> None:
        """Count what has moved, all of it or the chunks in `done`, as the guard and the factorizations leave it."""
        decision = Decision(self.factor, self.news)
        if self.failed is not None or self.stale is not None:
            none = torch.zeros(self.bucket.units, dtype=torch.bool, device=self.bucket.device)
            failed, stale = (none if units is None else units for units in (self.failed, self.stale))
            decision = sit_out(self.bucket, list(gradients), decision, failed, stale)
        self.bucket.count(list(gradients), *decision, done)
        self.factor = decision.factor

    def _masked(self, chunk: Chunk, grad: Tensor, gradients: Mapping[int, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The gradient times the guard's factor, and which units move; None: all of them."""
        bucket, factor = self.bucket, self.factor
        if len(gradients) < len(bucket.parameters) and any(i not in gradients for i in chunk.rows):
            members = torch.zeros(bucket.units, device=bucket.device)
            members.index_fill_(0, bucket.units_of(list(gradients)), 1)
            factor = members if factor is None else factor * members
        if factor is None:
            return grad, None
        scale = bucket.spread(chunk, factor)
        live = scale > 0
        return torch.where(live, grad * scale, 0), live

    def _given(self, chunk: Chunk, grad: Tensor, live: Tensor | None, count: int) -> tuple[Tensor, dict[str, Any]]:
        """The gradient as the rule sees it, and what it reads beside options."""
        bucket, reads = self.bucket, self.rule.reads
        if self.group["maximize"]:
            grad = -grad
        extra: dict[str, Any] = {}
        if "l2" in reads:
            extra["l2"] = None
        if self.l2 is not None or "weight" in reads:
            weight = bucket.stack(chunk, {segment.row: bucket.parameters[segment.row] for segment in chunk})
            if "weight" in reads:
                extra |= {"weight": weight, "weight_dtype": bucket.rounded_to}
            if self.l2 is not None and "l2" in reads:
                extra["l2"] = self.l2 * weight
            elif self.l2 is not None:
                grad = grad + self.l2 * weight
        if "parameters" in reads:
            extra["parameters"] = [bucket.parameters[segment.row] for segment in chunk]
        if "step" in reads:
            # A number where the host knows it: not on an accelerator that may have skipped a unit, nor in a graph.
            known = self.rule.elementwise and not bucket.capturable and (live is None or bucket.on_host)
            extra["step"] = count if known else bucket.spread(chunk, bucket.step.double() + 1)
        return grad, extra

    def _commit(self, chunk: Chunk, writes: Sequence[Write]) -> None:
        """What a chunk writes, and the note that it has."""
        commit([*writes, partial(self.done.append, chunk)])

    def _run_compiled(self, chunk: Chunk, grad: Tensor, members: Container[int], t: Any) -> None:
        """`_run` for an element-wise rule: one compiled pass over gradient, state and weight."""
        bucket, rule, factor = self.bucket, self.rule, self.factor
        scale = None if factor is None else bucket.spread(chunk, factor)
        if "step" in rule.reads and scale is not None and not bucket.on_host:
            t = t._replace(step=bucket.spread(chunk, bucket.step.double() + 1))
        parts, _ = bucket.targets(chunk, grad, members)
        in_place = len(parts) == 1 and parts[0].is_contiguous()
        weight = parts[0].view(-1) if in_place else torch.cat([p.reshape(-1) for p in parts])
        blocks = chunk.in_blocks
        state, scales = blocks or (bucket.read(chunk), [None] * len(bucket.state))
        step_elements(rule, grad.contiguous(), state, scales, weight, scale, t, self.group["maximize"])
        if blocks is None:
            bucket.write(chunk, state)
        writes = [] if in_place else [partial(torch._foreach_copy_, *bucket.targets(chunk, weight, members))]
        self._commit(chunk, writes)

    def _element_scalars(self, count: int) -> Any:
        """What `step_elements` and kernels take, the same for all chunks of a step."""
        extra = {"lr": self.move.lr, "keep": self.move.keep, "l2": self.l2, "step": count}
        return make_scalars(self.rule.reads, self.group, extra)

    def _run_plain(self, chunk: Chunk, grads: list[Tensor], kernel: Kernel | None, phase: Phase, t: Any) -> None:
        """`_run` for an element-wise rule where nothing is masked and nothing has to be gathered.

        It is given the parameters' pieces as they are: one, or any number for a kernel of torch's.
        """
        bucket, rule = self.bucket, self.rule
        parts = bucket.pieces(chunk, bucket.parameters)
        wide = bucket.wide(parts)
        if self.group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        if self.l2 is not None:
            grads = list(torch._foreach_add(grads, torch._foreach_mul(wide, self.l2)))
        if kernel is not None:
            parts_of_state, stores = bucket.read_lists(chunk)
            writes = [*kernel(wide, grads, parts_of_state, t, self.move.lr, self.move.keep), *stores]
        else:
            out = advance(rule, grads[0].view(-1), bucket.read(chunk), t, phase)
            writes = [partial(bucket.write, chunk, out.state)]
            writes += subtract_(wide, [out.direction.view(wide[0].shape)], self.move.lr, self.move.keep)
        if wide is not parts:
            writes.append(partial(torch._foreach_copy_, parts, wide))
        self._commit(chunk, writes)
        if self.group["nonfinite"] == "propagate":
            forget_scratch()
