"""What a model answers in a chat, taken apart: content, reasoning and calls of tools."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from duomoe.tool_call import CALL, CALLS, END_OF_CALL, FUNCTION, MARKERS, CallReader, call_reader, text_parameters

THINK, END_OF_THINK = "<think>", "</think>"

# What begins a call, by the style of calls.
OPENERS = {None: (), "qwen": (CALL,), "qwen_coder": (CALL, FUNCTION), "mistral": (CALLS,)}


@dataclass(frozen=True)
class Style:
    """How a model writes what is not content.

    Attributes:
        calls: "qwen" (`<tool_call>{JSON}</tool_call>`, Hermes's way), "qwen_coder" (`<tool_call><function=NAME>
            <parameter=NAME>…`), "mistral" (`[TOOL_CALLS] [JSON]` or `[TOOL_CALLS]NAME[ARGS]{JSON}`); None: not at all.
        thinks: an answer begins with its reasoning, between `<think>` and `</think>`.
    """

    calls: str | None = None
    thinks: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        """Tokens that a parser must see in the text, special or not."""
        return ((THINK, END_OF_THINK) if self.thinks else ()) + MARKERS[self.calls]


@dataclass(frozen=True)
class Delta:
    """A piece of an answer.

    Attributes:
        kind: "content", "reasoning" or "call".
        text: of content or reasoning; of a call, its arguments, the JSON text of an object.
        index: which of the answer's calls it is.
        id: of the call.
        name: of the function that is called.
    """

    kind: str
    text: str
    index: int = 0
    id: str = ""
    name: str = ""


def detect_style(template: str) -> Style:
    """Return how a model writes, by its chat template, which writes earlier turns in the same way."""
    calls = None
    if FUNCTION in template:
        calls = "qwen_coder"
    elif CALL in template:
        calls = "qwen"
    elif CALLS in template:
        calls = "mistral"
    return Style(calls, thinks=END_OF_THINK in template)


def is_thinking(prompt: str) -> bool:
    """Return whether an answer to a prompt begins inside of reasoning, because the prompt ends by opening it."""
    return prompt.rstrip().endswith(THINK)


class OutputParser:
    """Takes an answer apart as it comes; in which pieces it comes does not matter.

    A call is given out when it is complete, in one piece, since nothing can be taken back that a client has seen. What
    turns out to be no call is content, as the model wrote it. White space beside tags is dropped.

    Attributes:
        markers: special tokens that must be part of the text.

    Args:
        style: how the model writes.
        thinking: the prompt has opened `<think>` already.
        tools: schemas of the functions; they tell which values are text where a style writes values without types.
    """

    def __init__(
        self, style: Style = Style(), thinking: bool = False, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> None:
        self.markers = style.markers
        self._style = style
        self._texts = text_parameters(tools or ())
        self._rest = ""  # not looked at yet, or perhaps the beginning of a tag
        self._space = ""  # dropped if a tag follows
        self._beside_tag = thinking  # nothing but white space since a tag
        self._begun = thinking  # reasoning can begin no more
        self._thinking = thinking
        self._call: CallReader | None = None
        self._after_call = False  # the tag that ends a call may follow
        self._calls = 0
        self._found: list[Delta] = []

    def push(self, text: str) -> list[Delta]:
        """Take more of the answer; return what is certain now."""
        self._rest += text
        while self._step(final=False):
            pass
        return self._take()

    def finish(self) -> list[Delta]:
        """Return what was held back, once no more comes."""
        while self._step(final=True):
            pass
        if self._space and not self._beside_tag:
            self._found.append(Delta("reasoning" if self._thinking else "content", self._space))
        self._space = ""
        return self._take()

    def _take(self) -> list[Delta]:
        found, self._found = self._found, []
        return found

    def _step(self, final: bool) -> bool:
        """Look at the rest; return whether there is more to look at without more text."""
        if self._call is not None:
            return self._read_call(self._call, final)
        if self._after_call:
            return self._skip_end_of_call(final)
        if self._thinking:
            return self._read_reasoning(final)
        return self._read_content(final)

    def _read_content(self, final: bool) -> bool:
        openers = OPENERS[self._style.calls] + ((THINK,) if self._style.thinks and not self._begun else ())
        text, tag = self._until(openers, final)
        self._give("content", text)
        if tag == THINK and self._begun:  # there was content before it
            self._give("content", tag)
        elif tag == THINK:
            self._thinking = True
            self._pass_tag()
        elif tag:
            self._call = call_reader(self._style.calls, tag, self._texts)
        return bool(tag)

    def _read_reasoning(self, final: bool) -> bool:
        text, tag = self._until((END_OF_THINK,), final)
        self._give("reasoning", text)
        if tag:
            self._thinking = False
            self._pass_tag()
        return bool(tag)

    def _read_call(self, call: CallReader, final: bool) -> bool:
        for end, char in enumerate(self._rest, start=1):
            call.push(char)
            if call.calls is not None or call.failed:
                self._rest = self._rest[end:]
                break
        else:
            self._rest = ""
            if not final:
                return False
        self._call = None
        if call.calls is None:
            self._give("content", call.text)
            return True
        for made in call.calls:
            self._found.append(Delta("call", made.arguments, self._calls, made.id, made.name))
            self._calls += 1
        self._pass_tag()
        self._after_call = self._style.calls != "mistral"
        return True

    def _skip_end_of_call(self, final: bool) -> bool:
        """Drop the tag that ends a call, which models forget sometimes."""
        text = self._rest.lstrip()
        if not final and len(text) < len(END_OF_CALL) and END_OF_CALL.startswith(text):
            return False
        self._after_call = False
        self._rest = text.removeprefix(END_OF_CALL)
        return True

    def _pass_tag(self) -> None:
        self._space, self._beside_tag, self._begun = "", True, True

    def _until(self, tags: Sequence[str], final: bool) -> tuple[str, str]:
        """Take the rest up to the first of some tags and behind it; return that text, and the tag or ""."""
        text = self._rest
        places = [(at, tag) for tag in tags if (at := text.find(tag)) >= 0]
        if places:
            at, tag = min(places)
            self._rest = text[at + len(tag) :]
            return text[:at], tag
        kept = 0 if final else max((_overlap(text, tag) for tag in tags), default=0)
        self._rest = text[len(text) - kept :]
        return text[: len(text) - kept], ""

    def _give(self, kind: str, text: str) -> None:
        """Give text out, but for white space at its end."""
        text = self._space + text
        certain = text.rstrip()
        self._space = text[len(certain) :]
        if self._beside_tag:
            certain = certain.lstrip()
        if certain:
            self._beside_tag, self._begun = False, True
            self._found.append(Delta(kind, certain))


def _overlap(text: str, tag: str) -> int:
    """Return the length of the longest end of a text that begins a tag, but is not all of it."""
    return next((size for size in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:size])), 0)
