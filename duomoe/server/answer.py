"""What the answers of both endpoints have in common: their frame, their usage, and how they are sent as events."""

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from duomoe.engine.completion import Chunk, Completion
from duomoe.server.generation import Generation

DONE = b"data: [DONE]\n\n"


class Answer(ABC):
    """An answer on its way.

    Args:
        generation: what is answered.
        prefix: what ids begin with.
        kind: what the whole answer is called, and each event.
    """

    def __init__(self, generation: Generation[Any], prefix: str, kind: tuple[str, str]) -> None:
        self._whole_kind, self._event_kind = kind
        self._head = {
            "id": f"{prefix}-{secrets.token_hex(16)}",
            "created": int(time.time()),
            "model": generation.name,
        }
        event = {"object": self._event_kind} | self._head
        self._event_head = b"data: " + json.dumps(event).encode()[:-1] + b', "choices": ['
        self._streaming = generation.streaming
        self._prompt_tokens = generation.prompt_tokens
        self._counts_tokens = True
        self._completion_tokens = 0
        self._cached_tokens = 0

    @abstractmethod
    def pieces(self, index: int, chunk: Chunk) -> Iterable[dict[str, Any]]:
        """Return what a chunk adds to a choice: `choices` of as many events."""

    @abstractmethod
    def choice(self, index: int, completion: Completion) -> dict[str, Any]:
        """Return a whole choice."""

    def events(self, index: int, chunks: Sequence[Chunk]) -> bytes:
        """Return the events for some chunks of a choice."""
        parts = []
        for chunk in chunks:
            self._count(chunk)
            parts += [self._event(json.dumps(piece).encode()) for piece in self.pieces(index, chunk)]
        return b"".join(parts)

    def last_events(self) -> bytes:
        """Return the events that end an answer: usage, where it is asked for, and the end itself."""
        if not self._streaming.usage_at_end:
            return DONE
        usage = json.dumps(self._usage()).encode()
        return self._event_head + b'], "usage": ' + usage + b"}\n\n" + DONE

    def whole(self, completions: Sequence[Completion]) -> bytes:
        """Return the answer as one JSON object."""
        for completion in completions:
            self._count_prompt(completion)
            self._completion_tokens += len(completion.token_ids) * self._counts_tokens
        choices = [self.choice(index, completion) for index, completion in enumerate(completions)]
        whole = {"object": self._whole_kind} | self._head | {"choices": choices, "usage": self._usage()}
        return json.dumps(whole).encode()

    def _event(self, choice: bytes) -> bytes:
        if self._streaming.usage_in_each:
            return self._event_head + choice + b'], "usage": ' + json.dumps(self._usage()).encode() + b"}\n\n"
        if self._streaming.usage_at_end:
            return self._event_head + choice + b'], "usage": null}\n\n'
        return self._event_head + choice + b"]}\n\n"

    def _count(self, chunk: Chunk) -> None:
        self._completion_tokens += self._counts_tokens
        if chunk.completion is not None:
            self._count_prompt(chunk.completion)

    def _count_prompt(self, completion: Completion) -> None:
        self._cached_tokens = max(self._cached_tokens, completion.metrics.cached_tokens)

    def _usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }
