r"""Laws by which a weight moves, instead of :math:`W_t = k W_{t-1} - \eta U`.

k is the weight decay's factor and U the optimizer's update. All norms are Frobenius norms of one matrix (for an
element-wise optimizer: of one parameter), and :math:`\hat X = X / \|X\|`.

=========================  ===========================================================================================
hook                       the new weight
=========================  ===========================================================================================
``hyperball``              :math:`R \, \hat Y`, where :math:`Y = k W_{t-1} - \eta R \, \hat U`
``relative_update``        :math:`k W_{t-1} - \eta \, \|k W_{t-1}\| \, \hat U`
``radial_brake``           :math:`(\|k W_{t-1}\| + s (\|Y\| - \|k W_{t-1}\|)) \, \hat Y`, where
                           :math:`Y = k W_{t-1} - \eta U`; s depends on the sign of the change
``update_floor``           :math:`k W_{t-1} - \eta \max(1, \rho \|W_{t-1}\| / \|U\|) \, U`
``row_update_floor``       the same, with the norms of each row
``spectral_clip``          :math:`k W_{t-1} - \eta \, \mathrm{cap}_\beta(U)`
``spectral_weight_decay``  :math:`(1 - c) Y + c \, \mathrm{cap}_\beta(Y)`, where :math:`Y = k W_{t-1} - \eta U`
=========================  ===========================================================================================

:math:`\mathrm{cap}_\beta` replaces every singular value s by min(s, beta).

References:
    Wen et al. 2026, Fantastic Pretraining Optimizers and Where to Find Them II: Hyperball Optimization,
        arXiv 2606.16899.
    Cesista 2025, Fast, Numerically Stable, and Auto-Differentiable Spectral Clipping via Newton-Schulz Iteration.
    KellerJordan/modded-nanogpt 2026, pull requests 274 (update_floor) and 328 (row_update_floor).
"""

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, astuple, dataclass, fields
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from emerging_optimizers.engine.scalars import is_number
from emerging_optimizers.linalg.spectral_clipping import spectral_clipped_weight_decay, spectral_hardcap

HookStateT = TypeVar("HookStateT")


class WeightUpdateHook(Generic[HookStateT]):
    """A law by which a weight moves: another direction, and where the new weight is taken afterwards.

    A law of your own is written in one of two ways. Either as pure functions of stacks, whose first axis runs over what
    has a norm of its own: `direct` and `retract`, or `move` for all of it; they read no value on the host. Or as the
    published library has it, `pre_weight_update_inplace` and `post_weight_update_inplace`, which are called with one
    parameter after the other and modify it; any object that has these two will do. They cannot be compiled, and a
    checkpoint does not hold them.

    Attributes:
        matrices_only: it is about singular values or rows, and an element-wise optimizer cannot follow it.
    """

    matrices_only: ClassVar[bool] = False

    def direct(self, update: Tensor, old: Tensor, decayed: Tensor) -> Tensor:
        """What the learning rate multiplies; `decayed` is the old weight after weight decay."""
        return update

    def retract(self, free: Tensor, old: Tensor, decayed: Tensor) -> Tensor:
        """The new weight, of what `decayed - lr * direction` is."""
        return free

    def move(self, weight: Tensor, update: Tensor, keep: Any, lr: Any) -> Tensor:
        """The new weights of a stack."""
        decayed = weight * keep
        return self.retract(decayed - lr * self.direct(update, weight, decayed), weight, decayed)

    def pre_weight_update_inplace(self, p: Tensor, update: Tensor) -> HookStateT:
        """Turn one parameter's update into a direction, in place; returns what the other method is to be given.

        p has decayed, and stands for the old weight: a norm that is kept is the one after weight decay.
        """
        self.turn(p, update, p)
        before: Any = p.detach().clone()
        return before

    def post_weight_update_inplace(self, p: Tensor, pre_update_state: HookStateT) -> None:
        """Take one parameter, decayed and moved, to where it belongs, in place."""
        before: Any = p if pre_update_state is None else pre_update_state
        self.land(p, before, before)

    def turn(self, p: Tensor, update: Tensor, old: Tensor) -> None:
        """`direct` for one matrix or parameter p, which has decayed, in place."""
        update.copy_(self.direct(_one(update), _one(old), _one(p)).view(update.shape))

    def land(self, p: Tensor, old: Tensor, decayed: Tensor) -> None:
        """`retract` for the same, which has moved by now, in place."""
        p.copy_(self.retract(_one(p), _one(old), _one(decayed)).view(p.shape))


