"""Buckets for the parameters of a group, with the state that there is for them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from emerging_optimizers.distributed.dtensor import whole_of
from emerging_optimizers.distributed.layout import Asked, Layout, Needs
from emerging_optimizers.distributed.shares import CutMatrix, Share
from emerging_optimizers.engine.buckets import Bucket
from emerging_optimizers.engine.chunks import Chunk, keep_pages
from emerging_optimizers.engine.flops import step_flops
from emerging_optimizers.engine.hooks import make_hook
from emerging_optimizers.engine.kept import KEYS, keep, localized
from emerging_optimizers.engine.matrix_view import Block, blocks
from emerging_optimizers.engine.packing import (
    CODES,
    INT8,
    SCALES,
    bears_blocks,
    named,
    narrowed,
    others_than,
    plain_key,
    unpacked,
)
from emerging_optimizers.engine.rule import PicksRows, Rule, StartsFromWeight, without_data
from emerging_optimizers.engine.units import count_of
from emerging_optimizers.engine.validate import label
from emerging_optimizers.linalg.factorizations import noting


def fill_buckets(
    asked: Asked,
    rule: Rule,
    saved: Mapping[Tensor, Mapping[str, Any]],
    layout: Layout,
    others: Set[str] | None = None,
) -> list[Bucket]:
    """Buckets for the parameters that are asked for, with the state that is saved for them.

    `layout` says what of them is worked on here. `others` are the only keys that a checkpoint may have beside the
    rule's; None: any, it is the live state.
    """
    keep_pages()
    group = asked.group
    index = {p: i for i, p in enumerate(group["params"])}
    kinds: dict[Any, list[tuple[int, Share, Block]]] = {}
    shares = layout.shares(asked)
    cuts = [blocks(share.work, rule.elementwise, group["matrix_view"]) for share in shares]
    items = [tuple(block.item for block in cut) for cut in cuts]
    keep(shares, [index[p] for p in asked.parameters], items, group["weight_rounding"])
    for p, share, cut in zip(asked.parameters, shares, cuts, strict=True):
        for block in cut:
            eighths = group["state_dtype"] == INT8 and bears_blocks(share, block)
            kind = (block.item, share.work.dtype, share.work.device, share.kind, share.kept, eighths)
            kinds.setdefault(kind, []).append((index[p], share, block))
    turns = _turns(asked, rule)
    buckets = []
    for (*_, eighths), rows in kinds.items():
        rounded = group["state_dtype"] if eighths or group["state_dtype"] != INT8 else None
        offload = group["offload"] == "cpu"
        bucket = Bucket([(share, block) for _, share, block in rows], rule, rounded, offload)
        bucket.turns = [turns.get((i, block.key), 0) for i, _, block in rows]
        if group["spike_guard"] is not None or any(
            "guard_norm" + block.key in saved.get(share.source, {}) for _, share, block in rows
        ):
            bucket.start_guard()
        buckets.append(bucket)
    keys = keys_of(buckets)
    names = {p: label(group, index[p], p) for p in asked.parameters}
    for p, state in saved.items():
        # What was kept of rounding may be needed no more: the parameter is in another precision here.
        unknown = set() if others is None else others_than(state, keys[p]) - others - {*KEYS}
        missing = {key for key in others_than(keys[p], state) if not key.startswith("guard_") and key not in KEYS}
        known = state.keys() - others_than(state, keys[p])
        if unknown or (missing and known):
            raise _misfit(names[p], missing, unknown)
    # By parameters, in an order that all processes have: what lies otherwise now is put together by all of them.
    homes = homes_in(buckets)
    for p in filter(homes.__contains__, saved):
        for bucket, row in homes[p]:
            if len(others_than(saved[p], bucket.published[row])) < len(saved[p]):
                adopt(bucket, row, saved[p], names[p])
    return buckets


def needs(rule: Rule, group: Mapping[str, Any]) -> Needs:
    """What the rule and the options of a group ask of a parameter that is spread over processes."""
    law = rule.weight_law or make_hook(group["weight_update_hook"])
    of_wholes = law is not None or group["cautious"] or "parameters" in rule.reads
    reads_weights = bool({"weight", "parameters"} & {*rule.reads}) or isinstance(rule, StartsFromWeight)

    picks = None
    if isinstance(rule, PicksRows) and type(rule).update is PicksRows.update:  # a subclass may have one of its own
        picks = rule.share_of if not of_wholes and group["matrix_view"] == "auto" else None

    def cut(shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], int]]:
        """The shapes of matrices, and how many there are of each."""
        like = torch.empty(shape, device="meta")
        for block in blocks(like, rule.elementwise, group["matrix_view"]):
            yield block.item, block.of(like).numel() // max(1, prod(block.item))

    def matrices(shape: Sequence[int]) -> int:
        return sum(count for _, count in cut(shape)) // max(1, shape[0])

    def cost(shape: Sequence[int]) -> float:
        if rule.elementwise:
            return float(prod(shape))
        return sum(count * step_flops(rule, (item[0], item[1]), group) for item, count in cut(shape))

    return Needs(
        elementwise=rule.elementwise and not of_wholes,
        batches=not rule.elementwise and group["matrix_view"] not in ("flatten", "joined"),
        matrices=matrices,
        weights=law is not None or reads_weights or group["weight_decay_method"] == "l2",
        cost=cost,
        wide=group["weight_rounding"] != "nearest",
        picks=picks,
        by_rows=picks is not None and (group["state_dtype"] == INT8 or not _is_like_the_gradient(rule)),
    )


def _is_like_the_gradient(rule: Rule) -> bool:
    """Whether all of a rule's state is shaped so."""
    return all(x is None or x.shape == (1, 2, 3) for x in without_data(rule))


