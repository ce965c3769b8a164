"""Chats: as transformers renders them, and templates that would use all there is."""

# ruff: noqa: E501 (templates, whose line breaks count)

from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizer_folders import byte_level, load, save

from duomoe.chat_template import ChatTemplate, prepare, render
from duomoe.checkpoint import Checkpoint
from duomoe.errors import InputError
from duomoe.limited import process

# Each uses some feature of the language that checkpoints' templates use; all are our own.
TEMPLATES = {
    "roles": """
{%- for m in messages %}
    {%- if m.role == 'developer' or m['role'] == "system" %}
        {{- '<|system|>' ~ m.content | trim ~ eos_token }}
    {%- elif m.role == 'tool' %}
        {{- '<|tool|>' + m.content + '<|end|>' }}
    {%- else %}
        {{- '<|' + m.role + '|>' + (m.content or '') }}
        {%- for call in m.tool_calls or [] %}
            {{- call.function.name }}({{ call.function.arguments | tojson }})
        {%- endfor %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% if enable_thinking is defined and not enable_thinking %}{{
 '<think></think>' }}{% endif %}{% endif %}""",
    "blocks": """{% for m in messages %}
    {% if loop.first %}
  first {{ loop.index0 }} of {{ loop.length }}
    {% endif %}
{{ m['content'] }}
{% endfor %}
{# nothing #}
    end
""",
    "tojson": """{{ tools | tojson }}|{{ tools | tojson(True) }}|{{ messages | tojson(false, 2) }}|{{
 messages | tojson(indent=1, separators=[',', ':'], sort_keys=true) }}|{{ tools | tojson(False, none, [', ', '='], True)}}""",
    "generation": """{% set x = 'outer' %}{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}
{% set x = 'inner' %}{{ m.content }}{{ x }}{{ loop.index }}
{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ x }}{% endfor %}""",
    "variables": """{{ bos_token }}|{{ eos_token }}|{{ bos_token is defined }}{{ unk_token is defined }}{{ pad_token is defined
 }}{{ image_token is defined }}{{ tools is none }}{{ tools is defined }}{{ documents is none }}{{ nothing is defined }}{{
 add_generation_prompt }}{{ enable_thinking | default('unset') }}{{ messages | length }}""",
    "loops": """{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 5 %}{% break %}{% endif %}{{ i
 }}{% endfor %}{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + m.content | length
 %}{% endfor %}{{ ns.n }}{{ messages[-1].content.split('e')[0] }}{{ messages[0]['content'][1:3] }}""",
    "macros": """{%- macro turn(m, end='<|end|>') %}{{ m.role | upper }}: {{ caller() if caller else m.content }}{{ end }}{% endmacro %}
{%- for m in messages %}{{ turn(m) }}{{ turn(m, end='') }}{% call turn(m) %}{{ m.content | replace('e', '3') }}{% endcall %}{% endfor %}
{{- dict(a=1) }}{{ messages | map(attribute='role') | join(',') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}""",
    "reasoning": """{% for m in messages %}{% if m.reasoning_content is defined %}<think>{{ m.reasoning_content }}</think>{% endif %}{%
 if m.thinking is defined %}[{{ m.thinking }}]{% endif %}{{ m.content is defined }}{{ m.name is defined }}{% endfor %}""",
    "markup": """{{ messages[0].content }}<&>"'{{ '<b>' }}\\n{{ 'a\\nb' }}{{ "é" }}{{ '%s-%d' % ('a', 3) }}{{ 3 // 2 }}{{ 2 ** 10 }}""",
    "year": "{{ strftime_now('%Y-%m') }}",
}

USER = {"role": "user", "content": "the <b> '€' & <think>there</think> <|end|>"}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "system": [{"role": "system", "content": " be brief\n"}, USER],
    "turns": [
        {"role": "system", "content": "x"},
        USER,
        {"role": "assistant", "content": "there", "reasoning": "hm", "name": None},
        {"role": "user", "content": "e e", "name": "ab"},
    ],
    "calls": [
        USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": [1, "é"], "b": None}}},
                {"id": "2", "type": "function", "function": {"name": "g", "arguments": {}}},
            ],
        },
        {"role": "tool", "content": "7 €", "tool_call_id": "1"},
        {"role": "tool", "content": "", "tool_call_id": "2"},
    ],
}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<é>", "parameters": {"type": "object"}}}]


def chat(folder: Path) -> ChatTemplate:
    return ChatTemplate(Checkpoint(folder), load(folder))


@pytest.mark.parametrize("tools", [None, [], TOOLS])
@pytest.mark.parametrize("name", TEMPLATES)
def test_as_transformers(tmp_path: Path, name: str, tools: Any) -> None:
    config = {"bos_token": "<s>", "eos_token": "<|end|>", "image_token": "<img>", "pad_token": None}
    folder = save(tmp_path, byte_level(), chat_template=TEMPLATES[name], **config)
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    found = chat(folder)
    for messages in CHATS.values():
        for kwargs in ({}, {"enable_thinking": False}, {"add_generation_prompt": False, "eos_token": "!"}):
            options = {"add_generation_prompt": True} | kwargs
            expected = reference.apply_chat_template(messages, tools, tokenize=False, **options)
            assert found.render(messages, tools, kwargs) == expected
            ids = reference.apply_chat_template(messages, tools, return_dict=False, **options)
            assert found.tokens(messages, tools, kwargs) == ids


