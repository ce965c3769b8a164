"""bfloat16 in 12 bits: every pattern of bits comes back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import few, generator
from torch import Tensor

from duomoe.kernels.bf16_packed import pack_bf16, patch_room, unpack_bf16, weight_bytes


def packed(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of bit patterns, int16, packed."""
    found = pack_bf16(rows.view(torch.bfloat16))
    assert found is not None
    return found


def assert_comes_back(rows: Tensor) -> None:
    assert torch.equal(unpack_bf16(*packed(rows), rows.shape[1]).view(torch.int16), rows)


def weights(seed: int, outer: int, inner: int) -> Tensor:
    """The bits of normally distributed weights."""
    return (torch.randn(outer, inner, generator=generator(seed)) * 0.02).bfloat16().view(torch.int16)


def patches_of(rows: Tensor) -> int:
    words = packed(rows)[0][:, -(-rows.shape[1] // 32) * 32 :]
    return int((words.contiguous().view(torch.int32) == 0).sum())


def test_every_pattern_comes_back() -> None:
    """All of them, those of an exponent in an output of their own."""
    patterns = torch.arange(1 << 16)
    rows = patterns[(patterns >> 7 & 255).argsort(stable=True)].to(torch.int16).view(256, 256)
    assert len(set(rows.flatten().tolist())) == 1 << 16
    assert_comes_back(rows)
    assert patches_of(rows) == 256 // 8  # those of NaN and infinity


# Zeros, subnormals and what is far below the others, with either sign; and NaN and infinity.
strange = st.integers(0, 0x31FF) | st.integers(0x7F80, 0x7FFF)


@few
@given(
    shape=st.sampled_from([(1, 1), (3, 31), (7, 32), (5, 33), (2, 200), (16, 4096)]),
    strangers=st.lists(st.tuples(st.integers(0, 1 << 30), strange, st.booleans()), max_size=12),
    seed=st.integers(0, 99),
)
def test_strange_patterns_among_weights_come_back(
    shape: tuple[int, int], strangers: list[tuple[int, int, bool]], seed: int
) -> None:
    rows = weights(seed, *shape)
    for at, bits, negative in strangers:
        rows.view(-1)[at % rows.numel()] = bits - 0x8000 * negative
    assert_comes_back(rows)


@few
@given(seed=st.integers(0, 999), base=st.integers(0, 241))
def test_any_signs_and_mantissas_come_back(seed: int, base: int) -> None:
    """Values of any patterns whose exponents are within 15 binades, wherever these are; none is a patch."""
    bits = torch.randint(-(1 << 15), 1 << 15, (4, 130), generator=generator(seed)) & ~0x7F80
    exponents = torch.randint(base, min(base + 15, 255), bits.shape, generator=generator(seed + 1))
    rows = (bits | exponents << 7).to(torch.int16)
    rows[:, 0] = min(base + 14, 254) << 7
    assert_comes_back(rows)
    assert patches_of(rows) == 0


def test_a_patch_is_a_group_with_a_value_15_binades_below_the_largest() -> None:
    exponents = torch.full((2, 64), 100)
    exponents[0, [3, 17, 18, 40]] = torch.tensor([86, 85, 84, 0])
    exponents[1] = 0
    exponents[1, 9] = 14
    rows = (exponents << 7).to(torch.int16)
    assert patches_of(rows) == 2  # of values 16 to 23, and 40 to 47
    assert_comes_back(rows)


def test_what_needs_more_patches_than_there_is_room_for_does_not_pack() -> None:
    rows = weights(0, 64, 64)
    room = patch_room(64, 64)
    assert patches_of(rows) == 0
    for patch in range(room + 1):
        assert pack_bf16(rows.view(torch.bfloat16)) is not None
        rows[patch, 8 * (patch % 8)] = 1
    assert pack_bf16(rows.view(torch.bfloat16)) is None


@pytest.mark.parametrize(("outer", "inner"), [(768, 2048), (2048, 768), (14336, 4096)])
def test_three_quarters_of_the_bytes(outer: int, inner: int) -> None:
    found = packed(weights(0, min(outer, 2048), inner))
    assert found[0].shape == (min(outer, 2048), weight_bytes(inner))
    size = outer * (weight_bytes(inner) + 1) + 16 * patch_room(outer, inner)
    assert size < 0.759 * 2 * outer * inner
    assert 0 < patches_of(weights(0, 2048, inner)) < patch_room(2048, inner) / 6
