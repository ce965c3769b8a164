"""What a request gives its caller: chunks as tokens come, and the completion they add up to."""

from dataclasses import dataclass

from duomoe.experts.link import Traffic


@dataclass(frozen=True)
class Metrics:
    """How long a request took, in seconds, and what its experts cost.

    `experts` counts what crossed the link between the request's start and its end, for all requests that ran then.
    """

    prompt_tokens: int
    cached_tokens: int  # of those, what was in pages already
    queue_s: float  # from submission to admission
    ttft_s: float  # from submission to the first token
    tpot_s: float | None  # mean time between tokens after the first; None for a single token
    e2e_s: float  # from submission to the last token
    experts: Traffic


@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of probabilities in the model's own distribution, at temperature 1 and before all changes.

    Attributes:
        logprob: of the token that is there.
        top: token ids and theirs, the likeliest first; as many as were asked for.
    """

    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Completion:
    """What a prompt was continued with.

    Attributes:
        finish_reason: "stop" or "length".
        logprobs: of each token, where they were asked for.
        prompt_logprobs: of each token of the prompt, where they were asked for; None for the first one.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    metrics: Metrics
    logprobs: list[Logprobs] | None = None
    prompt_logprobs: list[Logprobs | None] | None = None


@dataclass(frozen=True)
class Chunk:
    """What one step added: text that is certain by now (often none), and at the end the whole completion."""

    text: str
    token_id: int
    completion: Completion | None
    logprobs: Logprobs | None = None  # of the token, where they were asked for
