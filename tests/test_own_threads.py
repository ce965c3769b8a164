"""Calls that the engine itself may make, and threads that only look like its own."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from within_time import within_time

from duomoe import LLM


def test_the_engine_itself_may_ask_how_it_stands(tiny: Callable[..., Any]) -> None:
    with within_time("stats"), LLM(tiny("qwen3_moe").path, device="cpu") as llm:
        assert llm._thread.call(lambda _: (llm.check(), llm.stats().running)) == (None, 0)


def test_whoever_is_called_as_our_threads_waits_all_the_same(tiny: Callable[..., Any]) -> None:
    llm = LLM(tiny("qwen3_moe").path, device="cpu")
    begun, go_on, ended = threading.Event(), threading.Event(), []
    llm._thread.send(lambda _: begun.set() or (go_on.wait(20) and None))
    assert begun.wait(20)
    closing = threading.Thread(
        target=lambda: (llm.close(), ended.append(llm._thread._done.is_set())), name="duomoe-of-a-user"
    )
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    go_on.set()
    closing.join(20)
    assert ended == [True]


def test_the_threads_that_the_end_depends_on_do_not_wait_for_it(tiny: Callable[..., Any]) -> None:
    """A destructor may run in the link's thread, and close the model there."""
    llm = LLM(tiny("qwen3_moe").path, device="cpu", policy="lru", expert_memory="100KB")
    link = llm.policy.lease.link
    move, done = link._move, threading.Event()

    def closing(*args: Any) -> None:
        if not done.is_set():
            llm.close()
            done.set()
        move(*args)

    link._move = closing
    stream = llm.stream([1, 2, 3])
    with within_time("close"):
        assert done.wait(20)
        with contextlib.suppress(RuntimeError):
            list(stream)
        assert llm._thread._done.wait(20)
