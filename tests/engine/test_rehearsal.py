"""A rehearsal goes through every layer's kind, whatever the weights, and leaves nothing behind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from duomoe import LLM, SamplingParams
from duomoe.engine.rehearsal import pass_padding
from duomoe.startup import Startup

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("expert_dtype", ["plain", "int4"])
def test_padding_passes_whatever_the_weights(
    family: str, expert_dtype: str, device: str, tiny: Callable[..., Any], prompt_of: Callable[..., list[int]]
) -> None:
    llm = LLM(tiny(family).path, device=device, expert_dtype=expert_dtype)
    before = llm.logits(prompt_of(20))
    model, expert_format = llm.engine.model, llm.plan.expert_format
    for tokens in (1, 20, 70):
        pass_padding(model, expert_format, tokens)
    assert torch.equal(llm.logits(prompt_of(20)), before)
    model.embedding.fill_(float("nan"))
    for tokens in (1, 20, 70):
        pass_padding(model, expert_format, tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["resident", "lru", "duo"])
def test_nothing_is_compiled_or_captured_after_the_first_token(
    policy: str, tiny: Callable[..., Any], prompt_of: Callable[..., list[int]]
) -> None:
    bounded = {} if policy == "resident" else {"expert_memory": "100KB"}
    llm = LLM(tiny("qwen3_moe").path, device="cuda", policy=policy, prompts=[12], **bounded)
    later = Startup()
    graphs = llm.engine.decode_step._samplings
    for temperature in (0.0, 0.8):
        params = SamplingParams(max_new_tokens=8, temperature=temperature, ignore_eos=True)
        for number, _ in enumerate(llm.stream(prompt_of(12), params)):
            if number == 0:
                captured = len(graphs)
                context = later.counting_kernels()
                context.__enter__()
        context.__exit__(None, None, None)
        assert len(graphs) == captured > 0
    assert later.compiled_kernels == 0
