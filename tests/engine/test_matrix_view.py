"""A view is the parameter's matrices, each updated as if it were a parameter of its own."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emerging_optimizers import SpikeWatch, create_optimizer
from emerging_optimizers.engine import chunks
from emerging_optimizers.engine.matrix_view import blocks

# View, shape of the parameter, and its matrices written out.
VIEWS: list[tuple[Any, tuple[int, ...], Any]] = [
    ("joined", (3, 6, 4), lambda w: [torch.cat(list(w), dim=1)]),
    ("joined", (3, 4, 6), lambda w: [torch.cat(list(w))]),
    ("joined", (6, 4), lambda w: [w]),
    ("transposed", (6, 9), lambda w: [w.T]),
    ("transposed", (2, 6, 9), lambda w: [x.T for x in w]),
    (("heads", 3), (12, 5), lambda w: list(w.chunk(3))),
    (("columns", "heads", 2), (5, 6), lambda w: list(w.chunk(2, dim=1))),
    (("columns", "heads", 2), (2, 5, 6), lambda w: [y for x in w for y in x.chunk(2, dim=1)]),
    (("split", 6, 2, 2), (10, 5), lambda w: list(w.split([6, 2, 2]))),
    (("split", 4, 2), (12, 5), lambda w: [w[0:4], w[6:10], w[4:6], w[10:12]]),
    (("split", 4, 2), (2, 6, 5), lambda w: [w[0, :4], w[1, :4], w[0, 4:], w[1, 4:]]),
    (("transposed", "split", 4, 4, 4), (5, 12), lambda w: list(w.T.split(4))),
    (("transposed", "columns", "heads", 2), (6, 4), lambda w: list(w.T.chunk(2, dim=1))),
    (("columns", "split", 5, 3), (4, 8), lambda w: list(w.split([5, 3], dim=1))),
    (("interleaved", 2, 1), (9, 4), lambda w: [w[[0, 1, 3, 4, 6, 7]], w[2::3]]),
    (("interleaved", 2, 2, 2), (12, 5), lambda w: [w[[0, 1, 6, 7]], w[[2, 3, 8, 9]], w[[4, 5, 10, 11]]]),
    (("interleaved", 2, 1), (2, 6, 4), lambda w: [x[i] for i in ([0, 1, 3, 4], [2, 5]) for x in w]),
    (("transposed", "interleaved", 1, 1), (2, 3, 8), lambda w: [x.T[i::2] for i in (0, 1) for x in w]),
]
every_view = pytest.mark.parametrize(("view", "shape", "matrices"), VIEWS, ids=[f"{v} of {s}" for v, s, _ in VIEWS])
OPTIONS: dict[str, dict[str, Any]] = {
    "muon": {"weight_decay": 0.1, "weight_decay_method": "l2", "spike_guard": 2.0},
    "soap": {"weight_update_hook": "hyperball"},
    "muown": {},
    "spectron": {"rank": 8, "truncation_tolerance": 1.0},
}


def weight(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def gradient(shape: tuple[int, ...], step: int) -> Tensor:
    return weight(shape).roll(step + 1) * (30.0 if step == 3 else 1.0)


def train(p: Tensor, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        p.grad = gradient(tuple(p.shape), step)
        optimizer.step()


def trained(view: Any, shape: tuple[int, ...], name: str = "soap", steps: int = 4, **options: Any) -> Any:
    p = nn.Parameter(weight(shape))
    optimizer = create_optimizer(name, [p], lr=0.05, matrix_view=view, **OPTIONS.get(name, {}), **options)
    train(p, optimizer, range(steps))
    return p, optimizer


@every_view
def test_blocks_are_views_that_hold_every_weight_once(view: Any, shape: tuple[int, ...], matrices: Any) -> None:
    w = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for stored in (w, w.mT.contiguous().mT):
        found = blocks(stored, view=view)
        stacks = [block.stack(stored) for block in found]
        for ours, wanted in zip([m for stack in stacks for m in stack], matrices(w), strict=True):
            assert torch.equal(ours, wanted)
        assert torch.cat([stack.flatten() for stack in stacks]).sort()[0].equal(w.flatten())
        for block, stack in zip(found, stacks, strict=True):
            assert block.of(stored).untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()
            assert torch.equal(block.restack(block.unstack(stack.contiguous(), stored)), stack)


@pytest.mark.parametrize("name", OPTIONS)
@every_view
def test_every_matrix_of_a_view_moves_as_a_parameter_of_its_own(
    view: Any, shape: tuple[int, ...], matrices: Any, name: str
) -> None:
    """Decay, guard, hook and the rule's own state included."""
    p, _ = trained(view, shape, name)
    alone = [nn.Parameter(m.clone()) for m in matrices(weight(shape))]
    optimizer = create_optimizer(name, alone, lr=0.05, **OPTIONS[name])
    for step in range(4):
        for q, grad in zip(alone, matrices(gradient(shape, step)), strict=True):
            q.grad = grad.clone()
        optimizer.step()
    for ours, wanted in zip(matrices(p.detach()), alone, strict=True):
        torch.testing.assert_close(ours, wanted.detach(), rtol=1e-4, atol=1e-5)


