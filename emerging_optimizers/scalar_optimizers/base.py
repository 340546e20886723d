"""The published bases of element-wise optimizers with one moment and with two.

A subclass has a rule (`lion.py` shows how short it is), or gives a function of the gradient and its moments and names
the options that it takes; one of `update_functions` will do. A function is called parameter by parameter; a rule is
called once for many, and compiles.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from emerging_optimizers.engine import Rule, RuleOptimizer, Scalars, Step
from emerging_optimizers.engine.hooks import InPlaceLaw, Law, follow
from emerging_optimizers.engine.parts import Part, before_first_step
from emerging_optimizers.engine.rule import Where
from emerging_optimizers.engine.validate import checked_update

__all__ = ["SingleMomentumOptimizer", "TwoMomentsOptimizer"]


@cache
def _state_of(keys: tuple[str, ...]) -> Any:
    return NamedTuple("State", [(key, Annotated[Tensor, Part(rounds=key == "exp_avg")]) for key in keys])


@dataclass(frozen=True, kw_only=True)
class UpdateFunctionRule(Rule):
    """One parameter, its buffers and its step count, to an update; the buffers are written in place."""

    reads = ("step", "parameters")
    elementwise = True
    state_keys: tuple[str, ...]
    function: Callable[..., Tensor]

    def obstacle(self, where: Where) -> str | None:
        """The step count that the function is given."""
        if not where.capturable:
            return super().obstacle(where)
        return "update_fn gets the step count as a number; write a Rule, which gets a tensor (lion.py is one)"

    def init(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
        """Zeros."""
        return before_first_step(_state_of(self.state_keys), shape, dtype, device)

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """The function, on the parameter's own shape."""
        shape = t.parameters[0].shape
        buffers = [x.clone().view(shape) for x in state]
        update = self.function(grad.view(shape), *buffers, step=t.step)
        update = checked_update("update_fn", update, grad.view(shape))
        return Step(update.reshape(grad.shape), type(state)(*(x.view(grad.shape) for x in buffers)))


class ScalarOptimizer(RuleOptimizer):
    """What every optimizer of one or two moments has: two methods around the step of a parameter, to be overridden.

    The step is the class's own rule, or an `update_fn` where one is given.
    """

    rule: ClassVar[type[Rule]] = UpdateFunctionRule
    state_keys: ClassVar[tuple[str, ...]]
    update_fn: Callable[..., Tensor] | None = None
    update_kwarg_names: tuple[str, ...] = ()
    overridable = ("pre_step_inplace", "post_step_inplace")
    _kept = ("execution", "update_fn", "update_kwarg_names")

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any] | None = None,
        *,
        update_fn: Callable[..., Tensor] | None = None,
        update_kwarg_names: tuple[str, ...] = (),
        **options: Any,
    ) -> None:
        defaults = defaults or {}
        if update_fn is None and self.rule is UpdateFunctionRule:
            raise TypeError(f"{self._name} has no rule of its own; give update_fn, a function of gradient and moments")
        if "lr" not in defaults and "lr" not in options:
            raise TypeError(f"{self._name} has no default learning rate; give 'lr' in defaults")
        if missing := set(update_kwarg_names) - defaults.keys():
            raise ValueError(
                f"{self._name}: update_kwarg_names has {', '.join(map(repr, sorted(missing)))}, which defaults has "
                f"not; it has {', '.join(map(repr, defaults))}"
            )
        self.update_fn = update_fn
        self.update_kwarg_names = update_kwarg_names
        super().__init__(params, defaults, **options)

    def _make_rule(self, group: Mapping[str, Any]) -> Rule:
        update_fn = self.update_fn
        if update_fn is None:
            return super()._make_rule(group)

        def function(grad: Tensor, *buffers: Tensor, step: Any) -> Tensor:
            return update_fn(grad, *buffers, **{n: group[n] for n in self.update_kwarg_names}, step=step)

        return UpdateFunctionRule(state_keys=self.state_keys, function=function)

    def _law(self, rule: Rule, group: Mapping[str, Any]) -> Law | None:
        law = super()._law(rule, group)
        if all(getattr(type(self), name) is getattr(ScalarOptimizer, name) for name in self.overridable):
            return law
        return _Around(self, group, law)

    def pre_step_inplace(self, p: Tensor, group: dict[str, Any]) -> Any:
        """What happens to one parameter before weight decay; returns what the other method is to be given."""

    def post_step_inplace(self, p: Tensor, group: dict[str, Any], ctx: Any) -> None:
        """What happens to it afterwards."""


class _Around(InPlaceLaw):
    """A subclass's functions around decay and update."""

    def __init__(self, optimizer: ScalarOptimizer, group: Any, law: Law | None) -> None:
        self.optimizer, self.group, self.law = optimizer, group, law

    def step(self, p: Tensor, update: Tensor, keep: Any, lr: Any) -> None:
        before = self.optimizer.pre_step_inplace(p, self.group)
        follow(self.law, p, update, keep, lr)
        self.optimizer.post_step_inplace(p, self.group, before)


class SingleMomentumOptimizer(ScalarOptimizer):
    """The base of an optimizer with one moment, `exp_avg`.

    Args:
        params: tensors of any shape, (name, tensor) pairs, or groups.
        defaults: the options of a group that does not set them, `lr` and `weight_decay` among them.
        update_fn: `update_fn(grad, exp_avg, *, step, ...)` updates the moment in place and returns the update, shaped
            like the parameter; `step` counts from 1. Gradient and moment are float32 (float64 for float64 parameters).
        update_kwarg_names: the options that it takes beside `step`.
        weight_decay_method: "decoupled", "independent", "l2" or "palm".
        **engine: see `EngineOptions`. `execution="compiled"` is refused.

    Raises:
        ValueError: a name that `defaults` has not, or a value out of its range.

    Example:
        >>> from emerging_optimizers.scalar_optimizers import calculate_lion_update
        >>> class Tiger(SingleMomentumOptimizer):
        ...     def __init__(self, params, lr):
        ...         options = {"lr": lr, "betas": (0.9, 0.99), "weight_decay": 0.0}
        ...         super().__init__(
        ...             params, options, update_fn=calculate_lion_update, update_kwarg_names=("betas",)
        ...         )
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> w.grad = torch.tensor([0.5, -3.0])
        >>> Tiger([w], lr=0.1).step()
        >>> w
        Parameter containing:
        tensor([-0.1000,  0.1000], requires_grad=True)
    """

    state_keys = ("exp_avg",)


class TwoMomentsOptimizer(ScalarOptimizer):
    """The base of an optimizer with two moments, `exp_avg` and `exp_avg_sq`; otherwise as `SingleMomentumOptimizer`.

    Example:
        >>> from emerging_optimizers.scalar_optimizers import calculate_laprop_update
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> options = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "correct_bias": True}
        >>> optimizer = TwoMomentsOptimizer(
        ...     [w], options, update_fn=calculate_laprop_update, update_kwarg_names=("betas", "eps", "correct_bias")
        ... )
        >>> w.grad = torch.tensor([0.5, -3.0])
        >>> optimizer.step()
        >>> w
        Parameter containing:
        tensor([-0.1000,  0.1000], requires_grad=True)
    """

    state_keys = ("exp_avg", "exp_avg_sq")