def homes_in(buckets: Iterable[Bucket]) -> dict[Tensor, list[tuple[Bucket, int]]]:
    """Where the blocks of each parameter stand: buckets and rows in them, in the order of their keys."""
    homes: dict[Tensor, list[tuple[Bucket, int]]] = {}
    for bucket in buckets:
        for row, p in enumerate(bucket.sources):
            homes.setdefault(p, []).append((bucket, row))
    for home in homes.values():  # a state in one order, whatever is owned here: torch gathers it entry by entry
        home.sort(key=lambda place: place[0].blocks[place[1]].key)
    return homes


def keys_of(buckets: Iterable[Bucket]) -> dict[Tensor, set[str]]:
    """The keys of the state of each parameter in some buckets."""
    keys: dict[Tensor, set[str]] = {}
    for bucket in buckets:
        for p, views in zip(bucket.sources, bucket.published, strict=True):
            keys.setdefault(p, set()).update(views)
    return keys


def _turns(asked: Asked, rule: Rule) -> dict[tuple[int, str], int]:
    """When the turn of each block comes: blocks of one shape are spread evenly over the rule's period.

    A function of the group's parameters alone, so that it is the same after a checkpoint, and for those who join later.
    """
    if rule.schedule.period == 1:
        return {}
    by_shape: dict[tuple[int, ...], list[tuple[int, str]]] = {}
    for i, p in enumerate(asked.wholes):
        for block in blocks(p, rule.elementwise, asked.group["matrix_view"]) if p.numel() else ():
            by_shape.setdefault(block.item, []).append((i, block.key))
    everyone = [row for rows in by_shape.values() for row in rows]
    return {row: k % rule.schedule.period for k, row in enumerate(everyone)}


def adopt(bucket: Bucket, i: int, saved: Mapping[str, Any], name: str) -> None:
    """Copy a row's state from elsewhere, its parameter's, into the stacks, in the stacks' dtype.

    Entries under other keys are somebody else's.

    Raises:
        ValueError: a key is missing, a shape differs, or a value is none; nothing was copied.
    """
    views, end, share = bucket.views[i], bucket.blocks[i].key, bucket.shares[i]
    saved = _as_here(bucket, i, saved, name)
    if missing := views.keys() - saved.keys() - {key + end for key in bucket.guard}:
        raise _misfit(name, missing, ())
    values = _kept_values(share, saved, name)
    values += [
        (view, _fitting(key, share, saved[key], view, name, bucket.block_of(i, key)))
        for key, view in views.items()
        if key in saved
    ]
    if bucket.step.numel() and not share.elsewhere:
        count_of(next(value for view, value in values if view is views["step" + end]), name)
    for view, value in values:  # the guard's may be missing: it was turned on since
        if value is not view:
            view.copy_(value)
    if share.elsewhere:
        return
    if bucket.step.numel():
        bucket.set_count(i, name)
    else:
        bucket.counts[i] = 0
    bucket.step_version = bucket.step._version


