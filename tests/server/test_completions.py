"""/v1/completions: what is answered is what the engine generates, in the protocol's shape."""

from typing import Any

import pytest
import torch
from servers import NAME, InProcess, Process, events

from duomoe import LLM, SamplingParams

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
PATH = "/v1/completions"


def texts(answer: dict[str, Any]) -> list[str]:
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    return [choice["text"] for choice in answer["choices"]]


def generated(llm: LLM, prompt: str | list[int], **params: Any) -> str:
    return llm.generate(prompt, SamplingParams(**params))[0].text


def test_an_answer_is_what_the_engine_generates(server: InProcess, llm: LLM) -> None:
    answer = server.complete(model=NAME, prompt="The sea", **GREEDY)
    completion = llm.generate("The sea", SamplingParams(max_new_tokens=12))[0]
    assert texts(answer) == [completion.text]
    assert answer["object"] == "text_completion"
    assert answer["model"] == NAME
    assert answer["choices"][0]["finish_reason"] == "length"
    prompt = completion.metrics.prompt_tokens
    assert answer["usage"] | {"prompt_tokens_details": None} == {
        "prompt_tokens": prompt,
        "completion_tokens": 12,
        "total_tokens": prompt + 12,
        "prompt_tokens_details": None,
    }


def test_prompts_are_texts_token_ids_or_lists_of_either(server: InProcess, llm: LLM) -> None:
    prompts = ["The sea", "In the beginning", "def main():"]
    tokens = [llm.tokenizer.encode(prompt) for prompt in prompts]
    expected = [generated(llm, prompt, max_new_tokens=12) for prompt in prompts]
    assert texts(server.complete(prompt=prompts, **GREEDY)) == expected
    assert texts(server.complete(prompt=tokens, **GREEDY)) == expected
    assert texts(server.complete(prompt=[prompts[0], tokens[1]], **GREEDY)) == expected[:2]
    assert texts(server.complete(prompt=tokens[2], **GREEDY)) == expected[2:]
    assert server.complete(prompt=tokens, **GREEDY)["usage"]["prompt_tokens"] == sum(map(len, tokens))


def test_each_choice_has_noise_of_its_own_and_a_seed_repeats_them(server: InProcess, llm: LLM) -> None:
    asked: dict[str, Any] = {"prompt": ["The sea", "The sky"], "n": 3, "temperature": 1, "top_p": 1, "max_tokens": 16}
    first = texts(server.complete(**asked, seed=5))
    assert first == texts(server.complete(**asked, seed=5))
    assert len(set(first)) == 6
    for prompt, choices in zip(asked["prompt"], (first[:3], first[3:]), strict=True):
        for number, text in enumerate(choices):
            params = dict(max_new_tokens=16, temperature=1.0, seed=5 + number)
            assert text == generated(llm, prompt, **params)
    unseeded = texts(server.complete(**asked))
    assert len(set(unseeded)) == 6
    assert unseeded != texts(server.complete(**asked))
    assert texts(server.complete(**asked, seed=-1)) == texts(server.complete(**asked, seed=-1))


def test_what_a_request_leaves_open_is_as_the_checkpoint_suggests(server: InProcess, llm: LLM) -> None:
    assert llm.generation_config["temperature"] == 0.8
    text = texts(server.complete(prompt="The sea", seed=3, max_tokens=16))[0]
    assert text == generated(llm, "The sea", max_new_tokens=16, temperature=0.8, top_p=0.95, seed=3)
    assert len(llm.tokenizer.encode(texts(server.complete(prompt="The sea", temperature=0))[0], special=False)) == 16


