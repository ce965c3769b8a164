"""Rows, slots and the directory."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duomoe.experts.format import ALIGNMENT, plain_format
from duomoe.experts.slots import Directory, SlotPool


@given(
    hidden=st.integers(1, 70),
    inner=st.integers(1, 50),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    n=st.integers(1, 4),
)
@settings(deadline=None)
def test_views_cover_a_row_without_overlap(hidden: int, inner: int, dtype: torch.dtype, n: int) -> None:
    row = plain_format(hidden, inner, dtype)
    assert row.row_bytes % ALIGNMENT == 0
    pool = SlotPool(row, n, torch.device("cpu"))
    pool.rows.zero_()
    assert pool.views["gate_up"].shape == (n, 2 * inner, hidden)
    assert pool.views["down"].shape == (n, hidden, inner)
    for index, view in enumerate(pool.views.values(), start=1):
        assert view[0].data_ptr() % ALIGNMENT == pool.rows.data_ptr() % ALIGNMENT
        view.fill_(index)
    for index, view in enumerate(pool.views.values(), start=1):
        assert (view == index).all()


@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 9), max_size=5, unique=True)), max_size=8))
@settings(deadline=None)
def test_slot_of_and_owner_of_are_inverse(steps: list[tuple[int, list[int]]]) -> None:
    directory = Directory(4, 10, 5, torch.device("cpu"))
    for layer, experts in steps:
        slots = directory.hand_over(layer, experts)
        owners = {owner: slot for slot, owner in enumerate(directory.owner_of.tolist()) if owner >= 0}
        placed = {i: slot for i, slot in enumerate(directory.slot_of.flatten().tolist()) if slot >= 0}
        assert owners == placed == {layer * 10 + expert: slot for slot, expert in enumerate(experts)}
        assert slots.tolist() == [experts.index(e) if e in experts else -1 for e in range(10)]
