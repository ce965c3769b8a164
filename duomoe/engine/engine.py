"""The loop: admit, prefill or decode, sample, hand tokens to their requests."""

from collections.abc import Sequence

import torch
from torch import Tensor

from duomoe.engine.request import Request
from duomoe.engine.scheduler import Scheduler
from duomoe.experts.policies import Policy
from duomoe.memory.kv_cache import PAGE_SIZE, KVCache
from duomoe.models import Batch, Model
from duomoe.sampling import sample


class Engine:
    """Runs requests over a model.

    Args:
        model: the non-expert part.
        policy: runs the blocks with their experts.
        cache: the KV pages.
        eos: token ids that end a sequence.
        max_batch: how many requests run at once.
    """

    def __init__(self, model: Model, policy: Policy, cache: KVCache, eos: frozenset[int], max_batch: int) -> None:
        self.model, self.policy, self.cache, self.eos = model, policy, cache, eos
        self.scheduler = Scheduler(cache.allocator, max_batch)

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Advance some requests by one token each and return them: all newly admitted ones, else all running ones.

        Requests that finished with this token have their `finish_reason` set and hold no pages any more. When the step
        fails, every request that was part of it is ended with that `error`, and the error is raised.
        """
        admitted = self.scheduler.admit()
        requests = admitted or list(self.scheduler.running)
        try:
            self._advance(requests, bool(admitted))
        except BaseException as error:
            for request in requests:
                request.error = error
                self.scheduler.remove(request)
            raise
        return requests

    def _advance(self, requests: list[Request], admitted: bool) -> None:
        tokens = [request.prompt if admitted else request.generated[-1:] for request in requests]
        logits = self._forward([request.number for request in requests], tokens, [r.length for r in requests])
        # host-sync ok: the one read of a step.
        for request, token in zip(requests, self._sample(requests, logits).tolist(), strict=True):
            request.accept(token, self.eos)
            if request.finish_reason:
                self.scheduler.remove(request)

    @torch.inference_mode()
    def logits(self, number: int, tokens: list[int]) -> Tensor:
        """Return the logits [tokens, vocab] of one prompt, in a pass of its own; there must be room for its pages."""
        allocator = self.cache.allocator
        if not allocator.reserve(number, len(tokens)):
            raise RuntimeError("no KV pages are free; finish or close running generations first")
        try:
            return self._forward([number], [tokens], [len(tokens)], every=True)
        finally:
            allocator.release(number)

    def _forward(
        self, numbers: list[int], tokens: Sequence[list[int]], lengths: list[int], every: bool = False
    ) -> Tensor:
        """Run one pass over the last tokens of some sequences.

        Args:
            numbers: of the sequences.
            tokens: those of each sequence that have no keys in the cache yet, its last ones.
            lengths: of each sequence, these tokens included.
            every: return logits for every token instead of for each sequence's last.
        """
        batch = self._batch(numbers, tokens, lengths)
        x = self.policy.forward(batch, self.cache.layers)
        return self.model.logits(x if every else x[batch.query_start[1:].long() - 1])

    def _batch(self, numbers: list[int], tokens: Sequence[list[int]], lengths: list[int]) -> Batch:
        pages = [self.cache.allocator.grow(number, length) for number, length in zip(numbers, lengths, strict=True)]
        # Never 1, for which torch.compile would make a variant of its own.
        width = max(2, *map(len, pages))
        spans = list(zip(tokens, lengths, strict=True))
        query_start = [0]
        for new in tokens:
            query_start.append(query_start[-1] + len(new))
        positions = self._tensor([p for new, length in spans for p in range(length - len(new), length)])
        owner = self._tensor([sequence for sequence, new in enumerate(tokens) for _ in new])
        page_table = self._tensor([held + [-1] * (width - len(held)) for held in pages])
        context_len = self._tensor(lengths)
        cos, sin = self.model.rotary.cos_sin(positions, context_len[owner])
        return Batch(
            tokens=self._tensor([token for new in tokens for token in new]),
            cos=cos,
            sin=sin,
            rows=page_table[owner, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE,
            page_table=page_table.to(torch.int32),
            query_start=self._tensor(query_start).to(torch.int32),
            context_len=context_len.to(torch.int32),
            max_query_len=max(map(len, tokens)),
        )

    def _sample(self, requests: list[Request], logits: Tensor) -> Tensor:
        if all(request.params.temperature == 0 for request in requests):
            return logits.argmax(-1)
        params = [request.params for request in requests]
        return sample(
            logits,
            self._tensor([p.temperature for p in params]),
            self._tensor([p.top_k for p in params]),
            self._tensor([p.top_p for p in params]),
            self._tensor([request.seed for request in requests]),
            self._tensor([request.length for request in requests]),
        )

    def _tensor(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values).to(self.model.device, non_blocking=True)
