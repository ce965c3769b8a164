"""What the kernel that fetches experts reaches of the link, beside CUDA's own copy from the same pinned memory."""

from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from test_kernels import DEVICE, measure
from torch import Tensor

from duomoe.kernels import fetch
from duomoe.kernels.fetch import LANES
from duomoe.memory.pinned import pin


def pinned_rows(count: int, row_bytes: int) -> Tensor:
    rows = torch.randint(256, (count, row_bytes), dtype=torch.uint8)
    pin(rows)
    return rows


# One expert of Qwen3-30B-A3B in bfloat16, one packed, and one of Mixtral-8x7B in 4 bits.
each_shape = pytest.mark.parametrize(
    ("count", "row_bytes"),
    [
        pytest.param(8, 9_437_184, id="8x9MB"),
        pytest.param(8, 7_155_968, id="8x7MB"),
        pytest.param(2, 88_080_384, id="2x88MB"),
    ],
)


@pytest.mark.gpu
@each_shape
def test_fetch(benchmark: BenchmarkFixture, count: int, row_bytes: int) -> None:
    rows, pool = pinned_rows(count, row_bytes), torch.empty(count, row_bytes, dtype=torch.uint8, device=DEVICE)
    table = torch.tensor([rows.data_ptr()], device=DEVICE)
    sizes = torch.tensor([row_bytes], dtype=torch.int32, device=DEVICE)
    progress = torch.zeros(count, LANES, dtype=torch.int32, device=DEVICE)
    moved = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    every = torch.arange(count, dtype=torch.int32, device=DEVICE)
    misses = torch.stack((every, every, torch.zeros_like(every)))
    call = partial(fetch, table, sizes, count, misses, pool, progress, moved)
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
