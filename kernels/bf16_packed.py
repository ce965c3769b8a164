"""bfloat16 in 12 bits, without loss: matrices whose values' exponents take four bits each.

A bfloat16 has a sign, eight bits of exponent and seven of mantissa. The weights of one output have exponents close to
the largest of them: of normally distributed ones, all but one in 10,000 are within 15 binades. So of each value there
are kept sign and mantissa in a byte, and in four bits a code, 1 to 15: its exponent is `base + code - 1`, with a base
for each output. A group of 8 values of which one is further away (or zero, beside large ones, or not finite) is a
patch: all its codes are 0, and its 16-bit values are in a table. Any bits come back as they were.

A matrix [outer, inner] is three tensors:

- weights uint8 [outer, padded inner * 3 / 2]: an output's bytes, then its codes. The inner dimension is padded to a
  multiple of 32. Bytes lie in the order 0, 2, 1, 3 of four values, so that a word of 32 bits, and the same shifted by
  a byte, has two neighbours where a word of two bfloat16 has them. The codes of eight values are a word, with those of
  values 2 i and 2 i + 1 at its bits 4 i and 16 + 4 i. The bytes of a patch begin with its number, an int32;
- bases uint8 [outer];
- patches int16 [room, 8]: there is the same room in all matrices of a size. One that needs more does not pack.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PADDING = 32
GROUP = 8
BYTE_ORDER = (0, 2, 1, 3)
CODE_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
MOST_CODE = 15
# There is room for so many patches, and one more for so many values.
FEWEST_PATCHES = 16
VALUES_PER_PATCH = 1024

# The same for kernels.
_PADDING, _FEWEST_PATCHES, _VALUES_PER_PATCH = (
    tl.constexpr(each) for each in (PADDING, FEWEST_PATCHES, VALUES_PER_PATCH)
)

# Outputs are packed so many values at a time: what is held besides fits into a core's cache.
SLICE = 1 << 17


def padded_size(inner: int) -> int:
    """Return how many values an output has with its padding."""
    return -(-inner // PADDING) * PADDING


def weight_bytes(inner: int) -> int:
    """Return how many bytes an output's weights take."""
    return padded_size(inner) * 3 // 2


def patch_room(outer: int, inner: int) -> int:
    """Return how many patches a matrix may have."""
    return FEWEST_PATCHES + outer * inner // VALUES_PER_PATCH


