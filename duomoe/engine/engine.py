"""The loop: admit, prefill or decode, sample, hand tokens to their requests."""

import contextlib
import copy
import itertools
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from duomoe.engine.chunks import Span, batch_of, cut
from duomoe.engine.completion import Chunk, Logprobs
from duomoe.engine.decode_step import DecodeStep, Sampled
from duomoe.engine.log import EngineLog
from duomoe.engine.logprobs import prompt_logprobs
from duomoe.engine.request import Request
from duomoe.engine.scheduler import Scheduler
from duomoe.engine.stats import Stats
from duomoe.experts.page_routing import Prefix
from duomoe.experts.policies import Policy
from duomoe.memory.kv_cache import KVCache
from duomoe.memory.pages import PAGE_SIZE, pages_for
from duomoe.models import Model
from duomoe.sampling import SamplingParams

# A row's logits and what log-probabilities make of them take an eighth of what the plan has for a row that is sampled.
LOGPROB_ROWS = 4


class Engine:
    """Runs requests over a model; one thread calls it (thread.py).

    Args:
        model: the non-expert part.
        policy: runs the blocks with their experts.
        cache: the KV pages.
        eos: token ids that end a sequence.
        scheduler: says who runs next.
        decode_step: runs one step of the running requests.
        log: is told what is done; None where nobody wants to know.

    Attributes:
        overlaps: hand a step's tokens to callers while the next step is computed, where neither waits for the other. On
            a CPU the callers would wait for a step more.
    """

    def __init__(
        self,
        model: Model,
        policy: Policy,
        cache: KVCache,
        eos: frozenset[int],
        scheduler: Scheduler[Request],
        decode_step: DecodeStep,
        log: EngineLog | None = None,
    ) -> None:
        self.log = log
        if log is not None:
            log.begin(cache.pages.num_pages, scheduler.limits)
        self.model, self.policy, self.cache, self.eos = model, policy, cache, eos
        self.scheduler, self.decode_step = scheduler, decode_step
        self.overlaps = model.device.type == "cuda"
        self._owed: deque[tuple[Request, int, Logprobs | None]] = deque()  # tokens whose callers have not got them yet
        self._traffic = policy.traffic_so_far()  # by the last arrival or end
        self._generated = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would advance anything."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    def add(self, requests: Sequence[Request]) -> None:
        """Queue requests; what becomes of them goes to their outboxes."""
        try:
            self._traffic = self.policy.traffic_so_far()
            for request in requests:
                request.traffic_before = self._traffic
                self.scheduler.add(request)
                if self.log is not None:
                    self.log.arrive(request)
        except BaseException as error:
            self.fail(requests, error)

    def cancel(self, request: Request) -> None:
        """Forget a request, wherever it stands; its pages are free then."""
        self._remove(request, failed=True)

    def _remove(self, request: Request, failed: bool) -> None:
        request.gone = True
        self.decode_step.leave(request)
        self.scheduler.remove(request)
        if self.log is not None:
            self.log.end(request, time.perf_counter(), failed)

    def fail(self, requests: Iterable[Request], error: BaseException) -> None:
        """End requests, each with an error of its own; nothing is kept of what was at hand where it was raised."""
        traceback.clear_frames(error.__traceback__)
        broken: BaseException | None = None
        for request in list(requests):
            try:
                self._hand_over(request)
                self._remove(request, failed=True)
            except BaseException as other:
                broken = other
            request.outbox.put(_copy(error))
        if broken is not None:  # all have been told
            raise broken

    def fail_all(self, error: BaseException) -> None:
        """End every request with an error, and forget all pages: nobody knows where it has left the queue and them."""
        try:
            self.fail([*self.scheduler.running, *self.scheduler.waiting], error)
        finally:
            self.scheduler.clear()

    def close(self) -> None:
        """End all requests, with errors, and what the policy runs on."""
        with contextlib.ExitStack() as last:
            if self.log is not None:
                last.callback(self.log.close)
            last.callback(self.policy.close)
            self.fail_all(RuntimeError("this model was closed"))

    @torch.inference_mode()
    def step(self) -> float:
        """Advance some requests by one token each, as the scheduler decides.

        Each gets a chunk; one that has finished holds no pages any more by then. When the step fails, exactly the
        requests that were part of it end with the error, and no expert counts as resident.

        Returns:
            How many seconds the next step can wait, if nothing happens meanwhile; 0 where something was done.
        """
        decision = self.scheduler.decide(time.perf_counter())
        for request in decision.preempted:
            self.decode_step.leave(request)
        if decision.until is not None:
            return max(0.0, decision.until - time.perf_counter())
        requests = list(decision.admitted or decision.decoding)
        try:
            with self._failing_safely():
                found = self._advance(requests, prefill=bool(decision.admitted))
        except BaseException as error:
            self.fail(requests, error)
            return 0.0
        for request, sampled in zip(requests, found, strict=True):
            if request.gone:
                continue
            self.scheduler.note_computed(request)
            if isinstance(sampled, Exception):
                self.fail([request], sampled)
                continue
            self._generated += 1
            request.append(sampled.token, self.eos, sampled.logprobs)
            self._owed.append((request, *sampled))
            # Only its text may still end one with stop strings, so that is needed before the next step.
            if not self.overlaps or request.finish_reason is not None or request.params.stop:
                self._hand_over(request)
        return 0.0

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

    def _hand_over(self, only: Request | None = None) -> None:
        """Give callers, or only one, the tokens that they are owed, and what those add to their texts."""
        for request, token, logprobs in [self._owed.popleft() for _ in range(len(self._owed))]:
            if only is not None and request is not only:
                self._owed.append((request, token, logprobs))
                continue
            if request.gone:
                continue
            try:
                text = request.read(token)
            except BaseException as error:
                self.fail([request], error)
                continue
            if request.finish_reason is None:
                request.outbox.put(Chunk(text, token, None, logprobs))
            else:
                self._finish(request, text, token, logprobs)

    def _finish(self, request: Request, text: str, token: int, logprobs: Logprobs | None) -> None:
        """Forget a request that has come to its end, and give its caller the last chunk."""
        try:
            self._remove(request, failed=False)
            assert request.traffic_before is not None, "a request that runs was added"
            self._traffic = self.policy.traffic_so_far()
            completion = request.completion(self._traffic.since(request.traffic_before))
            request.outbox.put(Chunk(text, token, completion, logprobs))
        except BaseException as error:
            request.outbox.put(_copy(error))  # it is forgotten, and nobody else would tell its caller
            raise

    @torch.inference_mode()
    def prepare(self, sequences: int, params: Sequence[SamplingParams]) -> None:
        """Compile and capture the steps of so many sequences with such parameters, and of all fewer."""
        self.decode_step.prepare(sequences, params)

    def stats(self) -> Stats:
        """Return what is under way and done. Any thread may ask, at any time; what it reads may be a moment apart."""
        scheduler, costs = self.scheduler, self.scheduler.costs
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pages=scheduler.pages.num_pages,
            used_pages=scheduler.pages.used,
            kept_pages=scheduler.pages.kept,
            prompt_tokens=scheduler.counts.prompt_tokens,
            found_tokens=scheduler.counts.found_tokens,
            generated_tokens=self._generated,
            preemptions=scheduler.counts.preemptions,
            passes=costs.prefill.count,
            steps=costs.decode.count,
            pass_s=costs.prefill.total,
            step_s=costs.decode.total,
            expected_pass_s=costs.prefill.expected,
            expected_step_s=costs.decode.expected,
            experts=replace(self._traffic),
        )

    def _advance(self, requests: list[Request], prefill: bool) -> list[Sampled | Exception]:
        """Compute the rest of some requests, in a pass or a step; return the next token of each, or its error."""
        if prefill and any(request.params.max_new_tokens > 1 for request in requests):
            running = self.scheduler.running
            self.prepare(len(running), [request.params for request in running])
        size = sum(request.length - request.computed for request in requests)
        begin = time.perf_counter()
        if prefill:
            self._prefill(requests)
        else:
            self.decode_step.launch(requests)
        self._hand_over()  # of the step before
        found = self.decode_step.read()
        seconds = time.perf_counter() - begin
        if prefill:
            self.scheduler.costs.prefill.note(size, seconds)
        else:
            self.policy.note_step(len(requests), seconds)
            self.scheduler.costs.decode.note(size, seconds)
        if self.log is not None:
            self.log.advance("prefill" if prefill else "decode", requests, begin, seconds, size)
        return found

    def _prefill(self, requests: list[Request]) -> None:
        """Compute the rest of some requests in a pass, and launch the sampling of their next tokens."""
        stream = torch.cat(self._pass([_rest(request) for request in requests], _prefixes(requests)))
        ends = list(itertools.accumulate(request.length - request.computed for request in requests))
        for request, end in zip(requests, ends, strict=True):
            if (count := request.params.prompt_logprobs) is not None and request.prompt_logprobs is None:
                begin = end - request.length
                told = stream[begin : begin + request.prompt_length]
                rows = LOGPROB_ROWS * self.decode_step.max_batch
                request.prompt_logprobs = prompt_logprobs(
                    self.model, told, request.tokens[: request.prompt_length], count, rows
                )
        last = torch.tensor(ends).to(self.model.device, non_blocking=True) - 1
        self.decode_step.begin(requests, self.model.logits(stream[last]))

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> Tensor:
        """Return the logits [tokens, vocab] of one prompt, in a pass of its own, with nothing that was computed before.

        Requests give way where it needs their pages.
        """
        needed = pages_for(len(tokens))
        for request in self.scheduler.make_room(needed):
            self.decode_step.leave(request)
        pages = self.cache.pages.take(needed)
        try:
            with self._failing_safely():
                chunks = self._pass([Span(tokens, 0, len(tokens), pages)])
                return torch.cat([self.model.logits(x) for x in chunks])
        finally:
            self.cache.pages.release(pages)

    def _pass(self, spans: Sequence[Span], prefixes: Sequence[Prefix] = ()) -> list[Tensor]:
        """Run a prefill pass; return the stream [tokens, hidden] in chunks."""
        batches = [batch_of(chunk, self.model.rotary, self.model.device) for chunk in cut(spans)]
        return self.policy.prefill(batches, self.cache.layers, prefixes)


def _rest(request: Request) -> Span:
    """Return what is to be computed of a request."""
    return Span(request.tokens[request.computed :], request.computed, request.prompt_length, request.pages)


def _prefixes(requests: Sequence[Request]) -> list[Prefix]:
    """Return what of each request is computed already."""
    coming = {page for request in requests for page in request.pages[request.computed // PAGE_SIZE :]}
    prefixes = []
    for request in requests:
        pages = [page for page in request.pages[: request.computed // PAGE_SIZE] if page not in coming]
        prefixes.append(Prefix(pages, request.length - PAGE_SIZE * len(pages)))
    return prefixes


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
