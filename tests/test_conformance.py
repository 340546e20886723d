"""What every optimizer owes its users, over the whole table."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import CASES, SEEDS, OptimizerCase, parameters, run, set_gradients

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_optimizer = pytest.mark.parametrize("case", SEEDS, ids=str)


def clones(tensors: Any) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def snapshot(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value.clone() for state in optimizer.state.values() for value in state.values()]


# ---- learning ---------------------------------------------------------------------------------------------------


# Half a second each: the options of an optimizer, whose steps the other tests take too, and a second seed are slow.
@pytest.mark.parametrize(
    ("case", "seed"),
    [
        pytest.param(case, seed, id=f"{case}-{seed}", marks=[] if case in SEEDS and not seed else [pytest.mark.slow])
        for case in CASES
        for seed in (0, 1)
    ],
)
def test_it_descends(case: OptimizerCase, seed: int, device: torch.device) -> None:
    """Each parameter has a target of its own; the learning rate falls to zero."""
    ps = parameters(case, device=device, copies=1, seed=seed)
    targets = parameters(case, device=device, copies=1, seed=seed + 10)
    if not case.rests:  # only some weights can be reached: those of this norm that a step without learning rate leaves
        for p, target in zip(ps, targets, strict=True):
            target.data.mul_(p.norm() / target.norm())
            target.grad = torch.zeros_like(target)
        case.make(targets, lr=1e-20, weight_decay=0.0).step()
    optimizer = case.make(ps, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=120)

    def loss() -> Tensor:
        return sum(((p - t).square().mean() for p, t in zip(ps, targets, strict=True)), torch.zeros((), device=device))

    first = float(loss().detach())
    for _ in range(120):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        scheduler.step()
    assert float(loss().detach()) <= case.descends * first


@every_case
def test_maximize_is_the_step_of_the_negated_gradient(case: OptimizerCase) -> None:
    up, down = parameters(case), parameters(case)
    climber, descender = case.make(up, maximize=True, weight_decay=0.0), case.make(down, weight_decay=0.0)
    for t in range(1, 4):
        for p, q, grad in zip(up, down, set_gradients(down, t), strict=True):
            p.grad = grad
            q.grad = -grad
        climber.step()
        descender.step()
    assert same(up, down)


# ---- gradients --------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_never_written(case: OptimizerCase, dtype: torch.dtype) -> None:
    ps = parameters(case, dtype)
    optimizer = case.make(ps)
    for t in range(1, 4):
        before = clones(set_gradients(ps, t))
        optimizer.step()
        assert same([p.grad for p in ps], before)


@every_case
def test_a_parameter_without_gradient_keeps_its_weight_and_its_state(case: OptimizerCase) -> None:
    ps, optimizer = run(case, 2)
    weight, state = ps[0].detach().clone(), {k: v.clone() for k, v in optimizer.state[ps[0]].items()}
    set_gradients(ps, 3, lambda i, t: i == 0)
    optimizer.step()
    assert torch.equal(ps[0], weight)
    assert all(torch.equal(optimizer.state[ps[0]][key], value) for key, value in state.items())


@every_case
def test_a_late_parameter_takes_its_own_first_step(case: OptimizerCase) -> None:
    """Bias corrections and first steps follow each parameter's own count."""
    ps = parameters(case)
    optimizer = case.make(ps)
    for t in range(1, 4):
        set_gradients(ps, t, lambda i, t: i == 0 and t < 3)
        optimizer.step()
    alone = parameters(case)[:1]
    alone[0].grad = ps[0].grad.clone()
    case.make(alone).step()
    torch.testing.assert_close(ps[0], alone[0])


@every_case
def test_zero_gradients_leave_everything_finite_and_lr_zero_moves_nothing(case: OptimizerCase) -> None:
    ps = parameters(case)
    before = clones(ps)
    optimizer = case.make(ps, lr=0.0, weight_decay=0.0)
    for _ in range(3):
        for p in ps:
            p.grad = torch.zeros_like(p)
        optimizer.step(closure=None)
    if case.rests:
        assert same(ps, before)
    assert all(torch.isfinite(value).all() for value in snapshot(optimizer))
    optimizer.param_groups[0]["lr"] = 0.1
    set_gradients(ps, 1)
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in ps)


