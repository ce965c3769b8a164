"""The experts' matrices over many tokens: a GEMM per resident expert, all in one launch.

Pairs are sorted by expert (permute.py). An expert is found through `slots`: the slot that holds it, or -1 when it is
not part of this wave, in which case its pairs are left untouched for the wave that has it. The reduction over the
inner dimension runs in one fixed order whatever the wave holds, so a pair's result does not depend on the wave, on
the slot, or on the other experts that are resident.

Weights are plain or quantised (quantised.py); packed ones are expanded before (expand.py). Quantised ones become values
of the activations' dtype in registers; or, where the activations are fp8 as the weights are, tensor cores multiply the
two, and each group's product is scaled.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from duomoe.kernels.activations import dequantise_activations
from duomoe.kernels.configuration import TRITON_TYPE, Configuration, multiprocessors, shared_memory
from duomoe.kernels.configuration import capability as capability_of
from duomoe.kernels.operator import operator
from duomoe.kernels.quantised import (
    FP8_BLOCK,
    Form,
    decoded,
    example_forms,
    expert_values,
    is_packed,
    kernel_form,
    pools,
    row_length,
    scale_places,
    strides,
)
from duomoe.kernels.threads import Threads, product_work

# From so many weights on, a CPU multiplies bfloat16 as it is; for less, its product takes longer to begin than one of
# float32 does in all.
BF16_WEIGHTS = 1 << 16


def experts_gate_up_reference(
    x: Tensor,
    w_gate_up: Tensor,
    slots: Tensor,
    order: Tensor,
    offsets: Tensor,
    top_k: int,
    out: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    x_scales: Tensor | None = None,
) -> None:
    """Compute `experts_gate_up` in float32 with plain PyTorch, expert by expert."""
    assert not is_packed(scales), "packed experts are expanded first"
    values = dequantise_activations(x, x_scales)
    starts = offsets.tolist()  # host-sync ok: the reference runs on the CPU
    for expert, slot in enumerate(slots.tolist()):  # host-sync ok: the reference runs on the CPU
        begin, end = starts[expert], starts[expert + 1]
        if slot < 0 or begin == end:
            continue
        tokens = order[begin:end].long() // top_k
        weight = _rounded(expert_values(slot, w_gate_up, scales, zeros, x.shape[1], matrices=2), x.dtype)
        gate, up = F.linear(values[tokens], weight).chunk(2, dim=-1)
        out[begin:end] = (F.silu(gate) * up).to(out.dtype)


def experts_down_reference(
    h: Tensor,
    w_down: Tensor,
    slots: Tensor,
    order: Tensor,
    offsets: Tensor,
    weights: Tensor,
    out: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    h_scales: Tensor | None = None,
) -> None:
    """Compute `experts_down` in float32 with plain PyTorch, expert by expert."""
    assert not is_packed(scales), "packed experts are expanded first"
    values = dequantise_activations(h, h_scales)
    starts = offsets.tolist()  # host-sync ok: the reference runs on the CPU
    for expert, slot in enumerate(slots.tolist()):  # host-sync ok: the reference runs on the CPU
        begin, end = starts[expert], starts[expert + 1]
        if slot < 0 or begin == end:
            continue
        pairs = order[begin:end].long()
        y = F.linear(values[begin:end], _rounded(expert_values(slot, w_down, scales, zeros, h.shape[1]), h.dtype))
        out[pairs] = (y * weights.flatten()[pairs, None]).to(out.dtype)


def _rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values as tensor cores take them beside activations of a dtype; in float32, where these are fp8."""
    return weight if dtype == torch.float8_e4m3fn else weight.to(dtype).float()


