"""The experts' matrices over many tokens: a GEMM per resident expert, all in one launch.

Pairs are sorted by expert (permute.py). An expert is found through `slots`: the slot that holds it, or -1 when it is
not part of this wave, in which case its pairs are left untouched for the wave that has it. The reduction over the
inner dimension runs in one fixed order whatever the wave holds, so a pair's result does not depend on the wave, on
the slot, or on the other experts that are resident.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from duomoe.kernels.configuration import TRITON_TYPE, Configuration, multiprocessors, shared_memory
from duomoe.kernels.configuration import capability as capability_of
from duomoe.kernels.operator import operator


def experts_gate_up_reference(
    x: Tensor, w_gate_up: Tensor, slots: Tensor, order: Tensor, offsets: Tensor, top_k: int, out: Tensor
) -> None:
    """Compute `experts_gate_up` in float32 with plain PyTorch, expert by expert."""
    starts = offsets.tolist()  # host-sync ok: the reference runs on the CPU
    for expert, slot in enumerate(slots.tolist()):  # host-sync ok: the reference runs on the CPU
        begin, end = starts[expert], starts[expert + 1]
        if slot < 0 or begin == end:
            continue
        tokens = order[begin:end].long() // top_k
        gate, up = F.linear(x[tokens].float(), w_gate_up[slot].float()).chunk(2, dim=-1)
        out[begin:end] = (F.silu(gate) * up).to(out.dtype)


def experts_down_reference(
    h: Tensor, w_down: Tensor, slots: Tensor, order: Tensor, offsets: Tensor, weights: Tensor, out: Tensor
) -> None:
    """Compute `experts_down` in float32 with plain PyTorch, expert by expert."""
    starts = offsets.tolist()  # host-sync ok: the reference runs on the CPU
    for expert, slot in enumerate(slots.tolist()):  # host-sync ok: the reference runs on the CPU
        begin, end = starts[expert], starts[expert + 1]
        if slot < 0 or begin == end:
            continue
        pairs = order[begin:end].long()
        y = F.linear(h[begin:end].float(), w_down[slot].float())
        out[pairs] = (y * weights.flatten()[pairs, None]).to(out.dtype)


@operator(mutates_args=("out",))
def experts_gate_up(
    x: Tensor, w_gate_up: Tensor, slots: Tensor, order: Tensor, offsets: Tensor, top_k: int, out: Tensor
) -> None:
    """Compute `silu(x @ gate.T) * (x @ up.T)` for every pair whose expert is resident.

    Args:
        x: [tokens, hidden].
        w_gate_up: [num_slots, 2 * intermediate, hidden], the gate rows first; a strided view into the slot pool.
        slots: [experts] int32, the slot of each expert, -1 for those not in this wave.
        order: [tokens * top_k] int32, pairs sorted by expert.
        offsets: [experts + 1] int32, where each expert's pairs begin in `order`.
        top_k: experts per token; a pair's token is `pair // top_k`.
        out: [tokens * top_k, intermediate], written at each pair's place in `order`.
    """
    experts_gate_up_reference(x, w_gate_up, slots, order, offsets, top_k, out)


@experts_gate_up.register_fake
def _(x: Tensor, w_gate_up: Tensor, slots: Tensor, order: Tensor, offsets: Tensor, top_k: int, out: Tensor) -> None:
    return None


@operator(mutates_args=("out",))
def experts_down(
    h: Tensor, w_down: Tensor, slots: Tensor, order: Tensor, offsets: Tensor, weights: Tensor, out: Tensor
) -> None:
    """Compute `weight * (h @ down.T)` for every pair whose expert is resident.

    Args:
        h: [tokens * top_k, intermediate], what `experts_gate_up` wrote.
        w_down: [num_slots, hidden, intermediate], a strided view into the slot pool.
        slots: as in `experts_gate_up`, and so are `order` and `offsets`.
        order: see above.
        offsets: see above.
        weights: [tokens, top_k] float32, the router's.
        out: [tokens * top_k, hidden], written at row `pair`, ready for `combine`.
    """
    experts_down_reference(h, w_down, slots, order, offsets, weights, out)


@experts_down.register_fake
def _(h: Tensor, w_down: Tensor, slots: Tensor, order: Tensor, offsets: Tensor, weights: Tensor, out: Tensor) -> None:
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
def _gate_up_kernel(
    x: tl.tensor,
    w_gate_up: tl.tensor,
    slots: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    out: tl.tensor,
    slot_stride: tl.tensor,
    num_experts: tl.tensor,
    hidden: tl.tensor,
    intermediate: tl.tensor,
    TOP_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """Each program computes every so-many-th tile: BLOCK_M pairs of one resident expert by BLOCK_N outputs.

    The number of tiles is known on the device only; a fixed number of programs shares them, so absent experts cost
    nothing.
    """
    ends = _tile_ends(offsets, slots, num_experts, BLOCK_M, BLOCK_E)
    tiles_m, tiles_n = tl.max(ends, 0), tl.cdiv(intermediate, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        slot, place, own, tile_n = _locate(tile, ends, tiles_m, tiles_n, offsets, slots, BLOCK_M, GROUP_M)
        token = (tl.load(order + place) // TOP_K).to(tl.int64)
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        row = tl.minimum(column, intermediate - 1).to(tl.int64)
        inner = tl.arange(0, BLOCK_K)
        a_at = x + token[:, None] * hidden + inner[None, :]
        gate_at = w_gate_up + slot * slot_stride + row[None, :] * hidden + inner[:, None]
        up_at = gate_at + tl.cast(intermediate, tl.int64) * hidden

        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, hidden, BLOCK_K):
            if EVEN_K:
                a, gate_w, up_w = tl.load(a_at), tl.load(gate_at), tl.load(up_at)
            else:
                a = tl.load(a_at, mask=(inner < hidden - k)[None, :], other=0.0)
                gate_w = tl.load(gate_at, mask=(inner < hidden - k)[:, None], other=0.0)
                up_w = tl.load(up_at, mask=(inner < hidden - k)[:, None], other=0.0)
            gate = tl.dot(a, gate_w, gate, input_precision="ieee")
            up = tl.dot(a, up_w, up, input_precision="ieee")
            a_at += BLOCK_K
            gate_at += BLOCK_K
            up_at += BLOCK_K
        h = gate * tl.sigmoid(gate) * up
        to = out + place.to(tl.int64)[:, None] * intermediate + column[None, :]
        tl.store(to, h.to(out.dtype.element_ty), mask=own[:, None] & (column < intermediate)[None, :])


@triton.jit
def _down_kernel(
    h: tl.tensor,
    w_down: tl.tensor,
    slots: tl.tensor,
    order: tl.tensor,
    offsets: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    slot_stride: tl.tensor,
    num_experts: tl.tensor,
    intermediate: tl.tensor,
    hidden: tl.tensor,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """Each program computes every so-many-th tile, as in `_gate_up_kernel`, and writes its rows back in pair order."""
    ends = _tile_ends(offsets, slots, num_experts, BLOCK_M, BLOCK_E)
    tiles_m, tiles_n = tl.max(ends, 0), tl.cdiv(hidden, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        slot, place, own, tile_n = _locate(tile, ends, tiles_m, tiles_n, offsets, slots, BLOCK_M, GROUP_M)
        column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        row = tl.minimum(column, hidden - 1).to(tl.int64)
        inner = tl.arange(0, BLOCK_K)
        a_at = h + place.to(tl.int64)[:, None] * intermediate + inner[None, :]
        w_at = w_down + slot * slot_stride + row[None, :] * intermediate + inner[:, None]
        # Loaded here, so that they arrive during the loop.
        pair = tl.load(order + place)
        factor = tl.load(weights + pair)

        y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, intermediate, BLOCK_K):
            if EVEN_K:
                a, w = tl.load(a_at), tl.load(w_at)
            else:
                a = tl.load(a_at, mask=(inner < intermediate - k)[None, :], other=0.0)
                w = tl.load(w_at, mask=(inner < intermediate - k)[:, None], other=0.0)
            y = tl.dot(a, w, y, input_precision="ieee")
            a_at += BLOCK_K
            w_at += BLOCK_K
        y *= factor[:, None]
        to = out + pair.to(tl.int64)[:, None] * hidden + column[None, :]
        tl.store(to, y.to(out.dtype.element_ty), mask=own[:, None] & (column < hidden)[None, :])


def _options(
    pairs: int, num_experts: int, inner: int, matrices: int, dtype: torch.dtype, capability: int
) -> dict[str, int | bool]:
    """Choose the tile for a pass of `pairs`, when each tile of activations meets `matrices` tiles of weights.

    The tile is higher than an expert has pairs on average, so that most experts' weights are read once, within what
    tensor cores like. BLOCK_K, and with it the order of the additions, is the same for every pass and GPU.
    """
    mean_pairs = triton.cdiv(pairs, num_experts)
    if dtype == torch.float32:
        block_m, width, block_k, warps = 16, 64, 32, 4
    else:
        block_m = 128 if mean_pairs > 64 else min(max(triton.next_power_of_2(2 * mean_pairs), 16), 64)
        # Only Hopper's tensor cores take both operands from shared memory; elsewhere the wide tile spills registers.
        width = 256 if block_m >= 64 and capability == 90 else 128
        # Blackwell's (10.x) keep the sums in a memory of their own, so 4 warps have registers enough.
        warps = 8 if width == 256 or (block_m == 128 and capability // 10 != 10) else 4
        block_k = 64
    stage = (block_m + width) * block_k * dtype.itemsize
    return {
        "EVEN_K": inner % block_k == 0,
        "BLOCK_M": block_m,
        "BLOCK_N": width // matrices,
        "BLOCK_K": block_k,
        "BLOCK_E": triton.next_power_of_2(num_experts),
        "GROUP_M": 16,
        "num_warps": warps,
        "num_stages": min(max(shared_memory(capability) // stage, 2), 3 if warps == 8 else 4),
    }


def _programs(pairs: int, num_experts: int, outer: int, options: dict[str, int | bool], device: torch.device) -> int:
    """Return how many programs share the tiles: as many as run at once, but no more than there can be tiles."""
    tiles_m = min(pairs, triton.cdiv(pairs, options["BLOCK_M"]) + num_experts)
    large = options["BLOCK_M"] == 128 or options["num_warps"] == 8
    at_once = multiprocessors(device) * (1 if large else 3)
    programs: int = min(tiles_m * triton.cdiv(outer, options["BLOCK_N"]), at_once)
    return programs


@experts_gate_up.register_cuda
def experts_gate_up_triton(
    x: Tensor, w_gate_up: Tensor, slots: Tensor, order: Tensor, offsets: Tensor, top_k: int, out: Tensor
) -> None:
    """Launch the kernel of `experts_gate_up`."""
    pairs, num_experts = len(order), len(slots)
    if pairs == 0:
        return
    intermediate, hidden = out.shape[1], x.shape[1]
    options = _options(pairs, num_experts, hidden, 2, x.dtype, capability_of(x.device))
    _gate_up_kernel[(_programs(pairs, num_experts, intermediate, options, x.device),)](
        x, w_gate_up, slots, order, offsets, out, w_gate_up.stride(0), num_experts, hidden, intermediate,
        TOP_K=top_k, **options,
    )  # fmt: skip


@experts_down.register_cuda
def experts_down_triton(
    h: Tensor, w_down: Tensor, slots: Tensor, order: Tensor, offsets: Tensor, weights: Tensor, out: Tensor
) -> None:
    """Launch the kernel of `experts_down`."""
    pairs, num_experts = len(order), len(slots)
    if pairs == 0:
        return
    intermediate, hidden = h.shape[1], out.shape[1]
    options = _options(pairs, num_experts, intermediate, 1, h.dtype, capability_of(h.device))
    _down_kernel[(_programs(pairs, num_experts, hidden, options, h.device),)](
        h, w_down, slots, order, offsets, weights, out, w_down.stride(0), num_experts, intermediate, hidden, **options
    )


def configurations(dtype: torch.dtype, capability: int) -> list[Configuration]:
    """List what the launchers choose for passes of every size, with an even and an odd inner dimension."""
    pointer = f"*{TRITON_TYPE[dtype]}:16"
    types = dict.fromkeys(("slots", "order", "offsets"), "*i32:16") | {"out": pointer, "slot_stride": "i32:16"}
    types |= {"num_experts": "i32", "hidden": "i32:16", "intermediate": "i32:16"}
    gate_up = types | {"x": pointer, "w_gate_up": pointer}
    down = types | {"h": pointer, "w_down": pointer, "weights": "*fp32:16"}
    found = []
    for pairs, inner in ((128, 2048), (16 * 128, 2048), (64 * 128, 2048), (128 * 128, 2048), (128 * 128, 2080)):
        options = _options(pairs, 128, inner, 2, dtype, capability) | {"TOP_K": 8}
        found.append(Configuration(_gate_up_kernel, gate_up, options, tensor_cores=True, wide_loads=True))
        options = _options(pairs, 128, inner, 1, dtype, capability)
        found.append(Configuration(_down_kernel, down, options, tensor_cores=True, wide_loads=True))
    return found
