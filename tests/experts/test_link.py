"""The link on the CPU: asynchronous, in order, at its pace, and never silent about a fault."""

import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from duomoe import LLM
from duomoe.experts.link import Copy, HostLink, LinkError, Pace


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


def test_a_fault_belongs_to_its_copy_alone() -> None:
    link = HostLink()
    broken = link.send(rows(1)[0], torch.zeros(7, dtype=torch.uint8))
    ahead = link.send_ahead(Copy(rows(1)[0], torch.zeros(7, dtype=torch.uint8)))
    link.wait(link.send(rows(1)[0], rows(1)[0]))
    for copy in (broken, broken, ahead, link.promote(ahead)):  # whoever waits for it, whenever
        with pytest.raises(LinkError, match="could not be copied"):
            link.wait(copy)
    link.wait(link.send(rows(1)[0], rows(1)[0]))
    link.close()


def test_the_thread_ends_with_its_model(tiny: Callable[..., Any]) -> None:
    def links() -> int:
        return sum(thread.name == "duomoe-link" for thread in threading.enumerate())

    gc.collect()  # those of other tests
    before = links()
    llm = LLM(tiny("mixtral").path, device="cpu", policy="lru", expert_memory="100KB")
    assert links() == before + 1
    llm.close()
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


def test_a_copy_sent_ahead_makes_way_and_goes_on_where_it_stood() -> None:
    link = HostLink(Pace(bandwidth=1e6))  # a row takes 0.1 s
    source, target = rows(2, 100_000), torch.zeros(2, 100_000, dtype=torch.uint8)
    ahead = link.send_ahead(Copy(source[0], target[0]))
    while ahead.moved == 0:
        time.sleep(0.001)
    urgent = link.send(source[1], target[1])
    link.wait(urgent)
    assert 0 < ahead.moved < 100_000 and not link.has_arrived(ahead)
    link.recall()
    time.sleep(0.03)  # the piece that was on its way
    stood = ahead.moved
    time.sleep(0.05)
    assert ahead.moved == ahead.ahead == link.ahead_bytes == stood < 100_000
    assert torch.equal(target[0, :stood], source[0, :stood]) and not target[0, stood:].any()
    link.wait(link.promote(ahead))
    assert torch.equal(target, source)
    assert ahead.ahead == link.ahead_bytes == stood  # the rest was no prefetch
    link.close()


def test_a_copy_sent_ahead_is_whole_when_nothing_else_wants_the_link() -> None:
    link = HostLink()
    source, target = rows(3), torch.zeros(3, 1000, dtype=torch.uint8)
    copies = [link.send_ahead(Copy(row, slot)) for row, slot in zip(source, target, strict=True)]
    for copy in copies:
        link.wait(copy)
    assert torch.equal(target, source) and link.ahead_bytes == 3000
    assert link.promote(copies[0]) is copies[0]  # nothing left to do
    link.wait(copies[0])
    link.close()