def test_a_stop_string_ends_the_text_before_it(server: InProcess, llm: LLM) -> None:
    whole = generated(llm, "The sea", max_new_tokens=12)
    stop = whole[8:11]
    for given in (stop, [stop, "\x00never"]):
        choice = server.complete(prompt="The sea", stop=given, **GREEDY)["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(stop)], "stop")


def test_echo_begins_with_the_prompt(server: InProcess, llm: LLM) -> None:
    expected = generated(llm, "The  sea", max_new_tokens=12)
    assert texts(server.complete(prompt="The  sea", echo=True, **GREEDY)) == ["The  sea" + expected]
    tokens = llm.tokenizer.encode("The  sea")
    assert texts(server.complete(prompt=tokens, echo=True, **GREEDY)) == ["The  sea" + expected]
    scored = server.complete(prompt="The  sea", echo=True, max_tokens=0)
    assert texts(scored) == ["The  sea"]
    assert scored["usage"]["completion_tokens"] == 0


def test_an_answer_ends_with_the_context(server: InProcess, llm: LLM) -> None:
    prompt = [5] * (llm.max_model_len - 3)
    answer = server.complete(prompt=prompt, max_tokens=100, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"
    error = server.error(PATH, 400, {"prompt": [5] * llm.max_model_len})
    assert error["code"] == "context_length_exceeded"
    assert str(llm.max_model_len) in error["message"]


def test_what_says_nothing_is_accepted(server: InProcess, llm: LLM) -> None:
    extra = dict(stop=None, logprobs=None, best_of=1, use_beam_search=False, top_k=-1, user="me", suffix="", n=1.0)
    assert texts(server.complete(prompt="The sea", **extra, **GREEDY)) == [generated(llm, "The sea", max_new_tokens=12)]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [""]}, "prompt[0]"),
        ({"prompt": [[1], []]}, "prompt[1]"),
        ({"prompt": [1, "a"]}, "prompt[0]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 10**40}, "max_tokens"),
        ({"prompt": "a", "max_tokens": "5"}, "max_tokens"),
        ({"prompt": "a", "temperature": -0.1}, "temperature"),
        ({"prompt": "a", "temperature": True}, "temperature"),
        ({"prompt": "a", "top_p": 1.1}, "top_p"),
        ({"prompt": "a", "top_k": -2}, "top_k"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "n": 1000}, "n"),
        ({"prompt": "a", "seed": 2**63}, "seed"),
        ({"prompt": "a", "stop": ["x"] * 100_000}, "stop"),
        ({"prompt": "a", "stop": [""]}, "stop"),
        ({"prompt": "a", "stop": "x" * 2000}, "stop"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logit_bias": {"a": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias"),
        ({"prompt": "a", "stop_token_ids": [1.5]}, "stop_token_ids"),
        ({"prompt": "a", "stream": 1}, "stream"),
        ({"prompt": "a", "stream_options": {"surprise": 1}}, "stream_options.surprise"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "use_beam_search": True}, "use_beam_search"),
        ({"prompt": "a", "dry_multiplier": 0.8}, "dry_multiplier"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "messages"),
        ({"prompt": "a", "response_format": {"type": "xml"}}, "response_format"),
        ({"prompt": "a", "structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
    ],
)
def test_a_wrong_field_is_named(server: InProcess, fields: dict[str, Any], param: str) -> None:
    error = server.error(PATH, 400, fields)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param.split("[")[0] in error["message"]


def test_another_model_is_not_found(server: InProcess) -> None:
    error = server.error(PATH, 404, {"model": "gpt-9", "prompt": "a"})
    assert error["code"] == "model_not_found"
    assert NAME in error["message"]


def test_tokens_out_of_the_vocabulary_are_refused_and_nothing_is_left_behind(server: InProcess, llm: LLM) -> None:
    before = server.service._sequences
    server.error(PATH, 400, {"prompt": [[1, 2], [1, 10**6]], "n": 2})
    assert server.service._sequences == before == 0


# Fields that come with sampling.


def test_logprobs_are_those_of_the_model(server: InProcess, llm: LLM) -> None:
    choice = server.complete(prompt="The sea", logprobs=3, **GREEDY)["choices"][0]
    tokens = llm.tokenizer.encode("The sea")
    completion = llm.generate(tokens, SamplingParams(max_new_tokens=12))[0]
    logits = llm.logits(tokens + completion.token_ids)[len(tokens) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None]).squeeze(1)
    told = choice["logprobs"]
    assert told["token_logprobs"] == pytest.approx(expected.tolist(), abs=0.05)
    assert "".join(told["tokens"]) == choice["text"]
    assert told["text_offset"] == [len("".join(told["tokens"][:n])) for n in range(12)]
    for token, logprob, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        assert len(top) <= 3 + 1
        assert top[token] == logprob == max(top.values())


