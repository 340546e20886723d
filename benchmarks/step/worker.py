"""One implementation in a process of its own, which answers the requests of a pipe.

It imports nothing of this repository: the published library has the same name as ours, and which of them this process
means is decided by a request.
"""

import contextlib
import ctypes
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import os
import re
import sys
import time
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# `def f[T: Bound](...)` and `class C[T](...)`, the syntax of Python 3.12 that the published library uses.
TYPE_PARAMETERS = re.compile(r"^(\s*(?:async\s+)?(?:def|class)\s+\w+)\[[^\[\]]*\](?=[(:])", re.MULTILINE)
PATHS = re.compile(r"(?<![\w.:/])/[\w.+@-]+/[^\s'\")]*")
ANNOTATIONS_ARE_TEXT = 0x1000000  # the compiler flag of `from __future__ import annotations`


class OlderPython(importlib.machinery.SourceFileLoader):
    """Compiles a checkout that was written for Python 3.12 under Python 3.11, without touching its files."""

    # typeshed knows the method without `_optimize`, which importlib passes.
    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> Any:  # type: ignore[override]  # as above
        source = importlib.util.decode_source(bytes(data))
        plain = TYPE_PARAMETERS.sub(r"\1", source)
        flags = 0 if plain == source else ANNOTATIONS_ARE_TEXT
        return compile(plain, path, "exec", flags=flags, dont_inherit=True, optimize=_optimize)


def import_from(path: str) -> None:
    """Makes the packages of a checkout importable, before all others."""
    root = str(Path(path).resolve())
    sys.path.insert(0, root)
    # A fork server that others share may have loaded another package of the same name before.
    tops = {entry.parent.name for entry in Path(root).glob("*/__init__.py")} - {__name__.partition(".")[0], "torch"}
    for module in [name for name in sys.modules if name.partition(".")[0] in tops]:
        del sys.modules[module]
    if sys.version_info >= (3, 12):
        return
    sys.dont_write_bytecode = True
    if not hasattr(typing, "override"):
        typing.override = lambda method: method  # type: ignore[attr-defined]  # not there before Python 3.12
    find = importlib.machinery.FileFinder.path_hook((OlderPython, importlib.machinery.SOURCE_SUFFIXES))

    def hook(entry: str) -> Any:
        inside = entry == root or entry.startswith(root + os.sep)
        if not inside or entry.startswith(sys.prefix + os.sep):  # an environment may lie in the checkout
            raise ImportError(entry)
        return find(entry)

    sys.path_hooks.insert(0, hook)
    sys.path_importer_cache.clear()


def named(path: str) -> Any:
    """The object of "module:name"."""
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def resolved(value: Any) -> Any:
    """A setting of an arm, where "@module:name" means an object and {"@": ...} a call of it."""
    if isinstance(value, str) and value.startswith("@"):
        return named(value[1:])
    if isinstance(value, Mapping) and "@" in value:
        return named(value["@"])(**{key: resolved(item) for key, item in value.items() if key != "@"})
    return value


def tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor below a value, once; also inside of objects that are no containers."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item, seen)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from tensors(item, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value):
        yield from tensors(vars(value), seen)


