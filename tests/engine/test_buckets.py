"""Chunks cover what they should, and stacks give back what was put in."""

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emerging_optimizers.distributed.layout import Layout
from emerging_optimizers.distributed.shares import Here
from emerging_optimizers.engine import chunks
from emerging_optimizers.engine.buckets import Bucket
from emerging_optimizers.engine.chunks import Segment
from emerging_optimizers.engine.filling import fill_buckets, needs
from emerging_optimizers.engine.matrix_view import blocks
from emerging_optimizers.engine.rule import Rule
from emerging_optimizers.orthogonalized_optimizers.muon import MuonRule
from emerging_optimizers.scalar_optimizers.adamw import AdamWRule
from emerging_optimizers.soap.soap import SOAP, SOAPRule


def bucket_of(parameters: list[Tensor], rule: Rule) -> Bucket:
    return Bucket([(Here(p), block) for p in parameters for block in blocks(p, rule.elementwise)], rule)


def vectors(sizes: list[int]) -> Bucket:
    return bucket_of([torch.randn(size) for size in sizes], AdamWRule())


def experts(counts: list[int]) -> Bucket:
    return bucket_of([torch.randn(count, 3, 2) for count in counts], MuonRule())


def rows(bucket: Bucket, members: list[int]) -> list[Segment]:
    return [bucket.whole[i] for i in members]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    cap=st.integers(1, 40),
    threads=st.integers(1, 3),
    kind=st.sampled_from([vectors, experts]),
    data=st.data(),
)
def test_chunks_cover_the_members_once_and_within_the_cap(
    sizes: list[int], cap: int, threads: int, kind: Any, data: Any
) -> None:
    bucket: Bucket = kind(sizes)
    members = sorted(data.draw(st.sets(st.integers(0, len(sizes) - 1), min_size=1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "ELEMENT_CHUNK", cap)
        patch.setattr(chunks, "CPU_CHUNK_BYTES", cap * 3 * 2 * 4)
        patch.setattr(torch, "get_num_threads", lambda: threads)
        found = bucket.chunks(rows(bucket, members), "stacked")
    covered = [(i, k) for chunk in found for i, start, stop in chunk for k in range(start, stop)]
    assert covered == [(i, k) for i in members for k in range(sizes[i])]
    assert all(0 < sum(stop - start for _, start, stop in chunk) <= cap * threads for chunk in found)


def test_chunks_of_the_other_executions() -> None:
    bucket = experts([2, 1, 3])
    assert bucket.chunks(bucket.whole, "compiled") == [[(0, 0, 2), (1, 0, 1), (2, 0, 3)]]
    assert bucket.chunks(rows(bucket, [0, 1]), "per_matrix") == [[(0, 0, 1)], [(0, 1, 2)], [(1, 0, 1)]]
    flat = vectors([4, 5])
    assert flat.chunks(rows(flat, [1]), "per_matrix") == [[(1, 0, 5)]]


@pytest.mark.parametrize("members", [[0, 1, 2], [0, 2]], ids=["adjacent", "apart"])
def test_what_is_written_is_read_and_nothing_else_changes(members: list[int]) -> None:
    bucket = experts([2, 1, 3])
    (chunk,) = bucket.chunks(rows(bucket, members), "stacked")
    new = type(bucket.state)(torch.randn_like(bucket.read(chunk).momentum_buffer))
    bucket.write(chunk, new)
    assert torch.equal(bucket.read(chunk).momentum_buffer, new.momentum_buffer)
    stacked = bucket.stack(chunk, dict(enumerate(bucket.parameters)))
    parts, values = bucket.targets(chunk, stacked, members)
    assert all(torch.equal(part, value) for part, value in zip(parts, values, strict=True))
    for i in set(range(3)) - set(members):
        assert not bucket.published[i]["momentum_buffer"].any()


def test_a_parameter_out_of_its_memory_order_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "ELEMENT_CHUNK", 4)
    bucket = bucket_of([torch.randn(3, 5).T, torch.randn(6)], AdamWRule())
    assert bucket.chunks(bucket.whole, "stacked") == [[(0, 0, 15)], [(1, 0, 4)], [(1, 4, 6)]]


@pytest.mark.parametrize(
    ("shape", "view", "item"),
    [
        ((4, 6), "auto", (4, 6)),
        ((3, 4, 6), "auto", (4, 6)),
        ((3, 4, 6), "flatten", (3, 24)),
        ((8, 3, 2, 2), "auto", (8, 12)),
    ],
)
def test_item_shapes(shape: tuple[int, ...], view: str, item: tuple[int, ...]) -> None:
    assert [block.item for block in blocks(torch.zeros(shape), False, view)] == [item]
    assert [block.item for block in blocks(torch.zeros(shape), True, view)] == [()]


def test_a_stack_over_units_spreads_over_a_chunk() -> None:
    bucket = experts([2, 1, 3])
    (chunk,) = bucket.chunks(rows(bucket, [0, 2]), "stacked")
    assert bucket.spread(chunk, torch.arange(6)).tolist() == [[[k]] for k in (0, 1, 3, 4, 5)]
    bucket = vectors([2, 3])
    (chunk,) = bucket.chunks(bucket.whole, "stacked")
    assert bucket.spread(chunk, torch.tensor([7, 8])).tolist() == [7, 7, 8, 8, 8]


def test_factors_of_a_square_convolution_are_square() -> None:
    bucket = bucket_of([torch.randn(12, 3, 2, 2)], SOAPRule())
    shapes = {key: tuple(view.shape) for key, view in bucket.published[0].items()}
    assert shapes["exp_avg"] == (12, 3, 2, 2)
    assert shapes["L"] == shapes["Q_R"] == (12, 12)
    assert shapes["step"] == ()


def test_turns_spread_each_shape_over_the_period_and_batches_over_all_of_it() -> None:
    rule = SOAPRule(precondition_frequency=4)
    group = {
        "params": [torch.randn(4, 3), torch.randn(3, 2), torch.randn(4, 3), torch.randn(3, 2), torch.randn(6, 5, 2)],
        "matrix_view": "auto",
        "spike_guard": None,
        "state_dtype": None,
        "offload": None,
        "weight_rounding": "nearest",
        "weight_update_hook": None,
        "weight_decay_method": "decoupled",
        "cautious": False,
    }
    layout = Layout()
    everyone = layout.ask(group["params"], group, needs(rule, group))
    found = fill_buckets(everyone, rule, {}, layout)
    assert [bucket.turns for bucket in found] == [[0, 1], [2, 3], [0]]
    some = layout.ask(group["params"][2:4], group, needs(rule, group))
    assert fill_buckets(some, rule, {}, layout)[1].turns == [3]  # whoever else is there
    batch = found[2]
    assert list(batch.turns_of(0, 4)) == [((0, 0, 1), 0), ((0, 1, 3), 1), ((0, 3, 4), 2), ((0, 4, 6), 3)]


def test_every_basis_is_refreshed_once_a_period_and_no_step_has_all_of_them() -> None:
    ps = [torch.nn.Parameter(torch.randn(4, 3)) for _ in range(4)] + [torch.nn.Parameter(torch.randn(8, 4, 3))]
    optimizer = SOAP(ps, lr=0.0, precondition_frequency=4)
    moved = []
    for _ in range(12):
        before = [optimizer.state[p]["Q_L"].clone() for p in ps] if optimizer.state else []
        for p in ps:
            p.grad = torch.randn_like(p)
        optimizer.step()
        if before:
            after = [optimizer.state[p]["Q_L"] for p in ps]
            changed = [(a - b).abs().amax((-2, -1)).reshape(-1) > 0 for a, b in zip(after, before, strict=True)]
            moved.append(torch.cat(changed).int())
    first, later = moved[0], torch.stack(moved[3:11])
    assert first.all()
    assert later.sum(dim=0).tolist() == [2] * 12
    assert later.sum(dim=1).tolist() == [3] * 8


def test_a_bucket_goes_when_nobody_holds_it() -> None:
    gc.disable()
    try:
        bucket = experts([2, 1])
        bucket.chunks(bucket.whole, "stacked")
        held = weakref.ref(bucket)
        del bucket
        assert held() is None
    finally:
        gc.enable()