@every_view
def test_one_by_one_in_pieces_and_at_once_are_the_same(
    view: Any, shape: tuple[int, ...], matrices: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, _ = trained(view, shape)
    alone, _ = trained(view, shape, execution="per_matrix")
    monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", 1)
    pieces, _ = trained(view, shape)
    torch.testing.assert_close(at_once, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(at_once, pieces, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("without_code")
@pytest.mark.parametrize("view", [("split", 4, 2), ("transposed", "columns", "heads", 3)])
def test_compiled_is_the_same(view: Any) -> None:
    eager, _ = trained(view, (12, 6), "muon")
    compiled, _ = trained(view, (12, 6), "muon", execution="compiled")
    torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-5)


def test_a_parameter_out_of_its_memory_order_is_cut_and_written() -> None:
    p, _ = trained(("split", 4, 2), (12, 6), "muon")
    q = nn.Parameter(weight((12, 6)).T.contiguous().T)
    train(q, create_optimizer("muon", [q], lr=0.05, matrix_view=("split", 4, 2), **OPTIONS["muon"]), range(4))
    assert torch.equal(p, q)


@pytest.mark.parametrize("again", ["load_state_dict", "deepcopy"])
@every_view
def test_training_resumes_bitwise(view: Any, shape: tuple[int, ...], matrices: Any, again: str) -> None:
    p, optimizer = trained(view, shape, steps=3, spike_guard=2.0)
    if again == "deepcopy":
        q, other = copy.deepcopy((p, optimizer))
    else:
        file = io.BytesIO()
        torch.save((p, optimizer.state_dict()), file)
        file.seek(0)
        q, saved = torch.load(file, weights_only=True)
        other = create_optimizer("soap", [q], lr=0.05, matrix_view=view, spike_guard=2.0, **OPTIONS["soap"])
        other.load_state_dict(saved)
        assert other.param_groups[0]["matrix_view"] == view
    train(p, optimizer, range(3, 6))
    train(q, other, range(3, 6))
    assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("view", "shape", "shapes"),
    [
        ("joined", (3, 6, 4), {"exp_avg": (6, 12), "L": (6, 6), "R": (12, 12), "step": ()}),
        ("joined", (3, 4, 6), {"exp_avg": (12, 6), "L": (12, 12), "R": (6, 6), "step": ()}),
        ("transposed", (6, 9), {"exp_avg": (6, 9), "L": (9, 9), "R": (6, 6), "step": ()}),
        (("heads", 3), (12, 5), {"exp_avg": (12, 5), "L": (3, 4, 4), "R": (3, 5, 5), "step": (3,)}),
        (("split", 4, 4, 4), (12, 5), {"exp_avg": (12, 5), "L": (3, 4, 4), "step": (3,)}),
        (
            ("split", 6, 2, 2),
            (10, 5),
            {"exp_avg.0": (6, 5), "exp_avg.2": (2, 5), "L.0": (6, 6), "L.1": (2, 2), "R.1": (5, 5), "step.2": ()},
        ),
        (("split", 4, 2), (12, 5), {"exp_avg.0": (8, 5), "exp_avg.1": (4, 5), "L.0": (2, 4, 4), "step.1": (2,)}),
        (("columns", "heads", 2), (5, 6), {"exp_avg": (2, 5, 3), "L": (2, 5, 5), "R": (2, 3, 3)}),
        (("interleaved", 2, 1), (9, 4), {"exp_avg.0": (6, 4), "exp_avg.1": (3, 4), "L.0": (6, 6), "step.1": ()}),
        (("interleaved", 2, 1), (2, 6, 4), {"exp_avg.0": (2, 4, 4), "L.1": (2, 2, 2), "step.0": (2,)}),
    ],
)
def test_state_has_the_parameters_shape_or_that_of_its_blocks(view: Any, shape: Any, shapes: Any) -> None:
    p, optimizer = trained(view, shape)
    assert {key: tuple(optimizer.state[p][key].shape) for key in shapes} == shapes
    optimizer.state[p] = {key: value.clone() for key, value in optimizer.state[p].items()}
    train(p, optimizer, range(4, 5))  # what users replace is taken over
    assert {key: tuple(optimizer.state[p][key].shape) for key in shapes} == shapes


@pytest.mark.parametrize("view", [("heads", 5), ("split", 6, 2, 2)])
def test_a_matrix_whose_gradient_is_not_finite_sits_out_alone(view: Any) -> None:
    p, optimizer = trained(view, (10, 5), "muon")
    before = p.detach().clone()
    p.grad = gradient((10, 5), 5)
    p.grad[-1, 0] = torch.nan
    optimizer.step()
    assert torch.equal(p[-2:], before[-2:])
    assert (p[:-2] != before[:-2]).any(dim=1).all()
    assert [skipped for _, skipped in optimizer.guard_events().values()] == [1]


def test_the_watch_sees_the_blocks() -> None:
    p = nn.Parameter(weight((10, 5)))
    optimizer = create_optimizer("soap", [("qkv", p)], lr=0.05, matrix_view=("split", 6, 2, 2))
    with SpikeWatch(optimizer, every=1, on_alarm=lambda _: None) as watch:
        train(p, optimizer, range(3))
    assert list(watch.latest) == ["qkv.0", "qkv.1", "qkv.2"]
    for found, rows in zip(watch.latest.values(), gradient((10, 5), 2).split([6, 2, 2]), strict=True):
        assert found["grad_norm"] == pytest.approx(float(rows.norm()))


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (("heads", 3), r"'w' of shape \(10, 6\): .*does not fit 10 rows: 3 heads need a multiple of 3"),
        (("columns", "heads", 4), "does not fit 6 columns"),
        (("split", 4, 3), "does not fit 10 rows: the sizes add up to 7; give what divides 10"),
        (("split",), r"matrix_view=\('split',\).* is not allowed; give \"auto\""),
        (("split", 0, 5), "is not allowed"),
        (("heads", True), "is not allowed"),
        (("columns",), "is not allowed"),
        (("heads", 2, 2), "is not allowed"),
        (("columns", "transposed", "heads", 2), "is not allowed"),
        (("interleaved", 4, 3), "does not fit 10 rows: the sizes add up to 7; give what divides 10"),
        (("columns", "interleaved", 2, 1), "is not allowed"),
        ("transpose", "is not allowed"),
        (None, "is not allowed"),
    ],
)
def test_a_view_that_cannot_be_is_refused_by_name(view: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_optimizer("muon", [("w", nn.Parameter(torch.zeros(10, 6)))], matrix_view=view)
    with pytest.raises(ValueError, match="parameters of 2 or 3 dimensions"):
        create_optimizer("muon", [nn.Parameter(torch.zeros(4, 2, 3, 3))], matrix_view=("heads", 2))


def test_a_checkpoint_of_another_view_is_refused() -> None:
    _, optimizer = trained(("split", 6, 2, 2), (10, 5))
    saved = optimizer.state_dict()
    saved["param_groups"][0]["matrix_view"] = "auto"
    with pytest.raises(ValueError, match=r"missing .*exp_avg, .*unknown .*exp_avg\.0"):
        optimizer.load_state_dict(saved)
