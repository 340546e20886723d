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
from emerging_optimizers.engine.guard import decide
from emerging_optimizers.engine.moving import Movement
from emerging_optimizers.engine.parts import lost
from emerging_optimizers.engine.rounding import watch
from emerging_optimizers.engine.rule import Kernel, advance
from emerging_optimizers.engine.scalars import as_tensors, make_scalars
from emerging_optimizers.engine.schedule import Phase
from emerging_optimizers.engine.weight_decay import cautious


class BucketStep:
    """What holds for every chunk of a bucket in one step.

    Args:
        bucket: parameters with their stacks.
        checked: what their group asks for.
        group: the hyper-parameters.
        ahead: where work for the next step goes.
    """

    def __init__(self, bucket: Bucket, checked: Checked, group: Mapping[str, Any], ahead: Ahead) -> None:
        self.bucket, self.rule, self.way, self.group, self.ahead = bucket, checked.rule, checked.way, group, ahead
        bucket.capturable = group["capturable"]
        method, decay = group["weight_decay_method"], group["weight_decay"]
        self.move = Movement(checked.law, group)
        # What the guard has decided, and the chunks that have moved.
        self.factor: Tensor | None = None
        self.news: Mapping[str, Tensor] = {}
        self.done: list[Chunk] = []
        self.lazy = False
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
        try:
            bucket.open(list(gradients))
            try:
                self._take_chunks(gradients)
            except BaseException:
                if self.done:
                    bucket.count(list(gradients), self.factor, self.news, self.done)
                raise
            if not self.move.moves:  # nothing is stored
                bucket.release()
            bucket.count(list(gradients), self.factor, self.news)
        finally:
            bucket.release()
        if watched is not None and self.factor is None:
            bucket.unmoved = watched.unmoved()
        if (flags := lost(bucket.state)) is not None:
            bucket.post(flags)
        if self.rule.schedule.behind and bucket.capturable:  # a graph ends on the stream on which it began
            self.ahead.wait()

    def _take_chunks(self, gradients: Mapping[int, Tensor]) -> None:
        bucket, rule = self.bucket, self.rule
        way = self.way
        if way.plain and (bucket.rounded or not accepts(bucket.device, chain(bucket.parameters, gradients.values()))):
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
            for chunk in bucket.chunks(segments, way.cut):
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
        out = call(rule, grad, state, t, now, execution)
        if self.group["cautious"]:
            out = out._replace(direction=bucket.map_units(chunk, cautious, out.direction, grad))
        new = out.state if live is None else _keep(live, out.state, state)
        behind: Callable[[], AbstractContextManager[object]] = nullcontext
        if now is not phase:
            ready = bucket.as_kept(new)
            with self.ahead.beside(x for x in (*bucket.state, *ready, live) if x is not None) as behind:
                new = refresh(rule, ready, phase, execution)
                new = new if live is None else _keep(live, new, ready)
        writes = self.move.writes(bucket, chunk, gradients, live, out.direction)

        def write_state() -> None:
            with behind():
                bucket.write(chunk, new)

        self._commit(chunk, [*writes, write_state])

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
        state = bucket.read(chunk)
        step_elements(rule, grad.contiguous(), state, weight, scale, t, self.group["maximize"])
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
            writes = kernel(wide, grads, chunk.parts, t, self.move.lr, self.move.keep)
        else:
            out = advance(rule, grads[0].view(-1), bucket.read(chunk), t, phase)
            writes = [partial(bucket.write, chunk, out.state)]
            writes += subtract_(wide, [out.direction.view(wide[0].shape)], self.move.lr, self.move.keep)
        if wide is not parts:
            writes.append(partial(torch._foreach_copy_, parts, wide))
        self._commit(chunk, writes)
        if self.group["nonfinite"] == "propagate":
            forget_scratch()


def _keep(live: Tensor, new: Any, old: Any) -> Any:
    """The new state of a chunk where it is live, else the old one."""
    return type(old)(*(_where(live, x, y) for x, y in zip(new, old, strict=True)))


def _where(live: Tensor, new: Tensor | None, old: Tensor | None) -> Tensor | None:
    """The new rows of a stack where they are live; `live` has the gradient's rank, the stack may have another."""
    if new is None or old is None:
        return None
    return torch.where(
        live if live.ndim <= 1 and old.ndim <= 1 else live.reshape(-1, *(1 for _ in old.shape[1:])), new, old
    )
