"""What `lru` and `duo` have in common: prefill streams through the slots, decode caches in them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from duomoe.experts.compute import LayerSum
from duomoe.experts.decode import Decode
from duomoe.experts.fetcher import DeviceFetcher, Fetcher, HostFetcher
from duomoe.experts.link import HostLink, Link, Traffic
from duomoe.experts.page_routing import PageRouting, Prompt
from duomoe.experts.policies.bounded import BoundedPolicy
from duomoe.experts.policies.policy import Pass, finished, joined
from duomoe.experts.predictor import Predictor
from duomoe.experts.prefill import PrefillStream
from duomoe.experts.slots import Directory
from duomoe.experts.store import ExpertStore
from duomoe.models import Batch, LayerKV, Model, Routing


class CachedPolicy(BoundedPolicy):
    """Prefill decides on the host, decode on the device; both over one directory of slots.

    Args:
        model: the non-expert part.
        store: all experts, in host memory.
        num_slots: how many of them the device holds.
        link: from the one to the other.
        predictor: names what decode sends ahead, where the policy is `predicted`; None for nothing.

    Attributes:
        predicted: decode gives away the expert that is expected to be needed last, not the one used least recently.
    """

    predicted: bool

    def __init__(
        self,
        model: Model,
        store: ExpertStore,
        num_slots: int,
        link: Link,
        predictor: Predictor | None,
    ) -> None:
        super().__init__(model, store, num_slots, link, predictor)
        pool = self.lease.pool
        self.directory = Directory(len(store.layers), store.num_experts, num_slots, model.device)
        self.stream = PrefillStream(self.lease, self.directory, model.config.top_k)
        fetcher: Fetcher | None = None
        if isinstance(link, HostLink):
            fetcher = HostFetcher(store, pool, link)
        elif store.pinned:
            fetcher = DeviceFetcher(store, pool, self.directory.clock)
        self.decoder: Decode | None = None
        if fetcher is not None:
            left = num_slots - self.stream.ring
            self.interruptible = left >= model.config.top_k
            self.decoder = Decode(
                self.directory, pool, left if self.interruptible else num_slots, fetcher, self.predicted,
                predictor if self.predicted else None,
            )  # fmt: skip
        self.can_be_captured = self.decoder is not None
        self._page_routing: PageRouting | None = None
        self._chosen: list[Tensor] = []  # by the tokens of a decode step, in each layer so far

    def keep_routing(self, page_routing: PageRouting) -> None:
        """From now on, count what the tokens of each page choose."""
        self._page_routing = page_routing

    def prefill(self, chunks: Sequence[Batch], kv: Sequence[LayerKV], prompts: Sequence[Prompt], beside: bool) -> Pass:
        """Pass prompts through all blocks: experts stream through slots that the pass leases."""
        self.stream.begin(sum(len(chunk.tokens) for chunk in chunks), prompts, self._page_routing, beside)
        try:
            stream = yield from self._walk(chunks, kv, partial(self._stream, chunks), self.stream.send_ahead)
        except GeneratorExit:
            self.stream.give_back()
            raise
        self.stream.end()
        if self.decoder is not None:
            self.decoder.start()
        return stream

    def _stream(
        self, chunks: Sequence[Batch], index: int, total: LayerSum, inputs: list[Tensor], routings: list[Routing]
    ) -> Iterator[None]:
        """Compute a layer's experts in a prefill."""
        if self._page_routing is not None:
            for chunk, routing in zip(chunks, routings, strict=True):
                self._page_routing.note(chunk.rows, routing.experts[None], index)
        return self.stream.run(total, index, joined(routings).experts)

    def prepare_decode(self) -> None:
        """A step needs the directory and changes it; a prefill that is under way has to read it again."""
        if self.decoder is not None:
            self.stream.flush()
            self.stream.stale = True

    def decode(self, batch: Batch, kv: Sequence[LayerKV]) -> Tensor:
        """Pass one token of each sequence through all blocks.

        Where host memory is not pinned, which the device cannot read by itself, it is as a prefill.
        """
        if self.decoder is None:
            return finished(self.prefill([batch], kv, (), beside=False))[0]
        self._chosen = []
        stream = super().decode(batch, kv)
        self.decoder.end()
        if self._page_routing is not None:
            self._page_routing.note(batch.rows, torch.stack(self._chosen))
        return stream

    def experts(self, index: int, total: LayerSum, inputs: list[Tensor], routings: list[Routing]) -> tuple[()]:
        """Compute a layer's experts in a decode step: what is in slots while the rest is on its way."""
        assert self.decoder is not None, "without it, a step is a prefill"
        self._chosen.append(routings[0].experts)
        self.decoder.run(total, index, inputs[0], routings[0])
        return ()

    @property
    def lacking(self) -> Tensor | None:
        """Whether steps so far have left experts out, because slots were lacking."""
        return None if self.decoder is None else self.decoder.counts[2] != 0

    def note_step(self, sequences: int, seconds: float) -> None:
        """Let decode compare its steps with and without looking ahead."""
        if self.decoder is not None:
            self.decoder.note_step(sequences, seconds)

    def traffic_so_far(self) -> Traffic:
        """Return the counts; waits for the device."""
        traffic = replace(self.traffic)
        if self.decoder is not None:
            self.decoder.count(traffic)
        return traffic

    def forget(self) -> None:
        """After a failure no slot has an owner."""
        if self.decoder is not None:
            self.decoder.forget()
        self.stream.forget()
