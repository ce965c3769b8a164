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
    ttft_s: float  # from submission to the first token
    tpot_s: float | None  # mean time between tokens after the first; None for a single token
    e2e_s: float  # from submission to the last token
    experts: Traffic


@dataclass(frozen=True)
class Completion:
    """What a prompt was continued with."""

    text: str
    token_ids: list[int]
    finish_reason: str  # "stop" or "length"
    metrics: Metrics


@dataclass(frozen=True)
class Chunk:
    """What one step added: text that is certain by now (often none), and at the end the whole completion."""

    text: str
    token_id: int
    completion: Completion | None
