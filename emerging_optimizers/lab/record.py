"""How the lab reads and writes: one writer a folder, whole files or none, and damage that is named.

Everything that the lab reads or writes goes through this file or `cli.files`. `sole_writer` keeps a folder for one
process, `storing` and `reading` turn what a disk can do into a `UsageError`, `write_atomically` leaves the old file or
the new one.

Nothing here imports torch before it is asked for the environment, so that ``eopt --help`` answers at once.
"""

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emerging_optimizers._version import __version__
from emerging_optimizers.cli import FailedError, UsageError
from emerging_optimizers.cli.files import UNFINISHED, storing, write_atomically

if TYPE_CHECKING:
    from emerging_optimizers.lab.data import Text

# Under which name a result has its checksum.
_SEAL = "checksum"

# The locks that this thread holds, so that a function that takes one may call another that takes it too.
_held: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())


class DamagedError(FailedError):
    """A file that cannot be read as what it should be: it is missing, cut short, changed or somebody else's."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}; {remedy}")
        self.problem = problem


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
        made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
        descriptor = _lock(lock, folder if file is None else folder / file)
    token = _held.set(_held.get() | {lock})
    try:
        sweep(folder, file or "")
        yield
    finally:
        _held.reset(token)
        with suppress(OSError):  # what cannot be removed is taken over by the next
            if _is(descriptor, lock):
                lock.unlink()
            for path in made:
                path.rmdir()  # where nothing was written
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
            if not _take(descriptor):
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


def _take(descriptor: int) -> bool:
    """Lock an open file, unless somebody else has."""
    try:
        if sys.platform == "win32":  # the lock is that of a byte, which nobody could read: one behind the text
            import msvcrt

            os.lseek(descriptor, 2**30, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


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


def sweep(folder: Path, name: str = "") -> None:
    """Removes what processes that were killed had begun to write; only the sole writer may."""
    with storing(folder):
        for path in folder.iterdir():
            if path.name.startswith(f".{name}") and path.name.endswith(UNFINISHED):
                path.unlink(missing_ok=True)


# ---- writing ---------------------------------------------------------------------------------------------------------


def json_bytes(value: object) -> bytes:
    """JSON as the lab's files have it."""
    return f"{json.dumps(value, indent=1)}\n".encode()


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A result with its checksum, by which `read_json` notices that something in it was changed."""
    return {**value, _SEAL: hashlib.sha256(json_bytes(value)).hexdigest()}


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
    except Exception as error:  # whatever the content of a file runs into
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, UsageError):
            reason = str(error)
        elif isinstance(error, OSError):
            reason = error.strerror or reason
        raise DamagedError(f"{path} cannot be read ({reason})", remedy) from error


def read_json(path: Path) -> Any:
    """Reads a JSON file; one that is `sealed` must be as it was written."""
    with reading(path):
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict) and (seal := value.pop(_SEAL, None)) is not None and sealed(value)[_SEAL] != seal:
            raise UsageError("something in it was changed: its checksum is another")
        return value


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
