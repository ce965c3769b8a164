"""A pass that is under way: steps between its steps, callers who leave it, and what fails beside it."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from link_faults import fail_copy

from duomoe import LLM, SamplingParams
from duomoe.engine.prefill_pass import PrefillPass
from duomoe.kernels.admit import LEASED

LONG = SamplingParams(max_new_tokens=80, ignore_eos=True)
SHORT = SamplingParams(max_new_tokens=4, ignore_eos=True)


@pytest.fixture
def one_step_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass is interrupted between any two of its steps."""
    advance = PrefillPass.advance
    monkeypatch.setattr(PrefillPass, "advance", lambda self, _: advance(self, 0.0))


@pytest.fixture(params=["duo", "lru", "resident"])
def llm(request: pytest.FixtureRequest, tiny: Callable[..., Any], one_step_at_a_time: None) -> Iterator[LLM]:
    bounded = {} if request.param == "resident" else {"expert_memory": "150KB"}
    with LLM(
        tiny("qwen3_moe").path,
        device="cpu",
        dtype="float32",
        policy=request.param,
        max_batch=4,
        max_model_len=256,
        **bounded,
    ) as llm:
        yield llm


def held(llm: LLM) -> tuple[int, int, int, bool]:
    """Pages, requests and leased slots that the engine holds."""
    return llm._thread.call(
        lambda engine: (
            engine.cache.pages.used,
            len(engine.scheduler.running) + len(engine.scheduler.waiting),
            len(engine.scheduler.passing),
            hasattr(llm.policy, "directory") and bool((llm.policy.directory.owner_of == LEASED).any()),
        )
    )


def beside(llm: LLM, prompt: list[int], params: SamplingParams = LONG) -> Any:
    """Return a stream that decodes."""
    stream = llm.submit(prompt, params)
    next(stream)
    return stream


def under_way(llm: LLM) -> bool:
    return llm._thread.call(lambda engine: bool(engine.scheduler.passing))


