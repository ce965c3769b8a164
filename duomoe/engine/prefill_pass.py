"""A prefill under way: requests whose tokens, but for those that were computed before, pass through the model."""

import time
from collections.abc import Sequence

from torch import Tensor

from duomoe.engine.request import Request
from duomoe.experts.policies import Pass


class PrefillPass:
    """A pass, which can be advanced a little at a time.

    Args:
        requests: whose tokens these are.
        steps: computes them.

    Attributes:
        tokens: how many it computes.
        seconds: what it has taken so far, without what ran between its steps.
        stream: the residual stream [tokens, hidden] of each chunk, once the pass is through.
    """

    def __init__(self, requests: Sequence[Request], steps: Pass) -> None:
        self.requests = list(requests)
        self.tokens = sum(request.length - request.computed for request in requests)
        self.seconds = 0.0
        self.stream: list[Tensor] | None = None
        self._steps = steps

    def advance(self, seconds: float) -> None:
        """Take steps for so long, but at least one."""
        begin = now = time.perf_counter()
        while self.stream is None and (now == begin or now - begin < seconds):
            try:
                next(self._steps)
            except StopIteration as end:
                self.stream = end.value
            now = time.perf_counter()
        self.seconds += now - begin

    def give_up(self) -> None:
        """End it where it stands."""
        self._steps.close()
