"""The loop: admit, prefill or decode, sample, hand tokens to their requests."""

import itertools
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from duomoe.engine.chunks import Span, batch_of, cut
from duomoe.engine.decode_step import DecodeStep
from duomoe.engine.request import Request
from duomoe.engine.scheduler import Scheduler
from duomoe.experts.policies import Policy
from duomoe.memory.kv_cache import KVCache
from duomoe.models import Model
from duomoe.sampling import SamplingParams, sample


class Engine:
    """Runs requests over a model.

    Args:
        model: the non-expert part.
        policy: runs the blocks with their experts.
        cache: the KV pages.
        eos: token ids that end a sequence.
        scheduler: says who runs next.
        decode_step: runs one step of the running requests.
    """

    def __init__(
        self,
        model: Model,
        policy: Policy,
        cache: KVCache,
        eos: frozenset[int],
        scheduler: Scheduler,
        decode_step: DecodeStep,
    ) -> None:
        self.model, self.policy, self.cache, self.eos = model, policy, cache, eos
        self.scheduler, self.decode_step = scheduler, decode_step

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

    @torch.inference_mode()
    def prepare(self, sequences: int, params: Sequence[SamplingParams]) -> None:
        """Compile and capture the steps of so many sequences with such parameters, and of all fewer."""
        self.decode_step.prepare(sequences, all(each.temperature == 0 for each in params))

    def _advance(self, requests: list[Request], admitted: bool) -> None:
        begin = time.perf_counter()
        tokens = self._prefill(requests) if admitted else self.decode_step.run(requests)
        read = tokens.tolist()  # host-sync ok: the one read of a step
        if not admitted:
            self.policy.note_step(len(requests), time.perf_counter() - begin)
        for request, token in zip(requests, read, strict=True):
            request.accept(token, self.eos)
            if request.finish_reason:
                self.scheduler.remove(request)

    def _prefill(self, requests: list[Request]) -> Tensor:
        """Return the first token of each request, int64 [requests]; what their next ones need is there by then."""
        if any(request.params.max_new_tokens > 1 for request in requests):
            running = self.scheduler.running
            self.prepare(len(running), [request.params for request in running])
        stream = torch.cat(self._pass([(request.number, request.prompt) for request in requests]))
        ends = self._tensor(list(itertools.accumulate(len(request.prompt) for request in requests)))
        logits = self.model.logits(stream[ends - 1])
        params = [request.params for request in requests]
        if all(p.temperature == 0 for p in params):
            return logits.argmax(-1)
        return sample(
            logits,
            self._tensor([p.temperature for p in params]),
            self._tensor([p.top_k for p in params]),
            self._tensor([p.top_p for p in params]),
            self._tensor([request.seed for request in requests]),
            self._tensor([request.length for request in requests]),
        )

    def _tensor(self, values: Sequence[int | float]) -> Tensor:
        return torch.tensor(values).to(self.model.device, non_blocking=True)

    @torch.inference_mode()
    def logits(self, number: int, tokens: list[int]) -> Tensor:
        """Return the logits [tokens, vocab] of one prompt, in a pass of its own; there must be room for its pages."""
        allocator = self.cache.allocator
        if not allocator.reserve(number, len(tokens)):
            raise RuntimeError("no KV pages are free; finish or close running generations first")
        try:
            return torch.cat([self.model.logits(x) for x in self._pass([(number, tokens)])])
        finally:
            allocator.release(number)

    def _pass(self, prompts: Sequence[tuple[int, list[int]]]) -> list[Tensor]:
        """Run a prefill pass over sequences, by number and tokens; return the stream [tokens, hidden] in chunks."""
        grow = self.cache.allocator.grow
        spans = [Span(tokens, 0, len(tokens), grow(number, len(tokens))) for number, tokens in prompts]
        batches = [batch_of(chunk, self.model.rotary, self.model.device) for chunk in cut(spans)]
        return self.policy.prefill(batches, self.cache.layers)
