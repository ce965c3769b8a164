"""A pass cut into chunks is the same pass."""

from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from duomoe import LLM, SamplingParams
from duomoe.engine import chunks
from duomoe.engine.chunks import Span, cut
from duomoe.experts.policies import BOUNDED


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=8), size=st.integers(1, 60))
def test_cut_keeps_every_token_in_order_and_fills_all_but_the_last(lengths: list[int], size: int) -> None:
    spans = [Span([100 * n + i for i in range(length)], n, n + length, [n]) for n, length in enumerate(lengths)]
    found = cut(spans, size)
    assert [sum(len(span.tokens) for span in chunk) for chunk in found[:-1]] == [size] * (len(found) - 1)
    assert 0 < sum(len(span.tokens) for span in found[-1]) <= size
    at: dict[int, int] = {}
    for span in chain(*found):
        number = span.pages[0]
        assert span.begin == at.get(number, number) and span.prompt_length == number + lengths[number]
        assert span.tokens == [100 * number + span.begin - number + i for i in range(len(span.tokens))]
        at[number] = span.begin + len(span.tokens)
    assert at == {n: n + length for n, length in enumerate(lengths)}


@pytest.mark.parametrize(
    "overrides", [{}, {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}}]
)
@pytest.mark.parametrize("size", [1, 16, 37, 150])
def test_chunks_give_the_logits_of_transformers(
    size: int,
    overrides: dict[str, Any],
    tiny: Callable[..., Any],
    prompt_of: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chunks.cut, "__defaults__", (size,))
    if overrides:
        overrides = overrides | {"max_position_embeddings": 32}  # so that the prompt stretches the angles
    # A seed of its own: what a long prompt did to transformers' dynamic angles, it keeps for shorter ones.
    model = tiny("qwen3_moe", seed=1, **overrides)
    llm = LLM(model.path, device="cpu")
    prompt = prompt_of(60 if overrides else 130)
    torch.testing.assert_close(llm.logits(prompt), model.logits(prompt), atol=1e-4, rtol=0)


@pytest.mark.parametrize("policy", BOUNDED)
def test_chunks_are_lossless_and_an_expert_still_crosses_once(
    policy: str, tiny: Callable[..., Any], prompt_of: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks.cut, "__defaults__", (16,))
    path = tiny("mixtral").path
    whole = LLM(path, device="cpu")
    prompts = [prompt_of(70), prompt_of(33), prompt_of(1)]
    expected = [completion.token_ids for completion in whole.generate(prompts, SamplingParams(max_new_tokens=9))]
    memory = whole.memory["expert_slots_bytes"] * 5 // 24
    llm = LLM(path, device="cpu", policy=policy, expert_memory=memory)
    assert [completion.token_ids for completion in llm.generate(prompts, SamplingParams(max_new_tokens=9))] == expected
    traffic = llm.generate(prompts, SamplingParams(max_new_tokens=1))[0].metrics.experts
    if policy in ("lru", "duo"):
        assert traffic.link_bytes == traffic.streamed_bytes <= whole.memory["expert_slots_bytes"]
