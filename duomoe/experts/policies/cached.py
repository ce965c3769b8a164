"""What `lru` and `duo` have in common: prefill streams through the slots, decode caches in them."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from duomoe.experts.decode import Decode
from duomoe.experts.fetcher import DeviceFetcher, Fetcher, HostFetcher
from duomoe.experts.link import HostLink, Link, Traffic
from duomoe.experts.page_routing import PageRouting, Prefix
from duomoe.experts.policies.bounded import BoundedPolicy
from duomoe.experts.policies.policy import joined
from duomoe.experts.predictor import Predictor
from duomoe.experts.prefill import PrefillStream, known_of
from duomoe.experts.slots import Directory
from duomoe.experts.store import ExpertStore
from duomoe.models import Batch, LayerKV, Model, Routing


class CachedPolicy(BoundedPolicy):
    """Prefill decides on the host, decode on the device; each takes over the slots that the other has left.

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
        self.stream = PrefillStream(self.residency, model.config.top_k)
        pool = self.residency.pool
        self.directory = Directory(len(store.layers), store.num_experts, num_slots, model.device)
        fetcher: Fetcher | None = None
        if isinstance(link, HostLink):
            fetcher = HostFetcher(store, pool, link)
        elif store.pinned:
            fetcher = DeviceFetcher(store, pool, self.directory.clock)
        self.decoder: Decode | None = None
        if fetcher is not None:
            self.decoder = Decode(self.directory, pool, fetcher, self.predicted, predictor if self.predicted else None)
        self.can_be_captured = self.decoder is not None
        self.decoding = False  # the directory is the valid one, not the residency
        self._page_routing: PageRouting | None = None
        self._rows: list[Tensor] = []  # of each chunk of the pass
        self._chosen: list[Tensor] = []  # by the tokens of a decode step, in each layer so far

    def keep_routing(self, page_routing: PageRouting) -> None:
        """From now on, count what the tokens of each page choose."""
        self._page_routing = page_routing

    def prefill(self, chunks: Sequence[Batch], kv: Sequence[LayerKV], prefixes: Sequence[Prefix] = ()) -> list[Tensor]:
        """Pass prompts through all blocks, with the host deciding; takes over from decode."""
        if self.decoding:
            assert self.decoder is not None
            self.decoding = False
            self.decoder.fetcher.drop()
            self.residency.read(self.directory)
        known = None if self._page_routing is None else known_of(self._page_routing, prefixes)
        self.stream.begin(sum(len(chunk.tokens) for chunk in chunks), known)
        self._rows = [chunk.rows for chunk in chunks]
        return super().prefill(chunks, kv)

    def prepare_decode(self) -> None:
        """Let the device decide; takes over from prefill."""
        if self.decoder is not None and not self.decoding:
            self.decoding = True
            self.residency.settle()
            self.residency.write(self.directory)
            self.decoder.start(self.stream.use)

    def decode(self, batch: Batch, kv: Sequence[LayerKV]) -> Tensor:
        """Pass one token of each sequence through all blocks.

        Where host memory is not pinned, which the device cannot read by itself, it is as a prefill.
        """
        if self.decoder is None:
            return self.prefill([batch], kv)[0]
        self._chosen = []
        stream = super().decode(batch, kv)
        self.decoder.end()
        if self._page_routing is not None:
            self._page_routing.note(batch.rows, torch.stack(self._chosen))
        return stream

    def note_step(self, sequences: int, seconds: float) -> None:
        """Let decode compare its steps with and without looking ahead."""
        if self.decoder is not None:
            self.decoder.note_step(sequences, seconds)

    def enter(self, index: int) -> None:
        """In a prefill, send the layer's experts ahead, under its attention."""
        if not self.decoding:
            self.stream.send_ahead(index)

    def experts(self, index: int, inputs: list[Tensor], routings: list[Routing]) -> list[Tensor]:
        """Compute what is in slots while the rest is on its way."""
        total = self.layer_sum(inputs, routings)
        if self.decoder is None or not self.decoding:
            if self._page_routing is not None:
                for rows, routing in zip(self._rows, routings, strict=True):
                    self._page_routing.note(rows, routing.experts[None], index)
            self.stream.run(total, index, joined(routings).experts)
        else:
            self._chosen.append(routings[0].experts)
            self.decoder.run(total, index, inputs[0], routings[0])
        return total.totals()

    def traffic_so_far(self) -> Traffic:
        """Return the counts; waits for the device."""
        traffic = replace(self.traffic)
        if self.decoder is not None:
            self.decoder.count(traffic)
        return traffic

    def forget(self) -> None:
        """After a failure nothing counts as resident, for prefill or decode."""
        super().forget()
        self.decoding = False
        if self.decoder is not None:
            self.decoder.fetcher.drop()
