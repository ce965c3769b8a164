"""What every policy has in common: it owns the loop over layers and decides when experts' bytes move."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from duomoe.experts.compute import ExpertSum
from duomoe.experts.link import Traffic
from duomoe.models import Batch, LayerKV, Model, Routing


class Policy(ABC):
    """Runs passes over a model's blocks, with the experts between them.

    Which experts run is decided by the router alone; a policy decides when they are resident, never what they give.

    Args:
        model: the non-expert part.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.traffic = Traffic()
        # Sees every router's input [tokens, hidden] and choice, by the MoE layer's number: what traces are made of.
        self.observer: Callable[[int, Tensor, Routing], None] | None = None
        # Experts are stored for the layers that have any: layer number -> number in the store.
        self.moe_index = {layer: index for index, layer in enumerate(model.config.moe_layers)}

    def forward(self, batch: Batch, kv: Sequence[LayerKV]) -> Tensor:
        """Pass a batch through all blocks.

        Args:
            batch: the tokens and where their keys go.
            kv: each layer's pages.

        Returns:
            The residual stream [tokens, hidden] after the last block.
        """
        x = self.model.embed(batch)
        for layer in range(self.model.config.num_layers):
            if layer in self.moe_index:
                self.enter(self.moe_index[layer])
            x, h, routing = self.model.before(layer, x, batch, kv[layer])
            if routing is not None and self.observer is not None:
                self.observer(self.moe_index[layer], h, routing)
            y = None if routing is None else self.experts(self.moe_index[layer], h, routing)
            x = self.model.after(layer, x, h, y)
        return x

    def enter(self, index: int) -> None:  # noqa: B027
        """Called before the block of a MoE layer begins: copies may start under its attention."""

    @abstractmethod
    def experts(self, index: int, h: Tensor, routing: Routing) -> Tensor:
        """Return the routed experts' weighted sum [tokens, hidden] for the MoE layer of that number."""

    def traffic_so_far(self) -> Traffic:
        """Return a copy of the counts; may wait for the device."""
        return replace(self.traffic)

    def expert_sum(self, h: Tensor, routing: Routing) -> ExpertSum:
        """Begin a layer's sum."""
        config = self.model.config
        return ExpertSum(h, routing, config.num_experts, config.moe_intermediate_size)
