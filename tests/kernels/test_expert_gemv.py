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
    packed,
    quantised,
)
from torch import Tensor

from duomoe.kernels.combine import combine_reference
from duomoe.kernels.expert_gemv import (
    MAX_SPLITS,
    experts_down_gemv,
    experts_down_gemv_reference,
    experts_down_gemv_triton,
    experts_gate_up_gemv,
    experts_gate_up_gemv_reference,
    experts_gate_up_gemv_triton,
    gemv_splits,
    part_length,
    use_gemv,
)

shapes = st.sampled_from(
    # hidden, intermediate, experts, top_k
    [(224, 24, 60, 4), (520, 20, 8, 2), (32, 270, 4, 1), (70, 17, 5, 5), (40, 24, 16, 10)]
)


def poisoned(layer: ExpertLayer, splits: int, down_splits: int) -> tuple[Tensor, Tensor]:
    """Outputs of gate-up and down that show what was not written."""
    gate_up = torch.full((splits, layer.pairs, 2 * layer.intermediate), float("nan"), device=DEVICE)
    return gate_up, torch.full((down_splits, layer.pairs, layer.x.shape[1]), float("nan"), device=DEVICE)


def run_triton(layer: ExpertLayer, gate_up: Tensor, out: Tensor) -> None:
    experts_gate_up_gemv_triton(layer.x, layer.w_gate_up, layer.slots, layer.experts, gate_up, *layer.gate_up_also)
    experts_down_gemv_triton(gate_up, layer.w_down, layer.slots, layer.experts, layer.weights, out, *layer.down_also)


def run_reference(layer: ExpertLayer, gate_up: Tensor, out: Tensor) -> None:
    experts_gate_up_gemv_reference(layer.x, layer.w_gate_up, layer.slots, layer.experts, gate_up, *layer.gate_up_also)
    experts_down_gemv_reference(gate_up, layer.w_down, layer.slots, layer.experts, layer.weights, out, *layer.down_also)


def assert_computed(layer: ExpertLayer, splits: int, down_splits: int) -> None:
    """Compare with the references, and see that the pairs of absent experts stay poisoned."""
    results, expected = poisoned(layer, splits, down_splits), poisoned(layer, splits, down_splits)
    run_triton(layer, *results)
    run_reference(layer, *expected)
    resident = layer.resident()
    for result, wanted in zip(results, expected, strict=True):
        # Weights and activations are widened before they are multiplied, so even 16-bit inputs agree to float32.
        assert_close(result[:, resident], wanted[:, resident])
        assert result[:, ~resident].isnan().all()


@each_dtype
@settings(few, max_examples=5)
@given(
    shape=shapes,
    tokens=st.integers(0, 2),
    splits=st.sampled_from([(1, 1), (2, 1), (3, 2), (8, 8)]),
    absent=st.sampled_from([0.0, 0.5, 1.0]),
    padding=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 99),
)
@example(shape=(520, 270, 2, 1), tokens=1, splits=(1, 1), absent=0.0, padding=0.0, seed=0)
def test_kernels_match_the_references(
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    tokens: int,
    splits: tuple[int, int],
    absent: float,
    padding: float,
    seed: int,
) -> None:
    assert_computed(expert_layer(seed, dtype, *shape, tokens, absent, padding), *splits)


@each_dtype
@settings(few, max_examples=2)
@given(shape=st.sampled_from([(264, 20, 8, 2), (70, 17, 5, 5)]), waves=st.integers(2, 3), seed=st.integers(0, 99))
def test_waves_change_no_bit(dtype: torch.dtype, shape: tuple[int, int, int, int], waves: int, seed: int) -> None:
    layer = expert_layer(seed, dtype, *shape, 1)
    whole, in_waves = poisoned(layer, 2, 2), poisoned(layer, 2, 2)
    run_triton(layer, *whole)
    for wave in layer.waves(waves, seed):
        run_triton(wave, *in_waves)
    assert torch.equal(in_waves[0], whole[0])
    assert torch.equal(in_waves[1], whole[1])


@each_dtype
@pytest.mark.parametrize("form", ["fp8", "int4", "int4-64"])
@pytest.mark.parametrize(("shape", "splits"), [((330, 20), (2, 1)), ((72, 300), (1, 2))])
def test_quantised_weights_match_the_references(
    dtype: torch.dtype, shape: tuple[int, int], splits: tuple[int, int], form: str
) -> None:
    assert_computed(quantised(expert_layer(0, dtype, *shape, 3, 2, 1, absent=0.3), form), *splits)


@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_waves_change_no_bit_of_quantised_weights(form: str) -> None:
    layer = quantised(expert_layer(1, torch.float16, 40, 24, 4, 2, 1), form)
    whole, in_waves = poisoned(layer, 1, 1), poisoned(layer, 1, 1)
    run_triton(layer, *whole)
    for wave in layer.waves(2, 1):
        run_triton(wave, *in_waves)
    assert torch.equal(in_waves[0], whole[0])
    assert torch.equal(in_waves[1], whole[1])


@pytest.mark.parametrize(("shape", "splits"), [((330, 20), (2, 1)), ((72, 300), (1, 2)), ((600, 20), (1, 1))])
def test_packed_weights_give_the_bits_of_plain_ones(shape: tuple[int, int], splits: tuple[int, int]) -> None:
    layer = expert_layer(0, torch.float32, *shape, 3, 2, 2, absent=0.3)
    for w in (layer.w_gate_up, layer.w_down):
        w.copy_(w.bfloat16())  # values of bfloat16, in float32: the interpreter knows no other sums
        w[:, 5, 7] = w[:, 1, 3] = 1e-20  # patches
    plain, in_12_bits = poisoned(layer, *splits), poisoned(layer, *splits)
    run_triton(layer, *plain)
    run_triton(packed(layer), *in_12_bits)
    resident = layer.resident()
    for one, other in zip(plain, in_12_bits, strict=True):
        assert torch.equal(one[:, resident], other[:, resident])
    assert_computed(packed(layer), *splits)


