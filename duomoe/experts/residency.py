"""Experts in slots: who gets one, who loses one, and when what is on its way may be used."""

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from duomoe.experts.compute import LayerSum
from duomoe.experts.link import Link, Traffic
from duomoe.experts.slots import Directory, SlotPool
from duomoe.experts.store import ExpertStore


class Residency:
    """The slots of a bounded policy.

    Invariants: what the current layer still needs, and what is on its way to be used, is never given up; a slot is
    overwritten only behind the last computation that read it, and read only once its copy has arrived.

    Args:
        store: where all experts are.
        pool: where some can be.
        link: between the two.
        traffic: counts what crosses.
    """

    def __init__(self, store: ExpertStore, pool: SlotPool, link: Link, traffic: Traffic) -> None:
        self.store, self.pool, self.link, self.traffic = store, pool, link, traffic
        self.directory = Directory(len(store.layers), store.num_experts, len(pool), torch.device("cpu"))
        self.clock = 0
        self._pinned: set[int] = set()  # slots that may not be given away now
        self._copies: dict[int, Any] = {}  # of slots whose expert has not been waited for
        self._unused: set[int] = set()  # slots whose expert was prefetched and not needed since
        self._marks: list[Any] = [None] * len(pool)  # behind the last computation that read each slot
        weakref.finalize(self, link.close).atexit = False  # the link's thread ends with the last user of its slots

    def absent(self, index: int, experts: Iterable[int]) -> list[int]:
        """Return those experts of a MoE layer that have no slot."""
        return [expert for expert in experts if self.directory.find(index, expert) is None]

    def fetch(self, index: int, expert: int, cause: str, may_lose: Callable[[int], bool] = lambda _: True) -> bool:
        """Send an expert to the slot that was used least recently, to stay there until it is computed or released.

        Args:
            index: the MoE layer's number.
            expert: one that has no slot.
            cause: the counter of `Traffic` that its bytes go to.
            may_lose: whether the owner of a slot may be given up; asked for slots that are not pinned.

        Returns:
            False when there is no slot to be had.
        """
        slot = self._free_slot(may_lose)
        if slot is None:
            return False
        row = self.store.layers[index][expert]
        self._copies[slot] = self.link.send(row, self.pool.rows[slot], self._marks[slot])
        self.directory.place(index, expert, slot)
        self._pinned.add(slot)
        self._unused.discard(slot)
        if cause == "prefetched_bytes":
            self._unused.add(slot)
        setattr(self.traffic, cause, getattr(self.traffic, cause) + row.nbytes)
        return True

    def _free_slot(self, may_lose: Callable[[int], bool]) -> int | None:
        owners = self.directory.owner_of.tolist()  # host-sync ok: the directory is on the host
        last_use = self.directory.last_use.tolist()  # host-sync ok: as above
        found = [s for s, owner in enumerate(owners) if s not in self._pinned and (owner < 0 or may_lose(s))]
        # An empty slot goes before any other.
        return min(found, key=lambda slot: (owners[slot] >= 0, last_use[slot]), default=None)

    def release(self, index: int, experts: Iterable[int]) -> None:
        """Let the slots of a layer's experts be given away again, though they were not computed."""
        for expert in experts:
            if (slot := self.directory.find(index, expert)) is not None:
                self._pinned.discard(slot)

    def compute(self, total: LayerSum, index: int, experts: list[int], stamps: Mapping[int, int] | None = None) -> None:
        """Compute one wave: wait for these experts of a layer, add them to its sum, and let their slots go.

        Args:
            total: the layer's sum.
            index: the MoE layer's number.
            experts: those of the wave; each has a slot.
            stamps: what each counts as its last use from now on; None is the time.
        """
        slots = [self._slot(index, expert) for expert in experts]
        for slot in slots:
            if slot in self._copies:
                self.link.wait(self._copies.pop(slot))
        total.wave(self.pool.views, self.directory.slots(index, experts, self.pool.rows.device))
        mark = self.link.mark()
        self.clock += 1
        for slot, expert in zip(slots, experts, strict=True):
            self._marks[slot] = mark
            self.directory.last_use[slot] = self.clock if stamps is None else stamps[expert]
            self._pinned.discard(slot)

    def run(
        self,
        total: LayerSum,
        index: int,
        needed: list[int],
        cause: str,
        may_lose: Callable[[int], bool] = lambda _: True,
        stamps: Mapping[int, int] | None = None,
        after_wave: Callable[[], None] = lambda: None,
    ) -> None:
        """Compute all experts that a layer needs: those in slots at once, the others as they arrive.

        Args:
            total: the layer's sum.
            index: the MoE layer's number.
            needed: every expert that the router chose, each once.
            cause: the counter of `Traffic` for what has to be fetched.
            may_lose: as in `fetch`; overruled where the layer could not go on otherwise.
            stamps: as in `compute`.
            after_wave: called after each wave once all of the layer's copies are sent; may fetch for later layers.
        """
        absent = deque(self.absent(index, needed))
        self.traffic.misses += len(absent)
        self.traffic.hits += len(needed) - len(absent)
        here: list[int] = []
        coming: deque[int] = deque()  # in the order in which they were sent
        for expert in needed:
            slot = self.directory.find(index, expert)
            if slot is not None:
                self._pinned.add(slot)
                if slot in self._unused:
                    self._unused.remove(slot)
                    self.traffic.prefetch_used_bytes += self.pool.rows.shape[1]
                (coming if slot in self._copies else here).append(expert)

        def send() -> None:
            while absent and self.fetch(index, absent[0], cause, may_lose):
                coming.append(absent.popleft())

        send()
        if here:
            self.compute(total, index, here, stamps)
            send()
        while coming or absent:
            if not coming:
                fetched = self.fetch(index, absent[0], cause)
                assert fetched, "a layer can always make room for one expert"
                coming.append(absent.popleft())
            wave = [coming.popleft()]
            while coming and self._has_arrived(index, coming[0]):
                wave.append(coming.popleft())
            self.compute(total, index, wave, stamps)
            send()
            if not absent:
                after_wave()

    def settle(self) -> None:
        """Wait for all copies that are on their way, whoever they are for."""
        for slot in list(self._copies):
            self.link.wait(self._copies.pop(slot))
        self._pinned.clear()

    def vacate_unproven(self) -> None:
        """Empty the slots whose rows may be there in part only."""
        for slot in self.directory.unproven.nonzero().flatten().tolist():  # host-sync ok: the directory is on the host
            self.directory.vacate(slot)

    def forget(self) -> None:
        """Empty all slots."""
        self._pinned.clear()
        self._unused.clear()
        self._copies.clear()
        for slot in range(len(self.pool)):
            self.directory.vacate(slot)

    def _slot(self, index: int, expert: int) -> int:
        slot = self.directory.find(index, expert)
        assert slot is not None, "the expert is not resident"
        return slot

    def _has_arrived(self, index: int, expert: int) -> bool:
        copy = self._copies.get(self._slot(index, expert))
        return copy is None or self.link.has_arrived(copy)
