"""Packing on a GPU gives the bytes that packing on the host gives."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DEVICE, few, generator
from torch import Tensor

from duomoe.kernels.bf16_packed import pack_bf16, patch_room
from duomoe.kernels.pack import pack


def packs(values: Tensor) -> bool:
    """Whether a matrix packs; then its bytes are those of the host."""
    expected, (*found, fits) = pack_bf16(values), pack(values.to(DEVICE))
    assert bool(fits) == (expected is not None)
    for ours, reference in zip(found, expected or (), strict=expected is not None):
        assert torch.equal(ours.cpu(), reference)
    return bool(fits)


# Zeros, subnormals and what is far below the others, with either sign; and NaN and infinity.
strange = st.integers(0, 0x31FF) | st.integers(0x7F80, 0x7FFF)


@few
@given(
    shape=st.sampled_from([(1, 1), (3, 31), (7, 32), (5, 33), (2, 200), (3, 1024), (2, 1064), (1, 2056)]),
    strangers=st.lists(st.tuples(st.integers(0, 1 << 30), strange, st.booleans()), max_size=12),
    seed=st.integers(0, 99),
)
def test_the_same_bytes_as_on_the_host(
    shape: tuple[int, int], strangers: list[tuple[int, int, bool]], seed: int
) -> None:
    values = (torch.randn(shape, generator=generator(seed)) * 0.02).bfloat16()
    for at, bits, negative in strangers:
        values.view(torch.int16).view(-1)[at % values.numel()] = bits - 0x8000 * negative
    assert packs(values)


def test_every_pattern() -> None:
    patterns = torch.arange(1 << 16)
    rows = patterns[(patterns >> 7 & 255).argsort(stable=True)].to(torch.int16).view(256, 256)
    assert packs(rows.view(torch.bfloat16))


def test_as_many_patches_as_there_is_room_for() -> None:
    values = (torch.randn(64, 64, generator=generator(0)) * 0.02).bfloat16()
    for patch in range(patch_room(64, 64)):
        values[patch, 8 * (patch % 8)] = 0
    assert packs(values)
    values[63, 63] = 0
    assert not packs(values)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(768, 2048), (2048, 768), (14336, 4096)])
def test_matrices_of_real_size(shape: tuple[int, int]) -> None:
    values = (torch.randn(shape, generator=generator(1)) * 0.02).bfloat16()
    values[shape[0] // 2, : shape[1] // 2] = 0
    assert packs(values)
