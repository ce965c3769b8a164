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
from duomoe.kernels.packed_bf16 import BLOCK, count_patches, pack_bf16, packed_bytes
from duomoe.memory.pinned import pin

LAYERS, EXPERTS, SLOTS = 2, 3, 5
# A row less than a chunk, one with a short last chunk, and one of which every lane has a chunk and some have two.
ROW_BYTES = [256, 2 * CHUNK + 512, (LANES + 3) * CHUNK - 256]
# The same for a layer of packed rows, of which a chunk is a block of values of 2 bytes, beside a layer of plain ones.
PACKED_ROW_BYTES = [2048, 4 * BLOCK + 512, 2 * (LANES + 3) * BLOCK - 256]

Entry = tuple[int, int, int]
each_form = pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
few = settings(deadline=None, max_examples=5, suppress_health_check=list(HealthCheck))
CPU = torch.device("cpu")
each_fetch = pytest.mark.parametrize(("call", "device"), [(fetch_reference, CPU), (fetch_triton, DEVICE)])
each_fetch_ahead = pytest.mark.parametrize(
    ("call", "device"), [(fetch_ahead_reference, CPU), (fetch_ahead_triton, DEVICE)]
)


class Rows:
    """Random rows in host memory, a pool of other bytes, and what the lanes say they have copied.

    Where `packed`, the first layer's rows are.
    """

    def __init__(self, row_bytes: int, device: torch.device, seed: int = 0, packed: bool = False) -> None:
        random = generator(seed)
        self.plain = torch.empty(LAYERS, EXPERTS, row_bytes, dtype=torch.uint8).random_(256, generator=random)
        layers, self.packed = list(self.plain), packed
        if packed:
            layers[0] = self.pack(random)
        # At least a megabyte, so that its pages are its own when they are pinned.
        self.memory = torch.empty(max(sum(rows.nbytes for rows in layers), 1 << 20), dtype=torch.uint8)
        if device.type == "cuda":
            pin(self.memory)
        places = [self.memory[: layers[0].nbytes], self.memory[layers[0].nbytes :][: layers[1].nbytes]]
        for place, rows in zip(places, layers, strict=True):
            place.copy_(rows.flatten())
        self.table = torch.tensor([place.data_ptr() for place in places], dtype=torch.int64, device=device)
        sizes = torch.tensor([rows.shape[1] for rows in layers], dtype=torch.int32, device=device)
        self.sizes, self.stored = sizes.tolist(), sizes if packed else None
        self.pool = torch.randint(256, (SLOTS, row_bytes), dtype=torch.uint8, generator=random).to(device)
        self.progress = torch.full((SLOTS, LANES), 77, dtype=torch.int32, device=device)
        self.moved = torch.tensor([1000, 2000, 3000], device=device)
        self.clock, self.issued = (torch.full((1,), 5, dtype=torch.int64, device=device) for _ in range(2))

    def pack(self, random: torch.Generator) -> Tensor:
        """Make the first layer's rows weights, with any bits below 2 here and there, and pack them."""
        values = self.plain[0].view(torch.bfloat16)
        small = (values.view(torch.int16) & ~0x4000).view(torch.bfloat16)
        weights = torch.randn(values.shape, generator=random).bfloat16()
        values.copy_(torch.where(torch.rand(values.shape, generator=random) < 0.01, small, weights))
        packed = torch.empty(EXPERTS, packed_bytes(values.shape[1], max(map(count_patches, values))), dtype=torch.uint8)
        for row, place in zip(values, packed, strict=True):
            pack_bf16(row, place)
        assert packed.shape[1] < self.plain.shape[2]
        return packed

    def row(self, expert: int) -> Tensor:
        return self.plain[expert // EXPERTS][expert % EXPERTS]

    def chunk(self, expert: int) -> int:
        """Bytes of a slot that a chunk fills."""
        return 2 * BLOCK if self.packed and expert < EXPERTS else CHUNK

    def share(self, expert: int, lane: int) -> int:
        return len(range(lane, -(-self.pool.shape[1] // self.chunk(expert)), LANES))

    def shares(self, expert: int) -> list[int]:
        return [self.share(expert, lane) for lane in range(LANES)]

    def chunks_of(self, expert: int, lane: int, begin: int, end: int | None) -> list[slice]:
        """Where the chunks from the `begin`-th up to the `end`-th of a lane's own are in a slot."""
        size, slot_bytes = self.chunk(expert), self.pool.shape[1]
        mine = range(0, slot_bytes, size)[lane::LANES][begin:end]
        return [slice(start, min(start + size, slot_bytes)) for start in mine]

    def crossing(self, expert: int, part: slice) -> int:
        """Bytes that cross for a chunk; the last one of a packed row comes with the row's tables."""
        if not self.packed or expert >= EXPERTS:
            return int(part.stop - part.start)
        return int(self.sizes[0] - part.start * 3 // 4 if part.stop == self.pool.shape[1] else BLOCK * 3 // 2)

    def bytes_of(self, entries: list["Entry"]) -> int:
        return sum(self.sizes[expert // EXPERTS] for expert, _, _ in entries)

    def entries(self, entries: list[Entry]) -> Tensor:
        padded = entries + [(-1, -1, -1)] * (SLOTS - len(entries))
        return torch.tensor(padded, dtype=torch.int32, device=self.pool.device).T.contiguous()

    def fetch(self, call: Callable[..., None], entries: list[Entry]) -> None:
        call(self.table, EXPERTS, self.entries(entries), self.pool, self.progress, self.moved, self.stored)

    def fetch_ahead(self, call: Callable[..., None], entries: list[Entry]) -> None:
        tensors = (self.pool, self.progress, self.clock, self.issued, self.moved, self.stored)
        call(self.table, EXPERTS, self.entries(entries), *tensors)


def sizes_of(packed: bool) -> st.SearchStrategy[int]:
    return st.sampled_from(PACKED_ROW_BYTES if packed else ROW_BYTES)


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
            done = int(torch.randint(rows.share(expert, lane) + 1, (), generator=random))
            rows.progress[slot, lane] = done
            for part in rows.chunks_of(expert, lane, 0, done):
                rows.pool[slot, part] = rows.row(expert)[part].to(rows.pool.device)
                size += rows.crossing(expert, part)
    return size


@each_fetch
@each_form
@few
@given(data=st.data(), entries=lists(), seed=st.integers(0, 99))
def test_fetch_completes_every_row(
    call: Callable[..., None], device: torch.device, packed: bool, data: st.DataObject, entries: list[Entry], seed: int
) -> None:
    rows = Rows(data.draw(sizes_of(packed)), device, seed, packed)
    present = copy_some(rows, entries, seed)
    pool, progress = rows.pool.clone(), rows.progress.clone()
    for expert, slot, _ in entries:
        pool[slot] = rows.row(expert).to(device)
        progress[slot] = torch.tensor(rows.shares(expert))
    rows.fetch(call, entries)
    assert torch.equal(rows.pool, pool)
    assert torch.equal(rows.progress, progress)
    assert rows.moved.tolist() == [1000 + rows.bytes_of(entries) - present, 2000, 3000 + present]


@each_fetch
@each_form
def test_fetch_copies_only_what_is_missing(call: Callable[..., None], device: torch.device, packed: bool) -> None:
    """What progress says is there is taken as it is: here it is not what the row has, and stays."""
    rows = Rows(PACKED_ROW_BYTES[-1] if packed else ROW_BYTES[-1], device, packed=packed)
    rows.progress[4] = 1
    before = rows.pool[4].cpu()
    rows.fetch(call, [(2, 4, 1)])
    after = rows.pool[4].cpu()
    for lane in range(LANES):
        for part in rows.chunks_of(2, lane, 0, 1):
            assert torch.equal(after[part], before[part])
        for part in rows.chunks_of(2, lane, 1, 2):
            assert torch.equal(after[part], rows.row(2)[part])


@each_fetch_ahead
@each_form
@few
@given(data=st.data(), entries=lists(), seed=st.integers(0, 99))
def test_fetch_ahead_is_counted_apart(
    call: Callable[..., None], device: torch.device, packed: bool, data: st.DataObject, entries: list[Entry], seed: int
) -> None:
    rows = Rows(data.draw(sizes_of(packed)), device, seed, packed)
    present = copy_some(rows, entries, seed)
    pool = rows.pool.clone()
    for expert, slot, _ in entries:
        pool[slot] = rows.row(expert).to(device)
    rows.fetch_ahead(call, entries)
    assert torch.equal(rows.pool, pool)
    assert rows.moved.tolist() == [1000, 2000 + rows.bytes_of(entries) - present, 3000]
    assert all(rows.progress[slot].tolist() == rows.shares(expert) for expert, slot, _ in entries)


@each_fetch_ahead
@each_form
@few
@given(data=st.data(), entries=lists(), seed=st.integers(0, 99))
def test_fetch_ahead_stops_at_once_when_the_clock_has_moved(
    call: Callable[..., None], device: torch.device, packed: bool, data: st.DataObject, entries: list[Entry], seed: int
) -> None:
    rows = Rows(data.draw(sizes_of(packed)), device, seed, packed)
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
@each_form
def test_fetch_ahead_stops_between_two_chunks(call: Callable[..., None], device: torch.device, packed: bool) -> None:
    """The clock lies where lane 3 copies its first chunk to, so it moves on the way; fetch then does the rest."""
    rows = Rows(PACKED_ROW_BYTES[-1] if packed else ROW_BYTES[-1], device, packed=packed)
    rows.clock = rows.pool[0, 3 * rows.chunk(1) :][:8].view(torch.int64)
    rows.issued = rows.clock.clone()
    before = rows.pool.clone()
    rows.fetch_ahead(call, entries := [(1, 0, 0), (5, 4, 0)])
    check_partial(rows, 1, 0, before)
    check_partial(rows, 5, 4, before)
    if call is fetch_ahead_reference:  # lane by lane
        assert rows.progress[0].tolist() == [2, 2, 2, 1] + [0] * (LANES - 4)
        assert not rows.progress[4].any()
    ahead = int(rows.moved[1]) - 2000
    size = rows.bytes_of(entries)
    assert 0 < ahead < size
    rows.fetch(fetch, [(1, 0, 1), (5, 4, 1)])
    assert torch.equal(rows.pool[0].cpu(), rows.row(1))
    assert torch.equal(rows.pool[4].cpu(), rows.row(5))
    assert rows.moved.tolist() == [1000 + size - ahead, 2000 + ahead, 3000 + ahead]


def check_partial(rows: Rows, expert: int, slot: int, before: Tensor) -> None:
    """Progress is exact: chunks up to it are the row's, those from it on are what the slot held before."""
    after, before = rows.pool[slot].cpu(), before[slot].cpu()
    for lane, done in enumerate(rows.progress[slot].tolist()):
        for part in rows.chunks_of(expert, lane, 0, done):
            assert torch.equal(after[part], rows.row(expert)[part])
        for part in rows.chunks_of(expert, lane, done, None):
            assert torch.equal(after[part], before[part])


@pytest.mark.gpu
@each_form
def test_a_clock_that_moves_meanwhile_stops_the_kernel(packed: bool) -> None:
    """Another stream moves the clock during a long fetch; fetch then completes the rows, bit for bit."""
    row_bytes = 64 << 20
    rows = Rows(row_bytes, DEVICE, packed=packed)
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
    for expert, slot, _ in entries:
        assert torch.equal(rows.pool[slot].cpu(), rows.row(expert))
    assert rows.moved.tolist() == [rows.bytes_of(entries) - ahead, ahead, ahead]


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
    assert torch.equal(rows.pool[1:3].cpu(), rows.plain[1][:2])


def test_rows_of_odd_sizes_are_refused() -> None:
    with pytest.raises(AssertionError, match="256"):
        Rows(300, CPU).fetch(fetch_triton, [(0, 0, 0)])


def test_ops_keep_their_promises() -> None:
    rows = Rows(ROW_BYTES[1], DEVICE)
    entries = rows.entries([(0, 1, 0)])
    torch.library.opcheck(fetch.overload, (rows.table, EXPERTS, entries, rows.pool, rows.progress, rows.moved))
    tensors = (rows.pool, rows.progress, rows.clock, rows.issued, rows.moved)
    torch.library.opcheck(fetch_ahead.overload, (rows.table, EXPERTS, entries, *tensors))
