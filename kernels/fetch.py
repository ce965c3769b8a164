"""Rows of experts from host memory into slots, by a list that is known on the device alone.

A fixed number of programs, the lanes, copy a row side by side. A row is cut into chunks of `CHUNK` bytes (the last one
may be shorter), and lane `p` owns the chunks `p`, `p + LANES`, `p + 2 * LANES` and so on. How many of its chunks of the
row now in a slot a lane has copied is its `progress` there, so that a copy which stopped early can be resumed. Rows of
different layers may have different sizes; a slot has room for the largest.
"""

import ctypes
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from duomoe.kernels.configuration import Configuration
from duomoe.kernels.operator import operator

LANES = 32
"""How many programs copy side by side: with a chunk each in flight, several times what hides a link's latency."""

CHUNK = 16384
"""Bytes that a lane copies between two looks at the clock."""


def _bytes(count: int, lane: int, row_bytes: int) -> int:
    """Return how many bytes a lane's first `count` chunks of a row have."""
    last = lane + (count - 1) * LANES  # its last chunk, which may be shorter
    return count * CHUNK - max(0, (last + 1) * CHUNK - row_bytes) if count else 0


def _copy_rows(
    table: Tensor,
    sizes: Tensor,
    num_experts: int,
    entries: Tensor,
    pool: Tensor,
    progress: Tensor,
    go_on: Callable[[], bool],
) -> tuple[int, int]:
    """Copy the rows of a list, chunk by chunk as long as `go_on`.

    Returns:
        How many bytes were copied, and how many had been copied before.
    """
    addresses, every_size = table.tolist(), sizes.tolist()  # host-sync ok: the reference runs on the CPU
    copied = present = 0
    for expert, slot, resume in entries.T.tolist():  # host-sync ok: the reference runs on the CPU
        if expert < 0:
            break
        row_bytes = every_size[expert // num_experts]
        source = addresses[expert // num_experts] + expert % num_experts * row_bytes
        done = progress[slot].tolist() if resume else [0] * LANES  # host-sync ok: the reference runs on the CPU
        for lane in range(LANES):
            before = _bytes(done[lane], lane, row_bytes)
            while (start := (lane + done[lane] * LANES) * CHUNK) < row_bytes and go_on():
                size = min(CHUNK, row_bytes - start)
                ctypes.memmove(pool[slot].data_ptr() + start, source + start, size)
                done[lane] += 1
            copied += _bytes(done[lane], lane, row_bytes) - before
            present += before
        progress[slot] = torch.tensor(done, dtype=torch.int32)
    return copied, present


def fetch_reference(
    table: Tensor,
    sizes: Tensor,
    num_experts: int,
    misses: Tensor,
    pool: Tensor,
    progress: Tensor,
    moved: Tensor,
) -> None:
    """Compute `fetch` with plain Python."""
    copied, present = _copy_rows(table, sizes, num_experts, misses, pool, progress, lambda: True)
    moved[0] += copied
    moved[2] += present


@operator(mutates_args=("pool", "progress", "moved"))
def fetch(
    table: Tensor,
    sizes: Tensor,
    num_experts: int,
    misses: Tensor,
    pool: Tensor,
    progress: Tensor,
    moved: Tensor,
) -> None:
    """Copy the rows that a layer waits for into their slots. A fetch ahead into the same pool must have ended.

    Args:
        table: [layers] int64, the address of each layer's rows, uint8 [num_experts, row bytes], as the device sees it;
            divisible by 16.
        sizes: [layers] int32, the bytes of a row of each layer, multiples of 256.
        num_experts: experts per layer.
        misses: [3, width] int32, from `admit`: flat number, slot, and 1 if what `progress` says is there already.
        pool: [num_slots, slot bytes] uint8, the slots, which have room for the largest row.
        progress: [num_slots, LANES] int32, in chunks; that of the slots filled here is complete afterwards.
        moved: [3] int64, bytes moved so far: those demanded, to which what is copied is added; those copied ahead; and
            of the latter, those needed, to which what was there already is added.
    """
    fetch_reference(table, sizes, num_experts, misses, pool, progress, moved)


@fetch.register_fake
def _(
    table: Tensor,
    sizes: Tensor,
    num_experts: int,
    misses: Tensor,
    pool: Tensor,
    progress: Tensor,
    moved: Tensor,
) -> None:
    return None


def fetch_ahead_reference(
    table: Tensor,
    sizes: Tensor,
    num_experts: int,
    ahead: Tensor,
    pool: Tensor,
    progress: Tensor,
    clock: Tensor,
    issued: Tensor,
    moved: Tensor,
) -> None:
    """Compute `fetch_ahead` with plain Python."""
    copied, _ = _copy_rows(table, sizes, num_experts, ahead, pool, progress, lambda: torch.equal(clock, issued))
    moved[1] += copied


@operator(mutates_args=("pool", "progress", "moved"))
def fetch_ahead(
    table: Tensor,
    sizes: Tensor,
    num_experts: int,
    ahead: Tensor,
    pool: Tensor,
    progress: Tensor,
    clock: Tensor,
    issued: Tensor,
    moved: Tensor,
) -> None:
    """Copy rows that later layers are expected to need, until the next wave begins.

    Before every chunk a lane looks at the clock, which `admit` advances, perhaps meanwhile, and stops if it has moved.

    Args:
        table: as in `fetch`, and so are `sizes`, `num_experts` and `pool`.
        sizes: see above.
        num_experts: see above.
        ahead: [3, n] int32, from `admit_ahead`.
        pool: see above.
        progress: [num_slots, LANES] int32, in chunks; exact afterwards for every entry, reached or not.
        clock: [1] int64.
        issued: [1] int64, what the clock must show.
        moved: [3] int64, see `fetch`; what is copied is added to those copied ahead.
    """
    fetch_ahead_reference(table, sizes, num_experts, ahead, pool, progress, clock, issued, moved)


@fetch_ahead.register_fake
def _(
    table: Tensor,
    sizes: Tensor,
    num_experts: int,
    ahead: Tensor,
    pool: Tensor,
    progress: Tensor,
    clock: Tensor,
    issued: Tensor,
    moved: Tensor,
) -> None:
    return None


@triton.jit
def _bytes_of(
    count: tl.tensor, lane: tl.tensor, row_bytes: tl.tensor, LANES: tl.constexpr, CHUNK: tl.constexpr
) -> tl.tensor:
    """Return how many bytes a lane's first `count` chunks of a row have; see `_bytes`."""
    end = (lane + (count - 1) * LANES + 1) * CHUNK
    return tl.where(count > 0, count * CHUNK - tl.maximum(end - row_bytes, 0), 0).to(tl.int64)


@triton.jit(do_not_specialize=("num_experts", "width"))
def _fetch_kernel(
    table: tl.tensor,
    sizes: tl.tensor,
    entries: tl.tensor,
    pool: tl.tensor,
    progress: tl.tensor,
    clock: tl.tensor,
    issued: tl.tensor,
    copied: tl.tensor,
    present: tl.tensor,
    num_experts: tl.tensor,
    slot_words: tl.tensor,
    width: tl.tensor,
    AHEAD: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_W: tl.constexpr,
) -> None:
    """Each program is a lane and copies its chunks of every row of the list, in words of 4 bytes."""
    lane = tl.program_id(0)
    count = tl.zeros((), tl.int32)
    for first in range(0, width, BLOCK_W):
        column = first + tl.arange(0, BLOCK_W)
        count += tl.sum((tl.load(entries + column, mask=column < width, other=-1) >= 0).to(tl.int32), 0)
    moved = tl.zeros((), tl.int64)
    found = tl.zeros((), tl.int64)
    for entry in range(count):
        expert = tl.load(entries + entry)
        slot = tl.load(entries + width + entry).to(tl.int64)
        row_bytes = tl.load(sizes + expert // num_experts)
        words = tl.multiple_of(row_bytes // 4, 16)
        rows = tl.load(table + expert // num_experts).to(tl.pointer_type(tl.int32))
        source = tl.multiple_of(rows, 16) + (expert % num_experts).to(tl.int64) * words
        target = pool + slot * slot_words
        reached = progress + slot * LANES + lane
        begin = tl.where(tl.load(entries + 2 * width + entry) > 0, tl.load(reached), 0)
        # All threads must have read how far the lane had come before one of them says how far it has come now.
        tl.debug_barrier()
        share = (tl.cdiv(words, CHUNK // 4) + LANES - 1 - lane) // LANES
        done = begin
        if AHEAD:
            time = tl.load(issued)
            # An atomic addition of nothing, because one thread does it and tells the others. Had each thread looked for
            # itself, some might have copied their part of a chunk, and others not.
            while (done < share) & (tl.atomic_add(clock, 0, sem="relaxed") == time):
                _copy_chunk(source, target, lane + done * LANES, words, CHUNK)
                done += 1
        else:
            while done < share:
                _copy_chunk(source, target, lane + done * LANES, words, CHUNK)
                done += 1
        tl.store(reached, done)
        before = _bytes_of(begin, lane, row_bytes, LANES, CHUNK)
        moved += _bytes_of(done, lane, row_bytes, LANES, CHUNK) - before
        found += before
    tl.atomic_add(copied, moved, sem="relaxed")
    if not AHEAD:
        tl.atomic_add(present, found, sem="relaxed")


@triton.jit
def _copy_chunk(source: tl.tensor, target: tl.tensor, chunk: tl.tensor, words: tl.tensor, CHUNK: tl.constexpr) -> None:
    """Copy a block of words. Rows are read once, so past the L1 cache; slots are read soon, so they may stay."""
    at = chunk * (CHUNK // 4) + tl.arange(0, CHUNK // 4)
    value = tl.load(source + at, mask=at < words, cache_modifier=".cg")
    tl.store(target + at, value, mask=at < words)


def _options(ahead: bool) -> dict[str, int | bool]:
    """Choose so few warps that each thread has several loads of 16 bytes in flight."""
    return {"AHEAD": ahead, "LANES": LANES, "CHUNK": CHUNK, "BLOCK_W": 128, "num_warps": 4}


def _check(entries: Tensor, pool: Tensor, progress: Tensor) -> None:
    """Assert that the shapes fit together."""
    num_slots, slot_bytes = pool.shape
    assert entries.shape[0] == 3, "a list is [3, width]"
    assert slot_bytes % 256 == 0, "rows and slots are whole blocks of 256 bytes"
    assert slot_bytes < 2**31 - LANES * CHUNK, "slots are under 2 GiB"
    assert progress.shape == (num_slots, LANES), "progress is [num_slots, LANES]"


@fetch.register_cuda
def fetch_triton(
    table: Tensor,
    sizes: Tensor,
    num_experts: int,
    misses: Tensor,
    pool: Tensor,
    progress: Tensor,
    moved: Tensor,
) -> None:
    """Launch the kernel of `fetch`."""
    _check(misses, pool, progress)
    slot_words, width = pool.shape[1] // 4, misses.shape[1]
    _fetch_kernel[(LANES,)](
        table,
        sizes,
        misses,
        pool.view(torch.int32),
        progress,
        None,
        None,
        moved,
        moved[2:],
        num_experts,
        slot_words,
        width,
        **_options(False),
    )


@fetch_ahead.register_cuda
def fetch_ahead_triton(
    table: Tensor,
    sizes: Tensor,
    num_experts: int,
    ahead: Tensor,
    pool: Tensor,
    progress: Tensor,
    clock: Tensor,
    issued: Tensor,
    moved: Tensor,
) -> None:
    """Launch the kernel of `fetch_ahead`."""
    _check(ahead, pool, progress)
    slot_words, width = pool.shape[1] // 4, ahead.shape[1]
    _fetch_kernel[(LANES,)](
        table,
        sizes,
        ahead,
        pool.view(torch.int32),
        progress,
        clock,
        issued,
        moved[1:],
        None,
        num_experts,
        slot_words,
        width,
        **_options(True),
    )


def configurations(dtype: torch.dtype, capability: int) -> list[Configuration]:
    """List what the launchers choose; rows are bytes."""
    types = {"table": "*i64:16", "sizes": "*i32:16", "entries": "*i32:16", "pool": "*i32:16", "progress": "*i32:16"}
    types |= {"slot_words": "i32:16", "num_experts": "i32", "width": "i32"}
    demand = types | {"copied": "*i64:16", "present": "*i64:16"}
    ahead = types | {"clock": "*i64:16", "issued": "*i64:16", "copied": "*i64"}
    return [
        Configuration(_fetch_kernel, demand, _options(False), wide_loads=True),
        Configuration(_fetch_kernel, ahead, _options(True), wide_loads=True),
    ]
