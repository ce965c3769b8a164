"""The link on the CPU: asynchronous, in order, at its pace, and never silent about a fault."""

import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from duomoe import LLM
from duomoe.experts.link import HostLink, LinkError, Pace


def rows(count: int, size: int = 1000) -> torch.Tensor:
    return torch.randint(0, 255, (count, size), dtype=torch.uint8)


def test_copies_arrive_in_order_and_complete() -> None:
    link = HostLink()
    source, target = rows(50), torch.zeros(50, 1000, dtype=torch.uint8)
    copies = [link.send(source[i], target[i], link.mark()) for i in range(50)]
    link.wait(copies[-1])
    assert all(copy.arrived.is_set() for copy in copies)
    assert torch.equal(source, target)
    link.close()


def test_the_caller_goes_on_while_a_copy_is_under_way() -> None:
    link = HostLink(Pace(bandwidth=1e4))  # 1,000 bytes take 0.1 s
    target = torch.zeros(3, 1000, dtype=torch.uint8)
    copies = [link.send(row, slot) for row, slot in zip(rows(3), target, strict=True)]
    assert not copies[-1].arrived.is_set()
    link.wait(copies[-1])
    link.close()


def test_a_paced_copy_is_never_early() -> None:
    link = HostLink(Pace(bandwidth=1e5, latency=0.01))
    begin = time.perf_counter()
    target = torch.zeros(5, 1000, dtype=torch.uint8)
    for number, copy in enumerate([link.send(row, slot) for row, slot in zip(rows(5), target, strict=True)], start=1):
        link.wait(copy)
        assert time.perf_counter() - begin >= number * 0.02
    link.close()


def test_a_fault_reaches_the_one_who_waits_and_nobody_else() -> None:
    link = HostLink()
    good = torch.zeros(2, 1000, dtype=torch.uint8)
    first = link.send(rows(1)[0], good[0])
    broken = link.send(rows(1)[0], torch.zeros(7, dtype=torch.uint8))  # a row does not fit there
    link.wait(first)
    with pytest.raises(LinkError, match="could not be copied"):
        link.wait(broken)
    link.wait(link.send(rows(1)[0], good[1]))
    link.close()


def test_a_fault_that_nobody_waits_for_reaches_the_next_sender() -> None:
    link = HostLink()
    link.send(rows(1)[0], torch.zeros(7, dtype=torch.uint8)).arrived.wait()
    with pytest.raises(LinkError, match="could not be copied"):
        link.send(rows(1)[0], rows(1)[0])
    link.wait(link.send(rows(1)[0], rows(1)[0]))
    link.close()


def test_the_thread_ends_with_its_model(tiny: Callable[..., Any]) -> None:
    def links() -> int:
        return sum(thread.name == "duomoe-link" for thread in threading.enumerate())

    before = links()
    llm = LLM(tiny("mixtral").path, device="cpu", policy="lru", expert_memory="100KB")
    assert links() == before + 1
    del llm
    gc.collect()
    assert links() == before


def test_closing_leaves_nobody_waiting() -> None:
    link = HostLink(Pace(bandwidth=1e4))
    target = torch.zeros(4, 1000, dtype=torch.uint8)
    copies = [link.send(row, slot) for row, slot in zip(rows(4), target, strict=True)]
    errors = []

    def wait() -> None:
        try:
            link.wait(copies[-1])
        except LinkError as error:
            errors.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    link.close()
    waiter.join(5)
    assert not waiter.is_alive() and len(errors) == 1
    with pytest.raises(LinkError, match="closed"):
        link.send(target[0], target[1])
