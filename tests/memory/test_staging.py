"""Staging buffers: whoever holds one is alone, and nothing is overwritten before it has been copied."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from late_stream import LateStream

from duomoe.memory import pinned
from duomoe.memory.staging import StagingBuffer, StagingRing, staging_memory

SIZE = 4


class Machine(RuleBasedStateMachine):
    """Holders write to their buffers at any time; the stream copies as late as it may, or earlier."""

    @initialize(count=st.integers(1, 4))
    def begin(self, count: int) -> None:
        self.stream, self.count = LateStream(), count
        memory = torch.zeros(count * SIZE, dtype=torch.uint8)
        self.ring = StagingRing(memory, count, self.stream.event)
        self.held: list[tuple[StagingBuffer, int]] = []
        self.turn = [memory[at:].data_ptr() for at in range(0, count * SIZE, SIZE)]
        self.number = 0
        self.arrived: list[tuple[int, list[int]]] = []  # what was written, and what was copied

    @precondition(lambda self: self.ring.idle > 0)
    @rule()
    def take(self) -> None:
        buffer = self.ring.take()
        assert buffer.memory.data_ptr() == self.turn.pop(0)
        self.number += 1
        buffer.memory.fill_(self.number)
        self.held.append((buffer, self.number))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), copies=st.integers(0, 2))
    def give_back(self, data: st.DataObject, copies: int) -> None:
        buffer, number = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        for _ in range(copies):
            self.stream.queue(lambda: self.arrived.append((number, buffer.memory.tolist())))
        self.ring.give_back(buffer)
        self.turn.append(buffer.memory.data_ptr())

    @rule(steps=st.integers(1, 3))
    def copy(self, steps: int) -> None:
        self.stream.run_until(min(self.stream.queued, self.stream.done + steps))

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "ring"):
            assert self.ring.idle + len(self.held) == self.count
            assert all(buffer.memory.eq(number).all() for buffer, number in self.held)
            assert all(copied == [number] * SIZE for number, copied in self.arrived)

    def teardown(self) -> None:
        if hasattr(self, "ring"):
            self.stream.synchronize()
            self.holds()


TestStagingRing = Machine.TestCase
TestStagingRing.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_buffer_comes_back_though_its_use_has_failed() -> None:
    stream = LateStream()
    ring = StagingRing(torch.zeros(2, dtype=torch.uint8), 2, stream.event)
    copied: list[int] = []
    for number in range(5):
        with pytest.raises(ZeroDivisionError), ring.buffer() as buffer:
            assert ring.idle == 1
            buffer.memory.fill_(number)
            stream.queue(lambda memory=buffer.memory: copied.append(int(memory)))  # type: ignore[misc]
            _ = 1 / 0
    stream.synchronize()
    assert copied == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("refused", [False, True])
def test_staging_memory_is_there_whether_or_not_it_can_be_pinned(
    refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned_at: set[int] = set()

    def register(address: int, size: int, flags: int) -> int:
        assert size == 5000
        if not refused:
            pinned_at.add(address)
        return int(refused)

    cudart = SimpleNamespace(
        cudaHostRegister=register, cudaHostUnregister=pinned_at.remove, cudaGetErrorString=lambda _: "no"
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(pinned, "_forget_error", lambda: None)
    with warnings.catch_warnings(), torch.inference_mode():  # where a view does not hold the tensor that it is one of
        warnings.simplefilter("error")  # of the rows that are refused, which are larger, somebody else warns
        memory = staging_memory(5000)
        ring = StagingRing(memory, 2, LateStream().event)
    del memory
    assert bool(pinned_at) != refused, "it must stay pinned while the ring lives"
    with ring.buffer() as buffer:
        assert buffer.memory.tolist() == [0] * 2500
    del ring, buffer
    assert not pinned_at
