"""Rows of experts from host memory into slots, by a list that is known on the device alone.

A fixed number of programs, the lanes, copy a row side by side. A row is cut into chunks of `CHUNK` bytes (the last one
may be shorter), and lane `p` owns the chunks `p`, `p + LANES`, `p + 2 * LANES` and so on. How many of its chunks of the
row now in a slot a lane has copied is its `progress` there, so that a copy which stopped early can be resumed.

The rows of a layer may be packed (packed_bf16.py). They are expanded on their way; a chunk of theirs is a block.
"""

import ctypes
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from duomoe.kernels.configuration import Configuration
from duomoe.kernels.operator import operator
from duomoe.kernels.packed_bf16 import BLOCK, expand_block, expand_blocks

LANES = 32
"""How many programs copy side by side: with a chunk each in flight, several times what hides a link's latency."""

CHUNK = 16384
"""Bytes that a lane copies between two looks at the clock."""


def _bytes(count: int, lane: int, chunks: int, chunk: int, row_bytes: int) -> int:
    """Return how many bytes a lane's first `count` chunks have, of `chunks` that a row is cut into.

    The last chunk of a row has what the others leave of it, with a packed row's tables.
    """
    last = lane + (count - 1) * LANES == chunks - 1
    return count * chunk + (row_bytes - chunks * chunk if last else 0)


