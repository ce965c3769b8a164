"""Calls of tools and reasoning, over HTTP and to a real client, from a model whose text is prescribed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from servers import Process, start

TEXT = (
    "<think>\nLook it up.\n</think>\n\nI look.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich", "days": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
)

# Serves, but whatever token is sampled, an answer is the prescribed text, three characters a token.
PRESCRIBED = f"""
import sys
import duomoe.llm
class Prescribed:
    def __init__(self, *ignored):
        self._rest, self.text, self.stopped = {TEXT!r}, "", False
    def push(self, token):
        piece, self._rest = self._rest[:3], self._rest[3:]
        self.stopped = not self._rest
        self.text += piece
        return piece
    def finish(self):
        return ""
duomoe.llm.TextStream = Prescribed
from duomoe.serve import main
sys.exit(main(sys.argv[1:]))
"""

TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("weather", "clock")
]
ASKED: dict[str, Any] = {
    "model": "qwen-like",
    "messages": [{"role": "user", "content": "How is it?"}],
    "tools": TOOLS,
    "extra_body": {"ignore_eos": True},  # the tokens are sampled, whatever text they get
}


@pytest.fixture(scope="module")
def client(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    path = tmp_path_factory.mktemp("prescribed") / "qwen-like"
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).symlink_to(file.resolve())
    (path / "chat_template.jinja").unlink()
    # A template shows in which style its model writes.
    template = "{{ tools | tojson }}{{ messages[0].content }}{# <think> </think> <tool_call> #}"
    (path / "chat_template.jinja").write_text(template)
    process: Process = start("--model", str(path), command=["-c", PRESCRIBED])
    try:
        process.wait_ready()
        yield openai.OpenAI(base_url=f"{process.url}/v1", api_key="any", max_retries=0, timeout=60)
    finally:
        process.process.kill()
        process.process.wait(10)


def test_calls_are_found_in_a_whole_answer(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(**ASKED).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    assert choice.message.reasoning_content == "Look it up."  # type: ignore[attr-defined]
    calls: list[Any] = choice.message.tool_calls or []
    assert [call.function.name for call in calls] == ["weather", "clock"]
    assert json.loads(calls[0].function.arguments) == {"city": "Zürich", "days": 2}
    assert len({call.id for call in calls}) == 2


@pytest.mark.parametrize("both", [True, False])
def test_calls_are_streamed(client: openai.OpenAI, both: bool) -> None:
    content, reasoning, reasons = "", "", []
    calls: dict[int, list[str]] = {}
    for event in client.chat.completions.create(**ASKED, stream=True, parallel_tool_calls=both):
        delta: Any = event.choices[0].delta
        content += delta.content or ""
        reasoning += getattr(delta, "reasoning_content", None) or ""
        for call in delta.tool_calls or []:
            known = calls.setdefault(call.index, [call.id or "", "", ""])
            known[1] += call.function.name or ""
            known[2] += call.function.arguments or ""
        reasons.append(event.choices[0].finish_reason)
    assert (content, reasoning) == ("I look.", "Look it up.")
    assert [name for _, name, _ in calls.values()] == (["weather", "clock"] if both else ["weather"])
    assert json.loads(calls[0][2]) == {"city": "Zürich", "days": 2}
    assert reasons == [None] * (len(reasons) - 1) + ["tool_calls"]


def test_the_openai_packages_helper_understands_the_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(**ASKED) as stream:
        message = stream.get_final_completion().choices[0].message
    assert [call.function.name for call in message.tool_calls or []] == ["weather", "clock"]


def test_without_tools_an_answer_has_no_calls(client: openai.OpenAI) -> None:
    for tools in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        asked = {name: value for name, value in ASKED.items() if name != "tools"} | tools
        choice = client.chat.completions.create(**asked).choices[0]
        assert choice.finish_reason == "stop"
        assert not choice.message.tool_calls
        assert "<tool_call>" in (choice.message.content or "")