@pytest.mark.parametrize("splits", [(1, 1), (3, 2), (8, 8)])
def test_references_are_the_sum_over_experts(splits: tuple[int, int]) -> None:
    layer = expert_layer(5, torch.float32, 600, 300, 8, 2, 5, absent=0.3, padding=0.2)
    gate_up, out = poisoned(layer, *splits)
    run_reference(layer, gate_up, out)
    computed = torch.where(layer.resident(), layer.experts.flatten(), -1).view_as(layer.experts)
    expected = moe_by_hand(layer).view(5, 2, 600).sum(1).to(DEVICE, torch.float32)
    assert_close(combine_reference(out, computed, torch.float32), expected)


@given(
    inner=st.integers(1, 20_000),
    outer=st.integers(1, 40_000),
    tokens=st.integers(0, 64),
    top_k=st.integers(1, 16),
    num_experts=st.integers(1, 512),
    quantised=st.booleans(),
)
def test_choices_are_sound(inner: int, outer: int, tokens: int, top_k: int, num_experts: int, quantised: bool) -> None:
    splits = gemv_splits(inner, outer, tokens * top_k, quantised)
    assert 1 <= splits <= MAX_SPLITS
    assert gemv_splits(inner, outer, tokens * top_k + 1, quantised) <= splits
    length = part_length(inner, splits)
    assert (splits - 1) * length < inner <= splits * length, "a part is empty"
    assert use_gemv(tokens, top_k, num_experts) or not use_gemv(tokens + 1, top_k, num_experts)


def test_one_token_takes_the_gemv() -> None:
    assert use_gemv(1, 2, 8)
    assert use_gemv(1, 8, 128)
    assert not use_gemv(1000, 2, 8)


def test_ops_keep_their_promises() -> None:
    layer = expert_layer(0, torch.float32, 32, 24, 8, 2, 2, absent=0.3)
    gate_up, out = (tensor.zero_() for tensor in poisoned(layer, 1, 1))
    torch.library.opcheck(
        experts_gate_up_gemv.overload, (layer.x, layer.w_gate_up, layer.slots, layer.experts, gate_up)
    )
    args = (gate_up, layer.w_down, layer.slots, layer.experts, layer.weights, out)
    torch.library.opcheck(experts_down_gemv.overload, args)


def run_on_cpu(layer: ExpertLayer, gate_up: Tensor, out: Tensor) -> None:
    experts_gate_up_gemv(layer.x, layer.w_gate_up, layer.slots, layer.experts, gate_up, *layer.gate_up_also)
    experts_down_gemv(gate_up, layer.w_down, layer.slots, layer.experts, layer.weights, out, *layer.down_also)


@each_cpu_dtype
@pytest.mark.parametrize("splits", [(1, 1), (3, 2)])
@pytest.mark.parametrize("form", ["plain", "packed", "int4"])
def test_on_a_cpu(dtype: torch.dtype, splits: tuple[int, int], form: str) -> None:
    layer = expert_layer(0, dtype, 520, 20, 8, 3, 3, absent=0.4, padding=0.2)
    layer = {"plain": lambda: layer, "packed": lambda: packed(layer), "int4": lambda: quantised(layer, "int4")}[form]()
    layer = layer.on_cpu()
    results, expected = ([tensor.cpu() for tensor in poisoned(layer, *splits)] for _ in range(2))
    run_on_cpu(layer, *results)
    run_reference(layer, *expected)
    resident = layer.resident()
    assert 0 < resident.sum() < len(resident)
    for result, wanted in zip(results, expected, strict=True):
        assert_close(result[:, resident], wanted[:, resident])
        assert result[:, ~resident].isnan().all()
    whole, in_waves = ([tensor.cpu() for tensor in poisoned(layer, *splits)] for _ in range(2))
    everywhere = replace(layer, slots=torch.arange(8, dtype=torch.int32))
    run_on_cpu(everywhere, *whole)
    for wave in everywhere.waves(3, 1):
        run_on_cpu(wave, *in_waves)
    for one, other in zip(whole, in_waves, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("shape", [(4096, 14336, 8, 2), (2048, 768, 128, 8)], ids=["mixtral", "qwen3"])
def test_real_layers_in_bfloat16(shape: tuple[int, int, int, int], tokens: int) -> None:
    hidden, intermediate, _, top_k = shape
    layer = expert_layer(0, torch.bfloat16, *shape, tokens, absent=0.25)
    pairs = tokens * top_k
    assert_computed(
        layer, gemv_splits(hidden, 2 * intermediate, pairs, False), gemv_splits(intermediate, hidden, pairs, False)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["fp8", "int4", "int4-64"])
@pytest.mark.parametrize("shape", [(4096, 14336, 8, 2), (2048, 768, 128, 8)], ids=["mixtral", "qwen3"])
def test_real_quantised_layers_in_bfloat16(shape: tuple[int, int, int, int], form: str) -> None:
    hidden, intermediate, _, top_k = shape
    layer = quantised(expert_layer(0, torch.bfloat16, *shape, 1, absent=0.25), form)
    assert_computed(
        layer, gemv_splits(hidden, 2 * intermediate, top_k, True), gemv_splits(intermediate, hidden, top_k, True)
    )
