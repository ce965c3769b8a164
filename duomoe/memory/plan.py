"""The memory plan: how the device's memory is divided, decided before anything is allocated.

Non-expert weights are what they are. The context (KV pages, and the workspace that grows with the longest prompt) gets
one sequence first, then at most a share of what remains: experts are the point. Everything else becomes expert slots,
of which a prefill turns a part as its ring. What all experts together do not need goes back to the context.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch

from duomoe.errors import InputError
from duomoe.experts.compute import expanded_experts, worth_expanding
from duomoe.experts.format import ExpertFormat, plain_format
from duomoe.experts.page_routing import page_routing_bytes
from duomoe.experts.policies import BOUNDED, PREDICTED, STREAMING
from duomoe.experts.prefill import SMALLEST_RING, ring_slots
from duomoe.kernels import LANES, gemv_splits, use_gemv
from duomoe.kernels.attention import CHUNK as DECODE_CHUNK
from duomoe.kernels.permute import BLOCK as SORT_BLOCK
from duomoe.kernels.quantised import FP8_BLOCK
from duomoe.memory.kv_cache import kv_page_bytes
from duomoe.memory.pages import PAGE_SIZE, pages_for
from duomoe.memory.sequences import row_pages, sequences_bytes
from duomoe.models import Architecture, ModelConfig
from duomoe.sizes import format_size

# What `--policy auto` means where not every expert has a slot.
DEFAULT_BOUNDED = "duo"

# A prefill pass goes through a layer in pieces of this many tokens.
CHUNK_TOKENS = 2048

# How much of the memory that the least plan leaves the context may take from the experts: less where nobody said how
# long sequences get. Where no memory was stated at all (on the CPU), a quarter of the host's is what the plan leaves.
CONTEXT_SHARE = Fraction(1, 4)
STATED_CONTEXT_SHARE = Fraction(1, 2)

# Where nobody said how long sequences get, they are cut down to this before the plan is given up.
SHORTEST_CONTEXT = 512

# Of the GPU's free memory, where nobody said how much may be used.
DEFAULT_SHARE = Fraction(9, 10)

MIB = 1 << 20

# cuBLAS takes a workspace of up to 32 MiB from torch's allocator for each stream that it computes on
# (CUBLAS_WORKSPACE_CONFIG in its manual): the ordinary one, and one on which a graph is captured.
LIBRARY_BYTES = 2 * 32 * MIB


@dataclass(frozen=True)
class Limits:
    """What a plan has to keep to.

    Attributes:
        device: "cpu" or "cuda".
        policy: "auto", "resident" or the name of a bounded policy.
        memory: bytes on the device; None is no limit.
        memory_name: where that number comes from, for complaints.
        host_memory: bytes of the host's memory.
        experts: the limit on expert slots: bytes as an int, or as a Fraction of all experts; None is no limit.
        max_model_len: the longest sequence in tokens; None is what the checkpoint is made for, or less where memory is
            short.
        max_batch: sequences decoded together.
        predictor_bytes: of the predictor's weights, where the policy has use for one.
        graphs: decode steps are captured as CUDA graphs.
        prefix_caching: pages serve other prompts again, and what their tokens chose is kept with them.
    """

    device: str
    policy: str
    memory: int | None
    memory_name: str
    host_memory: int
    experts: int | Fraction | None
    max_model_len: int | None
    max_batch: int
    predictor_bytes: int = 0
    graphs: bool = False
    prefix_caching: bool = False


@dataclass(frozen=True)
class Plan:
    """A division of the device's memory; sizes are in bytes.

    Attributes:
        limits: what it keeps to.
        policy: "resident" or the name of a bounded policy.
        weight_sizes: of each non-expert tensor.
        expert_format: of an expert's row; never a packed one under `resident`, where experts cross no link.
        dequantised: of the non-expert weights, what they take beyond what the checkpoint stores.
        num_experts: of all layers together.
        num_slots: experts that are on the device at once; all of them under `resident`.
        max_model_len: the longest sequence, in tokens.
        num_pages: of the KV cache.
        expands_quantised: there is memory to expand quantised experts into (LayerSum), under `resident`: elsewhere long
            passes wait for the link.
        stored: bytes of the experts' home, where they are known and not all rows are alike.
    """

    limits: Limits
    policy: str
    model: ModelConfig
    dtype: torch.dtype
    weight_sizes: tuple[int, ...]
    expert_format: ExpertFormat
    dequantised: int
    num_experts: int
    num_slots: int
    max_model_len: int
    num_pages: int
    expands_quantised: bool = False
    stored: int | None = None

    @property
    def device(self) -> str:
        """Where computation is, "cpu" or "cuda"."""
        return self.limits.device

    @property
    def max_batch(self) -> int:
        """Sequences decoded together."""
        return self.limits.max_batch

    @property
    def budget(self) -> int | None:
        """What `total` may be; None is no limit."""
        return self.limits.memory

    @property
    def weights_bytes(self) -> int:
        """Bytes of the non-expert weights."""
        return sum(self.weight_sizes)

    @property
    def row_bytes(self) -> int:
        """Bytes of an expert."""
        return self.expert_format.row_bytes

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV pages."""
        return self.num_pages * kv_page_bytes(self.model, self.dtype)

    @property
    def page_routing_bytes(self) -> int:
        """Bytes of the counts of what the tokens of each page chose, where decode begins with them."""
        if not self.limits.prefix_caching or self.policy not in STREAMING:
            return 0
        return page_routing_bytes(self.num_pages, len(self.model.moe_layers), self.model.num_experts)

    @property
    def sequences_bytes(self) -> int:
        """Bytes of what steps know of each running sequence."""
        return sequences_bytes(self.max_batch, row_pages(self.max_model_len), self.model.vocab_size)

    @property
    def slot_bytes(self) -> int:
        """Bytes of the expert slots."""
        return self.num_slots * self.row_bytes

    @property
    def predictor_bytes(self) -> int:
        """Bytes of the predictor's weights."""
        return self.limits.predictor_bytes if self.policy in PREDICTED else 0

    @property
    def decode_bytes(self) -> int:
        """Bytes of what decode keeps on a GPU: the directory of slots, and the memory that its CUDA graphs share."""
        if self.device != "cuda":
            return 0
        parts = self.workspace()
        graphs = 0
        if self.limits.graphs:
            graphs = parts["logits"] + parts["decode attention"] + parts["decode experts"]
            graphs += 4 * self.max_batch * self.model.vocab_size  # logits on their way from one graph to the other
        if self.limits.graphs and self.expert_format.packed and not self._all_few(self.max_batch):
            graphs += parts["expanded experts"]
        directory = self.num_slots * (4 * LANES + 20) + 24 * self.num_experts if self.policy in STREAMING else 0
        return graphs + directory

    @property
    def ring_slots(self) -> int:
        """How many of the slots a prefill streams through; the others it leaves to what decode uses."""
        if self.policy not in STREAMING:
            return 0
        return min(self.num_slots, ring_slots(self.num_slots, self.model.num_experts))

    @property
    def pass_tokens(self) -> int:
        """How many tokens one pass may have: a prompt of any length, or several that share the experts' transfer."""
        return max(self.max_model_len, self.max_batch, min(CHUNK_TOKENS, self.max_batch * self.max_model_len))

    @property
    def workspace_bytes(self) -> int:
        """Bytes of all that lives for a pass or less."""
        model = self.model
        # While nothing else is there yet, loading compares the head with the embedding, a byte for each pair.
        loading = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
        return max(sum(self.workspace().values()), loading)

    @property
    def allocator_bytes(self) -> int:
        """What torch's CUDA allocator reserves beyond the tensors' bytes, and cuBLAS through it; none on the CPU."""
        if self.device != "cuda":
            return 0
        pages = [self.kv_bytes // (2 * self.model.num_layers)] * (2 * self.model.num_layers)
        pools = len(self.model.moe_layers) if self.policy == "resident" else 1
        rows = [self.slot_bytes // pools] * pools if self.num_slots else []
        tensors = [
            *self.weight_sizes,
            self.predictor_bytes,
            self.page_routing_bytes,
            self.sequences_bytes,
            *pages,
            *rows,
        ]
        # Blocks of the workspace are cached and split: a quarter, and two segments, for what does not fit together.
        return (
            cuda_reserved(tensors)
            - sum(tensors)
            + (self.workspace_bytes + self.decode_bytes) // 4
            + 40 * MIB
            + LIBRARY_BYTES
        )

    @property
    def total(self) -> int:
        """Bytes on the device: on CUDA the most that torch's allocator reserves."""
        fixed = self.weights_bytes + self.predictor_bytes + self.workspace_bytes + self.decode_bytes
        by_sequence = self.kv_bytes + self.page_routing_bytes + self.sequences_bytes
        return fixed + by_sequence + self.slot_bytes + self.allocator_bytes

    @property
    def loading_room(self) -> int:
        """Bytes on the device that loading may take for a while: what is not there yet by then."""
        there = self.weights_bytes + self.allocator_bytes + self.workspace_bytes
        return self.total - there - (self.slot_bytes if self.policy == "resident" else 0)

    @property
    def store_bytes(self) -> int:
        """Bytes of host memory for the experts' home; none where they live on the device."""
        if self.policy == "resident":
            return 0
        return self.num_experts * self.row_bytes if self.stored is None else self.stored

    def workspace(self) -> dict[str, int]:
        """Return a bound on what lives for a pass or less, by what it is.

        Everything that exists at some time is counted as if it existed at the same time. `n` tokens pass through a
        layer, those of a pass and of a step amid it, `chunk` of them at a time; models/block.py, experts/compute.py and
        the kernels' launchers allocate:
        """
        model, item = self.model, self.dtype.itemsize
        n, hidden, top_k = self.pass_tokens + self.max_batch, model.hidden_size, model.top_k
        chunk = max(min(n, CHUNK_TOKENS), self.max_batch)
        pages = row_pages(self.max_model_len)
        dense = model.intermediate_size if not all(model.is_moe) else 0
        mlp = max(dense, model.shared_intermediate_size)
        context_chunks = math.ceil(pages * PAGE_SIZE / DECODE_CHUNK)
        sort_blocks = math.ceil(n * top_k / SORT_BLOCK)
        return {
            # Ids, positions, owners, rows and how they come about; angles, cosines and sines; the page table.
            "positions": n * (10 * 8 + 6 * model.head_dim // 2 * 4) + self.max_batch * pages * (8 + 4),
            # The residual stream, and what the experts work on.
            "hidden states": 2 * n * hidden * item,
            # Each pair's expert and weight and its place in the order of experts, with the counts of the sort.
            "routing": n * top_k * (4 + 4 + 4) + 2 * (model.num_experts + 1) * (sort_blocks + 1) * 4,
            # Of each pair of a token and one of its experts.
            "expert outputs": n * top_k * hidden * item,
            # Norm, qkv, rotated queries, what attention mixes and projects, the second norm and stream, router logits.
            "attention": chunk * item * (5 * hidden + 3 * model.q_size + 2 * model.kv_size + model.num_experts),
            # Gate times up of each pair of a chunk, and the sum over a token's experts.
            "experts": chunk * item * (top_k * model.moe_intermediate_size + hidden),
            # The same in fp8, with a scale for every 128; what goes into the experts is kept for all chunks.
            "fp8 activations": n * self._fp8_bytes(hidden)
            + chunk * top_k * self._fp8_bytes(model.moe_intermediate_size),
            # Of experts that are written out for chunks of many tokens.
            "expanded experts": self._expanded_bytes(),
            # Of the shared expert or a dense block: gate and up, the activation, the product, and four steps of adding.
            "MLP": chunk * item * (4 * mlp + 4 * hidden),
            # Partial sums over chunks of the context.
            "decode attention": self.max_batch * context_chunks * model.num_heads * (model.head_dim + 2) * 4,
            # Partial sums over parts of the inner dimensions, for the few tokens that take the GEMV form.
            "decode experts": self._gemv_bytes(),
            # One row for each sequence, and about 16 words for each of its elements while a token is drawn.
            "logits": self.max_batch * model.vocab_size * (item + 16 * 4),
        }

    def _fp8_bytes(self, inner: int) -> int:
        """Return what activations of `inner` values take in fp8, with their scales, where experts are given such."""
        return inner + 4 * math.ceil(inner / FP8_BLOCK) if self.expert_format.fp8_activations else 0

    def _all_few(self, tokens: int) -> bool:
        """Return whether chunks of up to so many tokens all take the GEMV form of the experts."""
        return use_gemv(tokens, self.model.top_k, self.model.num_experts)

    def _expanded_bytes(self) -> int:
        """Return what experts that are expanded take (LayerSum)."""
        model, form, n = self.model, self.expert_format, self.pass_tokens
        long = self.expands_quantised and worth_expanding(form, n * model.top_k, model.num_experts)
        if not long and not (form.packed and not self._all_few(n)):
            return 0
        size = model.hidden_size, model.moe_intermediate_size
        return expanded_experts(*size, model.num_experts, self.dtype) * 3 * math.prod(size) * self.dtype.itemsize

    def _gemv_bytes(self) -> int:
        model = self.model
        outer, hidden, quantised = 2 * model.moe_intermediate_size, model.hidden_size, self.expert_format.quantised
        sizes = [0]
        for tokens in range(1, min(model.num_experts // model.top_k, self.pass_tokens) + 1):
            pairs = tokens * model.top_k
            up = gemv_splits(hidden, outer, pairs, quantised) * outer
            sizes.append(4 * pairs * (up + gemv_splits(outer // 2, hidden, pairs, quantised) * hidden))
        return max(sizes)

    def as_dict(self) -> dict[str, object]:
        """Return the plan for machines; sizes in bytes."""
        return {
            "device": self.device,
            "policy": self.policy,
            "budget_bytes": self.budget,
            "total_bytes": self.total,
            "weights_bytes": self.weights_bytes,
            "dequantised_bytes": self.dequantised,
            "kv_cache_bytes": self.kv_bytes,
            "page_routing_bytes": self.page_routing_bytes,
            "sequences_bytes": self.sequences_bytes,
            "predictor_bytes": self.predictor_bytes,
            "decode_bytes": self.decode_bytes,
            "workspace_bytes": self.workspace_bytes,
            "workspace": self.workspace(),
            "expert_slots_bytes": self.slot_bytes,
            "prefill_ring_bytes": self.ring_slots * self.row_bytes,
            "allocator_bytes": self.allocator_bytes,
            "expert_store_bytes": self.store_bytes,
            "expert_dtype": self.expert_format.name,
            "expert_bytes": self.row_bytes,
            "experts": self.num_experts,
            "slots": self.num_slots,
            "ring_slots": self.ring_slots,
            "pages": self.num_pages,
            "max_model_len": self.max_model_len,
            "max_batch": self.max_batch,
            "pass_tokens": self.pass_tokens,
        }

    def table(self) -> str:
        """Return the plan for people."""
        ring, slots = self.ring_slots, self.num_slots
        share = f"{slots} of {self.num_experts} experts"
        if 0 < slots < self.num_experts:
            share += f", {100 * slots / self.num_experts:.1f} %"
        dense = f"dequantised, {format_size(self.dequantised)} more than stored" if self.dequantised else ""
        rows = [
            ("non-expert weights", self.weights_bytes, dense),
            ("KV pages", self.kv_bytes, f"{self.num_pages * PAGE_SIZE} tokens, {self._sequences()}"),
            ("sequences", self.sequences_bytes, "page tables, counts of tokens and masks"),
            ("workspace", self.workspace_bytes, f"for passes of up to {self.pass_tokens} tokens"),
        ]
        if self.page_routing_bytes:
            rows.append(("routing by page", self.page_routing_bytes, "which experts its tokens chose"))
        if self.predictor_bytes:
            rows.append(("predictor", self.predictor_bytes, ""))
        if self.decode_bytes:
            rows.append(("decode", self.decode_bytes, "CUDA graphs" if self.limits.graphs else "directory of slots"))
        if ring:
            rows.append(
                ("prefill ring", ring * self.row_bytes, f"{ring} expert slots of {format_size(self.row_bytes)}")
            )
            rows.append(("kept for decode", (slots - ring) * self.row_bytes, f"{slots - ring} slots; in all {share}"))
        else:
            rows.append(("expert slots", self.slot_bytes, share))
        if self.allocator_bytes:
            rows.append(("allocator", self.allocator_bytes, "rounding and cuBLAS"))
        limit = "no limit" if self.budget is None else f"of {format_size(self.budget)}"
        rows.append(("total", self.total, limit))
        if self.store_bytes:
            form = "" if self.expert_format.name == "plain" else f", {self.expert_format.name}"
            rows.append(("in host memory", self.store_bytes, f"all {self.num_experts} experts{form}"))
        lines = [f"memory plan: {self.device}, policy {self.policy}"]
        lines += [f"  {name:<18}{format_size(size):>12}  {note}".rstrip() for name, size, note in rows]
        return "\n".join(lines)

    def _sequences(self) -> str:
        held = min(self.num_pages // pages_for(self.max_model_len), self.max_batch)
        count = str(held) if held == self.max_batch else f"{held} of {self.max_batch}"
        return f"{count} sequence{'' if count == '1' else 's'} of {self.max_model_len}"


def make_plan(
    architecture: Architecture,
    model: ModelConfig,
    dtype: torch.dtype,
    expert_format: ExpertFormat,
    dequantised: int,
    limits: Limits,
) -> Plan:
    """Divide the device's memory.

    Args:
        architecture: the model's family.
        model: its shape.
        dtype: of weights and activations.
        expert_format: of an expert's row.
        dequantised: bytes that the non-expert weights take beyond what the checkpoint stores.
        limits: what the plan has to keep to.

    Raises:
        InputError: when the limits cannot be kept; names the least that would do, and what it is made of.
    """
    # Where nothing crosses the link, nothing is packed.
    resident_format = expert_format
    if expert_format.packed:
        resident_format = plain_format(model.hidden_size, model.moe_intermediate_size, dtype)
    policy, fewest, most = _slot_range(model, expert_format.row_bytes, resident_format.row_bytes, limits)

    def resident(plan: Plan) -> Plan:
        return replace(plan, policy="resident", expert_format=resident_format)

    longest = min(limits.max_model_len or model.max_position, model.max_position)
    shortest = longest if limits.max_model_len else min(longest, SHORTEST_CONTEXT)
    least = Plan(
        limits=limits,
        policy=policy,
        model=model,
        dtype=dtype,
        weight_sizes=tuple(elements * dtype.itemsize for elements in _weights(architecture, model)),
        expert_format=expert_format,
        dequantised=dequantised,
        num_experts=len(model.moe_layers) * model.num_experts,
        num_slots=fewest,
        max_model_len=shortest,
        num_pages=pages_for(shortest),
    )
    # `auto` may do either where all experts have a slot; what is packed need not fit where it is plain.
    stays = limits.policy == "auto" and _may_all_stay(limits, least.num_experts * resident_format.row_bytes)
    if policy == "resident" or (stays and fewest == least.num_experts):
        least = min([resident(least)] + [least] * (policy != "resident"), key=lambda plan: plan.total)
    budget = least.total + limits.host_memory // 4 if limits.memory is None else limits.memory
    spare = budget - least.total
    if spare < 0:
        raise InputError(_too_little(least, limits))
    context_limit = least.total + int(spare * (STATED_CONTEXT_SHARE if limits.max_model_len else CONTEXT_SHARE))

    def with_slots(plan: Plan, slots: int) -> Plan:
        plan = replace(plan, num_slots=slots)
        all_stay = stays and slots == plan.num_experts and resident(plan).total <= budget
        return resident(plan) if all_stay else plan

    def one_sequence(pages: int) -> Plan:
        return replace(least, max_model_len=min(pages * PAGE_SIZE, longest), num_pages=pages)

    def keeps_all_experts(plan: Plan) -> bool:
        return with_slots(plan, most).total <= budget

    def leaves_enough(plan: Plan) -> bool:
        return plan.total <= context_limit or keeps_all_experts(plan)

    plan = one_sequence(_largest(least.num_pages, pages_for(longest), lambda pages: leaves_enough(one_sequence(pages))))
    # No expert makes room for a second sequence of full length that nobody has asked for.
    enough = keeps_all_experts if keeps_all_experts(plan) and limits.max_model_len is None else leaves_enough
    full = limits.max_batch * plan.num_pages
    pages = _largest(plan.num_pages, full, lambda pages: enough(replace(plan, num_pages=pages)))
    plan = replace(plan, num_pages=pages)
    plan = with_slots(plan, _largest(fewest, most, lambda slots: with_slots(plan, slots).total <= budget))
    expanding = replace(plan, expands_quantised=plan.policy == "resident" and expert_format.quantised)
    return expanding if expanding.total <= budget else plan


def _may_all_stay(limits: Limits, size: int) -> bool:
    """Return whether the limit on slots allows all experts to be on the device, with so many bytes."""
    return not isinstance(limits.experts, int) or limits.experts >= size


def _slot_range(model: ModelConfig, row_bytes: int, resident_bytes: int, limits: Limits) -> tuple[str, int, int]:
    """Return the policy, and the fewest and the most slots it may be given.

    An expert has `row_bytes` in a slot, and `resident_bytes` where all stay on the device.
    """
    if limits.policy not in ("auto", "resident", *BOUNDED):
        raise InputError(f"--policy: {limits.policy!r} is not one of auto, resident, {', '.join(BOUNDED)}")
    every = len(model.moe_layers) * model.num_experts
    if limits.policy == "resident":
        row_bytes = resident_bytes
    stated = None
    if limits.experts is not None:
        allowed = limits.experts * every if isinstance(limits.experts, Fraction) else limits.experts // row_bytes
        stated = min(int(allowed), every)
        if stated < min(1, every):
            raise InputError(
                f"--expert-memory: at least {format_size(row_bytes)} ({row_bytes} bytes) is needed, for one of {every} "
                f"experts"
            )
    if limits.policy == "resident":
        if stated is not None and stated < every:
            raise InputError(
                f"--policy resident needs --expert-memory {every * row_bytes} ({format_size(every * row_bytes)}) for "
                f"all {every} experts; give more or use --policy {DEFAULT_BOUNDED}"
            )
        return "resident", every, every
    bounded = DEFAULT_BOUNDED if limits.policy == "auto" else limits.policy
    # What `on_demand` has fetched it keeps for one layer only. Other bounded policies, where nothing limits them and
    # somebody wants them all the same, get as many.
    one_layer = min(model.num_experts, every)
    most = one_layer if bounded == "on_demand" else every
    if stated is not None:
        fewest = most = min(stated, most)
    elif limits.memory is not None:
        fewest = min(SMALLEST_RING, most)
    else:
        fewest = most = every if limits.policy == "auto" else one_layer
    if limits.policy == "auto" and limits.memory is None and fewest == every:
        bounded = "resident" if _may_all_stay(limits, every * resident_bytes) else bounded
    return bounded, fewest, most


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number up to `high` that fits, by bisection where `high` does not; `low` is known to."""
    if fits(high):
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _too_little(least: Plan, limits: Limits) -> str:
    parts = [
        ("weights", least.weights_bytes),
        (f"KV pages for {least.max_model_len} tokens", least.kv_bytes + least.page_routing_bytes),
        ("sequences", least.sequences_bytes),
        ("workspace", least.workspace_bytes),
        ("predictor", least.predictor_bytes),
        ("decode", least.decode_bytes),
        (f"{least.num_slots} expert slot{'' if least.num_slots == 1 else 's'}", least.slot_bytes),
        ("allocator", least.allocator_bytes),
    ]
    named = " + ".join(f"{name} {format_size(size)}" for name, size in parts if size)
    return (
        f"{limits.memory_name}: {format_size(limits.memory or 0)} is too little, at least {least.total} bytes "
        f"({format_size(least.total)}) are needed: {named}"
    )


def check_host(plan: Plan) -> None:
    """Refuse what the host's memory cannot hold, even if nothing else were in it.

    Raises:
        InputError: with what is needed.
    """
    parts = [("all experts", plan.store_bytes)]
    if plan.device == "cpu":
        parts += [("weights", plan.weights_bytes), ("expert slots", plan.slot_bytes), ("KV pages", plan.kv_bytes)]
    needed, there = sum(size for _, size in parts), plan.limits.host_memory
    if needed > there:
        named = " + ".join(f"{name} {format_size(size)}" for name, size in parts if size)
        raise InputError(f"the host has {format_size(there)} of memory, but {format_size(needed)} are needed: {named}")


def _weights(architecture: Architecture, model: ModelConfig) -> list[int]:
    """Return the elements of each tensor that `Model` allocates."""
    matrices = model.vocab_size * model.hidden_size
    sizes = [matrices, model.hidden_size] + ([] if model.tie_word_embeddings else [matrices])
    for layer in range(model.num_layers):
        for sources in architecture.block_sources(model, layer).values():
            sizes.append(sum(math.prod(shape) for _, shape in sources))
    return sizes


def cuda_reserved(sizes: Iterable[int]) -> int:
    """Return the most bytes that torch's CUDA allocator reserves for tensors of these sizes, allocated one by one.

    It rounds up to 512 bytes, and takes memory from the GPU in segments (c10/cuda/CUDACachingAllocator.cpp): of 2 MiB
    for tensors of up to 1 MiB, of 20 MiB for those below 10 MiB, and for larger ones of their own, rounded up to 2 MiB.
    A tensor takes at most half of a shared segment, and opens a new one only when it fits into none: so all but two are
    filled to two thirds.
    """
    own = 0
    shared = {2 * MIB: [0, 0], 20 * MIB: [0, 0]}  # segment size: tensors, bytes
    for size in sizes:
        rounded = math.ceil(size / 512) * 512
        if rounded >= 10 * MIB:
            own += math.ceil(size / (2 * MIB)) * 2 * MIB
        elif rounded:
            group = shared[2 * MIB if rounded <= MIB else 20 * MIB]
            group[0] += 1
            group[1] += rounded
    return own + sum(segment * min(count, 3 * total // (2 * segment) + 2) for segment, (count, total) in shared.items())


def device_memory() -> int:
    """Return how many bytes of the GPU's memory are free, or held by torch's allocator for later use."""
    free, _ = torch.cuda.mem_get_info()
    return int(free) + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def host_memory(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes of the host's memory, or of what a container may use of it.

    Args:
        root: where control groups are mounted: a container's own limit is there, by version 2 or 1.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int((root / name).read_text()))
    return min(limits)
