"""Calls of tools as models write them, read character by character."""

import json
import re
import secrets
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

CALL, END_OF_CALL = "<tool_call>", "</tool_call>"
FUNCTION, END_OF_FUNCTION = "<function=", "</function>"
PARAMETER, END_OF_PARAMETER = "<parameter=", "</parameter>"
CALLS, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"

# Tokens that are part of a call, by the style of calls; some tokenizers have them as special ones.
MARKERS = {None: (), "qwen": (CALL, END_OF_CALL), "qwen_coder": (CALL, END_OF_CALL), "mistral": (CALLS, CALL_ID, ARGS)}

# Between [TOOL_CALLS] and the arguments.
MISTRAL_HEAD = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\](\w+))?(?:\[ARGS\])?\s*")
HEAD_BEGINNING = re.compile(r"\s*[\w.-]*\s*(\[[\w\[\]]*)?\s*")
MAX_HEAD = 200  # characters of a function's name and what is around it

# JSON outside of its strings consists of these.
JSON_CHARACTERS = frozenset('{}[]:,"0123456789+-.eEtrufalsn \t\n\r')

WORDS = {"True": True, "False": False, "None": None}


@dataclass(frozen=True)
class ToolCall:
    """A call that is complete.

    Attributes:
        name: of the function.
        arguments: the JSON text of an object.
        id: made up, where the model gave none.
    """

    name: str
    arguments: str
    id: str


class CallReader:
    """Reads what follows the tag that begins a call.

    Attributes:
        calls: what was called, once that is complete.
        failed: it is no call.
    """

    def __init__(self, tag: str) -> None:
        self._characters = [tag]
        self.calls: list[ToolCall] | None = None
        self.failed = False

    @property
    def text(self) -> str:
        """All that was read, the tag included."""
        return "".join(self._characters)

    def push(self, char: str) -> None:
        """Read a character."""
        self._characters.append(char)
        try:
            self.calls = self._read(char)
        except (ValueError, RecursionError):
            self.failed = True

    def _read(self, char: str) -> list[ToolCall] | None:
        """Return the calls if they are complete; ValueError if there are none."""
        raise NotImplementedError


class QwenReader(CallReader):
    """`{"name": …, "arguments": …}`."""

    def __init__(self, tag: str) -> None:
        super().__init__(tag)
        self._json = JsonReader()

    def _read(self, char: str) -> list[ToolCall] | None:
        return [_call(self._json.value())] if self._json.push(char) else None


class MistralReader(CallReader):
    """`[{"name": …, "arguments": …}, …]`, or a name, `[ARGS]` and an object."""

    def __init__(self, tag: str) -> None:
        super().__init__(tag)
        self._head = ""
        self._json: JsonReader | None = None
        self._listed = False

    def _read(self, char: str) -> list[ToolCall] | None:
        if self._json is None:
            self._listed = char == "[" and not self._head.strip()
            if char != "{" and not self._listed:
                self._head += char
                if len(self._head) > MAX_HEAD or not HEAD_BEGINNING.fullmatch(self._head):
                    raise ValueError
                return None
            self._json = JsonReader()
        if not self._json.push(char):
            return None
        value = self._json.value()
        if self._listed and value:
            return [_call(each, _mistral_id()) for each in value]
        head = MISTRAL_HEAD.fullmatch(self._head)
        if head is None:
            return [_call(value, _mistral_id())]
        return [_call({"name": head[1], "arguments": value, "id": head[2]}, _mistral_id())]


