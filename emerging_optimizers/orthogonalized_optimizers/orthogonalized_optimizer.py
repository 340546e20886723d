r"""The published base of Muon and its relatives: momentum, then a map of the whole matrix that you give.

.. math::
    M_t &= \mu M_{t-1} + (1 - \mu) G_t \\
    N_t &= M_t \quad\text{or, with nesterov,}\quad (1 - \mu) G_t + \mu M_t \\
    W_t &= (1 - \eta\lambda) W_{t-1} - \eta \, O(N_t)

The library's own optimizers have a rule with `update`, and need none of the machinery here: it is for maps that are
Python functions of one matrix, and for subclasses of other people's, such as those of Megatron-LM.

References:
    Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks.
    Bernstein and Newhouse 2024, Old Optimizer, New Norm: An Anthology, arXiv 2409.20325.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from emerging_optimizers.engine import EngineOptions, Rule, RuleOptimizer, Scalars, Step
from emerging_optimizers.engine.hooks import InPlaceLaw, Law, WeightUpdateHook
from emerging_optimizers.engine.options import (
    LearningRate,
    MatmulPrecision,
    MatrixParams,
    Momentum,
    Nesterov,
    WeightDecay,
    WeightDecayMethod,
)
from emerging_optimizers.engine.rule import rule_of
from emerging_optimizers.engine.scalars import make_scalars
from emerging_optimizers.engine.validate import checked_update, suggest
from emerging_optimizers.orthogonalized_optimizers.momentum import MomentumRule, MomentumState, average


@dataclass(frozen=True, kw_only=True)
class FunctionRule(MomentumRule):
    """The map O is a Python function of one parameter and one matrix; the rest is the other base's rule."""

    function: Callable[[Tensor, Tensor], Tensor]

    def update(self, grad: Tensor, state: Any, t: Scalars) -> Step:
        """See the module's equations."""
        momentum_BMN, ahead_BMN = average(grad, state.momentum_buffer, t.momentum, nesterov=self.nesterov)
        return Step(self.orthogonalize(ahead_BMN, t), MomentumState(momentum_BMN))

    def orthogonalize(self, x_BMN: Tensor, t: Scalars) -> Tensor:
        """The function, matrix by matrix."""
        return torch.stack([self.function(p, x_MN) for p, x_MN in zip(t.parameters, x_BMN, strict=True)])


@cache
def _with_function(rule: type[MomentumRule]) -> Any:
    own: dict[str, Any] = {"reads": (*rule.reads, "parameters")}
    if rule.orthogonalize is not MomentumRule.orthogonalize:  # its update does more, and calls that
        own["update"] = rule.update
    return dataclass(frozen=True, kw_only=True)(type(f"Function{rule.__name__}", (FunctionRule, rule), own))


