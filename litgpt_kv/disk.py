"""Write files so that nothing is lost: a file is replaced whole or not at all, and one run at a time writes it."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_target(path: str | Path) -> Path:
    """Check that a file can be written at `path`, which may exist; return it with symbolic links followed.

    Raises:
        ValueError: If it is a folder, a device or the like, or its folder is missing or may not be written to.
    """
    if "\0" in str(path):
        raise ValueError(f"{str(path)!r} cannot be written: it is no path.")
    real = Path(os.path.realpath(path))
    try:
        mode = real.stat().st_mode
    except FileNotFoundError:
        mode = None
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {reason(error)}.") from error
    if mode is not None and not stat.S_ISREG(mode):
        raise ValueError(
            f"{path} cannot be written: it is no file but a {'folder' if stat.S_ISDIR(mode) else 'device'}."
        )
    if not real.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {real.parent}.")
    for needed in (real.parent, real):
        if needed.exists() and not os.access(needed, os.W_OK):
            raise ValueError(f"{path} cannot be written: {needed} is read-only.")
    return real


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give the path of an empty temporary file beside `path`; at the end it takes the place of `path`.

    A symbolic link stays and its target is replaced; a file that existed keeps its mode, a new one gets that of the
    umask. If the block raises, the file from before is unchanged and the temporary one is gone.

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
        kept = "what was in it is unchanged" if real.exists() else "nothing was written"
        raise ValueError(f"{path} cannot be written: {reason(error)}; {kept}{_remedy(error)}.") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all; see `replacing`."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


class Appender:
    """Append to a file, each piece whole or not at all.

    Args:
        path: the file; it is made if it is not there.
        torn: bytes at its end to cut off first: a last line that was not finished.

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
            OSError: If it cannot be written; what was there before is unchanged.
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
    """The right to write `path`, for one run at a time; the system takes it back when the process dies.

    Args:
        path: the file.
        patience: seconds to wait for it; a run that only asks whether it is free has it for an instant.

    Raises:
        ValueError: If another run has it.
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
        """Let others write; a second call does nothing."""
        if self._lock.is_locked:
            with contextlib.suppress(OSError):  # before it is released: a file that others wait for must stay
                os.unlink(self._lock.lock_file)
            self._lock.release()


def reason(error: Exception) -> str:
    """Why an operation on a file failed, without its path."""
    return getattr(error, "strerror", None) or str(error)


def _remedy(error: OSError) -> str:
    return "; make room and try again" if error.errno in FULL else ""
