"""Rows into slots: whole, resumed and stopped, against plain slices; and on a GPU from memory that is really pinned."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, generator
from torch import Tensor

from duomoe.kernels.fetch import (
    CHUNK,
    LANES,
    fetch,
    fetch_ahead,
    fetch_ahead_reference,
    fetch_ahead_triton,
    fetch_reference,
    fetch_triton,
)
from duomoe.memory.pinned import pin

LAYERS, EXPERTS, SLOTS = 2, 3, 5
# The second layer's rows fill a slot: one less than a chunk, one with a short last chunk, and one of which every lane
# has a chunk and some have two. The first layer's have some bytes less.
ROW_BYTES = [512, 2 * CHUNK + 512, (LANES + 3) * CHUNK - 256]
LESS = 256

Entry = tuple[int, int, int]
few = settings(deadline=None, max_examples=5, suppress_health_check=list(HealthCheck))
CPU = torch.device("cpu")
each_fetch = pytest.mark.parametrize(("call", "device"), [(fetch_reference, CPU), (fetch_triton, DEVICE)])
each_fetch_ahead = pytest.mark.parametrize(
    ("call", "device"), [(fetch_ahead_reference, CPU), (fetch_ahead_triton, DEVICE)]
)


class Rows:
    """Random rows in host memory, a pool of other bytes, and what the lanes say they have copied."""

    def __init__(self, row_bytes: int, device: torch.device, seed: int = 0) -> None:
        random = generator(seed)
        self.sizes = [row_bytes - LESS, row_bytes]
        total = EXPERTS * sum(self.sizes)
        # At least a megabyte, so that its pages are its own when they are pinned.
        self.memory = torch.empty(max(total, 1 << 20), dtype=torch.uint8).random_(256, generator=random)
        if device.type == "cuda":
            pin(self.memory)
        layers = self.memory[:total].split([EXPERTS * size for size in self.sizes])
        self.layers = [rows.view(EXPERTS, size) for rows, size in zip(layers, self.sizes, strict=True)]
        self.table = torch.tensor([rows.data_ptr() for rows in self.layers], dtype=torch.int64, device=device)
        self.row_sizes = torch.tensor(self.sizes, dtype=torch.int32, device=device)
        self.pool = torch.randint(256, (SLOTS, row_bytes), dtype=torch.uint8, generator=random).to(device)
        self.progress = torch.full((SLOTS, LANES), 77, dtype=torch.int32, device=device)
        self.moved = torch.tensor([1000, 2000, 3000], device=device)
        self.clock, self.issued = (torch.full((1,), 5, dtype=torch.int64, device=device) for _ in range(2))

    def row(self, expert: int) -> Tensor:
        return self.layers[expert // EXPERTS][expert % EXPERTS]

    def size(self, expert: int) -> int:
        return self.sizes[expert // EXPERTS]

    def shares(self, expert: int) -> list[int]:
        """How many chunks of a row each lane has."""
        return [len(self.chunks_of(expert, lane, 0, None)) for lane in range(LANES)]

    def chunks_of(self, expert: int, lane: int, begin: int, end: int | None) -> list[slice]:
        """Where the chunks from the `begin`-th up to the `end`-th of a lane's own are in a row."""
        mine = range(0, self.size(expert), CHUNK)[lane::LANES][begin:end]
        return [slice(start, min(start + CHUNK, self.size(expert))) for start in mine]

    def bytes_of(self, entries: list[Entry]) -> int:
        return sum(self.size(expert) for expert, _, _ in entries)

    def expect(self, pool: Tensor, entries: list[Entry]) -> None:
        """Put the rows of a list where they should be; what a slot has behind them stays."""
        for expert, slot, _ in entries:
            pool[slot, : self.size(expert)] = self.row(expert).to(pool.device)

    def entries(self, entries: list[Entry]) -> Tensor:
        padded = entries + [(-1, -1, -1)] * (SLOTS - len(entries))
        return torch.tensor(padded, dtype=torch.int32, device=self.pool.device).T.contiguous()

    def fetch(self, call: Callable[..., None], entries: list[Entry]) -> None:
        call(self.table, self.row_sizes, EXPERTS, self.entries(entries), self.pool, self.progress, self.moved)

    def fetch_ahead(self, call: Callable[..., None], entries: list[Entry]) -> None:
        tensors = (self.pool, self.progress, self.clock, self.issued, self.moved)
        call(self.table, self.row_sizes, EXPERTS, self.entries(entries), *tensors)


