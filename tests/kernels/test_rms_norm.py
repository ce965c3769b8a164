import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DEVICE, assert_close, each_cpu_dtype, each_dtype, few, normal, on_cpu

from duomoe.kernels.rms_norm import (
    add_rms_norm,
    add_rms_norm_reference,
    add_rms_norm_triton,
    rms_norm,
    rms_norm_reference,
    rms_norm_triton,
)


@each_dtype
@few
@given(tokens=st.integers(0, 5), hidden=st.sampled_from([1, 24, 32, 224, 1000]), seed=st.integers(0, 99))
def test_kernels_match_the_references(dtype: torch.dtype, tokens: int, hidden: int, seed: int) -> None:
    x, residual = normal(seed, tokens, hidden, dtype=dtype), normal(seed + 1, tokens, hidden, dtype=dtype)
    weight = normal(seed + 2, hidden, dtype=dtype)
    assert_close(rms_norm_triton(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6))
    normed, total = add_rms_norm_triton(x, residual, weight, 1e-6)
    expected_normed, expected_total = add_rms_norm_reference(x, residual, weight, 1e-6)
    assert_close(normed, expected_normed)
    assert torch.equal(total, expected_total)


@each_dtype
def test_rows_may_be_strided_and_of_any_leading_shape(dtype: torch.dtype) -> None:
    x, weight = normal(0, 2, 3, 100, dtype=dtype)[..., :48], normal(1, 48, dtype=dtype)
    out = rms_norm_triton(x, weight, 1e-5)
    assert out.is_contiguous()
    assert_close(out, rms_norm_reference(x, weight, 1e-5))
    normed, total = add_rms_norm_triton(x, x, weight, 1e-5)
    assert_close(normed, rms_norm_reference(x + x, weight, 1e-5))
    assert torch.equal(total, x + x)


@each_dtype
def test_reference_is_rms_norm(dtype: torch.dtype) -> None:
    x, residual, weight = (normal(seed, *shape, dtype=dtype) for seed, shape in enumerate([(7, 96), (7, 96), (96,)]))
    expected = F.rms_norm(x.double(), (96,), weight.double(), 1e-6).to(dtype)
    assert_close(rms_norm_reference(x, weight, 1e-6), expected)
    normed, total = add_rms_norm_reference(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    assert_close(normed, F.rms_norm((x + residual).double(), (96,), weight.double(), 1e-6).to(dtype))


def test_ops_keep_their_promises() -> None:
    x, weight = normal(0, 3, 32), normal(1, 32)
    torch.library.opcheck(rms_norm.overload, (x, weight, 1e-6))
    torch.library.opcheck(rms_norm.overload, (normal(2, 3, 2, 40)[..., :32], weight, 1e-6))
    torch.library.opcheck(add_rms_norm.overload, (x, normal(3, 3, 32), weight, 1e-6))
    assert rms_norm(x, weight, 1e-6).device.type == DEVICE.type


@each_cpu_dtype
def test_on_a_cpu(dtype: torch.dtype) -> None:
    x, residual, weight = on_cpu(
        *(normal(seed, *shape, dtype=dtype) for seed, shape in enumerate([(7, 96)] * 2 + [(48,)]))
    )
    x, residual = x[:, 40:88], residual[:, :48]
    assert_close(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5))
    assert rms_norm(x, weight, 1e-5).is_contiguous()
    (normed, total), expected = (
        add_rms_norm(x, residual, weight, 1e-5),
        add_rms_norm_reference(x, residual, weight, 1e-5),
    )
    assert_close(normed, expected[0])
    assert torch.equal(total, expected[1])
