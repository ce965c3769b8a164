"""Conversations to tokens, and what a model writes back to content, reasoning and tool calls."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from duomoe.llm import LLM
from duomoe.server.errors import invalid
from duomoe.server.protocol import Conversation


@dataclass(frozen=True)
class ToolPiece:
    """A part of a tool call: the first one of a call has its id and name, all may have some of its arguments."""

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True)
class Delta:
    """What some text adds to an answer: one of these."""

    content: str = ""
    reasoning: str = ""
    call: ToolPiece | None = None


class Parser(Protocol):
    """Takes an answer apart as it comes."""

    def push(self, text: str) -> Iterable[Delta]:
        """Return what is certain now."""

    def finish(self) -> Iterable[Delta]:
        """Return what was held back."""


class PlainText:
    """The parser of a model without syntax of its own: all is content."""

    def push(self, text: str) -> list[Delta]:
        """Return the text as content."""
        return [Delta(content=text)] if text else []

    def finish(self) -> list[Delta]:
        """Return nothing: no text is held back."""
        return []


class Dialogue:
    """A model's way to hold conversations.

    Args:
        llm: has the tokenizer, and the chat template.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def tokens(self, conversation: Conversation) -> list[int]:
        """Return the prompt for the next message of a conversation.

        Raises:
            InputError: when there is no chat template, or it cannot be rendered.
        """
        texts = [message.get("content") for message in conversation.messages]
        single = len(texts) == 1 and isinstance(texts[0], str) and conversation.messages[0]["role"] == "user"
        if not single or conversation.tools or conversation.template_kwargs:
            raise invalid("messages: one message of the user's is supported so far", "messages", "unsupported")
        return self._llm.chat_tokens(str(texts[0]))

    def parser(self, conversation: Conversation) -> Parser:
        """Return what takes an answer to this conversation apart."""
        return PlainText()

    def template(self) -> Any:
        """Return the chat template's text, or None where the checkpoint has none."""
        return None
