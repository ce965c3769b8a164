"""One prompt on its way to a completion."""

import time
from collections import deque
from dataclasses import dataclass, field

from duomoe.sampling import SamplingParams
from duomoe.tokenizer import TextStream


@dataclass(eq=False)
class Request:
    """A sequence with its parameters and what has become of it.

    Attributes:
        length_limit: the most tokens the sequence may have, prompt included.
        finish_reason: "stop" (an EOS token or a stop string), "length", or None while it runs.
    """

    number: int
    prompt: list[int]
    params: SamplingParams
    seed: int
    length_limit: int
    stream: TextStream
    generated: list[int] = field(default_factory=list)
    news: deque[tuple[str, int]] = field(default_factory=deque)  # text and token of each step, until someone reads it
    finish_reason: str | None = None
    error: BaseException | None = None  # what ended the step that this request was part of
    submitted: float = field(default_factory=time.perf_counter)  # this and the next two: seconds on that clock
    first_token: float = 0.0
    last_token: float = 0.0

    @property
    def length(self) -> int:
        """Tokens of the sequence so far."""
        return len(self.prompt) + len(self.generated)

    def accept(self, token: int, eos: frozenset[int]) -> None:
        """Append a sampled token and decide whether the sequence ends with it."""
        self.last_token = time.perf_counter()
        if not self.generated:
            self.first_token = self.last_token
        self.generated.append(token)
        ended = token in eos and not self.params.ignore_eos
        text = "" if ended else self.stream.push(token)
        if ended or self.stream.stopped:
            self.finish_reason = "stop"
        elif len(self.generated) >= self.params.max_new_tokens or self.length >= self.length_limit:
            self.finish_reason = "length"
        if self.finish_reason:
            text += self.stream.finish()
        self.news.append((text, token))
