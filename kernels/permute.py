"""Sort the (token, choice) pairs of a pass by expert, so that each expert's tokens stand side by side."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from duomoe.kernels.configuration import Configuration
from duomoe.kernels.operator import operator


def group_by_expert_reference(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Compute `group_by_expert` with plain PyTorch."""
    flat = experts.flatten().long()
    keys = torch.where(flat < 0, num_experts, flat)
    order = keys.argsort(stable=True).to(torch.int32)
    counts = torch.bincount(keys, minlength=num_experts + 1)[:num_experts]
    offsets = torch.zeros(num_experts + 1, dtype=torch.int32, device=experts.device)
    offsets[1:] = counts.cumsum(0)
    return order, offsets


@operator()
def group_by_expert(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort pairs by expert, stably. A pair is the number `token * top_k + choice`.

    Args:
        experts: [tokens, top_k] int32, the experts chosen; -1 is padding and sorts last.
        num_experts: how many experts there are.

    Returns:
        `(order, offsets)`: `order` [tokens * top_k] int32 lists the pairs expert by expert, and those of expert `e`
        are `order[offsets[e] : offsets[e + 1]]`; `offsets` is [num_experts + 1] int32.
    """
    return group_by_expert_reference(experts, num_experts)


@group_by_expert.register_fake
def _(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    return experts.new_empty(experts.numel()), experts.new_empty(num_experts + 1)


@triton.jit
def _load_keys(
    experts: tl.tensor, pairs: tl.tensor, num_experts: tl.tensor, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Load a block of pairs and what they are sorted by: the expert, padding behind the last one."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < pairs
    expert = tl.load(experts + pair, mask=inside, other=0)
    return pair, inside, tl.where(expert < 0, num_experts, expert)


@triton.jit(
    do_not_specialize=(
        "pairs",
        "blocks",
    )
)
def _count_kernel(
    experts: tl.tensor,
    counts: tl.tensor,
    pairs: tl.tensor,
    num_experts: tl.tensor,
    blocks: tl.tensor,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """Each program counts how often each key occurs among BLOCK pairs, into column `program` of counts[key, block]."""
    _, inside, keys = _load_keys(experts, pairs, num_experts, BLOCK)
    key = tl.arange(0, KEYS)
    count = tl.histogram(keys, KEYS, mask=inside)
    tl.store(counts + key * blocks + tl.program_id(0), count, mask=key <= num_experts)


@triton.jit(
    do_not_specialize=(
        "pairs",
        "blocks",
    )
)
def _place_kernel(
    experts: tl.tensor,
    starts: tl.tensor,
    order: tl.tensor,
    pairs: tl.tensor,
    num_experts: tl.tensor,
    blocks: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Each program writes BLOCK pairs to their places: where the block's share of the key starts, plus the rank."""
    pair, inside, keys = _load_keys(experts, pairs, num_experts, BLOCK)
    earlier = (keys[None, :] == keys[:, None]) & (pair[None, :] < pair[:, None])
    rank = tl.sum(earlier.to(tl.int32), 1)
    start = tl.load(starts + keys * blocks + tl.program_id(0), mask=inside, other=0)
    tl.store(order + start + rank, pair, mask=inside)


# Pairs per program. The ranks take BLOCK * BLOCK comparisons.
BLOCK = 128


@group_by_expert.register_cuda
def group_by_expert_triton(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Launch the kernels of `group_by_expert`: a counting sort, stable because blocks and ranks keep the order."""
    flat = experts.flatten()
    pairs, blocks = len(flat), triton.cdiv(len(flat), BLOCK)
    order = torch.empty_like(flat)
    if pairs == 0:
        return order, torch.zeros(num_experts + 1, dtype=torch.int32, device=flat.device)
    # Key by key, and within a key block by block: the running sum of the counts is where each share starts. It has
    # one more entry at the front, the first start, which is 0.
    counts = torch.zeros((num_experts + 1) * blocks + 1, dtype=torch.int32, device=flat.device)
    keys = triton.next_power_of_2(num_experts + 1)
    _count_kernel[(blocks,)](flat, counts[1:], pairs, num_experts, blocks, BLOCK=BLOCK, KEYS=keys)
    starts = counts.cumsum(0, dtype=torch.int32)
    _place_kernel[(blocks,)](flat, starts, order, pairs, num_experts, blocks, BLOCK=BLOCK)
    return order, starts[: num_experts * blocks + 1 : blocks].contiguous()


def configurations(dtype: torch.dtype, capability: int) -> list[Configuration]:
    """List what the launcher chooses; pairs have no float dtype."""
    types = {"experts": "*i32:16", "pairs": "i32", "num_experts": "i32", "blocks": "i32"}
    counting = types | {"counts": "*i32"}
    placing = types | {"starts": "*i32:16", "order": "*i32:16"}
    return [
        Configuration(_count_kernel, counting, {"BLOCK": BLOCK, "KEYS": 16}),
        Configuration(_count_kernel, counting, {"BLOCK": BLOCK, "KEYS": 256}),
        Configuration(_place_kernel, placing, {"BLOCK": BLOCK}),
    ]
