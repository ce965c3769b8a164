"""Loading: a checkpoint's weights into a model and the store of its experts, converted on their way where need be.

Several threads each read and convert one tensor or one expert at a time. What is plain and stays plain is read straight
into its place. For a GPU, experts are converted there: their matrices cross the link as they are stored, the rows cross
it back to host memory. Of a model nothing is ever held twice, only what each thread has at hand. While threads fill the
rows of one layer, the memory for the next layer's is got ready.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from duomoe.checkpoint import HOST, Checkpoint, warn
from duomoe.experts.format import ExpertFormat, plain_format
from duomoe.experts.matrix import DoesNotPack
from duomoe.experts.store import ExpertStore
from duomoe.experts.stored import Filled, StoredMatrices, fill_row
from duomoe.model_folder import ModelFolder
from duomoe.models import Model
from duomoe.models.model import expected_tensors
from duomoe.models.weights import Sources
from duomoe.startup import Startup

R = TypeVar("R")

# Files in the page cache are read faster by more threads, at 50 GB/s by 16 (docs/measurements.md).
FEWEST_THREADS, MOST_THREADS = 4, 16

# What a thread that converts holds on a GPU for each value of a matrix: itself, and what it becomes. Quantising, and
# undoing it, go through float32.
PACKING_BYTES, QUANTISING_BYTES = 8, 40

# What torch's allocator may reserve for a thread's stream beyond that: two segments that are not full.
THREAD_BYTES = 64 << 20


def load_weights(folder: ModelFolder, model: Model, store: ExpertStore, room: int, startup: Startup) -> list[float]:
    """Fill a model and the empty store of its experts.

    Args:
        folder: where the weights are.
        model: of that folder's architecture and config.
        store: of the experts, in any format.
        room: bytes on the model's GPU that conversions may take; where they are too few, the host converts.
        startup: counts and shows what is done.

    Returns:
        For each MoE layer what its experts have lost by being quantised while they were loaded, as
        ‖quantised − stored‖ / ‖stored‖; all 0 where they are as stored.

    Raises:
        InputError: when reading fails, or a tensor's values are none that can be used.

    Warns:
        RuntimeWarning: for plain tensors with values that are not finite, and for tensors without a use.
    """
    stored, checkpoint = folder.stored, folder.checkpoint
    every = [
        part for tensor in expected_tensors(folder.architecture, folder.config) for part in stored.tensors(*tensor)
    ]
    checkpoint.warn_of_unused(every)
    with startup.part("loading", sum(checkpoint.tensors[name].size for name in every)):
        threads = max(FEWEST_THREADS, min(MOST_THREADS, len(os.sched_getaffinity(0))))
        converting = HOST
        if model.device.type == "cuda" and (fit := room // _bytes_of_a_thread(folder, store.format)) > 0:
            threads, converting = min(threads, fit), model.device
        with _Threads(threads, model.device, checkpoint, startup) as run:
            dense = [run(partial(_fill, stored, *place), _size(stored, *place)) for place in model.destinations()]
            errors = _load_experts(folder, store, converting, run, startup)
            for future in dense:
                if (unusual := future.result()) is not None:
                    _warn_of_values(checkpoint, unusual)
    return errors


def _bytes_of_a_thread(folder: ModelFolder, expert_format: ExpertFormat) -> int:
    """Return what a thread that converts experts holds on a GPU at most."""
    values = folder.config.hidden_size * folder.config.moe_intermediate_size
    keeps_values = not expert_format.quantised and folder.config.quantization is None
    return expert_format.row_bytes + values * (PACKING_BYTES if keeps_values else QUANTISING_BYTES) + THREAD_BYTES


class _Threads:
    """The threads that load; called with a job and the bytes it reads, runs it in one of them.

    An error in the block, or an interrupt, ends them before it goes on; jobs that have not begun are dropped.
    """

    def __init__(self, count: int, device: torch.device, checkpoint: Checkpoint, startup: Startup) -> None:
        self._count, self._checkpoint, self._startup = count, checkpoint, startup
        self._busy: list[float] = []  # seconds that each job took
        self._pool = ThreadPoolExecutor(count, "duomoe-load", partial(_use_stream, device))

    def __call__(self, job: Callable[[], R], size: int) -> Future[R]:
        def timed() -> R:
            begin = time.perf_counter()
            result = job()
            self._busy.append(time.perf_counter() - begin)
            self._startup.load(size)
            return result

        return self._pool.submit(timed)

    def __enter__(self) -> "_Threads":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        reading = self._checkpoint.reading_seconds
        self._startup.spend("reading", reading / self._count)
        self._startup.spend("converting", max(0.0, sum(self._busy) - reading) / self._count)


def _use_stream(device: torch.device) -> None:
    """Give a thread a stream of its own, so that its copies and kernels wait for no other thread's."""
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))


