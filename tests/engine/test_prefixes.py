"""Prompts that begin alike share what is computed; who is preempted is computed again. Neither changes a token."""

from collections.abc import Callable
from typing import Any

import pytest

from duomoe import LLM, SamplingParams
from duomoe.memory.pages import PAGE_SIZE, PagePool

DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, "max_position_embeddings": 32}


def cached(llm: LLM, prompt: list[int], **options: Any) -> int:
    return llm.generate(prompt, SamplingParams(max_new_tokens=1), **options)[0].metrics.cached_tokens


@pytest.mark.parametrize("policy", ["resident", "lru", "duo", "on_demand"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_tokens_are_those_of_transformers(
    family: str, policy: str, tiny: Callable[..., Any], prompt_of: Callable[..., list[int]]
) -> None:
    model = tiny(family)
    llm = LLM(model.path, device="cpu", policy=policy, expert_memory=None if policy == "resident" else "100KB")
    common = prompt_of(3 * PAGE_SIZE + 5)
    # A conversation, and another prompt that leaves it in the middle; then two that are computed together.
    params = SamplingParams(max_new_tokens=20)
    first = llm.generate(common, params)[0]
    turn = [*common, *first.token_ids, *prompt_of(7, seed=1)]
    for prompt, found in [(turn, 4 * PAGE_SIZE), ([*common[: 2 * PAGE_SIZE + 1], 1, 2], 2 * PAGE_SIZE)]:
        completion = llm.generate(prompt, params)[0]
        assert completion.token_ids == model.greedy(prompt, 20)
        assert completion.metrics.cached_tokens == found
    prompts = [[*prompt_of(2 * PAGE_SIZE, seed=2), *prompt_of(4, seed=number)] for number in (3, 4, 5)]
    completions = llm.generate(prompts, params)
    assert [completion.token_ids for completion in completions] == [model.greedy(prompt, 20) for prompt in prompts]
    assert [completion.metrics.cached_tokens for completion in completions] == [0, 2 * PAGE_SIZE, 2 * PAGE_SIZE]


def test_nothing_is_shared_across_salts_nor_where_it_is_switched_off(
    tiny: Callable[..., Any], prompt_of: Callable[..., list[int]]
) -> None:
    prompt = prompt_of(40)
    llm = LLM(tiny("mixtral").path, device="cpu")
    found = [cached(llm, prompt, salt=salt) for salt in (b"", b"a", b"a", b"b", b"")]
    assert found == [0, 0, 2 * PAGE_SIZE, 0, 2 * PAGE_SIZE]
    llm = LLM(tiny("mixtral").path, device="cpu", prefix_caching=False)
    assert [cached(llm, prompt) for _ in range(3)] == [0, 0, 0]


def test_logits_use_and_leave_nothing(tiny: Callable[..., Any], prompt_of: Callable[..., list[int]]) -> None:
    llm, prompt = LLM(tiny("mixtral").path, device="cpu"), prompt_of(40)
    before = llm.logits(prompt)
    assert cached(llm, prompt) == 0
    assert llm.logits(prompt).equal(before)


@pytest.mark.parametrize("overrides", [{}, DYNAMIC], ids=["plain", "dynamic"])
def test_who_is_preempted_has_the_tokens_that_it_has_alone(
    overrides: dict[str, Any], tiny: Callable[..., Any], prompt_of: Callable[..., list[int]]
) -> None:
    """Keys of dynamic angles are made again for the length at which they were made first."""
    llm = LLM(tiny("qwen3_moe", seed=2, **overrides).path, device="cpu", max_model_len=160 if not overrides else None)
    params = SamplingParams(max_new_tokens=60 if not overrides else 100)
    prompts = [prompt_of(20 + 3 * number, seed=number) for number in range(4)]
    alone = [llm.generate(prompt, params)[0].token_ids for prompt in prompts]
    llm.engine.cache.pages = llm.engine.scheduler.pages = PagePool(10)
    together = llm.generate(prompts, params)
    assert [completion.token_ids for completion in together] == alone
    assert llm.engine.scheduler.counts.preemptions > 0
    if overrides:
        assert cached(llm, prompts[0]) == 0


def test_logits_take_pages_from_who_runs(tiny: Callable[..., Any], prompt_of: Callable[..., list[int]]) -> None:
    llm = LLM(tiny("mixtral").path, device="cpu", max_model_len=160)
    llm.engine.cache.pages = llm.engine.scheduler.pages = PagePool(10)
    prompt, other = prompt_of(100), prompt_of(100, seed=1)
    params = SamplingParams(max_new_tokens=50)
    expected, logits = llm.generate(prompt, params)[0].token_ids, llm.logits(other)
    stream = llm.stream(prompt, params)
    tokens = [next(stream).token_id]
    assert llm.logits(other).equal(logits)
    assert tokens + [chunk.token_id for chunk in stream] == expected