def pack_bf16(values: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Pack a matrix on the host, bfloat16 [outer, inner].

    Returns:
        Weights, bases and patches; None when it has more patches than there is room for.
    """
    outer, inner = values.shape
    size = padded_size(inner)
    weights = torch.empty(outer, weight_bytes(inner), dtype=torch.uint8)
    bases = torch.empty(outer, dtype=torch.uint8)
    patches = torch.zeros(patch_room(outer, inner), GROUP, dtype=torch.int16)
    shifts = torch.tensor(CODE_SHIFTS, dtype=torch.int32)
    used, step = 0, max(1, SLICE // size)
    for first in range(0, outer, step):
        last = min(first + step, outer)
        bits = torch.nn.functional.pad(values[first:last].view(torch.int16), (0, size - inner))
        exponent = bits >> 7 & 255
        base = (exponent.masked_fill(exponent == 255, 0).amax(1, keepdim=True) - (MOST_CODE - 1)).clamp_(min=0)
        exponent[:, inner:] = base  # what pads is finite, and needs no patch
        code = exponent.sub_(base).add_(1)
        far = ((code < 1) | (code > MOST_CODE)).view(last - first, -1, GROUP).any(2)
        row, group = far.nonzero(as_tuple=True)  # host-sync ok: packed on the host
        numbers = torch.arange(used, used + len(row), dtype=torch.int32)
        used += len(row)
        if used > len(patches):
            return None
        patches[numbers.long()] = bits.view(last - first, -1, GROUP)[row, group]
        words = (code.view(last - first, -1, GROUP).int() << shifts).sum(2, dtype=torch.int32)
        words[row, group] = 0
        bytes_ = (bits >> 8 & 128 | bits & 127).to(torch.uint8).view(last - first, -1, 4)[:, :, BYTE_ORDER]
        bytes_ = bytes_.reshape(last - first, size)
        bytes_.view(torch.int32).view(last - first, -1, 2)[row, group, 0] = numbers
        bases[first:last] = base[:, 0]
        weights[first:last, :size] = bytes_
        weights[first:last, size:] = words.view(torch.uint8)
    return weights, bases, patches


def unpack_bf16(weights: Tensor, bases: Tensor, patches: Tensor, inner: int) -> Tensor:
    """Undo `pack_bf16`, on any device: return bfloat16 [outer, inner]."""
    outer, size = len(weights), padded_size(inner)
    bytes_, words = weights[:, :size].contiguous(), weights[:, size:].contiguous().view(torch.int32)
    code = words[:, :, None] >> torch.tensor(CODE_SHIFTS, dtype=torch.int32, device=words.device) & 15
    byte = bytes_.view(outer, -1, 4)[:, :, BYTE_ORDER].reshape(outer, -1, GROUP).to(torch.int16)
    exponent = code.to(torch.int16) + bases[:, None, None].to(torch.int16) - 1
    bits = (byte & 128) << 8 | exponent << 7 | byte & 127
    row, group = (words == 0).nonzero(as_tuple=True)  # host-sync ok: a reference, for the CPU and tests
    bits[row, group] = patches[bytes_.view(torch.int32).view(outer, -1, 2)[row, group, 0].long()]
    return bits.view(outer, -1)[:, :inner].contiguous().view(torch.bfloat16)


@triton.jit
def weight_words(inner: tl.tensor) -> tl.tensor:
    """Return `weight_bytes` in words of 4 bytes."""
    return tl.cdiv(inner, _PADDING) * (_PADDING // 8 * 3)


@triton.jit
def patch_words(outer: tl.tensor, inner: tl.tensor) -> tl.tensor:
    """Return the size of a matrix's patches in words of 4 bytes, int64."""
    return (_FEWEST_PATCHES + tl.cast(outer, tl.int64) * inner // _VALUES_PER_PATCH) * 4


@triton.jit
def unpacked(
    weights: tl.tensor,
    bases: tl.tensor,
    patches: tl.tensor,
    first: tl.tensor,
    inner: tl.tensor,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
) -> tl.tensor:
    """Return some groups of some outputs as words of two bfloat16 each, int32 [ROWS, GROUPS * 4].

    What is behind an output's padding is finite.

    Args:
        weights: pointers to int32 [ROWS, 1], where the outputs begin.
        bases: int32 [ROWS, 1], the outputs'.
        patches: pointers to int32 [ROWS, 1], the outputs' matrices'.
        first: the first group.
        inner: values of an output.
        ROWS: how many outputs.
        GROUPS: how many groups of each.
    """
    two, eight = (2 * first + tl.arange(0, 2 * GROUPS))[None, :], (first + tl.arange(0, GROUPS))[None, :]
    bytes_at_end = tl.cdiv(inner, _PADDING) * (_PADDING // 4)
    bytes_ = tl.load(weights + two, mask=two < bytes_at_end, other=0)
    codes = tl.load(weights + bytes_at_end + eight, mask=2 * eight < bytes_at_end, other=0x11111111)
    low, high = tl.split(tl.reshape(bytes_, (ROWS, GROUPS, 2)))
    above = (bases - 1) * 0x00800080
    one, two = _pair(low, codes, above), _pair(low >> 8, codes >> 4, above)
    three, four = _pair(high, codes >> 8, above), _pair(high >> 8, codes >> 12, above)
    every = tl.reshape(tl.join(tl.join(one, three), tl.join(two, four)), (ROWS, GROUPS, 4))
    at = patches[:, :, None] + (low * 4)[:, :, None] + tl.arange(0, 4)[None, None, :]
    every = tl.load(at, mask=(codes == 0)[:, :, None], other=every)
    return tl.reshape(every, (ROWS, GROUPS * 4))


@triton.jit
def _pair(bytes_: tl.tensor, codes: tl.tensor, above: tl.tensor) -> tl.tensor:
    """Return two bfloat16 in a word, of what is in the lowest bits of either half; `above` is in both."""
    return (bytes_ & 0x00800080) << 8 | ((codes & 0x000F000F) * 128 + above) | (bytes_ & 0x007F007F)
