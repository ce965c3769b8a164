"""Nothing a caller does, and nothing that happens to it, spoils or stops what others get."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty
from typing import Any

import pytest
from link_faults import fail_copy

from duomoe import LLM, SamplingParams
from duomoe.engine.outbox import Outbox
from duomoe.experts.link import HostLink

PARAMS = SamplingParams(max_new_tokens=12, ignore_eos=True)


@pytest.fixture
def llm(tiny: Callable[..., Any]) -> Iterator[LLM]:
    with LLM(tiny("qwen3_moe").path, device="cpu", policy="duo", expert_memory="100KB", max_batch=4) as llm:
        yield llm


def held(llm: LLM) -> tuple[int, int, int]:
    """Pages and requests that the engine holds, once it has heard of all that callers have done so far."""
    return llm._thread.call(
        lambda engine: (engine.cache.pages.used, len(engine.scheduler.running), len(engine.scheduler.waiting))
    )


def prompts_of(prompt_of: Callable[..., list[int]], count: int) -> list[list[int]]:
    return [prompt_of(3 + 5 * number, seed=number) for number in range(count)]


def alone(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    return [llm.generate(prompt, PARAMS)[0].token_ids for prompt in prompts]


def test_coroutines_and_threads_share_the_batch(llm: LLM, prompt_of: Callable[..., list[int]]) -> None:
    prompts = prompts_of(prompt_of, 6)
    expected = alone(llm, prompts)

    async def read(prompt: list[int]) -> list[int]:
        return [chunk.token_id async for chunk in llm.submit(prompt, PARAMS)]

    async def every() -> list[list[int]]:
        return list(await asyncio.gather(*map(read, prompts)))

    with ThreadPoolExecutor(2) as pool:
        loops = [pool.submit(asyncio.run, every()) for _ in range(2)]
        found = llm.generate(prompts, PARAMS)
        assert [completion.token_ids for completion in found] == expected
        assert all(loop.result() == expected for loop in loops)
    assert held(llm) == (0, 0, 0)


def test_a_coroutine_that_is_cancelled_ends_its_request(llm: LLM, prompt_of: Callable[..., list[int]]) -> None:
    async def abandon() -> None:
        async def read() -> None:
            async for _ in llm.submit(prompt_of(9), SamplingParams(max_new_tokens=200, ignore_eos=True)):
                pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(abandon())
    gc.collect()
    assert held(llm) == (0, 0, 0)


def test_what_is_dropped_ends_even_as_garbage_in_a_cycle(llm: LLM, prompt_of: Callable[..., list[int]]) -> None:
    expected = alone(llm, [prompt_of(9)])
    for _ in range(5):
        stream = llm.stream(prompt_of(30), SamplingParams(max_new_tokens=200, ignore_eos=True))
        next(stream)
        cycle: list[Any] = [stream]
        cycle.append(cycle)
        del stream, cycle
        assert llm.generate(prompt_of(9), PARAMS)[0].token_ids == expected[0]
    gc.collect()
    assert held(llm) == (0, 0, 0)


def test_a_signal_handler_may_generate(llm: LLM, prompt_of: Callable[..., list[int]]) -> None:
    prompts = prompts_of(prompt_of, 2)
    expected, found = alone(llm, prompts), []

    def handle(*_: object) -> None:
        found.append(llm.generate(prompts[1], PARAMS)[0].token_ids)
        signal.setitimer(signal.ITIMER_REAL, 0.01)  # only now, or handlers would nest without end where time is short

    before = signal.signal(signal.SIGALRM, handle)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        while len(found) < 3:
            assert llm.generate(prompts[0], PARAMS)[0].token_ids == expected[0]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert all(tokens == expected[1] for tokens in found)


def test_interrupts_at_any_moment_leave_the_model_right(llm: LLM, prompt_of: Callable[..., list[int]]) -> None:
    times = 60
    prompts = prompts_of(prompt_of, 3)
    expected = alone(llm, prompts)

    class Interrupt(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    try:
        for number in range(times):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.0005 + 0.0007 * number)
                found = llm.generate(prompts, PARAMS)
                signal.setitimer(signal.ITIMER_REAL, 0)
                assert [completion.token_ids for completion in found] == expected
            except Interrupt:
                interrupted += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > times // 3
    gc.collect()
    assert held(llm) == (0, 0, 0)
    assert alone(llm, prompts) == expected


def test_a_fork_is_told_to_load_its_own_model(llm: LLM, prompt_of: Callable[..., list[int]]) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = b"nothing was raised"
        try:
            for use in (
                lambda: llm.generate([1]),
                lambda: llm.stream([1]),
                lambda: llm.logits([1]),
                lambda: llm.prepare(PARAMS),
            ):
                try:
                    use()
                    break
                except RuntimeError as error:
                    said = str(error).encode()
            llm.close()
        finally:
            os.write(write, said)
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        assert file.read() == "this process was forked after the model was loaded; load the model in this process"
    os.waitpid(child, 0)
    assert len(llm.generate(prompt_of(5), PARAMS)[0].token_ids) == 12


def test_a_closed_model_ends_its_requests_and_its_threads(tiny: Callable[..., Any], prompt_of: Any) -> None:
    threads = threading.active_count()
    for _ in range(3):
        llm = LLM(tiny("qwen3_moe").path, device="cpu", policy="lru", expert_memory="100KB")
        stream = llm.stream(prompt_of(5), SamplingParams(max_new_tokens=200, ignore_eos=True))
        next(stream)
        model = weakref.ref(llm.engine.model)
        llm.close()
        with pytest.raises(RuntimeError, match="closed"):
            list(stream)
        assert list(stream) == []
        for use in (llm.close, stream.close):
            use()
        for use in (lambda llm=llm: llm.generate([1]), lambda llm=llm: llm.logits([1])):
            with pytest.raises(RuntimeError, match="closed"):
                use()
        assert model() is None, "something still holds the weights"
    wait_for(lambda: threading.active_count() == threads)


def test_a_model_that_nobody_holds_ends(tiny: Callable[..., Any], prompt_of: Callable[..., list[int]]) -> None:
    threads = threading.active_count()
    llm = LLM(tiny("qwen3_moe").path, device="cpu", policy="lru", expert_memory="100KB")
    stream = llm.stream(prompt_of(5), PARAMS)
    del llm  # the stream still holds the model
    assert len(list(stream)) == 12
    del stream
    gc.collect()
    wait_for(lambda: threading.active_count() == threads)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
        gc.collect()


# Where a step of `duo` can fail, in the order of a request's life.
PLACES = [
    "directory.read",
    "stream.begin",
    "directory.write",
    "stream.send_ahead",
    "stream.run",
    "lease.run",
    "lease.compute",
    "lease.give_back",
    "stream.end",
    "decoder.start",
    "decoder.run",
    "decoder.fetcher.fetch",
    "decoder.fetcher.join",
    "decoder.fetcher.stop",
]


@pytest.mark.parametrize("place", PLACES)
def test_wherever_a_step_fails_exactly_its_requests_do(
    place: str, llm: LLM, prompt_of: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(prompt_of, 3)
    expected = alone(llm, prompts)
    owner, name = place.rsplit(".", 1)
    target: Any = llm.policy
    for part in owner.split("."):
        target = getattr(target, part)
    original = getattr(target, name)
    for nth in (1, 2, 4):
        calls = 0

        def failing(*args: Any, nth: int = nth, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == nth:
                raise ZeroDivisionError(place)
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(target, name, failing)
            with ThreadPoolExecutor(3) as pool:
                futures = [pool.submit(llm.generate, prompt, PARAMS) for prompt in prompts]
        failed = 0
        for future, tokens in zip(futures, expected, strict=True):
            error = future.exception()
            if error is None:
                assert future.result()[0].token_ids == tokens
            else:
                assert isinstance(error, ZeroDivisionError)
                failed += 1
        assert failed > 0 or 0 < calls < nth  # a place that is never come to tests nothing
        assert held(llm) == (0, 0, 0)
        assert alone(llm, prompts) == expected, "something counted as resident that was not"


def test_a_fault_of_the_link_belongs_to_the_copies_that_it_hit(
    llm: LLM, prompt_of: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(prompt_of, 2)
    expected = alone(llm, prompts)
    for number in range(0, 80, 4):
        with monkeypatch.context() as patch:
            fail_copy(patch, number)
            try:
                assert llm.generate(prompts[0], PARAMS)[0].token_ids == expected[0]
            except RuntimeError as error:
                assert "a fault" in str(error)
        assert alone(llm, prompts) == expected, "somebody else's old fault"


def test_what_fails_ahead_of_need_fails_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    send_ahead, move = HostLink.send_ahead, HostLink._move
    ahead: set[Any] = set()

    def sent_ahead(self: HostLink, copy: Any) -> Any:
        ahead.add(copy)
        try:
            return send_ahead(self, copy)
        finally:
            assert copy.arrived.wait(30) and copy.error is not None

    def faulty(self: HostLink, copy: Any, size: int) -> None:
        if copy in ahead:
            raise OSError("a fault")
        move(self, copy, size)

    with LLM(device="cpu", policy="duo", expert_memory="15%", predictor="gate") as llm:
        expected = llm.generate("The sea", PARAMS)[0]
        assert expected.metrics.experts.prefetch_used_bytes > 0
        monkeypatch.setattr(HostLink, "send_ahead", sent_ahead)
        monkeypatch.setattr(HostLink, "_move", faulty)
        found = llm.generate("The sea", PARAMS)[0]
    assert ahead and found.metrics.experts.prefetched_bytes == 0
    assert found.token_ids == expected.token_ids


def test_who_asks_without_end_does_not_stop_the_others(llm: LLM, prompt_of: Callable[..., list[int]]) -> None:
    stopped = threading.Event()

    def ask(_: Any) -> None:
        if not stopped.is_set():
            llm._thread.send(ask)

    stream = llm.submit(prompt_of(5), PARAMS)
    llm._thread.send(ask)
    patience = threading.Timer(30, stopped.set)
    patience.start()
    try:
        assert len(list(stream)) == PARAMS.max_new_tokens and not stopped.is_set()
    finally:
        stopped.set()
        patience.cancel()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_that_cannot_be_told_leaves_no_request_waiting(
    llm: LLM, prompt_of: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it keep the engine from ending."""
    threads = llm._thread._thread, llm.policy.lease.link._thread
    streams = [llm.submit(prompt, PARAMS) for prompt in prompts_of(prompt_of, 3)]
    monkeypatch.setattr(llm.engine, "_remove", lambda *_, **__: 1 / 0)
    llm.close()
    for stream in streams:
        with pytest.raises(RuntimeError, match="closed"):
            list(stream)
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_a_token_that_cannot_be_accepted_fails_its_request_alone(
    llm: LLM, prompt_of: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(prompt_of, 2)
    expected = alone(llm, prompts)
    streams = [llm.submit(prompt, PARAMS) for prompt in prompts]
    next(streams[0])
    monkeypatch.setattr(streams[0]._request.stream, "push", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(streams[0])
    assert [chunk.token_id for chunk in streams[1]] == expected[1]


def test_many_requests_leave_nothing(llm: LLM, prompt_of: Callable[..., list[int]]) -> None:
    """With early ends of several kinds, in threads that switch as often as they can."""
    prompts = prompts_of(prompt_of, 4)
    expected = alone(llm, prompts)
    interval = sys.getswitchinterval()

    def use(number: int) -> None:
        stream = llm.submit(prompts[number % 4], PARAMS)
        if number % 3 == 0:
            assert [chunk.token_id for chunk in stream] == expected[number % 4]
        elif number % 3 == 1:
            next(stream)
            stream.close()

    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(use, range(24)))
            before = descriptors(), threading.active_count(), len(llm.policy.lease._idle)
            list(pool.map(use, range(120)))
            after = descriptors(), threading.active_count(), len(llm.policy.lease._idle)
    finally:
        sys.setswitchinterval(interval)
    gc.collect()
    assert held(llm) == (0, 0, 0)
    assert after[:2] == before[:2]
    assert after[2] <= 5 * len(llm.policy.lease.pool)


def test_events_for_a_loop_that_has_closed_go_nowhere() -> None:
    outbox = Outbox()

    async def wait() -> None:
        with pytest.raises(Empty):
            await outbox.get_async(0.01)

    asyncio.run(wait())
    outbox.put(ValueError("late"))
    assert isinstance(outbox.get(0.1), ValueError)


def test_a_stream_that_somebody_closes_ends_for_who_reads_it(llm: LLM, prompt_of: Callable[..., list[int]]) -> None:
    async def close_while_reading() -> None:
        stream = llm.submit(prompt_of(5), SamplingParams(max_new_tokens=200, ignore_eos=True))

        async def read() -> None:
            async for _ in stream:
                pass

        reader = asyncio.create_task(read())
        await asyncio.sleep(0)
        time.sleep(0.02)
        stream.close()
        await asyncio.wait_for(reader, 20)

    asyncio.run(close_while_reading())
    assert held(llm) == (0, 0, 0)


def test_who_was_interrupted_with_the_last_chunk_in_hand_comes_to_the_end(
    llm: LLM, prompt_of: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = llm.stream(prompt_of(5), SamplingParams(max_new_tokens=1))
    with monkeypatch.context() as patch:
        patch.setattr(stream, "_take", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(stream)
    assert list(stream) == []


def test_a_request_that_cannot_be_added_fails_alone(
    llm: LLM, prompt_of: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(prompt_of, 2)
    expected = alone(llm, prompts[:1])
    stream = llm.stream(prompts[0], PARAMS)
    tokens = [next(stream).token_id]
    count = llm.policy.traffic_so_far
    with monkeypatch.context() as patch:
        patch.setattr(llm.policy, "traffic_so_far", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llm.generate(prompts[1], SamplingParams(max_new_tokens=1))
        patch.setattr(llm.policy, "traffic_so_far", count)
        assert tokens + [chunk.token_id for chunk in stream] == expected[0]


def test_callers_get_errors_of_their_own(
    llm: LLM, prompt_of: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm.policy, "prefill", lambda *_: 1 / 0)
    llm._thread.call(lambda engine: None)
    barrier = threading.Event()
    llm._thread.send(lambda _: barrier.wait(20) and None)  # so that both are in one step
    streams = [llm.submit(prompt, PARAMS) for prompt in prompts_of(prompt_of, 2)]
    barrier.set()
    errors = []
    for stream in streams:
        with pytest.raises(ZeroDivisionError) as caught:
            next(stream)
        errors.append(caught.value)
    assert errors[0] is not errors[1]


def test_an_end_of_iteration_in_a_step_is_an_error(
    llm: LLM, prompt_of: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm.policy, "prefill", lambda *_: next(iter(())))
    with pytest.raises(RuntimeError, match="raised StopIteration"):
        llm.generate(prompt_of(5), PARAMS)


def test_what_the_engine_calls_cannot_wait_for_it(llm: LLM) -> None:
    with pytest.raises(RuntimeError, match="cannot wait for the engine"):
        llm._thread.call(lambda _: llm.logits([1]))


def test_one_stream_may_be_read_in_several_loops(llm: LLM, prompt_of: Callable[..., list[int]]) -> None:
    expected = alone(llm, [prompt_of(5)])[0]
    stream = llm.submit(prompt_of(5), PARAMS)

    async def read() -> int:
        return (await anext(stream)).token_id

    assert [asyncio.run(read()) for _ in expected] == expected


def test_models_may_be_made_in_several_threads(tiny: Callable[..., Any]) -> None:
    path = tiny("mixtral").path

    def use(_: int) -> int:
        with LLM(path, device="cpu", policy="lru", expert_memory="100KB") as llm:
            return len(llm.generate([1, 2, 3], PARAMS)[0].token_ids)

    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(use, range(12))) == {12}


EXITS = {
    "while streaming": "stream = llm.stream('The sea', long); next(stream)",
    "interrupted at the exit": """
import os, signal, threading
stream = llm.stream('The sea ' * 700, long)
atexit.register(lambda: [threading.Timer(each, os.kill, (os.getpid(), signal.SIGINT)).start() for each in (.05, .1)])
""",
    "with copies on their way": """
compute = llm.policy.lease.compute
llm.policy.lease.compute = lambda *_: 1 / 0
try: llm.generate('The sea')
except ZeroDivisionError: pass
""",
    "closed, interrupted": """
import os, signal, threading
stream = llm.stream('The sea ' * 700, long)
threading.Timer(.05, os.kill, (os.getpid(), signal.SIGINT)).start()
try: llm.close()
except KeyboardInterrupt: pass
""",
}


@pytest.mark.parametrize("how", EXITS)
def test_the_process_ends_as_it_should(how: str) -> None:
    program = f"""
import atexit
from duomoe import LLM, SamplingParams
long = SamplingParams(max_new_tokens=500, ignore_eos=True)
llm = LLM(device="cpu", policy="lru", expert_memory="20%", link_bandwidth="2GB/s")
{EXITS[how]}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "terminate" not in done.stderr


def test_prompts_of_one_call_are_prefilled_together(
    llm: LLM, prompt_of: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However threads take turns: which prompts share a pass decides the last bits of what they get."""
    passes: list[int] = []
    begin = llm.engine._begin_pass
    monkeypatch.setattr(llm.engine, "_begin_pass", lambda requests: passes.append(len(requests)) or begin(requests))
    for _ in range(20):
        llm.generate(prompts_of(prompt_of, 4), SamplingParams(max_new_tokens=1))
    assert passes == [4] * 20
