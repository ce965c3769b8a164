"""bfloat16 in 12 bits, without loss: rows of an expert as they cross the link, and the kernel that expands them.

A bfloat16 has a sign, eight bits of exponent and seven of mantissa. Weights that lie together have exponents close to
the largest of them: of normally distributed ones, all but one or two in 10,000 are within 15 binades. So a block of
4,096 values keeps its largest exponent (the base), for each value sign and mantissa in a byte and the exponent's
distance from the base in four bits, and for the few values that are further off (15 in the four bits, zeros among
them) a patch: where it is in the block, and its exponent. Any bits come back as they were.

A packed row is, each part 256-byte aligned: sign and mantissa, a byte per value; distances, of which byte j of a block
holds that of value j in its low half and that of value 2,048 + j in its high half; bases, a byte per block; for each
block where its patches end (int32); and the patches of all blocks in order, int32 `place | exponent << 12`. Room for
them is a 1,024th of the values, or 256. A row that needs more does not pack.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from duomoe.kernels.configuration import Configuration
from duomoe.kernels.operator import operator

BLOCK = 4096
ESCAPE = 15
ALIGNMENT = 256

# Rows are packed so many blocks at a time: what is held besides fits into a core's cache.
SLICE = 16


@dataclass(frozen=True)
class PackedLayout:
    """Where the parts of a packed row begin, in bytes."""

    blocks: int
    patches: int  # room for so many
    distances_at: int
    bases_at: int
    ends_at: int
    patches_at: int
    row_bytes: int

    def parts(self, row: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the parts of a packed row, uint8 [row_bytes], by block: [blocks, …], and the patches as they are."""
        ends = row[self.ends_at : self.ends_at + 4 * self.blocks].view(torch.int32)
        return (
            row[: self.blocks * BLOCK].view(-1, BLOCK),
            row[self.distances_at : self.distances_at + self.blocks * BLOCK // 2].view(-1, BLOCK // 2),
            row[self.bases_at : self.bases_at + self.blocks],
            ends,
            row[self.patches_at : self.patches_at + 4 * self.patches].view(torch.int32),
        )


def packed_layout(values: int) -> PackedLayout:
    """Return how a row of so many bfloat16 values is packed."""
    blocks, patches = -(-values // BLOCK), max(values // 1024, 256)
    offsets = [0]
    for size in (blocks * BLOCK, blocks * BLOCK // 2, blocks, 4 * blocks, 4 * patches):
        offsets.append(-(-(offsets[-1] + size) // ALIGNMENT) * ALIGNMENT)
    return PackedLayout(blocks, patches, *offsets[1:])


def pack_bf16(values: Tensor, packed: Tensor) -> bool:
    """Pack a row on the host.

    Args:
        values: bfloat16 [values].
        packed: uint8 [packed_layout(len(values)).row_bytes], overwritten.

    Returns:
        Whether it fits; if not, `packed` holds nothing of use.
    """
    layout = packed_layout(len(values))
    signs_and_mantissas, distances, bases, ends, patches = layout.parts(packed)
    used = 0
    for first in range(0, layout.blocks, SLICE):
        last = min(first + SLICE, layout.blocks)
        bits = values[first * BLOCK : last * BLOCK].view(torch.int16)
        filling = (last - first) * BLOCK - len(bits)
        bits = F.pad(bits, (0, filling)).view(-1, BLOCK)
        exponent = bits >> 7 & 255
        base = exponent.amax(1, keepdim=True)
        distance = base - exponent
        distance[-1, BLOCK - filling :] = 0  # what fills the last block up needs no patches
        escapes = distance >= ESCAPE
        block, place = escapes.nonzero(as_tuple=True)
        if used + len(place) > layout.patches:
            return False
        patches[used : used + len(place)] = place | exponent[block, place].long() << 12
        ends[first:last] = used + escapes.sum(1).cumsum(0)
        used += len(place)
        distance = distance.clamp_(max=ESCAPE)
        signs_and_mantissas[first:last] = bits >> 8 & 128 | bits & 127
        distances[first:last] = distance[:, : BLOCK // 2] | distance[:, BLOCK // 2 :] << 4
        bases[first:last] = base[:, 0]
    return True


def expand_bf16_reference(packed: Tensor, out: Tensor) -> None:
    """Compute `expand_bf16` with plain PyTorch, row by row."""
    layout = packed_layout(out.shape[1])
    for row, target in zip(packed, out, strict=True):
        signs_and_mantissas, distances, bases, ends, patches = layout.parts(row)
        exponent = bases[:, None].int() - torch.cat((distances & 15, distances >> 4), 1).int()
        patches = patches[: int(ends[-1])]  # host-sync ok: the reference runs on the CPU
        block = torch.searchsorted(ends, torch.arange(len(patches), device=ends.device, dtype=torch.int32), right=True)
        exponent[block, patches & (BLOCK - 1)] = patches >> 12
        byte = signs_and_mantissas.int()
        bits = (byte & 128) << 8 | exponent << 7 | byte & 127
        target.copy_(bits.flatten()[: len(target)].to(torch.int16).view(torch.bfloat16))


@operator(mutates_args=("out",))
def expand_bf16(packed: Tensor, out: Tensor) -> None:
    """Expand packed rows.

    Args:
        packed: uint8 [rows, packed_layout(values).row_bytes].
        out: bfloat16 [rows, values], written.
    """
    expand_bf16_reference(packed, out)


@expand_bf16.register_fake
def _(packed: Tensor, out: Tensor) -> None:
    return None


@triton.jit
def _expanded(byte: tl.tensor, exponent: tl.tensor) -> tl.tensor:
    """Return the bits of bfloat16 values, int16, of their signs and mantissas and their exponents."""
    byte = byte.to(tl.int32)
    return ((byte & 128) << 8 | exponent << 7 | byte & 127).to(tl.int16)


@triton.jit
def _expand_kernel(
    packed: tl.tensor,
    out: tl.tensor,
    packed_stride: tl.tensor,
    out_stride: tl.tensor,
    values: tl.tensor,
    distances_at: tl.tensor,
    bases_at: tl.tensor,
    ends_at: tl.tensor,
    patches_at: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Each program expands one block of one row; the patches go into the registers, before anything is stored."""
    block = tl.program_id(0)
    row = packed + tl.program_id(1).to(tl.int64) * packed_stride
    HALF: tl.constexpr = BLOCK // 2
    place = tl.arange(0, HALF)
    low_byte = tl.load(row + block * BLOCK + place)
    high_byte = tl.load(row + block * BLOCK + HALF + place)
    distance = tl.load(row + distances_at + block * HALF + place).to(tl.int32)
    base = tl.load(row + bases_at + block).to(tl.int32)
    low, high = base - (distance & 15), base - (distance >> 4)

    ends = (row + ends_at).to(tl.pointer_type(tl.int32))
    patches = (row + patches_at).to(tl.pointer_type(tl.int32))
    begin = tl.load(ends + block - 1, mask=block > 0, other=0)
    for index in range(begin, tl.load(ends + block)):
        patch = tl.load(patches + index)
        low = tl.where(place == patch % BLOCK, patch >> 12, low)
        high = tl.where(place + HALF == patch % BLOCK, patch >> 12, high)

    first = block * BLOCK + place
    to = out + tl.program_id(1).to(tl.int64) * out_stride + first
    tl.store(to, _expanded(low_byte, low), mask=first < values)
    tl.store(to + HALF, _expanded(high_byte, high), mask=first + HALF < values)


@expand_bf16.register_cuda
def expand_bf16_triton(packed: Tensor, out: Tensor) -> None:
    """Launch the kernel of `expand_bf16`."""
    layout = packed_layout(out.shape[1])
    if len(out) > 0:
        _expand_kernel[(layout.blocks, len(out))](
            packed, out.view(torch.int16), packed.stride(0), out.stride(0), out.shape[1],
            layout.distances_at, layout.bases_at, layout.ends_at, layout.patches_at, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


def configurations(dtype: torch.dtype, capability: int) -> list[Configuration]:
    """List the one configuration there is; it is for bfloat16, and the same for every GPU."""
    types = {
        "packed": "*u8:16",
        "out": "*i16:16",
        "values": "i32:16",
        "packed_stride": "i32:16",
        "out_stride": "i32:16",
    }
    types |= dict.fromkeys(("distances_at", "bases_at", "ends_at", "patches_at"), "i32:16")
    return [Configuration(_expand_kernel, types, {"BLOCK": BLOCK, "num_warps": 4})]
