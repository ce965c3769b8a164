"""One prompt on its way to a completion."""

import time
from dataclasses import dataclass, field

from duomoe.engine.completion import Completion, Metrics
from duomoe.engine.outbox import Outbox
from duomoe.engine.task import Task
from duomoe.experts.link import Traffic
from duomoe.sampling import SamplingParams
from duomoe.text_stream import TextStream


@dataclass(eq=False, kw_only=True)
class Request(Task):
    """A task with its parameters and what has become of it.

    Attributes:
        prompt_length: so many of its tokens are the prompt's.
        finish_reason: "stop" (an EOS token or a stop string), "length", or None while it runs.
        outbox: where its chunks go, and an error that ends it.
        traffic_before: what had crossed the link when it was added to the engine.
    """

    prompt_length: int
    params: SamplingParams
    seed: int
    stream: TextStream
    outbox: Outbox = field(default_factory=Outbox)
    finish_reason: str | None = None
    traffic_before: Traffic | None = None
    arrived: float = field(default_factory=time.perf_counter)  # this and the next two: seconds on that clock
    first_token: float = 0.0
    last_token: float = 0.0

    @property
    def generated(self) -> list[int]:
        """The tokens behind the prompt."""
        return self.tokens[self.prompt_length :]

    def accept(self, token: int, eos: frozenset[int]) -> str:
        """Append a sampled token, decide whether the sequence ends with it, and return the text that is certain now."""
        self.last_token = time.perf_counter()
        if self.length == self.prompt_length:
            self.first_token = self.last_token
        self.tokens.append(token)
        ended = token in eos and not self.params.ignore_eos
        text = "" if ended else self.stream.push(token)
        if ended or self.stream.stopped:
            self.finish_reason = "stop"
        elif self.length >= self.longest:
            self.finish_reason = "length"
        if self.finish_reason:
            text += self.stream.finish()
        return text

    def completion(self, experts: Traffic) -> Completion:
        """Return what it came to, once it has finished; `experts` is what crossed the link meanwhile."""
        generated = self.generated
        count = len(generated)
        assert self.finish_reason is not None
        metrics = Metrics(
            prompt_tokens=self.prompt_length,
            cached_tokens=self.found or 0,
            ttft_s=self.first_token - self.arrived,
            tpot_s=(self.last_token - self.first_token) / (count - 1) if count > 1 else None,
            e2e_s=self.last_token - self.arrived,
            experts=experts,
        )
        return Completion(self.stream.text, generated, self.finish_reason, metrics)
