"""A lock that lets one process at a time write to a folder, on local and on network file systems.

The lock is the file `.lock`, created exclusively. It names the host and the process that holds it, and its modification
time is the holder's heartbeat. A lock whose holder is dead is taken over:

- on the same machine, if no process with this id and start time runs;
- from another machine, if the heartbeat is older than `STALE` seconds by the clock of the file system.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from selfe import log
from selfe.errors import UserError
from selfe.signals import process_start

FILE = ".lock"
BEAT, STALE = 10.0, 120.0  # seconds between two heartbeats; seconds without one after which a holder counts as dead


class FolderLock:
    """Holds the lock of a folder inside a `with` block; creates the folder.

    Args:
        key: the config key or option that names the folder, for messages.
        lost: called from a background thread with a message if another process has taken the lock over, which happens
            if this process was suspended for longer than `STALE`; it should end this process.

    Raises:
        UserError: the folder cannot be written to, or another process holds the lock.
    """

    def __init__(self, folder: Path, key: str, lost: Callable[[str], None]):
        self.folder, self.key, self.lost = folder, key, lost
        self.path = folder / FILE
        self.released = threading.Event()

    def __enter__(self) -> FolderLock:
        self.content = describe_holder()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while not self.create():
                self.take_over()
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written to ({error.strerror}); set {self.key}") from error

        threading.Thread(target=self.beat, name="folder lock", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.released.set()
        with suppress(OSError):
            if self.path.read_bytes() == self.content:
                self.path.unlink()

    def create(self) -> bool:
        """Create the lock file; False if there is one."""
        try:
            number = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(number, "wb") as file:
            file.write(self.content)
        return True

    def take_over(self) -> None:
        """Remove the lock file of a dead holder; raise UserError if the holder is alive."""
        try:
            content = self.path.read_bytes()
            holder = json.loads(content)
        except FileNotFoundError:
            return  # just released
        except ValueError:
            holder = {}  # another process is writing it, or was interrupted in doing so

        if self.is_alive(holder):
            who = f"process {holder.get('pid', '?')} on {holder.get('host', 'another machine')}"
            raise UserError(
                f"{self.folder}: another process is writing to it: {who}, since {holder.get('since', 'now')}; "
                f"stop it first, or set another {self.key}"
            )

        # Rename before removing: of several processes that find the same dead holder, only one can.
        dead = self.path.with_name(f"{FILE}.{uuid.uuid4().hex}")
        with suppress(FileNotFoundError):
            self.path.rename(dead)
            if dead.read_bytes() == content:
                dead.unlink()
            else:
                dead.rename(self.path)  # already taken over by a live process

    def is_alive(self, holder: dict) -> bool:
        """Whether the holder runs. Waits for a heartbeat if the holder is not on this machine."""
        if holder.get("machine") == machine():
            return process_start(holder["pid"]) == holder["started"]

        try:
            first = self.heartbeat()
            probe = self.path.with_name(f"{FILE}.{uuid.uuid4().hex}")
            probe.touch()
            clock = probe.stat().st_mtime - time.time()  # difference between the clocks of file system and machine
            probe.unlink()

            waiting = False
            while self.heartbeat() == first:
                if time.time() + clock - first > STALE:
                    return False
                if not waiting:
                    log.print_line(f"{self.folder}: locked by {holder.get('host')}, waiting for its heartbeat")
                waiting = True
                time.sleep(min(1.0, BEAT / 10))
            return True
        except FileNotFoundError:
            return False  # released meanwhile

    def heartbeat(self) -> float:
        """Time of the last heartbeat. The file is opened, because network file systems cache the times of others."""
        with self.path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime

    def beat(self) -> None:
        """The thread: renews the heartbeat until the lock is released or lost."""
        while not self.released.wait(BEAT):
            try:
                # Create it again if somebody has removed it.
                if self.path.exists() or not self.create():
                    if self.path.read_bytes() != self.content:
                        message = f"{self.folder}: another process took it over while this one did not respond"
                        return self.lost(message)
                    os.utime(self.path)
            except OSError:
                continue  # a network file system that does not respond for a while


@contextmanager
def removed_on_failure(folder: Path, records: Sequence[str]) -> Iterator[None]:
    """On an error, remove a folder that did not exist before, if it holds no results: only `records` and empty files.

    Enter it before the lock on the folder.
    """
    is_new, has_failed = not folder.exists(), True
    try:
        yield
        has_failed = False
    finally:
        if has_failed and is_new and folder.is_dir():
            paths = list(folder.iterdir())
            if all(path.is_file() and (path.name in records or not path.stat().st_size) for path in paths):
                for path in paths:
                    path.unlink()
                folder.rmdir()


def describe_holder() -> bytes:
    """The content of this process's lock file."""
    holder = {
        "host": platform.node(),
        "machine": machine(),
        "pid": os.getpid(),
        "started": process_start(os.getpid()),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "id": uuid.uuid4().hex,
    }
    return (json.dumps(holder) + "\n").encode()


def machine() -> str:
    """Identifies what a process id refers to: the host and, on Linux, its boot and the container."""
    names = [platform.node()]
    with suppress(OSError):
        names.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        names.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(names)
