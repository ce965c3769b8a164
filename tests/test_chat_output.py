"""Answers taken apart: whatever pieces they come in, and nothing is lost."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat_template import chat
from tokenizer_folders import byte_level, save
from tokenizers import AddedToken

from duomoe.chat_output import Delta, OutputParser, Style, detect_style

STYLES = [Style(calls, thinks) for calls in (None, "qwen", "qwen_coder", "mistral") for thinks in (False, True)]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {"type": "object", "properties": {"text": {"type": "string"}, "n": {"type": "integer"}}},
        },
    }
]

Answer = tuple[str, str, list[tuple[str, Any]]]


def joined(deltas: list[Delta]) -> Answer:
    """Return an answer's reasoning, its content, and its calls."""
    calls: dict[int, tuple[str, str]] = {}
    for delta in deltas:
        if delta.kind == "call":
            name, text = calls.get(delta.index, ("", ""))
            assert delta.index == len(calls) and delta.id and not name
            calls[delta.index] = (delta.name, text + delta.text)
    by_kind = {k: "".join(d.text for d in deltas if d.kind == k) for k in ("reasoning", "content")}
    return by_kind["reasoning"], by_kind["content"], [(name, json.loads(text)) for name, text in calls.values()]


def parse(style: Style, pieces: list[str], thinking: bool = False, tools: Any = None) -> list[Delta]:
    parser = OutputParser(style, thinking, tools)
    return [delta for piece in pieces for delta in parser.push(piece)] + parser.finish()


QWEN = '<tool_call>\n{"name": "f", "arguments": {"a": [1, "}é\\""]}}\n</tool_call>'
CODER = """<tool_call>
<function=f>
<parameter=text>
12

  <b> </function>
</parameter>
<parameter=n>
12
</parameter>
</function>
</tool_call>"""
MISTRAL = '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}, {"name": "g", "arguments": {}}]'
MISTRAL_NEW = '[TOOL_CALLS]f[ARGS]{"a": {"b": "]"}}[TOOL_CALLS]g[CALL_ID]123456789[ARGS]{}'

EXAMPLES: list[tuple[Style, str, Answer]] = [
    (Style(), " a <think>\n", ("", " a <think>\n", [])),
    (Style(None, True), "\n<think>\nwhy\n\n</think>\n\nso \n", ("why", "so \n", [])),
    (Style(None, True), "so <think>x</think>", ("", "so <think>x</think>", [])),
    (Style(None, True), "<think>endless ", ("endless ", "", [])),
    (Style("qwen"), QWEN, ("", "", [("f", {"a": [1, '}é"']})])),
    (Style("qwen", True), f"<think>\n\n</think>\n\na\n{QWEN}\n{QWEN}", ("", "a", [("f", {"a": [1, '}é"']})] * 2)),
    (Style("qwen"), QWEN.removesuffix("\n</tool_call>"), ("", "", [("f", {"a": [1, '}é"']})])),
    (Style("qwen"), QWEN.removesuffix("</tool_call>") + "then", ("", "then", [("f", {"a": [1, '}é"']})])),
    (Style("qwen"), '<tool_call>{"name": "f", "arguments": "{\\"a\\": 2}"}</tool_call>', ("", "", [("f", {"a": 2})])),
    (Style("qwen"), '<tool_call>{"name": "f"}</tool_call>', ("", "", [("f", {})])),
    (Style("qwen_coder"), "a\n" + CODER, ("", "a", [("f", {"text": "12\n\n  <b> </function>", "n": 12})])),
    (Style("qwen_coder"), "<function=g></function>b", ("", "b", [("g", {})])),
    (
        Style("qwen_coder"),
        "<function=g><parameter=x>True</parameter><parameter=y>[1]</parameter><parameter=z>a b</parameter></function>",
        ("", "", [("g", {"x": True, "y": [1], "z": "a b"})]),
    ),
    (  # `text` is text by its schema, `other` reads as a number, and infinity is none
        Style("qwen_coder"),
        "<function=f><parameter=text>1</parameter><parameter=other>1</parameter><parameter=n>1e999</parameter></function>",
        ("", "", [("f", {"text": "1", "other": 1, "n": "1e999"})]),
    ),
    (Style("mistral"), MISTRAL, ("", "", [("f", {"a": 1}), ("g", {})])),
    (Style("mistral"), "a" + MISTRAL_NEW, ("", "a", [("f", {"a": {"b": "]"}}), ("g", {})])),
    (Style("mistral"), '[TOOL_CALLS]f{"a": 1}', ("", "", [("f", {"a": 1})])),
]