@st.composite
def lists(draw: st.DrawFn) -> list[Entry]:
    """Distinct experts in distinct slots, some of them to be resumed."""
    experts = draw(st.permutations(range(LAYERS * EXPERTS)))
    slots = draw(st.permutations(range(SLOTS)))
    resume = draw(st.lists(st.integers(0, 1), max_size=3))
    return list(zip(experts, slots, resume, strict=False))


def copy_some(rows: Rows, entries: list[Entry], seed: int) -> int:
    """Begin the rows to be resumed, each lane as far as it happens to get; return how many bytes that are."""
    random, size = generator(seed), 0
    for expert, slot, resume in entries:
        if not resume:
            continue
        for lane, share in enumerate(rows.shares(expert)):
            done = int(torch.randint(share + 1, (), generator=random))
            rows.progress[slot, lane] = done
            for part in rows.chunks_of(expert, lane, 0, done):
                rows.pool[slot, part] = rows.row(expert)[part].to(rows.pool.device)
                size += part.stop - part.start
    return size


@each_fetch
@few
@given(row_bytes=st.sampled_from(ROW_BYTES), entries=lists(), seed=st.integers(0, 99))
def test_fetch_completes_every_row(
    call: Callable[..., None], device: torch.device, row_bytes: int, entries: list[Entry], seed: int
) -> None:
    rows = Rows(row_bytes, device, seed)
    present = copy_some(rows, entries, seed)
    pool, progress = rows.pool.clone(), rows.progress.clone()
    rows.expect(pool, entries)
    for expert, slot, _ in entries:
        progress[slot] = torch.tensor(rows.shares(expert))
    rows.fetch(call, entries)
    assert torch.equal(rows.pool, pool)
    assert torch.equal(rows.progress, progress)
    assert rows.moved.tolist() == [1000 + rows.bytes_of(entries) - present, 2000, 3000 + present]


@each_fetch
def test_fetch_copies_only_what_is_missing(call: Callable[..., None], device: torch.device) -> None:
    """What progress says is there is taken as it is: here it is not what the row has, and stays."""
    rows = Rows(ROW_BYTES[-1], device)
    rows.progress[4] = 1
    before = rows.pool[4].cpu()
    rows.fetch(call, [(5, 4, 1)])
    after = rows.pool[4].cpu()
    for lane in range(LANES):
        for part in rows.chunks_of(5, lane, 0, 1):
            assert torch.equal(after[part], before[part])
        for part in rows.chunks_of(5, lane, 1, 2):
            assert torch.equal(after[part], rows.row(5)[part])


@each_fetch_ahead
@few
@given(row_bytes=st.sampled_from(ROW_BYTES), entries=lists(), seed=st.integers(0, 99))
def test_fetch_ahead_is_counted_apart(
    call: Callable[..., None], device: torch.device, row_bytes: int, entries: list[Entry], seed: int
) -> None:
    rows = Rows(row_bytes, device, seed)
    present = copy_some(rows, entries, seed)
    pool = rows.pool.clone()
    rows.expect(pool, entries)
    rows.fetch_ahead(call, entries)
    assert torch.equal(rows.pool, pool)
    assert rows.moved.tolist() == [1000, 2000 + rows.bytes_of(entries) - present, 3000]
    assert all(rows.progress[slot].tolist() == rows.shares(expert) for expert, slot, _ in entries)


@each_fetch_ahead
@few
@given(row_bytes=st.sampled_from(ROW_BYTES), entries=lists(), seed=st.integers(0, 99))
def test_fetch_ahead_stops_at_once_when_the_clock_has_moved(
    call: Callable[..., None], device: torch.device, row_bytes: int, entries: list[Entry], seed: int
) -> None:
    rows = Rows(row_bytes, device, seed)
    copy_some(rows, entries, seed)
    rows.clock += 1
    pool, progress = rows.pool.clone(), rows.progress.clone()
    for _, slot, resume in entries:
        progress[slot] *= resume  # what has not begun must say so
    rows.fetch_ahead(call, entries)
    assert torch.equal(rows.pool, pool)
    assert torch.equal(rows.progress, progress)
    assert rows.moved.tolist() == [1000, 2000, 3000]