class QwenCoderReader(CallReader):
    """`<function=NAME>`, any number of `<parameter=NAME>VALUE</parameter>`, and `</function>`."""

    def __init__(self, tag: str, texts: frozenset[tuple[str, str]]) -> None:
        super().__init__(tag)
        self._texts = texts
        self._tag = tag if tag == FUNCTION else ""
        self._name = ""
        self._parameter: str | None = None
        self._value: list[str] = []
        self._end = ""  # of the value
        self._arguments: dict[str, Any] = {}

    def _read(self, char: str) -> list[ToolCall] | None:
        if self._parameter is not None:
            self._read_value(char)
            return None
        self._tag = (self._tag + char).lstrip()
        if self._tag[:1] not in ("", "<") or len(self._tag) > MAX_HEAD:
            raise ValueError
        if char != ">":
            return None
        tag, self._tag = self._tag, ""
        if tag.startswith(FUNCTION) and not self._name:
            self._name = tag.removeprefix(FUNCTION).removesuffix(">").strip()
        elif tag == END_OF_FUNCTION:
            return [_call({"name": self._name, "arguments": self._arguments})]
        elif tag.startswith(PARAMETER) and self._name:
            self._parameter = tag.removeprefix(PARAMETER).removesuffix(">").strip()
        else:
            raise ValueError
        return None

    def _read_value(self, char: str) -> None:
        assert self._parameter is not None
        self._value.append(char)
        self._end = (self._end + char)[-len(END_OF_PARAMETER) :]
        if self._end == END_OF_PARAMETER:
            value = "".join(self._value).removesuffix(END_OF_PARAMETER).removeprefix("\n").removesuffix("\n")
            is_text = (self._name, self._parameter) in self._texts
            self._arguments[self._parameter] = value if is_text else _value(value)
            self._parameter, self._value, self._end = None, [], ""


class JsonReader:
    """Finds the end of a JSON object or array that comes character by character."""

    def __init__(self) -> None:
        self._characters: list[str] = []
        self._depth = 0
        self._in_string = self._escaped = False

    def push(self, char: str) -> bool:
        """Read a character; return whether the value is complete.

        Raises:
            ValueError: when it is no JSON.
        """
        self._characters.append(char)
        if self._in_string:
            self._in_string = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
            return False
        if char not in JSON_CHARACTERS or (self._depth == 0 and char not in "{[ \t\n\r"):
            raise ValueError
        self._in_string = char == '"'
        self._depth += (char in "{[") - (char in "}]")
        return self._depth == 0 and char in "}]"

    def value(self) -> Any:
        """Return the value.

        Raises:
            ValueError, RecursionError: when it is no JSON.
        """
        return _parse("".join(self._characters))


def call_reader(style: str | None, tag: str, texts: frozenset[tuple[str, str]]) -> CallReader:
    """Return what reads a call of a style that begins with `tag`; `texts` as `text_parameters` returns them."""
    if style == "mistral":
        return MistralReader(tag)
    return QwenReader(tag) if style == "qwen" else QwenCoderReader(tag, texts)


def text_parameters(tools: Iterable[Mapping[str, Any]]) -> frozenset[tuple[str, str]]:
    """Return the pairs of function and parameter that are text, by the functions' schemas."""
    found = set()
    for tool in tools:
        function = _mapping(tool.get("function"))
        properties = _mapping(_mapping(function.get("parameters")).get("properties"))
        for name, schema in properties.items():
            if _mapping(schema).get("type") == "string":
                found.add((str(function.get("name")), name))
    return frozenset(found)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _call(value: Any, id: str | None = None) -> ToolCall:
    """Return a call that was written as an object; ValueError if it is none."""
    name, arguments = _mapping(value).get("name"), _mapping(value).get("arguments", {})
    if isinstance(arguments, str):
        arguments = _parse(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    if not _is_unicode(text):
        text = json.dumps(arguments)
    given = _mapping(value).get("id")
    return ToolCall(name, text, given if isinstance(given, str) and given else id or f"call_{secrets.token_hex(12)}")


def _mistral_id() -> str:
    """Return an id as Mistral's templates ask for it."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


def _value(text: str) -> Any:
    """Return what a value without a type is: JSON, or a word of Python's, if it reads as one, else text."""
    if text.strip() in WORDS:
        return WORDS[text.strip()]
    try:
        return _parse(text)
    except (ValueError, RecursionError):
        return text


def _parse(text: str) -> Any:
    """Return what JSON stands for; ValueError for NaN and infinity, which are none."""
    found = json.loads(text, parse_constant=_refuse)
    json.dumps(found, allow_nan=False)  # 1e999 is read as infinity
    return found


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeError:
        return False
    return True
