"""The files of a run: written so that a kill at any moment leaves a folder that can be continued.

lock.json           who writes here, while somebody does
config.json         the request, and the learning rates that it came to
environment.json    what it ran on
<optimizer>/        metrics.jsonl (a line a step), checkpoint.pt, result.json once finished
summary.json        the closing table
loss.png            the curves

and of a run with a gradient spike:

<optimizer>-spike/, <optimizer>-spike-guard/    the same job with the spike, without and with the guard
spike.json, spike.png                           how each of them recovers, against <optimizer>/

Everything that the lab reads or writes goes through this file. `sole_writer` keeps a folder for one process, `storing`
and `reading` turn what a disk can do into a `UsageError`, `write_atomically` leaves the old file or the new one.

Nothing here imports torch before a checkpoint is written or read, so that ``eopt --help`` answers at once.
"""

import errno
import fcntl
import hashlib
import io
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from emerging_optimizers._version import __version__
from emerging_optimizers.lab.config import Arm, UsageError, checked

if TYPE_CHECKING:
    from emerging_optimizers.lab.data import Text

# How the name of a file ends that is not complete yet.
UNFINISHED = ".unfinished"

_SPACE = "free some space there"
_RIGHTS = "give yourself the right to write there, or give another --out"
_PLACE = "move away what stands in its place (a folder for a file, or a file for a folder), or give another --out"
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _SPACE),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _RIGHTS),
    **dict.fromkeys((errno.EEXIST, errno.EISDIR, errno.ENOTDIR), _PLACE),
}

# The locks that this thread holds, so that a function that takes one may call another that takes it too.
_held: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step; the seconds are sums over the steps so far, without evaluations."""

    step: int
    loss: float = 0.0
    lr: tuple[float, ...] = ()
    """Learning rate of each parameter group."""
    optimizer_s: float = 0.0
    """CPU seconds inside `optimizer.step`."""
    cpu_s: float = 0.0
    wall_s: float = 0.0
    validation_loss: float | None = None
    """Held-out loss after the step, where it was measured."""
    update_rms: float = math.nan
    """RMS, over the whole model, of what the step took off the weights."""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "StepRecord":
        """The inverse of `dataclasses.asdict` followed by JSON."""
        return checked(cls(**{**value, "lr": tuple(value["lr"])}))


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What one optimizer did with the job."""

    optimizer: str
    arm: Arm
    parameters: int
    state_bytes: int
    steps: tuple[StepRecord, ...]

    @property
    def evaluations(self) -> tuple[tuple[StepRecord, float], ...]:
        """The evaluated steps, each with its held-out loss."""
        return tuple((s, s.validation_loss) for s in self.steps if s.validation_loss is not None)

    @property
    def final_loss(self) -> float:
        """Held-out loss after the last step."""
        return self.evaluations[-1][1]

    @property
    def best_loss(self) -> float:
        """Lowest held-out loss."""
        return min(loss for _, loss in self.evaluations)

    @property
    def optimizer_share(self) -> float:
        """Part of the CPU seconds spent inside `optimizer.step`."""
        return self.steps[-1].optimizer_s / self.steps[-1].cpu_s

    def reaches(self, loss: float) -> StepRecord | None:
        """The first evaluated step at or below a held-out loss, or None."""
        return next((step for step, value in self.evaluations if value <= loss), None)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "RunResult":
        """The inverse of `dataclasses.asdict` followed by JSON."""
        steps = tuple(StepRecord.from_json(step) for step in value["steps"])
        return checked(cls(**{**value, "arm": checked(Arm(**value["arm"])), "steps": steps}))


@dataclass(frozen=True, kw_only=True)
class SpikedRun:
    """A run with a gradient spike, and the run of the same job without spike and guard."""

    run: RunResult
    calm: RunResult
    spike_at: int
    """Steps before the spike."""
    guard: float | None
    """The guard's threshold."""


