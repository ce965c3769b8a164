"""Conversations as a checkpoint's chat template writes them."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from duomoe.chat_output import OutputParser, detect_style, is_thinking
from duomoe.checkpoint import Checkpoint
from duomoe.errors import InputError
from duomoe.limited.process import Failed, LimitedProcess
from duomoe.text_file import read_text
from duomoe.tokenizer import Tokenizer

Message = Mapping[str, Any]

# Names under which clients send what an assistant thought, the usual one first; templates read one of the first two.
REASONING = ("reasoning_content", "thinking", "reasoning")

PROCESS = LimitedProcess(
    "duomoe.limited.templates",
    "renders chat templates",
    "jinja2",
    "--chat needs jinja2; install it with: pip install 'duomoe[chat]'",
)

# So many of a prompt's last tokens hold a tag that it ends with, whatever letters the tag is made of.
PROMPT_END = 16

# What a chat template gets besides messages and tools, unless its caller says otherwise.
DEFAULTS = {"documents": None, "add_generation_prompt": True}

# A loop over a message's parts: the template takes a content that is a list.
LOOP_OVER_PARTS = re.compile(
    r"\bfor\s+\w+\s+in\s+(?:\w+(?:\.|\[['\"]))*content(?:['\"]\])?\s*(?:%}|-%}|if\b|recursive\b)"
)


class ChatTemplate:
    """A checkpoint's chat template, and its tokenizer.

    Args:
        checkpoint: the model folder.
        tokenizer: its tokenizer.
    """

    def __init__(self, checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
        self._checkpoint = checkpoint
        self._tokenizer = tokenizer

    @cached_property
    def templates(self) -> dict[str, str]:
        """The templates by name; a single one is named "default".

        Raises:
            InputError: when what the folder has for templates is none.
        """
        found = {}
        folder = self._checkpoint.path
        if (folder / "chat_template.jinja").is_file():
            found["default"] = read_text(folder / "chat_template.jinja")
        for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            found[file.stem] = read_text(file)
        if found:
            return found
        given = (self._checkpoint.read_json("tokenizer_config.json") or {}).get("chat_template")
        if isinstance(given, list) and all(isinstance(item, Mapping) for item in given):
            given = {str(item.get("name")): item.get("template") for item in given}
        elif given is not None:
            given = {"default": given}
        if not all(isinstance(text, str) for text in (given or {}).values()):
            raise InputError(f"{folder / 'tokenizer_config.json'}: its chat_template is not text")
        return given or {}

    def template(self, with_tools: bool) -> str:
        """Return the template for a conversation: one for tools, where there is one and tools are given.

        Raises:
            InputError: when the checkpoint has none.
        """
        name = "tool_use" if with_tools and "tool_use" in self.templates else "default"
        if name not in self.templates:
            raise InputError(f"{self._checkpoint.path}: the checkpoint has no chat template; leave out --chat")
        return self.templates[name]

    def render(
        self,
        messages: str | Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Return a conversation as the text that the model continues with its answer.

        Args:
            messages: each with a role and its content, text or a list of parts of text, as the OpenAI API has them;
                a single text is a user's message.
            tools: functions that the model may call, as JSON schemas.
            template_kwargs: more variables for the template, as `enable_thinking`.

        Raises:
            InputError: when a message is not one, there is no template, or it fails or uses too much time or memory.
        """
        given = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        if tools is not None and not _are_objects(tools):
            raise InputError("tools must be a list of objects, each the schema of a function")
        if template_kwargs is not None and not isinstance(template_kwargs, Mapping):
            raise InputError("template arguments must be an object")
        more = dict(template_kwargs or {})
        taken = sorted(more.keys() & {"messages", "tools"})
        if taken:
            raise InputError(f"template arguments cannot be named {' or '.join(taken)}")
        template = self.template(with_tools=tools is not None)
        variables = DEFAULTS | self._tokenizer.variables | more
        return render(template, variables | {"messages": prepare(given, template), "tools": tools})

    def tokens(
        self,
        messages: str | Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        limit: int | None = None,
    ) -> list[int]:
        """Return a conversation's token ids; arguments and errors as of `render` and of `Tokenizer.encode`."""
        text = self.render(messages, tools, template_kwargs)
        return self._tokenizer.encode(text, special=False, limit=limit)

    def output_parser(self, prompt: Sequence[int], tools: Sequence[Mapping[str, Any]] | None = None) -> OutputParser:
        """Return what takes apart the answer to a prompt that `tokens` returned; without tools there are no calls."""
        style = detect_style(self.template(with_tools=tools is not None))
        end = self._tokenizer.decode(prompt[-PROMPT_END:], shown=style.markers)
        return OutputParser(style if tools else replace(style, calls=None), style.thinks and is_thinking(end), tools)


