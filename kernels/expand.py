"""Some experts of a pool made plain, for a GEMM that reads each weight many times.

A GEMV decodes each weight for the few tokens that use it. A grouped GEMM would decode it once for every tile of tokens,
in the loop that feeds the tensor cores; where that is slow, the experts are written out first, as many at a time as
there is room for, and multiplied as plain ones.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from duomoe.kernels.bf16_packed import unpacked
from duomoe.kernels.configuration import TRITON_TYPE, Configuration
from duomoe.kernels.configuration import capability as capability_of
from duomoe.kernels.operator import operator
from duomoe.kernels.quantised import (
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


def expand_reference(
    w: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    matrices: int,
    slots: Tensor,
    first: int,
    out: Tensor,
    table: Tensor,
) -> None:
    """Compute `expand` with plain PyTorch, expert by expert."""
    table.fill_(-1)
    present = [expert for expert, slot in enumerate(slots.tolist()) if slot >= 0]  # host-sync ok: runs on the CPU
    for place, expert in enumerate(present[first : first + len(out)]):
        table[expert] = place
        out[place] = expert_values(int(slots[expert]), w, scales, zeros, out.shape[2], matrices).to(out.dtype)


@operator(mutates_args=("out", "table"))
def expand(
    w: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    matrices: int,
    slots: Tensor,
    first: int,
    out: Tensor,
    table: Tensor,
) -> None:
    """Write the values of some of the experts that are resident, rounded to the dtype of `out`.

    Args:
        w: [num_slots, …], the weights, a view into the slot pool; quantised or packed (quantised.py).
        scales: [num_slots, …], likewise.
        zeros: likewise; None for fp8.
        matrices: how many of equal size are stacked in `w`.
        slots: [experts] int32, the slot of each expert, -1 for those not in this wave.
        first: how many of the resident experts, in their order, to pass over.
        out: [places, outer, inner], written from the first place on with the experts that follow.
        table: [experts] int32, set to the place of each of these, -1 for all others: their slots in `out`.
    """
    expand_reference(w, scales, zeros, matrices, slots, first, out, table)


@expand.register_fake
def _(
    w: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    matrices: int,
    slots: Tensor,
    first: int,
    out: Tensor,
    table: Tensor,
) -> None:
    return None


@triton.jit(do_not_specialize=("first", "num_experts"))
def _expand_kernel(
    w: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    slots: tl.tensor,
    out: tl.tensor,
    table: tl.tensor,
    slot_stride: tl.tensor,
    scale_stride: tl.tensor,
    zero_stride: tl.tensor,
    first: tl.tensor,
    num_experts: tl.tensor,
    outer: tl.tensor,
    inner: tl.tensor,
    MATRICES: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """Each program writes ROWS rows of the expert that has its place; the first one writes the table."""
    place = tl.program_id(1)
    expert = tl.arange(0, BLOCK_E)
    slot_of = tl.load(slots + expert, mask=expert < num_experts, other=-1)
    rank = tl.cumsum((slot_of >= 0).to(tl.int32), 0) - 1 - first
    if (place == 0) & (tl.program_id(0) == 0):
        inside = (slot_of >= 0) & (rank >= 0) & (rank < tl.num_programs(1))
        tl.store(table + expert, tl.where(inside, rank, -1), mask=expert < num_experts)
    slot = tl.max(tl.where((slot_of >= 0) & (rank == place), slot_of, -1), 0).to(tl.int64)
    if slot < 0:
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = tl.minimum(row, outer - 1)
    height = outer // MATRICES
    at, step = scale_places(own // height, own % height, height, inner, FORMAT, GROUP)
    rows = w + slot * slot_stride + (own.to(tl.int64) * row_length(inner, FORMAT))[:, None]
    s, z = scales + slot * scale_stride, zeros + slot * zero_stride
    to = out + ((place.to(tl.int64) * outer + row) * inner)[:, None]
    DTYPE: tl.constexpr = out.dtype.element_ty
    if FORMAT == "packed":
        base = tl.load(s + at).to(tl.int32)[:, None]
        column = tl.arange(0, CHUNK)[None, :]
        for start in range(0, inner, CHUNK):
            pairs = unpacked(rows, base, (z + step)[:, None], start // 8, inner, ROWS, CHUNK // 8)
            both = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
            value = tl.reshape(both, (ROWS, CHUNK)).to(tl.bfloat16, bitcast=True)
            tl.store(to + start + column, value, mask=(row < outer)[:, None] & (start + column < inner))
    else:
        HALVES: tl.constexpr = 2 if FORMAT == "int4" else 1
        WIDTH: tl.constexpr = CHUNK // HALVES
        column = tl.arange(0, WIDTH)[None, :]
        length = row_length(inner, FORMAT)
        for start in range(0, inner, CHUNK):
            raw = tl.load(rows + start // HALVES + column, mask=start // HALVES + column < length, other=0)
            for half in tl.static_range(HALVES):
                k = start + half * WIDTH
                value = decoded(raw, s, z, at + tl.minimum(k, inner - 1) // GROUP * step, half, FORMAT, DTYPE)
                tl.store(to + k + column, value, mask=(row < outer)[:, None] & (k + column < inner))


def _options(form: Form, num_experts: int, matrices: int) -> Form:
    """Choose the tile: a few loads and stores of 16 bytes for each thread."""
    packed = form["FORMAT"] == "packed"
    tile = {"ROWS": 8, "CHUNK": 512} if packed else {"ROWS": 32, "CHUNK": 128}
    return form | tile | {"MATRICES": matrices, "BLOCK_E": triton.next_power_of_2(num_experts), "num_warps": 4}


@expand.register_cuda
def expand_triton(
    w: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    matrices: int,
    slots: Tensor,
    first: int,
    out: Tensor,
    table: Tensor,
) -> None:
    """Launch the kernel of `expand`."""
    places, outer, inner = out.shape
    options = _options(kernel_form(w, scales, matrices, capability_of(w.device)), len(slots), matrices)
    pool = pools(w, scales, zeros)
    _expand_kernel[(triton.cdiv(outer, options["ROWS"]), places)](
        *pool, slots, out, table, *strides(*pool), first, len(slots), outer, inner, **options
    )


def configurations(dtype: torch.dtype, capability: int) -> list[Configuration]:
    """List one configuration for each format but the plain one."""
    types = {"slots": "*i32:16", "table": "*i32:16", "out": f"*{TRITON_TYPE[dtype]}:16", "slot_stride": "i32:16"}
    types |= {"first": "i32", "num_experts": "i32", "outer": "i32:16", "inner": "i32:16"}
    forms = [(form, weights) for form, weights in example_forms(dtype, capability) if form["FORMAT"] != "plain"]
    return [
        Configuration(_expand_kernel, types | weights, _options(form, 128, 2), wide_loads=True)
        for form, weights in forms
    ]
