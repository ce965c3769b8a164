"""What the tokens of each page chose, counted, and what a prefill makes of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from duomoe import LLM, SamplingParams
from duomoe.experts.page_routing import PageRouting, Prompt
from duomoe.experts.prefill import HALF_LIFE, _Prompts, prompt_use
from duomoe.memory.pages import PAGE_SIZE

LAYERS, EXPERTS, TOP_K = 3, 5, 2


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), max_size=6), st.randoms(use_true_random=False))
def test_counts_are_those_of_the_tokens_that_a_page_holds(passes: list[tuple[int, int]], generator: Any) -> None:
    """Pages are written from their beginning, by passes and steps; padding goes nowhere."""
    routing = PageRouting(4, LAYERS, EXPERTS, torch.device("cpu"))
    expected = torch.zeros(4, LAYERS, EXPERTS)
    for page, tokens in passes:
        tokens = min(tokens, PAGE_SIZE)
        expected[page] = 0
        rows = [page * PAGE_SIZE + offset for offset in range(tokens)]
        choice = [[generator.sample(range(EXPERTS), TOP_K) for _ in rows] for _ in range(LAYERS)]
        for layer in range(LAYERS):
            for chosen in choice[layer]:
                for expert in chosen:
                    expected[page, layer, expert] += 1
        cut = generator.randint(0, tokens)
        for layer in range(LAYERS):  # as a prefill does: layer by layer, in chunks, with padding
            for part in (slice(0, cut), slice(cut, tokens)):
                padded = torch.tensor([*rows[part], -1])
                experts = torch.tensor([*choice[layer][part], [-1] * TOP_K])
                routing.note(padded, experts[None], layer)
        assert torch.equal(routing.of([0, 1, 2, 3]), expected.double())
    routing.note(torch.tensor([-1]), torch.full((LAYERS, 1, TOP_K), -1))  # as decode does: all layers at once
    routing.note(torch.tensor([2 * PAGE_SIZE]), torch.tensor([[[0, 4]]] * LAYERS))
    expected[2] = torch.tensor([1, 0, 0, 0, 1])
    assert torch.equal(routing.of([0, 1, 2, 3]), expected.double())


def test_what_is_known_of_a_prompt_fades_with_the_tokens_behind_it() -> None:
    routing = PageRouting(3, 1, EXPERTS, torch.device("cpu"))
    for page, expert in ((0, 1), (2, 3)):
        rows = page * PAGE_SIZE + torch.arange(PAGE_SIZE)
        routing.note(rows, torch.full((1, PAGE_SIZE, 1), expert))
    prompts = _Prompts([Prompt(1, [0, 2], HALF_LIFE)], routing, 1, EXPERTS)
    every, late = prompts.shares(0, torch.tensor([[4]]))
    counts = torch.tensor([0, 16, 0, 16, 1])
    assert every.tolist() == pytest.approx(prompt_use(counts, 2 * PAGE_SIZE + 1, 1).tolist())
    worth = torch.tensor([0, 16 * 0.5 ** (1.5), 0, 8, 1])
    assert late.tolist() == pytest.approx((worth / worth.sum()).tolist())


def test_each_prompt_of_a_pass_counts() -> None:
    """Whichever stands last in it; an expert is needed if any of them needs it."""
    chosen = torch.tensor([[0]] * 200 + [[1]] * 3 + [[1]] + [[2]] * 3)
    for order in ((0, 1), (1, 0)):
        sizes, tokens = [203, 4], [chosen[:203], chosen[203:]]
        prompts = _Prompts([Prompt(sizes[i], [], sizes[i]) for i in order], None, 1, EXPERTS)
        every, late = prompts.shares(0, torch.cat([tokens[i] for i in order]))
        alone = [_Prompts([Prompt(sizes[i], [], sizes[i])], None, 1, EXPERTS).shares(0, tokens[i]) for i in (0, 1)]
        for found, one, other in zip((every, late), *alone, strict=True):
            assert found.tolist() == pytest.approx((1 - (1 - one) * (1 - other)).tolist())


@pytest.mark.parametrize("policy", ["lru", "duo"])
def test_decode_begins_with_what_the_whole_prompt_used(
    policy: str, tiny: Callable[..., Any], prompt_of: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a prompt used is known in the same way whether its pages were there or not, generated ones too."""
    llm = LLM(tiny("qwen3_moe").path, device="cpu", policy=policy, expert_memory="100KB")
    prompt = prompt_of(2 * PAGE_SIZE + 3)
    answer = llm.generate(prompt, SamplingParams(max_new_tokens=40))[0].token_ids
    turn = [*prompt, *answer, 5, 6, 7]
    begun: list[torch.Tensor] = []
    start = llm.policy.decoder.start
    use = llm.policy.directory.use
    monkeypatch.setattr(llm.policy.decoder, "start", lambda: (begun.append(use.clone()), start())[1])
    found = [llm.generate(turn, SamplingParams(max_new_tokens=2), salt=salt)[0] for salt in (b"", b"other")]
    assert [each.metrics.cached_tokens for each in found] == [(len(turn) - 4) // PAGE_SIZE * PAGE_SIZE, 0]
    assert found[0].token_ids == found[1].token_ids
    assert torch.equal(*begun)