class Worker:
    """What the requests work on."""

    def __init__(self, threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        self.device = torch.device(device)
        self.parameters: list[Tensor] = []
        self.gradients: list[Tensor] = []
        # The first optimizer of a process makes torch import its compiler, and the first tensor wakes the device: no
        # arm is charged for that.
        self.optimizer: Any = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1, device=self.device))])

    def load(
        self,
        *,
        make: str,
        kwargs: Mapping[str, Any],
        group: Mapping[str, Any],
        setup: Mapping[str, Any],
        path: str | None,
        distribution: str | None,
    ) -> dict[str, Any]:
        """Imports the class."""
        if path is not None:
            import_from(path)
        for name, value in setup.items():
            module, attribute = name.split(":")
            setattr(importlib.import_module(module), attribute, value)
        self.cls = named(make)
        self.group = dict(group)
        self.kwargs = {key: resolved(value) for key, value in kwargs.items()}
        return {"version": importlib.metadata.version(distribution) if distribution else None}

    def make(self, parameters: list[Any], **kwargs: Any) -> Any:
        """An optimizer of the arm."""
        groups = [{"params": parameters, **self.group}] if self.group else parameters
        return self.cls(groups, **{**self.kwargs, **kwargs})

    def build(self, *, shapes: list[list[Any]]) -> dict[str, Any]:
        """Makes parameters and the optimizer."""
        self.generator = torch.Generator(self.device).manual_seed(0)
        sizes = [shape for count, shape in shapes for _ in range(count)]
        self.parameters = [torch.nn.Parameter(0.02 * self.random(size)) for size in sizes]
        self.gradients = [torch.empty_like(p) for p in self.parameters]
        begin = time.perf_counter()
        self.optimizer = self.make(self.parameters)
        return {"construct_s": time.perf_counter() - begin}

    def step(self, *, count: int) -> dict[str, Any]:
        """Steps with fresh gradients: the mean seconds of one, by CPU time, wall clock and (on a GPU) its events."""
        cpu = wall = device = 0.0
        on_device = self.device.type == "cuda"
        for _ in range(count):
            self.refresh()
            # Untyped in torch.
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_device else []  # type: ignore[no-untyped-call]  # untyped in torch
            self.wait()
            cpu_begin, wall_begin = time.process_time(), time.perf_counter()
            if events:
                events[0].record()
            self.optimizer.step()
            if events:
                events[1].record()
            self.wait()
            cpu += time.process_time() - cpu_begin
            wall += time.perf_counter() - wall_begin
            device += events[0].elapsed_time(events[1]) / 1000 if events else 0.0
        return {"cpu": cpu / count, "wall": wall / count, "device": device / count}

    def memory(self, *, count: int) -> dict[str, Any]:
        """Bytes of the state, and the largest number of bytes that a step holds and gives back."""
        found = {(t.data_ptr(), t.numel(), t.dtype): t for t in tensors(dict(self.optimizer.state), set())}
        own = {p.data_ptr() for p in (*self.parameters, *self.gradients)}
        state = sum(t.numel() * t.element_size() for t in found.values() if t.data_ptr() not in own)
        self.refresh()
        with contextlib.suppress(OSError, AttributeError, KeyError):
            return {"state_bytes": state, "extra_bytes": self.peak(count)}
        return {"state_bytes": state, "extra_bytes": None}

    def peak(self, count: int) -> int:
        """How far memory rises during some steps. On the CPU: the peak of the resident set (Linux)."""
        if self.device.type == "cuda":
            self.wait()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = resident("VmRSS")
        for _ in range(count):
            self.optimizer.step()
        if self.device.type == "cuda":
            self.wait()
            return torch.cuda.max_memory_allocated() - before
        return max(0, resident("VmHWM") - before)

    def descends(self) -> dict[str, Any]:
        """Whether a step is finite and goes down its own gradient."""
        before = [p.detach().clone() for p in self.parameters]
        self.refresh()
        self.optimizer.step()
        moved = [b - p.detach() for b, p in zip(before, self.parameters, strict=True)]
        finite = all(bool(m.isfinite().all()) for m in moved)
        along = sum(float((m * g).double().sum()) for m, g in zip(moved, self.gradients, strict=True))
        return {"finite": finite, "descends": along > 0}

    def update(self, *, inputs: str, out: str, dtype: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Saves what a fresh optimizer takes off zero weights, all gradients of a list of steps given."""
        steps: list[list[Tensor]] = torch.load(inputs, weights_only=True)
        to = getattr(torch, dtype)
        weights = [torch.nn.Parameter(torch.zeros_like(g, dtype=to, device=self.device)) for g in steps[0]]
        optimizer = self.make(weights, **kwargs)
        for gradients in steps:
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient.to(self.device, to)
            optimizer.step()
        torch.save([-weight.detach().cpu() for weight in weights], out)
        return {}

    def rates(self) -> dict[str, Any]:
        """Operations a second of large products, by dtype, and bytes a second of memory; by both clocks."""
        if not self.parameters:
            side, length = (4096, 2**28) if self.device.type == "cuda" else (1024, 2**25)
            self.parameters = [torch.randn(side, side, device=self.device), torch.empty(length, device=self.device)]
            self.parameters.append(self.parameters[1].fill_(1).clone())
        square, source, target = self.parameters
        found: dict[str, list[float]] = {}
        for name in ("float32", "bfloat16", *(["tf32"] if self.device.type == "cuda" else [])):
            x = square.bfloat16() if name == "bfloat16" else square
            torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
            product = torch.empty_like(x)
            found[name] = self.rate(2 * square.size(0) ** 3, partial(torch.mm, x, x, out=product))
        # A processor reads what a copy overwrites, so writing in place, as optimizers do, can be the faster of the two.
        copied = self.rate(2 * source.nbytes, lambda: target.copy_(source))
        in_place = self.rate(2 * target.nbytes, lambda: target.mul_(1.0))
        found["copy"] = [max(pair) for pair in zip(copied, in_place, strict=True)]
        return found

    def rate(self, amount: float, work: Callable[[], object]) -> list[float]:
        """Amount a second of the best of three: by CPU time and by wall clock."""
        seconds = []
        for _ in range(4):
            self.wait()
            cpu, wall = time.process_time(), time.perf_counter()
            work()
            self.wait()
            seconds.append((time.process_time() - cpu, time.perf_counter() - wall))
        return [amount / min(column) for column in zip(*seconds[1:], strict=True)]

    def release(self) -> dict[str, Any]:
        """Gives cached blocks of the device back to those who share it."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return {}

    def random(self, size: list[int]) -> Tensor:
        return torch.randn(size, device=self.device, generator=self.generator)

    def refresh(self) -> None:
        """New gradients in the place of the old."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            gradient.normal_(generator=self.generator)
            parameter.grad = gradient

    def wait(self) -> None:
        """Until the device has done what it was asked."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def resident(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(dict(line.split(":", 1) for line in lines)[key].split()[0])


def serve(pipe: Connection, log: str, threads: int, device: str) -> None:
    """Answers (what, arguments) until there are no more. What libraries print goes to the log."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    worker = Worker(threads, device)
    with contextlib.suppress(EOFError):
        while True:
            do, arguments = pipe.recv()
            try:
                reply = getattr(worker, do)(**arguments)
            except Exception as error:  # whatever a peer raises is its result
                traceback.print_exc()
                # Results are published: they do not say where things are on this machine.
                reply = {"error": PATHS.sub("...", f"{type(error).__name__}: {error}".splitlines()[0])[:300]}
            pipe.send(reply)
