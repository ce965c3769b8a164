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


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 4)), max_size=60))
@settings(deadline=None)
def test_slot_of_and_owner_of_are_inverse(steps: list[tuple[int, int, int]]) -> None:
    directory = Directory(4, 10, 5, torch.device("cpu"))
    model: dict[int, tuple[int, int]] = {}  # slot -> owner
    for layer, expert, slot in steps:
        if (layer, expert) in model.values():
            held = next(key for key, owner in model.items() if owner == (layer, expert))
            assert directory.find(layer, expert) == held
            directory.vacate(held)
            del model[held]
        else:
            directory.place(layer, expert, slot)
            model[slot] = (layer, expert)
        assert {at: owner for at in range(5) if (owner := directory.owner(at))} == model
        for index in range(4):
            mine = {owner[1]: at for at, owner in model.items() if owner[0] == index}
            assert directory.slot_of[index].tolist() == [mine.get(e, -1) for e in range(10)]
            some = sorted(mine)[:2]
            found = directory.slots(index, some, torch.device("cpu")).tolist()
            assert found == [mine[e] if e in some else -1 for e in range(10)]