class DamagedError(UsageError):
    """A file that cannot be read as what it should be: it is missing, cut short, changed or somebody else's."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}; {remedy}")
        self.problem = problem


class RunFolder:
    """The folder of one optimizer within a run; whoever writes into it is the `sole_writer` of the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics, self.checkpoint, self.result = (
            path / name for name in ("metrics.jsonl", "checkpoint.pt", "result.json")
        )
        self._written = hashlib.sha256()  # of the metrics so far

    def append(self, record: StepRecord) -> None:
        """Adds a step to the metrics."""
        line = f"{json.dumps(asdict(record))}\n".encode()
        with storing(self.metrics), self.metrics.open("ab") as file:
            file.write(line)
        self._written.update(line)

    def save(self, step: int, parts: Mapping[str, Any], job: Mapping[str, Any]) -> None:
        """Writes a checkpoint, after making sure of the metrics up to it.

        Args:
            step: The last step of the metrics.
            parts: What has a `state_dict`, by name.
            job: What is trained, so that no other job continues from here.
        """
        import torch

        with storing(self.metrics), self.metrics.open("rb") as file:
            os.fsync(file.fileno())
        states = {name: part.state_dict() for name, part in parts.items()}
        content = io.BytesIO()
        torch.save({"step": step, "job": _plain(job), "metrics": self._written.hexdigest(), **states}, content)
        write_atomically({self.checkpoint: content.getvalue()})

    def restore(self, parts: Mapping[str, Any], job: Mapping[str, Any]) -> list[StepRecord]:
        """Goes back to the last checkpoint and drops the metrics after it.

        Args:
            parts: What `save` was given; their states are loaded.
            job: What is to be trained.

        Returns:
            The steps so far; none where there is no checkpoint.

        Raises:
            DamagedError: The checkpoint cannot be read or is of another job, or the metrics are not those that it was
                saved with. Nothing has been written then.
        """
        lines: list[bytes] = []
        steps: list[StepRecord] = []
        if os.path.lexists(self.checkpoint):
            remedy = f"bring it back, or remove the folder {self.path} and this optimizer begins again with --resume"
            with reading(self.checkpoint, remedy):
                checkpoint = _load(self.checkpoint)
                if changed := [key for key, value in _plain(job).items() if checkpoint["job"].get(key) != value]:
                    raise UsageError(f"it is of another job, which differs in {', '.join(changed)}")
                for name, part in parts.items():
                    part.load_state_dict(checkpoint[name])
                step, digest = int(checkpoint["step"]), checkpoint["metrics"]
            with reading(self.metrics, remedy):
                content = self.metrics.read_bytes() if os.path.lexists(self.metrics) else b""
                whole = content.splitlines(keepends=True)[: content.count(b"\n")]
                if len(whole) < step:
                    raise UsageError(
                        f"it holds {len(whole)} whole steps, and {self.checkpoint.name} was saved after step {step}"
                    )
                lines = whole[:step]
                if hashlib.sha256(b"".join(lines)).hexdigest() != digest:
                    raise UsageError(f"its first {step} steps are not those that {self.checkpoint.name} was saved with")
                steps = [StepRecord.from_json(json.loads(line)) for line in lines]
        kept = b"".join(lines)
        write_atomically({self.metrics: kept})
        self._written = hashlib.sha256(kept)
        _sweep(self.path)
        return steps

    def finished(self, optimizer: str, steps: int) -> RunResult:
        """Reads the result.

        Args:
            optimizer: Whose result it must be.
            steps: How many steps it must have.

        Raises:
            DamagedError: It cannot be read, or is another's.
        """
        with reading(self.result, "remove it and continue with --resume, which makes it again from the checkpoint"):
            result = RunResult.from_json(read_json(self.result))
            if (result.optimizer, len(result.steps)) != (optimizer, steps):
                raise UsageError(
                    f"it is of {len(result.steps)} steps of {result.optimizer}, and this run has {steps} of {optimizer}"
                )
            if result.steps[-1].validation_loss is None:
                raise UsageError("its last step has no held-out loss")
            return result


# ---- one writer ------------------------------------------------------------------------------------------------------


@contextmanager
def sole_writer(folder: Path, file: str | None = None) -> Iterator[None]:
    """A block in which no other process (and no other thread) of the lab writes into a folder, or to one file of it.

    The lock is flock's on a file that says who holds it. The kernel lets go of it when its holder ends, however that
    ends, so that what a killed process leaves is no obstacle; the number of a process alone could belong to another by
    now, or to another container. Readers need no lock: files are replaced whole.

    Args:
        folder: The run folder; it is made if it is not there.
        file: The name of the one file that is written, where the folder is no run folder.

    Raises:
        UsageError: Somebody else writes there; the text says who. Or nothing can be written there.

    Example:
        >>> with sole_writer(Path("runs/mine")):
        ...     sorted(path.name for path in Path("runs/mine").iterdir())
        ['lock.json']
    """
    with storing(folder):
        lock = folder.resolve() / ("lock.json" if file is None else f"{file}.lock")
    if lock in _held.get():
        yield
        return
    with storing(lock):
        made = not os.path.lexists(folder)
        descriptor = _lock(lock, folder if file is None else folder / file)
    token = _held.set(_held.get() | {lock})
    try:
        _sweep(folder, file or "")
        yield
    finally:
        _held.reset(token)
        with suppress(OSError):  # what cannot be removed is taken over by the next
            if _is(descriptor, lock):
                lock.unlink()
            if made:
                folder.rmdir()  # where nothing was written
        os.close(descriptor)


def _lock(path: Path, what: Path) -> int:
    """The descriptor of a file of this name that is locked for this process and says so."""
    missed: OSError | None = None
    for _ in range(100):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except (FileExistsError, FileNotFoundError) as error:
            missed = error  # the one before us has just removed the folder, which it had made; or a file stands there
            continue
        missed = None
        with ExitStack() as stack:
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if holder := _holder(path):
                    raise UsageError(f"{what} is being written by {holder}, or write elsewhere with --out") from None
                time.sleep(0.01)  # it has the lock and has not said yet who it is, or is just letting go
                continue
            if not _is(descriptor, path):
                continue  # the one before us has removed it since we opened it
            ours = {
                "process": os.getpid(),
                "host": platform.node(),
                "since": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
                "command": shlex.join(sys.orig_argv),
            }
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json_bytes(ours))
            stack.pop_all()
            return descriptor
    if missed is not None:
        with storing(path.parent):
            raise missed
    raise UsageError(
        f"{what} is being written by a process that holds {path}; wait until it ends, or give another --out"
    )


