"""Rows, slots and the directory."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duomoe.experts.format import ALIGNMENT, plain_format
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
    pool = SlotPool(row, n, torch.device("cpu"))
    pool.rows.zero_()
    assert pool.views["gate_up"].shape == (n, 2 * inner, hidden)
    assert pool.views["down"].shape == (n, hidden, inner)
    for index, view in enumerate(pool.views.values(), start=1):
        assert view[0].data_ptr() % ALIGNMENT == pool.rows.data_ptr() % ALIGNMENT
        view.fill_(index)
    for index, view in enumerate(pool.views.values(), start=1):
        assert (view == index).all()
