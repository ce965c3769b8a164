"""What a request may ask for, and what it gets."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from duomoe import LLM, InputError, SamplingParams
from duomoe.grammar import Grammar
from duomoe.memory.pages import PAGE_SIZE, PagePool


def test_a_single_stop_string_is_one_string() -> None:
    assert SamplingParams(stop="end").stop == ("end",)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_new_tokens", [0, True, 1.5, "9", None]),
        ("temperature", [-1, float("nan"), 1e7, "hot", None]),
        ("top_k", [-1, 2**31, 0.5]),
        ("top_p", [0, 1.1, float("nan")]),
        ("min_p", [-0.1, 1.1, float("nan")]),
        ("repetition_penalty", [0, float("inf")]),
        ("presence_penalty", [-2.1, 2.1]),
        ("frequency_penalty", [-2.1, float("nan")]),
        ("min_tokens", [-1, 10_000, 1.0]),
        ("seed", [-1, 2**63, 1.0]),
        ("logprobs", [-1, 21, True]),
        ("prompt_logprobs", [-1, 21]),
        ("stop", ["", [""], 5]),
        ("stop_token_ids", [[-1], ["a"], 5]),
        ("logit_bias", [{-1: 1}, {1: 101}, {1: "a"}, {1: float("nan")}, [1]]),
        ("grammar", ["a", 5]),
    ],
)
def test_values_out_of_range_are_named(field: str, values: list[Any]) -> None:
    word = {"stop_token_ids": "stop-token-id", "grammar": "grammar"}.get(field, field.replace("_", "-"))
    for value in values:
        with pytest.raises(InputError, match=word):
            SamplingParams(**{field: value})


@pytest.fixture(scope="module")
def llm(tiny: Callable[..., Any]) -> LLM:
    return LLM(tiny("qwen3_moe").path, device="cpu", max_model_len=160)


def test_log_probabilities_are_the_models(llm: LLM, prompt_of: Callable[..., list[int]]) -> None:
    """Of what is generated and of the prompt, though its beginning was computed before, and over several slices."""
    prompt = prompt_of(5 * PAGE_SIZE)
    plain = llm.generate(prompt, SamplingParams(max_new_tokens=6))[0]
    assert plain.logprobs is plain.prompt_logprobs is None
    asked = SamplingParams(max_new_tokens=6, logprobs=3, prompt_logprobs=2, temperature=0.9, seed=1)
    found = llm.generate(prompt, asked)[0]
    assert found.metrics.cached_tokens == 0
    assert (
        found.token_ids == llm.generate(prompt, SamplingParams(max_new_tokens=6, temperature=0.9, seed=1))[0].token_ids
    )
    whole = llm.logits([*prompt, *found.token_ids]).log_softmax(-1)
    told = [*(found.prompt_logprobs or []), *(found.logprobs or [])]
    assert told[0] is None and len(told) == len(prompt) + 6
    for place, token in enumerate([*prompt, *found.token_ids][1:], start=1):
        each = told[place]
        assert each is not None and each.logprob == pytest.approx(whole[place - 1, token].item(), abs=1e-4)
        best = whole[place - 1].topk(len(each.top)).values.tolist()
        assert [value for _, value in each.top] == pytest.approx(best, abs=1e-4)
    chunks = [chunk.logprobs for chunk in llm.stream(prompt, asked)]
    assert [each.logprob for each in chunks if each] == [each.logprob for each in found.logprobs or []]


def test_penalties_biases_and_ends_do_what_they_say(llm: LLM, prompt_of: Callable[..., list[int]]) -> None:
    prompt = prompt_of(10)
    first = llm.generate(prompt, SamplingParams(max_new_tokens=1))[0].token_ids[0]
    banned = SamplingParams(max_new_tokens=20, logit_bias={first: -100})
    assert first not in llm.generate(prompt, banned)[0].token_ids
    wanted = llm.generate(prompt, SamplingParams(max_new_tokens=20, logit_bias={7: 100}))[0]
    assert wanted.token_ids == [7] * 20
    fresh = SamplingParams(max_new_tokens=40, frequency_penalty=2, presence_penalty=2, logit_bias={7: 5})
    assert llm.generate(prompt, fresh)[0].token_ids.count(7) < 20
    ended = SamplingParams(max_new_tokens=20, stop_token_ids=[7], logit_bias={7: 100})
    assert llm.generate(prompt, ended)[0].token_ids == [7]
    later = llm.generate(
        prompt, SamplingParams(max_new_tokens=20, min_tokens=5, stop_token_ids=[7], logit_bias={7: 100})
    )
    assert len(later[0].token_ids) == 6 and later[0].token_ids.index(7) == 5
    with pytest.raises(InputError, match="not a token id"):
        llm.generate(prompt, SamplingParams(logit_bias={5000: 1}))


def test_a_penalty_is_by_the_tokens_of_prompt_and_output(llm: LLM, prompt_of: Callable[..., list[int]]) -> None:
    """Step by step against logits of whole passes, in a batch and after a preemption."""
    params = SamplingParams(max_new_tokens=40, repetition_penalty=1.8, presence_penalty=0.5, frequency_penalty=0.3)
    prompts = [prompt_of(20 + number, seed=number) for number in range(3)]
    pages, llm.engine.scheduler.pages = llm.engine.scheduler.pages, PagePool(10)
    llm.engine.cache.pages = llm.engine.scheduler.pages
    try:
        before = llm.stats().preemptions
        found = [completion.token_ids for completion in llm.generate(prompts, params)]
        assert llm.stats().preemptions > before
    finally:
        llm.engine.cache.pages = llm.engine.scheduler.pages = pages
    for prompt, tokens in zip(prompts, found, strict=True):
        logits = llm.logits([*prompt, *tokens])
        for step, token in enumerate(tokens):
            row, output = logits[len(prompt) + step - 1].clone(), tokens[:step]
            for each in {*prompt, *output}:
                row[each] = row[each] / 1.8 if row[each] > 0 else row[each] * 1.8
                row[each] -= 0.3 * output.count(each) + 0.5 * (each in output)
            assert row[token] >= row.max() - 1e-4


@pytest.fixture(scope="module")
def embedded() -> LLM:
    return LLM(device="cpu", max_model_len=512)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 10}, "kind": {"enum": ["a", "b"]}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_follow_their_grammars(embedded: LLM, temperature: float) -> None:
    grammars = [Grammar.json_schema(SCHEMA), Grammar.regex("[ab]{3}-[0-9]{2}"), Grammar.lark('start: "x"+ "y"')]
    streams = [
        embedded.stream("The sea", SamplingParams(max_new_tokens=80, temperature=temperature, seed=2, grammar=grammar))
        for grammar in grammars
    ]
    streams.append(embedded.stream("The sea", SamplingParams(max_new_tokens=20, temperature=temperature, seed=2)))
    texts = ["".join(chunk.text for chunk in stream) for stream in streams]
    answer = json.loads(texts[0])
    assert set(answer) == {"name", "kind"} and answer["kind"] in "ab" and len(answer["name"]) <= 10
    assert re.fullmatch("[ab]{3}-[0-9]{2}", texts[1])
    assert re.fullmatch("x+y?", texts[2])
    alone = embedded.generate("The sea", SamplingParams(max_new_tokens=20, temperature=temperature, seed=2))[0]
    assert texts[3] == alone.text


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Grammar.json_schema("{"), "cannot be read"),
        (lambda: Grammar.json_schema("[1]"), "JSON object"),
        (lambda: Grammar.json_schema({"type": "nothing"}), "grammar"),
        (lambda: Grammar.json_schema({"$ref": "https://example.com/a.json"}), "grammar"),
        (lambda: Grammar.regex("("), "grammar"),
        (lambda: Grammar.regex("x" * 10**6), "131072 bytes"),
        (lambda: Grammar.lark("no grammar"), "grammar"),
        (lambda: Grammar.regex("((a{1,500}){1,500}){1,500}"), "grammar"),
    ],
)
def test_grammars_that_cannot_be_are_refused(embedded: LLM, make: Callable[[], Grammar], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        embedded.generate("The sea", SamplingParams(grammar=make()))


def test_a_grammar_that_fails_ends_its_request_alone(embedded: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    alone = embedded.generate("The sea", params)[0].token_ids
    stream = embedded.stream("The sea", SamplingParams(max_new_tokens=20, grammar=Grammar.regex("[a-z ]+")))
    other = embedded.stream("The sea", params)
    monkeypatch.setattr(stream._request.matcher, "allowed", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(stream)
    assert [chunk.token_id for chunk in other] == alone
