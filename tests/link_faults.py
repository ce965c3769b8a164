"""Copies over the link that fail."""

from typing import Any

import pytest

from duomoe.experts.link import HostLink


def fail_copy(patch: pytest.MonkeyPatch, number: int) -> None:
    """Let one piece of a copy fail, of those that are moved from now on the one with this number, from 0."""
    move, left = HostLink._move, [number]

    def faulty(self: HostLink, copy: Any, size: int) -> None:
        left[0] -= 1
        if left[0] == -1:
            raise OSError("a fault")
        move(self, copy, size)

    patch.setattr(HostLink, "_move", faulty)
