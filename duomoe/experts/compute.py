"""The routed experts of one layer and pass, computed wave by wave over whatever slots hold."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from duomoe.experts.format import ExpertFormat
from duomoe.kernels import (
    combine,
    expand,
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
from duomoe.kernels.quantised import is_packed
from duomoe.models.batch import Routing

# The compute capability, times ten, from which on GPUs multiply in fp8.
FIRST_FP8 = 89

# From so many pairs an expert on average, quantised experts are better expanded than decoded in every tile of a product
# (on an H100: docs/measurements.md).
EXPANDED_PAIRS = {"int4": 512, "fp8": 1024}

# Experts are expanded so many bytes at a time, but at least one of them.
EXPANDED_BYTES = 128 << 20


def worth_expanding(expert_format: ExpertFormat, pairs: int, num_experts: int) -> bool:
    """Return whether a pass of so many pairs of tokens and experts is long enough to expand quantised experts for it.

    Those that are multiplied by activations in fp8 never are.
    """
    if not expert_format.quantised or expert_format.fp8_activations:
        return False
    return pairs >= EXPANDED_PAIRS[expert_format.name] * num_experts


def expanded_experts(hidden_size: int, intermediate_size: int, num_experts: int, dtype: torch.dtype) -> int:
    """Return how many experts are expanded at a time."""
    row_bytes = 3 * hidden_size * intermediate_size * dtype.itemsize
    return max(1, min(num_experts, EXPANDED_BYTES // row_bytes))


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
        self.h, self.routing = h, routing
        self.num_experts, self.intermediate_size = num_experts, intermediate_size
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

    Packed experts are expanded for chunks of many tokens, some at a time; their values are the same.

    Args:
        sums: of the chunks, in order.
        expands_quantised: do so with quantised experts, too.
    """

    def __init__(self, sums: list[ExpertSum], expands_quantised: bool) -> None:
        self.sums, self.expands_quantised = sums, expands_quantised
        self.with_few = [chunk for chunk in sums if chunk.few_tokens]
        self.with_many = [chunk for chunk in sums if not chunk.few_tokens]

    def wave(self, weights: Mapping[str, Tensor], slots: Tensor, count: int) -> None:
        """Compute the pairs whose experts are resident.

        Args:
            weights: as in ExpertSum.wave, and so is `slots`.
            slots: see above.
            count: how many experts the wave has at most.
        """
        for chunk in self.with_few:
            chunk.wave(weights, slots)
        if not self.with_many:
            return
        scales = weights.get("gate_up_scales")
        if is_packed(scales) or (scales is not None and self.expands_quantised):
            for plain, places in self._expanded(weights, slots, count):
                for chunk in self.with_many:
                    chunk.wave(plain, places)
        else:
            for chunk in self.with_many:
                chunk.wave(weights, slots)

    def _expanded(
        self, weights: Mapping[str, Tensor], slots: Tensor, count: int
    ) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
        """Yield plain weights of some of a wave's experts, with their places there, until all have had their turn."""
        chunk = self.with_many[0]
        h, hidden, intermediate = chunk.h, chunk.h.shape[1], chunk.intermediate_size
        # Of the same size for every wave, so that the allocator has it at hand.
        at_a_time = expanded_experts(hidden, intermediate, chunk.num_experts, h.dtype)
        plain = {
            "gate_up": h.new_empty(at_a_time, 2 * intermediate, hidden),
            "down": h.new_empty(at_a_time, hidden, intermediate),
        }
        for first in range(0, count, at_a_time):
            places = torch.empty_like(slots)
            for name, out in plain.items():
                also = weights[f"{name}_scales"], weights.get(f"{name}_zeros")
                expand(weights[name], *also, 2 if name == "gate_up" else 1, slots, first, out, places)
            yield plain, places

    def totals(self) -> list[Tensor]:
        """Return each chunk's sum, [tokens, hidden]."""
        return [chunk.total() for chunk in self.sums]
