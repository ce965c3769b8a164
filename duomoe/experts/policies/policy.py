"""What every policy has in common: it owns the loop over layers and decides when experts' bytes move."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from duomoe.experts.compute import ExpertSum, LayerSum, worth_expanding
from duomoe.experts.link import Traffic
from duomoe.experts.page_routing import Prefix
from duomoe.experts.store import ExpertStore
from duomoe.models import Batch, LayerKV, Model, Routing


class Policy(ABC):
    """Runs passes over a model's blocks, with the experts between them.

    Which experts run is decided by the router alone; a policy decides when they are resident, never what they give.

    Args:
        model: the non-expert part.
        store: all experts.

    Attributes:
        can_be_captured: whether a decode step never waits for the host, so that a CUDA graph can hold it.
        expands_quantised: whether long passes may expand quantised experts (LayerSum).
    """

    can_be_captured = False
    expands_quantised = False

    def __init__(self, model: Model, store: ExpertStore) -> None:
        self.model = model
        self._format = store.format
        self.traffic = Traffic()
        # Sees every router's input [tokens, hidden] and choice, by the MoE layer's number: what traces are made of.
        self.observer: Callable[[int, Tensor, Routing], None] | None = None
        # Experts are stored for the layers that have any: layer number -> number in the store.
        self.moe_index = {layer: index for index, layer in enumerate(model.config.moe_layers)}

    def prefill(self, chunks: Sequence[Batch], kv: Sequence[LayerKV], prefixes: Sequence[Prefix] = ()) -> list[Tensor]:
        """Pass prompts through all blocks.

        Args:
            chunks: the tokens and where their keys go; a long pass is cut, so that what a layer needs for a moment
                does not grow with the pass. All chunks go through a layer before any goes on.
            kv: each layer's pages.
            prefixes: what of each prompt was computed before.

        Returns:
            The residual stream [tokens, hidden] of each chunk after the last block.
        """
        return self._walk(chunks, kv)

    def prepare_decode(self) -> None:  # noqa: B027
        """Called before each decode step; may wait for the device."""

    def decode(self, batch: Batch, kv: Sequence[LayerKV]) -> Tensor:
        """Pass one token of each sequence through all blocks; arguments and result as in `prefill`, for one chunk."""
        return self._walk([batch], kv)[0]

    def close(self) -> None:  # noqa: B027  # where nothing moves, nothing runs
        """End what the policy runs on; no pass comes after it."""

    def forget(self) -> None:  # noqa: B027  # where all experts stay, none is forgotten
        """After a failure, wherever it was, nothing counts as resident."""

    def note_step(self, sequences: int, seconds: float) -> None:  # noqa: B027  # who decides nothing by it need not know
        """Take in how long a decode step of so many sequences took, until its tokens were read."""

    def _walk(self, chunks: Sequence[Batch], kv: Sequence[LayerKV]) -> list[Tensor]:
        stream = [self.model.embed(chunk) for chunk in chunks]
        for layer in range(self.model.config.num_layers):
            index = self.moe_index.get(layer)
            if index is not None:
                self.enter(index)
            inputs, routings = [], []
            for number, chunk in enumerate(chunks):
                stream[number], h, routing = self.model.before(layer, stream[number], chunk, kv[layer])
                inputs.append(h)
                if routing is not None:
                    routings.append(routing)
            sums: Sequence[Tensor | None] = [None] * len(chunks)
            if index is not None:
                if self.observer is not None:
                    self.observer(index, torch.cat(inputs), joined(routings))
                sums = self.experts(index, inputs, routings)
            for number, (h, y) in enumerate(zip(inputs, sums, strict=True)):
                stream[number] = self.model.after(layer, stream[number], h, y)
        return stream

    def enter(self, index: int) -> None:  # noqa: B027
        """Called before the block of a MoE layer begins: copies may start under its attention."""

    @abstractmethod
    def experts(self, index: int, inputs: list[Tensor], routings: list[Routing]) -> list[Tensor]:
        """Return the routed experts' weighted sums in a MoE layer, [tokens, hidden] for each chunk."""

    def traffic_so_far(self) -> Traffic:
        """Return a copy of the counts; may wait for the device."""
        return replace(self.traffic)

    def layer_sum(self, inputs: list[Tensor], routings: list[Routing]) -> LayerSum:
        """Begin a layer's sums."""
        config = self.model.config
        sums = [
            ExpertSum(h, routing, config.num_experts, config.moe_intermediate_size, self._format)
            for h, routing in zip(inputs, routings, strict=True)
        ]
        pairs = sum(routing.experts.numel() for routing in routings)
        return LayerSum(sums, self.expands_quantised and worth_expanding(self._format, pairs, config.num_experts))


def joined(routings: Sequence[Routing]) -> Routing:
    """Return the routing of all chunks' tokens."""
    return Routing(*(torch.cat(part) for part in zip(*routings, strict=True)))