def render(template: str, variables: Mapping[str, Any]) -> str:
    """Render a template.

    Args:
        template: in Jinja's language, with what transformers adds to it.
        variables: what it sees, as JSON can say it.

    Raises:
        InputError: when it fails, or takes more time or memory than it may; when jinja2 is not installed; and when the
            variables are not JSON.
    """
    try:
        request = json.dumps([template, variables]).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"messages, tools and template arguments must be JSON: {error}") from None
    try:
        return PROCESS.ask(request)
    except Failed as error:
        raise InputError(f"the chat template failed: {error}") from None


def chat_stop_strings(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the strings that end an answer in a chat, besides its end-of-sequence tokens.

    A model that was not taught to end its turn has them in tokenizer_config.json, as `chat_stop_strings`; an entry of
    this project's own, which others do not heed.

    Raises:
        InputError: when they are no strings.
    """
    found = (checkpoint.read_json("tokenizer_config.json") or {}).get("chat_stop_strings") or []
    if not isinstance(found, list) or not all(isinstance(each, str) and each for each in found):
        raise InputError(f"{checkpoint.path / 'tokenizer_config.json'}: chat_stop_strings must be a list of texts")
    return tuple(found)


def prepare(messages: Sequence[Message], template: str) -> list[dict[str, Any]]:
    """Return messages of an OpenAI client as chat templates expect them.

    What is null is left out, as transformers does. Calls of tools have their arguments as objects. A developer speaks
    as the system, and parts of text are joined by line breaks, where the template does not know of those.

    Raises:
        InputError: for what is no message, or has parts that are not text.
    """
    if not _are_objects(messages) or not messages:
        raise InputError("messages must be a list of one or more objects, each with a role and content")
    knows_parts = LOOP_OVER_PARTS.search(template) is not None
    knows_developer = "developer" in template
    prepared = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        found = {key: value for key, value in message.items() if value is not None}
        if not isinstance(found.get("role"), str):
            raise InputError(f"{where} has no role")
        if found["role"] == "developer" and not knows_developer:
            found["role"] = "system"
        if "content" in found:
            found["content"] = _content(found["content"], knows_parts, where)
        if "tool_calls" in found:
            found["tool_calls"] = _calls(found["tool_calls"], where)
        thought = next((found[name] for name in REASONING if name in found), None)
        if thought is not None:
            found = {"thinking": thought} | found | {"reasoning_content": thought}
        prepared.append(found)
    return prepared


def _content(content: Any, knows_parts: bool, where: str) -> Any:
    if isinstance(content, str):
        return content
    if not _are_objects(content):
        raise InputError(f"{where}.content must be text or a list of parts of text")
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InputError(f"{where}.content has a part of type {part.get('type')}; this model reads text only")
    return list(content) if knows_parts else "\n".join(part["text"] for part in content)


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not _are_objects(calls):
        raise InputError(f"{where}.tool_calls must be a list of objects")
    found = []
    for number, call in enumerate(calls):
        function = call.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
            place = f"{where}.tool_calls[{number}].function.arguments"
            call = {**call, "function": {**function, "arguments": _arguments(function["arguments"], place)}}
        found.append(dict(call))
    return found


def _arguments(text: str, place: str) -> dict[str, Any]:
    try:
        found = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{place} is not the JSON text of an object")
    return found


def _are_objects(items: Any) -> bool:
    return isinstance(items, list | tuple) and all(isinstance(item, Mapping) for item in items)
