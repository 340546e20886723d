"""The published update functions: in place, equal to their optimizers, and the laws of the element-wise rules."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from emerging_optimizers import registry
from emerging_optimizers.scalar_optimizers import MAdam, Signum, update_functions
from emerging_optimizers.scalar_optimizers.ademamix import AdEMAMixRule, AdEMAMixState, half_life_warmup, warmup
from emerging_optimizers.scalar_optimizers.sim_ademamix import SimplifiedAdEMAMixRule

ADAM = {"betas": (0.9, 0.99), "eps": 1e-8, "correct_bias": True}
MIX = {"betas": (0.9, 0.99, 0.999), "eps": 1e-8, "correct_bias": True, "alpha": 3.0}

# function: (optimizer, names of its state, arguments)
FUNCTIONS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "calculate_adam_update": ("adamw", ("exp_avg", "exp_avg_sq"), {**ADAM, "nesterov": True}),
    "calculate_laprop_update": ("laprop", ("exp_avg", "exp_avg_sq"), ADAM),
    "calculate_lion_update": ("lion", ("exp_avg",), {"betas": (0.9, 0.99)}),
    "calculate_signum_update": (
        "signum",
        ("exp_avg",),
        {"momentum": 0.9, "correct_bias": True, "nesterov": True, "use_shape_scaling": True},
    ),
    "calculate_ademamix_update": (
        "ademamix",
        ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq"),
        {**MIX, "num_beta_slow_warmup_steps": 4, "num_alpha_warmup_steps": 3},
    ),
    "calculate_sim_ademamix_update": (
        "sim_ademamix",
        ("exp_avg", "exp_avg_sq"),
        {**ADAM, "num_beta_fast_warmup_steps": 3, "min_beta_fast": 0.5, "alpha": 3.0},
    ),
    "calculate_madam_update": (
        "madam",
        ("exp_avg", "exp_avg_sq_scaled"),
        {"betas": (0.9, 0.99), "correct_bias": True, "scale_log2": 16},
    ),
    "calculate_rmsprop_update": ("rmsprop", ("exp_avg_sq",), {"alpha": 0.9, "eps": 1e-8}),
}


def gradients(steps: int, *shape: int) -> Tensor:
    return torch.randn(steps, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_its_optimizer_with_the_state_in_the_callers_hands(name: str) -> None:
    optimizer_name, keys, kwargs = FUNCTIONS[name]
    function = getattr(update_functions, name)
    p = torch.nn.Parameter(torch.zeros(4, 3))
    optimizer = registry.entry(optimizer_name).load()([p], lr=0.1, weight_decay=0.0, **kwargs)
    buffers = [torch.zeros(4, 3) for _ in keys]
    weight = torch.zeros(4, 3)
    for step, grad in enumerate(gradients(6, 4, 3), start=1):
        before = grad.clone()
        weight = weight - 0.1 * function(grad, *buffers, step=step, **kwargs)
        assert torch.equal(grad, before)
        p.grad = grad
        optimizer.step()
    torch.testing.assert_close(p.detach(), weight)
    for key, buffer in zip(keys, buffers, strict=True):
        torch.testing.assert_close(optimizer.state[p][key], buffer)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_function_keeps_dtype_and_records_no_graph(name: str, dtype: torch.dtype) -> None:
    _, keys, kwargs = FUNCTIONS[name]
    buffers = [torch.zeros(4, 3, dtype=dtype) for _ in keys]
    grad = gradients(1, 4, 3)[0].to(dtype).requires_grad_()
    update = getattr(update_functions, name)(grad, *buffers, step=1, **kwargs)
    assert update.dtype == dtype
    assert not update.requires_grad
    assert all(buffer.any() and not buffer.requires_grad for buffer in buffers)


def test_functions_refuse_what_their_rule_cannot_do() -> None:
    options: Any = {"correct_bias": True, "step": 1}
    with pytest.raises(ValueError, match=r"needs a matrix; the gradient has shape \(3,\)"):
        update_functions.calculate_signum_update(
            torch.ones(3), torch.zeros(3), momentum=0.9, nesterov=False, use_shape_scaling=True, **options
        )
    with pytest.raises(ValueError, match="scale_log2=15 is not allowed; give an even integer"):
        update_functions.calculate_madam_update(
            torch.ones(3), torch.zeros(3), torch.zeros(3), betas=(0.9, 0.99), scale_log2=15, **options
        )


# ---- warm-up --------------------------------------------------------------------------------------------------------


def test_the_half_life_grows_in_a_straight_line() -> None:
    half_lives = [math.log(0.5) / math.log(half_life_warmup(t, 0.9, 0.9999, 10)) for t in range(11)]
    first, last = math.log(0.5) / math.log(0.9), math.log(0.5) / math.log(0.9999)
    assert half_lives == pytest.approx([first + (last - first) * t / 10 for t in range(11)])
    assert half_life_warmup(3, 0.9, 0.9999, None) == half_life_warmup(99, 0.5, 0.9999, 98.5) == pytest.approx(0.9999)
    assert 0 < half_life_warmup(1, 0.0, 0.99, 10) < 0.99


@pytest.mark.parametrize("steps", [None, 5])
def test_warm_ups_take_tensors(steps: int | None) -> None:
    t = torch.tensor([1.0, 3.0, 9.0], dtype=torch.float64)
    ends = torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.999, dtype=torch.float64)
    assert torch.as_tensor(half_life_warmup(t, *ends, steps)).expand(3).tolist() == pytest.approx(
        [half_life_warmup(float(x), 0.9, 0.999, steps) for x in t]
    )
    assert torch.as_tensor(warmup(t, steps)).expand(3).tolist() == pytest.approx([warmup(float(x), steps) for x in t])


@pytest.mark.parametrize("simple", [False, True])
def test_elements_with_step_counts_of_their_own_stay_float32(simple: bool) -> None:
    """On an accelerator a skipped parameter has another count than its neighbours in a flat piece."""
    from emerging_optimizers.engine.scalars import make_scalars

    group: dict[str, Any] = {"eps": 1e-8, "alpha": 2.0, "betas": (0.99, 0.999) if simple else (0.9, 0.999, 0.99)}
    rule: Any = (
        SimplifiedAdEMAMixRule(num_beta_fast_warmup_steps=4)
        if simple
        else AdEMAMixRule(num_beta_slow_warmup_steps=4, num_alpha_warmup_steps=4)
    )
    if simple:
        group["min_beta_fast"] = 0.5
    grad = gradients(1, 2)[0]
    counts = torch.tensor([1.0, 3.0], dtype=torch.float64)

    def update(step: Any) -> Any:
        state = rule.init((2,), torch.float32, torch.device("cpu"))
        return rule.update(grad, state, make_scalars(tuple(group), group, {"step": step}))

    both = update(counts)
    assert {x.dtype for x in both.state} == {torch.float32}
    for i, count in enumerate((1, 3)):
        torch.testing.assert_close(both.direction[i], update(count).direction[i], check_dtype=False)


def test_ademamix_keeps_three_tensors_and_simplified_two() -> None:
    assert len(AdEMAMixState._fields) == 3
    assert len(SimplifiedAdEMAMixRule().init((2,), torch.float32, torch.device("cpu"))) == 2


# ---- laws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-25, 1e-20, 1e-8, 1.0, 1e10])
def test_madam_sees_gradients_of_any_size(scale: float) -> None:
    """Adam's square of 1e-25 is zero in float32."""
    p, q = (torch.nn.Parameter(torch.zeros(50)) for _ in range(2))
    a, b = (MAdam([x], lr=0.1, scale_log2=16 if scale > 1e-25 else 60) for x in (p, q))
    for grad in gradients(5, 50):
        p.grad, q.grad = grad * scale, grad
        a.step()
        b.step()
    torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_madam_is_finite_where_squares_vanish() -> None:
    """Published, this is inf: the momentum is not zero and the second moment is."""
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([1e-38, 1.0])
    MAdam([p], lr=0.1).step()
    assert p.tolist() == pytest.approx([0.0, -0.1])


@pytest.mark.parametrize("k", [15, 2.0, 1.5])
def test_madam_refuses_scales_that_round(k: Any) -> None:
    with pytest.raises(ValueError, match=f"scale_log2={k} in .* give an even integer"):
        MAdam([torch.nn.Parameter(torch.zeros(2))], scale_log2=k)


def test_signum_refuses_a_vector_where_the_shape_matters() -> None:
    vector = torch.nn.Parameter(torch.zeros(3))
    Signum([vector])
    with pytest.raises(ValueError, match=r"Signum updates matrices, and parameter 0 of shape \(3,\)"):
        Signum([vector], use_shape_scaling=True)
    optimizer = Signum([{"params": [vector]}, {"params": [torch.nn.Parameter(torch.zeros(6, 2))], "lr": 1.0}])
    optimizer.param_groups[1]["use_shape_scaling"] = True
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones_like(group["params"][0])
    optimizer.step()
    assert optimizer.param_groups[1]["params"][0].unique().tolist() == [-0.25]
