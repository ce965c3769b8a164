"""Rows, slots and the directory."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duomoe.experts.format import ALIGNMENT, packed_format, plain_format
from duomoe.experts.slots import SlotPool


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
    pool = SlotPool([row], n, torch.device("cpu"))
    pool.rows.zero_()
    (views,) = pool.views
    assert views["gate_up"].shape == (n, 2 * inner, hidden)
    assert views["down"].shape == (n, hidden, inner)
    for index, view in enumerate(views.values(), start=1):
        assert view[0].data_ptr() % ALIGNMENT == pool.rows.data_ptr() % ALIGNMENT
        view.fill_(index)
    for index, view in enumerate(views.values(), start=1):
        assert (view == index).all()


def test_a_slot_has_room_for_the_largest_row_of_any_layer() -> None:
    formats = [packed_format(64, 32), plain_format(64, 32, torch.bfloat16)]
    pool = SlotPool(formats, 3, torch.device("cpu"))
    assert pool.rows.shape == (3, formats[1].row_bytes)
    for views, each in zip(pool.views, formats, strict=True):
        for name, view in views.items():
            offset = view[1].data_ptr() - pool.rows[1].data_ptr()
            assert offset == each.tensors[name].offset and view.shape[1:] == each.tensors[name].shape
