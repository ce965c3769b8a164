import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DEVICE, DTYPES, assert_close, each_cpu_dtype, each_dtype, few, generator, normal, on_cpu

from duomoe.kernels.combine import combine, combine_reference, combine_triton


@each_dtype
@few
@given(
    tokens=st.integers(0, 5),
    top_k=st.sampled_from([1, 2, 4, 8, 10]),
    splits=st.integers(1, 8),
    hidden=st.sampled_from([1, 24, 224, 600]),
    to=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_kernel_matches_the_reference_bit_for_bit(
    dtype: torch.dtype, tokens: int, top_k: int, splits: int, hidden: int, to: torch.dtype, seed: int
) -> None:
    experts = torch.randint(-1, 3, (tokens, top_k), generator=generator(seed)).to(DEVICE, torch.int32)
    parts = normal(seed, splits, tokens * top_k, hidden, dtype=dtype)
    parts[:, experts.flatten() < 0] = float("nan")  # Nobody writes a padding pair's part.
    assert torch.equal(combine_triton(parts, experts, to), combine_reference(parts, experts, to))


def test_reference_is_a_sum() -> None:
    parts = normal(0, 3, 5 * 4, 24)
    experts = torch.zeros(5, 4, dtype=torch.int32, device=DEVICE)
    experts[1:3, 2] = -1
    kept = torch.where(experts[None, :, :, None] >= 0, parts.double().view(3, 5, 4, 24), 0.0)
    assert_close(combine_reference(parts, experts, torch.float32), kept.sum((0, 2)).float())


def test_op_keeps_its_promises() -> None:
    experts = torch.zeros(5, 4, dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(combine.overload, (normal(0, 3, 20, 24), experts, torch.float16))


@each_cpu_dtype
@pytest.mark.parametrize("splits", [1, 3])
def test_on_a_cpu_bit_for_bit(dtype: torch.dtype, splits: int) -> None:
    parts, experts = on_cpu(normal(0, splits, 5 * 4, 24, dtype=dtype), torch.zeros(5, 4, dtype=torch.int32))
    assert torch.equal(combine(parts, experts, dtype), combine_reference(parts, experts, dtype))
    experts[1:3, 2] = -1
    parts[:, experts.flatten() < 0] = float("nan")
    kept = parts.clone()
    assert torch.equal(combine(parts, experts, dtype), combine_reference(parts, experts, dtype))
    assert torch.equal(parts.nan_to_num(), kept.nan_to_num())
    assert combine(parts[:, :0], experts[:0], dtype).shape == (0, 24)
