"""The embedding API."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from within_time import LONGEST_CASE, within_time

from duomoe import LLM, EngineConfig, InputError, SamplingParams


@pytest.fixture
def llm(tiny: Callable[..., Any]) -> LLM:
    return LLM(tiny("qwen3_moe").path, device="cpu", max_batch=2)


def used_pages(llm: LLM) -> int:
    """Pages that requests hold, once the engine has heard of all that callers have done so far."""
    return llm._thread.call(lambda engine: engine.cache.pages.used)


def test_a_stream_is_the_completion(llm: LLM, prompt_of: Callable[..., list[int]]) -> None:
    params = SamplingParams(max_new_tokens=10)
    chunks = list(llm.stream(prompt_of(5), params))
    whole = llm.generate([prompt_of(5)], params)[0]
    assert [chunk.token_id for chunk in chunks] == whole.token_ids
    assert [chunk.completion is None for chunk in chunks] == [True] * 9 + [False]
    assert chunks[-1].completion is not None and chunks[-1].completion.token_ids == whole.token_ids


def test_interleaved_streams_do_not_disturb_each_other(llm: LLM, prompt_of: Callable[..., list[int]]) -> None:
    params = SamplingParams(max_new_tokens=8)
    prompts = [prompt_of(length, seed=length) for length in (4, 20, 9)]  # one more than run at once
    alone = [llm.generate(prompt, params)[0].token_ids for prompt in prompts]
    streams = [llm.stream(prompt, params) for prompt in prompts]
    found: list[list[int]] = [[], [], []]
    for _ in range(8):
        for tokens, stream in zip(found, streams, strict=True):
            tokens.append(next(stream).token_id)
    assert found == alone


def test_threads_share_the_batch(llm: LLM, prompt_of: Callable[..., list[int]]) -> None:
    params = SamplingParams(max_new_tokens=25)
    prompts = [prompt_of(length, seed=length) for length in (4, 20, 9, 31)]
    alone = [llm.generate(prompt, params)[0].token_ids for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: llm.generate(prompt, params)[0].token_ids, prompts))
    assert found == alone


def test_a_failed_step_ends_its_requests_and_no_others(
    llm: LLM, prompt_of: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_new_tokens=6)
    alone = [llm.generate(prompt_of(n), params)[0].token_ids for n in (5, 9)]
    first = llm.stream(prompt_of(5), params)
    tokens = [next(first).token_id]
    with monkeypatch.context() as patch:
        patch.setattr(llm.policy, "prefill", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(llm.stream(prompt_of(9), params))  # was admitted by the step that failed; the first was not in it
    assert tokens + [chunk.token_id for chunk in first] == alone[0]
    assert llm.generate(prompt_of(9), params)[0].token_ids == alone[1]
    assert used_pages(llm) == 0


def test_an_abandoned_stream_gives_its_pages_back(llm: LLM, prompt_of: Callable[..., list[int]]) -> None:
    stream = llm.stream(prompt_of(30), SamplingParams(max_new_tokens=50))
    next(stream)
    assert used_pages(llm) > 0
    stream.close()
    assert used_pages(llm) == 0


def test_a_sequence_ends_at_the_context(llm: LLM, prompt_of: Callable[..., list[int]]) -> None:
    completion = llm.generate(prompt_of(250), SamplingParams(max_new_tokens=100))[0]
    assert len(completion.token_ids) == 6 and completion.finish_reason == "length"
    assert completion.metrics.prompt_tokens == 250


def test_prompts_are_checked_before_anything_runs(llm: LLM, prompt_of: Callable[..., list[int]]) -> None:
    for prompt in ([], [211], [-1], [True], [0.5], [None], prompt_of(256), "text", None, 5, b"abc", {"a": 1}):
        with pytest.raises(InputError):
            llm.generate([prompt_of(3), prompt])  # type: ignore[list-item]
    assert used_pages(llm) == 0 and not llm.engine.scheduler.waiting
    for prompts in (None, 5, b"abc", {"a": 1}):
        with pytest.raises(InputError):
            llm.generate(prompts)  # type: ignore[arg-type]
    assert llm.generate([]) == []


def test_what_goes_with_a_prompt_is_checked(llm: LLM, prompt_of: Callable[..., list[int]]) -> None:
    prompt, params = prompt_of(3), SamplingParams(max_new_tokens=1)
    for salt in ("text", "\ud800", 5, None, [1], bytearray(b"a"), memoryview(b"abc")[::2]):
        for use in (llm.generate, llm.stream):
            with pytest.raises(InputError, match="salt"):
                use(prompt, params, salt=salt)  # type: ignore[operator]
    for bad in (5, "x", {}, {"a": 1}, [], 0, b"", [params, 5], [5, 5]):
        with pytest.raises(InputError, match="parameters"):
            llm.generate([prompt, prompt], bad)  # type: ignore[arg-type]
    for bad in (5, "x", {}, [], 0, [params]):
        for ask in (lambda bad: llm.stream(prompt, bad), llm.chat_params, llm.prepare):
            with pytest.raises(InputError, match="parameters"):
                ask(bad)
    for shown in (5, "x", [5], None, [b"x"]):
        with pytest.raises(InputError, match="shown"):
            llm.stream(prompt, params, shown=shown)  # type: ignore[arg-type]
    for prompt in (None, 5, "text", [5.5], ["a"], {"a": 1}):  # type: ignore[assignment]
        with pytest.raises(InputError):
            llm.output_parser(prompt)
    assert used_pages(llm) == 0 and len(llm.generate(prompt_of(3), params, salt=b"a")[0].token_ids) == 1


# What needs the engine, by the name of the call.
CALLS: dict[str, Callable[[LLM], object]] = {
    "generate": lambda llm: llm.generate([1, 2, 3], SamplingParams(max_new_tokens=2)),
    "stream": lambda llm: list(llm.stream([1, 2, 3], SamplingParams(max_new_tokens=2))),
    "logits": lambda llm: llm.logits([1, 2, 3]),
    "prepare": lambda llm: llm.prepare(SamplingParams()),
    "check": lambda llm: llm.check(),
    "check_device": lambda llm: llm.check_device(),
    "stats": lambda llm: llm.stats(),
    "engine": lambda llm: llm.engine,
    "policy": lambda llm: llm.policy,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_closed_model_says_that_it_is(name: str, llm: LLM) -> None:
    llm.close()
    llm.close()
    with within_time(name), pytest.raises(RuntimeError, match="this model is closed"):
        CALLS[name](llm)


@pytest.mark.parametrize("name", sorted(CALLS.keys() - {"check", "check_device", "engine", "policy"}))
def test_a_model_that_is_closed_amid_a_call_says_so(name: str, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread closes it right behind the check whether it runs."""
    monkeypatch.setattr("duomoe.engine.thread.PATIENCE", 0.01)
    monkeypatch.setattr("duomoe.engine.stream.PATIENCE", 0.01)
    check, closed = llm._thread.check, threading.Event()

    def close(**options: Any) -> None:
        check(**options)
        if not closed.is_set():
            closed.set()
            closing = threading.Thread(target=llm.close)
            closing.start()
            closing.join()

    monkeypatch.setattr(llm._thread, "check", close)
    with within_time(name), pytest.raises(RuntimeError, match="closed"):
        CALLS[name](llm)
    assert closed.is_set()


