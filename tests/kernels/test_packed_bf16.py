"""bfloat16 in 12 bits: every pattern of bits comes back, by the reference and by the kernel."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, few, generator
from torch import Tensor

from duomoe.kernels.packed_bf16 import (
    BLOCK,
    count_patches,
    expand_bf16,
    expand_bf16_reference,
    expand_bf16_triton,
    expand_blocks,
    most_patches,
    pack_bf16,
    packed_bytes,
)

Expand = Callable[[Tensor, Tensor], None]
expanders = pytest.mark.parametrize("expand", [expand_bf16_reference, expand_bf16_triton])


def packed_rows(rows: Tensor) -> Tensor:
    """Rows of bit patterns, int16, packed."""
    room = max(count_patches(row.view(torch.bfloat16)) for row in rows)
    packed = torch.full((len(rows), packed_bytes(rows.shape[1], room)), 0xFF, dtype=torch.uint8)
    for row, target in zip(rows, packed, strict=True):
        pack_bf16(row.view(torch.bfloat16), target)
    return packed


def assert_comes_back(rows: Tensor, expand: Expand) -> None:
    out = torch.full(rows.shape, 0x7FFF, dtype=torch.int16, device=DEVICE)
    expand(packed_rows(rows).to(DEVICE), out.view(torch.bfloat16))
    assert torch.equal(out.cpu(), rows)


def weights(seed: int, rows: int, values: int) -> Tensor:
    """The bits of normally distributed weights."""
    return (torch.randn(rows, values, generator=generator(seed)) * 0.02).bfloat16().view(torch.int16)


@expanders
def test_every_pattern_comes_back(expand: Expand) -> None:
    """All of them in a row, in the order of their exponents."""
    patterns = torch.arange(1 << 16)
    row = patterns[(patterns >> 7 & 255).argsort(stable=True)].to(torch.int16)
    assert len(set(row.tolist())) == 1 << 16
    assert_comes_back(row[None], expand)


@expanders
@settings(few, max_examples=12)
@given(
    values=st.sampled_from([128, BLOCK - 128, BLOCK, BLOCK + 128, 2 * BLOCK + 2176]),
    strangers=st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(-(1 << 15), (1 << 15) - 1)), max_size=300),
    seed=st.integers(0, 99),
)
def test_any_patterns_among_weights_come_back(
    expand: Expand, values: int, strangers: list[tuple[int, int]], seed: int
) -> None:
    rows = weights(seed, 2, values)
    for at, bits in strangers:
        rows[0, at % values] = bits
    assert_comes_back(rows, expand)


@expanders
@settings(few, max_examples=6)
@given(values=st.sampled_from([128, 640, BLOCK + 256]), seed=st.integers(0, 999))
def test_values_of_any_patterns_come_back(expand: Expand, values: int, seed: int) -> None:
    bits = torch.randint(-(1 << 15), 1 << 15, (2, values), generator=generator(seed)).to(torch.int16)
    assert_comes_back(bits, expand)


@expanders
def test_zeros_come_back_and_need_no_patches(expand: Expand) -> None:
    rows = weights(0, 1, 3 * BLOCK)
    before = count_patches(rows[0].view(torch.bfloat16))
    rows[0, BLOCK : 2 * BLOCK : 3], rows[0, 1 : 2 * BLOCK : 3] = 0, -0x8000
    rows[0, 2 * BLOCK :] = 0
    rows[0, 2 * BLOCK :: 100] = 0x0001
    assert count_patches(rows[0].view(torch.bfloat16)) <= before
    assert_comes_back(rows, expand)


@expanders
def test_every_block_has_its_own_patches(expand: Expand) -> None:
    rows = weights(2, 2, 3 * BLOCK + 384)
    rows[0, 5::999], rows[1, 9::101] = 0x0101, 0x0202  # far below the others, and elsewhere in each block
    assert_comes_back(rows, expand)


@settings(few, max_examples=12)
@given(first=st.integers(0, 6), more=st.integers(0, 6))
def test_blocks_are_expanded_by_themselves(first: int, more: int) -> None:
    row = weights(first, 1, 5 * BLOCK + 384)[0]
    row[::999] = 0x0101  # far below the others
    out, last = torch.full_like(row, 0x7FFF), min(first + more, 6)
    expand_blocks(packed_rows(row[None])[0], out.view(torch.bfloat16), first, last)
    part = slice(first * BLOCK, last * BLOCK)
    assert torch.equal(out[part], row[part])
    assert (out[: first * BLOCK] == 0x7FFF).all() and (out[last * BLOCK :] == 0x7FFF).all()


def test_a_patch_is_what_is_15_binades_below_the_largest() -> None:
    exponents = torch.full((256,), 100)
    exponents[3:8] = torch.tensor([86, 85, 84, 1, 0])
    assert count_patches((exponents << 7).to(torch.int16).view(torch.bfloat16)) == 3  # 85, 84 and 1


def test_three_quarters_of_the_bytes() -> None:
    values = 3 * 2048 * 768
    patches = count_patches(weights(0, 1, values)[0].view(torch.bfloat16))
    assert 0 < patches < most_patches(values) // 50
    assert packed_bytes(values, patches) < 0.7505 * 2 * values
    assert packed_bytes(values, most_patches(values)) < 0.7816 * 2 * values


def test_op_keeps_its_promises() -> None:
    out = torch.zeros(2, 384, dtype=torch.bfloat16, device=DEVICE)
    torch.library.opcheck(expand_bf16.overload, (packed_rows(weights(0, 2, 384)).to(DEVICE), out))