def _size(stored: StoredMatrices, name: str, view: Tensor) -> int:
    """Return the bytes of what a parameter is stored as."""
    return sum(stored.checkpoint.tensors[part].size for part in stored.tensors(name, tuple(view.shape)))


def _fill(stored: StoredMatrices, name: str, view: Tensor) -> str | None:
    """Fill a non-expert parameter; return its name if it holds values that are not finite."""
    shape = tuple(view.shape)
    if not stored.is_quantised(name, shape):
        return None if stored.checkpoint.read_into(name, view) else name
    view.copy_(stored.read(name, shape, view.device).values())
    _wait(view.device)
    return None


def _wait(device: torch.device) -> None:
    """Let the host wait for what this thread has given a GPU to do."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # host-sync ok: while weights are loaded


def _warn_of_values(checkpoint: Checkpoint, name: str) -> None:
    warn(f"{checkpoint.tensors[name].path}: {name} holds NaN or infinity, and so will the output")


@dataclass(frozen=True)
class _Layer:
    """The rows of one layer, which threads are filling."""

    number: int
    expert_format: ExpertFormat
    rows: Tensor
    experts: list[Future[Filled]]


def _load_experts(
    folder: ModelFolder, store: ExpertStore, converting: torch.device, run: _Threads, startup: Startup
) -> list[float]:
    """Add all layers' experts to the store, converted to its format; plain ones where that is packed and one is not.

    Returns:
        What each layer has lost by being quantised.
    """
    config = folder.config
    errors: list[float] = []
    under_way: deque[_Layer] = deque()

    def begin(number: int, expert_format: ExpertFormat) -> _Layer:
        started = time.perf_counter()
        rows = store.rows(expert_format)
        startup.spend("pinning", time.perf_counter() - started)
        layer = _Layer(number, expert_format, rows, [])
        for expert in range(config.num_experts):
            sources = folder.architecture.expert_sources(config, number, expert)
            job = partial(_fill_expert, folder.stored, expert_format, sources, rows[expert], converting)
            layer.experts.append(run(job, _size_of_expert(folder.stored, sources)))
            if converting != HOST and number == config.moe_layers[0] and expert == 0:
                wait(layer.experts)  # so that Triton compiles in one thread, not in all of them
        return layer

    def finish(layer: _Layer) -> None:
        filled = _all_of(layer.experts)
        if filled is None:
            number = layer.number
            del layer  # and its rows, before there are others
            layer = begin(number, plain_format(config.hidden_size, config.moe_intermediate_size, torch.bfloat16))
            filled = _all_of(layer.experts)
            assert filled is not None, "a plain layer needs no packing"
        store.add(layer.rows, layer.expert_format)
        errors.append(filled.error)
        for name in filled.not_finite:
            _warn_of_values(folder.checkpoint, name)

    for number in config.moe_layers:
        under_way.append(begin(number, store.format))
        if len(under_way) > 1:
            finish(under_way.popleft())
    while under_way:
        finish(under_way.popleft())
    return errors


def _fill_expert(
    stored: StoredMatrices,
    expert_format: ExpertFormat,
    sources: Mapping[str, Sources],
    row: Tensor,
    converting: torch.device,
) -> Filled:
    """Fill an expert's row, by way of `converting` if there is something to convert."""
    matrices = [matrix for each in sources.values() for matrix in each]
    straight = expert_format.name == "plain" and not any(stored.is_quantised(*matrix) for matrix in matrices)
    made = row if straight or row.device == converting else torch.empty_like(row, device=converting)
    filled = fill_row(stored, expert_format, sources, made)
    if made is not row:
        row.copy_(made)
    _wait(row.device)
    return filled


def _size_of_expert(stored: StoredMatrices, sources: Mapping[str, Sources]) -> int:
    """Return the bytes of what an expert is stored as."""
    names = (part for each in sources.values() for matrix in each for part in stored.tensors(*matrix))
    return sum(stored.checkpoint.tensors[name].size for name in names)


def _all_of(experts: list[Future[Filled]]) -> Filled | None:
    """Wait for all experts of a layer; None when there is one that does not pack."""
    together, packs = Filled(), True
    for expert in experts:
        try:
            together.add(expert.result())
        except DoesNotPack:
            packs = False
    return together if packs else None
