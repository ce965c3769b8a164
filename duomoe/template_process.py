"""Chat templates rendered in a process of their own, within limits of time and memory."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from duomoe.errors import InputError

WORKER = Path(__file__).parent / "template_worker.py"

START_SECONDS = 60.0
RENDER_SECONDS = 5.0
MAX_REPLY_BYTES = 256 << 20

# All that a template's process sees of this one's environment, which may hold secrets.
KEPT = ("TZ", "LD_LIBRARY_PATH", "PYTHONHOME")


class TemplateProcess:
    """A process that renders templates, begun when it is first needed and again after it had to be ended.

    It is a new program, not a fork: this process may hold a GPU. It ends when this process does, whatever ends that.
    Threads may share it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, template: str, variables: dict[str, Any]) -> str:
        """Render a template.

        Args:
            template: in Jinja's language, with what transformers adds to it.
            variables: what it sees, as JSON can say it.

        Raises:
            InputError: when it fails, or takes more time or memory than it may; when jinja2 is not installed; and when
                the variables are not JSON.
        """
        try:
            request = json.dumps([template, variables]).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"messages, tools and template arguments must be JSON: {error}") from None
        with self._lock:
            process = self._running()
            try:
                with _ended_after(RENDER_SECONDS, process) as late:
                    kind, text = _exchange(process, request)
            except (OSError, EOFError, ValueError):
                self.close()
                reason = f"it takes more than {RENDER_SECONDS:g} seconds" if late.is_set() else "its process ended"
                raise InputError(f"the chat template failed: {reason}") from None
            except BaseException:
                self.close()  # its reply would be taken for that to the next request
                raise
            if late.is_set():
                self.close()
        if kind == "error":
            raise InputError(f"the chat template failed: {text}")
        return text

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def abandon(self) -> None:
        """Leave the process to the one that began it: this one is a fork of that."""
        process = self._process
        self._lock, self._process = threading.Lock(), None
        if process is not None:
            process.returncode = 0  # not to be waited for from here
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()
            process.stdout.close()

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._process.poll() is not None:
            if importlib.util.find_spec("jinja2") is None:
                raise InputError("--chat needs jinja2; install it with: pip install 'duomoe[chat]'")
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,  # a fork of this process has no half-written request to write
                env={name: os.environ[name] for name in KEPT if name in os.environ}
                | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # Ctrl-C is for the process that waits
            )
            try:
                with _ended_after(START_SECONDS, self._process):
                    _read(self._process, len(b"ready"))
            except BaseException as error:
                self.close()
                if isinstance(error, EOFError):
                    raise InputError("the process that renders chat templates does not start") from None
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
    assert process.stdin is not None
    left = memoryview(len(request).to_bytes(8, "little") + request)
    while left:
        left = left[process.stdin.write(left) :]
    size = int.from_bytes(_read(process, 8), "little")
    if size > MAX_REPLY_BYTES:
        raise ValueError
    kind, text = json.loads(_read(process, size))
    return kind, text


def _read(process: "subprocess.Popen[bytes]", size: int) -> bytes:
    assert process.stdout is not None
    found = bytearray()
    while len(found) < size:
        piece = process.stdout.read(min(size - len(found), 1 << 20))
        if not piece:
            raise EOFError
        found += piece
    return bytes(found)


PROCESS = TemplateProcess()
os.register_at_fork(after_in_child=PROCESS.abandon)