def _as_here(bucket: Bucket, i: int, saved: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What is saved of a row, in 8 bits where that is kept here, and otherwise not."""
    block, share, views = bucket.blocks[i], bucket.shares[i], bucket.views[i]
    # Of a part of a matrix, what is saved is all of it.
    whole = replace(block, item=share.shape) if isinstance(share, CutMatrix) else block
    found = unpacked(saved, views, whole, share.source, whole_of)
    for key in bucket.packed(i):
        codes, scales = named(key, CODES), named(key, SCALES)
        if key in saved and codes not in saved:
            value = _fitting(key, share, saved[key], views[codes], name).to(bucket.device, bucket.dtype)
            found[codes], found[scales] = narrowed(block, value, bucket.parameters[i])
    return found


def _kept_values(share: Share, saved: Mapping[str, Any], name: str) -> list[tuple[Tensor, Tensor]]:
    """What belongs into what is kept of a weight: what is saved, or what is there before the first step."""
    kept = share.kept
    if kept is None:
        return []
    entries, starts = kept.entries[share.row], kept.starts[share.row]
    values = {key: localized(share, torch.as_tensor(saved[key])) if key in saved else starts[key] for key in entries}
    for key, entry in entries.items():
        if values[key].shape != entry.shape and key in saved:
            raise ValueError(
                f"the optimizer state {key!r} of {name} has shape {tuple(values[key].shape)}; {tuple(entry.shape)} is "
                "needed"
            )
    return [(entry, values[key]) for key, entry in entries.items()]


def _fitting(key: str, share: Share, value: Any, view: Tensor, name: str, block: int = 1) -> Tensor:
    try:
        value = share.localize(torch.as_tensor(value), view, block)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"the optimizer state {key!r} of {name} is {value!r}; a tensor of shape {tuple(view.shape)} is needed"
        ) from None
    if view.dtype == torch.int8 != value.dtype and key != plain_key(key):
        raise ValueError(
            f"the optimizer state {key!r} of {name} has dtype {value.dtype}; torch.int8 is needed. Give numbers under "
            f"{plain_key(key)!r}"
        )
    if value.shape != view.shape:
        if key.startswith("step") and value.numel() == 1:  # one count for a batch of matrices
            return value.reshape(())
        raise ValueError(
            f"the optimizer state {key!r} of {name} has shape {tuple(value.shape)}; {tuple(view.shape)} is needed"
        )
    return value


def _misfit(name: str, missing: Iterable[str], unknown: Iterable[str]) -> ValueError:
    lines = (("missing", sorted(missing)), ("unknown", sorted(map(str, unknown))))
    return ValueError(
        f"the optimizer state of {name} does not fit: "
        + "; ".join(f"{word} {', '.join(keys)}" for word, keys in lines if keys)
        + ". It was written by another optimizer or with other options; delete the parameter's entry to start it anew"
    )


def start(bucket: Bucket, rule: StartsFromWeight, group: Mapping[str, Any]) -> None:
    """Make the state of matrices before their first step, and of those that have lost it."""
    again = bucket.flagged()
    new = {i: bucket.parameters[i] for i in bucket.gradients() if i in again or not bucket.counts[i]}
    counts = [0 if i in again else count for i, count in enumerate(bucket.counts)]
    if not new:
        bucket.counts = counts
        bucket.forget_flags()
        return
    chunk = Chunk(bucket, (bucket.whole[i] for i in new))
    order = {p: i for i, p in enumerate(group["params"])}
    labels = [label(group, order[p], p) for i in new for p in (bucket.sources[i],) for _ in range(bucket.items(i))]
    try:
        bucket.open(())
        with noting() as failures:
            state = rule.start(bucket.stack(chunk, {i: bucket.parameters[i] for i in new}), labels)
    finally:
        bucket.release()
    if failures.rows:
        raise ValueError(
            f"the optimizer state of {labels[min(failures.rows)]} starts with a factorization of its weight, which has "
            "failed in float32 and in float64; give it a finite weight"
        )
    bucket.write(chunk, state)
    bucket.counts = counts
    bucket.forget_flags()