class OrthogonalizedOptimizer(RuleOptimizer):
    """Momentum and a map of the matrix that you give; the equations are in this module's docstring.

    Three ways to give the map: `scaled_orthogonalize_fn`; a subclass that overrides `orthogonalize` (to split a
    fused matrix, say); or a subclass that names its own `MomentumRule`, which is the only one that works on stacks
    and compiles. The first two are called matrix by matrix. An override finds the optimizer's own map, scale
    included, in `scaled_orthogonalize_fn`.

    Raises:
        ValueError: a value out of its range, or a parameter with fewer than two dimensions.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = OrthogonalizedOptimizer(
        ...     [w], lr=1.0, momentum=0.0, weight_decay=0.0, nesterov=False, weight_decay_method="decoupled",
        ...     fp32_matmul_prec="highest", scaled_orthogonalize_fn=torch.sign,
        ... )
        >>> w.grad = torch.tensor([[0.5, -3.0], [2.0, 1.0]])
        >>> optimizer.step()
        >>> w
        Parameter containing:
        tensor([[-1.,  1.],
                [-1., -1.]], requires_grad=True)
    """

    rule: ClassVar[type[MomentumRule]] = MomentumRule
    # Options of the rule beyond this constructor's, for a subclass that calls this one past its own class's, as
    # Megatron-LM's adaptive Muon does: it may set them afterwards, as attributes or in the groups.
    set_later: ClassVar[Mapping[str, Any]] = {}
    overridable = ("orthogonalize", "pre_weight_update_fn_inplace", "post_weight_update_fn_inplace")
    _kept = ("execution", "_function", "_later")
    _group: Mapping[str, Any] | None = None  # whose matrix `orthogonalize` is working on

    def __init__(
        self,
        params: MatrixParams,
        lr: LearningRate,
        momentum: Momentum,
        weight_decay: WeightDecay,
        *,
        nesterov: Nesterov,
        weight_decay_method: WeightDecayMethod,
        fp32_matmul_prec: MatmulPrecision,
        scaled_orthogonalize_fn: Annotated[
            Callable[[Tensor], Tensor] | None,
            "a (M, N) float32 matrix to a (M, N) matrix, scale included. None: the identity, and a warning, unless a "
            "subclass says otherwise.",
        ] = None,
        **kwargs: Annotated[
            Any, "see `EngineOptions`; anything else becomes an entry of the groups and reaches `orthogonalize`."
        ],
    ) -> None:
        self._function = scaled_orthogonalize_fn
        if scaled_orthogonalize_fn is None and not self._overrides and self.rule is MomentumRule:
            warnings.warn(
                "OrthogonalizedOptimizer without scaled_orthogonalize_fn is SGD with momentum: the update is the "
                "momentum itself. Give a function, or use a subclass such as Muon.",
                UserWarning,
                stacklevel=2,
            )
        engine = {name: kwargs.pop(name) for name in EngineOptions.__annotations__ if name in kwargs}
        for name in kwargs.keys() - self.ranges.keys():
            hint = suggest(name, (*self.ranges, *EngineOptions.__annotations__, "weight_decay", "weight_decay_method"))
            if hint or self.rule is not MomentumRule:  # a rule of its own reads no notes of the user's
                raise TypeError(f"{self._name} has no argument {name!r}{hint}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "weight_decay_method": weight_decay_method,
            "fp32_matmul_prec": fp32_matmul_prec,
            **kwargs,
        }
        self._later = {name: value for name, value in self.set_later.items() if name not in {**self.preset, **defaults}}
        super().__init__(params, defaults, **engine)
        for group in self.param_groups:  # its check has filled them in, for the check alone
            for name, value in self._later.items():
                if group[name] is value:
                    del group[name]
        self._forget_stacks()

    def _checked_rule(self, index: int) -> Rule:
        """Where the options that were set later arrive."""
        group = self.param_groups[index]
        for name, value in self._later.items():
            group.setdefault(name, getattr(self, name, value))
        return super()._checked_rule(index)

    @property
    def _overrides(self) -> bool:
        return type(self).orthogonalize is not OrthogonalizedOptimizer.orthogonalize

    def _make_rule(self, group: Mapping[str, Any]) -> Rule:
        if self._function is None and not self._overrides:
            return super()._make_rule(group)

        name = f"{self._name}.orthogonalize" if self._overrides else "scaled_orthogonalize_fn"

        def function(p: Tensor, x_MN: Tensor) -> Tensor:
            # Read now: an entry of the group may be set at any time.
            options = {name: value for name, value in group.items() if name not in ("params", "param_names")}
            self._group = options
            try:
                return checked_update(name, self.orthogonalize(p, x_MN, **options), x_MN)
            finally:
                self._group = None

        return rule_of(_with_function(type(self).rule), {**group, "function": function})

    def orthogonalize(self, p: Tensor, grad: Tensor, **kwargs: Any) -> Tensor:
        """The map O of one matrix; override it to change it. Overridden, it is called matrix by matrix.

        Args:
            p: the parameter that the matrix belongs to.
            grad: (M, N), the momentum or, with nesterov, the matrix one step ahead; float32.
            **kwargs: the parameter group without its parameters.

        Raises:
            ValueError: `grad` is not a matrix.
        """
        if grad.ndim != 2:
            raise ValueError(f"orthogonalize takes one matrix; given is a tensor of shape {tuple(grad.shape)}")
        return self.scaled_orthogonalize_fn(grad)

    @property
    def scaled_orthogonalize_fn(self) -> Callable[..., Tensor]:
        """The map O with its scale: the function that was given, else the optimizer's own.

        The optimizer's own takes one matrix or a stack of them, in float32. It follows the options of the group whose
        matrix `orthogonalize` is called for; outside a step, those that a group without options of its own has.
        """
        return self._map if self._function is None else self._function

    @scaled_orthogonalize_fn.setter
    def scaled_orthogonalize_fn(self, function: Callable[..., Tensor] | None) -> None:
        self._function = function
        self._forget_stacks()

    def pre_weight_update_fn_inplace(self, p: Tensor, update: Tensor) -> None:
        """What happens to one parameter, decayed already, and its update before W <- W - lr U; override it."""

    def post_weight_update_fn_inplace(self, p: Tensor) -> None:
        """What happens to one parameter after that; override it."""

    def _law(self, rule: Rule, group: Mapping[str, Any]) -> Law | None:
        law = super()._law(rule, group)
        names = ("pre_weight_update_fn_inplace", "post_weight_update_fn_inplace")
        if all(getattr(type(self), name) is getattr(OrthogonalizedOptimizer, name) for name in names):
            return law
        if rule.weight_law is not None:
            raise ValueError(
                f"{self._name} has a law of its own for the weight; override neither {' nor '.join(names)}"
            )
        if isinstance(law, WeightUpdateHook) and type(law).move is not WeightUpdateHook.move:
            raise ValueError(
                f"{self._name}: weight_update_hook={law!r} moves a weight in one function, `move`, and leaves no place "
                f"for {' and '.join(names)}; give it `direct` and `retract` instead, or override neither"
            )
        return _Around(self, law)

    def _map(self, x: Tensor) -> Tensor:
        options = self.defaults if self._group is None else self._group
        rule = rule_of(type(self).rule, options)
        stack = x if x.ndim == 3 else x[None]
        return rule.orthogonalize(stack, make_scalars(rule.reads, options, {})).view(x.shape)


class _Around(InPlaceLaw):
    """A subclass's functions before and after the update, outside those of a law."""

    def __init__(self, optimizer: OrthogonalizedOptimizer, law: Law | None) -> None:
        self.optimizer, self.law = optimizer, law

    def step(self, p: Tensor, update: Tensor, keep: Any, lr: Any) -> None:
        old = p.clone()
        p.mul_(keep)
        update = update.clone()
        self.optimizer.pre_weight_update_fn_inplace(p, update)
        end = self._begin(p, update, old)
        p.sub_(update * lr)
        self.optimizer.post_weight_update_fn_inplace(p)
        end()

    def _begin(self, p: Tensor, update: Tensor, old: Tensor) -> Callable[[], None]:
        """What the law does before the update; returns what it does afterwards."""
        law = self.law
        if law is None:
            return lambda: None
        if isinstance(law, InPlaceLaw):
            return partial(law.hook.post_weight_update_inplace, p, law.hook.pre_weight_update_inplace(p, update))
        decayed = p.clone()
        law.turn(p, update, old)
        return partial(law.land, p, old, decayed)
