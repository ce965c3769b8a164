"""Loading: a checkpoint's weights into a model and the store of its experts, converted on their way where need be.

Several threads read. What is plain and stays plain goes straight into its place. Experts that are converted for a GPU
are converted there: one thread, the caller's, sends them over the link as they are stored, and has the rows sent back
to host memory. Elsewhere each reading thread converts what it has read. No part of a model is held twice, but for what
is being converted. While rows of one layer are filled, the memory for the next layer's is got ready.
"""

import itertools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from duomoe.checkpoint import Checkpoint, warn
from duomoe.cuda import READERS, reader_stream
from duomoe.experts.conversion import Conversion
from duomoe.experts.format import ExpertFormat, plain_format
from duomoe.experts.matrix import DoesNotPack
from duomoe.experts.staged import FEWEST_BUFFERS, Parts, StagedExpert, StagedExperts, staged_expert
from duomoe.experts.store import ExpertStore
from duomoe.experts.stored import Filled, StoredMatrices, fill_row, needs_converting, places
from duomoe.memory.staging import StagingRing, staging_memory
from duomoe.model_folder import ModelFolder
from duomoe.models import Model
from duomoe.models.model import expected_tensors
from duomoe.models.weights import Sources
from duomoe.startup import Startup

R = TypeVar("R")

# Files in the page cache are read faster by more threads, at 50 GB/s by 16 (docs/measurements.md).
FEWEST_THREADS = 4

# Experts that a GPU is to convert are read into staging buffers, of at most so many bytes together and so many for each
# thread that reads, but FEWEST_BUFFERS at least.
STAGING_BYTES, BUFFERS_PER_THREAD = 96 << 20, 2

# What converting holds on a GPU for each value: at most float32 as it is stored, and for the matrix under way what is
# made of it. Quantising, and undoing it, go through float32.
STORED_BYTES, PACKING_BYTES, QUANTISING_BYTES = 4, 8, 40

# What torch's allocator may reserve beyond that: two segments that are not full.
SEGMENT_BYTES = 64 << 20


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
    every = list(expected_tensors(folder.architecture, folder.config))
    checkpoint.warn_of_unused(part for tensor in every for part in stored.tensors(*tensor))
    with (
        startup.part("loading", sum(stored.size(*tensor) for tensor in every)),
        _Threads(model.device, checkpoint, startup) as threads,
    ):
        dense = [threads.run(partial(_fill_dense, stored, *place, startup)) for place in model.destinations()]
        errors = _Experts(folder, store, model.device, room, threads, startup).load(dense)
        for future in dense:
            if (name := future.result()) is not None:
                _warn_of_values(checkpoint, name)
    return errors


def _fill_dense(stored: StoredMatrices, name: str, view: Tensor, startup: Startup) -> str | None:
    """Fill a non-expert parameter; return its name if it holds values that are not finite."""
    shape, finite = tuple(view.shape), True
    if stored.is_quantised(name, shape):
        # On the host: on a GPU, several at a time would take more memory than is planned.
        view.copy_(stored.matrix(name, shape, stored.read(name, shape)).values())
    else:
        finite = stored.checkpoint.read_into(name, view)
    startup.load(stored.size(name, shape))
    return None if finite else name


def _warn_of_values(checkpoint: Checkpoint, name: str) -> None:
    warn(f"{checkpoint.tensors[name].path}: {name} holds NaN or infinity, and so will the output")


class _Threads:
    """The threads that read. An error in the block, or an interrupt, ends them, and drops jobs that have not begun."""

    def __init__(self, device: torch.device, checkpoint: Checkpoint, startup: Startup) -> None:
        self._checkpoint, self._startup = checkpoint, startup
        self._busy: list[float] = []  # seconds that each job took
        self.count = max(FEWEST_THREADS, min(READERS, len(os.sched_getaffinity(0))))
        self._torch_threads = torch.get_num_threads()
        self._read_before = checkpoint.reading_seconds
        self._pool = ThreadPoolExecutor(self.count, "duomoe-load", partial(_begin_thread, device, itertools.count()))

    def run(self, job: Callable[[], R]) -> Future[R]:
        """Run a job in one of the threads."""

        def timed() -> R:
            begin = time.perf_counter()
            result = job()
            self._busy.append(time.perf_counter() - begin)
            return result

        return self._pool.submit(timed)

    def __enter__(self) -> "_Threads":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._checkpoint.close()
        torch.set_num_threads(self._torch_threads)
        reading = self._checkpoint.reading_seconds - self._read_before
        self._startup.spend("reading", reading / self.count)
        self._startup.spend("converting", max(0.0, sum(self._busy) - reading) / self.count)


