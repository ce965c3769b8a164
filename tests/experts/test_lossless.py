"""Which experts are resident, and when, never changes a result: every policy and budget, bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from duomoe import LLM, SamplingParams


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_every_number_of_slots_gives_the_same_bits(
    family: str, dtype: str, device: str, tiny: Callable[..., Any], prompt_of: Callable[..., list[int]]
) -> None:
    path = tiny(family).path
    whole = LLM(path, device=device, dtype=dtype)
    row = whole.memory["expert_slots_bytes"] // (3 * whole.config.num_experts)
    prompt, batch = prompt_of(50), [prompt_of(length, seed=length) for length in (1, 16, 33)]
    logits = whole.logits(prompt)
    tokens = [completion.token_ids for completion in whole.generate(batch, SamplingParams(max_new_tokens=8))]
    for slots in [*range(1, whole.config.num_experts + 1), 3 * whole.config.num_experts]:
        bounded = LLM(path, device=device, dtype=dtype, policy="on_demand", expert_memory=slots * row)
        assert torch.equal(bounded.logits(prompt), logits)
        found = bounded.generate(batch, SamplingParams(max_new_tokens=8))
        assert [completion.token_ids for completion in found] == tokens


@given(data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_prompts_and_any_budget(data: st.DataObject, tiny: Callable[..., Any]) -> None:
    path = tiny("qwen3_moe").path
    whole = LLM(path, device="cpu")
    row = whole.memory["expert_slots_bytes"] // (3 * whole.config.num_experts)
    bounded = LLM(path, device="cpu", policy="on_demand", expert_memory=row * data.draw(st.integers(1, 9)))
    tokens = st.lists(st.integers(0, 210), min_size=1, max_size=70)
    prompts = data.draw(st.lists(tokens, min_size=1, max_size=4))
    params = SamplingParams(max_new_tokens=5, temperature=data.draw(st.sampled_from([0.0, 1.0])), seed=7)
    expected = [completion.token_ids for completion in whole.generate(prompts, params)]
    assert [completion.token_ids for completion in bounded.generate(prompts, params)] == expected


def test_on_demand_moves_what_was_routed_and_nothing_else(
    tiny: Callable[..., Any], prompt_of: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(tiny("mixtral").path, device="cpu", policy="on_demand", expert_memory="100KB")
    routed = []
    experts = llm.policy.experts

    def spy(index: int, h: torch.Tensor, routing: Any) -> torch.Tensor:
        routed.append(len(set(routing.experts.flatten().tolist())))
        return experts(index, h, routing)

    monkeypatch.setattr(llm.policy, "experts", spy)
    traffic = llm.generate(prompt_of(30), SamplingParams(max_new_tokens=4))[0].metrics.experts
    assert traffic.misses == sum(routed) and traffic.hits == 0
    assert traffic.demand_bytes == sum(routed) * llm.policy.pool.rows.shape[1] == traffic.link_bytes


def test_no_stale_weight_is_ever_read(
    tiny: Callable[..., Any], prompt_of: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots hold NaN until their expert arrives, and again as soon as the directory takes them away."""
    path = tiny("qwen2_moe").path
    expected = LLM(path, device="cpu").logits(prompt_of(40))
    llm = LLM(path, device="cpu", policy="on_demand", expert_memory="60KB")
    hand_over = llm.policy.directory.hand_over

    def poison(layer: int, experts: list[int]) -> torch.Tensor:
        llm.policy.pool.rows.fill_(0xFF)  # NaN in every float type
        return hand_over(layer, experts)

    monkeypatch.setattr(llm.policy.directory, "hand_over", poison)
    assert torch.equal(llm.logits(prompt_of(40)), expected)
