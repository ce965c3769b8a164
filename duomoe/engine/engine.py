"""The loop: admit, prefill or decode, sample, hand tokens to their requests."""

import contextlib
import copy
import itertools
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from duomoe.engine.chunks import Span, batch_of, cut
from duomoe.engine.completion import Chunk
from duomoe.engine.decode_step import DecodeStep, Sampled
from duomoe.engine.logprobs import prompt_logprobs
from duomoe.engine.request import Request
from duomoe.engine.scheduler import Scheduler
from duomoe.experts.policies import Policy
from duomoe.memory.kv_cache import KVCache
from duomoe.models import Model
from duomoe.sampling import SamplingParams


class Engine:
    """Runs requests over a model; one thread calls it (thread.py).

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
        self._numbers = itertools.count(-1, -1)  # of passes that are no request's

    @property
    def has_work(self) -> bool:
        """Whether a step would advance anything."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    def add(self, request: Request) -> None:
        """Queue a request; what becomes of it goes to its outbox."""
        try:
            request.traffic_before = self.policy.traffic_so_far()
            self.scheduler.add(request)
        except BaseException as error:
            self.fail([request], error)

    def cancel(self, request: Request) -> None:
        """Forget a request, wherever it stands; its pages are free then."""
        self.scheduler.remove(request)
        self.decode_step.leave(request)

    def fail(self, requests: Iterable[Request], error: BaseException) -> None:
        """End requests, each with an error of its own; nothing is kept of what was at hand where it was raised."""
        traceback.clear_frames(error.__traceback__)
        for request in list(requests):
            self.cancel(request)
            request.outbox.put(_copy(error))

    def close(self) -> None:
        """End all requests, with errors, and what the policy runs on."""
        self.fail([*self.scheduler.running, *self.scheduler.waiting], RuntimeError("this model was closed"))
        self.policy.close()

    @torch.inference_mode()
    def step(self) -> None:
        """Advance some requests by one token each: all newly admitted ones, else all running ones.

        Each gets a chunk; one that has finished holds no pages any more by then. When the step fails, exactly the
        requests that were part of it end with the error, and no expert counts as resident.
        """
        admitted = self.scheduler.admit()
        requests = admitted or list(self.scheduler.running)
        if not requests:
            return
        try:
            with self._failing_safely():
                sampled = self._advance(requests, bool(admitted))
        except BaseException as error:
            self.fail(requests, error)
            return
        for request, each in zip(requests, sampled, strict=True):
            try:
                self._give(request, each)
            except BaseException as error:
                self.fail([request], error)

    @contextlib.contextmanager
    def _failing_safely(self) -> Iterator[None]:
        """After a failure within, wherever it was, nothing counts as resident: any slot may be half filled."""
        try:
            yield
        except BaseException as error:
            try:
                self.policy.forget()
            except BaseException as other:  # of a GPU that answers no more, say; the first error tells more
                error.add_note(f"after that: {other}")
            raise

    def _give(self, request: Request, sampled: Sampled | Exception) -> None:
        """Hand a token to its request, and what it adds to the caller; raise what is wrong with the request instead."""
        if isinstance(sampled, Exception):
            raise sampled
        text = request.accept(sampled.token, self.eos, sampled.logprobs)
        completion = None
        if request.finish_reason is not None:
            self.cancel(request)
            assert request.traffic_before is not None, "a request that runs was added"
            completion = request.completion(self.policy.traffic_so_far().since(request.traffic_before))
        request.outbox.put(Chunk(text, sampled.token, completion, sampled.logprobs))

    @torch.inference_mode()
    def prepare(self, sequences: int, params: Sequence[SamplingParams]) -> None:
        """Compile and capture the steps of so many sequences with such parameters, and of all fewer."""
        self.decode_step.prepare(sequences, params)

    def _advance(self, requests: list[Request], admitted: bool) -> list[Sampled | Exception]:
        """Return the next token of each request, or what is wrong with that request alone."""
        begin = time.perf_counter()
        (self._prefill if admitted else self.decode_step.launch)(requests)
        read = self.decode_step.read()
        if not admitted:
            self.policy.note_step(len(requests), time.perf_counter() - begin)
        return read

    def _prefill(self, requests: list[Request]) -> None:
        """Pass prompts, and launch the sampling of their first tokens; what their next ones need is there by then."""
        if any(request.params.max_new_tokens > 1 for request in requests):
            running = self.scheduler.running
            self.prepare(len(running), [request.params for request in running])
        stream = torch.cat(self._pass([(request.number, request.prompt) for request in requests]))
        ends = list(itertools.accumulate(len(request.prompt) for request in requests))
        for request, end in zip(requests, ends, strict=True):
            if (count := request.params.prompt_logprobs) is not None:
                of_prompt = stream[end - len(request.prompt) : end]
                rows = self.scheduler.max_batch
                request.prompt_logprobs = prompt_logprobs(self.model, of_prompt, request.prompt, count, rows)
        last = torch.tensor(ends).to(self.model.device, non_blocking=True) - 1
        self.decode_step.begin(requests, self.model.logits(stream[last]))

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> Tensor:
        """Return the logits [tokens, vocab] of one prompt, in a pass of its own.

        Raises:
            RuntimeError: when there are not enough free pages.
        """
        allocator, number = self.cache.allocator, next(self._numbers)
        if not allocator.reserve(number, len(tokens)):
            raise RuntimeError("no KV pages are free; finish or close running generations first")
        try:
            with self._failing_safely():
                return torch.cat([self.model.logits(x) for x in self._pass([(number, tokens)])])
        finally:
            allocator.release(number)

    def _pass(self, prompts: Sequence[tuple[int, list[int]]]) -> list[Tensor]:
        """Run a prefill pass over sequences, by number and tokens; return the stream [tokens, hidden] in chunks."""
        grow = self.cache.allocator.grow
        spans = [Span(tokens, 0, len(tokens), grow(number, len(tokens))) for number, tokens in prompts]
        batches = [batch_of(chunk, self.model.rotary, self.model.device) for chunk in cut(spans)]
        return self.policy.prefill(batches, self.cache.layers)


def _copy(error: BaseException) -> BaseException:
    """Return an error like another one, because whoever raises one changes it; where that is not possible, itself."""
    try:
        copied = copy.copy(error)
    except Exception:  # the constructor of an error may want anything
        return error
    if type(copied) is not type(error):
        return error
    copied.__cause__, copied.__suppress_context__ = error.__cause__, error.__suppress_context__
    return copied.with_traceback(error.__traceback__)