@operator(mutates_args=("out",))
def experts_gate_up(
    x: Tensor,
    w_gate_up: Tensor,
    slots: Tensor,
    order: Tensor,
    offsets: Tensor,
    top_k: int,
    out: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    x_scales: Tensor | None = None,
) -> None:
    """Compute `silu(x @ gate.T) * (x @ up.T)` for every pair whose expert is resident.

    Args:
        x: [tokens, hidden], float8_e4m3fn where it has `x_scales`.
        w_gate_up: [num_slots, 2 * intermediate, hidden], the gate rows first; a strided view into the slot pool. Plain
            or quantised (quantised.py), not packed, and so is every matrix here.
        slots: [experts] int32, the slot of each expert, -1 for those not in this wave.
        order: [tokens * top_k] int32, pairs sorted by expert.
        offsets: [experts + 1] int32, where each expert's pairs begin in `order`.
        top_k: experts per token; a pair's token is `pair // top_k`.
        out: [tokens * top_k, intermediate], written at each pair's place in `order`.
        scales: of quantised weights, [num_slots, …], a view into the pool; None for plain ones.
        zeros: of int4 weights, likewise.
        x_scales: of activations in fp8 (activations.py), for fp8 weights on GPUs from sm_89 on; None for others.
    """
    dtype = _product_dtype(x, 2 * out.shape[1])
    rows = _operand(x, x_scales, dtype).index_select(0, order // top_k)
    both = rows.new_empty(len(order), 2 * out.shape[1])
    held = _multiply(rows, w_gate_up, scales, zeros, 2, x.dtype, slots, offsets, both)
    with Threads(both.numel()):
        gate, up = both.float().chunk(2, dim=-1)
        # Of all pairs, resident or not, because the bits of `silu` may depend on how many values it is given.
        gated = F.silu(gate).mul_(up)
        for span in held:
            out[span] = gated[span]


def _multiply(
    rows: Tensor,
    w: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    matrices: int,
    dtype: torch.dtype,
    slots: Tensor,
    offsets: Tensor,
    out: Tensor,
) -> list[slice]:
    """Multiply the rows of every resident expert by its matrix, on the CPU.

    Args:
        rows: [pairs, inner], sorted by expert.
        w: the pool's weights; `scales` and `zeros` are theirs, and `matrices` says how many are stacked in each.
        scales: see above.
        zeros: see above.
        matrices: see above.
        dtype: of the activations, to which weights are rounded; that of `rows` and `out` is the product's.
        slots: as in `experts_gate_up`, and so is `offsets`.
        offsets: see above.
        out: [pairs, outer], written for the resident pairs.

    Returns:
        The resident pairs' places, neighbours together.
    """
    where, starts = slots.tolist(), offsets.tolist()  # host-sync ok: runs on the CPU
    held: list[slice] = []
    # Whether threads share a product must not depend on what is resident, so an average counts.
    with Threads(product_work(len(rows) // len(where), out.shape[1] * rows.shape[1])):
        for slot, begin, end in zip(where, starts[:-1], starts[1:], strict=True):
            if slot < 0 or begin == end:
                continue
            weight = w[slot]
            if scales is not None:
                weight = _rounded(expert_values(slot, w, scales, zeros, rows.shape[1], matrices), dtype)
            torch.mm(rows[begin:end], weight.to(rows.dtype).t(), out=out[begin:end])
            if held and held[-1].stop == begin:
                begin = held.pop().start
            held.append(slice(begin, end))
    return held


def _product_dtype(activations: Tensor, outer: int) -> torch.dtype:
    """Return the dtype in which a CPU multiplies activations by a matrix [outer, inner]; either adds up in float32."""
    worth_it = activations.dtype == torch.bfloat16 and outer * activations.shape[1] >= BF16_WEIGHTS
    return torch.bfloat16 if worth_it else torch.float32


def _operand(activations: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return activations as a CPU multiplies them."""
    return activations.to(dtype) if scales is None else dequantise_activations(activations, scales)


@experts_gate_up.register_fake
def _(
    x: Tensor,
    w_gate_up: Tensor,
    slots: Tensor,
    order: Tensor,
    offsets: Tensor,
    top_k: int,
    out: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    x_scales: Tensor | None = None,
) -> None:
    return None


@operator(mutates_args=("out",))
def experts_down(
    h: Tensor,
    w_down: Tensor,
    slots: Tensor,
    order: Tensor,
    offsets: Tensor,
    weights: Tensor,
    out: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    h_scales: Tensor | None = None,
) -> None:
    """Compute `weight * (h @ down.T)` for every pair whose expert is resident.

    Args:
        h: [tokens * top_k, intermediate], what `experts_gate_up` wrote; float8_e4m3fn where it has `h_scales`.
        w_down: [num_slots, hidden, intermediate], a strided view into the slot pool.
        slots: as in `experts_gate_up`, and so are `order` and `offsets`.
        order: see above.
        offsets: see above.
        weights: [tokens, top_k] float32, the router's.
        out: [tokens * top_k, hidden], written at row `pair`, ready for `combine`.
        scales: as in `experts_gate_up`, and so is `zeros`.
        zeros: see above.
        h_scales: as `x_scales` in `experts_gate_up`.
    """
    y = h.new_empty(len(h), out.shape[1], dtype=_product_dtype(h, out.shape[1]))
    held = _multiply(_operand(h, h_scales, y.dtype), w_down, scales, zeros, 1, h.dtype, slots, offsets, y)
    with Threads(y.numel()):
        pairs = order.long()
        weighted = y.mul_(weights.flatten().index_select(0, pairs)[:, None]).to(out.dtype)
        if held == [slice(0, len(y))]:
            # Reading in another order is faster than writing.
            place = torch.empty_like(pairs).index_copy_(0, pairs, torch.arange(len(pairs)))
            torch.index_select(weighted, 0, place, out=out)
            return
        for span in held:
            out.index_copy_(0, pairs[span], weighted[span])


@experts_down.register_fake
def _(
    h: Tensor,
    w_down: Tensor,
    slots: Tensor,
    order: Tensor,
    offsets: Tensor,
    weights: Tensor,
    out: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    h_scales: Tensor | None = None,
) -> None:
    return None


@triton.jit
def _tile_ends(
    offsets: tl.tensor, slots: tl.tensor, num_experts: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr
) -> tl.tensor:
    """Number the tiles of BLOCK_M pairs expert by expert; return where each expert's end. Absent experts have none."""
    expert = tl.arange(0, BLOCK_E)
    inside = expert < num_experts
    begin = tl.load(offsets + expert, mask=inside, other=0)
    end = tl.load(offsets + expert + 1, mask=inside, other=0)
    present = tl.load(slots + expert, mask=inside, other=-1) >= 0
    return tl.cumsum(tl.where(present, tl.cdiv(end - begin, BLOCK_M), 0), 0)


@triton.jit
def _locate(
    tile: tl.tensor,
    ends: tl.tensor,
    tiles_m: tl.tensor,
    tiles_n: tl.tensor,
    offsets: tl.tensor,
    slots: tl.tensor,
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return a tile's slot, its places in `order`, which of them are its own, and its number along the output.

    Consecutive tiles go down GROUP_M tiles of pairs before they go along the output, so that programs that run at
    the same time share weights and activations in the L2 cache. Places behind the expert's last pair repeat that
    pair: loads need no mask then.
    """
    first = tile // (GROUP_M * tiles_n) * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    inner = tile % (GROUP_M * tiles_n)
    tile_m = first + inner % rows
    expert = tl.sum((ends <= tile_m).to(tl.int32), 0)
    expert_first = tl.max(tl.where(ends <= tile_m, ends, 0), 0)
    place = tl.load(offsets + expert) + (tile_m - expert_first) * BLOCK_M + tl.arange(0, BLOCK_M)
    last = tl.load(offsets + expert + 1) - 1
    slot = tl.load(slots + expert).to(tl.int64)
    return slot, tl.minimum(place, last), place <= last, inner // rows


@triton.jit
def _product(
    a_rows: tl.tensor,
    w_rows: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    place: tl.tensor,
    up_place: tl.tensor,
    step: tl.tensor,
    a_scales: tl.tensor,
    a_place: tl.tensor,
    a_step: tl.tensor,
    size: tl.tensor,
    EVEN_K: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """Return the product [BLOCK_M, BLOCK_N] of rows of activations and rows of weights that have `size` values each.

    `a_rows` and `w_rows` are where the rows begin; `place` and `step` are those of the weights' scales. Quantised
    weights are the left operand, which tensor cores take from registers, where their values come to be. Where both are
    fp8, activations have places and a step in their own scales, and the tile's weights have one scale for each group,
    or two that alternate by eights, as the rows of gate and up do, the second of them at `up_place`.
    """
    inner = tl.arange(0, BLOCK_K)
    if FORMAT == "plain":
        a_at, w_at = a_rows[:, None] + inner[None, :], w_rows[None, :] + inner[:, None]
        y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, size, BLOCK_K):
            if EVEN_K:
                a, w = tl.load(a_at), tl.load(w_at)
            else:
                a = tl.load(a_at, mask=(inner < size - k)[None, :], other=0.0)
                w = tl.load(w_at, mask=(inner < size - k)[:, None], other=0.0)
            y = tl.dot(a, w, y, input_precision="ieee")
            a_at += BLOCK_K
            w_at += BLOCK_K
        return y
    elif FORMAT == "w8a8":
        tl.static_assert(BLOCK_K == GROUP)
        a_at = a_rows[:, None].to(tl.pointer_type(tl.float8e4nv), bitcast=True) + inner[None, :]
        w_at = w_rows[None, :].to(tl.pointer_type(tl.float8e4nv), bitcast=True) + inner[:, None]
        is_up = tl.arange(0, BLOCK_N) // 8 % 2 == 1
        y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, size, BLOCK_K):
            if EVEN_K:
                a, w = tl.load(a_at), tl.load(w_at)
            else:
                a = tl.load(a_at, mask=(inner < size - k)[None, :], other=0.0)
                w = tl.load(w_at, mask=(inner < size - k)[:, None], other=0.0)
            w_scale = tl.where(is_up, tl.load(scales + up_place), tl.load(scales + place))
            y += tl.dot(a, w) * (tl.load(a_scales + a_place)[:, None] * w_scale[None, :])
            a_at += BLOCK_K
            w_at += BLOCK_K
            a_scales += a_step
            scales += step
        return y
    else:
        HALVES: tl.constexpr = 2 if FORMAT == "int4" else 1
        a_at, w_at = a_rows[None, :] + inner[:, None], w_rows[:, None] + inner[None, :]
        y = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for k in range(0, size, HALVES * BLOCK_K):
            if EVEN_K or FORMAT == "int4":  # whose rows are padded
                raw = tl.load(w_at)
            else:
                raw = tl.load(w_at, mask=(inner < size - k)[None, :], other=0)
            for half in tl.static_range(HALVES):
                if EVEN_K:
                    a = tl.load(a_at + half * BLOCK_K)
                else:
                    a = tl.load(a_at + half * BLOCK_K, mask=(inner < size - k - half * BLOCK_K)[:, None], other=0.0)
                at = place + (k // GROUP + half * BLOCK_K // GROUP) * step
                y = tl.dot(decoded(raw, scales, zeros, at, half, FORMAT, a.dtype), a, y, input_precision="ieee")
            a_at += HALVES * BLOCK_K
            w_at += BLOCK_K
        return tl.trans(y)


@triton.jit(do_not_specialize=("tokens",))
def _gate_up_kernel(
    x: tl.tensor,
    x_scales: tl.tensor,
    w_gate_up: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    slots: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    out: tl.tensor,
    slot_stride: tl.tensor,
    scale_stride: tl.tensor,
    zero_stride: tl.tensor,
    tokens: tl.tensor,
    num_experts: tl.tensor,
    hidden: tl.tensor,
    intermediate: tl.tensor,
    TOP_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
) -> None:
    """Each program computes every so-many-th tile: BLOCK_M pairs of one resident expert by BLOCK_N outputs.

    The number of tiles is known on the device only; a fixed number of programs shares them, so absent experts cost
    nothing. Where the loops over tiles and over the inner dimension are made one (FLATTEN), the loads of a tile begin
    under the end of the one before. A tile is located again for its end, so that registers need not hold it meanwhile.
    """
    ends = _tile_ends(offsets, slots, num_experts, BLOCK_M, BLOCK_E)
    tiles_m, tiles_n = tl.max(ends, 0), tl.cdiv(intermediate, BLOCK_N)
    ended = tl.program_id(0) - tl.num_programs(0)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        slot, place, own, tile_n = _locate(tile, ends, tiles_m, tiles_n, offsets, slots, BLOCK_M, GROUP_M)
        token = (tl.load(order + place) // TOP_K).to(tl.int64)
        # Rows of gate and up alternate by eights, so that one product has both, and for a thread both of the same row.
        both = tl.arange(0, 2 * BLOCK_N)
        row, matrix = tl.minimum(tile_n * BLOCK_N + both // 16 * 8 + both % 8, intermediate - 1), both // 8 % 2
        stacked_row = (row + matrix * intermediate).to(tl.int64)
        w_rows = w_gate_up + slot * slot_stride + stacked_row * row_length(hidden, FORMAT)
        if FORMAT == "w8a8":
            matrix, row = 0, tile_n * BLOCK_N  # no tile reaches over a block's end
        scale_place, step = scale_places(matrix, row, intermediate, hidden, FORMAT, GROUP)
        up_place, _ = scale_places(1, tile_n * BLOCK_N, intermediate, hidden, FORMAT, GROUP)
        s, z = scales + slot * scale_stride, zeros + slot * zero_stride

        y = _product(
            x + token * hidden, w_rows, s, z, scale_place, up_place, step,
            x_scales, token, tokens, hidden, EVEN_K, FORMAT, GROUP, BLOCK_M, 2 * BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if FLATTEN:
            ended += tl.num_programs(0)
            _, place, own, tile_n = _locate(ended, ends, tiles_m, tiles_n, offsets, slots, BLOCK_M, GROUP_M)
        gate, up = tl.split(tl.permute(tl.reshape(y, (BLOCK_M, BLOCK_N // 8, 2, 8)), (0, 1, 3, 2)))
        h = tl.reshape(gate * tl.sigmoid(gate) * up, (BLOCK_M, BLOCK_N))
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        to = out + place.to(tl.int64)[:, None] * intermediate + column[None, :]
        tl.store(to, h.to(out.dtype.element_ty), mask=own[:, None] & (column < intermediate)[None, :])


@triton.jit(do_not_specialize=("pairs",))
def _down_kernel(
    h: tl.tensor,
    h_scales: tl.tensor,
    w_down: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    slots: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    slot_stride: tl.tensor,
    scale_stride: tl.tensor,
    zero_stride: tl.tensor,
    pairs: tl.tensor,
    num_experts: tl.tensor,
    intermediate: tl.tensor,
    hidden: tl.tensor,
    EVEN_K: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
) -> None:
    """Each program computes every so-many-th tile, as in `_gate_up_kernel`, and writes its rows back in pair order."""
    ends = _tile_ends(offsets, slots, num_experts, BLOCK_M, BLOCK_E)
    tiles_m, tiles_n = tl.max(ends, 0), tl.cdiv(hidden, BLOCK_N)
    ended = tl.program_id(0) - tl.num_programs(0)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        slot, place, own, tile_n = _locate(tile, ends, tiles_m, tiles_n, offsets, slots, BLOCK_M, GROUP_M)
        row = tl.minimum(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), hidden - 1).to(tl.int64)
        w_rows = w_down + slot * slot_stride + row * row_length(intermediate, FORMAT)
        s, z = scales + slot * scale_stride, zeros + slot * zero_stride
        if FORMAT == "w8a8":
            row = tile_n * BLOCK_N  # no tile reaches over a block's end
        scale_place, step = scale_places(0, row, hidden, intermediate, FORMAT, GROUP)
        # Loaded here, so that they arrive during the loop.
        pair = tl.load(order + place)
        factor = tl.load(weights + pair)

        y = _product(
            h + place.to(tl.int64) * intermediate, w_rows, s, z, scale_place, scale_place, step,
            h_scales, place, pairs, intermediate, EVEN_K, FORMAT, GROUP, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if FLATTEN:
            ended += tl.num_programs(0)
            _, place, own, tile_n = _locate(ended, ends, tiles_m, tiles_n, offsets, slots, BLOCK_M, GROUP_M)
            pair = tl.load(order + place)
            factor = tl.load(weights + pair)
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        y *= factor[:, None]
        to = out + pair.to(tl.int64)[:, None] * hidden + column[None, :]
        tl.store(to, y.to(out.dtype.element_ty), mask=own[:, None] & (column < hidden)[None, :])


def _options(
    pairs: int, num_experts: int, inner: int, matrices: int, dtype: torch.dtype, capability: int, form: Form
) -> Form:
    """Choose the tile for a pass of `pairs`, when each tile of activations meets `matrices` tiles of weights.

    The tile is higher than an expert has pairs on average, so that most experts' weights are read once, within what
    tensor cores like. BLOCK_K, and with it the order of the additions, is the same for every pass and GPU.
    """
    mean_pairs, quantised = triton.cdiv(pairs, num_experts), form["FORMAT"] != "plain"
    if form["FORMAT"] == "w8a8":
        # Small, so that one program scales while another multiplies: on Hopper the best for passes of all sizes.
        block_m, width, block_k, warps = 64, 128, FP8_BLOCK, 4 if capability in (90, 100) else 8
    elif dtype == torch.float32:
        block_m, width, block_k, warps = 16, 64, 64 if form["FORMAT"] == "int4" else 32, 4
    else:
        # A quantised weight is decoded once for all of a tile's pairs, so Hopper's tile is as high as registers allow;
        # a plain one is wide there, where tensor cores take both operands from shared memory; elsewhere that spills.
        highest = 256 if quantised and capability == 90 else 128
        block_m = highest if mean_pairs > 64 else min(max(triton.next_power_of_2(2 * mean_pairs), 16), 64)
        width = 256 if block_m >= 64 and capability == 90 and not quantised else 128
        warps = 8 if width == 256 or block_m >= 128 else 4
        block_k = 64
    stage = (block_m * dtype.itemsize + width * (1 if quantised else dtype.itemsize)) * block_k
    if form["FORMAT"] == "int4" and block_m < 64:
        form = form | {"maxnreg": 208}  # or else the compiler stops at 128 and spills
    return form | {
        "EVEN_K": inner % (2 * block_k if form["FORMAT"] == "int4" else block_k) == 0,
        "BLOCK_M": block_m,
        "BLOCK_N": width // matrices,
        "BLOCK_K": block_k,
        "BLOCK_E": triton.next_power_of_2(num_experts),
        "GROUP_M": 16,
        # On Hopper up to 24 % faster; but where weights are decoded in the loop, slower (docs/measurements.md).
        "FLATTEN": capability == 90 and form["FORMAT"] in ("plain", "w8a8"),
        "num_warps": warps,
        "num_stages": min(
            max(shared_memory(capability) // (stage * (2 if form["FORMAT"] == "w8a8" else 1)), 2),
            3 if warps == 8 or (quantised and block_m == 64) else 4,
        ),
    }


def _programs(pairs: int, num_experts: int, outer: int, options: Form, device: torch.device) -> int:
    """Return how many programs share the tiles: as many as run at once, but no more than there can be tiles."""
    tiles_m = min(pairs, triton.cdiv(pairs, options["BLOCK_M"]) + num_experts)
    large = options["BLOCK_M"] >= 128 or options["BLOCK_M"] * options["num_warps"] == 64 * 8
    at_once = multiprocessors(device) * (1 if large else 3 if options["FORMAT"] == "plain" else 2)
    programs: int = min(tiles_m * triton.cdiv(outer, options["BLOCK_N"]), at_once)
    return programs


def _activations(x: Tensor, scales: Tensor | None, form: Form) -> tuple[Tensor, Tensor, Form]:
    """Return activations and their scales as kernels take them, and the form that says what they are.

    fp8 goes as bytes. Plain activations take the place of scales, from which nothing is read then.
    """
    return (x, x, form) if scales is None else (x.view(torch.uint8), scales, form | {"FORMAT": "w8a8"})


@experts_gate_up.register_cuda
def experts_gate_up_triton(
    x: Tensor,
    w_gate_up: Tensor,
    slots: Tensor,
    order: Tensor,
    offsets: Tensor,
    top_k: int,
    out: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    x_scales: Tensor | None = None,
) -> None:
    """Launch the kernel of `experts_gate_up`."""
    assert not is_packed(scales), "packed experts are expanded first"
    pairs, num_experts = len(order), len(slots)
    if pairs == 0:
        return
    intermediate, hidden = out.shape[1], x.shape[1]
    capability = capability_of(x.device)
    form, pool = kernel_form(w_gate_up, scales, 2, capability), pools(w_gate_up, scales, zeros)
    x, x_scales, form = _activations(x, x_scales, form)
    options = _options(pairs, num_experts, hidden, 2, x.dtype, capability, form)
    _gate_up_kernel[(_programs(pairs, num_experts, intermediate, options, x.device),)](
        x, x_scales, *pool, slots, order, offsets, out, *strides(*pool),
        len(x), num_experts, hidden, intermediate, TOP_K=top_k, **options,
    )  # fmt: skip


@experts_down.register_cuda
def experts_down_triton(
    h: Tensor,
    w_down: Tensor,
    slots: Tensor,
    order: Tensor,
    offsets: Tensor,
    weights: Tensor,
    out: Tensor,
    scales: Tensor | None = None,
    zeros: Tensor | None = None,
    h_scales: Tensor | None = None,
) -> None:
    """Launch the kernel of `experts_down`."""
    assert not is_packed(scales), "packed experts are expanded first"
    pairs, num_experts = len(order), len(slots)
    if pairs == 0:
        return
    intermediate, hidden = h.shape[1], out.shape[1]
    capability = capability_of(h.device)
    form, pool = kernel_form(w_down, scales, 1, capability), pools(w_down, scales, zeros)
    h, h_scales, form = _activations(h, h_scales, form)
    options = _options(pairs, num_experts, intermediate, 1, h.dtype, capability, form)
    _down_kernel[(_programs(pairs, num_experts, hidden, options, h.device),)](
        h, h_scales, *pool, slots, order, offsets, weights, out, *strides(*pool),
        len(h), num_experts, intermediate, hidden, **options,
    )  # fmt: skip


def configurations(dtype: torch.dtype, capability: int) -> list[Configuration]:
    """List what the launchers choose for passes of every size, with an even and an odd inner dimension.

    For quantised weights, passes of two sizes, of which the larger has the odd dimension. Packed ones come expanded.
    """
    pointer = f"*{TRITON_TYPE[dtype]}:16"
    types = dict.fromkeys(("slots", "order", "offsets"), "*i32:16") | {"out": pointer, "slot_stride": "i32:16"}
    types |= {"num_experts": "i32", "tokens": "i32", "pairs": "i32", "hidden": "i32:16", "intermediate": "i32:16"}
    found = []
    every = ((128, 2048), (16 * 128, 2048), (64 * 128, 2048), (128 * 128, 2048), (128 * 128, 2080))
    activations = {"x": pointer, "x_scales": pointer}
    forms = [(form, activations | weights) for form, weights in example_forms(dtype, capability)]
    forms = [(form, weights) for form, weights in forms if form["FORMAT"] != "packed"]
    fp8 = [(form, weights) for form, weights in forms if form["FORMAT"] == "fp8"]
    forms += [(form | {"FORMAT": "w8a8"}, weights | {"x": "*u8:16", "x_scales": "*fp32:16"}) for form, weights in fp8]
    for form, pointers in forms:
        others = types | {name: pointers[name] for name in pointers if name.endswith(("scales", "zeros", "stride"))}
        gate_up = others | {"x": pointers["x"], "w_gate_up": pointers["w"]}
        down = others | {"h": pointers["x"], "w_down": pointers["w"], "weights": "*fp32:16"}
        gate_up.pop("pairs"), down.pop("tokens")
        down["h_scales"] = down.pop("x_scales")
        inputs = torch.uint8 if form["FORMAT"] == "w8a8" else dtype
        for pairs, inner in every if form["FORMAT"] == "plain" else (every[0], every[-1]):
            options = _options(pairs, 128, inner, 2, inputs, capability, form) | {"TOP_K": 8}
            found.append(Configuration(_gate_up_kernel, gate_up, options, tensor_cores=True, wide_loads=True))
            options = _options(pairs, 128, inner, 1, inputs, capability, form)
            found.append(Configuration(_down_kernel, down, options, tensor_cores=True, wide_loads=True))
    return found