MALFORMED = [
    (Style("qwen"), "<tool_call>f(1)</tool_call>"),
    (Style("qwen"), '<tool_call>\n{"name": "f", "arguments": {"a": }}\n</tool_call>'),
    (Style("qwen"), '<tool_call>\n{"name": "f", "arguments": {"a": 1'),
    (Style("qwen"), '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
    (Style("qwen"), '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    (Style("qwen"), '<tool_call>{"name": "f", "arguments": {"a": 1e999}}</tool_call>'),
    (Style("qwen"), '<tool_call>{"name": "f", "arguments": "{"}</tool_call>'),
    (Style("qwen"), "<tool_call>" + '{"a":' * 5000 + "1" + "}" * 5000 + "</tool_call>"),
    (Style("qwen"), "  <tool_call>"),
    (Style("qwen"), "a <tool_"),
    (Style("qwen_coder"), "<tool_call>\n<function=f>\n<parameter=a>\n1\n</function>\n</tool_call>"),
    (Style("qwen_coder"), "<tool_call><parameter=a>1</parameter></tool_call>"),
    (Style("qwen_coder"), "<function=></function>"),
    (Style("qwen_coder"), "<function=f> a </function>"),
    (Style("qwen_coder"), "<tool_call>{}"),
    (Style("mistral"), "[TOOL_CALLS] []"),
    (Style("mistral"), "[TOOL_CALLS] are made so, by the way"),
    (Style("mistral"), "[TOOL_CALLS]f[ARGS]{"),
    (Style("mistral"), "[TOOL_CALLS]f[ARGS][1]"),
    (Style("mistral"), '[TOOL_CALLS][{"name": "f"}, 5]'),
]


@pytest.mark.parametrize(("style", "text", "expected"), EXAMPLES)
def test_examples(style: Style, text: str, expected: Answer) -> None:
    assert joined(parse(style, [text], tools=TOOLS)) == expected
    assert joined(parse(style, list(text), tools=TOOLS)) == expected


@pytest.mark.parametrize(("style", "text"), MALFORMED)
def test_what_is_no_call_is_content(style: Style, text: str) -> None:
    for pieces in ([text], list(text)):
        assert joined(parse(style, pieces)) == ("", text, [])


def test_a_call_after_one_that_failed() -> None:
    text = "<tool_call>f(1)</tool_call>\n" + QWEN
    assert joined(parse(Style("qwen"), list(text)))[1:] == (
        "<tool_call>f(1)</tool_call>",
        [("f", {"a": [1, '}é"']})],
    )


def test_the_prompt_has_opened_the_reasoning() -> None:
    style = Style("qwen", True)
    assert joined(parse(style, list("\nwhy\n</think>\n\nso"), thinking=True)) == ("why", "so", [])
    assert joined(parse(style, list("why <think>"), thinking=True)) == ("why <think>", "", [])


def test_ids() -> None:
    first, second = (delta.id for delta in parse(Style("mistral"), [MISTRAL]))
    assert first == "abcdefghi" and len(second) == 9 and second.isalnum()
    assert [delta.id for delta in parse(Style("mistral"), [MISTRAL_NEW])][1] == "123456789"
    first, second = (delta.id for delta in parse(Style("qwen"), [QWEN, QWEN]))
    assert first.startswith("call_") and first != second


def test_lone_surrogates_in_arguments_can_be_sent() -> None:
    (delta,) = parse(Style("qwen"), ['<tool_call>{"name": "f", "arguments": {"a": "\\ud800é"}}</tool_call>'])
    assert json.loads(delta.text.encode()) == {"a": "\ud800é"}


TAGS = (
    "<think> </think> <tool_call> </tool_call> [TOOL_CALLS] [ARGS] <function=f> </function> <parameter=a> </parameter>"
)
PARTS = r"""{"name": "f", | "arguments": | { | } | [ | ] | " | \ | < | a | é | 1 | , | think> | <tool | [TOOL | f"""
SCRAPS = st.sampled_from([*TAGS.split(" "), *PARTS.split(" | "), "\n", " ", QWEN, CODER, MISTRAL, MISTRAL_NEW])


@pytest.mark.parametrize("thinking", [False, True])
@given(style=st.sampled_from(STYLES), scraps=st.lists(SCRAPS, max_size=14), data=st.data())
@settings(max_examples=600, deadline=None)
def test_streamed_is_whole(thinking: bool, style: Style, scraps: list[str], data: st.DataObject) -> None:
    text = "".join(scraps)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = joined(parse(style, [text], thinking))
    assert joined(parse(style, pieces, thinking)) == whole == joined(parse(style, list(text), thinking))
    reasoning, content, calls = whole
    if not thinking and not reasoning and not calls and not style.thinks:
        assert content == text


WORDS = st.text("ab <[{é\n", min_size=1).map(str.strip).filter(bool)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def written(style: str, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """Return calls as a model writes them."""
    if style == "qwen":
        each = [json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False) for name, arguments in calls]
        return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in each)
    if style == "mistral":
        return "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(arguments)}" for name, arguments in calls)
    return "[TOOL_CALLS]" + json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls])


