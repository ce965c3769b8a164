"""The routed experts of one layer and pass, computed wave by wave over whatever slots hold."""

from collections.abc import Mapping

import torch
from torch import Tensor

from duomoe.experts.format import ExpertFormat
from duomoe.kernels import (
    combine,
    experts_down,
    experts_down_gemv,
    experts_gate_up,
    experts_gate_up_gemv,
    gemv_splits,
    group_by_expert,
    quantise_activations,
    use_gemv,
)
from duomoe.kernels.configuration import capability
from duomoe.models.batch import Routing

# The compute capability, times ten, from which on GPUs multiply in fp8.
FIRST_FP8 = 89


class ExpertSum:
    """The weighted sum over each token's experts, however many waves it takes to have them all resident.

    Every pair of a token and one of its experts is computed in exactly one wave, into a place of its own, and `total`
    adds the places up in the order of the router's choices. Kernels and tiles are chosen from shapes alone. So the
    result is the same bit for bit whatever the waves and the slots.

    Where a checkpoint's fp8 weights are meant for fp8 activations, the grouped GEMM takes both so, on GPUs that
    multiply in fp8; the GEMV of few tokens, which waits for memory, keeps activations as they are, and so does float32.

    Args:
        h: [tokens, hidden], what the experts work on.
        routing: the router's choice.
        num_experts: of the layer.
        intermediate_size: of an expert.
        expert_format: of the experts' rows.
    """

    def __init__(
        self, h: Tensor, routing: Routing, num_experts: int, intermediate_size: int, expert_format: ExpertFormat
    ) -> None:
        self.h, self.routing, self.intermediate_size = h, routing, intermediate_size
        quantised = expert_format.quantised
        (tokens, hidden), top_k = h.shape, routing.experts.shape[1]
        pairs = tokens * top_k
        self.few_tokens = use_gemv(tokens, top_k, num_experts)
        if self.few_tokens:
            self.up_splits = gemv_splits(hidden, 2 * intermediate_size, pairs, quantised)
            down_splits = gemv_splits(intermediate_size, hidden, pairs, quantised)
            self.parts = h.new_empty(down_splits, pairs, hidden, dtype=torch.float32)
        else:
            self.order, self.offsets = group_by_expert(routing.experts, num_experts)
            self.parts = h.new_empty(1, pairs, hidden)
            has_fp8 = capability(h.device) >= FIRST_FP8 and h.dtype != torch.float32
            self.fp8 = expert_format.fp8_activations and has_fp8
            self.inputs = self._inputs(h)

    def wave(self, weights: Mapping[str, Tensor], slots: Tensor) -> None:
        """Compute the pairs whose experts are resident.

        Args:
            weights: the slot pool's tensors (SlotPool.views), of any format; kernels take the variant for it.
            slots: [experts] int32, the slot of each expert of this wave, -1 for all others.
        """
        gate_up, down, experts = weights["gate_up"], weights["down"], self.routing.experts
        of_gate_up = weights.get("gate_up_scales"), weights.get("gate_up_zeros")
        of_down = weights.get("down_scales"), weights.get("down_zeros")
        if self.few_tokens:
            both = self.h.new_empty(self.up_splits, experts.numel(), gate_up.shape[1], dtype=torch.float32)
            experts_gate_up_gemv(self.h, gate_up, slots, experts, both, *of_gate_up)
            experts_down_gemv(both, down, slots, experts, self.routing.weights, self.parts, *of_down)
        else:
            order, offsets, top_k = self.order, self.offsets, experts.shape[1]
            gated = self.h.new_empty(experts.numel(), self.intermediate_size)
            x, x_scales = self.inputs
            experts_gate_up(x, gate_up, slots, order, offsets, top_k, gated, *of_gate_up, x_scales)
            gated, scales = self._inputs(gated)
            experts_down(gated, down, slots, order, offsets, self.routing.weights, self.parts[0], *of_down, scales)

    def _inputs(self, activations: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return activations as the grouped GEMM takes them, with their scales where they are fp8."""
        return quantise_activations(activations) if self.fp8 else (activations, None)

    def total(self) -> Tensor:
        """Return the sum, [tokens, hidden], once every expert has had its wave."""
        total: Tensor = combine(self.parts, self.routing.experts, self.h.dtype)
        return total


class LayerSum:
    """The sums of all chunks of a pass, for one layer: a wave is computed for every chunk while its experts are there.

    Args:
        sums: of the chunks, in order.
    """

    def __init__(self, sums: list[ExpertSum]) -> None:
        self.sums = sums

    def wave(self, weights: Mapping[str, Tensor], slots: Tensor) -> None:
        """Compute the pairs whose experts are resident; arguments as in ExpertSum.wave."""
        for chunk in self.sums:
            chunk.wave(weights, slots)

    def totals(self) -> list[Tensor]:
        """Return each chunk's sum, [tokens, hidden]."""
        return [chunk.total() for chunk in self.sums]
