"""Conversations to tokens, and what a model writes back to content, reasoning and tool calls."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from duomoe.llm import LLM
from duomoe.server.errors import invalid
from duomoe.server.protocol import Conversation


class Delta(Protocol):
    """A piece of an answer: content, reasoning, or a part of a call of a tool."""

    @property
    def kind(self) -> str:
        """One of "content", "reasoning" and "call"."""

    @property
    def text(self) -> str:
        """Of content or reasoning; of a call, a part of its arguments."""

    @property
    def index(self) -> int:
        """Which of the answer's calls it is."""

    @property
    def id(self) -> str:
        """Of the call."""

    @property
    def name(self) -> str:
        """Of the function that is called; empty in what continues a call."""


class Parser(Protocol):
    """Takes an answer apart as it comes."""

    def push(self, text: str) -> Sequence[Delta]:
        """Return what is certain now."""

    def finish(self) -> Sequence[Delta]:
        """Return what was held back."""


@dataclass(frozen=True)
class Text:
    """Content."""

    text: str
    kind: str = "content"
    index: int = 0
    id: str = ""
    name: str = ""


class PlainText:
    """The parser of a model without syntax of its own: all is content."""

    def push(self, text: str) -> list[Delta]:
        """Return the text as content."""
        return [Text(text)] if text else []

    def finish(self) -> list[Delta]:
        """Return nothing: no text is held back."""
        return []


class Dialogue:
    """A model's way to hold conversations.

    Args:
        llm: has the tokenizer, and the chat template.

    Attributes:
        stop: strings that end an answer, besides those that a client names.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self.stop: tuple[str, ...] = getattr(llm, "chat_stop", ())

    def tokens(self, conversation: Conversation) -> list[int]:
        """Return the prompt for the next message of a conversation.

        Raises:
            InputError: when there is no chat template, or it cannot be rendered.
        """
        make: Any = self._llm.chat_tokens
        if "messages" in inspect.signature(make).parameters:
            tokens: list[int] = make(conversation.messages, conversation.tools, conversation.template_kwargs)
            return tokens
        texts = [message.get("content") for message in conversation.messages]
        single = len(texts) == 1 and isinstance(texts[0], str) and conversation.messages[0]["role"] == "user"
        if not single or conversation.tools or conversation.template_kwargs:
            raise invalid("messages: one message of the user's is supported so far", "messages", "unsupported")
        return self._llm.chat_tokens(str(texts[0]))

    def parser(self, conversation: Conversation) -> Parser:
        """Return what takes an answer to this conversation apart."""
        return PlainText()
