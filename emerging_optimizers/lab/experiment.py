"""What the experiments share: checks of a request, a seed, and JSON.

Nothing here imports torch before an experiment runs, so that ``eopt --help`` answers at once.
"""

import math
import signal
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from multiprocessing.context import BaseContext
from threading import current_thread, main_thread
from typing import Any, Protocol

from emerging_optimizers.cli import FailedError, UsageError


class Result(Protocol):
    """What an experiment makes."""

    @property
    def config(self) -> Any:
        """The request."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""


class KilledError(FailedError):
    """A process that worked for a command has ended, and its work is lost."""


@contextmanager
def workers(processes: int, most: int, context: BaseContext) -> Iterator[ProcessPoolExecutor]:
    """Processes, no more than there is work for, that end with the block: after an interrupt or an error nobody waits
    for runs that cannot be kept.

    Raises:
        KilledError: One of them has been killed.
    """
    pool = ProcessPoolExecutor(min(processes, most), context)
    try:
        yield pool
    except BaseException as error:  # an interrupt, too: no process stays behind
        running = [*pool._processes.values()]  # the public name, `terminate_workers`, is of Python 3.14
        pool.shutdown(wait=False, cancel_futures=True)
        for process in running:
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise KilledError(
                "a process has been killed at its work, by somebody or by the system for want of memory; fewer "
                "--processes need less of it"
            ) from error
        raise
    pool.shutdown()


@contextmanager
def interrupted_behind() -> Iterator[None]:
    """A block that starts processes; an interrupt that arrives in it comes behind it, also where the block fails.

    A process whose start is cut short is known to nobody, and complains when it finds that this one has gone.
    """
    if current_thread() is not main_thread():  # which alone is interrupted
        yield
        return
    arrived: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: arrived.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if arrived:
            signal.raise_signal(signal.SIGINT)


def require_distinct(config: object, *names: str) -> None:
    """Refuses a request that names nothing, or one thing twice, under these names."""
    for name in names:
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} must name at least one value, and each of them once")


@contextmanager
def reproducible(config: Any) -> Iterator[None]:
    """A block with the threads of a request, and with its seed for those who draw from torch's own generator."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            yield
    finally:
        torch.set_num_threads(threads)


def rounded(values: Iterable[float]) -> tuple[float, ...]:
    """Six digits: about what float32 holds, and files of half the size."""
    return tuple(float(f"{value:.6g}") for value in values)


def to_json(value: Any) -> Any:
    """A result as JSON: objects and arrays; a number that is not finite becomes null.

    Example:
        >>> to_json({1: (0.5, float("inf"))})
        {'1': [0.5, None]}
    """
    if is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_json(value: Any) -> Any:
    """The inverse of `to_json` up to the classes: arrays become tuples, and a null in an array is NaN.

    Example:
        >>> from_json({"spike": None, "rms": [0.5, None]})
        {'spike': None, 'rms': (0.5, nan)}
    """
    if isinstance(value, Mapping):
        return {key: from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(math.nan if item is None else from_json(item) for item in value)
    return value
