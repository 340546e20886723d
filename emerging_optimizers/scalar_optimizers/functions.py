r"""The element-wise rules as functions: one update of tensors that the caller keeps.

Each function is one call of its optimizer's rule, whose module has the equations. State tensors are updated in place
and the update is returned, for :math:`W \leftarrow W - \eta\, U`; the learning rate, weight decay and the count of
steps are the caller's. Functions run eagerly; `torch.compile` may be put around a caller.

Example:
    >>> grad, exp_avg = torch.tensor([1.0, -2.0]), torch.zeros(2)
    >>> calculate_lion_update(grad, exp_avg, betas=(0.9, 0.99))
    tensor([ 1., -1.])
    >>> exp_avg
    tensor([ 0.0100, -0.0200])
"""

from typing import Any

import torch
from torch import Tensor

from emerging_optimizers.engine import Rule
from emerging_optimizers.engine.scalars import make_scalars
from emerging_optimizers.scalar_optimizers.adamw import AdamState, AdamWRule
from emerging_optimizers.scalar_optimizers.ademamix import AdEMAMixRule, AdEMAMixState
from emerging_optimizers.scalar_optimizers.laprop import LaPropRule
from emerging_optimizers.scalar_optimizers.lion import LionRule, LionState
from emerging_optimizers.scalar_optimizers.madam import EVEN, MAdamRule, MAdamState
from emerging_optimizers.scalar_optimizers.rmsprop import RMSPropRule, RMSPropState
from emerging_optimizers.scalar_optimizers.signum import SignumRule, SignumState
from emerging_optimizers.scalar_optimizers.sim_ademamix import SimplifiedAdEMAMixRule

__all__ = [
    "calculate_adam_update",
    "calculate_ademamix_update",
    "calculate_laprop_update",
    "calculate_lion_update",
    "calculate_madam_update",
    "calculate_rmsprop_update",
    "calculate_signum_update",
    "calculate_sim_ademamix_update",
]


@torch.no_grad()
def _advance(rule: Rule, grad: Tensor, state: Any, **scalars: Any) -> Tensor:
    """The update of a rule, whose new state takes the place of the old one."""
    if not isinstance(step := scalars.get("step"), Tensor) and step is not None and step < 1:
        raise ValueError(f"step={step!r} is not allowed; it counts from 1, the first update included")
    out = rule.update(grad, state, make_scalars((), {}, scalars))
    for old, new in zip(state, out.state, strict=True):
        old.copy_(new)
    return out.direction


def calculate_adam_update(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    correct_bias: bool,
    nesterov: bool,
    step: int,
) -> Tensor:
    """Adam's update; see `scalar_optimizers.adamw`.

    Args:
        grad: the gradient, of any shape.
        exp_avg: first moment, updated in place.
        exp_avg_sq: second moment, updated in place.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        correct_bias: divide the moments by 1 - beta^step.
        nesterov: look one step ahead.
        step: the number of this step, from 1.

    Returns:
        The update, shaped like the gradient.
    """
    rule = AdamWRule(correct_bias=correct_bias, nesterov=nesterov)
    return _advance(rule, grad, AdamState(exp_avg, exp_avg_sq), betas=betas, eps=eps, step=step)


def calculate_laprop_update(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    correct_bias: bool,
    step: int,
) -> Tensor:
    """LaProp's update; see `scalar_optimizers.laprop`.

    Args:
        grad: the gradient, of any shape.
        exp_avg: momentum of the normalised gradient, updated in place.
        exp_avg_sq: second moment, updated in place.
        betas: decay of the momentum and of the second moment.
        eps: added to the root of the second moment.
        correct_bias: divide the moments by 1 - beta^step.
        step: the number of this step, from 1.

    Returns:
        The update, shaped like the gradient.
    """
    rule = LaPropRule(correct_bias=correct_bias)
    return _advance(rule, grad, AdamState(exp_avg, exp_avg_sq), betas=betas, eps=eps, step=step)


def calculate_lion_update(
    grad: Tensor, exp_avg: Tensor, *, betas: tuple[float, float], step: int | None = None
) -> Tensor:
    """Lion's update; see `scalar_optimizers.lion`.

    Args:
        grad: the gradient, of any shape.
        exp_avg: momentum, updated in place.
        betas: weight of the old momentum in the update, and decay of the momentum.
        step: has no effect; every function of this module takes it.

    Returns:
        The update, shaped like the gradient.
    """
    return _advance(LionRule(), grad, LionState(exp_avg), betas=betas)


def calculate_signum_update(
    grad: Tensor,
    exp_avg: Tensor,
    *,
    momentum: float,
    correct_bias: bool,
    nesterov: bool,
    step: int,
    use_shape_scaling: bool = False,
) -> Tensor:
    """Signum's update; see `scalar_optimizers.signum`.

    Args:
        grad: the gradient, of any shape.
        exp_avg: momentum, updated in place.
        momentum: its decay.
        correct_bias: divide by 1 - momentum^step; only nesterov sees it.
        nesterov: look one step ahead.
        step: the number of this step, from 1.
        use_shape_scaling: multiply by 2 / (rows + columns); for matrices.

    Returns:
        The update, shaped like the gradient.

    Raises:
        ValueError: shape scaling of a vector.
    """
    if use_shape_scaling and grad.ndim < 2:
        raise ValueError(f"use_shape_scaling=True needs a matrix; the gradient has shape {tuple(grad.shape)}")
    rule = SignumRule(correct_bias=correct_bias, nesterov=nesterov, use_shape_scaling=use_shape_scaling)
    return _advance(rule, grad, SignumState(exp_avg), momentum=momentum, step=step)


