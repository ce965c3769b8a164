"""What short tests might miss: interrupts and faults at every line, thousands of requests, recorded schedules again.

Each is short in an ordinary run, and runs in full by `--long`.
"""

import gc
import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import torch

import duomoe
from duomoe import LLM, SamplingParams
from duomoe.engine.prefill_pass import PrefillPass
from duomoe.experts.link import HostLink
from duomoe.experts.policies import finished
from duomoe.memory.pages import PagePool

PARAMS = SamplingParams(max_new_tokens=8, ignore_eos=True)


@pytest.fixture
def llm(tiny: Callable[..., Any]) -> Iterator[LLM]:
    path = tiny("qwen3_moe").path
    with LLM(path, device="cpu", policy="duo", expert_memory="100KB", max_batch=4, max_model_len=96) as llm:
        llm._thread.call(lambda engine: use_few_pages(llm))
        yield llm


def use_few_pages(llm: LLM) -> None:
    llm.engine.cache.pages = llm.engine.scheduler.pages = PagePool(12)


def held(llm: LLM) -> tuple[int, int, int]:
    return llm._thread.call(
        lambda engine: (engine.cache.pages.used, len(engine.scheduler.running), len(engine.scheduler.waiting))
    )


# What hands errors on, in the thread's loop, is not what fails.
HANDS_ON = ("put", "message", "add", "has_work", "_run", "_heed", "_main", "_attempt", "fail", "fail_all")


class Injected(Exception):
    pass


class LineFaults:
    """Raises in the engine's thread at one line of what it runs, counted from when it is armed."""

    def __init__(self, llm: LLM) -> None:
        self.folder, self.llm = str(Path(duomoe.__file__).parent) + os.sep, llm

    def arm(self, at: int) -> None:
        """Raise at that line from now on; Python ends a trace that has raised."""
        self.lines, self.at = 0, at
        self.llm._thread.call(lambda engine: sys.settrace(self))

    def disarm(self) -> None:
        self.llm._thread.call(lambda engine: sys.settrace(None))

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(self.folder) or code.co_name in HANDS_ON:
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise Injected(f"{code.co_filename}:{frame.f_lineno}")
        return self


def test_a_fault_at_any_line_of_a_step(
    llm: LLM, prompt_of: Callable[..., list[int]], request: pytest.FixtureRequest
) -> None:
    """Whatever line of the engine's it is: who was not hit gets its tokens, and later everybody does."""
    faults = LineFaults(llm)
    prompts = [prompt_of(4 + 9 * number, seed=number) for number in range(3)]
    expected = [llm.generate(prompt, PARAMS)[0].token_ids for prompt in prompts]
    faults.arm(-1)
    llm.generate(prompts, PARAMS)
    lines, generator, hit = faults.lines, random.Random(1), 0
    many = request.config.getoption("--long")
    every = range(1, lines) if many else sorted(generator.sample(range(1, lines), 60))
    for at in every:
        faults.arm(at)
        streams = [llm.submit(prompt, PARAMS) for prompt in prompts]
        failed = 0
        for stream, tokens in zip(streams, expected, strict=True):
            try:
                assert [chunk.token_id for chunk in stream] == tokens
            except Injected:
                failed += 1
        hit += failed > 0
        faults.disarm()
        assert held(llm) == (0, 0, 0), at
        assert [each.token_ids for each in llm.generate(prompts, PARAMS)] == expected, at
    assert hit >= len(every) / 2


def test_signals_at_random_moments(
    llm: LLM, prompt_of: Callable[..., list[int]], request: pytest.FixtureRequest
) -> None:
    times = 1000 if request.config.getoption("--long") else 50
    prompts = [prompt_of(5 + 11 * number, seed=number) for number in range(3)]
    expected = [llm.generate(prompt, PARAMS)[0].token_ids for prompt in prompts]
    generator, interrupted = random.Random(5), 0
    for _ in range(times):
        timer = threading.Timer(generator.uniform(0, 0.03), os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            while timer.is_alive():
                assert [each.token_ids for each in llm.generate(prompts, PARAMS)] == expected
            time.sleep(0.1)
        except KeyboardInterrupt:
            interrupted += 1
        timer.join()
    assert interrupted == times
    gc.collect()
    assert held(llm) == (0, 0, 0)
    assert [each.token_ids for each in llm.generate(prompts, PARAMS)] == expected


def footprint() -> tuple[int, int, int]:
    """Descriptors, threads, and bytes of memory in pages of the host."""
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1])
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), resident


