"""`check_optimizer`: what people do around an optimizer, tried on any torch optimizer."""

import inspect
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emerging_optimizers import registry
from emerging_optimizers.testing.checks_of_state import CHECKS as OF_STATE
from emerging_optimizers.testing.checks_of_steps import CHECKS as OF_STEPS
from emerging_optimizers.testing.subject import Check, DoesNotApplyError, MakeT, Subject

_KNOWN = "a name from `eopt list`"
CHECKS = (*OF_STEPS, *OF_STATE)
_OF_AN_OPTIMIZER = ("step", "zero_grad", "param_groups", "state", "state_dict", "load_state_dict")
# Two matrices of one shape, another one, and a vector.
SHAPES = ((6, 4), (6, 4), (3, 5), (4,))


class Row(NamedTuple):
    """What came of a check.

    Attributes:
        name: of the check.
        passed: None: it does not apply.
        reason: of a failure, or why it does not apply; else what was seen.
        link: to what users rely on.
    """

    name: str
    passed: bool | None
    reason: str
    link: str


class Report(Sequence[Row]):
    """The rows of a table; `print(report)` shows it."""

    def __init__(self, subject: str, rows: Sequence[Row]) -> None:
        self.subject, self._rows = subject, [*rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    @property
    def failures(self) -> list[Row]:
        """The rows of checks that failed."""
        return [row for row in self._rows if row.passed is False]

    def to_json(self) -> dict[str, Any]:
        """As a dictionary of plain values."""
        return {"subject": self.subject, "rows": [row._asdict() for row in self._rows]}

    def __str__(self) -> str:
        words = {True: "passes", False: "FAILS", None: "-"}
        width = max(len(row.name) for row in self._rows)
        lines = [f"{row.name:{width}}  {words[row.passed]:6}  {row.reason}  {row.link}" for row in self._rows]
        applied = [row for row in self._rows if row.passed is not None]
        passed = len(applied) - len(self.failures)
        return "\n".join([*lines, "", f"{self.subject}: {passed} of {len(applied)} checks pass"])


def check_optimizer(
    make_optimizer: MakeT,
    *,
    name: str | None = None,
    shapes: Sequence[Sequence[int]] = SHAPES,
    only: Collection[str] = (),
    layout: Callable[[Tensor], Tensor] | None = None,
    raises: bool = True,
) -> Report:
    """Try on an optimizer what people do around one: schedulers, scalers, clipping, edits, copies, checkpoints.

    It takes any torch optimizer, in one process, on small parameters, in seconds. An optimizer that refuses vectors is
    checked on matrices. Ambient settings that a check changes are put back.

    Args:
        make_optimizer: from a list of parameters to the optimizer, the same one at every call.
        name: what to call it; None: the name of its class.
        shapes: of the parameters.
        only: names of checks, see `emerging_optimizers.testing.conformance.CHECKS`; empty: all.
        layout: shards a tensor, as in `lambda x: distribute_tensor(x, mesh, [Shard(0)])`: then every process of the
            default group calls this, and the parameters are sharded. None: they are not.
        raises: whether a failure is an AssertionError with the table in it.

    Returns:
        What came of each check, which prints as a table: its name, whether it passes, a reason, and a link to what
        users rely on.

    Raises:
        AssertionError: a check fails, and `raises` is true.
        ValueError: an unknown check.
        TypeError: what `make_optimizer` gives is no optimizer.

    Example:
        >>> from emerging_optimizers import Muon
        >>> report = check_optimizer(lambda params: Muon(params, lr=0.01), only=["a closure", "a learning rate of 0"])
        >>> [(row.name, row.passed) for row in report]
        [('a closure', True), ('a learning rate of 0', True)]
    """
    if unknown := set(only) - {check.name for check in CHECKS}:
        raise ValueError(
            f"only={sorted(unknown)[0]!r} is no check; there are {', '.join(repr(check.name) for check in CHECKS)}"
        )
    subject = Subject(make_optimizer, shapes, layout)
    try:
        optimizer = subject.optimizer(subject.parameters())
    except Exception:  # of whatever kind: it may be one for matrices
        subject = Subject(make_optimizer, [shape for shape in shapes if len(shape) > 1], layout)
        optimizer = subject.optimizer(subject.parameters())
    if lacking := [name for name in _OF_AN_OPTIMIZER if not hasattr(optimizer, name)]:
        raise TypeError(
            f"make_optimizer gave a {type(optimizer).__name__}, which is no torch optimizer (no {', '.join(lacking)}); "
            "give what makes one of a list of parameters"
        )
    chosen = [check for check in CHECKS if not only or check.name in only]
    report = Report(name or type(optimizer).__name__, [*_rows(subject, chosen)])
    if raises and report.failures:
        raise AssertionError(f"{report.subject} fails {len(report.failures)} of {len(report)} checks:\n{report}")
    return report


def made_by(text: str, lr: float | None = None) -> MakeT:
    """What makes an optimizer, by a registry name or "module:callable".

    Args:
        text: as in "soap" or "torch.optim:AdamW".
        lr: its learning rate; None: the registry's rate to start from, or what the callable has.

    Raises:
        ValueError: there is no such name, module or callable.

    Example:
        >>> made_by("torch.optim:SGD", lr=0.1)([torch.nn.Parameter(torch.ones(2))]).defaults["lr"]
        0.1
    """
    module, colon, name = text.partition(":")
    if colon:
        try:
            make = getattr(import_module(module), name)
        except (Exception, SystemExit) as error:  # whatever a module does as it is imported
            reason = str(error) if isinstance(error, ImportError | AttributeError) else repr(error)
            raise ValueError(f"{text!r} names no callable: {reason}; give MODULE:CALLABLE, or {_KNOWN}") from error
        if not callable(make):
            raise ValueError(f"{text!r} is {make!r}, which cannot be called; give MODULE:CALLABLE, or {_KNOWN}")
    else:
        known = registry.entry(text)
        make, lr = known.load(), known.start if lr is None else lr
        if lr is None and inspect.signature(make).parameters["lr"].default is inspect.Parameter.empty:
            lr = 1e-3  # no rate to start from is known; any will do to try what is tried
    return make if lr is None else partial(make, lr=lr)


def _rows(subject: Subject, checks: Sequence[Check]) -> Iterator[Row]:
    before = torch.get_default_dtype(), torch.get_rng_state()
    for check in checks:
        passed: bool | None = True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reason = check.run(subject) or ""
        except DoesNotApplyError as why:
            passed, reason = None, str(why)
        except Exception as problem:  # of whatever kind: that is what is asked
            passed, reason = False, _said(problem)
        finally:
            torch.set_default_dtype(before[0])
            torch.set_rng_state(before[1])
        yield Row(check.name, passed, reason, check.link)


def _said(problem: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(problem).split()) or "no message"
    short = text if len(text) <= 160 else f"{text[:157]}..."
    if isinstance(problem, AssertionError):
        return short
    frame = traceback.extract_tb(problem.__traceback__)[-1]
    return f"{type(problem).__name__} in {frame.name}: {short}"
