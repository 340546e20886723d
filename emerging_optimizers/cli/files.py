"""Files that are there whole or not at all, and what a disk refuses as a sentence: for every command that writes."""

import errno
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from emerging_optimizers.cli import FailedError

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


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """A block that writes; what the disk refuses becomes a `UsageError` with the file and a remedy."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "mend that, or give another --out")
        raise FailedError(
            f"{path} cannot be written ({error.strerror or error}); {remedy}, and repeat the command, with "
            "--resume where it has that option. What was there before is still there"
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
                if path.exists() and not path.is_file():  # root could put a file in the place of /dev/null
                    raise FileExistsError(errno.EEXIST, "it is a device or a pipe")
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
    if sys.platform == "win32":  # opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
