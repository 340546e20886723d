"""Chunks cover what they should, and stacks give back what was put in."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emerging_optimizers.engine import buckets
from emerging_optimizers.engine.buckets import Bucket
from emerging_optimizers.engine.matrix_view import blocks
from emerging_optimizers.engine.rule import Rule
from emerging_optimizers.orthogonalized_optimizers.muon import MuonRule
from emerging_optimizers.scalar_optimizers.adamw import AdamWRule
from emerging_optimizers.soap.soap import SOAPRule


def bucket_of(parameters: list[Tensor], rule: Rule) -> Bucket:
    return Bucket([(p, block) for p in parameters for block in blocks(p, rule.elementwise)], rule)


def vectors(sizes: list[int]) -> Bucket:
    return bucket_of([torch.randn(size) for size in sizes], AdamWRule())


def experts(counts: list[int]) -> Bucket:
    return bucket_of([torch.randn(count, 3, 2) for count in counts], MuonRule())


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    cap=st.integers(1, 40),
    kind=st.sampled_from([vectors, experts]),
    data=st.data(),
)
def test_chunks_cover_the_members_once_and_within_the_cap(sizes: list[int], cap: int, kind: Any, data: Any) -> None:
    bucket: Bucket = kind(sizes)
    members = sorted(data.draw(st.sets(st.integers(0, len(sizes) - 1), min_size=1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "ELEMENT_CHUNK", cap)
        patch.setattr(buckets, "MATRIX_CHUNK_BYTES", cap * 3 * 2 * 4)
        chunks = list(bucket.chunks(members, "stacked"))
    covered = [(i, k) for chunk in chunks for i, start, stop in chunk for k in range(start, stop)]
    assert covered == [(i, k) for i in members for k in range(sizes[i])]
    assert all(0 < sum(stop - start for _, start, stop in chunk) <= cap for chunk in chunks)


def test_chunks_of_the_other_executions() -> None:
    bucket = experts([2, 1, 3])
    assert list(bucket.chunks([0, 2], "compiled")) == [[(0, 0, 2), (1, 0, 1), (2, 0, 3)]]
    assert list(bucket.chunks([0, 1], "per_matrix")) == [[(0, 0, 1)], [(0, 1, 2)], [(1, 0, 1)]]
    assert list(vectors([4, 5]).chunks([1], "per_matrix")) == [[(1, 0, 5)]]


@pytest.mark.parametrize("members", [[0, 1, 2], [0, 2]], ids=["adjacent", "apart"])
def test_what_is_written_is_read_and_nothing_else_changes(members: list[int]) -> None:
    bucket = experts([2, 1, 3])
    (chunk,) = bucket.chunks(members, "stacked")
    new = type(bucket.state)(torch.randn_like(bucket.read(chunk).momentum_buffer))
    bucket.write(chunk, new)
    assert torch.equal(bucket.read(chunk).momentum_buffer, new.momentum_buffer)
    stacked = bucket.stack(chunk, dict(enumerate(bucket.parameters)))
    parts, values = bucket.targets(chunk, stacked, members)
    assert all(torch.equal(part, value) for part, value in zip(parts, values, strict=True))
    for i in set(range(3)) - set(members):
        assert not bucket.published[i]["momentum_buffer"].any()


def test_a_parameter_out_of_its_memory_order_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "ELEMENT_CHUNK", 4)
    bucket = bucket_of([torch.randn(3, 5).T, torch.randn(6)], AdamWRule())
    assert list(bucket.chunks([0, 1], "stacked")) == [[(0, 0, 15)], [(1, 0, 4)], [(1, 4, 6)]]


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
    (chunk,) = bucket.chunks([0, 2], "stacked")
    assert bucket.spread(chunk, torch.arange(6)).tolist() == [[[k]] for k in (0, 1, 3, 4, 5)]
    (chunk,) = vectors([2, 3]).chunks([0, 1], "stacked")
    assert vectors([2, 3]).spread(chunk, torch.tensor([7, 8])).tolist() == [7, 7, 8, 8, 8]


def test_factors_of_a_square_convolution_are_square() -> None:
    bucket = bucket_of([torch.randn(12, 3, 2, 2)], SOAPRule())
    shapes = {key: tuple(view.shape) for key, view in bucket.published[0].items()}
    assert shapes["exp_avg"] == (12, 3, 2, 2)
    assert shapes["L"] == shapes["Q_R"] == (12, 12)
    assert shapes["step"] == ()
