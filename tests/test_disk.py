"""Files are replaced whole or not at all, keep link and mode, and one run at a time writes one."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from litgpt_kv.disk import Appender, RunLock, check_target, replacing, write_text
from tests import warm


def test_a_file_is_replaced_whole_and_keeps_its_link_and_mode(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("before")
    real.chmod(0o604)
    link.symlink_to("real")
    inode = real.stat().st_ino
    write_text(link, "after")
    assert link.is_symlink() and real.read_text() == "after"
    assert stat.S_IMODE(real.stat().st_mode) == 0o604
    assert real.stat().st_ino != inode, "renamed, not written over"
    dangling = tmp_path / "dangling"
    dangling.symlink_to("new")
    write_text(dangling, "x")
    assert dangling.is_symlink() and (tmp_path / "new").read_text() == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "link", "new", "real"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_mode_of_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_text(tmp_path / "new", "x")
        Appender(tmp_path / "appended").close()
    finally:
        os.umask(before)
    for name in ("new", "appended"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~mask


def test_what_fails_half_way_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("before")
    with pytest.raises(RuntimeError), replacing(file) as beside:
        beside.write_text("half")
        raise RuntimeError
    assert file.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path, says in (
        ("/dev/null", "it is a device, not a file"),
        (tmp_path / "pipe", "it is a device, not a file"),
        (tmp_path, "it is a folder, not a file"),
        (tmp_path / "no" / "file", "there is no folder"),
        (tmp_path / "loop", "symbolic links"),
        ("nul\0", "it is not a path"),
        (tmp_path / ("x" * 300), "name too long"),
        ("x" * 5000, "A path of 5,000 characters cannot be written: 4,096 are allowed"),
    ):
        with pytest.raises(ValueError, match=says):
            check_target(path)
        with pytest.raises(ValueError, match=says), replacing(path):
            pytest.fail("the block must not run")


FULL = """
import resource, signal, sys
from pathlib import Path
from litgpt_kv.disk import Appender, replacing
from tests import warm
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])
(folder / "a").write_text("before")
appender = Appender(folder / "b")
appender.write(b"x" * 900)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # the system refuses what goes beyond, as a full disk does
try:
    with replacing(folder / "a") as beside:
        beside.write_bytes(b"x" * 5000)
except ValueError as error:
    print(error)
try:
    appender.write(b"y" * 200)
except OSError as error:
    print(error.strerror)
appender.write(b"z" * 100)
"""


def test_a_full_disk_keeps_what_is_there(tmp_path: Path) -> None:
    done = warm.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == (
        f"{tmp_path / 'a'} cannot be written: File too large; its content is unchanged; make room and try again."
    )
    assert second == "File too large"
    assert (tmp_path / "a").read_text() == "before"
    assert (tmp_path / "b").read_bytes() == b"x" * 900 + b"z" * 100, "a piece is appended whole or not at all"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


HOLD = """
import sys, time
from litgpt_kv.disk import RunLock
from tests import warm
lock = RunLock(sys.argv[1])
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_run_is_refused_until_the_first_one_ends_or_dies(tmp_path: Path) -> None:
    file, link = tmp_path / "a", tmp_path / "link"
    link.symlink_to("a")
    lock = RunLock(file)
    for path in (file, link):
        with pytest.raises(ValueError, match=f"{path} is being written by another run"):
            RunLock(path, patience=0)
    RunLock(tmp_path / "b").release()
    lock.release()
    lock.release()
    assert [p.name for p in tmp_path.iterdir()] == ["link"], "no lock file stays"
    with warm.Popen([sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another run"):
            RunLock(file, patience=0)
        holder.send_signal(signal.SIGKILL)
    RunLock(file, patience=10).release()