class NoOpWeightUpdateHook(WeightUpdateHook[Any]):
    """The ordinary update; a group holds it as `weight_update_hook=None`."""


class InPlaceLaw:
    """A law that is two functions of one parameter: the engine hands over the parameter itself, not a stack."""

    matrices_only = False

    def __init__(self, hook: Any) -> None:
        self.hook = hook

    def step(self, p: Tensor, update: Tensor, keep: Any, lr: Any) -> None:
        """Decay, and the update between the two functions."""
        p.mul_(keep)
        update = update.clone()  # which may be the momentum itself
        before = self.hook.pre_weight_update_inplace(p, update)
        p.sub_(update * lr)
        self.hook.post_weight_update_inplace(p, before)


@dataclass(frozen=True)
class HyperballHook(WeightUpdateHook[Any]):
    """Keep the weight on a sphere; the learning rate is the angle of a step, nearly.

    A zero weight has no sphere of its own: with `radius=None` it stays zero.

    Args:
        radius: of the sphere, > 0; None: the norm that each matrix has.
        eps: smaller norms count as zero, > 0.
    """

    radius: float | None = None
    eps: float = 1e-15

    def __post_init__(self) -> None:
        _check_positive("eps", self.eps)
        if self.radius is not None and not (is_number(self.radius) and self.radius >= self.eps):
            raise ValueError(f"radius={self.radius!r} is not allowed; give None or a finite number >= eps={self.eps}")

    def direct(self, update: Tensor, old: Tensor, decayed: Tensor) -> Tensor:
        return self._of(old) * _unit(update, self.eps)

    def retract(self, free: Tensor, old: Tensor, decayed: Tensor) -> Tensor:
        return self._of(old) * _unit(free, self.eps)

    def _of(self, old: Tensor) -> Any:
        return _norm(old) if self.radius is None else self.radius


@dataclass(frozen=True)
class RadialBrakeHook(WeightUpdateHook[Any]):
    """Let only a share of each change of the weight's norm happen; its direction moves as ever.

    Args:
        outward_scale: share of a growth, in [0, 1].
        inward_scale: share of a shrinkage, in [0, 1].
        eps: smaller norms count as zero, > 0.
    """

    outward_scale: float = 0.5
    inward_scale: float = 1.0
    eps: float = 1e-15

    def __post_init__(self) -> None:
        _check_positive("eps", self.eps)
        for name in ("outward_scale", "inward_scale"):
            _check_share(name, getattr(self, name))

    def retract(self, free: Tensor, old: Tensor, decayed: Tensor) -> Tensor:
        before, after = _norm(decayed), _norm(free)
        change = after - before
        kept = torch.where(change > 0, self.outward_scale * change, self.inward_scale * change)
        kept = torch.where(change.abs() < self.eps, 0, kept)
        return (before + kept) * _unit(free, self.eps)


@dataclass(frozen=True)
class RelativeUpdateHook(WeightUpdateHook[Any]):
    """Make the learning rate the relative change of the weight: the update gets the weight's norm.

    A zero weight stays zero.

    Args:
        eps: smaller norms count as zero, > 0.
    """

    eps: float = 1e-15

    def __post_init__(self) -> None:
        _check_positive("eps", self.eps)

    def direct(self, update: Tensor, old: Tensor, decayed: Tensor) -> Tensor:
        norm = _norm(decayed)
        return torch.where(norm < self.eps, 0, norm * _unit(update, self.eps))


