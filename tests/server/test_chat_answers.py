"""/v1/chat/completions: conversations, and answers taken apart."""

import json
from collections.abc import Sequence
from typing import Any, cast

import pytest
from servers import NAME, InProcess, Process, events

from duomoe import LLM, Completion, SamplingParams
from duomoe.chat_output import Delta
from duomoe.engine.completion import Chunk, Metrics
from duomoe.experts.link import Traffic
from duomoe.server.chat import ChatAnswer
from duomoe.server.generation import Generation
from duomoe.server.protocol import parse_chat
from duomoe.server.token_text import TokenText

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


def test_an_answer_continues_the_template(server: InProcess, llm: LLM) -> None:
    answer = server.chat(model=NAME, messages=HELLO, **GREEDY)
    tokens = llm.tokenizer.encode("USER\nHello\n\nASSISTANT\n", special=False)
    completion = llm.generate(tokens, SamplingParams(max_new_tokens=12))[0]
    assert answer["object"] == "chat.completion"
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": completion.text}
    assert (choice["finish_reason"], choice["logprobs"]) == ("length", None)
    assert answer["usage"]["prompt_tokens"] == len(tokens)


def test_an_answer_ends_at_the_checkpoints_strings_too() -> None:
    with LLM(device="cpu") as llm:
        assert llm.chat_stop == ("\n\n",)
        choices = InProcess(llm).chat(messages=HELLO, n=4, seed=1, max_tokens=100, stop="\x00")["choices"]
        assert "stop" in [choice["finish_reason"] for choice in choices]
        assert not any("\n\n" in choice["message"]["content"] for choice in choices)


def test_the_newer_limit_counts_before_the_older(server: InProcess) -> None:
    asked: dict[str, Any] = {"messages": HELLO, "temperature": 0, "ignore_eos": True}
    count = server.chat(**asked, max_completion_tokens=3, max_tokens=9)["usage"]["completion_tokens"]
    assert count == 3
    assert server.chat(**asked, max_tokens=9)["usage"]["completion_tokens"] == 9


def test_without_a_limit_an_answer_is_as_long_as_the_context(server: InProcess, llm: LLM) -> None:
    content = "a " * (llm.max_model_len - 60)
    answer = server.chat(messages=[{"role": "user", "content": content}], ignore_eos=True)
    assert answer["usage"]["total_tokens"] == llm.max_model_len


def test_events_add_up_to_the_whole_answer(process: Process, server: InProcess) -> None:
    asked: dict[str, Any] = {"messages": HELLO, "n": 2, "seed": 4, "max_tokens": 16}
    expected = server.chat(**asked)
    found = events(process, PATH, **asked, stream_options={"include_usage": True})
    assert found[-1]["usage"] == expected["usage"]
    for index, choice in enumerate(expected["choices"]):
        mine = [event["choices"][0] for event in found[:-1] if event["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(piece["delta"].get("content", "") for piece in mine) == choice["message"]["content"]
        assert [piece["finish_reason"] for piece in mine if piece["finish_reason"]] == [choice["finish_reason"]]
        assert mine[-1]["delta"] == {}


def test_all_roles_and_parts_are_rendered(server: InProcess) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "Two"}]},
        {"role": "assistant", "content": "Yes.", "tool_calls": [call]},
        {"role": "tool", "content": "5", "tool_call_id": "c1"},
        {"role": "developer", "content": "Go on.", "name": "me"},
    ]
    text = server.post("/detokenize", {"tokens": server.post("/tokenize", {"messages": messages}).json()["tokens"]})
    assert text.json()["prompt"] == (
        "SYSTEM\nBe brief.\n\nUSER\nOne\nTwo\n\nASSISTANT\nYes.\n\nTOOL\n5\n\nSYSTEM\nGo on.\n\nASSISTANT\n"
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["Hello"]}, "messages[0]"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a", "audio": {"id": 1}}]}, "messages[0].audio"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools[0]"),
        ({"messages": HELLO, "tool_choice": "required"}, "tool_choice"),
        ({"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": HELLO, "logprobs": 2}, "logprobs"),
        ({"messages": HELLO, "chat_template": "{{ 1 }}"}, "chat_template"),
        ({"messages": HELLO, "functions": [{"name": "f"}]}, "functions"),
        ({"messages": HELLO, "modalities": ["audio"]}, "modalities"),
        ({"messages": HELLO, "prompt": "a"}, "prompt"),
        ({"messages": HELLO, "response_format": {"type": "json_schema"}}, "response_format"),
    ],
)
def test_a_wrong_field_is_named(server: InProcess, fields: dict[str, Any], param: str) -> None:
    assert server.error(PATH, 400, fields)["param"] == param