def _holder(path: Path) -> str | None:
    """Who holds a lock and what to do about it, unless it has not said so."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        number = holder["process"]
        return (
            f"process {number} on {holder['host']} since {holder['since']} ({holder['command']}), which holds {path}; "
            f"wait until it ends, end it (there: kill {number})"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that has a name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _sweep(folder: Path, name: str = "") -> None:
    """Removes what processes that were killed had begun to write; only the sole writer may."""
    with storing(folder):
        for path in folder.iterdir():
            if path.name.startswith(f".{name}") and path.name.endswith(UNFINISHED):
                path.unlink(missing_ok=True)


# ---- writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """A block that writes; what the disk refuses becomes a `UsageError` with the file and a remedy."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "mend that, or give another --out")
        raise UsageError(
            f"{path} cannot be written ({error.strerror or error}); {remedy}, and repeat the command (a training run "
            "continues with --resume). What was there before is still there"
        ) from error


def write_atomically(files: Mapping[Path, bytes]) -> None:
    """Replaces files by complete new ones.

    Every new file is complete on the disk before the first old one goes. Where that fails, as on a full disk, all files
    are as they were, and nothing of the new ones is left.

    Args:
        files: The contents by their places, whose folders are made if they are not there.

    Raises:
        UsageError: One of them cannot be written.

    Example:
        >>> write_atomically({Path("notes/a.txt"): b"one", Path("notes/b.txt"): b"two"})
        >>> sorted(path.name for path in Path("notes").iterdir())
        ['a.txt', 'b.txt']
    """
    ready: dict[Path, Path] = {}
    try:
        for path, content in files.items():
            with storing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.is_dir():  # else it would come out only when others are replaced
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                ready[path] = path.with_name(f".{path.name}.{uuid4().hex}{UNFINISHED}")
                with ready[path].open("xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
        for path, temporary in ready.items():
            with storing(path):
                os.replace(temporary, path)
    finally:
        for temporary in ready.values():
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    for folder in {path.parent for path in files}:
        with storing(folder):
            _sync(folder)


def _sync(folder: Path) -> None:
    """Makes sure of the names in a folder, on file systems that can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def json_bytes(value: object) -> bytes:
    """JSON as the lab's files have it."""
    return f"{json.dumps(value, indent=1)}\n".encode()


def write_json(path: Path, value: object) -> None:
    """Writes JSON atomically."""
    write_atomically({path: json_bytes(value)})


# ---- reading ---------------------------------------------------------------------------------------------------------


@contextmanager
def reading(path: Path, remedy: str = "bring it back, or move it away and make it again") -> Iterator[None]:
    """A block that reads a file and makes something of it; whatever fails becomes a `DamagedError`.

    Whatever, since a file may hold anything. Where blocks are nested, the innermost names the file and the outermost,
    which knows what is going on, the remedy.

    Args:
        path: The file.
        remedy: What to do about it.
    """
    try:
        yield
    except DamagedError as error:
        raise DamagedError(error.problem, remedy) from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, UsageError):
            reason = str(error)
        elif isinstance(error, OSError):
            reason = error.strerror or reason
        raise DamagedError(f"{path} cannot be read ({reason})", remedy) from error


def read_json(path: Path) -> Any:
    """Reads a JSON file."""
    with reading(path):
        return json.loads(path.read_text(encoding="utf-8"))


def _load(path: Path) -> Any:
    """A checkpoint, after comparing the checksums that it carries: torch does not, and would load flipped bits."""
    import torch

    content = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(content) as archive:
        if damaged := archive.testzip():
            raise UsageError(f"the checksum of {damaged} in it is wrong")
    content.seek(0)
    return torch.load(content, weights_only=True)


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """A request as JSON has it, the same before and after a file."""
    return json.loads(json.dumps(value))


def environment(threads: int, text: "Text | None" = None) -> dict[str, Any]:
    """What a result depends on besides its configuration."""
    import torch

    from emerging_optimizers.linalg.precision import reduced_dtype

    value: dict[str, Any] = {
        "emerging_optimizers": __version__,
        "revision": _revision(Path(__file__).parents[2]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "medium": str(reduced_dtype(torch.device("cpu"))).removeprefix("torch."),
        "threads": threads,
    }
    if text is not None:
        value["text"] = {"source": text.source, "characters": len(text), "sha256": text.sha256}
        value["vocabulary"] = len(text.vocabulary)
    return value


def _revision(root: Path) -> str | None:
    """The commit of the checkout that the package runs from, if it runs from one."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_model() -> str:
    try:
        lines: Iterable[str] = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = ()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())
