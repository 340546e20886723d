"""Where the numbers of a `SpikeWatch` go: TensorBoard, Weights & Biases, MLflow, or a `Logger` of your own."""

import re
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch

from emerging_optimizers.watch import Alarm, SpikeWatch


class Logger(Protocol):
    """Takes numbers with a name."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log values of one step. Steps may come twice; a later call may be of an earlier step."""


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)


class _Wandb:
    def __init__(self, run: Any, axis: str) -> None:
        self.run, self.axis = run, axis
        self._defined: set[str] = set()

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name in values.keys() - self._defined:
            self.run.define_metric(name, step_metric=self.axis)
        self._defined |= values.keys()
        self.run.log({**values, self.axis: step})


class _Mlflow:
    most = 1000  # metrics in one request; a server refuses more

    def __init__(self, module: Any, run_id: str | None) -> None:
        self.module, self.run_id = module, run_id

    def log(self, values: Mapping[str, float], step: int) -> None:
        # What MLflow does not allow in a name, as in param_groups[0]['params'][3].
        rest = iter({re.sub(r"[^\w\-. :/]", "_", name): value for name, value in values.items()}.items())
        while part := dict(islice(rest, self.most)):
            self.module.log_metrics(part, step=step, run_id=self.run_id)


def tensorboard(writer: Any) -> Logger:
    """A logger that writes to TensorBoard.

    Args:
        writer: a `SummaryWriter`, or what else has `add_scalar(tag, value, step)`; or the folder for a new one.

    Raises:
        ModuleNotFoundError: a folder, and the package tensorboard is not installed.

    Example:
        >>> class Printer:
        ...     def add_scalar(self, tag, value, step):
        ...         print(step, tag, value)
        >>> tensorboard(Printer()).log({"loss": 0.5}, step=3)
        3 loss 0.5
    """
    if isinstance(writer, str | Path):
        writer = _needed("torch.utils.tensorboard", "tensorboard", "tensorboard").SummaryWriter(writer)
    return _TensorBoard(writer)


def wandb(run: Any = None, *, axis: str = "optimizer_step") -> Logger:
    """A logger that writes to Weights & Biases.

    The values get an axis of their own. Under wandb's own step, values that come later than another log of a later step
    would be dropped.

    Args:
        run: what `wandb.init` returns; None: the run that is under way.
        axis: the name of the axis.

    Raises:
        ModuleNotFoundError: no run is given, and the package wandb is not installed.
        ValueError: no run is given and none is under way.
    """
    if run is None:
        run = _needed("wandb", "wandb", "wandb").run
    if run is None:
        raise ValueError("loggers.wandb: no run is under way; call wandb.init() first, or give what it returned")
    return _Wandb(run, axis)


def mlflow(run_id: str | None = None) -> Logger:
    """A logger that writes to MLflow.

    Characters that MLflow does not allow in the name of a metric become underscores.

    Args:
        run_id: of the run; None: the one that is active, or is started by the first value.

    Raises:
        ModuleNotFoundError: the package mlflow is not installed.
    """
    return _Mlflow(_needed("mlflow", "mlflow", "mlflow"), run_id)


def _needed(module: str, package: str, function: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"loggers.{function} needs the package {package}, which is not installed: pip install {package}"
        ) from error


class _Buffer:
    """The writer of a watch: what it writes in one step goes to the logger in one call."""

    def __init__(self, logger: Logger) -> None:
        self.logger = logger
        self.step, self.values = 0, dict[str, float]()

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        if step != self.step:
            self.flush()
        self.step, self.values[tag] = step, value

    def flush(self, *_: Any) -> None:
        values, self.values = self.values, {}
        if values:
            self.logger.log(values, self.step)


class LoggedWatch(SpikeWatch):
    """What `log_spikes` returns."""

    def __init__(self, optimizer: torch.optim.Optimizer, logger: Logger, **options: Any) -> None:
        self._buffer = _Buffer(logger)
        super().__init__(optimizer, tensorboard=self._buffer, **options)
        self._hook = optimizer.register_step_post_hook(self._buffer.flush)

    def close(self) -> None:
        """Stop watching; what was still on its way is logged."""
        super().close()
        self._hook.remove()
        self._buffer.flush()


def log_spikes(
    optimizer: torch.optim.Optimizer,
    logger: Logger,
    *,
    on_alarm: Callable[[Alarm], None] | None = None,
    **options: Any,
) -> LoggedWatch:
    """Watch an optimizer, and log what is observed and what alarms.

    An observation is one call of the logger, with names such as "update_rms/1.weight". An alarm is logged as
    "alarm/grad_norm/1.weight", with the value that left its range.

    Args:
        optimizer: any optimizer of torch.
        logger: `tensorboard(...)`, `wandb(...)`, `mlflow()`, or anything with `log(values, step)`.
        on_alarm: called with each `Alarm` after it was logged; None: a RuntimeWarning.
        **options: of `SpikeWatch`: `every`, `thresholds`, `path`, `start`.

    Returns:
        The watch: `close()` it in the end, or use it in a `with` statement.

    Example:
        >>> from emerging_optimizers import AdamW
        >>> class Printer:
        ...     def log(self, values, step):
        ...         print(step, *sorted(values))
        >>> w = torch.nn.Parameter(torch.ones(4))
        >>> optimizer = AdamW([("w", w)], lr=0.1)
        >>> with log_spikes(optimizer, Printer(), every=2):
        ...     for _ in range(2):
        ...         w.grad = torch.ones(4)
        ...         optimizer.step()
        2 alignment/w grad_norm/w guard_scaled/w guard_skipped/w momentum_share/w update_rms/w
    """

    def alarm(found: Alarm) -> None:
        logger.log({f"alarm/{found.measure}/{found.parameter}": found.value}, found.step)
        if on_alarm is None:
            warnings.warn(found.message, RuntimeWarning, stacklevel=2)
        else:
            on_alarm(found)

    return LoggedWatch(optimizer, logger, on_alarm=alarm, **options)
