"""Work done in a process of its own, within limits of time and memory."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from duomoe.errors import Busy, InputError

START_SECONDS = 60.0
SECONDS = 5.0  # for one request
MAX_REPLY_BYTES = 256 << 20

# Where turns are not waited for without end, all may wait so many seconds for one, and only one thread for longer:
# others have work besides, which slow requests of a stranger's are not to hold up.
BRIEFLY = 0.1

# All that a limited process sees of this one's environment, which may hold secrets.
KEPT = ("TZ", "LD_LIBRARY_PATH", "PYTHONHOME")


class Failed(Exception):
    """Work was not done; the message is one line that says why."""


class TooSlow(Failed):
    """The work took too long."""


class Ended(Failed):
    """The process ended over the work, as when it needs too much memory."""


class LimitedProcess:
    """A process that does one kind of work, begun when it is first needed and again after it had to be ended.

    It is a new program, not a fork: this process may hold a GPU. It ends when this process does, whatever ends that.
    Threads may share it; they take turns. A fork of this process gets one of its own.

    Args:
        module: what runs in it; its `begin` and its limits are handed to `duomoe.limited.worker.serve`.
        purpose: what it does, as "renders chat templates".
        library: that it imports.
        remedy: what to do where that is not installed.
        patience: seconds that one thread may wait for its turn, while others have theirs; further ones wait `BRIEFLY`.
            None is for as long as it takes, whoever waits.
    """

    def __init__(self, module: str, purpose: str, library: str, remedy: str, patience: float | None = None) -> None:
        self._module, self._purpose, self._library, self._remedy = module, purpose, library, remedy
        self._patience = patience
        self._lock, self._waiting = threading.Lock(), threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._begun = b""
        os.register_at_fork(after_in_child=self.abandon)

    def ask(self, request: bytes, begin: bytes = b"null") -> str:
        """Have something done.

        Args:
            request: for the process, as JSON.
            begin: what it works with, as JSON. It is sent to a process as it begins, and another one begins another
                process.

        Raises:
            Failed: when it cannot be done: of its subclasses, when it takes more than its time, or ends the process.
            InputError: when the library is not installed, or the process does not start.
            Busy: when others have had their turns for too long.
        """
        lock = self._lock
        if not self._take_turn():
            raise Busy(f"the process that {self._purpose} is busy with others; try again later")
        try:
            process = self._running(begin)
            try:
                with _ended_after(SECONDS, process) as late:
                    kind, text = _exchange(process, request)
            except (OSError, EOFError, ValueError):
                self.close()
                if late.is_set():
                    raise TooSlow(f"it takes more than {SECONDS:g} seconds") from None
                raise Ended("its process ended") from None
            except BaseException:
                self.close()  # its reply would be taken for that to the next request
                raise
            if late.is_set():
                self.close()
        finally:
            lock.release()
        if kind == "error":
            raise Failed(text)
        return text

    def _take_turn(self) -> bool:
        """Take the lock; return whether that went well before patience was over."""
        lock, waiting = self._lock, self._waiting
        if self._patience is None:
            return lock.acquire()
        if lock.acquire(timeout=BRIEFLY):
            return True
        if not waiting.acquire(blocking=False):
            return False
        try:
            return lock.acquire(timeout=self._patience)
        finally:
            waiting.release()

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def abandon(self) -> None:
        """Leave the process to the one that began it: this one is a fork of that."""
        process = self._process
        self._lock, self._waiting, self._process = threading.Lock(), threading.Lock(), None
        if process is not None:
            process.returncode = 0  # not to be waited for from here
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()
            process.stdout.close()

    def _running(self, begin: bytes) -> "subprocess.Popen[bytes]":
        if self._begun != begin:
            self.close()
        if self._process is None or self._process.poll() is not None:
            self.close()
            if importlib.util.find_spec(self._library) is None:
                raise InputError(self._remedy)
            paths = filter(None, [*sys.path, str(Path(__file__).parents[2])])
            self._begun = begin
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,  # a fork of this process has no half-written request to write
                # With one arena for all threads, addresses are not much more than memory.
                env={name: os.environ[name] for name in KEPT if name in os.environ}
                | {"PYTHONPATH": os.pathsep.join(paths), "MALLOC_ARENA_MAX": "1"},
                start_new_session=True,  # Ctrl-C is for the process that waits
            )
            try:
                with _ended_after(START_SECONDS, self._process):
                    _send(self._process, begin)
                    _read(self._process, len(b"ready"))
            except BaseException as error:
                self.close()
                if isinstance(error, OSError | EOFError):
                    raise InputError(f"the process that {self._purpose} does not start") from None
                raise
        return self._process


@contextmanager
def _ended_after(seconds: float, process: "subprocess.Popen[bytes]") -> Iterator[threading.Event]:
    """End the process if the block takes longer; the event says whether that happened."""
    late = threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()
        timer.join()


def _exchange(process: "subprocess.Popen[bytes]", request: bytes) -> tuple[str, str]:
    """Send a request and return the reply.

    Raises:
        OSError, EOFError: when the process ends meanwhile.
        ValueError: when it sends what is no reply.
    """
    _send(process, request)
    size = int.from_bytes(_read(process, 8), "little")
    if size > MAX_REPLY_BYTES:
        raise ValueError
    kind, text = json.loads(_read(process, size))
    return kind, text


def _send(process: "subprocess.Popen[bytes]", message: bytes) -> None:
    assert process.stdin is not None
    left = memoryview(len(message).to_bytes(8, "little") + message)
    while left:
        left = left[process.stdin.write(left) :]


def _read(process: "subprocess.Popen[bytes]", size: int) -> bytes:
    assert process.stdout is not None
    found = bytearray()
    while len(found) < size:
        piece = process.stdout.read(min(size - len(found), 1 << 20))
        if not piece:
            raise EOFError
        found += piece
    return bytes(found)
