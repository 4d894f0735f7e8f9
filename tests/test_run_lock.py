"""One run at a time in an out_dir: refused while another runs, never by what one left behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from errors import UserError
from training import run_lock
from training.run_lock import RunLock, holder_in, parsed

ROOT = Path(__file__).parents[1]
QUICK = 0.05
"""Seconds between two signs of life in tests that wait for them."""
HOLD = """
import sys
from pathlib import Path
from training.run_lock import RunLock

lock = RunLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
sys.stdin.read()
lock.release()
"""


def holder(out_dir: Path) -> subprocess.Popen:
    """Start a process that holds the lock until its stdin is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out_dir)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def other_kernel(monkeypatch):
    """From here on, what this process wrote before is of another host."""
    return lambda: monkeypatch.setattr(run_lock, "kernel_name", lambda: "another")


@pytest.fixture
def no_flock(monkeypatch):
    """A file system that has no flock."""

    def refuse(file, operation):
        raise OSError(run_lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", refuse)
    monkeypatch.setattr(run_lock, "CONFIRM_SECONDS", QUICK)


def test_the_second_of_two_is_refused_until_the_first_ends(tmp_path):
    """Catches two runs in one directory, a sentence without the holder, a lock that stays."""
    first = holder(tmp_path)
    with pytest.raises(UserError) as error:
        RunLock(tmp_path).acquire()
    assert error.value.param == "out_dir"
    for word in (str(tmp_path), f"process {first.pid}", run_lock.platform.node(), "since 2"):
        assert word in str(error.value)
    first.communicate("")
    assert not list(tmp_path.iterdir())
    with RunLock(tmp_path) as lock:
        lock.acquire()
        lock.require_held()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_holder_is_in_nobodys_way(tmp_path, number, capsys):
    """Catches a stale lock that refuses the next run, or makes it wait."""
    first = holder(tmp_path)
    first.send_signal(number)
    first.wait()
    assert (tmp_path / "lock").exists()
    with RunLock(tmp_path) as lock:
        lock.acquire()
        assert lock.is_mine()
    assert capsys.readouterr().out == ""


def test_the_file_locked_is_the_one_in_the_directory(tmp_path, monkeypatch):
    """Catches a lock on a file that its holder removes between its opening and its locking: the
    third process would make another one, and lock it too."""
    first, second, third = (RunLock(tmp_path) for _ in range(3))
    first.acquire()
    flock = run_lock.fcntl.flock

    def release_first(file, operation):
        first.release()
        flock(file, operation)

    monkeypatch.setattr(run_lock.fcntl, "flock", release_first)
    second.acquire()
    with pytest.raises(UserError, match="is in use"):
        third.acquire()
    second.release()


def test_a_run_on_another_host_is_seen_by_its_signs_of_life(tmp_path, no_flock, other_kernel):
    """Catches two runs on two hosts where the file system does not share its locks."""
    first = RunLock(tmp_path, QUICK)
    first.acquire()
    other_kernel()
    with pytest.raises(UserError, match=f"process {os.getpid()} on host"):
        RunLock(tmp_path, QUICK).acquire()
    first.release()


def test_a_host_that_died_is_waited_for_once(tmp_path, other_kernel, capsys):
    """Catches a run that another host's crash keeps from being resumed elsewhere, and a wait that
    nobody explains."""
    dead = RunLock(tmp_path, QUICK)
    dead.path.parent.mkdir(exist_ok=True)
    dead.path.write_bytes(json.dumps(dead.record).encode())
    other_kernel()
    with RunLock(tmp_path, QUICK) as lock:
        lock.acquire()
        assert lock.is_mine()
    assert "waiting 0.15 s for a sign of life" in capsys.readouterr().out


def test_without_flock_one_of_two_gives_way(tmp_path, no_flock, monkeypatch):
    """Catches two processes that have found no lock at the same moment, and both go on."""
    second = RunLock(tmp_path, QUICK)

    def second_writes_too(seconds):
        second.path.write_bytes(json.dumps(second.record).encode())

    monkeypatch.setattr(run_lock.time, "sleep", second_writes_too)
    first = RunLock(tmp_path, QUICK)
    with pytest.raises(UserError, match="is in use by another train.py"):
        first.acquire()


def test_a_run_that_lost_its_lock_stops(tmp_path):
    """Catches a run that was taken for dead, as after a long pause, and goes on beside the next."""
    first = RunLock(tmp_path, QUICK)
    first.acquire()
    other = RunLock(tmp_path)
    first.path.write_bytes(json.dumps({**other.record, "pid": 1234}).encode())
    first.thread.join(timeout=10)
    with pytest.raises(UserError, match="was taken over by another train.py, process 1234"):
        first.require_held()
    first.release()
    assert parsed(first.path.read_bytes())["pid"] == 1234


def test_a_removed_directory_is_noticed(tmp_path):
    """Catches a run that goes on writing into files that nobody will find."""
    with RunLock(tmp_path / "out") as lock:
        lock.acquire()
        (tmp_path / "out" / "lock").unlink()
        with pytest.raises(UserError, match="was removed while this run"):
            lock.require_held()


def test_a_lock_cut_short_is_no_holder_that_lives(tmp_path, capsys):
    """Catches an exception, or a refusal for ever, from a file that a crash left half-written."""
    (tmp_path / "lock").write_bytes(b'{"host": "a')
    assert holder_in(b'{"host": "a') == "another train.py"
    with RunLock(tmp_path, QUICK) as lock:
        lock.acquire()
        assert lock.is_mine()
