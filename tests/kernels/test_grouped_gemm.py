from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DEVICE,
    ExpertLayer,
    assert_close,
    each_cpu_dtype,
    each_dtype,
    expert_layer,
    few,
    moe_by_hand,
    quantised,
)
from torch import Tensor

from duomoe.kernels.activations import quantise_activations_reference
from duomoe.kernels.grouped_gemm import (
    experts_down,
    experts_down_reference,
    experts_down_triton,
    experts_gate_up,
    experts_gate_up_reference,
    experts_gate_up_triton,
)

shapes = st.sampled_from(
    # hidden, intermediate, experts, top_k
    [(224, 24, 60, 4), (64, 32, 8, 2), (96, 40, 8, 2), (128, 64, 4, 1), (72, 136, 5, 5), (160, 96, 16, 8)]
)


def poisoned(layer: ExpertLayer) -> tuple[Tensor, Tensor]:
    """Outputs of gate-up and down that show what was not written."""
    shape = {"dtype": layer.x.dtype, "device": DEVICE}
    nan = float("nan")
    return (
        torch.full((layer.pairs, layer.intermediate), nan, **shape),
        torch.full((layer.pairs, layer.x.shape[1]), nan, **shape),
    )


def run_triton(layer: ExpertLayer, h: Tensor, out: Tensor) -> None:
    order, offsets = layer.sorted_pairs()
    experts_gate_up_triton(
        layer.x, layer.w_gate_up, layer.slots, order, offsets, layer.experts.shape[1], h, *layer.gate_up_also
    )
    experts_down_triton(h, layer.w_down, layer.slots, order, offsets, layer.weights, out, *layer.down_also)


def run_reference(layer: ExpertLayer, h: Tensor, out: Tensor) -> None:
    order, offsets = layer.sorted_pairs()
    experts_gate_up_reference(
        layer.x, layer.w_gate_up, layer.slots, order, offsets, layer.experts.shape[1], h, *layer.gate_up_also
    )
    experts_down_reference(h, layer.w_down, layer.slots, order, offsets, layer.weights, out, *layer.down_also)


def assert_computed(layer: ExpertLayer, h: Tensor, out: Tensor) -> None:
    """Compare with the references, and see that the pairs of absent experts are still poisoned."""
    expected_h, expected = poisoned(layer)
    run_reference(layer, expected_h, expected)
    resident = layer.resident()
    order, _ = layer.sorted_pairs()
    in_order = resident[order.long()]
    assert_close(h[in_order], expected_h[in_order])
    assert_close(out[resident], expected[resident])
    assert h[~in_order].isnan().all()
    assert out[~resident].isnan().all()


@each_dtype
@few
@given(
    shape=shapes,
    tokens=st.sampled_from([0, 1, 2, 17, 90]),
    absent=st.sampled_from([0.0, 0.5, 1.0]),
    padding=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 99),
)
def test_kernels_match_the_references(
    dtype: torch.dtype, shape: tuple[int, int, int, int], tokens: int, absent: float, padding: float, seed: int
) -> None:
    layer = expert_layer(seed, dtype, *shape, tokens, absent, padding)
    h, out = poisoned(layer)
    run_triton(layer, h, out)
    assert_computed(layer, h, out)


@each_dtype
@settings(few, max_examples=4)
@given(shape=shapes, tokens=st.sampled_from([1, 20]), waves=st.integers(2, 3), seed=st.integers(0, 99))
def test_waves_change_no_bit(
    dtype: torch.dtype, shape: tuple[int, int, int, int], tokens: int, waves: int, seed: int
) -> None:
    layer = expert_layer(seed, dtype, *shape, tokens)
    h, out = poisoned(layer)
    run_triton(layer, h, out)
    h_of_waves, out_of_waves = poisoned(layer)
    for wave in layer.waves(waves, seed):
        run_triton(wave, h_of_waves, out_of_waves)
    assert torch.equal(h_of_waves, h)
    assert torch.equal(out_of_waves, out)


@each_dtype
@settings(few, max_examples=4)
@given(
    shape=st.sampled_from([(224, 24, 6, 2), (96, 144, 5, 2), (192, 64, 4, 1)]),
    tokens=st.sampled_from([1, 17]),
    form=st.sampled_from(["fp8", "int4", "int4-64"]),
    seed=st.integers(0, 99),
)
@example(shape=(136, 272, 2, 1), tokens=3, form="fp8", seed=0)
@example(shape=(136, 272, 2, 1), tokens=3, form="int4-64", seed=0)
def test_quantised_weights_match_the_references_in_any_waves(
    dtype: torch.dtype, shape: tuple[int, int, int, int], tokens: int, form: str, seed: int
) -> None:
    layer = quantised(expert_layer(seed, dtype, *shape, tokens, absent=0.3), form, seed)
    h, out = poisoned(layer)
    run_triton(layer, h, out)
    assert_computed(layer, h, out)
    h_of_waves, out_of_waves = poisoned(layer)
    for wave in layer.waves(2, seed):
        run_triton(wave, h_of_waves, out_of_waves)
    assert torch.equal(h_of_waves.nan_to_num(), h.nan_to_num())
    assert torch.equal(out_of_waves.nan_to_num(), out.nan_to_num())


