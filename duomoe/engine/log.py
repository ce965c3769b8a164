"""The engine's log: what arrived, what was done about it and how long that took, a JSON object a line.

Times are seconds on the engine's clock. There are no tokens in it, but a part of the keys of their pages, by which a
simulation knows which prompts begin alike (simulation.py).

| event | fields |
|---|---|
| `begin` | `pages`, `max_batch`, `pass_tokens`, `interruptible`: what bounds decisions |
| `arrive` | `id`, `at`, `tokens`, `keys` (null where pages are not shared) |
| `prefill`, `decode` | `ids`, `at` (its end), `seconds` that it took by itself, `tokens` that it computed |
| `end` | `id`, `at`, `tokens`: of the whole sequence; `failed` where it ended with an error or was cancelled |
"""

import contextlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from duomoe.engine.scheduler import Limits
from duomoe.engine.task import Task
from duomoe.errors import InputError
from duomoe.output_file import output_target

# So much of a page's key is written: enough to tell pages apart.
KEY_BYTES = 8


class EngineLog:
    """Writes the log of one engine.

    Args:
        path: the file, which is begun anew.

    Attributes:
        path: the same, links followed.

    Raises:
        InputError: when it cannot be written, or is something else than a regular file.

    Warns:
        RuntimeWarning: when writing fails later; the log ends there.
    """

    def __init__(self, path: Path) -> None:
        self.path = output_target(path, "--engine-log")
        self._ids: dict[Task, int] = {}
        self._count = 0
        try:
            self._file: IO[str] | None = self.path.open("w", encoding="utf-8", buffering=1)
        except OSError as error:
            raise InputError(f"--engine-log: {path}: {error.strerror}") from None

    def begin(self, pages: int, limits: Limits) -> None:
        """Note what bounds decisions."""
        self._write("begin", pages=pages, **limits._asdict())

    def arrive(self, task: Task) -> None:
        """Note that a task was queued."""
        self._ids[task] = self._count
        self._count += 1
        keys = None if task.keys is None else [key[:KEY_BYTES].hex() for key in task.keys.of(task.tokens)]
        self._write("arrive", id=self._ids[task], at=task.arrived, tokens=task.length, keys=keys)

    def advance(self, kind: str, tasks: Sequence[Task], at: float, seconds: float, tokens: int) -> None:
        """Note a pass, "prefill", or a step, "decode", that has computed so many tokens.

        A task may have ended meanwhile: its text may have failed, which is made while the next step is computed.
        """
        ids = [self._ids[task] for task in tasks if task in self._ids]
        self._write(kind, ids=ids, at=at, seconds=seconds, tokens=tokens)

    def end(self, task: Task, at: float, failed: bool) -> None:
        """Note that a task has ended, if it was queued and has not ended before."""
        number = self._ids.pop(task, None)
        if number is not None:
            self._write("end", id=number, at=at, tokens=task.length, failed=failed)

    def close(self) -> None:
        """End the log."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:
                self._tell(error)

    def _write(self, event: str, **fields: object) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps({"event": event} | fields) + "\n")
        except OSError as error:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):
                file.close()  # which tries to write once more
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        """Warn that the log has ended. Where warnings are errors, nothing is said: no request is to fail by its log."""
        with contextlib.suppress(Warning):
            warnings.warn(f"--engine-log: {self.path}: {error.strerror}; the log ends", RuntimeWarning, stacklevel=3)
