"""Rows of experts from host memory into slots, by a list that is known on the device alone.

A fixed number of programs, the lanes, copy a row side by side. A row is cut into chunks of `CHUNK` bytes (the last one
may be shorter), and lane `p` owns the chunks `p`, `p + LANES`, `p + 2 * LANES` and so on. How many of its chunks of the
row now in a slot a lane has copied is its `progress` there, so that a copy which stopped early can be resumed.
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
    """Return how many bytes a lane's first `count` chunks have."""
    end = (lane + 1 + (count - 1) * LANES) * CHUNK
    return count * CHUNK - max(end - row_bytes, 0)


def _copy_rows(
    table: Tensor, num_experts: int, entries: Tensor, pool: Tensor, progress: Tensor, go_on: Callable[[], bool]
) -> tuple[int, int]:
    """Copy the rows of a list, chunk by chunk as long as `go_on`.

    Returns:
        How many bytes were copied, and how many had been copied before.
    """
    addresses = table.tolist()  # host-sync ok: the reference runs on the CPU
    row_bytes = pool.shape[1]
    copied = present = 0
    for expert, slot, resume in entries.T.tolist():  # host-sync ok: the reference runs on the CPU
        if expert < 0:
            break
        source = addresses[expert // num_experts] + expert % num_experts * row_bytes
        target = pool.data_ptr() + slot * row_bytes
        done = progress[slot].tolist() if resume else [0] * LANES  # host-sync ok: the reference runs on the CPU
        for lane in range(LANES):
            present += _bytes(done[lane], lane, row_bytes)
            while (start := (lane + done[lane] * LANES) * CHUNK) < row_bytes and go_on():
                size = min(CHUNK, row_bytes - start)
                ctypes.memmove(target + start, source + start, size)
                copied += size
                done[lane] += 1
        progress[slot] = torch.tensor(done, dtype=torch.int32)
    return copied, present


def fetch_reference(
    table: Tensor, num_experts: int, misses: Tensor, pool: Tensor, progress: Tensor, moved: Tensor
) -> None:
    """Compute `fetch` with plain Python."""
    copied, present = _copy_rows(table, num_experts, misses, pool, progress, lambda: True)
    moved[0] += copied
    moved[2] += present


@operator(mutates_args=("pool", "progress", "moved"))
def fetch(table: Tensor, num_experts: int, misses: Tensor, pool: Tensor, progress: Tensor, moved: Tensor) -> None:
    """Copy the rows that a layer waits for into their slots. A fetch ahead into the same pool must have ended.

    Args:
        table: [layers] int64, the address of each layer's rows, uint8 [num_experts, row_bytes], as the device sees it;
            divisible by 16.
        num_experts: experts per layer.
        misses: [3, width] int32, from `admit`: flat number, slot, and 1 if what `progress` says is there already.
        pool: [num_slots, row_bytes] uint8, the slots; `row_bytes` is a multiple of 256.
        progress: [num_slots, LANES] int32, in chunks; that of the slots filled here is complete afterwards.
        moved: [3] int64, bytes moved so far: those demanded, to which what is copied is added; those copied ahead; and
            of the latter, those needed, to which what was there already is added.
    """
    fetch_reference(table, num_experts, misses, pool, progress, moved)


@fetch.register_fake
def _(table: Tensor, num_experts: int, misses: Tensor, pool: Tensor, progress: Tensor, moved: Tensor) -> None:
    return None


def fetch_ahead_reference(
    table: Tensor,
    num_experts: int,
    ahead: Tensor,
    pool: Tensor,
    progress: Tensor,
    clock: Tensor,
    issued: Tensor,
    moved: Tensor,
) -> None:
    """Compute `fetch_ahead` with plain Python."""
    copied, _ = _copy_rows(table, num_experts, ahead, pool, progress, lambda: torch.equal(clock, issued))
    moved[1] += copied


@operator(mutates_args=("pool", "progress", "moved"))
def fetch_ahead(
    table: Tensor,
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
        table: as in `fetch`, and so are `num_experts` and `pool`.
        num_experts: see above.
        ahead: [3, n] int32, from `admit_ahead`.
        pool: see above.
        progress: [num_slots, LANES] int32, in chunks; exact afterwards for every entry, reached or not.
        clock: [1] int64.
        issued: [1] int64, what the clock must show.
        moved: [3] int64, see `fetch`; what is copied is added to those copied ahead.
    """
    fetch_ahead_reference(table, num_experts, ahead, pool, progress, clock, issued, moved)


@fetch_ahead.register_fake
def _(
    table: Tensor,
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
    count: tl.tensor, lane: tl.tensor, words: tl.tensor, LANES: tl.constexpr, CHUNK: tl.constexpr
) -> tl.tensor:
    """Return how many bytes a lane's first `count` chunks have; see `_bytes`."""
    end = (lane + 1 + (count - 1) * LANES) * CHUNK
    return (count * CHUNK - tl.maximum(end - words * 4, 0)).to(tl.int64)


@triton.jit(do_not_specialize=("num_experts", "width"))
def _fetch_kernel(
    table: tl.tensor,
    entries: tl.tensor,
    pool: tl.tensor,
    progress: tl.tensor,
    clock: tl.tensor,
    issued: tl.tensor,
    copied: tl.tensor,
    present: tl.tensor,
    num_experts: tl.tensor,
    words: tl.tensor,
    width: tl.tensor,
    AHEAD: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_W: tl.constexpr,
) -> None:
    """Each program is a lane and copies its chunks of every row of the list, in words of 4 bytes."""
    lane = tl.program_id(0)
    column = tl.arange(0, BLOCK_W)
    count = tl.sum((tl.load(entries + column, mask=column < width, other=-1) >= 0).to(tl.int32), 0)
    word = tl.arange(0, CHUNK // 4)
    share = (tl.cdiv(words, CHUNK // 4) + LANES - 1 - lane) // LANES
    moved = tl.zeros((), tl.int64)
    found = tl.zeros((), tl.int64)
    for entry in range(count):
        expert = tl.load(entries + entry)
        slot = tl.load(entries + width + entry).to(tl.int64)
        rows = tl.load(table + expert // num_experts).to(tl.pointer_type(tl.int32))
        source = tl.multiple_of(rows, 16) + (expert % num_experts).to(tl.int64) * words
        target = pool + slot * words
        reached = progress + slot * LANES + lane
        begin = tl.where(tl.load(entries + 2 * width + entry) > 0, tl.load(reached), 0)
        # All threads must have read how far the lane had come before one of them says how far it has come now.
        tl.debug_barrier()
        done = begin
        if AHEAD:
            time = tl.load(issued)
            # An atomic addition of nothing, because one thread does it and tells the others. Had each thread looked for
            # itself, some might have copied their part of a chunk, and others not.
            while (done < share) & (tl.atomic_add(clock, 0, sem="relaxed") == time):
                _copy_chunk(source, target, (lane + done * LANES) * (CHUNK // 4) + word, words)
                done += 1
        else:
            while done < share:
                _copy_chunk(source, target, (lane + done * LANES) * (CHUNK // 4) + word, words)
                done += 1
        tl.store(reached, done)
        before = _bytes_of(begin, lane, words, LANES, CHUNK)
        moved += _bytes_of(done, lane, words, LANES, CHUNK) - before
        found += before
    tl.atomic_add(copied, moved, sem="relaxed")
    if not AHEAD:
        tl.atomic_add(present, found, sem="relaxed")


@triton.jit
def _copy_chunk(source: tl.tensor, target: tl.tensor, at: tl.tensor, words: tl.tensor) -> None:
    """Copy a block of words. Rows are read once, so past the L1 cache; slots are read soon, so they may stay."""
    value = tl.load(source + at, mask=at < words, cache_modifier=".cg")
    tl.store(target + at, value, mask=at < words)


def _options(width: int, ahead: bool) -> dict[str, int | bool]:
    """Choose so few warps that each thread has several loads of 16 bytes in flight."""
    block_w = triton.next_power_of_2(width)
    return {"AHEAD": ahead, "LANES": LANES, "CHUNK": CHUNK, "BLOCK_W": block_w, "num_warps": 4}


def _check(entries: Tensor, pool: Tensor, progress: Tensor) -> None:
    """Assert that the shapes fit together."""
    num_slots, row_bytes = pool.shape
    assert entries.shape[0] == 3, "a list is [3, width]"
    assert row_bytes % 256 == 0 and row_bytes < 2**31 - LANES * CHUNK, "rows are whole blocks of 256 bytes, under 2 GiB"
    assert progress.shape == (num_slots, LANES), "progress is [num_slots, LANES]"


@fetch.register_cuda
def fetch_triton(
    table: Tensor, num_experts: int, misses: Tensor, pool: Tensor, progress: Tensor, moved: Tensor
) -> None:
    """Launch the kernel of `fetch`."""
    _check(misses, pool, progress)
    words, width = pool.shape[1] // 4, misses.shape[1]
    _fetch_kernel[(LANES,)](
        table,
        misses,
        pool.view(torch.int32),
        progress,
        None,
        None,
        moved,
        moved[2:],
        num_experts,
        words,
        width,
        **_options(width, False),
    )


@fetch_ahead.register_cuda
def fetch_ahead_triton(
    table: Tensor,
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
    words, width = pool.shape[1] // 4, ahead.shape[1]
    _fetch_kernel[(LANES,)](
        table,
        ahead,
        pool.view(torch.int32),
        progress,
        clock,
        issued,
        moved[1:],
        None,
        num_experts,
        words,
        width,
        **_options(width, True),
    )


def configurations(dtype: torch.dtype, capability: int) -> list[Configuration]:
    """List what the launchers choose; rows are bytes."""
    types = {"table": "*i64:16", "entries": "*i32:16", "pool": "*i32:16", "progress": "*i32:16", "words": "i32:16"}
    types |= {"num_experts": "i32", "width": "i32", "copied": "*i64", "present": "*i64"}
    demand = types | {"copied": "*i64:16", "present": "*i64:16"}
    ahead = types | {"clock": "*i64:16", "issued": "*i64:16", "copied": "*i64"}
    del ahead["present"]
    return [
        Configuration(_fetch_kernel, demand, _options(512, False), wide_loads=True),
        Configuration(_fetch_kernel, ahead, _options(64, True), wide_loads=True),
    ]
