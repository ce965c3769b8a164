"""bfloat16 in 12 bits, without loss: rows of an expert as they cross the link, and the kernel that expands them.

A bfloat16 has a sign, eight bits of exponent and seven of mantissa. Weights that lie together have exponents close to
the largest of them: of normally distributed ones, all but one or two in 10,000 are within 15 binades. So a block of
16,384 values keeps its largest exponent less 15 (the floor), for each value sign and mantissa in a byte, and in four
bits how far its exponent is above the floor (the code), or 0 for an exponent of 0. The few other values, further down,
are patches: where in the block, and all their bits. Any bits come back as they were.

A packed row is, of a multiple of 128 values: the blocks; an int32 for each, `floor | end << 8`, where `end` is how many
patches it and those before it have; and the patches in the order of blocks, int32 `place + bits * 16384`. A block of n
values (the last one may be shorter) is three times n / 4 int16. With q the place in these, and in the quarters of the
block: the bytes of value q of the first two quarters; those of the last two; and the codes of all four, the first
quarter's always lowest. So a word of 32 bits of each becomes a word, two values, of each quarter.

Rows are multiples of 128 bytes, because GPUs read the host's memory in lines of so many. How many patches there is room
for is the same for all rows of a layer. A row of which more than a 64th of the values are patches does not pack.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from duomoe.kernels.configuration import Configuration
from duomoe.kernels.operator import operator

BLOCK = 16384
BINADES = 15
ALIGNMENT = 128
PATCHED_SHARE = 64

# Rows are packed and expanded so many blocks at a time: what is held besides fits into a core's cache.
SLICE = 4


def packed_bytes(values: int, patches: int) -> int:
    """Return the bytes of a packed row of so many values, a multiple of 128, with room for so many patches."""
    assert values % ALIGNMENT == 0 and values < 2**29
    size = values * 3 // 2 + 4 * (-(-values // BLOCK) + patches)
    return -(-size // ALIGNMENT) * ALIGNMENT


def most_patches(values: int) -> int:
    """Return how many patches a row of so many values may have; one that needs more does not pack."""
    return values // PATCHED_SHARE


def _sections(values: int, first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """Yield blocks of a row, from `first` up to `last`, in groups of equal ones: the first, how many, their values."""
    full = min(values // BLOCK, last)
    for block in range(first, full, SLICE):
        yield block, min(SLICE, full - block), BLOCK
    if last > full:
        yield full, 1, values - full * BLOCK


def _body(packed: Tensor, section: tuple[int, int, int]) -> Tensor:
    """Return a view of a section of a packed row, int16 [blocks, 3, n / 4]."""
    block, count, size = section
    return packed[block * BLOCK * 3 // 2 :][: count * size * 3 // 2].view(torch.int16).view(count, 3, -1)


def _tables(packed: Tensor, values: int) -> tuple[Tensor, Tensor]:
    """Return views of a packed row: what is known of each block, and the patches, int32."""
    tables = packed[values * 3 // 2 :].view(torch.int32)
    blocks = -(-values // BLOCK)
    return tables[:blocks], tables[blocks:]


def _bits(values: Tensor, section: tuple[int, int, int]) -> Tensor:
    """Return a view of a section of bfloat16 [values] as its bits by quarters, int16 [blocks, 4, n / 4]."""
    block, count, size = section
    return values[block * BLOCK :][: count * size].view(torch.int16).view(count, 4, -1)


def _codes(bits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return of bits, int16 [blocks, 4, n / 4], the floors [blocks, 1, 1], the codes, and which values are patches."""
    exponent = bits >> 7 & 255
    floor = (exponent.amax((1, 2), keepdim=True) - BINADES).clamp_(min=0)
    code = (exponent - floor).clamp_(min=0)
    return floor, code, (code == 0) & (exponent != 0)


