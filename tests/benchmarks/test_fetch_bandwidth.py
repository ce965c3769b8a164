"""What the kernel that fetches experts reaches of the link, beside CUDA's own copy from the same pinned memory."""

import statistics
from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from test_kernels import DEVICE, measure
from torch import Tensor

from duomoe.experts.link import CudaLink
from duomoe.experts.packed import pack_layer
from duomoe.kernels import fetch
from duomoe.kernels.fetch import LANES
from duomoe.memory.pinned import pin


def pinned_rows(count: int, row_bytes: int) -> Tensor:
    rows = torch.randint(256, (count, row_bytes), dtype=torch.uint8)
    pin(rows)
    return rows


# One expert of Qwen3-30B-A3B in bfloat16, and one of Mixtral-8x7B in 4 bits.
each_shape = pytest.mark.parametrize(
    ("count", "row_bytes"),
    [pytest.param(8, 9_437_184, id="8x9MB"), pytest.param(2, 88_080_384, id="2x88MB")],
)


@pytest.mark.gpu
@each_shape
def test_fetch(benchmark: BenchmarkFixture, count: int, row_bytes: int) -> None:
    rows, pool = pinned_rows(count, row_bytes), torch.empty(count, row_bytes, dtype=torch.uint8, device=DEVICE)
    table = torch.tensor([rows.data_ptr()], device=DEVICE)
    progress = torch.zeros(count, LANES, dtype=torch.int32, device=DEVICE)
    moved = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    every = torch.arange(count, dtype=torch.int32, device=DEVICE)
    misses = torch.stack((every, every, torch.zeros_like(every)))
    call = partial(fetch, table, count, misses, pool, progress, moved)
    measure(benchmark, [call], gigabytes=rows.nbytes / 1e9)
    assert torch.equal(pool.cpu(), rows)


@pytest.mark.gpu
@each_shape
def test_memcpy(benchmark: BenchmarkFixture, count: int, row_bytes: int) -> None:
    rows, pool = pinned_rows(count, row_bytes), torch.empty(count, row_bytes, dtype=torch.uint8, device=DEVICE)

    def copy() -> None:
        for row, slot in zip(rows, pool, strict=True):
            slot.copy_(row, non_blocking=True)

    measure(benchmark, [copy], gigabytes=rows.nbytes / 1e9)


each_packed_shape = pytest.mark.parametrize(
    ("count", "row_bytes"),
    [pytest.param(8, 9_437_184, id="8x9MB"), pytest.param(2, 352_321_536, id="2x352MB")],
)


def packed_rows(count: int, row_bytes: int) -> tuple[Tensor, Tensor]:
    """Rows of normal weights, and packed ones, pinned."""
    plain = torch.randn(count, row_bytes // 2, dtype=torch.bfloat16).mul_(0.02).view(torch.uint8)
    packed = pack_layer(plain)
    assert packed is not None
    pin(packed)
    return plain, packed


@pytest.mark.gpu
@each_packed_shape
def test_fetch_packed(benchmark: BenchmarkFixture, count: int, row_bytes: int) -> None:
    """Experts of Qwen3-30B-A3B and of Mixtral-8x7B, by the kernel; GB/s are of what crosses."""
    plain, rows = packed_rows(count, row_bytes)
    pool = torch.empty(count, row_bytes, dtype=torch.uint8, device=DEVICE)
    table = torch.tensor([rows.data_ptr()], device=DEVICE)
    stored = torch.tensor([rows.shape[1]], dtype=torch.int32, device=DEVICE)
    progress = torch.zeros(count, LANES, dtype=torch.int32, device=DEVICE)
    moved = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    every = torch.arange(count, dtype=torch.int32, device=DEVICE)
    misses = torch.stack((every, every, torch.zeros_like(every)))
    call = partial(fetch, table, count, misses, pool, progress, moved, stored)
    measure(benchmark, [call], gigabytes=rows.nbytes / 1e9)
    benchmark.extra_info["GB/s of plain rows"] = round(benchmark.extra_info["GB/s"] * plain.nbytes / rows.nbytes)
    assert torch.equal(pool.cpu(), plain)


@pytest.mark.gpu
@each_packed_shape
def test_link_packed(benchmark: BenchmarkFixture, count: int, row_bytes: int) -> None:
    """The same rows over the link that prefill uses."""
    plain, rows = packed_rows(count, row_bytes)
    pool = torch.empty(count, row_bytes, dtype=torch.uint8, device=DEVICE)
    link = CudaLink(DEVICE, pinned=True)
    seconds = []

    def send() -> None:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        begun = link.mark()
        for copy in [link.send(row, slot, begun) for row, slot in zip(rows, pool, strict=True)]:
            link.wait(copy)
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000)

    benchmark.pedantic(send, rounds=20, warmup_rounds=3)
    benchmark.extra_info["GB/s"] = round(rows.nbytes / 1e9 / statistics.median(seconds))
    benchmark.extra_info["GB/s of plain rows"] = round(benchmark.extra_info["GB/s"] * plain.nbytes / rows.nbytes)
    assert torch.equal(pool.cpu(), plain)