@each_fetch_ahead
def test_fetch_ahead_stops_between_two_chunks(call: Callable[..., None], device: torch.device) -> None:
    """The clock lies where lane 3 copies its first chunk to, so it moves on the way; fetch then does the rest."""
    rows = Rows(ROW_BYTES[-1], device)
    rows.clock = rows.pool[0, 3 * CHUNK :][:8].view(torch.int64)
    rows.issued = rows.clock.clone()
    before = rows.pool.clone()
    rows.fetch_ahead(call, entries := [(1, 0, 0), (5, 4, 0)])
    check_partial(rows, 1, 0, before)
    check_partial(rows, 5, 4, before)
    if call is fetch_ahead_reference:  # lane by lane
        assert rows.progress[0].tolist() == [2, 2, 2, 1] + [0] * (LANES - 4)
        assert not rows.progress[4].any()
    ahead = int(rows.moved[1]) - 2000
    assert 0 < ahead < rows.bytes_of(entries)
    rows.fetch(fetch, [(1, 0, 1), (5, 4, 1)])
    rows.expect(before, entries)
    assert torch.equal(rows.pool[[0, 4]], before[[0, 4]])
    assert rows.moved.tolist() == [1000 + rows.bytes_of(entries) - ahead, 2000 + ahead, 3000 + ahead]


def check_partial(rows: Rows, expert: int, slot: int, before: Tensor) -> None:
    """Progress is exact: chunks up to it are the row's, those from it on are what the slot held before."""
    after, before = rows.pool[slot].cpu(), before[slot].cpu()
    for lane, done in enumerate(rows.progress[slot].tolist()):
        for part in rows.chunks_of(expert, lane, 0, done):
            assert torch.equal(after[part], rows.row(expert)[part])
        for part in rows.chunks_of(expert, lane, done, None):
            assert torch.equal(after[part], before[part])


@pytest.mark.gpu
def test_a_clock_that_moves_meanwhile_stops_the_kernel() -> None:
    """Another stream moves the clock during a long fetch; fetch then completes the rows, bit for bit."""
    row_bytes = 64 << 20
    rows = Rows(row_bytes, DEVICE)
    before, entries = rows.pool.clone(), [(expert, expert, 0) for expert in range(SLOTS)]
    rows.fetch_ahead(fetch_ahead, [(0, 0, 0)])  # compiled before it matters, and so is
    torch.cuda._sleep(1)
    rows.clock += 0  # these: a kernel's first launch loads it, which waits for those that run
    rows.pool.copy_(before)
    rows.moved.zero_()
    torch.cuda.synchronize()
    prefetch, other = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(prefetch):
        rows.fetch_ahead(fetch_ahead, entries)
    with torch.cuda.stream(other):
        torch.cuda._sleep(1_000_000)  # about half a millisecond, in which a small part of 320 MB has crossed
        rows.clock += 1
    torch.cuda.synchronize()
    ahead = int(rows.moved[1])
    assert 0 < ahead < rows.bytes_of(entries)
    for expert, slot, _ in entries:
        check_partial(rows, expert, slot, before)
    rows.fetch(fetch, [(expert, slot, 1) for expert, slot, _ in entries])
    rows.expect(before, entries)
    assert torch.equal(rows.pool, before)
    assert rows.moved.tolist() == [rows.bytes_of(entries) - ahead, ahead, ahead]


@pytest.mark.gpu
def test_fetches_can_be_captured_in_a_graph() -> None:
    rows = Rows(ROW_BYTES[1], DEVICE)
    misses = rows.entries([(0, 0, 0)])
    fetch(rows.table, rows.row_sizes, EXPERTS, misses, rows.pool, rows.progress, rows.moved)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fetch(rows.table, rows.row_sizes, EXPERTS, misses, rows.pool, rows.progress, rows.moved)
    misses.copy_(rows.entries([(4, 2, 0), (3, 1, 0)]))
    graph.replay()
    assert torch.equal(rows.pool[1:3].cpu(), rows.layers[1][:2])


def test_rows_of_odd_sizes_are_refused() -> None:
    with pytest.raises(AssertionError, match="256"):
        Rows(300, CPU).fetch(fetch_triton, [(0, 0, 0)])


def test_ops_keep_their_promises() -> None:
    rows = Rows(ROW_BYTES[1], DEVICE)
    entries = rows.entries([(0, 1, 0)])
    given = (rows.table, rows.row_sizes, EXPERTS, entries, rows.pool, rows.progress)
    torch.library.opcheck(fetch.overload, (*given, rows.moved))
    torch.library.opcheck(fetch_ahead.overload, (*given, rows.clock, rows.issued, rows.moved))