def test_thousands_of_requests_leave_what_the_first_hundred_did(
    llm: LLM, prompt_of: Callable[..., list[int]], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some read to the end, some close early, some are dropped, some get an error; threads switch all the time."""
    count = 10_000 if request.config.getoption("--long") else 300
    prompts = [prompt_of(5 + 9 * number, seed=number) for number in range(4)]
    expected = [llm.generate(prompt, PARAMS)[0].token_ids for prompt in prompts]
    move, moved = HostLink._move, iter(range(10**9))

    def faulty(self: HostLink, copy: Any, size: int) -> None:
        if next(moved) % 5000 == 4999:
            raise OSError("a fault")
        move(self, copy, size)

    def use(number: int) -> None:
        stream = llm.submit(prompts[number % 4], PARAMS)
        try:
            if number % 3 == 0:
                assert [chunk.token_id for chunk in stream] == expected[number % 4]
            elif number % 3 == 1:
                next(stream)
                stream.close()
        except RuntimeError as error:
            assert "a fault" in str(error)

    monkeypatch.setattr(HostLink, "_move", faulty)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(use, range(100)))
            before = footprint()
            list(pool.map(use, range(count)))
            after = footprint()
    finally:
        sys.setswitchinterval(interval)
    assert held(llm) == (0, 0, 0)
    assert after[:2] == before[:2]
    assert after[2] - before[2] < (64 << 20) // os.sysconf("SC_PAGE_SIZE")  # of what an allocator keeps, not a leak


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("policy", ["duo", "lru", "on_demand"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_recorded_schedule_has_the_same_bits_under_resident(
    dtype: str,
    policy: str,
    device: str,
    tiny: Callable[..., Any],
    prompt_of: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Arrivals, shared beginnings, preemption, steps amid passes: each is given to a model with all experts."""
    options = dict(device=device, dtype=dtype, max_batch=3, max_model_len=96, graph=False)
    llm = LLM(tiny("qwen3_moe").path, policy=policy, expert_memory="100KB", **options)
    use_few_pages(llm)
    advance = PrefillPass.advance
    monkeypatch.setattr(PrefillPass, "advance", lambda self, _: advance(self, math.inf if policy == "on_demand" else 0))
    recorded: list[Recorded] = []
    record(llm, recorded)
    common = prompt_of(20)
    streams = [llm.stream([*common, *prompt_of(5 * n, seed=n)], SamplingParams(max_new_tokens=30)) for n in range(1, 5)]
    next(streams[2])
    streams.pop(1).close()
    for stream in streams:
        list(stream)
    assert llm.engine.scheduler.counts.found_tokens > 0 and any(each.chunks for each in recorded)
    amid = sum(each.passing for each in recorded if not each.chunks)
    assert (amid > 0) == (policy != "on_demand")
    resident = LLM(tiny("qwen3_moe").path, policy="resident", **options)
    layers = resident.engine.cache.layers
    with torch.inference_mode():
        for each in recorded:
            if each.chunks:
                found = finished(resident.policy.prefill(each.chunks, layers, (), beside=False))
            else:
                found = [resident.policy.decode(each.batch, layers)]
            for one, other in zip(found, each.streams, strict=True):
                assert torch.equal(one, other)


class Recorded(NamedTuple):
    """A pass or a step: what it was given and what it returned."""

    chunks: list[Any]
    batch: Any
    passing: bool  # a pass was under way
    streams: list[torch.Tensor]


def record(llm: LLM, recorded: list[Recorded]) -> None:
    """Keep what a model's passes and steps are given and return."""
    prefill, decode, scheduler = llm.policy.prefill, llm.policy.decode, llm.engine.scheduler

    def passes(chunks: list[Any], kv: Any, prompts: Any, beside: bool) -> Any:
        streams = yield from prefill(chunks, kv, prompts, beside)
        recorded.append(Recorded(chunks, None, False, [each.clone() for each in streams]))
        return streams

    def steps(batch: Any, kv: Any) -> Any:
        stream = decode(batch, kv)
        recorded.append(Recorded([], batch, bool(scheduler.passing), [stream.clone()]))
        return stream

    llm.policy.prefill, llm.policy.decode = passes, steps  # type: ignore[method-assign,assignment]
