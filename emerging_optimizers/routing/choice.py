"""Which optimizer takes a parameter, and at which learning rate."""

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from emerging_optimizers import registry
from emerging_optimizers.routing.roles import TREATMENTS, Finding

FROZEN = "frozen"
OF_ROWS = ("embedding", "head")  # a row belongs to a token

# What `overrides` holds for a pattern: an optimizer, "frozen", or options, of which "optimizer" may be one.
OverrideT = str | Mapping[str, Any]


class Suggestion(dict[str, Any]):
    """Options of a recipe for a pattern; in a model without such parameters they decide nothing."""


class Choice:
    """Which optimizer takes a parameter, by its role and by what was asked for."""

    def __init__(
        self,
        name: str,
        companion: str,
        roles: Mapping[str, str] | None,
        overrides: Mapping[str, OverrideT] | None,
    ) -> None:
        main, side = registry.entry(name), registry.entry(companion)
        if not side.elementwise:
            raise ValueError(
                f"companion={companion!r} updates matrices only; choose an element-wise one: "
                + ", ".join(n for n, e in registry.OPTIMIZERS.items() if e.elementwise)
            )
        self.name, self.companion = name, companion
        self.elementwise = main.elementwise
        self.roles = {role: known_name(f"roles[{role!r}]", value) for role, value in (roles or {}).items()}
        for role in self.roles:
            if role not in TREATMENTS:
                raise ValueError(f"roles: there is no role {role!r}; allowed are {', '.join(TREATMENTS)}")
        self.overrides: dict[str, tuple[Callable[[str, str], bool], dict[str, Any]]] = {}
        for pattern, value in (overrides or {}).items():
            options = {"optimizer": value} if isinstance(value, str) else dict(value)
            if "optimizer" in options:
                options["optimizer"] = known_name(f"overrides[{pattern!r}]", options["optimizer"])
            self.overrides[pattern] = (_matcher(pattern), options)
        self.asked = [pattern for pattern, value in (overrides or {}).items() if not isinstance(value, Suggestion)]
        self.matched: dict[str, bool] = dict.fromkeys(self.overrides, False)
        self.decided: dict[str, bool] = dict.fromkeys(self.overrides, False)

    def of(
        self, name: str, p: Tensor, finding: Finding, factors: bool, factorized: bool
    ) -> tuple[str, str, bool, Mapping[str, Any]]:
        """Optimizer, reason, whether that is a fallback, and options."""
        optimizer, reason, fallback = self._by_role(p, finding, factors, factorized)
        if finding.role in self.roles:
            optimizer, reason, fallback = self.roles[finding.role], f"{reason}; roles[{finding.role!r}]", False
            self._check(f"roles[{finding.role!r}]={optimizer!r}", optimizer, name, p, factors)
        options: Mapping[str, Any] = {}
        found = [pattern for pattern, (matches, _) in self.overrides.items() if matches(name, finding.role)]
        self.matched |= dict.fromkeys(found, True)
        if found:
            self.decided[found[0]] = True
            options = dict(self.overrides[found[0]][1])
            if "optimizer" in options:
                optimizer, reason, fallback = options.pop("optimizer"), f"override {found[0]!r}", False
                self._check(f"overrides[{found[0]!r}]={optimizer!r}", optimizer, name, p, factors)
            else:
                reason = f"{reason}; override {found[0]!r}"
        if finding.role in OF_ROWS and optimizer != FROZEN:
            options = {**registry.entry(optimizer).of_rows, **options}
        return optimizer, reason, fallback, options

    def _by_role(self, p: Tensor, finding: Finding, factors: bool, factorized: bool) -> tuple[str, str, bool]:
        if self.elementwise:
            vector = p.ndim < 2 or finding.role == "vector"
            return (
                self.name,
                "element-wise; vector, no weight decay" if vector else "element-wise: takes any shape",
                False,
            )
        if factors:
            if self.name == "spectron":
                return self.name, finding.reason, False
            return self.companion, f"{finding.reason}: not one matrix, only Spectron takes them", False
        if not TREATMENTS[finding.role].matrix:
            return self.companion, finding.reason, finding.guess
        if 1 in (p.shape[0], p.numel() // max(1, p.shape[0])):
            return self.companion, f"{finding.reason} of one row or column, a vector", finding.guess
        if self.name == "spectron" and factorized:
            return self.companion, "dense in a model of low-rank layers: Spectron would truncate it", True
        return self.name, finding.reason, finding.guess

    @staticmethod
    def _check(given: str, optimizer: str, name: str, p: Tensor, factors: bool) -> None:
        if optimizer == FROZEN or registry.entry(optimizer).elementwise:
            return
        if p.ndim < 2:
            raise ValueError(f"{given} cannot be met: {name!r} of shape {tuple(p.shape)} is not a matrix")
        if factors and optimizer != "spectron":
            raise ValueError(
                f"{given} cannot be met: {name!r} holds two factors of a low-rank layer, not one matrix; "
                "create_optimizer('spectron', model) takes them"
            )

    def check_all_used(self, names: list[str]) -> None:
        """Raise ValueError for a pattern that has decided nothing."""
        if unused := [pattern for pattern in self.asked if not self.matched[pattern]]:
            lines = []
            for pattern in unused:
                close = difflib.get_close_matches(pattern.removeprefix("re:"), names, n=2, cutoff=0.4)
                lines.append(f"{pattern!r}" + (f" (nearest: {', '.join(close)})" if close else ""))
            raise ValueError(f"overrides match no parameter: {', '.join(lines)}")
        if shadowed := [pattern for pattern in self.asked if not self.decided[pattern]]:
            raise ValueError(
                f"overrides decide nothing: {', '.join(map(repr, shadowed))}; all that they match is matched by a "
                "pattern before them. Put the narrower pattern first"
            )


def _matcher(pattern: str) -> Callable[[str, str], bool]:
    """Whether a pattern of `overrides` means a parameter, by its name and role."""
    if pattern in TREATMENTS:
        return lambda name, role: role == pattern or name == pattern
    if pattern.startswith("re:"):
        try:
            search = re.compile(pattern.removeprefix("re:")).search
        except re.error as wrong:
            raise ValueError(f"overrides: {pattern!r} is no regular expression: {wrong}") from None
        return lambda name, role: search(name) is not None
    return lambda name, role: fnmatchcase(name, pattern)


class Rates:
    """The learning rate of each optimizer, out of what was said of two of them; with `match` it is AdamW's.

    Raises:
        ValueError: there is no rate to start from, or a companion that is the optimizer itself has a rate of its own.
    """

    def __init__(self, name: str, companion: str, lr: Any, companion_lr: Any, match: str | None = None) -> None:
        self.name, self.companion, self.lr = name, companion, lr
        if companion_lr is not None and name == companion:
            raise ValueError(f"companion_lr={companion_lr!r}: {name!r} is its own companion and takes lr alone")
        self.match = match
        self.known = {name: default_lr(match or name) if lr is None else lr}
        if companion_lr is not None:
            self.known[companion] = companion_lr
        self._products: dict[tuple[int, float], Tensor] = {}

    def of(self, optimizer: str, parameter: str) -> Any:
        """The rate of an optimizer that takes a parameter; ValueError where `lr` is in another unit."""
        if optimizer not in self.known and self.match is not None:
            self.known[optimizer] = self.known[self.name]
        if optimizer not in self.known:
            mine = registry.entry(self.name)
            if self.lr is not None and not (mine.in_adams_unit and registry.entry(optimizer).in_adams_unit):
                say = f"{default_lr(optimizer):g}"
                raise ValueError(
                    f"lr={self.lr!r} of {self.name!r} says nothing about the learning rate of {optimizer!r}, which "
                    f"takes {parameter!r}: "
                    + (mine.unit if not mine.in_adams_unit else registry.entry(optimizer).unit)
                    + (f". Give companion_lr, {say} say" if optimizer == self.companion
                       else f". Give it in overrides, {{'optimizer': {optimizer!r}, 'lr': {say}}} say")
                )  # fmt: skip
            self.known[optimizer] = default_lr(optimizer) if self.lr is None else self.lr
        return self.known[optimizer]

    def times(self, lr: Any, factor: float) -> Any:
        """A rate in another unit; of one tensor and factor one tensor, so that its parameters stay in one group."""
        if factor == 1:
            return lr
        if isinstance(lr, Tensor):
            return self._products.setdefault((id(lr), factor), lr * factor)
        return lr * factor


def default_lr(name: str) -> Any:
    """The learning rate to start from with `name`: the registry's, else that of its constructor.

    Raises:
        ValueError: there is none.
    """
    if (start := registry.entry(name).start) is not None:
        return start
    default = inspect.signature(registry.entry(name).load()).parameters["lr"].default
    if default is inspect.Parameter.empty:
        raise ValueError(f"{name!r} has no default learning rate; give lr")
    return default


def known_name(where: str, value: Any) -> str:
    """The name of an optimizer, or "frozen", in lower case; `where` is what gives it."""
    if not isinstance(value, str):
        raise ValueError(f"{where}={value!r} is not the name of an optimizer; see list_optimizers()")
    if value.lower() == FROZEN:
        return FROZEN
    try:
        registry.entry(value)
    except ValueError as wrong:
        raise ValueError(f"{where}={value!r}: {wrong}") from None
    return value.lower()
