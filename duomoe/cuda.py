"""Streams that must not be one another, and captures one at a time.

torch has 32 streams for each GPU and gives them out in turn, so two that are made at different times may be the same.
What computes on a stream on which another thread captures would become part of its graph.
"""

import contextlib
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

READERS, REHEARSALS = 16, 4

_capturing = threading.Lock()


@cache
def _streams(device: torch.device) -> list[torch.cuda.Stream]:
    """Return a GPU's streams, made at once and therefore all different: for capturing, for rehearsals, for readers."""
    return [torch.cuda.Stream(device) for _ in range(1 + REHEARSALS + READERS)]


def rehearsal_stream(device: torch.device, number: int) -> torch.cuda.Stream:
    """Return the stream of a rehearsal; there are REHEARSALS, which more of them share."""
    return _streams(device)[1 + number % REHEARSALS]


def reader_stream(device: torch.device, number: int) -> torch.cuda.Stream:
    """Return the stream of a thread that reads weights, by its number below READERS."""
    return _streams(device)[1 + REHEARSALS + number]


@contextlib.contextmanager
def captured(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any = None) -> Iterator[None]:
    """Capture what this thread does within, on a stream that nothing else uses; other threads' captures wait.

    torch waits for the whole GPU as a capture begins, which another thread's capture would not survive.
    """
    with _capturing, torch.cuda.device(device):
        capture = torch.cuda.graph(graph, pool=pool, stream=_streams(device)[0], capture_error_mode="thread_local")
        with capture:
            yield