@dataclass(frozen=True)
class UpdateFloorHook(WeightUpdateHook[Any]):
    """Lengthen an update that is short beside its weight, so that weights that have grown still turn.

    An update that is zero, and one of a weight that is zero, stays as it is.

    Args:
        ratio: the least norm of an update, before the learning rate, in norms of the weight, > 0. A step then changes
            the weight by at least the share `lr * ratio`; Muon's updates, of an RMS of 1, are lengthened where the
            weight's RMS is above 1 / ratio.
    """

    ratio: float

    def __post_init__(self) -> None:
        _check_positive("ratio", self.ratio)

    def direct(self, update: Tensor, old: Tensor, decayed: Tensor) -> Tensor:
        least, norm = self.ratio * self.norm(old), self.norm(update)
        return torch.where((norm > 0) & (norm < least), least * (update / norm), update)

    def norm(self, stack: Tensor) -> Tensor:
        """Of what is lengthened as one."""
        return _norm(stack)


@dataclass(frozen=True)
class RowUpdateFloorHook(UpdateFloorHook):
    """The same for each row of a matrix; a row is what an output of the layer has for itself.

    Args:
        ratio: the least norm of an update's row, before the learning rate, in norms of the weight's row, > 0.
    """

    matrices_only = True

    def norm(self, stack: Tensor) -> Tensor:
        return torch.linalg.vector_norm(stack, dim=-1, keepdim=True)


@dataclass(frozen=True)
class SpectralClipHook(WeightUpdateHook[Any]):
    """Bound the singular values of the update.

    Args:
        beta: the bound, > 0.
    """

    matrices_only = True
    beta: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("beta", self.beta)

    def direct(self, update: Tensor, old: Tensor, decayed: Tensor) -> Tensor:
        return spectral_hardcap(update, self.beta)


@dataclass(frozen=True)
class SpectralWeightDecayHook(WeightUpdateHook[Any]):
    """Decay only what the weight's singular values have above a bound; c = 1 keeps the weight in the spectral ball.

    The optimizer's own weight decay goes on; set it to 0 to have this one alone.

    Args:
        beta: the bound, > 0.
        c: share of the excess that goes in each step, in [0, 1].
    """

    matrices_only = True
    beta: float = 1.0
    c: float = 0.5

    def __post_init__(self) -> None:
        _check_positive("beta", self.beta)
        _check_share("c", self.c)

    def retract(self, free: Tensor, old: Tensor, decayed: Tensor) -> Tensor:
        return spectral_clipped_weight_decay(free, self.beta, self.c)


class KeepNorm(WeightUpdateHook[Any]):
    """Give every parameter the Frobenius norm that it had before the step, weight decay undone (0 if it became 0)."""

    def retract(self, free: Tensor, old: Tensor, decayed: Tensor) -> Tensor:
        return _norm(old) * _unit(free, torch.finfo(free.dtype).tiny)


class Replace(WeightUpdateHook[Any]):
    """The update is the new weight itself."""

    def move(self, weight: Tensor, update: Tensor, keep: Any, lr: Any) -> Tensor:
        return update


REPLACE = Replace()


def follow(law: "Law | None", p: Tensor, update: Tensor, keep: Any, lr: Any) -> None:
    """One parameter's step by any law, in place."""
    if isinstance(law, InPlaceLaw):
        law.step(p, update, keep, lr)
    elif law is None:
        p.mul_(keep).sub_(update * lr)
    else:
        keep = _one(keep) if isinstance(keep, Tensor) and keep.ndim else keep
        p.copy_(law.move(_one(p), _one(update), keep, lr).view(p.shape))


