"""The threads that load: in order, and not too far ahead."""

import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from duomoe import loading
from duomoe.loading import _Threads
from duomoe.memory.pinned import TOUCHED_BYTES, touched
from duomoe.model_folder import ModelFolder
from duomoe.startup import Startup


@pytest.fixture
def checkpoint() -> Any:
    return ModelFolder().checkpoint


def test_results_come_in_order_and_no_more_is_read_ahead_than_stated(
    checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "AHEAD_BYTES", 10)
    begun, taken, most = 0, 0, 0
    lock = threading.Lock()

    def job(size: int) -> int:
        nonlocal begun, most
        with lock:
            begun += size
            most = max(most, begun - taken)
        return size

    sizes = [3, 4, 3, 9, 20, 1, 1, 1, 8, 2]
    with _Threads(torch.device("cpu"), checkpoint, Startup()) as threads:
        for number, (what, size) in enumerate(
            threads.run_ahead((n, size, partial(job, size)) for n, size in enumerate(sizes))
        ):
            assert (what, size) == (number, sizes[number])
            with lock:
                taken += size
    assert begun == sum(sizes)
    # What is at hand with the caller counts, too: the result before, and the one that is taken now.
    assert most <= 10 + 2 * max(sizes)


def test_an_error_ends_the_threads_and_drops_what_has_not_begun(checkpoint: Any) -> None:
    started, hold = [], threading.Event()
    count = threading.active_count()

    def job(number: int) -> None:
        started.append(number)
        hold.wait(5)

    with pytest.raises(ZeroDivisionError), _Threads(torch.device("cpu"), checkpoint, Startup()) as threads:
        for number in range(100):
            threads.run(partial(job, number))
        threading.Timer(0.05, hold.set).start()
        _ = 1 / 0
    assert len(started) < 100
    hold.wait(5)
    assert threading.active_count() <= count + 1  # the timer may not have ended


def test_loading_leaves_torch_its_threads(checkpoint: Any) -> None:
    before = torch.get_num_threads()
    with _Threads(torch.device("cpu"), checkpoint, Startup()) as threads:
        assert threads.run(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("size", [1, 4096, TOUCHED_BYTES + 1])
def test_touched_memory_can_be_written_to(size: int, tmp_path: Path) -> None:
    memory = touched(size)
    assert memory.shape == (size,) and memory.dtype == torch.uint8
    memory.fill_(7)
    assert int(memory[-1]) == 7