def test_calls_that_race_with_several_closes(tiny: Callable[..., Any]) -> None:
    def use(llm: LLM, name: str) -> None:
        with pytest.raises(RuntimeError, match="closed"):
            deadline = time.monotonic() + LONGEST_CASE
            while time.monotonic() < deadline:
                CALLS[name](llm)

    for _ in range(3):
        llm = LLM(tiny("qwen3_moe").path, device="cpu", max_batch=2)
        with ThreadPoolExecutor(len(CALLS) + 2) as pool:
            used = [pool.submit(use, llm, name) for name in CALLS]
            llm.generate([1, 2, 3], SamplingParams(max_new_tokens=2))
            closed = [pool.submit(llm.close) for _ in range(2)]
            for each in (*used, *closed):
                each.result()


@pytest.mark.parametrize("name", CALLS)
def test_what_the_engine_itself_asks_for_is_there_or_refused(name: str, llm: LLM) -> None:
    """In its own thread, as an observer or a destructor may: nothing waits for itself."""
    with within_time(name):
        try:
            llm._thread.call(lambda _: CALLS[name](llm))
        except RuntimeError as error:
            assert str(error) == "what the engine itself calls cannot wait for the engine"
    assert len(llm.generate([1, 2, 3], SamplingParams(max_new_tokens=2))[0].token_ids) == 2