@given(
    style=st.sampled_from(["qwen", "mistral", "mistral_list"]),
    thought=WORDS,
    content=WORDS,
    calls=st.lists(st.tuples(st.sampled_from(["f", "get_x", "a.b-c"]), st.dictionaries(st.text(), VALUES)), max_size=3),
)
@settings(max_examples=100, deadline=None)
def test_what_was_written_is_read(style: str, thought: str, content: str, calls: list[Any]) -> None:
    text = f"<think>\n{thought}\n</think>\n\n{content}\n" + (written(style, calls) if calls else "")
    found = joined(parse(Style(style.removesuffix("_list"), True), list(text)))
    assert found == (thought, content + ("" if calls else "\n"), calls)


def test_styles_of_templates() -> None:
    assert detect_style("{{ messages }}") == Style()
    assert detect_style("<tool_call>\n{{ call | tojson }}</tool_call>") == Style("qwen")
    assert detect_style("{{ '<think>\\n\\n</think>' }}<tool_call>") == Style("qwen", True)
    assert detect_style("<tool_call><function={{ name }}><parameter={{ key }}>") == Style("qwen_coder")
    assert detect_style("{{ '[TOOL_CALLS]' }}") == Style("mistral")


def test_a_parser_for_a_prompt(tmp_path: Path) -> None:
    """Also where the tags are special tokens, which texts leave out otherwise."""
    encoder = byte_level()
    encoder.add_special_tokens([AddedToken("</think>"), AddedToken("<tool_call>")])
    template = "{{ messages[0].content }}{% if open %}<think>\n{% endif %}{# </think> <tool_call> #}"
    found = chat(save(tmp_path, encoder, chat_template=template))
    for is_open in (False, True):
        prompt = found.tokens("hi", template_kwargs={"open": is_open})
        parser = found.output_parser(prompt, TOOLS)
        assert set(parser.markers) == {"<think>", "</think>", "<tool_call>", "</tool_call>"}
        tokens = found._tokenizer.encode(f"a</think>b{QWEN}")
        text = found._tokenizer.decode(tokens, shown=parser.markers)
        assert text == f"a</think>b{QWEN}" != found._tokenizer.decode(tokens)
        expected = ("a", "b") if is_open else ("", "a</think>b")
        assert joined(parser.push(text) + parser.finish())[:2] == expected
    assert joined(found.output_parser(prompt).push(f"</think>{QWEN}"))[2] == []
