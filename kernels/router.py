"""The router's choice: softmax over the experts, the k largest, and optionally their renormalisation, in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from duomoe.kernels.configuration import TRITON_TYPE, Configuration
from duomoe.kernels.operator import operator


def route_reference(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Compute `route` with plain PyTorch."""
    probabilities = logits.float().softmax(-1)
    # A stable sort, because topk leaves the order of equal values open.
    ordered, experts = probabilities.sort(dim=-1, descending=True, stable=True)
    weights = ordered[:, :top_k]
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.contiguous(), experts[:, :top_k].to(torch.int32).contiguous()


@operator()
def route(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Choose `top_k` experts for each token.

    Args:
        logits: [tokens, experts], any float dtype; widened to float32 first.
        top_k: experts per token, at most `experts`.
        renormalize: divide the chosen probabilities by their sum.

    Returns:
        `(weights, experts)`, [tokens, top_k] float32 and int32, largest weight first. Of equal probabilities the
        lower expert wins. A row of NaN yields valid expert numbers and NaN weights, so it can be computed on.
    """
    return route_reference(logits, top_k, renormalize)


@route.register_fake
def _(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


@triton.jit(do_not_specialize=("tokens",))
def _route_kernel(
    logits: tl.tensor,
    weights: tl.tensor,
    experts: tl.tensor,
    tokens: tl.tensor,
    num_experts: tl.tensor,
    stride: tl.tensor,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Each program takes ROWS tokens: one softmax, then TOP_K rounds of taking the largest that is left."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, BLOCK_E)[None, :]
    inside = (token < tokens)[:, None] & (expert < num_experts)
    at = logits + token.to(tl.int64)[:, None] * stride + expert
    logit = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
    exponential = tl.exp(logit - tl.max(logit, 1)[:, None])
    probability = exponential / tl.sum(exponential, 1)[:, None]

    # What is left to take: probabilities, NaN counting as 0, and below all of them what is no expert or was taken.
    left = tl.where(probability == probability, probability, 0.0)
    left = tl.where(expert < num_experts, left, -1.0)
    choice = tl.arange(0, BLOCK_K)[None, :]
    taken = tl.zeros((ROWS, BLOCK_K), tl.int32)
    weight = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for turn in tl.static_range(TOP_K):
        best = tl.argmax(left, 1, tie_break_left=True)[:, None]
        taken = tl.where(choice == turn, best, taken)
        weight = tl.where(choice == turn, tl.sum(tl.where(expert == best, probability, 0.0), 1)[:, None], weight)
        left = tl.where(expert == best, -1.0, left)
    if RENORMALIZE:
        weight = weight / tl.sum(weight, 1)[:, None]

    to = token.to(tl.int64)[:, None] * TOP_K + choice
    written = (token < tokens)[:, None] & (choice < TOP_K)
    tl.store(weights + to, weight, mask=written)
    tl.store(experts + to, taken, mask=written)


def _options(num_experts: int, top_k: int, renormalize: bool) -> dict[str, int | bool]:
    """Choose how many tokens share a program, so that its tile has a few numbers per thread."""
    block_e, block_k = triton.next_power_of_2(num_experts), triton.next_power_of_2(top_k)
    rows = max(1, 512 // block_e)
    options = {"ROWS": rows, "BLOCK_E": block_e, "BLOCK_K": block_k, "num_warps": 4}
    return options | {"TOP_K": top_k, "RENORMALIZE": renormalize}


@route.register_cuda
def route_triton(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Launch the kernel of `route`."""
    tokens, num_experts = logits.shape
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    experts = torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device)
    if tokens > 0:
        options = _options(num_experts, top_k, renormalize)
        _route_kernel[(triton.cdiv(tokens, options["ROWS"]),)](
            logits, weights, experts, tokens, num_experts, logits.stride(0), **options
        )
    return weights, experts


def configurations(dtype: torch.dtype, capability: int) -> list[Configuration]:
    """List what the launcher chooses for Mixtral, Qwen1.5-MoE and Qwen3-MoE."""
    types = {"logits": f"*{TRITON_TYPE[dtype]}:16", "weights": "*fp32:16", "experts": "*i32:16"}
    types |= {"tokens": "i32", "num_experts": "i32", "stride": "i32"}
    shapes = ((8, 2, True), (60, 4, False), (128, 8, True))
    return [Configuration(_route_kernel, types, _options(*shape)) for shape in shapes]