def spied(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return for each decode step whether a pass was under way."""
    amid: list[bool] = []
    launch = llm.engine.decode_step.launch

    def launched(requests: Any) -> None:
        amid.append(bool(llm.engine.scheduler.passing))
        launch(requests)

    monkeypatch.setattr(llm.engine.decode_step, "launch", launched)
    return amid


def test_steps_run_amid_a_pass_and_nothing_changes(
    llm: LLM, prompt_of: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [prompt_of(9), prompt_of(150, seed=1), prompt_of(70, seed=2)]
    expected = [llm.generate(prompt, LONG)[0].token_ids for prompt in prompts]
    amid = spied(llm, monkeypatch)
    first = beside(llm, prompts[0])
    others = llm.generate(prompts[1:], LONG)
    tokens = [expected[0][0], *(chunk.token_id for chunk in first)]
    assert tokens == expected[0]
    assert [each.token_ids for each in others] == expected[1:]
    assert sum(amid) > 2
    assert held(llm) == (0, 0, 0, False)


def test_no_expert_crosses_twice_for_a_pass_with_steps_amid(
    tiny: Callable[..., Any],
    prompt_of: Callable[..., list[int]],
    one_step_at_a_time: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[int] = []
    with LLM(tiny("qwen3_moe").path, device="cpu", policy="lru", expert_memory="150KB", max_batch=4) as llm:
        send = llm.policy.lease.link.send

        def counted(source: torch.Tensor, slot: torch.Tensor, after: None = None) -> Any:
            if llm.engine.scheduler.passing and not stepping:
                sent.append(source.data_ptr())
            return send(source, slot, after)

        stepping: list[bool] = []
        launch = llm.engine.decode_step.launch

        def launched(requests: Any) -> None:
            stepping.append(True)
            launch(requests)
            stepping.clear()

        stream = beside(llm, prompt_of(9))
        monkeypatch.setattr(llm.policy.lease.link, "send", counted)
        monkeypatch.setattr(llm.engine.decode_step, "launch", launched)
        amid = spied(llm, monkeypatch)
        before = llm.policy.traffic_so_far().streamed_bytes
        llm.generate(prompt_of(200, seed=3), SamplingParams(max_new_tokens=1))
        streamed = llm._thread.call(lambda engine: llm.policy.traffic_so_far().streamed_bytes) - before
        stream.close()
    assert any(amid) and sent
    assert len(set(sent)) == len(sent) == streamed // llm_row_bytes(tiny)


def llm_row_bytes(tiny: Callable[..., Any]) -> int:
    with LLM(tiny("qwen3_moe").path, device="cpu", policy="lru", expert_memory="150KB") as llm:
        return int(llm.policy.lease.pool.rows.shape[1])


@pytest.mark.parametrize("leaving", [(0,), (1,), (0, 1)])
def test_who_leaves_a_pass_frees_its_pages_and_spoils_nothing(
    leaving: tuple[int, ...], llm: LLM, prompt_of: Callable[..., list[int]]
) -> None:
    """Also where the other one shares its pages, which only the pass computes."""
    common = prompt_of(100)
    prompts = [[*common, 1], [*common, 2, 3]]
    expected = [llm.generate(prompt, SHORT, salt=b"alone")[0].token_ids for prompt in prompts]
    first = beside(llm, prompt_of(9, seed=5), SamplingParams(max_new_tokens=200, ignore_eos=True))
    streams = submit_together(llm, prompts)
    while not under_way(llm):
        next(first)
    for number in leaving:
        streams[number].close()
    for number, stream in enumerate(streams):
        if number not in leaving:
            assert [chunk.token_id for chunk in stream] == expected[number]
    if len(leaving) == 2:
        assert not under_way(llm)
    first.close()
    assert held(llm) == (0, 0, 0, False)
    assert [llm.generate(prompt, SHORT)[0].token_ids for prompt in prompts] == expected


def submit_together(llm: LLM, prompts: list[list[int]]) -> list[Any]:
    """Submit prompts so that they share a pass: the engine hears of both at once."""
    go = threading.Event()
    llm._thread.send(lambda engine: assert_true(go.wait(30)))
    streams = [llm.submit(prompt, SHORT) for prompt in prompts]
    go.set()
    return streams


def assert_true(value: bool) -> None:
    assert value


def test_a_step_that_fails_amid_a_pass_costs_the_pass_only_time(
    llm: LLM, prompt_of: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompt_of(120, seed=1)
    expected = llm.generate(prompt, SHORT, salt=b"alone")[0].token_ids
    first = beside(llm, prompt_of(9))
    read, failed = llm.engine.decode_step.read, []

    def failing() -> Any:
        if (
            llm.engine.scheduler.passing
            and not failed
            and llm.engine._pass is not None
            and llm.engine._pass.stream is None
        ):
            failed.append(True)
            raise ZeroDivisionError
        return read()

    monkeypatch.setattr(llm.engine.decode_step, "read", failing)
    found = llm.generate(prompt, SHORT)[0].token_ids
    assert failed and found == expected
    with pytest.raises(ZeroDivisionError):
        list(first)
    assert held(llm) == (0, 0, 0, False)


def test_a_pass_that_fails_leaves_those_who_decode_beside_it(
    llm: LLM, prompt_of: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = llm.generate(prompt_of(9), LONG)[0].token_ids
    first = beside(llm, prompt_of(9))
    advance, turns = PrefillPass.advance, []

    def failing(self: PrefillPass, seconds: float) -> None:
        turns.append(True)
        if len(turns) == 4:
            raise ZeroDivisionError
        advance(self, seconds)

    monkeypatch.setattr(PrefillPass, "advance", failing)
    with pytest.raises(ZeroDivisionError):
        llm.generate(prompt_of(120, seed=1), SHORT)
    assert [expected[0], *(chunk.token_id for chunk in first)] == expected
    assert held(llm) == (0, 0, 0, False)


def test_logits_beside_a_pass(llm: LLM, prompt_of: Callable[..., list[int]]) -> None:
    prompts = [prompt_of(100, seed=7), prompt_of(40, seed=8)]
    expected, logits = llm.generate(prompts[0], SHORT)[0].token_ids, llm.logits(prompts[1])
    first = beside(llm, prompt_of(9))
    stream = llm.submit([*prompts[0][:-1], prompts[0][-1]], SHORT, salt=b"x")
    while not under_way(llm):
        next(first)
    assert torch.equal(llm.logits(prompts[1]), logits)
    assert [chunk.token_id for chunk in stream] == expected
    first.close()


def test_a_step_that_lacks_slots_fails(tiny: Callable[..., Any], prompt_of: Callable[..., list[int]]) -> None:
    """It gives no tokens that are wrong in silence."""
    with LLM(tiny("qwen3_moe").path, device="cpu", policy="lru", expert_memory="150KB", max_batch=4) as llm:
        prompts = [prompt_of(5 + n, seed=n) for n in range(4)]
        expected = [each.token_ids for each in llm.generate(prompts, SHORT)]
        streams = [llm.submit(prompt, LONG) for prompt in prompts]

        def lease_all_but_one(engine: Any) -> None:
            llm.policy.directory.clear()
            llm.policy.directory.owner_of[1:] = LEASED

        for stream in streams:
            next(stream)
        llm._thread.call(lease_all_but_one)
        for stream in streams:
            with pytest.raises(RuntimeError, match="fewer slots"):
                list(stream)
        assert [each.token_ids for each in llm.generate(prompts, SHORT)] == expected


def test_what_crosses_ahead_may_fail_amid_a_pass(
    llm: LLM, prompt_of: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever copy fails, those who need it fail, and others get what they always get."""
    prompts = [prompt_of(9), prompt_of(150, seed=1)]
    expected = [llm.generate(prompt, SHORT)[0].token_ids for prompt in prompts]
    for number in range(0, 60, 7):
        with monkeypatch.context() as patch:
            first = beside(llm, prompts[0])
            fail_copy(patch, number)
            for stream, tokens in ((llm.submit(prompts[1], SHORT), expected[1]), (first, None)):
                try:
                    found = [chunk.token_id for chunk in stream]
                    assert tokens is None or found == tokens
                except RuntimeError as error:
                    assert "a fault" in str(error)
        assert held(llm) == (0, 0, 0, False)
        assert [llm.generate(prompt, SHORT)[0].token_ids for prompt in prompts] == expected