def check_fp8_activations(layer: ExpertLayer, waves: int) -> None:
    """Compare with the references, both with the same activations in fp8; and in waves, where not a bit may differ."""
    (h, out), (expected_h, expected) = poisoned(layer), poisoned(layer)
    order, offsets = layer.sorted_pairs()
    x, x_scales = quantise_activations_reference(layer.x)

    def gate_up(layer: ExpertLayer, function: Callable[..., None], h: Tensor) -> None:
        top_k = layer.experts.shape[1]
        function(x, layer.w_gate_up, layer.slots, order, offsets, top_k, h, *layer.gate_up_also, x_scales)

    def down(layer: ExpertLayer, function: Callable[..., None], out: Tensor) -> None:
        function(h8, layer.w_down, layer.slots, order, offsets, layer.weights, out, *layer.down_also, h_scales)

    gate_up(layer, experts_gate_up_triton, h)
    gate_up(layer, experts_gate_up_reference, expected_h)
    h8, h_scales = quantise_activations_reference(h.nan_to_num())
    down(layer, experts_down_triton, out)
    down(layer, experts_down_reference, expected)
    resident = layer.resident()
    in_order = resident[order.long()]
    assert_close(h[in_order], expected_h[in_order])
    assert_close(out[resident], expected[resident])
    assert h[~in_order].isnan().all()
    assert out[~resident].isnan().all()
    h_of_waves, out_of_waves = poisoned(layer)
    for wave in layer.waves(waves, 1):
        gate_up(wave, experts_gate_up_triton, h_of_waves)
        down(wave, experts_down_triton, out_of_waves)
    assert torch.equal(h_of_waves[in_order], h[in_order])
    assert torch.equal(out_of_waves[resident], out[resident])


@settings(few, max_examples=4)
@given(
    shape=st.sampled_from([(224, 24, 6, 2), (96, 144, 5, 2), (192, 64, 4, 1)]),
    tokens=st.sampled_from([1, 17]),
    seed=st.integers(0, 99),
)
@example(shape=(136, 272, 2, 1), tokens=3, seed=0)
@example(shape=(136, 144, 2, 1), tokens=140, seed=0)
def test_fp8_on_both_sides(shape: tuple[int, int, int, int], tokens: int, seed: int) -> None:
    check_fp8_activations(quantised(expert_layer(seed, torch.float16, *shape, tokens, absent=0.3), "fp8", seed), 2)


@each_dtype
def test_all_tokens_may_choose_one_expert(dtype: torch.dtype) -> None:
    layer = expert_layer(0, dtype, 64, 32, 8, 1, 150)
    layer.experts.fill_(3)
    h, out = poisoned(layer)
    run_triton(layer, h, out)
    assert_computed(layer, h, out)


@pytest.mark.parametrize("shape", [(224, 24, 60, 4), (64, 32, 8, 2)])
def test_references_are_the_sum_over_experts(shape: tuple[int, int, int, int]) -> None:
    layer = expert_layer(5, torch.float32, *shape, 9, absent=0.3, padding=0.2)
    h, out = poisoned(layer)
    run_reference(layer, h, out)
    assert_close(out.nan_to_num(), moe_by_hand(layer).to(DEVICE, torch.float32))
    assert torch.equal(out.isnan().all(1), ~layer.resident())


def test_ops_keep_their_promises() -> None:
    layer = expert_layer(0, torch.float32, 32, 24, 8, 2, 5, absent=0.3)
    order, offsets = layer.sorted_pairs()
    h, out = (tensor.zero_() for tensor in poisoned(layer))
    torch.library.opcheck(experts_gate_up.overload, (layer.x, layer.w_gate_up, layer.slots, order, offsets, 2, h))
    torch.library.opcheck(experts_down.overload, (h, layer.w_down, layer.slots, order, offsets, layer.weights, out))


def run_on_cpu(layer: ExpertLayer, h: Tensor, out: Tensor) -> None:
    order, offsets = layer.sorted_pairs()
    top_k = layer.experts.shape[1]
    experts_gate_up(layer.x, layer.w_gate_up, layer.slots, order, offsets, top_k, h, *layer.gate_up_also)
    experts_down(h, layer.w_down, layer.slots, order, offsets, layer.weights, out, *layer.down_also)


