from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DEVICE, DTYPES, expert_layer, few, generator, packed, quantised
from torch import Tensor

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


@pytest.mark.parametrize("call", [expand_reference, expand_triton])
@pytest.mark.parametrize("form", FORMS)
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
    if form == "packed" and dtype != torch.bfloat16 and call is expand_triton:
        return  # its values are written as they are, bfloat16
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
