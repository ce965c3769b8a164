from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, DTYPES, ExpertLayer, expert_layer, few, generator, packed, quantised
from torch import Tensor

from duomoe.kernels import experts_down, experts_down_gemv, experts_gate_up, experts_gate_up_gemv, gemv_splits
from duomoe.kernels.expand import expand, expand_reference, expand_triton
from duomoe.kernels.quantised import expert_values

FORMS = ["fp8", "int4", "int4-64", "packed"]


def pool_of(form: str, hidden: int, intermediate: int, seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
    layer = expert_layer(seed, torch.float32, hidden, intermediate, 5, 2, 1)
    if form != "packed":
        layer = quantised(layer, form, seed)
        return layer.w_gate_up, *layer.gate_up_also  # type: ignore[return-value]
    # Some values are far from the others: patches, in the second of the stacked matrices, too.
    for row, column in ((0, 0), (intermediate + 1, hidden - 1), (intermediate - 1, 17), (2 * intermediate - 1, 3)):
        layer.w_gate_up[:, row, column % hidden] = 1e-30
    layer = packed(layer)
    return layer.w_gate_up, *layer.gate_up_also  # type: ignore[return-value]


@dataclass
class Run:
    """What a call has written, and what it was given."""

    out: Tensor
    table: list[int]
    slots: Tensor
    pool: tuple[Tensor, Tensor, Tensor | None]


def run(
    call: Callable[..., None],
    form: str,
    hidden: int,
    intermediate: int,
    dtype: torch.dtype,
    places: int,
    first: int,
    seed: int,
) -> Run:
    pool = pool_of(form, hidden, intermediate, seed)
    slots = torch.randperm(7, generator=generator(seed))[:5].to(torch.int32)
    slots[torch.rand(5, generator=generator(seed + 1)) < 0.3] = -1
    out = torch.full((places, 2 * intermediate, hidden), float("nan"), dtype=dtype, device=DEVICE)
    table = torch.full((5,), 99, dtype=torch.int32, device=DEVICE)
    call(*pool, 2, slots.to(DEVICE), first, out, table)
    return Run(out.cpu(), table.tolist(), slots, pool)


# The kernel writes packed values as they are, bfloat16: see below.
@pytest.mark.parametrize(
    ("call", "form"),
    [(expand_reference, form) for form in FORMS] + [(expand_triton, form) for form in FORMS if form != "packed"],
)
@settings(few, max_examples=5)
@given(
    shape=st.sampled_from([(130, 20), (64, 9), (260, 130)]),
    dtype=st.sampled_from(DTYPES),
    places=st.integers(1, 6),
    first=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_places_hold_the_experts_that_follow(
    call: Callable[..., None], form: str, shape: tuple[int, int], dtype: torch.dtype, places: int, first: int, seed: int
) -> None:
    found = run(call, form, *shape, dtype, places, first, seed)
    expected = [expert for expert in range(5) if found.slots[expert] >= 0][first : first + places]
    assert found.table == [expected.index(expert) if expert in expected else -1 for expert in range(5)]
    for place in range(places):
        if place < len(expected):
            values = expert_values(int(found.slots[expected[place]]), *found.pool, shape[0], 2)
            assert torch.equal(found.out[place], values.to(dtype).cpu())
        else:
            assert found.out[place].isnan().all()


@settings(few, max_examples=6)
@given(shape=st.sampled_from([(130, 20), (64, 9), (520, 40)]), places=st.integers(1, 6), seed=st.integers(0, 99))
def test_packed_values_come_back_by_the_kernel(shape: tuple[int, int], places: int, seed: int) -> None:
    args = ("packed", *shape, torch.bfloat16, places, 0, seed)
    found, expected = run(expand_triton, *args), run(expand_reference, *args)
    assert found.table == expected.table
    assert torch.equal(found.out.view(torch.int16), expected.out.view(torch.int16))


def test_op_keeps_its_promises() -> None:
    w, scales, zeros = pool_of("int4", 64, 8, 0)
    slots = torch.arange(5, dtype=torch.int32, device=DEVICE)
    out = torch.zeros(2, 16, 64, device=DEVICE)
    table = torch.zeros(5, dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(expand.overload, (w, scales, zeros, 2, slots, 1, out, table))


def products(layer: ExpertLayer) -> tuple[Tensor, Tensor]:
    """What the grouped GEMM makes of a pass."""
    order, offsets = layer.sorted_pairs()
    h = torch.full((layer.pairs, layer.intermediate), float("nan"), dtype=layer.x.dtype, device=DEVICE)
    out = torch.full((layer.pairs, layer.x.shape[1]), float("nan"), dtype=layer.x.dtype, device=DEVICE)
    top_k = layer.experts.shape[1]
    experts_gate_up(layer.x, layer.w_gate_up, layer.slots, order, offsets, top_k, h, *layer.gate_up_also)
    experts_down(h, layer.w_down, layer.slots, order, offsets, layer.weights, out, *layer.down_also)
    return h, out


# Tokens for tiles of every height, with pairs that fill none.
@pytest.mark.gpu
@pytest.mark.parametrize("form", ["fp8", "int4", "int4-64"])
@pytest.mark.parametrize(
    ("shape", "tokens"), [((2048, 768, 32, 8), (5, 40, 120, 900)), ((4096, 14336, 4, 2), (9, 300))]
)
def test_expanded_experts_give_the_bits_of_decoded_ones(
    form: str, shape: tuple[int, int, int, int], tokens: tuple[int, ...]
) -> None:
    """So that a policy that expands and one that does not give the same results."""
    for count in tokens:
        layer = quantised(expert_layer(count, torch.bfloat16, *shape, count), form)
        plain = replace(layer, gate_up_also=(None, None), down_also=(None, None))
        table = torch.empty_like(layer.slots)
        for name, also, inner, stacked in (
            ("w_gate_up", layer.gate_up_also, shape[0], 2),
            ("w_down", layer.down_also, shape[1], 1),
        ):
            w: Tensor = getattr(layer, name)
            out = torch.empty(len(table), w.shape[1], inner, dtype=torch.bfloat16, device=DEVICE)
            expand(w, *also, stacked, layer.slots, 0, out, table)
            plain = replace(plain, **{name: out}, slots=table)
        for decoded, expanded in zip(products(layer), products(plain), strict=True):
            assert torch.equal(decoded, expanded)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2048, 768, 16, 8), (4096, 14336, 4, 2)])
def test_packed_experts_give_the_bits_of_plain_ones(shape: tuple[int, int, int, int]) -> None:
    """In bfloat16, at sizes of real models, with as many splits as they get."""
    plain = expert_layer(0, torch.bfloat16, *shape, 1)
    hidden, intermediate, _, top_k = shape
    up_splits = gemv_splits(hidden, 2 * intermediate, top_k, False)
    down_splits = gemv_splits(intermediate, hidden, top_k, False)
    results = []
    for layer in (plain, packed(plain)):
        gate_up = torch.full((up_splits, top_k, 2 * intermediate), float("nan"), device=DEVICE)
        out = torch.full((down_splits, top_k, hidden), float("nan"), device=DEVICE)
        experts_gate_up_gemv(layer.x, layer.w_gate_up, layer.slots, layer.experts, gate_up, *layer.gate_up_also)
        given = (gate_up, layer.w_down, layer.slots, layer.experts, layer.weights, out)
        experts_down_gemv(*given, *layer.down_also)
        results.append((gate_up, out))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
