"""One prompt on its way to a completion."""

import time
from dataclasses import dataclass, field

from duomoe.engine.completion import Completion, Logprobs, Metrics
from duomoe.engine.outbox import Outbox
from duomoe.experts.link import Traffic
from duomoe.grammar import Matcher
from duomoe.sampling import SamplingParams
from duomoe.tokenizer import TextStream


@dataclass(eq=False)
class Request:
    """A sequence with its parameters and what has become of it.

    Attributes:
        length_limit: the most tokens the sequence may have, prompt included.
        matcher: says which tokens its grammar lets come.
        finish_reason: "stop" (a token that ends it, or a stop string), "length", or None while it runs.
        outbox: where its chunks go, and an error that ends it.
        traffic_before: what had crossed the link when it was added to the engine.
    """

    number: int
    prompt: list[int]
    params: SamplingParams
    seed: int
    length_limit: int
    stream: TextStream
    matcher: Matcher | None = None
    outbox: Outbox = field(default_factory=Outbox)
    generated: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    prompt_logprobs: list[Logprobs | None] | None = None
    finish_reason: str | None = None
    traffic_before: Traffic | None = None
    submitted: float = field(default_factory=time.perf_counter)  # this and the next two: seconds on that clock
    first_token: float = 0.0
    last_token: float = 0.0

    @property
    def length(self) -> int:
        """Tokens of the sequence so far."""
        return len(self.prompt) + len(self.generated)

    def ends(self, eos: frozenset[int]) -> frozenset[int]:
        """Return the tokens that end it, where `eos` are those of the model."""
        ignored = self.params.ignore_eos and self.matcher is None
        return frozenset(self.params.stop_token_ids).union(() if ignored else eos)

    def accept(self, token: int, eos: frozenset[int], logprobs: Logprobs | None = None) -> str:
        """Append a sampled token, decide whether the sequence ends with it, and return the text that is certain now."""
        self.last_token = time.perf_counter()
        if not self.generated:
            self.first_token = self.last_token
        self.generated.append(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        ended = token in self.ends(eos)
        text = "" if ended else self.stream.push(token)
        if ended or self.stream.stopped:
            self.finish_reason = "stop"
        elif len(self.generated) >= self.params.max_new_tokens or self.length >= self.length_limit:
            self.finish_reason = "length"
        if self.finish_reason:
            text += self.stream.finish()
        return text

    def completion(self, experts: Traffic) -> Completion:
        """Return what it came to, once it has finished; `experts` is what crossed the link meanwhile."""
        count = len(self.generated)
        assert self.finish_reason is not None
        metrics = Metrics(
            prompt_tokens=len(self.prompt),
            ttft_s=self.first_token - self.submitted,
            tpot_s=(self.last_token - self.first_token) / (count - 1) if count > 1 else None,
            e2e_s=self.last_token - self.submitted,
            experts=experts,
        )
        logprobs = None if self.params.logprobs is None else self.logprobs
        return Completion(self.stream.text, self.generated, self.finish_reason, metrics, logprobs, self.prompt_logprobs)
