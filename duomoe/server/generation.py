"""A request whose sequences are submitted."""

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from duomoe.chat_output import OutputParser
from duomoe.engine.stream import Stream
from duomoe.server.protocol import ChatRequest, CompletionRequest, Streaming

Asked = TypeVar("Asked", CompletionRequest, ChatRequest)


@dataclass(frozen=True)
class Generation(Generic[Asked]):
    """What is being generated for a request.

    Attributes:
        request: what is asked for.
        name: of the model, as the request calls it.
        prompts: token ids of each prompt.
        streams: of each prompt's choices, all of the first prompt's before those of the second.
        parsers: of a chat, what takes each choice apart.
    """

    request: Asked
    name: str
    prompts: list[list[int]]
    streams: list[Stream]
    parsers: list[OutputParser] = field(default_factory=list)

    @property
    def streaming(self) -> Streaming:
        """How the answer is sent."""
        return self.request.streaming

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(map(len, self.prompts))