# The names under which parameter groups, and with them checkpoints, hold a hook as plain data: (name, *arguments).
HOOKS: Mapping[str, type[WeightUpdateHook[Any]]] = {
    "hyperball": HyperballHook,
    "radial_brake": RadialBrakeHook,
    "relative_update": RelativeUpdateHook,
    "row_update_floor": RowUpdateFloorHook,
    "spectral_clip": SpectralClipHook,
    "spectral_weight_decay": SpectralWeightDecayHook,
    "update_floor": UpdateFloorHook,
}
ALLOWED = f"None, a hook, its name ({', '.join(HOOKS)}) or (name, its arguments)"
_NAMES = {cls: name for name, cls in HOOKS.items()}
WeightUpdateHookT = WeightUpdateHook[Any] | str | tuple[Any, ...] | None
Law = WeightUpdateHook[Any] | InPlaceLaw


def make_hook(value: WeightUpdateHookT) -> Law | None:
    """A hook from its name, its plain data, or itself; None: the ordinary update.

    Raises:
        ValueError: an unknown name, or arguments that the hook refuses.

    Example:
        >>> make_hook(("hyperball", 5.0))
        HyperballHook(radius=5.0, eps=1e-15)
    """
    if value is None or type(value) is NoOpWeightUpdateHook:
        return None
    if _is_in_place(value):
        return InPlaceLaw(value)
    if isinstance(value, WeightUpdateHook):
        return value
    name, *arguments = value if isinstance(value, (tuple, list)) and value else (value,)
    if not isinstance(name, str):
        raise ValueError(f"give {ALLOWED}")
    if name not in HOOKS:
        close = difflib.get_close_matches(name, HOOKS, n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{name!r} is not one of {', '.join(HOOKS)}{meant}")
    options = fields(HOOKS[name])  # type: ignore[arg-type]  # every hook is a dataclass
    needed = [x for x in options if x.default is MISSING]
    if not len(needed) <= len(arguments) <= len(options):
        takes = ", ".join(x.name if x in needed else f"{x.name}={x.default!r}" for x in options)
        raise ValueError(f"these are not its arguments; give ({name!r}, {takes})")
    return HOOKS[name](*arguments)


def _is_in_place(value: Any) -> bool:
    """Whether it has published methods of its own, which it may without being a `WeightUpdateHook`."""
    names = ("pre_weight_update_inplace", "post_weight_update_inplace")
    return (
        not isinstance(value, type)
        and all(hasattr(value, name) for name in names)
        and any(getattr(type(value), name, None) is not getattr(WeightUpdateHook, name) for name in names)
    )


def plain_hook(hook: WeightUpdateHook[Any]) -> Any:
    """What a checkpoint can hold of a hook: (name, *arguments); a class of the user's own stays as it is."""
    if type(hook) is NoOpWeightUpdateHook:
        return None
    name = _NAMES.get(type(hook))
    return hook if name is None else (name, *astuple(hook))  # type: ignore[call-overload]  # every hook is a dataclass


def _one(x: Tensor) -> Tensor:
    """One matrix or parameter as a stack of one, in at least float32; a convolution as (out, rest)."""
    x = x if x.dtype == torch.float64 else x.float()
    if x.ndim == 3 and len(x) == 1:  # a matrix of a batch
        return x
    return (x.flatten(1) if x.ndim > 2 else x).unsqueeze(0)


def _norm(stack: Tensor) -> Tensor:
    return torch.linalg.vector_norm(stack, dim=tuple(range(1, stack.ndim)), keepdim=True)


def _unit(stack: Tensor, eps: float) -> Tensor:
    """Of norm 1, or zero where there is no direction."""
    norm = _norm(stack)
    return torch.where(norm < eps, 0, stack / norm)


def _check_positive(name: str, value: Any) -> None:
    if not (is_number(value) and value > 0):
        raise ValueError(f"{name}={value!r} is not allowed; give a finite number > 0")


def _check_share(name: str, value: Any) -> None:
    if not (is_number(value) and 0 <= value <= 1):
        raise ValueError(f"{name}={value!r} is not allowed; give a number in [0, 1]")