@each_cpu_dtype
@pytest.mark.parametrize("bf16_weights", [0, 1 << 16])
@pytest.mark.parametrize("form", ["plain", "int4", "fp8"])
def test_on_a_cpu(dtype: torch.dtype, bf16_weights: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duomoe.kernels.grouped_gemm.BF16_WEIGHTS", bf16_weights)
    layer = expert_layer(0, dtype, 136, 37, 8, 3, 31, absent=0.4, padding=0.2)
    layer = (layer if form == "plain" else quantised(layer, form)).on_cpu()
    (h, out), (expected_h, expected) = ([tensor.cpu() for tensor in poisoned(layer)] for _ in range(2))
    run_on_cpu(layer, h, out)
    run_reference(layer, expected_h, expected)
    resident, order = layer.resident(), layer.sorted_pairs()[0].long()
    assert 0 < resident.sum() < len(resident)
    assert_close(h[resident[order]], expected_h[resident[order]])
    assert_close(out[resident], expected[resident])
    assert h[~resident[order]].isnan().all()
    assert out[~resident].isnan().all()
    whole, in_waves = ([tensor.cpu() for tensor in poisoned(layer)] for _ in range(2))
    everywhere = replace(layer, slots=torch.arange(8, dtype=torch.int32), experts=layer.experts.clamp(min=0))
    run_on_cpu(everywhere, *whole)
    run_reference(everywhere, expected_h, expected)
    assert_close(whole[0], expected_h)
    assert_close(whole[1], expected)
    for wave in everywhere.waves(3, 1):
        run_on_cpu(wave, *in_waves)
    for one, other in zip(whole, in_waves, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 100, 2000])
@pytest.mark.parametrize("shape", [(4096, 14336, 8, 2), (2048, 768, 128, 8)], ids=["mixtral", "qwen3"])
def test_real_layers_in_bfloat16(shape: tuple[int, int, int, int], tokens: int) -> None:
    layer = expert_layer(0, torch.bfloat16, *shape, tokens, absent=0.25)
    h, out = poisoned(layer)
    run_triton(layer, h, out)
    assert_computed(layer, h, out)
    h_of_waves, out_of_waves = poisoned(layer)
    for wave in layer.waves(3, 1):
        run_triton(wave, h_of_waves, out_of_waves)
    resident = layer.resident()
    assert torch.equal(out_of_waves[resident], out[resident])


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["fp8", "int4", "int4-64"])
@pytest.mark.parametrize("tokens", [1, 100, 2000])
@pytest.mark.parametrize("shape", [(4096, 14336, 8, 2), (2048, 768, 128, 8)], ids=["mixtral", "qwen3"])
def test_real_quantised_layers_in_bfloat16(shape: tuple[int, int, int, int], tokens: int, form: str) -> None:
    layer = quantised(expert_layer(0, torch.bfloat16, *shape, tokens, absent=0.25), form)
    h, out = poisoned(layer)
    run_triton(layer, h, out)
    assert_computed(layer, h, out)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [100, 2000])
@pytest.mark.parametrize("shape", [(4096, 14336, 8, 2), (2048, 768, 128, 8)], ids=["mixtral", "qwen3"])
def test_real_layers_in_fp8_on_both_sides(shape: tuple[int, int, int, int], tokens: int) -> None:
    check_fp8_activations(quantised(expert_layer(0, torch.bfloat16, *shape, tokens, absent=0.25), "fp8"), 3)


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    """100,000 tokens of top-8: pair * hidden, and slot * stride, pass 2 ** 31."""
    hidden, intermediate, num_experts, slots = 2752, 64, 16, 2500
    layer = expert_layer(0, torch.bfloat16, hidden, intermediate, num_experts, 8, 100_000)
    pool_gate_up = torch.empty(slots, 3 * intermediate, hidden * 2, dtype=torch.bfloat16, device=DEVICE)
    w_gate_up = pool_gate_up[:, : 2 * intermediate, :hidden].as_strided(
        (slots, 2 * intermediate, hidden), (pool_gate_up.stride(0), hidden, 1)
    )
    far = torch.arange(slots - num_experts, slots, dtype=torch.int32, device=DEVICE)
    w_gate_up[far.long()] = layer.w_gate_up[layer.slots.long()]
    h, out = poisoned(layer)
    order, offsets = layer.sorted_pairs()
    experts_gate_up_triton(layer.x, w_gate_up, far, order, offsets, 8, h)
    experts_down_triton(h, layer.w_down, layer.slots, order, offsets, layer.weights, out)
    assert out.numel() > 2**31
    assert w_gate_up.stride(0) * slots > 2**31
    assert_computed(layer, h, out)
