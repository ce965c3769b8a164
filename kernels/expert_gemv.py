"""The experts' matrices over few tokens: each pair streams its expert's rows once, split along the inner dimension.

With a handful of tokens the matrices are read, not reused, so the work is spread for bandwidth: a program takes a few
output rows and one of `splits` parts of the inner dimension (equal ones, in multiples of `PART_UNIT`), and leaves a
float32 partial sum. Whoever reads the partial sums adds them in order: `experts_down_gemv` those of gate and up,
`combine` those of down. The split depends on the shapes alone, so a pair's result does not depend on what else is
resident.

Weights are plain, packed or quantised (quantised.py). All are multiplied in float32, as the references do.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from duomoe.kernels.bf16_packed import unpacked
from duomoe.kernels.configuration import TRITON_TYPE, Configuration
from duomoe.kernels.configuration import capability as capability_of
from duomoe.kernels.operator import operator
from duomoe.kernels.quantised import (
    Form,
    example_forms,
    expert_values,
    fp8_number,
    kernel_form,
    pools,
    row_length,
    scale_places,
    strides,
    tiny_int4,
)
from duomoe.kernels.threads import Threads

# Parts of the inner dimension are whole multiples of this many elements, so that wide loads stay aligned.
PART_UNIT = 256


def part_length(size: int, splits: int) -> int:
    """Return how long each of `splits` parts of a dimension of `size` is; the last ones may be shorter or empty."""
    units = -(-size // PART_UNIT)
    return -(-units // splits) * PART_UNIT


def _part(size: int, splits: int, split: int) -> slice:
    """Return the `split`-th of `splits` parts of a dimension of `size`."""
    length = part_length(size, splits)
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
            packed or quantised (quantised.py), and so is every matrix here.
        slots: [experts] int32, the slot of each expert, -1 for those not in this wave.
        experts: [tokens, top_k] int32, the experts chosen; -1 is padding.
        out: [splits, tokens * top_k, 2 * intermediate] float32, written for the resident pairs.
        scales: of quantised weights, [num_slots, …], a view into the pool; the bases of packed ones; None for plain.
        zeros: of int4 weights, likewise; the patches of packed ones.
    """
    inner, top_k = x.shape[1], experts.shape[1]
    tokens, places = x.float().unbind(0), out.unbind(0)
    with Threads(inner * out.shape[2]):
        for pair, slot in _resident(experts, slots):
            weight, token = expert_values(slot, w_gate_up, scales, zeros, inner, matrices=2), tokens[pair // top_k]
            for split, place in enumerate(places):
                part = _part(inner, len(places), split)
                torch.mv(_columns(weight, part), _columns(token, part), out=place[pair])


def _resident(experts: Tensor, slots: Tensor) -> list[tuple[int, int]]:
    """Return the pairs whose experts are resident, each with the slot, on the CPU."""
    where = [*slots.tolist(), -1]  # host-sync ok: runs on the CPU; the last one is that of padding, expert -1
    chosen = experts.flatten().tolist()  # host-sync ok: runs on the CPU
    return [(pair, where[expert]) for pair, expert in enumerate(chosen) if where[expert] >= 0]


def _columns(x: Tensor, part: slice) -> Tensor:
    """Return a part of the last dimension; the whole, which is what there mostly is, without another operation."""
    return x if part.stop - part.start == x.shape[-1] else x[..., part]


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
    inner, places = gate_up.shape[2] // 2, out.unbind(0)
    # Nobody has written the sums of absent experts, and nobody reads what becomes of them.
    gate, up = (gate_up[0] if len(gate_up) == 1 else gate_up.sum(0)).chunk(2, dim=-1)
    weighted = (F.silu(gate).mul_(up) * weights.reshape(-1, 1)).unbind(0)
    with Threads(inner * out.shape[2]):
        for pair, slot in _resident(experts, slots):
            weight = expert_values(slot, w_down, scales, zeros, inner)
            for split, place in enumerate(places):
                part = _part(inner, len(places), split)
                torch.mv(_columns(weight, part), _columns(weighted[pair], part), out=place[pair])


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
def _activations(
    source: tl.tensor, k: tl.tensor, inner: tl.tensor, split_stride: tl.tensor, GATE_UP_SPLITS: tl.constexpr
) -> tl.tensor:
    """Return some activations in float32: as they lie there, or made from that many partial sums of gate and up."""
    if GATE_UP_SPLITS == 0:
        return tl.load(source + k, mask=k < inner, other=0.0).to(tl.float32)
    else:
        gate = tl.zeros(k.shape, tl.float32)
        up = tl.zeros(k.shape, tl.float32)
        for split in range(GATE_UP_SPLITS):
            at = source + split * split_stride + k
            gate += tl.load(at, mask=k < inner, other=0.0)
            up += tl.load(at + inner, mask=k < inner, other=0.0)
        return gate * tl.sigmoid(gate) * up


@triton.jit
def _dot_rows(
    source: tl.tensor,
    split_stride: tl.tensor,
    weight: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    row: tl.tensor,
    place: tl.tensor,
    step: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    inner: tl.tensor,
    GATE_UP_SPLITS: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    WORD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tl.tensor:
    """Return the products [BLOCK_N] of rows of a matrix with the activations, over some chunks of CHUNK values.

    `place` and `step` are those of the rows' scales (quantised.py).
    """
    if FORMAT == "plain" or FORMAT == "packed":
        return _dot_plain_rows(
            source, split_stride, weight, scales, zeros, row, place, step, first, last, inner,
            GATE_UP_SPLITS, FORMAT, BLOCK_N, CHUNK,
        )  # fmt: skip
    else:
        return _dot_quantised_rows(
            source, split_stride, weight, scales, zeros, row, place, step, first, last, inner,
            GATE_UP_SPLITS, FORMAT, GROUP, WORD, BLOCK_N, CHUNK,
        )  # fmt: skip


@triton.jit
def _dot_plain_rows(
    source: tl.tensor,
    split_stride: tl.tensor,
    weight: tl.tensor,
    bases: tl.tensor,
    patches: tl.tensor,
    row: tl.tensor,
    place: tl.tensor,
    step: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    inner: tl.tensor,
    GATE_UP_SPLITS: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tl.tensor:
    """Do as `_dot_rows`, for plain and packed weights: of the same values the same sum, bit for bit."""
    sums = tl.zeros((BLOCK_N, CHUNK), tl.float32)
    rows = weight + row[:, None] * row_length(inner, FORMAT)
    if FORMAT == "packed":
        base = tl.load(bases + place).to(tl.int32)[:, None]
    for chunk in range(first, last):
        k = chunk * CHUNK + tl.arange(0, CHUNK)
        if FORMAT == "packed":
            pairs = unpacked(rows, base, (patches + step)[:, None], chunk * (CHUNK // 8), inner, BLOCK_N, CHUNK // 8)
            even, odd = (pairs << 16).to(tl.float32, bitcast=True), (pairs & -65536).to(tl.float32, bitcast=True)
            value = tl.reshape(tl.join(even, odd), (BLOCK_N, CHUNK))
        else:
            value = tl.load(rows + k[None, :], mask=(k < inner)[None, :], other=0.0).to(tl.float32)
        sums += value * _activations(source, k, inner, split_stride, GATE_UP_SPLITS)[None, :]
    # Neighbours are added to each other, again and again: in the same order, however threads hold them.
    for level in tl.static_range(1, CHUNK.bit_length()):
        sums = tl.sum(tl.reshape(sums, (BLOCK_N, CHUNK >> level, 2)), 2)
    return tl.reshape(sums, (BLOCK_N,))


@triton.jit
def _dot_quantised_rows(
    source: tl.tensor,
    split_stride: tl.tensor,
    weight: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    row: tl.tensor,
    place: tl.tensor,
    step: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    inner: tl.tensor,
    GATE_UP_SPLITS: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    WORD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tl.tensor:
    """Do as `_dot_rows`, for quantised weights, which come as words of WORD bytes; CHUNK is a multiple of 128.

    Each activation is made by one thread, for all rows. A word's values are added up before they are scaled.
    """
    HALVES: tl.constexpr = 2 if FORMAT == "int4" else 1
    UNITS: tl.constexpr = CHUNK // HALVES // WORD
    PARTS: tl.constexpr = CHUNK // 128  # of a chunk, with a scale each
    unit, index = tl.arange(0, UNITS), tl.arange(0, CHUNK // HALVES)
    length = row_length(inner, FORMAT) // WORD
    sums = tl.zeros((BLOCK_N, UNITS), tl.float32)
    offsets = tl.zeros((BLOCK_N,), tl.float32)
    for chunk in range(first, last):
        column = chunk * UNITS + unit
        raw = tl.load(weight + row[:, None] * length + column[None, :], mask=(column < length)[None, :], other=0)
        for half in tl.static_range(HALVES):
            k = chunk * CHUNK + index // (128 // HALVES) * 128 + half * 64 + index % (128 // HALVES)
            value = _activations(source, k, inner, split_stride, GATE_UP_SPLITS)
            start = chunk * CHUNK + tl.arange(0, PARTS) * 128 + half * 64
            at, there = place[:, None] + start[None, :] // GROUP * step, (start < inner)[None, :]
            scale = tl.load(scales + at, mask=there, other=0.0).to(tl.float32)
            number = _numbers(raw, half, FORMAT, WORD, BLOCK_N, UNITS)
            words = tl.reshape(value, (UNITS, WORD))
            if FORMAT == "int4":
                zero = tl.load(zeros + at, mask=there, other=0).to(tl.float32)
                total = tl.sum(tl.reshape(value, (PARTS, 64)), 1)
                offsets += tl.sum(zero * scale * total[None, :], 1)
                # Products become 2 ** -85 of what they should be, whichever byte and half: 2 ** 64, over 2 ** 8 in odd
                # bytes, over 2 ** 4 in high halves.
                even = tl.arange(0, 4) % 2 == 0
                words *= tl.where(even, 1.8446744073709552e19, 7.205759403792794e16)[None, :] / (16 if half else 1)
                scale *= 3.8685626227668134e25  # 2 ** 85
            part = tl.reshape(tl.sum(number * words[None, :, :], 2), (BLOCK_N, PARTS, UNITS // PARTS))
            sums += tl.reshape(part * scale[:, :, None], (BLOCK_N, UNITS))
    return tl.sum(sums, 1) - offsets


@triton.jit
def _numbers(
    raw: tl.tensor,
    HALF: tl.constexpr,
    FORMAT: tl.constexpr,
    WORD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNITS: tl.constexpr,
) -> tl.tensor:
    """Return the values of words of bytes, [BLOCK_N, UNITS, WORD], before they are scaled.

    Of int4 bytes, their low or high halves, times 2 ** -149 for HALF 0 and 2 ** -145 for HALF 1, and another 2 ** 8 in
    the odd bytes (`tiny_int4`).
    """
    if FORMAT == "int4":
        above = raw >> 16
        zero, one = tiny_int4(raw, 4 * HALF), tiny_int4(raw, 8 + 4 * HALF)
        two, three = tiny_int4(above, 4 * HALF), tiny_int4(above, 8 + 4 * HALF)
        return tl.reshape(tl.join(tl.join(zero, two), tl.join(one, three)), (BLOCK_N, UNITS, WORD))
    elif WORD == 4:
        zero, one = fp8_number(raw.to(tl.uint8), FORMAT), fp8_number((raw >> 8).to(tl.uint8), FORMAT)
        two, three = fp8_number((raw >> 16).to(tl.uint8), FORMAT), fp8_number((raw >> 24).to(tl.uint8), FORMAT)
        return tl.reshape(tl.join(tl.join(zero, two), tl.join(one, three)), (BLOCK_N, UNITS, WORD))
    else:
        return tl.reshape(fp8_number(raw.to(tl.uint8), FORMAT), (BLOCK_N, UNITS, WORD))


@triton.jit(do_not_specialize=("pairs",))
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
    WORD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Each program multiplies BLOCK_N rows of one pair's expert, over `part` chunks of the inner dimension."""
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
    own = tl.minimum(row, outer - 1)
    place, step = scale_places(own // (outer // 2), own % (outer // 2), outer // 2, inner, FORMAT, GROUP)
    y = _dot_rows(
        x + (pair // TOP_K).to(tl.int64) * inner, 0, w_gate_up + slot * slot_stride, scales + slot * scale_stride,
        zeros + slot * zero_stride, own.to(tl.int64), place, step, split * part,
        tl.minimum((split + 1) * part, tl.cdiv(inner, CHUNK)), inner, 0, FORMAT, GROUP, WORD, BLOCK_N, CHUNK,
    )  # fmt: skip
    tl.store(out + (split.to(tl.int64) * pairs + pair) * outer + row, y, mask=row < outer)


@triton.jit(do_not_specialize=("pairs",))
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
    WORD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
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
    own = tl.minimum(row, outer - 1)
    place, step = scale_places(0, own, outer, inner, FORMAT, GROUP)
    y = _dot_rows(
        gate_up + pair.to(tl.int64) * 2 * inner, tl.cast(pairs, tl.int64) * 2 * inner, w_down + slot * slot_stride,
        scales + slot * scale_stride, zeros + slot * zero_stride, own.to(tl.int64), place, step, split * part,
        tl.minimum((split + 1) * part, tl.cdiv(inner, CHUNK)), inner,
        GATE_UP_SPLITS, FORMAT, GROUP, WORD, BLOCK_N, CHUNK,
    )  # fmt: skip
    to = out + (split.to(tl.int64) * pairs + pair) * outer + row
    tl.store(to, y * tl.load(weights + pair), mask=row < outer)


# Rows per program; for quantised weights as many or half as many.
BLOCK_N = 8
QUANTISED_BLOCK_N = 64
# A GPU is full with about so many programs.
FULL = 2048
MAX_SPLITS = 8


def use_gemv(tokens: int, top_k: int, num_experts: int) -> bool:
    """Return whether a pass should take the GEMV form of the experts rather than the grouped GEMM.

    A GEMV reads an expert once for each pair that chose it, a GEMM once for all of them. So the GEMV form pays while
    pairs are no more than experts (on an H100, up to 4 tokens of Mixtral and 16 of Qwen3-30B).
    """
    return tokens * top_k <= num_experts


def gemv_splits(inner: int, outer: int, pairs: int, quantised: bool) -> int:
    """Return into how many parts (1 to 8) to split the inner dimension, so that the programs fill a GPU.

    Args:
        inner: elements of a row of the matrix: the hidden size for gate and up, the intermediate size for down.
        outer: rows of the matrix: twice the intermediate size for gate and up, the hidden size for down.
        pairs: `tokens * top_k`.
        quantised: whether the weights are.
    """
    # Not triton.cdiv: it takes microseconds, and this is asked twice a layer of every decode step.
    programs = max(pairs, 1) * -(-outer // (QUANTISED_BLOCK_N if quantised else BLOCK_N))
    units = -(-inner // PART_UNIT)
    splits = min(-(-FULL // programs), units, MAX_SPLITS)
    return -(-units // -(-units // splits))  # no part is empty


def _options(form: Form, matrices: int, inner: int, part: int) -> Form:
    """Choose the tile, so that each thread has loads of 16 bytes under way from several rows.

    Quantised weights: the best of 20 tiles on an H100, for parts of one or two chunks and for longer ones.

    Args:
        form: of the weights.
        matrices: 2 for gate and up, 1 for down.
        inner: elements of a row.
        part: elements of a row that a program takes.
    """
    if form["FORMAT"] in ("plain", "packed"):
        return form | {"WORD": 1, "BLOCK_N": BLOCK_N, "CHUNK": PART_UNIT, "num_warps": 4}
    long = part > 2 * PART_UNIT
    if form["FORMAT"] == "int4":
        rows, chunk, warps = (32, 128, 1) if matrices == 1 else (64, 256, 2) if long else (64, 128, 1)
    else:
        rows, chunk, warps = (64, 256, 4) if long else (32, 128, 2) if matrices == 2 else (32, 128, 1)
    word = 4
    if form["FORMAT"] != "int4" and inner % 4:
        word, rows, chunk, warps = 1, 16, 128, 4  # fewer values for each thread, or they are too many for its registers
    return form | {"WORD": word, "BLOCK_N": rows, "CHUNK": chunk, "num_warps": warps}


def _words(pool: tuple[Tensor, Tensor, Tensor], options: Form) -> tuple[Tensor, Tensor, Tensor]:
    """Return a pool's tensors with the weights as words."""
    w, scales, zeros = pool
    return w if options["WORD"] == 1 else w.view(torch.uint32), scales, zeros


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
    part = part_length(inner, splits)
    options = _options(kernel_form(w_gate_up, scales, 2, capability_of(x.device)), 2, inner, part)
    pool = _words(pools(w_gate_up, scales, zeros), options)
    if pairs > 0:
        _gate_up_gemv_kernel[(pairs, triton.cdiv(outer, options["BLOCK_N"]), splits)](
            x, *pool, slots, experts, out, *strides(*pool), pairs, inner, outer,
            part // options["CHUNK"], TOP_K=experts.shape[1], **options,
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
    part = part_length(inner, splits)
    options = _options(kernel_form(w_down, scales, 1, capability_of(gate_up.device)), 1, inner, part)
    pool = _words(pools(w_down, scales, zeros), options)
    if pairs > 0:
        _down_gemv_kernel[(pairs, triton.cdiv(outer, options["BLOCK_N"]), splits)](
            gate_up, *pool, slots, experts, weights, out, *strides(*pool), pairs, inner, outer,
            part // options["CHUNK"], GATE_UP_SPLITS=gate_up.shape[0], **options,
        )  # fmt: skip


def configurations(dtype: torch.dtype, capability: int) -> list[Configuration]:
    """List what the launchers choose: with few and with many partial sums, for each format."""
    types = dict.fromkeys(("slots", "experts"), "*i32:16") | {"out": "*fp32:16", "pairs": "i32"}
    types |= dict.fromkeys(("slot_stride", "inner", "outer"), "i32:16") | {"part": "i32"}
    found = []
    for form, pointers in example_forms(dtype, capability):
        quantised = {name: kind for name, kind in pointers.items() if name != "w"}
        weights = pointers["w"] if form["FORMAT"] in ("plain", "packed") else "*u32:16"
        gate_up = types | quantised | {"x": f"*{TRITON_TYPE[dtype]}:16", "w_gate_up": weights}
        down = types | quantised | {"gate_up": "*fp32:16", "w_down": weights, "weights": "*fp32:16"}
        if form["FORMAT"] == "fp8":  # with rows that are not whole words
            byte_by_byte = _options(form, 2, 2050, PART_UNIT) | {"TOP_K": 8}
            bytes_ = gate_up | {"w_gate_up": "*u8", "inner": "i32"}
            found.append(Configuration(_gate_up_gemv_kernel, bytes_, byte_by_byte))
        for part in (PART_UNIT, 4 * PART_UNIT):
            options = _options(form, 2, 2048, part) | {"TOP_K": 8}
            found.append(Configuration(_gate_up_gemv_kernel, gate_up, options, wide_loads=True))
            for splits in (1, MAX_SPLITS):
                options = _options(form, 1, 2048, part) | {"GATE_UP_SPLITS": splits}
                found.append(Configuration(_down_gemv_kernel, down, options, wide_loads=True))
    return found