@every_optimizer
def test_a_sparse_gradient_raises_before_anything_moves(case: OptimizerCase) -> None:
    ps, optimizer = run(case, 2)
    before, state = clones(ps), snapshot(optimizer)
    set_gradients(ps, 3)
    ps[-1 if ps[-1].ndim else 0].grad = ps[-1 if ps[-1].ndim else 0].grad.to_sparse()
    with pytest.raises(ValueError, match="only dense gradients"):
        optimizer.step()
    assert same(ps, before)
    assert same(snapshot(optimizer), state)


# ---- dtypes and checkpoints -------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_is_float32_or_float64(case: OptimizerCase, dtype: torch.dtype, device: torch.device) -> None:
    ps, optimizer = run(case, 3, dtype=dtype, device=device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for p in ps:
        assert p.dtype == dtype
        assert torch.isfinite(p).all()
        keys = tuple(optimizer.state[p])
        assert keys == (case.state if case in SEEDS else tuple(key for key in case.state if key in keys))
        assert {value.dtype for key, value in optimizer.state[p].items() if key != "step"} == {wide}
        assert all(value.shape == p.shape for key, value in optimizer.state[p].items() if key.startswith("exp_avg"))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(case, torch.float32, id=f"{case}-float32") for case in CASES]
    + [pytest.param(case, torch.bfloat16, id=f"{case}-bfloat16") for case in SEEDS],
)
def test_resume_is_bitwise(case: OptimizerCase, dtype: torch.dtype, device: torch.device) -> None:
    through = parameters(case, dtype, device)
    optimizer = case.make(through)
    files = {}
    for t in range(1, 7):
        set_gradients(through, t)
        optimizer.step()
        if t in (1, 2, 4):
            files[t] = io.BytesIO()
            torch.save({"weights": clones(through), "optimizer": optimizer.state_dict()}, files[t])

    for stop, file in files.items():
        file.seek(0)
        saved = torch.load(file, weights_only=True, map_location=device)
        resumed = [torch.nn.Parameter(weight) for weight in saved["weights"]]
        optimizer = case.make(resumed, lr=123.0)
        optimizer.load_state_dict(saved["optimizer"])
        for t in range(stop + 1, 7):
            set_gradients(resumed, t)
            optimizer.step()
        assert same(resumed, through), f"after a checkpoint of step {stop}"


@every_case
def test_a_copy_goes_on_by_itself(case: OptimizerCase) -> None:
    through, _ = run(case, 5, execution="per_matrix")
    pair = run(case, 3, execution="per_matrix")
    before = snapshot(pair[1])
    for copied, twin in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        for t in range(4, 6):
            set_gradients(copied, t)
            twin.step()
        assert same(copied, through)
        assert same(snapshot(pair[1]), before)
        assert twin.execution == "per_matrix"


@every_optimizer
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(case: OptimizerCase) -> None:
    _, optimizer = run(case, 2)
    good = copy.deepcopy(optimizer.state_dict())
    before, lr = snapshot(optimizer), optimizer.param_groups[0]["lr"]

    def refused(state_dict: dict[str, Any], match: str) -> None:
        state_dict["param_groups"][0]["lr"] = 9.0
        with pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(state_dict)
        assert optimizer.param_groups[0]["lr"] == lr
        assert same(snapshot(optimizer), before)

    key = next(key for key in reversed(case.state) if not key.startswith("eigvals"))  # made anew where missing
    for change, match in (
        (lambda s: s.pop(key) if len(s) > 1 else s.update(other=s.pop(key)), f"missing {key}"),
        (lambda s: s.update(other=s[key]), "unknown other"),
        (lambda s: s.update({key: torch.zeros(3, 3, 3)}), rf"{key}' of .* has shape \(3, 3, 3\)"),
    ):
        broken = copy.deepcopy(good)
        change(broken["state"][0])
        refused(broken, match)
    refused({**copy.deepcopy(good), "format": 99}, "upgrade emerging_optimizers")


@every_optimizer
def test_state_views_are_live(case: OptimizerCase) -> None:
    ps, optimizer = run(case, 2)
    views = dict(optimizer.state[ps[0]])
    before = {key: value.clone() for key, value in views.items()}
    set_gradients(ps, 3)
    optimizer.step()
    for key, view in views.items():
        assert optimizer.state[ps[0]][key] is view
        assert not torch.equal(view, before[key])


