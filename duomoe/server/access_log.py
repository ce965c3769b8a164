"""One line of JSON for each request, written by a thread of its own: whoever reads the log may be slow."""

import contextlib
import json
import queue
import sys
import threading
from typing import Any

# So many lines may wait to be written; those beyond are lost.
WAITING = 10_000


class AccessLog:
    """Writes lines to standard output until it is closed."""

    def __init__(self) -> None:
        self._lines: queue.Queue[str | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._write_all, name="server-access-log", daemon=True)
        self._thread.start()

    def write(self, line: dict[str, Any]) -> None:
        """Have a line written soon."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(json.dumps(line))

    def close(self) -> None:
        """Write what waits, as far as it is read within a second."""
        try:
            self._lines.put(None, timeout=1)
        except queue.Full:
            return
        self._thread.join(timeout=1)

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                print(line, flush=True, file=sys.stdout)
            except OSError:  # its reader has left
                return
