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
# A row less than a chunk, one with a short last chunk, and one of which every lane has a chunk and some have two.
ROW_BYTES = [256, 2 * CHUNK + 512, (LANES + 3) * CHUNK - 256]

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
        # At least a megabyte, so that its pages are its own when they are pinned.
        self.memory = torch.empty(max(LAYERS * EXPERTS * row_bytes, 1 << 20), dtype=torch.uint8)
        self.memory.random_(256, generator=random)
        if device.type == "cuda":
            pin(self.memory)
        self.layers = self.memory[: LAYERS * EXPERTS * row_bytes].view(LAYERS, EXPERTS, row_bytes)
        self.table = torch.tensor([rows.data_ptr() for rows in self.layers], dtype=torch.int64, device=device)
        self.pool = torch.randint(256, (SLOTS, row_bytes), dtype=torch.uint8, generator=random).to(device)
        self.progress = torch.full((SLOTS, LANES), 77, dtype=torch.int32, device=device)
        self.moved = torch.tensor([1000, 2000, 3000], device=device)
        self.clock, self.issued = (torch.full((1,), 5, dtype=torch.int64, device=device) for _ in range(2))
        self.chunks = -(-row_bytes // CHUNK)

    def row(self, expert: int) -> Tensor:
        return self.layers[expert // EXPERTS][expert % EXPERTS]

    def share(self, lane: int) -> int:
        return len(range(lane, self.chunks, LANES))

    def chunks_of(self, lane: int, begin: int, end: int) -> list[slice]:
        """Where the chunks from the `begin`-th up to the `end`-th of a lane's own are in a row."""
        mine = range(lane, self.chunks, LANES)[begin:end]
        return [slice(chunk * CHUNK, min((chunk + 1) * CHUNK, self.pool.shape[1])) for chunk in mine]

    def entries(self, entries: list[Entry]) -> Tensor:
        padded = entries + [(-1, -1, -1)] * (SLOTS - len(entries))
        return torch.tensor(padded, dtype=torch.int32, device=self.pool.device).T.contiguous()

    def fetch(self, call: Callable[..., None], entries: list[Entry]) -> None:
        call(self.table, EXPERTS, self.entries(entries), self.pool, self.progress, self.moved)

    def fetch_ahead(self, call: Callable[..., None], entries: list[Entry]) -> None:
        tensors = (self.pool, self.progress, self.clock, self.issued, self.moved)
        call(self.table, EXPERTS, self.entries(entries), *tensors)


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
        for lane in range(LANES):
            done = int(torch.randint(rows.share(lane) + 1, (), generator=random))
            rows.progress[slot, lane] = done
            for part in rows.chunks_of(lane, 0, done):
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
    for expert, slot, _ in entries:
        pool[slot] = rows.row(expert).to(device)
        progress[slot] = torch.tensor([rows.share(lane) for lane in range(LANES)])
    rows.fetch(call, entries)
    assert torch.equal(rows.pool, pool)
    assert torch.equal(rows.progress, progress)
    assert rows.moved.tolist() == [1000 + len(entries) * row_bytes - present, 2000, 3000 + present]


@each_fetch
def test_fetch_copies_only_what_is_missing(call: Callable[..., None], device: torch.device) -> None:
    """What progress says is there is taken as it is: here it is not what the row has, and stays."""
    rows = Rows(ROW_BYTES[-1], device)
    rows.progress[4] = 1
    before = rows.pool[4].cpu()
    rows.fetch(call, [(5, 4, 1)])
    after = rows.pool[4].cpu()
    for lane in range(LANES):
        for part in rows.chunks_of(lane, 0, 1):
            assert torch.equal(after[part], before[part])
        for part in rows.chunks_of(lane, 1, 2):
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
    for expert, slot, _ in entries:
        pool[slot] = rows.row(expert).to(device)
    rows.fetch_ahead(call, entries)
    assert torch.equal(rows.pool, pool)
    assert rows.moved.tolist() == [1000, 2000 + len(entries) * row_bytes - present, 3000]
    complete = [rows.share(lane) for lane in range(LANES)]
    assert all(rows.progress[slot].tolist() == complete for _, slot, _ in entries)


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
    rows.fetch_ahead(call, [(1, 0, 0), (2, 4, 0)])
    check_partial(rows, 1, 0, before)
    check_partial(rows, 2, 4, before)
    if call is fetch_ahead_reference:  # lane by lane
        assert rows.progress[0].tolist() == [2, 2, 2, 1] + [0] * (LANES - 4)
        assert not rows.progress[4].any()
    ahead = int(rows.moved[1]) - 2000
    assert 0 < ahead < 2 * rows.pool.shape[1]
    rows.fetch(fetch, [(1, 0, 1), (2, 4, 1)])
    assert torch.equal(rows.pool[0].cpu(), rows.row(1))
    assert torch.equal(rows.pool[4].cpu(), rows.row(2))
    assert rows.moved.tolist() == [1000 + 2 * rows.pool.shape[1] - ahead, 2000 + ahead, 3000 + ahead]


def check_partial(rows: Rows, expert: int, slot: int, before: Tensor) -> None:
    """Progress is exact: chunks up to it are the row's, those from it on are what the slot held before."""
    after, before = rows.pool[slot].cpu(), before[slot].cpu()
    for lane, done in enumerate(rows.progress[slot].tolist()):
        for part in rows.chunks_of(lane, 0, done):
            assert torch.equal(after[part], rows.row(expert)[part])
        for part in rows.chunks_of(lane, done, rows.chunks):
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
    assert 0 < ahead < SLOTS * row_bytes
    for expert, slot, _ in entries:
        check_partial(rows, expert, slot, before)
    rows.fetch(fetch, [(expert, slot, 1) for expert, slot, _ in entries])
    for expert, slot, _ in entries:
        assert torch.equal(rows.pool[slot].cpu(), rows.row(expert))
    assert rows.moved.tolist() == [SLOTS * row_bytes - ahead, ahead, ahead]


@pytest.mark.gpu
def test_fetches_can_be_captured_in_a_graph() -> None:
    rows = Rows(ROW_BYTES[1], DEVICE)
    misses = rows.entries([(0, 0, 0)])
    fetch(rows.table, EXPERTS, misses, rows.pool, rows.progress, rows.moved)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fetch(rows.table, EXPERTS, misses, rows.pool, rows.progress, rows.moved)
    misses.copy_(rows.entries([(4, 2, 0), (3, 1, 0)]))
    graph.replay()
    assert torch.equal(rows.pool[1:3].cpu(), rows.layers[1][:2])


def test_rows_of_odd_sizes_are_refused() -> None:
    with pytest.raises(AssertionError, match="256"):
        Rows(300, CPU).fetch(fetch_triton, [(0, 0, 0)])


def test_ops_keep_their_promises() -> None:
    rows = Rows(ROW_BYTES[1], DEVICE)
    entries = rows.entries([(0, 1, 0)])
    torch.library.opcheck(fetch.overload, (rows.table, EXPERTS, entries, rows.pool, rows.progress, rows.moved))
    tensors = (rows.pool, rows.progress, rows.clock, rows.issued, rows.moved)
    torch.library.opcheck(fetch_ahead.overload, (rows.table, EXPERTS, entries, *tensors))
