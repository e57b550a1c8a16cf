"""Write files safely: replace a file completely or not at all, append whole records, lock a file for one run."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

LONGEST_PATH = 4096
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_target(path: str | Path) -> Path:
    """Check that `path` can be written; return it with symbolic links resolved. The file may exist.

    Raises:
        ValueError: If it is not a regular file, or if its folder is missing or read-only.
    """
    if "\0" in os.fspath(path):
        raise ValueError(f"{str(path)!r:.100} cannot be written: it is not a path.")
    if len(os.fspath(path)) > LONGEST_PATH:
        raise ValueError(
            f"A path of {len(os.fspath(path)):,} characters cannot be written: {LONGEST_PATH:,} are allowed."
        )
    real = Path(os.path.realpath(path))
    try:
        mode = real.stat().st_mode
    except FileNotFoundError:
        mode = None
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {reason(error)}.") from error
    if mode is not None and not stat.S_ISREG(mode):
        raise ValueError(
            f"{path} cannot be written: it is a {'folder' if stat.S_ISDIR(mode) else 'device'}, not a file."
        )
    if not real.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {real.parent}.")
    for needed in (real.parent, real):
        if needed.exists() and not os.access(needed, os.W_OK):
            raise ValueError(f"{path} cannot be written: {needed} is read-only.")
    return real


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield the path of an empty temporary file in the same folder; replace `path` by it at the end.

    A symbolic link is kept, and its target is replaced. An existing file keeps its mode, a new one gets the mode of the
    umask. If the block raises, `path` is unchanged and the temporary file is deleted.

    Raises:
        ValueError: If the file cannot be written.
    """
    real = check_target(path)
    beside = real.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = (real if real.exists() else beside).stat().st_mode
        yield beside
        os.chmod(beside, stat.S_IMODE(mode))
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, real)
    except OSError as error:
        kept = "its content is unchanged" if real.exists() else "nothing was written"
        raise ValueError(f"{path} cannot be written: {reason(error)}; {kept}{_remedy(error)}.") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write a text file completely or not at all, with `replacing`."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


class Appender:
    """Append records to a file, each one completely or not at all.

    Args:
        path: The file; it is created if it does not exist.
        torn: The number of bytes to cut off at its end first: those of an unfinished last line.

    Raises:
        ValueError: If the file cannot be written.
    """

    def __init__(self, path: str | Path, torn: int = 0) -> None:
        self.path = check_target(path)
        try:
            self._file = os.open(self.path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666)
            self.size = os.fstat(self._file).st_size - torn
            if torn:
                os.ftruncate(self._file, self.size)
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {reason(error)}.") from error

    def write(self, data: bytes) -> None:
        """Append `data`.

        Raises:
            OSError: If it cannot be written; the file is then unchanged.
        """
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except BaseException:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self.size)
            raise
        self.size += len(data)

    def close(self) -> None:
        os.close(self._file)


class RunLock:
    """Lock `path` for one run; the operating system releases the lock when the process ends.

    Args:
        path: The file.
        patience: The most seconds to wait. A run that only checks the lock holds it for an instant.

    Raises:
        ValueError: If another run has locked it.
    """

    def __init__(self, path: str | Path, patience: float = 1.0) -> None:
        real = check_target(path)
        self._lock = FileLock(real.with_name(f".{real.name}.lock"))
        try:
            self._lock.acquire(timeout=patience)
        except Timeout as error:
            raise ValueError(f"{path} is being written by another run: wait for it, or choose another name.") from error
        except OSError as error:
            raise ValueError(f"{path} cannot be locked: {reason(error)}.") from error

    def release(self) -> None:
        """Unlock the file; a second call does nothing."""
        if self._lock.is_locked:
            with contextlib.suppress(OSError):  # unlink first: once unlocked, it may be another run's
                os.unlink(self._lock.lock_file)
            self._lock.release()


def reason(error: Exception) -> str:
    """Return why an operation on a file failed, without the path."""
    return getattr(error, "strerror", None) or str(error)


def _remedy(error: OSError) -> str:
    return "; make room and try again" if error.errno in FULL else ""