def test_a_stream_that_the_engine_itself_reads_ends(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duomoe.engine.stream.PATIENCE", 0.01)
    stream = llm.stream([1, 2, 3], SamplingParams(max_new_tokens=200, ignore_eos=True))
    with within_time("itself"), pytest.raises(RuntimeError, match="cannot wait for the engine"):
        llm._thread.call(lambda _: list(stream))
    assert list(stream) == [] and used_pages(llm) == 0


def test_the_engine_itself_may_close(llm: LLM) -> None:
    with within_time("close"):
        llm._thread.call(lambda _: llm.close())
        llm.close()
    with pytest.raises(RuntimeError, match="this model is closed"):
        llm.generate([1])


def test_a_request_longer_than_planned_is_refused(tiny: Callable[..., Any]) -> None:
    llm = LLM(tiny("qwen3_moe").path, device="cpu", max_model_len=48)
    with pytest.raises(InputError, match="48 tokens"):
        llm.generate([1] * 49)
    assert len(llm.generate([1] * 40, SamplingParams(max_new_tokens=100))[0].token_ids) == 8


def test_options_are_checked(tiny: Callable[..., Any]) -> None:
    path = tiny("qwen3_moe").path
    with pytest.raises(TypeError, match="frobnicate"):
        LLM(path, frobnicate=1)
    with pytest.raises(InputError, match="--max-batch"):
        LLM(path, max_batch=0)
    assert LLM(path, EngineConfig(device="cpu", dtype="bfloat16")).logits([1, 2]).dtype == torch.float32


def test_the_runtime_needs_no_transformers() -> None:
    """Import every module with transformers, numpy and the other test dependencies out of reach."""
    program = """
import importlib, pkgutil, sys
for name in ("transformers", "accelerate", "hypothesis", "psutil", "pytest"):
    sys.modules[name] = None
import duomoe, duomoe.kernels, duomoe.models
for module in pkgutil.walk_packages(duomoe.__path__, "duomoe."):
    importlib.import_module(module.name)
    print(module.name)
for package in (duomoe.kernels, duomoe.models):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
        print(module.name)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    for name in (
        "duomoe.generate",
        "duomoe.experts.policies.on_demand",
        "duomoe.engine.engine",
        "duomoe.kernels.attention",
        "duomoe.models.mixtral",
    ):
        assert name in done.stdout


def test_resident_counts_the_experts_of_each_layer_and_step(
    tiny: Callable[..., Any], prompt_of: Callable[..., list[int]]
) -> None:
    llm = LLM(tiny("qwen3_moe").path, device="cpu", max_batch=2)
    distinct = []
    llm.policy.observer = lambda index, h, routing: distinct.append(len(routing.experts.unique()))
    for prompts in ([prompt_of(9)], [prompt_of(9), prompt_of(1, seed=1)]):
        distinct.clear()
        completion = llm.generate(prompts, SamplingParams(max_new_tokens=4))[-1]
        assert completion.metrics.experts.hits == sum(distinct) > 0


def test_stats_are_what_happened(llm: LLM, prompt_of: Callable[..., list[int]]) -> None:
    assert llm.stats().passes == llm.stats().steps == llm.stats().running == 0
    prompt, params = prompt_of(40), SamplingParams(max_new_tokens=5)
    for number in range(1, 4):
        completion = llm.generate(prompt, params)[0]
        stats = llm.stats()
        assert (stats.prompt_tokens, stats.found_tokens) == (40 * number, 32 * (number - 1))
        assert (stats.passes, stats.steps, stats.generated_tokens) == (number, 4 * number, 5 * number)
        assert (stats.running, stats.waiting, stats.used_pages, stats.preemptions) == (0, 0, 0, 0)
        assert stats.kept_pages == 2 and stats.pages > 2
        assert stats.pass_s > 0 and stats.step_s > 0 and stats.expected_step_s > 0
        assert stats.experts.hits >= completion.metrics.experts.hits > 0
    stream = llm.stream(prompt, SamplingParams(max_new_tokens=200))
    next(stream)
    assert llm.stats().running == 1 and llm.stats().used_pages > 0
    stream.close()


def test_each_prompt_may_have_parameters_of_its_own(llm: LLM, prompt_of: Callable[..., list[int]]) -> None:
    prompts = [prompt_of(5), prompt_of(9)]
    each = [SamplingParams(max_new_tokens=3), SamplingParams(max_new_tokens=6, temperature=0.9, seed=1)]
    found = llm.generate(prompts, each)
    assert [len(completion.token_ids) for completion in found] == [3, 6]
    for prompt, params, completion in zip(prompts, each, found, strict=True):
        assert llm.generate(prompt, params)[0].token_ids == completion.token_ids
        assert 0 <= completion.metrics.queue_s <= completion.metrics.ttft_s
    with pytest.raises(InputError, match="1 parameters for 2 prompts"):
        llm.generate(prompts, each[:1])
