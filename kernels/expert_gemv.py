"""The experts' matrices over few tokens: each pair streams its expert's rows once, split along the inner dimension.

With a handful of tokens the matrices are read, not reused, so the work is spread for bandwidth: a program takes a few
output rows and one of `splits` parts of the inner dimension (equal ones, in multiples of `PART_UNIT`), and leaves a
float32 partial sum. Whoever reads the partial sums adds them in order: `experts_down_gemv` those of gate and up,
`combine` those of down. The split depends on the shapes alone, so a pair's result does not depend on what else is
resident.

Weights are plain or quantised (quantised.py). Quantised ones are multiplied in float32, as the references do.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from duomoe.kernels.configuration import TRITON_TYPE, Configuration
from duomoe.kernels.configuration import capability as capability_of
from duomoe.kernels.operator import operator
from duomoe.kernels.quantised import (
    FP8_BLOCK,
    INT4_PLANE,
    Form,
    decoded,
    example_forms,
    expert_values,
    kernel_form,
    pools,
    row_length,
    scale_places,
    strides,
)

# Parts of the inner dimension are whole multiples of this many elements, so that wide loads stay aligned.
PART_UNIT = 256


def _part_length(size: int, splits: int) -> int:
    """Return how long each of `splits` parts of a dimension of `size` is; the last ones may be shorter or empty."""
    units = -(-size // PART_UNIT)
    return -(-units // splits) * PART_UNIT


def _part(size: int, splits: int, split: int) -> slice:
    """Return the `split`-th of `splits` parts of a dimension of `size`."""
    length = _part_length(size, splits)
    return slice(min(split * length, size), min((split + 1) * length, size))


def experts_gate_up_gemv_reference(
    x: Tensor,
    w_gate_up: Tensor,
    slots: Tensor,
    experts: Tensor,
    out: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
) -> None:
    """Compute `experts_gate_up_gemv` in float32 with plain PyTorch, pair by pair."""
    top_k, where = experts.shape[1], slots.tolist()  # host-sync ok: the reference runs on the CPU
    for pair, expert in enumerate(experts.flatten().tolist()):  # host-sync ok: the reference runs on the CPU
        if expert < 0 or where[expert] < 0:
            continue
        token = x[pair // top_k].float()
        weight = expert_values(where[expert], w_gate_up, scales, zeros, x.shape[1], matrices=2)
        for split in range(out.shape[0]):
            part = _part(x.shape[1], out.shape[0], split)
            out[split, pair] = weight[:, part] @ token[part]


def experts_down_gemv_reference(
    gate_up: Tensor,
    w_down: Tensor,
    slots: Tensor,
    experts: Tensor,
    weights: Tensor,
    out: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
) -> None:
    """Compute `experts_down_gemv` in float32 with plain PyTorch, pair by pair."""
    where = slots.tolist()  # host-sync ok: the reference runs on the CPU
    factors = weights.flatten()
    for pair, expert in enumerate(experts.flatten().tolist()):  # host-sync ok: the reference runs on the CPU
        if expert < 0 or where[expert] < 0:
            continue
        gate, up = gate_up[:, pair].sum(0).chunk(2)
        h = F.silu(gate) * up
        weight = expert_values(where[expert], w_down, scales, zeros, len(h))
        for split in range(out.shape[0]):
            part = _part(len(h), out.shape[0], split)
            out[split, pair] = (weight[:, part] @ h[part]) * factors[pair]


@operator(mutates_args=("out",))
def experts_gate_up_gemv(
    x: Tensor,
    w_gate_up: Tensor,
    slots: Tensor,
    experts: Tensor,
    out: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
) -> None:
    """Compute the partial sums of `x @ gate.T` and `x @ up.T` for every pair whose expert is resident.

    Args:
        x: [tokens, hidden].
        w_gate_up: [num_slots, 2 * intermediate, hidden], the gate rows first; a strided view into the slot pool. Plain
            or quantised (quantised.py), and so is every matrix here.
        slots: [experts] int32, the slot of each expert, -1 for those not in this wave.
        experts: [tokens, top_k] int32, the experts chosen; -1 is padding.
        out: [splits, tokens * top_k, 2 * intermediate] float32, written for the resident pairs.
        scales: of quantised weights, [num_slots, …], a view into the pool; None for plain ones.
        zeros: of int4 weights, likewise.
    """
    experts_gate_up_gemv_reference(x, w_gate_up, slots, experts, out, scales, zeros)


@experts_gate_up_gemv.register_fake
def _(
    x: Tensor,
    w_gate_up: Tensor,
    slots: Tensor,
    experts: Tensor,
    out: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
) -> None:
    return None


@operator(mutates_args=("out",))
def experts_down_gemv(
    gate_up: Tensor,
    w_down: Tensor,
    slots: Tensor,
    experts: Tensor,
    weights: Tensor,
    out: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
) -> None:
    """Compute the partial sums of `weight * ((silu(gate) * up) @ down.T)` for every pair whose expert is resident.

    Args:
        gate_up: [splits, tokens * top_k, 2 * intermediate] float32, what `experts_gate_up_gemv` wrote.
        w_down: [num_slots, hidden, intermediate], a strided view into the slot pool.
        slots: as in `experts_gate_up_gemv`, and so is `experts`.
        experts: see above.
        weights: [tokens, top_k] float32, the router's.
        out: [splits, tokens * top_k, hidden] float32, written for the resident pairs; ready for `combine`.
        scales: as in `experts_gate_up_gemv`, and so is `zeros`.
        zeros: see above.
    """
    experts_down_gemv_reference(gate_up, w_down, slots, experts, weights, out, scales, zeros)


@experts_down_gemv.register_fake
def _(
    gate_up: Tensor,
    w_down: Tensor,
    slots: Tensor,
    experts: Tensor,
    weights: Tensor,
    out: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
) -> None:
    return None


@triton.jit
def _load_weights(rows: tl.tensor, left: tl.tensor, BLOCK_K: tl.constexpr) -> tl.tensor:
    """Load BLOCK_K columns of some rows of weights, zero from the `left`-th on."""
    column = tl.arange(0, BLOCK_K)
    return tl.load(rows + column[None, :], mask=(column < left)[None, :], other=0)


@triton.jit
def _gate_up_gemv_kernel(
    x: tl.tensor,
    w_gate_up: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    slots: tl.tensor,
    experts: tl.tensor,
    out: tl.tensor,
    slot_stride: tl.tensor,
    scale_stride: tl.tensor,
    zero_stride: tl.tensor,
    pairs: tl.tensor,
    inner: tl.tensor,
    outer: tl.tensor,
    part: tl.tensor,
    TOP_K: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Each program multiplies BLOCK_N rows of one pair's expert, over one part of the inner dimension."""
    pair = tl.program_id(0)
    split = tl.program_id(2)
    expert = tl.load(experts + pair)
    if expert < 0:
        return
    slot = tl.load(slots + expert).to(tl.int64)
    if slot < 0:
        return
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows behind the last one repeat it: the loads need no mask, the store has one.
    own, length = tl.minimum(row, outer - 1), row_length(inner, FORMAT)
    weight = w_gate_up + slot * slot_stride + own.to(tl.int64)[:, None] * length
    s, z = scales + slot * scale_stride, zeros + slot * zero_stride
    place, step = scale_places(own // (outer // 2), own % (outer // 2), outer // 2, inner, FORMAT, GROUP)
    token = x + (pair // TOP_K).to(tl.int64) * inner

    HALVES: tl.constexpr = 2 if FORMAT == "int4" else 1
    products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for column in range(split * part, tl.minimum((split + 1) * part, length), BLOCK_K):
        raw = _load_weights(weight + column, length - column, BLOCK_K)
        for half in tl.static_range(HALVES):
            first = column * HALVES + half * BLOCK_K
            w = decoded(raw, s, z, place + first // GROUP * step, 4 * half, 1, FORMAT, tl.float32)
            k = first + tl.arange(0, BLOCK_K)
            products += w * tl.load(token + k, mask=k < inner, other=0.0).to(tl.float32)[None, :]
    to = out + (split.to(tl.int64) * pairs + pair) * outer + row
    tl.store(to, tl.sum(products, 1), mask=row < outer)


@triton.jit
def _down_gemv_kernel(
    gate_up: tl.tensor,
    w_down: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    slots: tl.tensor,
    experts: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    slot_stride: tl.tensor,
    scale_stride: tl.tensor,
    zero_stride: tl.tensor,
    pairs: tl.tensor,
    inner: tl.tensor,
    outer: tl.tensor,
    part: tl.tensor,
    GATE_UP_SPLITS: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Each program multiplies as in `_gate_up_gemv_kernel`, with activations that it makes from the partial sums."""
    pair = tl.program_id(0)
    split = tl.program_id(2)
    expert = tl.load(experts + pair)
    if expert < 0:
        return
    slot = tl.load(slots + expert).to(tl.int64)
    if slot < 0:
        return
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    own, length = tl.minimum(row, outer - 1), row_length(inner, FORMAT)
    weight = w_down + slot * slot_stride + own.to(tl.int64)[:, None] * length
    s, z = scales + slot * scale_stride, zeros + slot * zero_stride
    place, step = scale_places(0, own, outer, inner, FORMAT, GROUP)

    HALVES: tl.constexpr = 2 if FORMAT == "int4" else 1
    products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for column in range(split * part, tl.minimum((split + 1) * part, length), BLOCK_K):
        raw = _load_weights(weight + column, length - column, BLOCK_K)
        for half in tl.static_range(HALVES):
            first = column * HALVES + half * BLOCK_K
            w = decoded(raw, s, z, place + first // GROUP * step, 4 * half, 1, FORMAT, tl.float32)
            k = first + tl.arange(0, BLOCK_K)
            gate = tl.zeros((BLOCK_K,), tl.float32)
            up = tl.zeros((BLOCK_K,), tl.float32)
            for part_of in tl.static_range(GATE_UP_SPLITS):
                at = gate_up + (part_of * tl.cast(pairs, tl.int64) + pair) * 2 * inner + k
                gate += tl.load(at, mask=k < inner, other=0.0)
                up += tl.load(at + inner, mask=k < inner, other=0.0)
            products += w * (gate * tl.sigmoid(gate) * up)[None, :]
    to = out + (split.to(tl.int64) * pairs + pair) * outer + row
    tl.store(to, tl.sum(products, 1) * tl.load(weights + pair), mask=row < outer)


# Of plain weights: rows per program; the inner dimension advances by PART_UNIT. Each of the 128 threads has two loads
# of 16 bytes of 16-bit weights under way.
BLOCK_N = 8
NUM_WARPS = 4
# A GPU is full with about so many programs.
FULL = 2048
MAX_SPLITS = 8


def use_gemv(tokens: int, top_k: int, num_experts: int) -> bool:
    """Return whether a pass should take the GEMV form of the experts rather than the grouped GEMM.

    A GEMV reads an expert once for each pair that chose it, a GEMM once for all of them. So the GEMV form pays while
    pairs are no more than experts (on an H100, up to 4 tokens of Mixtral and 16 of Qwen3-30B).
    """
    return tokens * top_k <= num_experts


def gemv_splits(inner: int, outer: int, pairs: int) -> int:
    """Return into how many parts (1 to 8) to split the inner dimension, so that the programs fill a GPU.

    Args:
        inner: elements of a row of the matrix: the hidden size for gate and up, the intermediate size for down.
        outer: rows of the matrix: twice the intermediate size for gate and up, the hidden size for down.
        pairs: `tokens * top_k`.
    """
    programs = max(pairs, 1) * triton.cdiv(outer, BLOCK_N)
    splits: int = min(triton.cdiv(FULL, programs), triton.cdiv(inner, PART_UNIT), MAX_SPLITS)
    return splits


def _options(form: Form) -> Form:
    """Choose the tile: for quantised weights one group of inputs, and four loads of 16 bytes per thread under way.

    A thread then has several rows for each activation that it reads, of which a byte of weights needs more.
    """
    if form["FORMAT"] == "plain":
        tile: Form = {"BLOCK_N": BLOCK_N, "BLOCK_K": PART_UNIT, "num_warps": NUM_WARPS}
    elif form["FORMAT"] == "int4":
        tile = {"BLOCK_N": 32, "BLOCK_K": INT4_PLANE, "num_warps": 1}
    else:
        # With fewer registers, to which the compiler tends, it spills.
        tile = {"BLOCK_N": 16, "BLOCK_K": FP8_BLOCK, "num_warps": 1, "maxnreg": 208}
    return form | tile


def _part_columns(inner: int, splits: int, form: Form) -> int:
    """Return how many columns of weights a part has; an int4 byte holds two values."""
    return _part_length(inner, splits) // (2 if form["FORMAT"] == "int4" else 1)


@experts_gate_up_gemv.register_cuda
def experts_gate_up_gemv_triton(
    x: Tensor,
    w_gate_up: Tensor,
    slots: Tensor,
    experts: Tensor,
    out: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
) -> None:
    """Launch the kernel of `experts_gate_up_gemv`."""
    splits, pairs, outer = out.shape
    inner = x.shape[1]
    options = _options(kernel_form(w_gate_up, scales, 2, capability_of(x.device)))
    if pairs > 0:
        _gate_up_gemv_kernel[(pairs, triton.cdiv(outer, options["BLOCK_N"]), splits)](
            x, *pools(w_gate_up, scales, zeros), slots, experts, out, *strides(w_gate_up, scales, zeros),
            pairs, inner, outer, _part_columns(inner, splits, options), TOP_K=experts.shape[1], **options,
        )  # fmt: skip


@experts_down_gemv.register_cuda
def experts_down_gemv_triton(
    gate_up: Tensor,
    w_down: Tensor,
    slots: Tensor,
    experts: Tensor,
    weights: Tensor,
    out: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
) -> None:
    """Launch the kernel of `experts_down_gemv`."""
    splits, pairs, outer = out.shape
    inner = gate_up.shape[2] // 2
    options = _options(kernel_form(w_down, scales, 1, capability_of(gate_up.device)))
    if pairs > 0:
        _down_gemv_kernel[(pairs, triton.cdiv(outer, options["BLOCK_N"]), splits)](
            gate_up, *pools(w_down, scales, zeros), slots, experts, weights, out, *strides(w_down, scales, zeros),
            pairs, inner, outer, _part_columns(inner, splits, options), GATE_UP_SPLITS=gate_up.shape[0], **options,
        )  # fmt: skip


def configurations(dtype: torch.dtype, capability: int) -> list[Configuration]:
    """List what the launchers choose: with few and with many partial sums, for each format."""
    types = dict.fromkeys(("slots", "experts"), "*i32:16") | {"out": "*fp32:16", "pairs": "i32"}
    types |= dict.fromkeys(("slot_stride", "inner", "outer", "part"), "i32:16")
    found = []
    for form, pointers in example_forms(dtype, capability):
        quantised = {name: kind for name, kind in pointers.items() if name != "w"}
        gate_up = types | quantised | {"x": f"*{TRITON_TYPE[dtype]}:16", "w_gate_up": pointers["w"]}
        down = types | quantised | {"gate_up": "*fp32:16", "w_down": pointers["w"], "weights": "*fp32:16"}
        options = _options(form)
        found.append(Configuration(_gate_up_gemv_kernel, gate_up, options | {"TOP_K": 8}, wide_loads=True))
        for splits in (1, MAX_SPLITS):
            few = options | {"GATE_UP_SPLITS": splits}
            found.append(Configuration(_down_gemv_kernel, down, few, wide_loads=True))
    return found
