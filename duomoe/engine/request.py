"""One prompt on its way to a completion."""

import time
from dataclasses import dataclass, field

from duomoe.engine.completion import Completion, Logprobs, Metrics
from duomoe.engine.outbox import Outbox
from duomoe.engine.task import Task
from duomoe.experts.link import Traffic
from duomoe.grammar import Matcher
from duomoe.sampling import SamplingParams
from duomoe.text_stream import TextStream


@dataclass(eq=False, kw_only=True)
class Request(Task):
    """A task with its parameters and what has become of it.

    Attributes:
        prompt_length: so many of its tokens are the prompt's.
        matcher: says which tokens its grammar lets come.
        logprobs: of the tokens behind the prompt, where they are asked for.
        prompt_logprobs: of the prompt's, where they are asked for, once they are known.
        finish_reason: "stop" (a token that ends it, or a stop string), "length", or None while it runs.
        gone: the engine has forgotten it.
        outbox: where its chunks go, and an error that ends it.
        traffic_before: what had crossed the link when it was added to the engine.
    """

    prompt_length: int
    params: SamplingParams
    seed: int
    stream: TextStream
    matcher: Matcher | None = None
    outbox: Outbox = field(default_factory=Outbox)
    logprobs: list[Logprobs] = field(default_factory=list)
    prompt_logprobs: list[Logprobs | None] | None = None
    finish_reason: str | None = None
    gone: bool = False
    traffic_before: Traffic | None = None
    arrived: float = field(default_factory=time.perf_counter)  # this and the next two: seconds on that clock
    first_token: float = 0.0
    last_token: float = 0.0

    @property
    def generated(self) -> list[int]:
        """The tokens behind the prompt."""
        return self.tokens[self.prompt_length :]

    @property
    def answered(self) -> int:
        """How many tokens stand behind the prompt."""
        return self.length - self.prompt_length

    def ends(self, eos: frozenset[int]) -> frozenset[int]:
        """Return the tokens that end it, where `eos` are those of the model."""
        ignored = self.params.ignore_eos and self.matcher is None
        return frozenset(self.params.stop_token_ids).union(() if ignored else eos)

    def append(self, token: int, eos: frozenset[int], logprobs: Logprobs | None) -> None:
        """Append a sampled token, and decide whether the sequence ends with it; stop strings are for `read`."""
        self.last_token = time.perf_counter()
        if self.answered == 0:
            self.first_token = self.last_token
        self.tokens.append(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        if token in self.ends(eos):
            self.finish_reason = "stop"
        elif self.length >= self.longest:
            self.finish_reason = "length"

    def read(self, token: int) -> str:
        """Return the text that is certain with the next of its tokens; a stop string in it ends the sequence."""
        text = "" if self.finish_reason == "stop" else self.stream.push(token)
        if self.stream.stopped:
            self.finish_reason = "stop"
        return text + (self.stream.finish() if self.finish_reason else "")

    def completion(self, experts: Traffic) -> Completion:
        """Return what it came to, once it has finished; `experts` is what crossed the link meanwhile."""
        generated = self.generated
        count = len(generated)
        assert self.finish_reason is not None
        metrics = Metrics(
            prompt_tokens=self.prompt_length,
            cached_tokens=self.found or 0,
            queue_s=max(0.0, (self.admitted or self.arrived) - self.arrived),
            ttft_s=self.first_token - self.arrived,
            tpot_s=(self.last_token - self.first_token) / (count - 1) if count > 1 else None,
            e2e_s=self.last_token - self.arrived,
            experts=experts,
        )
        logprobs = None if self.params.logprobs is None else self.logprobs
        return Completion(self.stream.text, generated, self.finish_reason, metrics, logprobs, self.prompt_logprobs)
