"""A torch optimizer whose classes declare their options in the signatures of their constructors."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import torch

from emerging_optimizers import registry
from emerging_optimizers.engine.options import (
    LEARNING_RATE,
    NON_NEGATIVE,
    Check,
    Declared,
    EngineOptions,
    declared,
    one_of,
    options_in,
    with_arguments,
)
from emerging_optimizers.engine.weight_decay import WeightDecayMixin, WeightDecayT


class DeclaredOptimizer(WeightDecayMixin, torch.optim.Optimizer):
    """What the options of a class and of its bases are; an option is also an attribute."""

    # What each option may be and what it is where nothing is said, by the constructors of a class and its bases.
    ranges: ClassVar[Mapping[str, Check]] = {
        "lr": LEARNING_RATE,
        "weight_decay": NON_NEGATIVE,
        "weight_decay_method": one_of(*get_args(WeightDecayT)),
        **{name: option.check for name, option in options_in(EngineOptions).items()},
    }
    preset: ClassVar[Mapping[str, Any]] = {
        "weight_decay": 0.0,
        "weight_decay_method": "decoupled",
        **{name: option.default for name, option in options_in(EngineOptions).items()},
    }
    # Options of the base that a class does not leave open: they are in no group and in no checkpoint.
    fixed: ClassVar[Mapping[str, Any]] = {}
    # Methods for users to override that this optimizer calls, and one that has its rule among others does not.
    overridable: ClassVar[tuple[str, ...]] = ()
    # Methods that the published optimizers call and that are not called here.
    uncalled: ClassVar[tuple[str, ...]] = ("_apply_weight_decay_inplace",)
    _arguments: ClassVar[tuple[tuple[str, str], ...]] = ()
    _never_called: ClassVar[Sequence[str]] = ()  # of these, what a user has written
    _inits_groups: ClassVar[bool] = False  # by an `_init_group` of the user's

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        said = Declared(arguments=cls._arguments)
        if "__init__" in own:
            said = declared(own["__init__"], own.get("preset", {}))
        ranges: dict[str, Check] = {}
        preset: dict[str, Any] = {}
        for base in reversed(cls.__mro__[1:]):
            ranges |= vars(base).get("ranges", {})
            preset |= vars(base).get("preset", {})
        ranges |= {**said.ranges, **vars(cls).get("ranges", {})}
        cls.ranges = {name: check for name, check in ranges.items() if name not in cls.fixed}
        cls.preset = {**preset, **said.defaults, **vars(cls).get("preset", {})}
        cls._arguments = said.arguments
        cls._never_called, cls._inits_groups = cls.foreign(cls.uncalled), bool(cls.foreign(["_init_group"]))
        if "__init__" in vars(cls):
            cls.__init__ = _asking_for_lr(cls.__init__)  # type: ignore[method-assign]  # the same signature
        cls.__doc__ = with_arguments(cls.__doc__, said.arguments)

    @property
    def _name(self) -> str:
        return type(self).__name__

    @classmethod
    def foreign(cls, names: Iterable[str]) -> list[str]:
        """Those of some methods that a class outside of the library has overridden, or added."""
        homes = {name: getattr(getattr(cls, name, None), "__module__", None) for name in names}
        return [
            name for name, home in homes.items() if home and not home.startswith(("emerging_optimizers.", "torch."))
        ]

    def _refuse_uncalled(self) -> None:
        """Raise ValueError for a method that a user has written and that would never be called."""
        for name in self._never_called:
            raise ValueError(
                f"{self._name}.{name} would never be called: a step here works on stacks of matrices. To act on "
                "weights, give a weight_update_hook with pre_weight_update_inplace and post_weight_update_inplace; "
                "otherwise write a Rule, or a whole `step` that calls it"
            )

    if not TYPE_CHECKING:  # where a misspelled attribute is an error

        def __getattr__(self, name: str) -> Any:
            """An option, as groups that do not set it have it."""
            try:
                return {**type(self).fixed, **self.__dict__["defaults"]}[name]
            except KeyError:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}") from None

        def __setattr__(self, name: str, value: Any) -> None:
            """Anything; an option is set in every group."""
            if name in self.fixed:
                raise ValueError(f"{self._name}: {name}={value!r} is not possible; it is {self.fixed[name]!r} here")
            if "param_groups" in self.__dict__ and name in self.ranges:
                for group in (self.defaults, *self.param_groups):
                    group[name] = value
            else:
                super().__setattr__(name, value)


def _asking_for_lr(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor; one without a default learning rate names the rate to start from where none is given."""
    parameters = signature(init).parameters
    if "lr" not in parameters or parameters["lr"].default is not Parameter.empty:
        return init
    before = [*parameters].index("lr")

    @wraps(init)
    def asking(self: Any, *args: Any, **kwargs: Any) -> None:
        if "lr" not in kwargs and len(args) < before:
            cls = type(self)
            raise TypeError(f"{cls.__name__} has no default learning rate; {registry.give_lr(cls)}")
        init(self, *args, **kwargs)

    return asking
