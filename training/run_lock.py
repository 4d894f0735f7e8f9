"""One training run at a time in an out_dir, on one host or on many.

Start with `RunLock`. The lock is the operating system's (flock), which is gone when its process is,
however that ended, and which NFS and most cluster file systems share between hosts. Where a file
system does not, the holder's sign of life in the same file tells the others.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import threading
import time
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

from errors import UserError, about_file

BEAT_SECONDS = 5.0
"""Time between two signs of life."""
MISSED_BEATS = 3
"""Signs of life that fail to come before a holder on another host counts as dead."""
CONFIRM_SECONDS = 1.0
"""Time after which one of two processes that have taken a lock without flock gives way."""
NO_FLOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
"""What a file system says that has no flock."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
RECORD_BYTES = 512
"""Size of the file. It never changes, so that a reader never sees half of what is written."""


def kernel_name() -> str:
    """Return a name that two processes share if one kernel keeps their locks."""
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else platform.node()


class RunLock:
    """OUT_DIR/lock, held by one process from `acquire` to `release` or to its end.

    The file says who holds it: host, process, since when, and a number that grows. A process that
    finds it left behind by another kernel watches that number for a while; one that finds it left
    behind on its own kernel need not, because flock has told."""

    def __init__(self, out_dir: Path, beat_seconds: float = BEAT_SECONDS) -> None:
        self.out_dir = out_dir
        self.path = Path(out_dir).absolute() / "lock"
        self.beat_seconds = beat_seconds
        self.record: dict[str, Any] = {
            "host": platform.node(),
            "pid": os.getpid(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            "kernel": kernel_name(),
            "holder": uuid.uuid4().hex,
            "beat": 0,
        }
        self.file: int | None = None  # its descriptor while the lock is held
        self.lost: str | None = None  # the sentence that says how
        self.released = threading.Event()
        self.thread = threading.Thread(target=self.keep_beating, name="run lock", daemon=True)

    def __enter__(self) -> "RunLock":
        """Begin a block at whose end the lock is released, if it was acquired in it."""
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock. Raises UserError if another process holds it, OSError if it cannot be."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file, has_flock = self.open_file()
        try:
            left_behind = os.pread(file, RECORD_BYTES, 0)
            same_kernel = parsed(left_behind).get("kernel") == self.record["kernel"]
            if left_behind and not (has_flock and same_kernel):
                self.require_dead(left_behind)
            self.write(file)
            if not has_flock:
                time.sleep(CONFIRM_SECONDS)
                if not self.is_mine():
                    raise self.in_use()
        except BaseException:
            os.close(file)
            raise
        self.file = file
        self.thread.start()

    def open_file(self) -> tuple[int, bool]:
        """Return the descriptor of the file, and whether flock has locked it.

        Raises UserError if another process holds the flock."""
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            has_flock = True
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                raise self.in_use() from None
            except OSError as error:
                if error.errno not in NO_FLOCK:
                    raise
                has_flock = False
            if is_at(self.path, file):
                return file, has_flock
            os.close(file)  # its holder has released, and so removed, it in between

    def require_dead(self, left_behind: bytes) -> None:
        """Raise UserError if the process that left this in the file gives a sign of life."""
        seconds = MISSED_BEATS * self.beat_seconds
        print(
            f"{self.path} is that of {holder_in(left_behind)}: waiting {seconds:g} s for a sign "
            "of life from it",
            flush=True,
        )
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(self.beat_seconds / 10)
            if self.content() != left_behind:
                raise self.in_use()

    def in_use(self) -> UserError:
        """Return the error that names the holder."""
        return UserError(
            f"out_dir={self.out_dir} is in use by {holder_in(self.content())}: stop that first, "
            "or choose another --out_dir",
            param="out_dir",
        )

    def content(self) -> bytes:
        """Return what the file holds now, b"" if there is none.

        It is opened anew: that is when NFS asks the server."""
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""

    def is_mine(self) -> bool:
        """Say whether the file still says that this process holds it."""
        return parsed(self.content()).get("holder") == self.record["holder"]

    def write(self, file: int) -> None:
        """Write the record, with its next number."""
        self.record["beat"] += 1
        with about_file(self.path):
            os.pwrite(file, json.dumps(self.record).ljust(RECORD_BYTES).encode(), 0)
            os.fsync(file)

    def keep_beating(self) -> None:
        """Give signs of life until the lock is released or lost. Runs in a thread."""
        while not self.released.wait(self.beat_seconds) and self.lost is None:
            try:
                self.beat()
            except OSError:
                continue  # a full disk or a lost network: the next one may come through

    def beat(self) -> None:
        """Give a sign of life, unless the lock is lost."""
        assert self.file is not None, "the thread runs while the lock is held"
        if not is_at(self.path, self.file):
            self.lost = f"{self.path} was removed while this run was using out_dir={self.out_dir}"
        elif not self.is_mine():
            self.lost = f"out_dir={self.out_dir} was taken over by {holder_in(self.content())}"
        else:
            self.write(self.file)

    def require_held(self) -> None:
        """Raise UserError if the lock is held no more: nothing must be written to out_dir then."""
        if self.file is not None and self.lost is None and not is_at(self.path, self.file):
            self.lost = f"{self.path} was removed while this run was using out_dir={self.out_dir}"
        if self.lost is not None:
            raise UserError(f"{self.lost}: stopped without saving", param="out_dir")

    def release(self) -> None:
        """Remove the file, and let others take the lock. Does nothing if it is not held."""
        if self.file is None:
            return
        self.released.set()
        self.thread.join()
        with contextlib.suppress(OSError):  # left behind on a disk that became read-only
            if self.lost is None and is_at(self.path, self.file) and self.is_mine():
                self.path.unlink()  # before the flock goes, so that it cannot be another's file
        os.close(self.file)
        self.file = None


def is_at(path: Path, file: int) -> bool:
    """Say whether the open file is the one at path."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def parsed(content: bytes) -> dict[str, Any]:
    """Return the record that a lock file holds; {} if it is cut short or none."""
    try:
        record = json.loads(content)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def holder_in(content: bytes) -> str:
    """Return who holds a lock file of this content, for a sentence."""
    record = parsed(content)
    if not record:
        return "another train.py"
    return (
        f"another train.py, process {record.get('pid')} on host {record.get('host')} "
        f"since {record.get('since')}"
    )
