"""What an engine has under way, and what it has done so far."""

from dataclasses import dataclass

from duomoe.experts.link import Traffic


@dataclass(frozen=True)
class Stats:
    """A look at an engine between two moments; counts are since the model was loaded.

    Attributes:
        running: requests that are computed in turns.
        waiting: requests in the queue.
        pages: of the KV cache.
        used_pages: those that requests hold.
        kept_pages: those that nobody holds, kept for prompts that begin alike.
        prompt_tokens: of all requests that were admitted.
        found_tokens: those of them that were computed before.
        generated_tokens: of all requests.
        preemptions: how often a request gave its pages to others.
        passes: prefill passes.
        steps: decode steps.
        pass_s: seconds that all passes took.
        step_s: seconds that all steps took.
        expected_pass_s: what the passes were expected to take by those before them, in seconds.
        expected_step_s: the same of steps.
        experts: what crossed the link, up to the last arrival or end of a request.
    """

    running: int
    waiting: int
    pages: int
    used_pages: int
    kept_pages: int
    prompt_tokens: int
    found_tokens: int
    generated_tokens: int
    preemptions: int
    passes: int
    steps: int
    pass_s: float
    step_s: float
    expected_pass_s: float
    expected_step_s: float
    experts: Traffic