def calculate_ademamix_update(
    grad: Tensor,
    exp_avg_fast: Tensor,
    exp_avg_slow: Tensor,
    exp_avg_sq: Tensor,
    *,
    betas: tuple[float, float, float],
    eps: float,
    correct_bias: bool,
    step: int,
    num_beta_slow_warmup_steps: int | None,
    num_alpha_warmup_steps: int | None,
    alpha: float = 2,
) -> Tensor:
    """AdEMAMix's update; see `scalar_optimizers.ademamix`.

    Args:
        grad: the gradient, of any shape.
        exp_avg_fast: fast first moment, updated in place.
        exp_avg_slow: slow first moment, updated in place.
        exp_avg_sq: second moment, updated in place.
        betas: decay of the fast first moment, of the second moment, and of the slow first moment.
        eps: added to the root of the second moment.
        correct_bias: divide the fast and the second moment by 1 - beta^step.
        step: the number of this step, from 1.
        num_beta_slow_warmup_steps: steps over which the slow moment slows down; None: slow from the start.
        num_alpha_warmup_steps: steps over which alpha grows from 0; None: alpha from the start.
        alpha: weight of the slow moment.

    Returns:
        The update, shaped like the gradient.
    """
    rule = AdEMAMixRule(
        correct_bias=correct_bias,
        num_beta_slow_warmup_steps=num_beta_slow_warmup_steps,
        num_alpha_warmup_steps=num_alpha_warmup_steps,
    )
    state = AdEMAMixState(exp_avg_fast, exp_avg_slow, exp_avg_sq)
    return _advance(rule, grad, state, betas=betas, eps=eps, alpha=alpha, step=step)


def calculate_sim_ademamix_update(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    correct_bias: bool,
    step: int,
    num_beta_fast_warmup_steps: int | None,
    min_beta_fast: float,
    alpha: float = 2,
) -> Tensor:
    """Simplified AdEMAMix's update; see `scalar_optimizers.sim_ademamix`.

    Args:
        grad: the gradient, of any shape.
        exp_avg: momentum, a sum of gradients, updated in place.
        exp_avg_sq: second moment, updated in place.
        betas: decay of the momentum and of the second moment.
        eps: added to the root of the second moment.
        correct_bias: make averages of the moments.
        step: the number of this step, from 1.
        num_beta_fast_warmup_steps: steps over which the momentum slows down; None: slow from the start.
        min_beta_fast: where its decay begins then.
        alpha: weight of the gradient itself.

    Returns:
        The update, shaped like the gradient.
    """
    rule = SimplifiedAdEMAMixRule(correct_bias=correct_bias, num_beta_fast_warmup_steps=num_beta_fast_warmup_steps)
    state = AdamState(exp_avg, exp_avg_sq)
    return _advance(rule, grad, state, betas=betas, eps=eps, alpha=alpha, min_beta_fast=min_beta_fast, step=step)


def calculate_madam_update(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq_scaled: Tensor,
    *,
    betas: tuple[float, float],
    correct_bias: bool,
    step: int,
    scale_log2: int,
) -> Tensor:
    """MAdam's update; see `scalar_optimizers.madam`.

    Args:
        grad: the gradient, of any shape.
        exp_avg: first moment, updated in place.
        exp_avg_sq_scaled: second moment times 2^scale_log2, updated in place.
        betas: decay of the first and second moment.
        correct_bias: divide the moments by 1 - beta^step.
        step: the number of this step, from 1.
        scale_log2: an even integer, the same in every step.

    Returns:
        The update, shaped like the gradient; zero where the second moment is.

    Raises:
        ValueError: `scale_log2` is not even.
    """
    if not EVEN.holds(scale_log2):
        raise ValueError(f"scale_log2={scale_log2!r} is not allowed; give {EVEN.allowed}")
    rule = MAdamRule(correct_bias=correct_bias, scale_log2=scale_log2)
    return _advance(rule, grad, MAdamState(exp_avg, exp_avg_sq_scaled), betas=betas, step=step)


def calculate_rmsprop_update(
    grad: Tensor, exp_avg_sq: Tensor, *, alpha: float, eps: float, step: int | None = None
) -> Tensor:
    """RMSProp's update; see `scalar_optimizers.rmsprop`.

    Args:
        grad: the gradient, of any shape.
        exp_avg_sq: second moment, updated in place.
        alpha: its decay.
        eps: added to its root.
        step: has no effect, since nothing is bias-corrected; every function of this module takes it.

    Returns:
        The update, shaped like the gradient.
    """
    return _advance(RMSPropRule(), grad, RMSPropState(exp_avg_sq), alpha=alpha, eps=eps)