@every_optimizer
def test_replaced_state_is_taken_over(case: OptimizerCase) -> None:
    """Trainers move state by assignment: state[p][key] = tensor."""
    through, _ = run(case, 4)
    ps, optimizer = run(case, 2)
    for state in optimizer.state.values():
        for key, value in state.items():
            state[key] = value.clone()
    for t in (3, 4):
        set_gradients(ps, t)
        optimizer.step()
    assert same(ps, through)


@every_optimizer
def test_deleted_state_starts_anew_and_the_rest_goes_on(case: OptimizerCase) -> None:
    ps, optimizer = run(case, 2)
    kept = {key: value.clone() for key, value in optimizer.state[ps[1]].items()}
    del optimizer.state[ps[0]]
    set_gradients(ps, 3, lambda i, t: i > 0)
    alone = torch.nn.Parameter(ps[0].detach().clone())
    alone.grad = ps[0].grad
    case.make([alone]).step()
    optimizer.step()
    torch.testing.assert_close(ps[0], alone)
    assert all(torch.equal(optimizer.state[ps[1]][key], value) for key, value in kept.items())


@every_optimizer
def test_a_parameter_that_changes_dtype_keeps_its_state(case: OptimizerCase) -> None:
    ps, optimizer = run(case, 2)
    ps[0].data = ps[0].data.double()
    set_gradients(ps, 3)
    optimizer.step()
    assert optimizer.state[ps[0]][case.state[-1]].dtype == torch.float64


# ---- torch's contract -------------------------------------------------------------------------------------------


@every_optimizer
def test_a_closure_runs_with_gradients_and_its_loss_is_returned(case: OptimizerCase) -> None:
    ps = parameters(case)
    optimizer = case.make(ps)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.stack([p.square().sum() for p in ps]).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        losses = [float(optimizer.step(closure).detach()) for _ in range(20)]
    assert losses[-1] < losses[0]


@every_case
def test_two_groups_are_two_optimizers(case: OptimizerCase) -> None:
    ps, ref = parameters(case), parameters(case)
    half = len(ps) // 2
    optimizer = case.make([{"params": ps[:half]}, {"params": ps[half:], "lr": 0.003, "weight_decay": 0.0}])
    apart = [case.make(ref[:half]), case.make(ref[half:], lr=0.003, weight_decay=0.0)]
    for t in range(1, 4):
        set_gradients(ps, t)
        set_gradients(ref, t)
        for o in (optimizer, *apart):
            o.step()
    assert same(ps, ref)


@every_optimizer
def test_a_group_added_later_starts_then(case: OptimizerCase) -> None:
    ps = parameters(case)
    optimizer = case.make(ps[:2])
    set_gradients(ps, 1)
    optimizer.step()
    before = clones(ps)
    optimizer.add_param_group({"params": ps[2:], "lr": 0.01})
    optimizer.step()
    assert not torch.equal(ps[-1], before[-1])
    assert len(optimizer.state) == len(ps)


@every_case
def test_every_hyper_parameter_is_in_the_groups_and_saved(case: OptimizerCase) -> None:
    optimizer = case.make(parameters(case))
    for name, value in case.kwargs.items():
        saved = optimizer.state_dict()["param_groups"][0][name]
        assert saved == (tuple(map(tuple, value)) if name == "custom_coefficient_sets" else value)


