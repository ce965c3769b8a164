"""Who has a slot, against a plain model: a pinned one is never given away, and the least recently used goes first."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from duomoe.experts.format import plain_format
from duomoe.experts.lease import NEVER, Lease
from duomoe.experts.link import Link, Traffic
from duomoe.experts.slots import SlotPool
from duomoe.experts.store import ExpertStore

LAYERS, EXPERTS = 3, 5
CPU = torch.device("cpu")


class Instant(Link):
    """Copies at once."""

    def mark(self) -> None:
        return None

    def send(self, source: torch.Tensor, slot: torch.Tensor, after: None = None) -> None:
        slot.copy_(source)

    def wait(self, copy: None) -> None:
        pass

    def has_arrived(self, copy: None) -> bool:
        return True

    def close(self) -> None:
        pass


class Sum:
    """Notes what a wave computes with."""

    def wave(self, views: dict[str, torch.Tensor], slots: torch.Tensor, count: int) -> None:
        self.slots = slots.tolist()
        assert sum(slot >= 0 for slot in self.slots) <= count


class Machine(RuleBasedStateMachine):
    @initialize(slots=st.integers(1, 9))
    def begin(self, slots: int) -> None:
        row = plain_format(2, 2, torch.float32)
        store = ExpertStore(row, EXPERTS, CPU, pin=False)
        for layer in range(LAYERS):
            store.add(store.rows(row).copy_(torch.arange(EXPERTS)[:, None] + 10 * layer), row)
        self.pool = SlotPool(store.formats, slots, CPU)
        self.traffic = Traffic()
        self.lease = Lease(store, self.pool, Instant(), self.traffic)
        self.lease.take(dict.fromkeys(range(slots)), {})
        self.owner: dict[int, tuple[int, int]] = {}
        self.last_use = dict.fromkeys(range(slots), NEVER)
        self.pinned: set[int] = set()
        self.fetched = 0

    def absent(self) -> list[tuple[int, int]]:
        every = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
        return [key for key in every if key not in self.owner.values()]

    @precondition(lambda self: self.absent())
    @rule(data=st.data(), below=st.none() | st.integers(-5, 20))
    def fetch(self, data: st.DataObject, below: int | None) -> None:
        layer, expert = data.draw(st.sampled_from(self.absent()))
        free = {slot: used for slot, used in self.last_use.items() if slot not in self.pinned}
        free = {slot: used for slot, used in free.items() if below is None or used < below}
        done = self.lease.fetch(layer, expert, "demand_bytes", below)
        assert done == bool(free)
        if done:
            slot = self.lease.slot(layer, expert)
            assert slot is not None and free[slot] == min(free.values())
            self.owner[slot] = layer, expert
            self.pinned.add(slot)
            self.fetched += 1

    @precondition(lambda self: self.owner)
    @rule(data=st.data(), stamp=st.none() | st.integers(-5, 20))
    def compute(self, data: st.DataObject, stamp: int | None) -> None:
        layer = data.draw(st.sampled_from(sorted({layer for layer, _ in self.owner.values()})))
        mine = {expert: slot for slot, (index, expert) in self.owner.items() if index == layer}
        wave = data.draw(st.lists(st.sampled_from(sorted(mine)), min_size=1, unique=True))
        total = Sum()
        self.lease.compute(total, layer, wave, None if stamp is None else dict.fromkeys(wave, stamp))  # type: ignore[arg-type]
        assert total.slots == [mine[expert] if expert in wave else -1 for expert in range(EXPERTS)]
        for expert in wave:
            self.last_use[mine[expert]] = self.lease.clock if stamp is None else stamp
            self.pinned.discard(mine[expert])

    @rule(layer=st.integers(0, LAYERS - 1), experts=st.sets(st.integers(0, EXPERTS - 1)))
    def release(self, layer: int, experts: set[int]) -> None:
        self.lease.release(layer, experts)
        self.pinned -= {slot for slot, (index, expert) in self.owner.items() if index == layer and expert in experts}

    @rule(stamp=st.integers(-5, 20), slot=st.integers(0, 8))
    def stamp(self, stamp: int, slot: int) -> None:
        if slot in self.owner:
            self.lease.stamp(slot, stamp)
            self.last_use[slot] = stamp
            self.pinned.discard(slot)

    @precondition(lambda self: self.last_use)
    @rule(data=st.data(), stamp=st.integers(-5, 20))
    def give_back_and_take(self, data: st.DataObject, stamp: int) -> None:
        slot = data.draw(st.sampled_from(sorted(self.last_use)))
        owner = self.lease.give_back(slot)
        assert owner == self.owner.get(slot) and slot not in self.lease.slots
        self.lease.take({slot: owner}, {slot: stamp})
        self.last_use[slot] = NEVER if owner is None else stamp
        self.pinned.discard(slot)

    @precondition(lambda self: len(self.last_use) > 1)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.last_use)))
        assert self.lease.give_back(slot) == self.owner.pop(slot, None)
        del self.last_use[slot]
        self.pinned.discard(slot)

    @rule()
    def forget(self) -> None:
        self.lease.forget()
        self.owner.clear()
        self.pinned.clear()
        self.last_use = dict.fromkeys(self.last_use, NEVER)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "lease"):
            return
        for layer in range(LAYERS):
            mine = {expert: slot for slot, (index, expert) in self.owner.items() if index == layer}
            assert self.lease.residents(layer) == mine
        for slot, (layer, expert) in self.owner.items():
            assert self.pool.rows[slot].eq(10 * layer + expert).all()
        assert self.traffic.demand_bytes == self.fetched * self.pool.rows.shape[1]


TestLease = Machine.TestCase
TestLease.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
