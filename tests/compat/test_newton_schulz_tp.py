"""`newton_schulz_tp` and its relatives: alone, and on the shards of two gloo processes."""

import pytest
import torch
import torch.distributed as dist

from emerging_optimizers.linalg.precision import reduced_precision
from emerging_optimizers.orthogonalized_optimizers.muon_utils import (
    batched_newton_schulz_step,
    distributed_normalize_p2,
    newton_schulz,
    newton_schulz_step,
    newton_schulz_tp,
)
from emerging_optimizers.utils import get_pg_rank, get_pg_size
from tests.distributed.processes import run


def matrix(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("partition_dim", [None, 0, 1])
@pytest.mark.parametrize("tp_mode", ["duplicated", "distributed"])
def test_without_a_group_it_is_newton_schulz(partition_dim, tp_mode):
    for x in (matrix(6, 4), matrix(3, 6, 4)):
        assert torch.equal(newton_schulz_tp(x, 5, "quintic", None, partition_dim, tp_mode), newton_schulz(x, 5))


def test_steps_are_the_steps_of_the_iteration():
    x = matrix(4, 6) / 10
    a, b, c = 3.4445, -4.7750, 2.0315
    A = x @ x.T
    expected = a * x + (b * A + c * A @ A) @ x
    torch.testing.assert_close(newton_schulz_step(x, a, b, c), expected)
    torch.testing.assert_close(batched_newton_schulz_step(x.expand(2, 4, 6), a, b, c), expected.expand(2, 4, 6))


def test_a_matrix_of_any_size_is_orthogonalized_with_normalize_in_double():
    x = matrix(6, 4)
    for scale in (1e-20, 1.0, 1e15):
        out = newton_schulz(scale * x, 5, normalize_in_double=True)
        torch.testing.assert_close(out, newton_schulz(x, 5), rtol=1e-4, atol=1e-5)
    assert newton_schulz(0 * x, 5, normalize_in_double=True).abs().max() == 0


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"partition_dim": 2}, "partition_dim=2"),
        ({"tp_mode": "sharded"}, "tp_mode='sharded'"),
        ({"use_syrk": True}, "use_syrk=True"),
    ],
)
def test_wrong_arguments_are_named(arguments, match):
    with pytest.raises(ValueError, match=match):
        newton_schulz_tp(matrix(4, 4), 5, "quintic", None, **arguments)


def _shards_equal_the_whole(group: dist.ProcessGroup, rank: int, tolerance: float) -> None:
    for shape in ((8, 6), (6, 8), (3, 8, 6), (3, 6, 8)):  # a stack is cut within its matrices
        x = matrix(*shape)
        whole = newton_schulz(x, 5)
        assert torch.equal(newton_schulz_tp(x, 5, "quintic", group), whole)
        for dim in (0, 1):
            part, expected = (t.chunk(2, dim=dim - 2)[rank] for t in (x, whole))
            for mode in ("duplicated", "distributed"):
                out = newton_schulz_tp(part, 5, "quintic", group, dim, mode)
                assert out.shape == part.shape
                # A long Gram matrix has null directions, in which rounding may grow but is small yet.
                torch.testing.assert_close(out, expected, rtol=0, atol=tolerance)


def _on_two_ranks() -> None:
    rank = dist.get_rank()
    group = dist.new_group([0, 1])
    assert (get_pg_size(group), get_pg_rank(group), get_pg_size(), get_pg_rank()) == (2, rank, 1, 0)
    with pytest.raises(TypeError, match=r"given is \(2, 2, 2, 2\)"):
        newton_schulz_tp(matrix(2, 2, 2, 2), 5, "quintic", group, 0)
    for precision, words, tolerance in (
        ("highest", ("auto", "auto"), 1e-4),
        ("medium", ("bfloat16", "bfloat16"), 0.05),
        ("medium", ("float32", "bfloat16"), 0.05),  # the processes on unlike CPUs
    ):
        torch.set_float32_matmul_precision(precision)
        with reduced_precision(words[rank]):
            _shards_equal_the_whole(group, rank, tolerance)
    torch.set_float32_matmul_precision("highest")
    stack = matrix(3, 4, 6)
    part = stack.chunk(2, dim=2)[rank]
    torch.testing.assert_close(
        newton_schulz(part, 5, transpose=False, tp_group=group),
        newton_schulz(stack, 5, transpose=False).chunk(2, dim=2)[rank],
    )
    norms = torch.linalg.matrix_norm(stack, keepdim=True)
    torch.testing.assert_close(distributed_normalize_p2(part, 1e-7, group), part / norms)
    torch.testing.assert_close(distributed_normalize_p2(1e-25 * part, 1e-7, group, True), part / norms)
    torch.testing.assert_close(distributed_normalize_p2(part[0], 1e-7, group), part[0] / norms[0])


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo here")
def test_shards_on_two_processes_equal_the_whole():
    run(2, _on_two_ranks)
