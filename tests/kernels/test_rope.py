import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DEVICE, assert_close, each_cpu_dtype, each_dtype, few, generator, normal, on_cpu
from torch import Tensor

from duomoe.kernels.rope import rope_and_cache, rope_and_cache_reference, rope_and_cache_triton


def angles(seed: int, tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    angle = normal(seed, tokens, head_dim // 2, scale=10.0)
    return angle.cos(), angle.sin()


@each_dtype
@few
@given(
    tokens=st.integers(0, 6),
    head_dim=st.sampled_from([32, 48, 64, 80, 96, 128]),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 5),
    page_size=st.sampled_from([1, 3, 16]),
    normed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_kernel_matches_the_reference(
    dtype: torch.dtype,
    tokens: int,
    head_dim: int,
    kv_heads: int,
    group: int,
    page_size: int,
    normed: bool,
    seed: int,
) -> None:
    heads = (group + 2) * kv_heads
    qkv = normal(seed, tokens, heads * head_dim, dtype=dtype)
    cos, sin = angles(seed + 1, tokens, head_dim)
    norms = [normal(seed + 2 + i, head_dim, dtype=dtype) if normed else None for i in range(2)]
    pages = 2 + tokens // page_size
    rows = torch.randperm(pages * page_size, generator=generator(seed))[:tokens].to(DEVICE)
    rows[: tokens // 3] = -1
    # The pages are one layer of a larger pool, as the runtime keeps them.
    shape = (2, 2, pages, page_size, kv_heads, head_dim)
    stored, expected_stored = (torch.full(shape, 7.0, dtype=dtype, device=DEVICE) for _ in range(2))
    q = rope_and_cache_triton(qkv, cos, sin, *stored[1], rows, *norms, 1e-6)
    expected = rope_and_cache_reference(qkv, cos, sin, *expected_stored[1], rows, *norms, 1e-6)
    assert_close(q, expected)
    assert_close(stored, expected_stored)
    assert torch.equal(stored == 7.0, expected_stored == 7.0)  # Nothing else was written.


def test_one_norm_may_be_missing() -> None:
    qkv, (cos, sin) = normal(0, 3, 4 * 32), angles(1, 3, 32)
    rows, norm = torch.arange(3, device=DEVICE), normal(2, 32)
    for norms in ((norm, None), (None, norm)):
        pages, expected_pages = (torch.zeros(2, 1, 4, 1, 32, device=DEVICE) for _ in range(2))
        q = rope_and_cache_triton(qkv, cos, sin, *pages, rows, *norms, 1e-6)
        assert_close(q, rope_and_cache_reference(qkv, cos, sin, *expected_pages, rows, *norms, 1e-6))
        assert_close(pages, expected_pages)


@pytest.mark.parametrize("head_dim", [32, 80])
def test_reference_turns_complex_numbers(head_dim: int) -> None:
    qkv, (cos, sin) = normal(0, 5, 4 * head_dim), angles(1, 5, head_dim)
    pages = torch.zeros(2, 5, 1, 1, head_dim, device=DEVICE)
    q = rope_and_cache_reference(qkv, cos, sin, *pages, torch.arange(5, device=DEVICE), None, None, 0.0)
    halves = qkv.view(5, 4, 2, head_dim // 2)
    turned = torch.complex(halves[:, :, 0], halves[:, :, 1]) * torch.complex(cos, sin)[:, None]
    expected = torch.cat((turned.real, turned.imag), -1)
    assert_close(q, expected[:, :2])
    assert_close(pages[0].flatten(0, 1), expected[:, 2:3])
    assert torch.equal(pages[1].flatten(0, 1), qkv.view(5, 4, head_dim)[:, 3:])


def test_op_keeps_its_promises() -> None:
    k_pages, v_pages = torch.zeros(2, 2, 3, 2, 32, device=DEVICE)
    rows = torch.tensor([5, -1, 0], device=DEVICE)
    args = (normal(0, 3, 8 * 32), *angles(1, 3, 32), k_pages, v_pages.clone(), rows, normal(2, 32), normal(3, 32), 1e-6)
    torch.library.opcheck(rope_and_cache.overload, args)


@each_cpu_dtype
@pytest.mark.parametrize("norms", ["both", "q", "k", "none"])
def test_on_a_cpu(dtype: torch.dtype, norms: str) -> None:
    qkv, cos, sin = on_cpu(normal(0, 6, 8 * 48, dtype=dtype), *angles(1, 6, 48))
    q_norm, k_norm = on_cpu(normal(2, 48, dtype=dtype), normal(3, 48, dtype=dtype))
    q_norm, k_norm = q_norm if norms in ("both", "q") else None, k_norm if norms in ("both", "k") else None
    for rows in (torch.tensor([5, 6, 0, 8, 2, 3]), torch.tensor([-1, 6, -1, 8, 2, 3])):
        pages, expected_pages = (torch.full((2, 3, 3, 2, 48), 7.0, dtype=dtype) for _ in range(2))
        q = rope_and_cache(qkv, cos, sin, *pages, rows, q_norm, k_norm, 1e-6)
        expected = rope_and_cache_reference(qkv, cos, sin, *expected_pages, rows, q_norm, k_norm, 1e-6)
        assert_close(q, expected)
        assert q.is_contiguous()
        assert_close(pages, expected_pages)
        assert torch.equal(pages == 7.0, expected_pages == 7.0)  # Nothing else was written.
