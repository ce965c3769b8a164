"""How decode's copies are made: of rows that only the device knows, named in lists that `admit` writes.

A list is int32 [3, width], a column a copy: the expert's number over all layers, its slot, and 1 where part of the row
may be there already. Columns are packed to the left; the rest is -1.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from duomoe.experts.link import Copy, HostLink, Traffic
from duomoe.experts.slots import SlotPool
from duomoe.experts.store import ExpertStore
from duomoe.kernels import LANES, fetch, fetch_ahead


class Fetcher(ABC):
    """Copies rows from a store into slots."""

    def __init__(self, store: ExpertStore, pool: SlotPool) -> None:
        self.store, self.pool = store, pool

    @abstractmethod
    def fetch(self, misses: Tensor) -> None:
        """Begin the copies of a list, now; whatever is being sent ahead makes way."""

    @abstractmethod
    def join(self) -> None:
        """Let everything that is computed from now on see the fetched rows."""

    @abstractmethod
    def fetch_ahead(self, ahead: Tensor, issued: Tensor) -> None:
        """Begin the copies of a list in the link's idle time, until the clock is no longer at `issued`, int64 [1]."""

    @abstractmethod
    def stop(self) -> None:
        """End a step: what is sent ahead stops where it stands."""

    @abstractmethod
    def drop(self) -> None:
        """Give up all that was sent ahead: slots get other owners."""

    @abstractmethod
    def count(self, traffic: Traffic) -> None:
        """Add the bytes of all copies so far."""


class HostFetcher(Fetcher):
    """The fetcher where decode computes on the CPU: reads the lists, and copies over the link's thread."""

    def __init__(self, store: ExpertStore, pool: SlotPool, link: HostLink) -> None:
        super().__init__(store, pool)
        self.link = link
        self._coming: list[Copy] = []
        self._ahead: dict[int, Copy] = {}  # what was sent ahead and not needed since, by slot
        self._needed = 0  # bytes of all rows that were fetched
        self._used = 0  # of those, what was there because it had been sent ahead

    def fetch(self, misses: Tensor) -> None:
        """Send the rows, or what is missing of those that were sent ahead."""
        self.link.recall()
        for expert, slot, partly in _columns(misses):
            begun = self._ahead.pop(slot, None)
            if begun is not None and partly and not self.link.has_failed(begun):
                self._coming.append(self.link.promote(begun))
            else:
                self._coming.append(self.link.send(self._row(expert), self.pool.rows[slot]))

    def join(self) -> None:
        """Wait for the copies."""
        while self._coming:
            copy = self._coming.pop(0)
            self.link.wait(copy)
            self._needed += copy.source.nbytes
            self._used += copy.ahead

    def fetch_ahead(self, ahead: Tensor, issued: Tensor) -> None:
        """Queue the copies behind those of `fetch`; the next `fetch` or `stop` recalls them."""
        for expert, slot, partly in _columns(ahead):
            # What failed ahead of need is no fault of whoever needs it.
            if not partly or self.link.has_failed(self._ahead[slot]):
                self._ahead[slot] = Copy(self._row(expert), self.pool.rows[slot])
            self.link.send_ahead(self._ahead[slot])

    def stop(self) -> None:
        """Recall what was sent ahead."""
        self.link.recall()

    def drop(self) -> None:
        """Recall and forget what was sent ahead, and what a failed step has left."""
        self.link.recall()
        self._ahead.clear()
        self._coming.clear()

    def count(self, traffic: Traffic) -> None:
        """Add the bytes."""
        traffic.demand_bytes += self._needed - self._used
        traffic.prefetched_bytes += self.link.ahead_bytes
        traffic.prefetch_used_bytes += self._used

    def _row(self, expert: int) -> Tensor:
        layer, number = divmod(expert, self.store.num_experts)
        return self.store.layers[layer][number]


class DeviceFetcher(Fetcher):
    """The fetcher on a GPU: kernels on a stream of their own read pinned host memory.

    The store's rows must be pinned. Nothing that a step calls waits for the device, so it can be captured as a graph.
    """

    def __init__(self, store: ExpertStore, pool: SlotPool, clock: Tensor) -> None:
        super().__init__(store, pool)
        device = pool.rows.device
        self.clock = clock
        self.stream = torch.cuda.Stream(device)
        self.table = torch.tensor([rows.data_ptr() for rows in store.layers], dtype=torch.int64, device=device)
        self.sizes = torch.tensor([each.row_bytes for each in store.formats], dtype=torch.int32, device=device)
        self.progress = torch.zeros(len(pool), LANES, dtype=torch.int32, device=device)
        self.moved = torch.zeros(3, dtype=torch.int64, device=device)  # on demand, ahead, and ahead and then needed
        self._arrived = torch.cuda.Event()

    def fetch(self, misses: Tensor) -> None:
        """Launch the copying kernel behind what was computed, and behind what is being sent ahead, which stops."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            fetch(self.table, self.sizes, self.store.num_experts, misses, self.pool.rows, self.progress, self.moved)
            self._arrived.record()

    def join(self) -> None:
        """Let the computing stream wait for the copies."""
        torch.cuda.current_stream().wait_event(self._arrived)

    def fetch_ahead(self, ahead: Tensor, issued: Tensor) -> None:
        """Launch the kernel that copies until the clock moves on."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            fetch_ahead(
                self.table, self.sizes, self.store.num_experts, ahead, self.pool.rows, self.progress, self.clock,
                issued, self.moved,
            )  # fmt: skip

    def stop(self) -> None:
        """Let the computing stream wait for the copies, which stop because the clock has moved on."""
        torch.cuda.current_stream().wait_stream(self.stream)

    def drop(self) -> None:
        """Wait for the copies: a step that failed has not stopped them, and prefill's come over another stream."""
        self.stream.synchronize()  # host-sync ok: before a prefill, not in a step

    def count(self, traffic: Traffic) -> None:
        """Add the bytes; waits for the device."""
        demand, ahead, used = self.moved.tolist()  # host-sync ok: between requests, not between tokens
        traffic.demand_bytes += demand
        traffic.prefetched_bytes += ahead
        traffic.prefetch_used_bytes += used


def _columns(copies: Tensor) -> list[tuple[int, int, int]]:
    columns = copies.t().tolist()  # host-sync ok: for copies that the host makes, in host memory
    return [(expert, slot, partly) for expert, slot, partly in columns if expert >= 0]