@pytest.mark.parametrize("most", [0, 1])
def test_an_echo_has_the_prompts_logprobs(server: InProcess, llm: LLM, most: int) -> None:
    tokens = llm.tokenizer.encode("Emma was not at all surprised when Mr. Knightley came")
    choice = server.complete(prompt=[tokens, tokens[:5]], echo=True, logprobs=1, max_tokens=most)["choices"][0]
    told = choice["logprobs"]
    expected = llm.logits(tokens).log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1)
    assert told["token_logprobs"][0] is None is told["top_logprobs"][0]
    assert told["token_logprobs"][1 : len(tokens)] == pytest.approx(expected.tolist(), abs=0.05)
    assert len(told["tokens"]) == len(tokens) + most
    error = server.error(PATH, 400, {"prompt": tokens, "echo": True, "logprobs": 1, "stream": True})
    assert error["param"] == "stream"


def test_a_bias_decides(server: InProcess) -> None:
    assert texts(server.complete(prompt="The sea", logit_bias={"70": 100}, temperature=0, max_tokens=3)) != texts(
        server.complete(prompt="The sea", temperature=0, max_tokens=3)
    )


def test_a_stop_token_ends_the_text(server: InProcess, llm: LLM) -> None:
    tokens = llm.generate("The sea", SamplingParams(max_new_tokens=12))[0].token_ids
    answer = server.complete(prompt="The sea", stop_token_ids=[tokens[4]], **GREEDY)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == tokens.index(tokens[4]) + 1


def test_penalties_reach_the_engine(server: InProcess, llm: LLM) -> None:
    penalties = dict(min_p=0.1, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25)
    answer = server.complete(prompt="The sea", **penalties, **GREEDY)
    assert texts(answer) == [generated(llm, "The sea", max_new_tokens=12, **penalties)]


def test_a_regular_expression_is_followed(server: InProcess) -> None:
    answer = server.complete(prompt="A date: ", structured_outputs={"regex": r"\d{4}-\d\d-\d\d"}, **GREEDY)
    (text,) = texts(answer)
    assert [len(part) for part in text.split("-")] == [4, 2, 2]
    server.error(PATH, 400, {"prompt": "a", "structured_outputs": {"regex": "("}})


# Events.


def test_events_add_up_to_the_whole_answer(process: Process, server: InProcess) -> None:
    asked = {"prompt": ["The sea", "def main():"], "n": 2, "seed": 4, "max_tokens": 16}
    expected = server.complete(**asked)
    found = events(process, PATH, **asked, stream_options={"include_usage": True})
    assert len({event["id"] for event in found}) == 1
    assert found[-1]["choices"] == []
    assert found[-1]["usage"] == expected["usage"]
    assert all(event["usage"] is None for event in found[:-1])
    for index, choice in enumerate(expected["choices"]):
        mine = [event["choices"][0] for event in found[:-1] if event["choices"][0]["index"] == index]
        assert "".join(piece["text"] for piece in mine) == choice["text"]
        reasons = [piece["finish_reason"] for piece in mine]
        assert reasons == [None] * (len(mine) - 1) + [choice["finish_reason"]]


def test_usage_in_each_event_counts_up(process: Process) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    found = events(process, PATH, prompt="The sea", **GREEDY, stream_options=options)
    counts = [event["usage"]["completion_tokens"] for event in found]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert counts[-1] == 12
    assert "usage" not in events(process, PATH, prompt="The sea", **GREEDY)[0]


def test_an_echo_comes_first(process: Process) -> None:
    found = events(process, PATH, prompt="The sea", echo=True, **GREEDY)
    assert found[0]["choices"][0]["text"].startswith("The sea")
    assert sum("The sea" in event["choices"][0]["text"] for event in found) == 1


# Prefixes.


def test_prefixes_are_shared_within_a_salt(llm: LLM) -> None:
    keyed = InProcess(llm, keys=["one", "two"])

    def cached(key: str, **fields: Any) -> int:
        body = {"prompt": [7, 8, 9, 10] * 40, "max_tokens": 1} | fields
        answer = keyed.post(PATH, body, headers={"authorization": f"Bearer {key}"}).json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("one") == 0
    assert cached("one") >= 128
    assert cached("two") == 0
    assert cached("one", cache_salt="mine") == 0
    assert cached("one", cache_salt="mine") >= 128
