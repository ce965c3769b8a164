"""The forms of quantised matrices: PyTorch against element by element, the kernels' loader against PyTorch."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import DEVICE, ExpertLayer, each_dtype, expert_layer, few, generator, quantised

from duomoe.kernels.configuration import capability
from duomoe.kernels.grouped_gemm import experts_down_triton, experts_gate_up_triton
from duomoe.kernels.quantised import (
    decoded,
    dequantise,
    expert_values,
    kernel_form,
    pack_int4,
    packed_width,
    pools,
    unpack_int4,
)


@given(outer=st.integers(1, 5), inner=st.integers(1, 400), seed=st.integers(0, 99))
@few
def test_int4_bytes_hold_values_64_apart(outer: int, inner: int, seed: int) -> None:
    values = torch.randint(16, (outer, inner), generator=generator(seed), dtype=torch.uint8)
    packed = pack_int4(values)
    assert packed.shape == (outer, packed_width(inner))
    assert torch.equal(unpack_int4(packed, inner), values)
    for k in range(inner):
        chunk, within = divmod(k, 128)
        byte = packed[:, chunk * 64 + within % 64]
        assert torch.equal(byte // 16 if within >= 64 else byte % 16, values[:, k])


@pytest.mark.parametrize("shape", [(300, 72), (128, 256), (40, 200)])
@pytest.mark.parametrize("form", ["fp8", "int4", "int4-64"])
def test_values_are_weights_times_scales_of_their_own(form: str, shape: tuple[int, int]) -> None:
    """Every value of the stacked gate and up, from the definition."""
    hidden, intermediate = shape
    layer = quantised(expert_layer(0, torch.float32, hidden, intermediate, 1, 1, 1), form)
    w, (scales, zeros) = layer.w_gate_up[1].cpu(), (None if t is None else t[1].cpu() for t in layer.gate_up_also)
    found = dequantise(w, scales, zeros, hidden, matrices=2)
    group, unit = (128, 128) if form == "fp8" else (64 if form == "int4-64" else 128, 1)
    weight = w.float() if form == "fp8" else unpack_int4(w, hidden).float()
    groups = len(scales) // 2
    for row in range(2 * intermediate):
        matrix, within = divmod(row, intermediate)
        for k in range(0, hidden, 7):
            at = matrix * groups + k // group, within // unit
            zero = 0 if zeros is None else int(zeros[at])
            assert float(found[row, k]) == float((weight[row, k] - zero) * scales[at].float())


@triton.jit
def _decode_kernel(raw: tl.tensor, scales: tl.tensor, out: tl.tensor, FORMAT: tl.constexpr) -> None:
    """One program decodes all 256 bytes, each a row of its own with a scale of its own."""
    place = tl.arange(0, 256)
    value = decoded(tl.load(raw + place)[:, None], scales, scales, place, 0, FORMAT, tl.float32)
    tl.store(out + place[:, None], value)


@pytest.mark.parametrize("converted", ["fp8_bits", pytest.param("fp8", marks=pytest.mark.gpu)])
def test_every_fp8_value(converted: str) -> None:
    if converted == "fp8" and capability(DEVICE) < 89:
        pytest.skip("this GPU does not convert fp8")
    raw = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    scales = torch.rand(256, generator=generator(0)).to(DEVICE)
    out = torch.empty(256, device=DEVICE)
    _decode_kernel[(1,)](raw, scales, out, FORMAT=converted)
    expected = raw.view(torch.float8_e4m3fn).float() * scales
    assert torch.equal(out.isnan(), expected.isnan())
    # As bits, for the zeros' signs.
    assert torch.equal(out.nan_to_num().view(torch.int32), expected.nan_to_num().view(torch.int32))


def plain(layer: ExpertLayer) -> ExpertLayer:
    """A quantised layer's values, rounded to its activations' dtype."""
    slots, hidden, dtype = range(len(layer.w_down)), layer.x.shape[1], layer.x.dtype
    gate_up = [expert_values(s, layer.w_gate_up, *layer.gate_up_also, hidden, matrices=2) for s in slots]
    down = [expert_values(s, layer.w_down, *layer.down_also, layer.intermediate) for s in slots]
    w_gate_up, w_down = torch.stack(gate_up).to(dtype), torch.stack(down).to(dtype)
    return ExpertLayer(layer.x, w_gate_up, w_down, layer.slots, layer.experts, layer.weights)


@each_dtype
@pytest.mark.parametrize("form", ["fp8", "int4", "int4-64"])
def test_a_quantised_gemm_is_that_of_its_rounded_values(form: str, dtype: torch.dtype) -> None:
    layer = quantised(expert_layer(1, dtype, 200, 136, 3, 1, 9), form)
    order, offsets = layer.sorted_pairs()
    results = []
    for each in (layer, plain(layer)):
        h = torch.empty(layer.pairs, layer.intermediate, dtype=dtype, device=DEVICE)
        out = torch.empty_like(layer.x)
        experts_gate_up_triton(each.x, each.w_gate_up, each.slots, order, offsets, 1, h, *each.gate_up_also)
        experts_down_triton(h, each.w_down, each.slots, order, offsets, each.weights, out, *each.down_also)
        results.append(out)
    # Only the order of additions within a step of the inner dimension may differ.
    torch.testing.assert_close(*results, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-5)


def test_kernels_without_fp8_get_its_bits() -> None:
    layer = quantised(expert_layer(0, torch.float16, 40, 24, 2, 1, 1), "fp8")
    scales, _ = layer.gate_up_also
    assert kernel_form(layer.w_gate_up, scales, 2, 86)["FORMAT"] == "fp8_bits"
    assert kernel_form(layer.w_gate_up, scales, 2, 89)["FORMAT"] == "fp8"
    assert pools(layer.w_gate_up, scales, None)[0].dtype == torch.uint8
