"""Pinning, where there is a GPU to pin for."""

import pytest
import torch

from duomoe.memory.pinned import pin


@pytest.mark.gpu
def test_pinned_rows_copy_correctly_and_can_be_pinned_again() -> None:
    rows = torch.randint(0, 255, (3, 5 << 20), dtype=torch.uint8)
    pin(rows)
    assert rows.is_pinned()
    assert torch.equal(rows.to("cuda", non_blocking=True).cpu(), rows)
    with pytest.warns(RuntimeWarning, match="cannot be pinned"):
        assert not pin(rows)  # it is already
    assert torch.ones(3, device="cuda").sum() == 3, "the refusal was taken for a failure of what came next"