@every_optimizer
def test_schedulers_hooks_tensor_lr_and_names(case: OptimizerCase) -> None:
    ps, ref = parameters(case), parameters(case)
    named = [(f"p{i}", p) for i, p in enumerate(ps)]
    a, b = case.make(named, lr=torch.tensor([0.05], dtype=torch.float64)), case.make(ref, lr=0.05)
    calls: list[str] = []
    a.register_step_pre_hook(lambda *_: calls.append("pre"))
    a.register_step_post_hook(lambda *_: calls.append("post"))
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (a, b)]
    for t in range(1, 4):
        set_gradients(ps, t)
        set_gradients(ref, t)
        for o, s in zip((a, b), schedulers, strict=True):
            o.step()
            s.step()
    for p, q in zip(ps, ref, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert calls == ["pre", "post"] * 3
    assert a.state_dict()["names"][0] == [name for name, _ in named]


@every_optimizer
def test_strange_but_legal_parameters(case: OptimizerCase) -> None:
    ps = [
        torch.nn.Parameter(torch.randn(6, 8).T),  # not contiguous
        torch.nn.Parameter(torch.randn(1, 9)),
        torch.nn.Parameter(torch.zeros(0, 4)),
        torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)),
        torch.nn.Parameter(torch.randn(3, 5, 4)),
        torch.nn.Parameter(torch.randn(4, 4), requires_grad=False),
    ]
    optimizer = case.make(ps)
    before = clones(ps)
    for p in ps[:5]:
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.step()
    assert [bool((p != b).any()) for p, b in zip(ps, before, strict=True)] == [True, True, False, True, True, False]
    assert len(optimizer.state) == 4


@every_optimizer
def test_a_batch_of_matrices_is_its_matrices(case: OptimizerCase) -> None:
    batch = torch.nn.Parameter(torch.randn(3, 5, 4))
    rows = [torch.nn.Parameter(m.clone()) for m in batch.detach()]
    a, b = (case.make(ps, matrix_view="auto") for ps in ([batch], rows))  # StackedSoap has another default
    for _ in range(4):
        batch.grad = torch.randn(3, 5, 4)
        for row, grad in zip(rows, batch.grad, strict=True):
            row.grad = grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(batch.detach(), torch.stack([r.detach() for r in rows]), rtol=1e-4, atol=1e-5)


@every_optimizer
def test_a_convolution_is_the_matrix_out_by_rest(case: OptimizerCase) -> None:
    conv = torch.nn.Parameter(torch.randn(6, 3, 2, 2))
    flat = torch.nn.Parameter(conv.detach().clone().flatten(1))
    a, b = case.make([conv]), case.make([flat])
    for _ in range(4):
        conv.grad = torch.randn(6, 3, 2, 2)
        flat.grad = conv.grad.flatten(1)
        a.step()
        b.step()
    assert torch.equal(conv.flatten(1), flat)


# ---- refusals ---------------------------------------------------------------------------------------------------


@every_optimizer
def test_unknown_arguments_are_named(case: OptimizerCase) -> None:
    with pytest.raises(TypeError, match=r"weight_decai.*did you mean 'weight_decay'"):
        case.make(parameters(case), weight_decai=0.1)
    with pytest.raises(ValueError, match=r"'weight_decai'.*did you mean 'weight_decay'"):
        case.make([{"params": parameters(case), "weight_decai": 0.1}])
    optimizer = case.make([{"params": parameters(case), "label": "hidden"}])  # frameworks keep notes in groups
    assert optimizer.param_groups[0]["label"] == "hidden"


@every_optimizer
@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", -1.0), ("lr", float("nan")), ("weight_decay", -0.1), ("weight_decay_method", "l3"), ("execution", "fast")],
)
def test_values_out_of_range_raise_at_construction_and_in_a_group(case: OptimizerCase, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}="):
        case.make(parameters(case), **{name: value})
    if name == "execution":
        return
    ps, optimizer = run(case, 1)
    with pytest.raises(ValueError, match=rf"{name}=.* in param_groups\[1\] .*; give "):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2, 2))], name: value})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0][name] = value
    before = clones(ps)
    set_gradients(ps, 2)
    with pytest.raises(ValueError, match=f"{name}="):
        optimizer.step()
    assert same(ps, before)


@pytest.mark.parametrize("case", [case for case in SEEDS if not case.elementwise], ids=str)
def test_a_vector_in_a_matrix_optimizer_raises_at_construction(case: OptimizerCase) -> None:
    named = [("block.weight", torch.nn.Parameter(torch.zeros(3, 3))), ("norm.bias", torch.nn.Parameter(torch.zeros(3)))]
    with pytest.raises(ValueError, match=r"'norm.bias' of shape \(3,\).*create_optimizer"):
        case.make(named)


@every_optimizer
def test_integers_and_complex_parameters_raise(case: OptimizerCase) -> None:
    with pytest.raises(ValueError, match=r"complex64.*allowed are"):
        case.make([torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))])