@pytest.mark.parametrize("layout", ["list", "files", "file_and_list"])
@pytest.mark.parametrize("tools", [None, [], TOOLS])
def test_named_templates(tmp_path: Path, layout: str, tools: Any) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    folder = save(tmp_path, byte_level(), **({"chat_template": named} if "list" in layout else {}))
    if "file" in layout:
        (folder / "chat_template.jinja").write_text("file")
    if layout == "files":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tool file")
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    expected = reference.apply_chat_template([USER], tools, tokenize=False, add_generation_prompt=True)
    assert chat(folder).render([USER], tools) == expected


def test_a_text_is_a_users_message(tmp_path: Path) -> None:
    found = chat(save(tmp_path, byte_level(), chat_template="{{ messages | tojson }}"))
    assert found.render("hello") == '[{"role": "user", "content": "hello"}]'


def test_messages_as_clients_send_them() -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}
    empty = {"id": "2", "function": {"name": "f", "arguments": ""}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call, empty], "refusal": None},
    ]
    found = prepare(messages, "{{ message.content }}")
    assert found[0] == {"role": "system", "content": "a\nb"}
    assert [call["function"]["arguments"] for call in found[1].pop("tool_calls")] == [{"a": 1}, {}]
    assert found[1] == {"role": "assistant"}
    assert call["function"]["arguments"] == '{"a": 1}', "a client's message is not changed"
    loop = "{% for part in message['content'] %}{{ part.text }}{% endfor %}"
    assert prepare(messages, loop)[0]["content"] == messages[0]["content"]
    assert prepare(messages, "{% if role == 'developer' %}")[0]["role"] == "developer"
    for plain in ("{% for line in message.content.split() %}", "{% for m in messages %}{{ m.content }}{% endfor %}"):
        assert prepare(messages, plain)[0]["content"] == "a\nb"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "one or more"),
        ({}, "list"),
        ([5], "list"),
        ([{"content": "a"}], r"messages\[0\] has no role"),
        ([{"role": 5, "content": "a"}], "has no role"),
        ([USER, {"role": "user", "content": 5}], r"messages\[1\].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "image_url"),
        ([{"role": "user", "content": [{"type": "text"}]}], "type text"),
        ([{"role": "user", "content": ["a"]}], "parts"),
        ([{"role": "assistant", "tool_calls": {"a": 1}}], "tool_calls"),
        ([{"role": "assistant", "tool_calls": [{"function": {"arguments": "[1]"}}]}], r"tool_calls\[0\]"),
        ([{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}], "JSON"),
        ([{"role": "assistant", "tool_calls": [{"function": {"arguments": "[" * 100_000}}]}], "JSON"),
        ([{"role": "user", "content": "a", "more": {1, 2}}], "JSON"),
        ([{"role": "user", "content": "\ud800"}], "tokens"),
    ],
)
def test_what_is_no_conversation_is_named(tmp_path: Path, messages: Any, words: str) -> None:
    found = chat(save(tmp_path, byte_level(), chat_template="{{ messages[0].content }}"))
    with pytest.raises(InputError, match=words):
        found.tokens(messages)


def test_other_arguments_are_checked(tmp_path: Path) -> None:
    found = chat(save(tmp_path, byte_level(), chat_template="{{ messages[0].content }}"))
    with pytest.raises(InputError, match="tools must be"):
        found.render([USER], ["f"])  # type: ignore[list-item]
    with pytest.raises(InputError, match="cannot be named messages"):
        found.render([USER], None, {"messages": []})
    with pytest.raises(InputError, match="must be an object"):
        found.render([USER], None, "enable_thinking")  # type: ignore[arg-type]
    for bad in ({"chat_template": 5}, {"chat_template": [{"name": "default"}]}, {"chat_template": [{"name": []}]}):
        with pytest.raises(InputError, match="chat_template is not text"):
            chat(save(tmp_path, byte_level(), **bad)).render([USER])
    with pytest.raises(InputError, match="no chat template"):
        chat(save(tmp_path, byte_level())).render([USER])


HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 10 ** 100000000 }}",
    "long": "{{ 'a' * 10**9 }}",
    "list": "{{ [1] * 10**10 }}",
    "doubling": "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "width": "{{ '%1000000000d' % 1 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "nesting": "{{ " + "(" * 100_000 + " }}",
    "refusal": "{{ raise_exception('no') }}",
    "syntax": "{% if",
    "include": "{% include '/etc/passwd' %}",
    "undefined": "{{ a.b.c }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_and_others_go_on(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(process, "SECONDS", 1.0)
    with pytest.raises(InputError, match=r"the chat template failed: .+") as found:
        render(HOSTILE[name], {})
    assert len(str(found.value)) < 1100
    if name in ("long", "list", "width"):
        assert "MiB of memory" in str(found.value)
    if name in ("loops", "power"):
        assert "1 seconds" in str(found.value)
    assert render("{{ a }}", {"a": "é"}) == "é"
