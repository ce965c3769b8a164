"""The inside of a limited process: it takes its limits, then answers requests until there are no more.

A message is its length in 8 bytes, little endian, and so many bytes of JSON. The first one says what the process works
with. It replies "ready", bare, when it has that and its limits. Each further one is a request; the reply is
["text", what was asked for] or ["error", why not]. Nothing that runs here imports torch, which would make each start
take seconds.
"""

import contextlib
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CPU_SECONDS = 20  # for one request, in case nobody is left to end this process

# Where the system does not say how many addresses this process has, it is taken to have no more.
MOST_ADDRESSES = 1 << 30


def serve(begin: Callable[[Any], Callable[[Any], str]], memory: int) -> None:
    """Answer requests from stdin on stdout.

    Args:
        begin: takes the first message, and returns what answers a request or raises why not. It has used already what
            Python and the libraries read from files when it is first used.
        memory: bytes of addresses that the process may have beyond those it has when it begins to answer.
    """
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    answer = begin(json.loads(requests.read(int.from_bytes(requests.read(8), "little"))))
    _limit(resource.RLIMIT_AS, _addresses() + memory)
    _limit(resource.RLIMIT_NOFILE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NPROC, 0)
    replies.write(b"ready")
    replies.flush()
    while header := requests.read(8):
        _limit(resource.RLIMIT_CPU, int(time.process_time()) + CPU_SECONDS)
        reply = json.dumps(_reply(answer, requests.read(int.from_bytes(header, "little")), memory)).encode()
        replies.write(len(reply).to_bytes(8, "little") + reply)
        replies.flush()


def _reply(answer: Callable[[Any], str], request: bytes, memory: int) -> list[str]:
    try:
        return ["text", answer(json.loads(request))]
    except MemoryError:
        return ["error", f"it needs more than {memory >> 20} MiB of memory"]
    except BaseException as error:  # a template can fail in any way, and a panic of Rust is no Exception
        return ["error", str(error)[:1000] or type(error).__name__]


def _limit(kind: int, value: int) -> None:
    """Lower a limit of this process, where the system has it."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def _addresses() -> int:
    """Return how many bytes of addresses this process has."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return MOST_ADDRESSES