def _begin_thread(device: torch.device, numbers: Iterator[int]) -> None:
    """Let a thread compute by itself, since there are enough of them, and give it a stream of its own on a GPU."""
    torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_stream(reader_stream(device, next(numbers)))


class _Experts:
    """Adds layer after layer to the store, in its format; plain ones where that is packed and a matrix does not pack.

    Args:
        folder: where the weights are.
        store: to be filled.
        device: where the model is.
        room: bytes there that conversions may take.
        threads: that read.
        startup: counts what is done.
    """

    def __init__(
        self,
        folder: ModelFolder,
        store: ExpertStore,
        device: torch.device,
        room: int,
        threads: _Threads,
        startup: Startup,
    ) -> None:
        self.folder, self.store, self.threads, self.startup = folder, store, threads, startup
        self.stored, self.device = folder.stored, device
        self.on_gpu = device.type == "cuda" and _bytes_to_convert(folder, store.format) <= room
        self.conversions: dict[object, Conversion] = {}  # by the kind of their experts
        config, sources = folder.config, folder.architecture.expert_sources
        self._layers = [[sources(config, layer, n) for n in range(config.num_experts)] for layer in config.moe_layers]
        self._layers_to_come = len(self._layers)
        self._counted = 0  # bytes of the present layer that have been shown as loaded

    def load(self, dense: list[Future[str | None]]) -> list[float]:
        """Add all layers, and return what each has lost by being quantised; ends early where one of `dense` failed."""
        errors = []
        use_device = partial(torch.cuda.set_device, self.device) if self.device.type == "cuda" else None
        with ThreadPoolExecutor(1, "duomoe-rows", use_device) as self._ahead:
            self._get_rows_ready()
            self._begin_staging()
            for experts in self._layers:
                for future in dense:
                    if future.done():
                        future.result()
                filled = self._add_layer(experts)
                errors.append(filled.error)
                for name in filled.not_finite:
                    _warn_of_values(self.folder.checkpoint, name)
        return errors

    def _begin_staging(self) -> None:
        """Begin to read what the GPU is to convert; and what converts it is made before there are rows to wait for."""
        layers = [experts for experts in self._layers if self.on_gpu and self._converts(experts)]
        staged = [staged_expert(self.stored, sources) for experts in layers for sources in experts]
        if not staged:
            return
        size = max(expert.buffer_bytes for expert in staged)
        count = min(STAGING_BYTES // size, BUFFERS_PER_THREAD * self.threads.count, len(staged))
        count = max(count, FEWEST_BUFFERS)
        ring = StagingRing(staging_memory(count * size), count, torch.cuda.Event)
        self._staged = StagedExperts(staged, ring, self._read)
        begin = time.perf_counter()
        self._conversion(staged[0])
        self.startup.spend("converting", time.perf_counter() - begin)

    def _read(self, parts: Parts, memory: Tensor) -> Future[None]:
        return self.threads.run(partial(self.stored.checkpoint.read_parts, parts, memory))

    def _converts(self, experts: list[dict[str, Sources]]) -> bool:
        """Return whether any matrix of a layer is to be converted."""
        every = (place for sources in experts for place in places(sources))
        return any(needs_converting(self.stored, self.store.format, place) for place in every)

    def _get_rows_ready(self) -> None:
        """Begin to get memory for the next layer's rows, if there is one."""
        if self._layers_to_come > 0:
            self._layers_to_come -= 1
            self._rows: Future[Tensor] | None = self._ahead.submit(self.store.rows, self.store.format)
        else:
            self._rows = None  # nor is the last layer's held by anybody but its owner

    def _next_rows(self) -> Tensor:
        """Return memory for the rows of the layer whose turn it is; that of the next one is begun."""
        assert self._rows is not None, "there are rows for every layer"
        begin = time.perf_counter()
        rows = self._rows.result()
        self.startup.spend("pinning", time.perf_counter() - begin)
        self._get_rows_ready()
        return rows

    def _add_layer(self, experts: list[dict[str, Sources]]) -> Filled:
        config, expert_format = self.folder.config, self.store.format
        self._counted = 0
        rows = self._next_rows()
        on_gpu = self.on_gpu and self._converts(experts)
        filled = (self._convert if on_gpu else self._fill)(expert_format, experts, rows)
        if filled is None:
            del rows  # before there are others
            self.startup.load(-self._counted)
            expert_format = plain_format(config.hidden_size, config.moe_intermediate_size, torch.bfloat16)
            begin = time.perf_counter()
            rows = self.store.rows(expert_format)
            self.startup.spend("pinning", time.perf_counter() - begin)
            filled = self._fill(expert_format, experts, rows)
            assert filled is not None, "a plain layer needs no packing"
        self.store.add(rows, expert_format)
        return filled

    def _count(self, size: int) -> None:
        """Count and show an expert of so many bytes as loaded."""
        self._counted += size
        self.startup.load(size)

    def _fill(self, expert_format: ExpertFormat, experts: list[dict[str, Sources]], rows: Tensor) -> Filled | None:
        """Fill rows in the reading threads, on the host or with what needs no converting; None if one does not pack."""
        together, packs = Filled(), True
        jobs = [partial(fill_row, self.stored, expert_format, *each) for each in zip(experts, rows, strict=True)]
        futures = [self.threads.run(job) for job in jobs]
        for future, sources in zip(futures, experts, strict=True):
            if not packs and future.cancel():
                continue
            # Not by `result`, which would raise: the error would keep this frame, and with it the rows.
            problem = future.exception()
            if problem is None:
                together.add(future.result())
                self._count(sum(self.stored.size(place.source, place.shape) for place in places(sources)))
            elif isinstance(problem, DoesNotPack):
                packs = False
            else:
                raise problem
        return together if packs else None

    def _convert(self, expert_format: ExpertFormat, experts: list[dict[str, Sources]], rows: Tensor) -> Filled | None:
        """Convert on the GPU what the threads read; None where an expert does not pack."""
        held = torch.empty(len(experts), dtype=torch.bool, device=self.device)
        try:
            for its_held, row in zip(held.unbind(), rows.unbind(), strict=True):
                expert, buffer = self._staged.take()
                begin = time.perf_counter()
                conversion = self._conversion(expert)
                conversion.send(buffer.memory)
                self._staged.give_back(buffer)
                conversion.run()
                its_held.copy_(conversion.holds)
                row.copy_(conversion.row, non_blocking=True)
                self.startup.spend("converting", time.perf_counter() - begin)
                self._count(expert.stored_bytes)
        finally:
            torch.cuda.current_stream().synchronize()  # host-sync ok: nothing may write to rows that are given up
        filled = Filled()
        for index, holds in enumerate(held.tolist()):  # host-sync ok: while weights are loaded
            if not holds:  # the host finds out what, and says so
                try:
                    found = fill_row(self.stored, expert_format, experts[index], rows[index])
                except DoesNotPack:
                    return None
                filled.not_finite += found.not_finite
        for conversion in self.conversions.values():
            filled.count(*conversion.squares.tolist())  # host-sync ok: while weights are loaded
            conversion.squares.zero_()
        return filled

    def _conversion(self, expert: StagedExpert) -> Conversion:
        """Return the conversion of experts that are stored like this one."""
        if expert.kind not in self.conversions:
            self.conversions[expert.kind] = Conversion(self.stored, self.store.format, expert, self.device)
        return self.conversions[expert.kind]


def _bytes_to_convert(folder: ModelFolder, expert_format: ExpertFormat) -> int:
    """Return what converting an expert holds on a GPU at most: as it is stored, its row, and what is in between."""
    config = folder.config
    values = config.hidden_size * config.moe_intermediate_size
    keeps_values = not expert_format.quantised and config.quantization is None
    of_matrix = values * (PACKING_BYTES if keeps_values else QUANTISING_BYTES)
    return 3 * values * STORED_BYTES + expert_format.row_bytes + of_matrix + SEGMENT_BYTES
