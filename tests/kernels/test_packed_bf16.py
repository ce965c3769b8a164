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
    expand_bf16,
    expand_bf16_reference,
    expand_bf16_triton,
    pack_bf16,
    packed_layout,
)

Expand = Callable[[Tensor, Tensor], None]
expanders = pytest.mark.parametrize("expand", [expand_bf16_reference, expand_bf16_triton])


def packed_rows(rows: Tensor) -> Tensor | None:
    """Rows of bit patterns, int16, packed; None where one does not pack."""
    packed = torch.full((len(rows), packed_layout(rows.shape[1]).row_bytes), 0xFF, dtype=torch.uint8)
    fits = [pack_bf16(row.view(torch.bfloat16), target) for row, target in zip(rows, packed, strict=True)]
    return packed if all(fits) else None


def assert_comes_back(rows: Tensor, expand: Expand) -> None:
    packed = packed_rows(rows)
    assert packed is not None
    out = torch.full(rows.shape, 0x7FFF, dtype=torch.int16, device=DEVICE)
    expand(packed.to(DEVICE), out.view(torch.bfloat16))
    assert torch.equal(out.cpu(), rows)


def weights(seed: int, rows: int, values: int) -> Tensor:
    """The bits of normally distributed weights."""
    return (torch.randn(rows, values, generator=generator(seed)) * 0.02).bfloat16().view(torch.int16)


@expanders
def test_every_pattern_comes_back(expand: Expand) -> None:
    """A block for every 15 binades; what fills it up repeats its last pattern."""
    patterns = torch.arange(1 << 16).to(torch.int16)
    exponent = patterns.int() >> 7 & 255
    blocks = []
    for first in range(0, 256, 15):
        mine = patterns[(exponent >= first) & (exponent < first + 15)]
        blocks.append(torch.cat((mine, mine[-1:].expand(BLOCK - len(mine)))))
    row = torch.cat(blocks)
    assert len(set(row.tolist())) == 1 << 16
    assert_comes_back(row[None], expand)


@expanders
@settings(few, max_examples=12)
@given(
    values=st.sampled_from([1, 128, BLOCK - 1, BLOCK, BLOCK + 128, 2 * BLOCK + 2176]),
    strangers=st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(-(1 << 15), (1 << 15) - 1)), max_size=100),
    seed=st.integers(0, 99),
)
def test_any_patterns_among_weights_come_back(
    expand: Expand, values: int, strangers: list[tuple[int, int]], seed: int
) -> None:
    rows = weights(seed, 2, values)
    largest = int((rows.int() >> 7 & 255).max())
    for at, bits in strangers:
        rows[0, at % values] = bits
    if packed_rows(rows) is not None:
        assert_comes_back(rows, expand)
    else:  # only where something larger makes weights the ones that are far off
        assert any(bits >> 7 & 255 > largest for _, bits in strangers)


@expanders
@settings(few, max_examples=12)
@given(values=st.integers(1, 250), seed=st.integers(0, 999))
def test_few_values_of_any_patterns_come_back(expand: Expand, values: int, seed: int) -> None:
    bits = torch.randint(-(1 << 15), 1 << 15, (3, values), generator=generator(seed)).to(torch.int16)
    assert_comes_back(bits, expand)


@expanders
def test_zeros_and_the_largest_come_back(expand: Expand) -> None:
    rows = weights(0, 1, 3 * BLOCK)
    rows[0, 5], rows[0, BLOCK + 2048], rows[0, 3 * BLOCK - 1] = 0, -0x8000, 0
    rows[0, 2 * BLOCK :: 100] = 0x0001
    assert_comes_back(rows, expand)
    assert_comes_back(torch.zeros(1, BLOCK, dtype=torch.int16), expand)


def test_what_does_not_pack() -> None:
    layout = packed_layout(BLOCK)
    exact = weights(1, 1, BLOCK).abs().clamp(min=0x3800, max=0x3BFF)
    exact[0, : layout.patches] = 0
    assert packed_rows(exact) is not None
    exact[0, layout.patches] = 0
    assert packed_rows(exact) is None


def test_three_quarters_of_the_bytes() -> None:
    for hidden, intermediate in ((2048, 768), (4096, 14336)):
        values = 3 * hidden * intermediate
        assert packed_layout(values).row_bytes < 0.753 * 2 * values


def test_weights_pack() -> None:
    assert packed_rows(weights(0, 2, 1 << 18)) is not None


def test_op_keeps_its_promises() -> None:
    packed = packed_rows(weights(0, 2, 300))
    assert packed is not None
    out = torch.zeros(2, 300, dtype=torch.bfloat16, device=DEVICE)
    torch.library.opcheck(expand_bf16.overload, (packed.to(DEVICE), out))
