"""Who runs next: waiting prompts are prefilled together as soon as there is room, then all decode together."""

from collections import deque

from duomoe.engine.request import Request
from duomoe.memory.kv_cache import PageAllocator


class Scheduler:
    """Keeps requests in order of arrival.

    Args:
        pages: where requests reserve their pages.
        max_batch: how many requests may run at once.
        pass_tokens: how many tokens the prompts of one pass may have together; none is longer.
    """

    def __init__(self, pages: PageAllocator, max_batch: int, pass_tokens: int) -> None:
        self.pages = pages
        self.max_batch = max_batch
        self.pass_tokens = pass_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def admit(self) -> list[Request]:
        """Move waiting requests to running, first come first served, while there is room; return them.

        They are prefilled in one pass, so the room is not only for their pages but also for the pass's tokens.
        """
        admitted: list[Request] = []
        tokens = 0
        while self.waiting and len(self.running) < self.max_batch:
            request = self.waiting[0]
            tokens += len(request.prompt)
            if admitted and tokens > self.pass_tokens:
                break
            most = min(len(request.prompt) + request.params.max_new_tokens, request.length_limit)
            if not self.pages.reserve(request.number, most):
                break
            admitted.append(self.waiting.popleft())
            self.running.append(request)
        return admitted

    def remove(self, request: Request) -> None:
        """Forget a request that finished or was given up, wherever it stands, and free its pages."""
        if request in self.running:
            self.running.remove(request)
            self.pages.release(request.number)
        elif request in self.waiting:
            self.waiting.remove(request)