def count_patches(values: Tensor) -> int:
    """Return how many patches a row on the host needs, bfloat16 [values]."""
    blocks = -(-len(values) // BLOCK)
    patched = (_codes(_bits(values, section))[2] for section in _sections(len(values), 0, blocks))
    return sum(int(each.sum()) for each in patched)  # host-sync ok: rows are packed on the host


def pack_bf16(values: Tensor, packed: Tensor) -> None:
    """Pack a row on the host.

    Args:
        values: bfloat16 [values].
        packed: uint8 [row bytes], overwritten; has room for the patches (`packed_bytes`).
    """
    blocks, patches = _tables(packed, len(values))
    used = 0
    for section in _sections(len(values), 0, len(blocks)):
        bits, body = _bits(values, section), _body(packed, section)
        floor, code, patched = _codes(bits)
        byte = bits >> 8 & 128 | bits & 127
        body[:, :2] = byte[:, ::2] | byte[:, 1::2] << 8
        body[:, 2] = code[:, 0] | code[:, 1] << 4 | code[:, 2] << 8 | code[:, 3] << 12
        block, place = patched.flatten(1).nonzero(as_tuple=True)  # host-sync ok: rows are packed on the host
        patches[used : used + len(place)] = place + (bits.flatten(1)[block, place].long() & 0xFFFF) * BLOCK
        ends = used + patched.sum((1, 2)).cumsum(0)
        blocks[section[0] : section[0] + section[1]] = floor[:, 0, 0] | ends << 8
        used += len(place)


def expand_blocks(packed: Tensor, out: Tensor, first: int, last: int) -> None:
    """Expand blocks of a row on the host, from `first` up to `last`.

    Args:
        packed: uint8 [row bytes].
        out: bfloat16 [values], written where those blocks are.
    """
    if first == last:
        return
    blocks, patches = _tables(packed, len(out))
    for section in _sections(len(out), first, last):
        body = _body(packed, section)
        floor = blocks[section[0] : section[0] + section[1], None, None].to(torch.int16) & 255
        byte = torch.stack((body[:, :2] & 255, body[:, :2] >> 8), 2).flatten(1, 2)
        code = torch.stack([body[:, 2] >> shift & 15 for shift in (0, 4, 8, 12)], 1)
        exponent = (floor + code).masked_fill_(code == 0, 0)
        _bits(out, section).copy_((byte & 128) << 8 | exponent << 7 | byte & 127)
    ends = [0, *(blocks >> 8).tolist()]  # host-sync ok: on the host
    for block in range(first, last):
        patch = patches[ends[block] : ends[block + 1]]
        out.view(torch.int16)[block * BLOCK + patch % BLOCK] = (patch // BLOCK).to(torch.int16)


def expand_bf16_reference(packed: Tensor, out: Tensor) -> None:
    """Compute `expand_bf16` with plain PyTorch, row by row."""
    for row, target in zip(packed, out, strict=True):
        expand_blocks(row, target, 0, -(-len(target) // BLOCK))


@operator(mutates_args=("out",))
def expand_bf16(packed: Tensor, out: Tensor) -> None:
    """Expand packed rows.

    Args:
        packed: uint8 [rows, row bytes]; where `out` is on a GPU, on it or in pinned memory of the host.
        out: bfloat16 [rows, values], written; `values` is a multiple of 128.
    """
    expand_bf16_reference(packed, out)


@expand_bf16.register_fake
def _(packed: Tensor, out: Tensor) -> None:
    return None


@triton.jit
def _expanded(byte: tl.tensor, code: tl.tensor, floor: tl.tensor) -> tl.tensor:
    """Return the bits of two values in a word, of what words have in the lower half of each half; floor is in both."""
    code = code & 0x000F000F
    not_zero = ((code + 0x000F000F) >> 4 & 0x00010001) * 255
    return (byte & 0x00800080) << 8 | ((floor + code) & not_zero) << 7 | byte & 0x007F007F


@triton.jit
def expand_block(row: tl.tensor, out: tl.tensor, values: tl.tensor, block: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Expand one block of a packed row at `row` into the row at `out`, both in words of 4 bytes.

    Packed rows are read once, so past the L1 cache. All that has a known place is asked for at once; the patches, which
    overwrite what the others have stored, are another wait.
    """
    quarter = tl.multiple_of(tl.minimum(values - block * BLOCK, BLOCK) // 8, 16)
    blocks = row + values // 8 * 3
    body = row + block * (BLOCK // 8 * 3)
    place = tl.arange(0, BLOCK // 8)
    mine = place < quarter
    known = tl.load(blocks + block)
    begin = tl.load(blocks + block - 1, mask=block > 0, other=0) >> 8
    first = tl.load(body + place, mask=mine, cache_modifier=".cg")
    second = tl.load(body + quarter + place, mask=mine, cache_modifier=".cg")
    codes = tl.load(body + 2 * quarter + place, mask=mine, cache_modifier=".cg")

    floor = (known & 255) * 0x00010001
    to = out + block * (BLOCK // 2)
    tl.store(to + place, _expanded(first, codes, floor), mask=mine)
    tl.store(to + quarter + place, _expanded(first >> 8, codes >> 4, floor), mask=mine)
    tl.store(to + 2 * quarter + place, _expanded(second, codes >> 8, floor), mask=mine)
    tl.store(to + 3 * quarter + place, _expanded(second >> 8, codes >> 12, floor), mask=mine)
    # A patch may lie where another thread has stored.
    tl.debug_barrier()
    patches = blocks + tl.cdiv(values, BLOCK)
    patched = to.to(tl.pointer_type(tl.int16))
    for start in range(begin, known >> 8, 128):
        index = start + tl.arange(0, 128)
        there = index < known >> 8
        patch = tl.load(patches + index, mask=there, other=0)
        tl.store(patched + patch % BLOCK, (patch // BLOCK).to(tl.int16), mask=there)


@triton.jit
def _expand_kernel(
    packed: tl.tensor,
    out: tl.tensor,
    packed_stride: tl.tensor,
    out_stride: tl.tensor,
    values: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Each program expands every so-many-th block of one row; strides are in words of 4 bytes."""
    row = tl.program_id(1).to(tl.int64)
    for block in range(tl.program_id(0), tl.cdiv(values, BLOCK), tl.num_programs(0)):
        expand_block(packed + row * packed_stride, out + row * out_stride, values, block, BLOCK)


_OPTIONS = {"BLOCK": BLOCK, "num_warps": 4}
# Programs for a row: with a block each on its way they hide a link's latency several times over, and leave most of the
# GPU to others. With half as many, other kernels' programs delay them more; with twice as many, nothing is gained.
PROGRAMS = 64


@expand_bf16.register_cuda
def expand_bf16_triton(packed: Tensor, out: Tensor) -> None:
    """Launch the kernel of `expand_bf16`."""
    rows, values = out.shape
    assert values % ALIGNMENT == 0 and packed.shape[1] % ALIGNMENT == 0, "rows are in lines of 128"
    if rows > 0:
        _expand_kernel[(min(triton.cdiv(values, BLOCK), PROGRAMS), rows)](
            packed.view(torch.int32),
            out.view(torch.int32),
            packed.stride(0) // 4,
            out.stride(0) // 2,
            values,
            **_OPTIONS,
        )


def configurations(dtype: torch.dtype, capability: int) -> list[Configuration]:
    """List the one configuration there is; it is for bfloat16, and the same for every GPU."""
    types = {"packed": "*i32:16", "out": "*i32:16"}
    types |= dict.fromkeys(("packed_stride", "out_stride", "values"), "i32:16")
    return [Configuration(_expand_kernel, types, _OPTIONS)]