def _copy_rows(
    table: Tensor,
    num_experts: int,
    stored: Tensor | None,
    entries: Tensor,
    pool: Tensor,
    progress: Tensor,
    go_on: Callable[[], bool],
) -> tuple[int, int]:
    """Copy the rows of a list, chunk by chunk as long as `go_on`.

    Returns:
        How many bytes were copied, and how many had been copied before.
    """
    addresses = table.tolist()  # host-sync ok: the reference runs on the CPU
    slot_bytes = pool.shape[1]
    sizes = [slot_bytes] * len(addresses) if stored is None else stored.tolist()  # host-sync ok: the same
    copied = present = 0
    for expert, slot, resume in entries.T.tolist():  # host-sync ok: the reference runs on the CPU
        if expert < 0:
            break
        row_bytes = sizes[expert // num_experts]
        packed = row_bytes != slot_bytes
        source = addresses[expert // num_experts] + expert % num_experts * row_bytes
        chunks = -(-slot_bytes // (2 * BLOCK if packed else CHUNK))
        chunk = BLOCK * 3 // 2 if packed else CHUNK
        done = progress[slot].tolist() if resume else [0] * LANES  # host-sync ok: the reference runs on the CPU
        for lane in range(LANES):
            before = _bytes(done[lane], lane, chunks, chunk, row_bytes)
            while (number := lane + done[lane] * LANES) < chunks and go_on():
                if packed:
                    row = torch.frombuffer((ctypes.c_uint8 * row_bytes).from_address(source), dtype=torch.uint8)
                    expand_blocks(row, pool[slot].view(torch.bfloat16), number, number + 1)
                else:
                    start = number * CHUNK
                    size = min(CHUNK, row_bytes - start)
                    ctypes.memmove(pool.data_ptr() + slot * slot_bytes + start, source + start, size)
                done[lane] += 1
            copied += _bytes(done[lane], lane, chunks, chunk, row_bytes) - before
            present += before
        progress[slot] = torch.tensor(done, dtype=torch.int32)
    return copied, present


def fetch_reference(
    table: Tensor,
    num_experts: int,
    misses: Tensor,
    pool: Tensor,
    progress: Tensor,
    moved: Tensor,
    stored: Tensor | None = None,
) -> None:
    """Compute `fetch` with plain Python."""
    copied, present = _copy_rows(table, num_experts, stored, misses, pool, progress, lambda: True)
    moved[0] += copied
    moved[2] += present


@operator(mutates_args=("pool", "progress", "moved"))
def fetch(
    table: Tensor,
    num_experts: int,
    misses: Tensor,
    pool: Tensor,
    progress: Tensor,
    moved: Tensor,
    stored: Tensor | None = None,
) -> None:
    """Copy the rows that a layer waits for into their slots. A fetch ahead into the same pool must have ended.

    Args:
        table: [layers] int64, the address of each layer's rows, uint8 [num_experts, stored bytes], as the device sees
            it; divisible by 16.
        num_experts: experts per layer.
        misses: [3, width] int32, from `admit`: flat number, slot, and 1 if what `progress` says is there already.
        pool: [num_slots, row_bytes] uint8, the slots; `row_bytes` is a multiple of 256.
        progress: [num_slots, LANES] int32, in chunks; that of the slots filled here is complete afterwards.
        moved: [3] int64, bytes moved so far: those demanded, to which what is copied is added; those copied ahead; and
            of the latter, those needed, to which what was there already is added.
        stored: [layers] int32, the bytes of a row of each layer, where layers may be packed: those whose rows have
            other bytes than slots are. None where none is.
    """
    fetch_reference(table, num_experts, misses, pool, progress, moved, stored)


@fetch.register_fake
def _(
    table: Tensor,
    num_experts: int,
    misses: Tensor,
    pool: Tensor,
    progress: Tensor,
    moved: Tensor,
    stored: Tensor | None = None,
) -> None:
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
    stored: Tensor | None = None,
) -> None:
    """Compute `fetch_ahead` with plain Python."""
    copied, _ = _copy_rows(table, num_experts, stored, ahead, pool, progress, lambda: torch.equal(clock, issued))
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
    stored: Tensor | None = None,
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
        stored: as in `fetch`.
    """
    fetch_ahead_reference(table, num_experts, ahead, pool, progress, clock, issued, moved, stored)


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
    stored: Tensor | None = None,
) -> None:
    return None


@triton.jit
def _bytes_of(
    count: tl.tensor, lane: tl.tensor, chunks: tl.tensor, chunk: tl.tensor, row_bytes: tl.tensor, LANES: tl.constexpr
) -> tl.tensor:
    """Return how many bytes a lane's first `count` chunks have; see `_bytes`."""
    last = lane + (count - 1) * LANES == chunks - 1
    return (count * chunk + tl.where(last, row_bytes - chunks * chunk, 0)).to(tl.int64)


@triton.jit(do_not_specialize=("num_experts", "width"))
def _fetch_kernel(
    table: tl.tensor,
    stored: tl.tensor,
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
    PACKED: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_W: tl.constexpr,
) -> None:
    """Each program is a lane and copies its chunks of every row of the list, in words of 4 bytes.

    Where layers may be `PACKED`, a row that has other bytes than a slot is expanded instead, and its chunks are blocks.
    """
    lane = tl.program_id(0)
    column = tl.arange(0, BLOCK_W)
    count = tl.sum((tl.load(entries + column, mask=column < width, other=-1) >= 0).to(tl.int32), 0)
    row_words = words
    chunks = tl.cdiv(words, CHUNK // 4)
    chunk = tl.full((), CHUNK, tl.int32)
    moved = tl.zeros((), tl.int64)
    found = tl.zeros((), tl.int64)
    for entry in range(count):
        expert = tl.load(entries + entry)
        slot = tl.load(entries + width + entry).to(tl.int64)
        if PACKED:
            row_words = tl.multiple_of(tl.load(stored + expert // num_experts) // 4, 16)
            chunks = tl.cdiv(words, tl.where(row_words == words, CHUNK // 4, BLOCK // 2))
            chunk = tl.where(row_words == words, CHUNK, BLOCK // 2 * 3)
        rows = tl.load(table + expert // num_experts).to(tl.pointer_type(tl.int32))
        source = tl.multiple_of(rows, 16) + (expert % num_experts).to(tl.int64) * row_words
        target = pool + slot * words
        reached = progress + slot * LANES + lane
        begin = tl.where(tl.load(entries + 2 * width + entry) > 0, tl.load(reached), 0)
        # All threads must have read how far the lane had come before one of them says how far it has come now.
        tl.debug_barrier()
        share = (chunks + LANES - 1 - lane) // LANES
        done = begin
        if AHEAD:
            time = tl.load(issued)
            # An atomic addition of nothing, because one thread does it and tells the others. Had each thread looked for
            # itself, some might have copied their part of a chunk, and others not.
            while (done < share) & (tl.atomic_add(clock, 0, sem="relaxed") == time):
                _move_chunk(source, target, lane + done * LANES, row_words, words, PACKED, CHUNK, BLOCK)
                done += 1
        else:
            while done < share:
                _move_chunk(source, target, lane + done * LANES, row_words, words, PACKED, CHUNK, BLOCK)
                done += 1
        tl.store(reached, done)
        before = _bytes_of(begin, lane, chunks, chunk, row_words * 4, LANES)
        moved += _bytes_of(done, lane, chunks, chunk, row_words * 4, LANES) - before
        found += before
    tl.atomic_add(copied, moved, sem="relaxed")
    if not AHEAD:
        tl.atomic_add(present, found, sem="relaxed")


@triton.jit
def _move_chunk(
    source: tl.tensor,
    target: tl.tensor,
    chunk: tl.tensor,
    row_words: tl.tensor,
    words: tl.tensor,
    PACKED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Copy or expand a chunk of a row."""
    if PACKED:
        if row_words == words:
            _copy_chunk(source, target, chunk, words, CHUNK)
        else:
            expand_block(source, target, words * 2, chunk, BLOCK)
    else:
        _copy_chunk(source, target, chunk, words, CHUNK)


@triton.jit
def _copy_chunk(source: tl.tensor, target: tl.tensor, chunk: tl.tensor, words: tl.tensor, CHUNK: tl.constexpr) -> None:
    """Copy a block of words. Rows are read once, so past the L1 cache; slots are read soon, so they may stay."""
    at = chunk * (CHUNK // 4) + tl.arange(0, CHUNK // 4)
    value = tl.load(source + at, mask=at < words, cache_modifier=".cg")
    tl.store(target + at, value, mask=at < words)


def _options(width: int, ahead: bool, packed: bool) -> dict[str, int | bool]:
    """Choose so few warps that each thread has several loads of 16 bytes in flight."""
    block_w = triton.next_power_of_2(width)
    sizes = {"LANES": LANES, "CHUNK": CHUNK, "BLOCK": BLOCK, "BLOCK_W": block_w}
    return {"AHEAD": ahead, "PACKED": packed, **sizes, "num_warps": 4}


def _check(entries: Tensor, pool: Tensor, progress: Tensor) -> None:
    """Assert that the shapes fit together."""
    num_slots, row_bytes = pool.shape
    assert entries.shape[0] == 3, "a list is [3, width]"
    assert row_bytes % 256 == 0 and row_bytes < 2**31 - LANES * CHUNK, "rows are whole blocks of 256 bytes, under 2 GiB"
    assert progress.shape == (num_slots, LANES), "progress is [num_slots, LANES]"


@fetch.register_cuda
def fetch_triton(
    table: Tensor,
    num_experts: int,
    misses: Tensor,
    pool: Tensor,
    progress: Tensor,
    moved: Tensor,
    stored: Tensor | None = None,
) -> None:
    """Launch the kernel of `fetch`."""
    _check(misses, pool, progress)
    words, width = pool.shape[1] // 4, misses.shape[1]
    _fetch_kernel[(LANES,)](
        table,
        stored,
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
        **_options(width, False, stored is not None),
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
    stored: Tensor | None = None,
) -> None:
    """Launch the kernel of `fetch_ahead`."""
    _check(ahead, pool, progress)
    words, width = pool.shape[1] // 4, ahead.shape[1]
    _fetch_kernel[(LANES,)](
        table,
        stored,
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
        **_options(width, True, stored is not None),
    )


def configurations(dtype: torch.dtype, capability: int) -> list[Configuration]:
    """List what the launchers choose; rows are bytes."""
    types = {"table": "*i64:16", "entries": "*i32:16", "pool": "*i32:16", "progress": "*i32:16", "words": "i32:16"}
    types |= {"num_experts": "i32", "width": "i32"}
    demand = types | {"copied": "*i64:16", "present": "*i64:16"}
    ahead = types | {"clock": "*i64:16", "issued": "*i64:16", "copied": "*i64"}
    packed = {"stored": "*i32:16"}
    return [
        Configuration(_fetch_kernel, demand, _options(512, False, False), wide_loads=True),
        Configuration(_fetch_kernel, ahead, _options(64, True, False), wide_loads=True),
        Configuration(_fetch_kernel, demand | packed, _options(512, False, True), wide_loads=True),
        Configuration(_fetch_kernel, ahead | packed, _options(64, True, True), wide_loads=True),
    ]
