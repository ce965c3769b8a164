"""Slots that the host fills: which experts come into them, which go, and when what is on its way may be used.

The directory (slots.py) says who owns a slot, and marks those that are leased. What is in a leased slot is known only
here, until the directory is told.
"""

import contextlib
import heapq
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from duomoe.experts.compute import LayerSum
from duomoe.experts.link import Link, LinkError, Traffic
from duomoe.experts.slots import SlotPool
from duomoe.experts.store import ExpertStore

# The last use of an empty slot: it is given away before any other.
NEVER = -(1 << 62)

# Experts computed together, at most. More at once use the device better; fewer let a slot go sooner.
LARGEST_WAVE = 8

# The heap of slots is made anew when it has so many entries for each slot, most of which are no longer true by then.
MOST_ENTRIES = 4


class Lease:
    """Some slots of a pool, and what is in them.

    A slot has at most one owner, and an expert at most one of the slots. What the current layer still needs, and what
    is on its way to be used, is never given up; a slot is overwritten only behind the last computation that read it,
    and read only once its copy has arrived.

    Args:
        store: where all experts are.
        pool: where some can be.
        link: between the two.
        traffic: counts what crosses.

    Attributes:
        slots: the leased ones.
        last_use: of each of them, larger is later; the slot with the smallest is the first to be given away.
    """

    def __init__(self, store: ExpertStore, pool: SlotPool, link: Link, traffic: Traffic) -> None:
        self.store, self.pool, self.link, self.traffic = store, pool, link, traffic
        self.clock = 0
        self.slots: set[int] = set()
        self._wave = max(1, min(LARGEST_WAVE, len(pool) // 16))
        self._slot_of: list[dict[int, int]] = [{} for _ in store.layers]  # of each layer's experts that have one
        self._owner: list[tuple[int, int] | None] = [None] * len(pool)
        self.last_use = [NEVER] * len(pool)
        self._idle: list[tuple[int, int]] = []  # a heap; entries that are no longer true are skipped
        self._pinned: set[int] = set()  # slots that may not be given away now
        self._copies: dict[int, Any] = {}  # of slots whose expert has not been waited for
        self._unused: set[int] = set()  # slots whose expert was prefetched and not needed since
        self._marks: list[Any] = [None] * len(pool)  # behind the last computation that read each slot
        weakref.finalize(self, link.close).atexit = False  # the link's thread ends with the last user of its slots

    def take(self, slots: Mapping[int, tuple[int, int] | None], last_use: Mapping[int, int]) -> None:
        """Add slots with what is in them. Whatever has read them has ended, or was launched by `wave`.

        Args:
            slots: the (layer, expert) whose row is whole in each, or None.
            last_use: what counts as the last use of each that has an owner.
        """
        for slot, owner in slots.items():
            assert slot not in self.slots, "a slot is leased once"
            self.slots.add(slot)
            self.last_use[slot] = NEVER if owner is None else last_use[slot]
            if owner is not None:
                self._place(*owner, slot)
            self._let_go(slot)

    def give_back(self, slot: int) -> tuple[int, int] | None:
        """Give a slot up; return whose row is whole in it for whatever is computed from now on, or None."""
        owner = self._owner[slot]
        if owner is not None:
            try:
                if slot in self._copies:
                    self.link.wait(self._copies.pop(slot))
            except LinkError:
                owner = None
            self._empty(slot)
        self.slots.remove(slot)
        self._pinned.discard(slot)
        return owner

    def slot(self, index: int, expert: int) -> int | None:
        """Return the slot of a MoE layer's expert, or None."""
        return self._slot_of[index].get(expert)

    def residents(self, index: int) -> dict[int, int]:
        """Return a layer's experts that have a slot, and which."""
        return dict(self._slot_of[index])

    def absent(self, index: int, experts: Iterable[int]) -> list[int]:
        """Return those experts of a layer that have no slot."""
        return [expert for expert in experts if expert not in self._slot_of[index]]

    def stamp(self, slot: int, last_use: int) -> None:
        """Change what counts as a slot's last use; it may be given away."""
        self.last_use[slot] = last_use
        self._let_go(slot)

    def is_settled(self, slot: int) -> bool:
        """Return whether the row of a slot's owner is there, and no layer still needs it."""
        return self._owner[slot] is not None and slot not in self._copies and slot not in self._pinned

    def fetch(self, index: int, expert: int, cause: str, below: int | None = None) -> bool:
        """Send an expert to the slot that was used least recently, to stay there until it is computed or released.

        Args:
            index: the MoE layer's number.
            expert: one that has no slot.
            cause: the counter of `Traffic` that its bytes go to.
            below: give up only slots with a last use below this; None for any that is not pinned.

        Returns:
            False when there is no slot to be had.
        """
        slot = self._free_slot(below)
        if slot is None:
            return False
        row = self.store.layers[index][expert]
        self._copies[slot] = self.link.send(row, self.pool.rows[slot], self._marks[slot])
        self._place(index, expert, slot)
        self._pinned.add(slot)
        if cause == "prefetched_bytes":
            self._unused.add(slot)
        setattr(self.traffic, cause, getattr(self.traffic, cause) + row.nbytes)
        return True

    def _free_slot(self, below: int | None) -> int | None:
        while self._idle:
            last_use, slot = self._idle[0]
            if slot in self._pinned or slot not in self.slots or last_use != self.last_use[slot]:
                heapq.heappop(self._idle)
            elif below is not None and last_use >= below:
                return None
            else:
                return slot
        return None

    def _let_go(self, slot: int) -> None:
        self._pinned.discard(slot)
        heapq.heappush(self._idle, (self.last_use[slot], slot))
        if len(self._idle) > MOST_ENTRIES * len(self.pool):
            self._idle = [(self.last_use[slot], slot) for slot in self.slots - self._pinned]
            heapq.heapify(self._idle)

    def _place(self, index: int, expert: int, slot: int) -> None:
        assert expert not in self._slot_of[index], "an expert has at most one slot"
        if (owner := self._owner[slot]) is not None:
            del self._slot_of[owner[0]][owner[1]]
        self._slot_of[index][expert] = slot
        self._owner[slot] = index, expert
        self._unused.discard(slot)

    def release(self, index: int, experts: Iterable[int]) -> None:
        """Let the slots of a layer's experts be given away again, though they were not computed."""
        for expert in experts:
            if (slot := self.slot(index, expert)) in self._pinned:
                self._let_go(slot)

    def compute(self, total: LayerSum, index: int, experts: list[int], stamps: Mapping[int, int] | None = None) -> None:
        """Compute one wave: wait for these experts of a layer, add them to its sum, and let their slots go.

        Args:
            total: the layer's sum.
            index: the MoE layer's number.
            experts: those of the wave; each has a slot.
            stamps: what each counts as its last use from now on; None is the time.
        """
        slots = {expert: self._slot_of[index][expert] for expert in experts}
        for slot in slots.values():
            if slot in self._copies:
                self.link.wait(self._copies.pop(slot))
        self.wave(total, index, slots)
        self.clock += 1
        for expert, slot in slots.items():
            self.last_use[slot] = self.clock if stamps is None else stamps[expert]
            self._let_go(slot)

    def wave(self, total: LayerSum, index: int, slots: Mapping[int, int]) -> None:
        """Add experts of a layer to its sum, by the slots, leased or not, in which their rows are."""
        total.wave(self.pool.views[index], self.pool.table(slots, self.store.num_experts), len(slots))
        mark = self.link.mark()
        for slot in slots.values():
            self._marks[slot] = mark

    def run(
        self,
        total: LayerSum,
        index: int,
        needed: list[int],
        cause: str,
        below: int | None = None,
        stamps: Mapping[int, int] | None = None,
        meanwhile: Callable[[], None] = lambda: None,
        after_wave: Callable[[], None] = lambda: None,
        make_room: Callable[[], None] = lambda: None,
    ) -> Iterator[None]:
        """Compute all experts that a layer needs, wave by wave: those in slots at once, the others as they arrive.

        Args:
            total: the layer's sum.
            index: the MoE layer's number.
            needed: every expert that the router chose, each once.
            cause: the counter of `Traffic` for what has to be fetched.
            below: as in `fetch`; overruled where the layer could not go on otherwise.
            stamps: as in `compute`.
            meanwhile: called once the first copies are sent, before anything is computed; may change `stamps`.
            after_wave: called after each wave once all of the layer's copies are sent; may fetch for later layers.
            make_room: called when no slot is to be had that counts as used before `below`; may let others go.

        Yields:
            After each wave.
        """
        for expert in needed:
            slot = self.slot(index, expert)
            if slot in self._copies and self.link.has_failed(self._copies[slot]):
                self._empty(slot)  # it was sent ahead, and what has failed then is no fault of this step's
        absent = deque(self.absent(index, needed))
        self.traffic.misses += len(absent)
        self.traffic.hits += len(needed) - len(absent)
        here: list[int] = []
        coming: deque[int] = deque()  # in the order in which they were sent
        for expert in needed:
            slot = self.slot(index, expert)
            if slot is not None:
                self._pinned.add(slot)
                if slot in self._unused:
                    self._unused.remove(slot)
                    self.traffic.prefetch_used_bytes += self.store.layers[index].shape[1]
                (coming if slot in self._copies else here).append(expert)

        def send() -> None:
            while absent:
                if not self.fetch(index, absent[0], cause, below):
                    make_room()
                    if not self.fetch(index, absent[0], cause, below):
                        break
                coming.append(absent.popleft())

        send()
        meanwhile()
        if here:
            self.compute(total, index, here, stamps)
            send()
            yield
        while coming or absent:
            if not coming:
                fetched = self.fetch(index, absent[0], cause)
                assert fetched, "a layer can always make room for one expert"
                coming.append(absent.popleft())
            wave = [coming.popleft() for _ in range(min(self._wave, len(coming)))]
            while coming and self._has_arrived(index, coming[0]):
                wave.append(coming.popleft())
            self.compute(total, index, wave, stamps)
            send()
            if not absent:
                after_wave()
            yield

    def _has_arrived(self, index: int, expert: int) -> bool:
        copy = self._copies.get(self._slot_of[index][expert])
        return copy is None or self.link.has_arrived(copy)

    def _empty(self, slot: int) -> None:
        """Take a slot from its owner."""
        owner = self._owner[slot]
        assert owner is not None, "an empty slot has no owner to lose"
        del self._slot_of[owner[0]][owner[1]]
        self._owner[slot] = None
        self._copies.pop(slot, None)
        self._unused.discard(slot)
        self.last_use[slot] = NEVER
        self._let_go(slot)

    def forget(self) -> None:
        """Empty all slots, whatever was on its way to them; what is computed from now on is behind that."""
        for copy in self._copies.values():
            with contextlib.suppress(LinkError):
                self.link.wait(copy)
        self._copies.clear()
        self._unused.clear()
        self._pinned.clear()
        for layer in self._slot_of:
            layer.clear()
        for slot in self.slots:
            self._owner[slot], self.last_use[slot] = None, NEVER
        self._idle = [(NEVER, slot) for slot in self.slots]
