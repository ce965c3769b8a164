"""What every policy has in common: it owns the loop over layers and decides when experts' bytes move."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from duomoe.experts.compute import ExpertSum, LayerSum, worth_expanding
from duomoe.experts.link import Traffic
from duomoe.experts.page_routing import Prompt
from duomoe.experts.store import ExpertStore
from duomoe.models import Batch, LayerKV, Model, Routing

R = TypeVar("R")

# A prefill under way: each `next` takes a step of it, an attention chunk or a wave of experts. What it returns at last
# is the residual stream [tokens, hidden] of each chunk after the last block.
Pass = Generator[None, None, list[Tensor]]

Experts = Callable[[int, LayerSum, list[Tensor], list[Routing]], Iterable[None]]
Enter = Callable[[int], None]


class Policy(ABC):
    """Runs passes over a model's blocks, with the experts between them.

    Which experts run is decided by the router alone; a policy decides when they are resident, never what they give.

    Args:
        model: the non-expert part.
        store: all experts.

    Attributes:
        can_be_captured: whether a decode step never waits for the host, so that a CUDA graph can hold it.
        interruptible: whether decode steps may run between two steps of a prefill.
        expands_quantised: whether long passes may expand quantised experts (LayerSum).
    """

    can_be_captured = False
    interruptible = False
    expands_quantised = False

    def __init__(self, model: Model, store: ExpertStore) -> None:
        self.model = model
        self._format = store.format
        self.traffic = Traffic()
        # Sees every router's input [tokens, hidden] and choice, by the MoE layer's number: what traces are made of.
        self.observer: Callable[[int, Tensor, Routing], None] | None = None
        # Experts are stored for the layers that have any: layer number -> number in the store.
        self.moe_index = {layer: index for index, layer in enumerate(model.config.moe_layers)}

    def prefill(self, chunks: Sequence[Batch], kv: Sequence[LayerKV], prompts: Sequence[Prompt], beside: bool) -> Pass:
        """Begin to pass prompts through all blocks.

        Args:
            chunks: the tokens and where their keys go; a long pass is cut, so that what a layer needs for a moment
                does not grow with the pass. All chunks go through a layer before any goes on.
            kv: each layer's pages.
            prompts: whose tokens these are, in order.
            beside: other requests run, and go on.

        Returns:
            The pass. Between any two of its steps decode steps may run, if the policy is `interruptible`.
        """
        return self._walk(chunks, kv, self.experts, self.enter)

    def prepare_decode(self) -> None:  # noqa: B027
        """Called before each decode step is launched, by a graph or not."""

    def decode(self, batch: Batch, kv: Sequence[LayerKV]) -> Tensor:
        """Pass one token of each sequence through all blocks; returns the residual stream [tokens, hidden]."""
        return finished(self._walk([batch], kv, self.experts, self.enter))[0]

    @property
    def lacking(self) -> Tensor | None:
        """Whether decode steps so far have left experts out, [] bool on the device; None where they cannot."""
        return None

    def close(self) -> None:  # noqa: B027  # where nothing moves, nothing runs
        """End what the policy runs on; no pass comes after it."""

    def forget(self) -> None:  # noqa: B027  # where all experts stay, none is forgotten
        """After a failure, wherever it was, nothing counts as resident."""

    def note_step(self, sequences: int, seconds: float) -> None:  # noqa: B027  # who decides nothing by it need not know
        """Take in how long a decode step of so many sequences took, until its tokens were read."""

    def _walk(self, chunks: Sequence[Batch], kv: Sequence[LayerKV], experts: Experts, enter: Enter) -> Pass:
        """Pass chunks through all blocks, a step at a time.

        Args:
            chunks: as in `prefill`.
            kv: likewise.
            experts: as the method.
            enter: likewise.
        """
        stream = [self.model.embed(chunk) for chunk in chunks]
        for layer in range(self.model.config.num_layers):
            index = self.moe_index.get(layer)
            if index is not None:
                enter(index)
            inputs, routings = [], []
            for number, chunk in enumerate(chunks):
                stream[number], h, routing = self.model.before(layer, stream[number], chunk, kv[layer])
                inputs.append(h)
                if routing is not None:
                    routings.append(routing)
                yield
            sums: Sequence[Tensor | None] = [None] * len(chunks)
            if index is not None:
                if self.observer is not None:
                    self.observer(index, torch.cat(inputs), joined(routings))
                total = self.layer_sum(inputs, routings)
                yield from experts(index, total, inputs, routings)
                sums = total.totals()
            for number, (h, y) in enumerate(zip(inputs, sums, strict=True)):
                stream[number] = self.model.after(layer, stream[number], h, y)
        return stream

    def enter(self, index: int) -> None:  # noqa: B027
        """Called before the block of a MoE layer begins: copies may start under its attention."""

    @abstractmethod
    def experts(self, index: int, total: LayerSum, inputs: list[Tensor], routings: list[Routing]) -> Iterable[None]:
        """Compute the routed experts of a MoE layer into its sum, perhaps a step at a time."""

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


def finished(steps: Generator[None, None, R]) -> R:
    """Take all steps of something at once, and return its result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: R = end.value
            return result


def joined(routings: Sequence[Routing]) -> Routing:
    """Return the routing of all chunks' tokens."""
    return Routing(*(torch.cat(part) for part in zip(*routings, strict=True)))
