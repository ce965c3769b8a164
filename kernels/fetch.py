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

LANES = 64
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
    """Copy the rows that a layer waits for into their slots.

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