def test_what_clients_send_besides_is_accepted(server: InProcess) -> None:
    besides = dict(
        metadata={"a": "b"},
        user="me",
        store=False,
        service_tier="auto",
        safety_identifier="x",
        prompt_cache_key="y",
        verbosity="low",
        parallel_tool_calls=True,
        tools=[],
        tool_choice="none",
        modalities=["text"],
        response_format={"type": "text"},
        n=1,
        logprobs=False,
        stream_options=None,
    )
    assert (
        server.chat(messages=HELLO, **besides, **GREEDY)["choices"] == server.chat(messages=HELLO, **GREEDY)["choices"]
    )


def test_a_schema_is_followed(server: InProcess) -> None:

    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    answer = server.chat(messages=HELLO, response_format=wanted, max_tokens=60, seed=1)
    assert set(json.loads(answer["choices"][0]["message"]["content"])) == {"a"}


def test_schemas_that_blow_up_hurt_nobody(server: InProcess) -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(400):
        deep = {"type": "object", "properties": {"a": deep}, "required": ["a"]}
    for schema in (
        deep,
        {"type": "string", "pattern": "((a{1,500}){1,500}){1,500}"},
        {"type": "array", "minItems": 10**9, "items": {"type": "integer"}},
        {"$ref": "#/definitions/missing"},
        {"$ref": "https://example.com/schema.json"},
        {"enum": ["x" * number for number in range(2000)]},
    ):
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        answer = server.post(PATH, {"messages": HELLO, "response_format": wanted, "max_tokens": 4})
        assert answer.status_code in (200, 400), answer.text
    assert server.chat(messages=HELLO, **GREEDY)["choices"]


def test_logprobs_of_a_message(server: InProcess, process: Process) -> None:
    asked: dict[str, Any] = {"messages": HELLO, "logprobs": True, "top_logprobs": 2}
    choice = server.chat(**asked, **GREEDY)["choices"][0]
    told = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in told) == choice["message"]["content"]
    for entry in told:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert entry["top_logprobs"][0]["token"] == entry["token"]
        assert len(entry["top_logprobs"]) == 2
    pieces = [event["choices"][0]["logprobs"] for event in events(process, PATH, **asked, **GREEDY)]
    assert [entry for piece in pieces if piece for entry in piece["content"]] == told


# How answers that are taken apart look; by what they are taken apart is tested where that is.


SCRIPT = {
    "r": Delta("reasoning", "Hm."),
    "c": Delta("content", "Well: "),
    "f": Delta("call", '{"a": 1}', 0, "id0", "f"),
    "g": Delta("call", "{}", 1, "id1", "g"),
}


class Scripted:
    """Finds in each letter what a script says."""

    def push(self, text: str) -> Sequence[Any]:
        return [SCRIPT[letter] for letter in text]

    def finish(self) -> Sequence[Any]:
        return [Delta("content", "!")]


def scripted(llm: LLM, text: str, reason: str, **fields: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The choice of a whole answer, and those of its events, when a model answers `text` letter by letter."""
    request = parse_chat({"messages": HELLO} | fields)
    metrics = Metrics(1, 0, 0.0, 0.0, 0.0, 0.0, Traffic())
    completion = Completion(text, [1] * len(text), reason, metrics)

    def answer() -> ChatAnswer:
        generation = Generation(request, NAME, [[1]], cast(Any, [None]), cast(Any, [Scripted()]))
        return ChatAnswer(generation, TokenText(llm.tokenizer))

    streamed = answer()
    last = len(text) - 1
    chunks = [Chunk(letter, 1, completion if number == last else None) for number, letter in enumerate(text)]
    return answer().choice(0, completion), [piece for chunk in chunks for piece in streamed.pieces(0, chunk)]


def test_calls_and_reasoning_whole_and_as_events(llm: LLM) -> None:
    whole, pieces = scripted(llm, "rcfg", "stop")
    calls = [
        {"id": "id0", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
        {"id": "id1", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]
    assert whole["message"] == {
        "role": "assistant",
        "content": "Well: !",
        "reasoning_content": "Hm.",
        "tool_calls": calls,
    }
    assert whole["finish_reason"] == "tool_calls"
    deltas = [piece["delta"] for piece in pieces]
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "Hm."},
        {"content": "Well: "},
        {"tool_calls": [{"index": 0} | calls[0]]},
        {"tool_calls": [{"index": 1} | calls[1]]},
        {"content": "!"},
        {},
    ]
    assert [piece["finish_reason"] for piece in pieces] == [None] * 6 + ["tool_calls"]


def test_only_the_first_call_counts_where_one_is_wanted(llm: LLM) -> None:
    whole, pieces = scripted(llm, "fg", "stop", parallel_tool_calls=False)
    assert [call["id"] for call in whole["message"]["tool_calls"]] == ["id0"]
    indices = [call["index"] for piece in pieces for call in piece["delta"].get("tool_calls", [])]
    assert indices == [0]


def test_calls_that_the_length_cuts_off_end_so(llm: LLM) -> None:
    assert scripted(llm, "f", "length")[0]["finish_reason"] == "length"
    assert scripted(llm, "c", "stop")[0]["finish_reason"] == "stop"
