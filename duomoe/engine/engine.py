"""The loop: admit, go on with a prefill or decode, sample, hand tokens to their requests."""

import contextlib
import copy
import itertools
import math
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
from duomoe.engine.prefill_pass import PrefillPass
from duomoe.engine.request import Request
from duomoe.engine.scheduler import Scheduler
from duomoe.engine.stats import Stats
from duomoe.experts.page_routing import Prompt
from duomoe.experts.policies import Pass, Policy, finished
from duomoe.memory.kv_cache import KVCache
from duomoe.memory.pages import PAGE_SIZE, pages_for
from duomoe.models import Model
from duomoe.sampling import SamplingParams

# How long a pass goes on, in seconds, before the engine looks whether something has come in, where nobody decodes.
SLICE = 0.05

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
        self._pass: PrefillPass | None = None

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
        """Forget a request, wherever it stands; its pages are free then.

        Where it shares a pass that is under way with others, that is at the end of the pass: they may share its pages.
        """
        request.gone = True
        leaving = [request]
        if self._pass is not None and request in self._pass.requests:
            leaving = self._pass.requests
            if not all(each.gone for each in leaving):
                return
            self._give_up_pass()
        for each in leaving:
            self._remove(each, failed=True)

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
        with contextlib.ExitStack() as last:
            last.callback(self.scheduler.clear)
            last.callback(lambda: self.fail([*self.scheduler.running, *self.scheduler.waiting], error))
            self._give_up_pass()

    def close(self) -> None:
        """End all requests, with errors, and what the policy runs on."""
        with contextlib.ExitStack() as last:
            if self.log is not None:
                last.callback(self.log.close)
            last.callback(self.policy.close)
            self.fail_all(RuntimeError("this model was closed"))

    @torch.inference_mode()
    def step(self) -> float:
        """Go on with a pass, or advance some requests by one token each, as the scheduler decides.

        Who is given a token gets a chunk; one that has finished holds no pages any more by then. When the step fails,
        exactly the requests that were part of it end with the error, and no expert counts as resident.

        Returns:
            How many seconds the next step can wait, if nothing happens meanwhile; 0 where something was done.
        """
        decision = self.scheduler.decide(time.perf_counter())
        for request in decision.preempted:
            self.decode_step.leave(request)
        if decision.until is not None:
            return max(0.0, decision.until - time.perf_counter())
        if decision.admitted or decision.passing:
            self._advance_pass(decision.admitted)
        else:
            self._decode(list(decision.decoding))
        return 0.0

    def _advance_pass(self, admitted: Sequence[Request]) -> None:
        """Go on with the pass that is under way, or a new one; if somebody decodes beside it, for as long as a step."""
        scheduler = self.scheduler
        requests = list(scheduler.passing)
        others = len(scheduler.running) - len(requests)
        seconds = scheduler.costs.decode.at(others) if others else SLICE
        try:
            with self._failing_safely():
                if admitted:
                    self._begin_pass(requests)
                assert self._pass is not None, "requests are computed in a pass"
                self._pass.advance(seconds if scheduler.limits.interruptible else math.inf)
                self._hand_over()  # of the step before
                if self._pass.stream is None:
                    return
                found = self._end_pass(self._pass)
        except BaseException as error:
            self._pass = None
            self.fail(requests, error)
        else:
            self._accept(requests, found)

    def _begin_pass(self, requests: Sequence[Request]) -> None:
        running = self.scheduler.running
        if any(request.params.max_new_tokens > 1 for request in requests):
            self.prepare(len(running), [request.params for request in running])
        beside = len(running) > len(requests)
        steps = self._steps([_rest(request) for request in requests], _prompts(requests), beside)
        self._pass = PrefillPass(requests, steps)

    def _end_pass(self, done: PrefillPass) -> list[Sampled | Exception]:
        """Return the next token of each request of a pass that is through, or its error."""
        begin = time.perf_counter()
        assert done.stream is not None, "it is through"
        self._launch_first(done.requests, torch.cat(done.stream))
        self._pass = None
        found = self.decode_step.read()
        seconds = done.seconds + time.perf_counter() - begin
        self.scheduler.costs.prefill.note(done.tokens, seconds)
        self._note("prefill", done.requests, seconds, done.tokens)
        return found

    def _decode(self, requests: list[Request]) -> None:
        """Take a step."""
        begin = time.perf_counter()
        try:
            with self._failing_safely():
                self.decode_step.launch(requests)
                self._hand_over()  # of the step before
                found = self.decode_step.read()
        except BaseException as error:
            self._restart_pass()
            self.fail(requests, error)
            return
        seconds = time.perf_counter() - begin
        self.policy.note_step(len(requests), seconds)
        self.scheduler.costs.decode.note(len(requests), seconds)
        self._note("decode", requests, seconds, len(requests))
        self._accept(requests, found)

    def _note(self, kind: str, requests: Sequence[Request], seconds: float, tokens: int) -> None:
        if self.log is not None:
            self.log.advance(kind, requests, time.perf_counter(), seconds, tokens)

    def _accept(self, requests: Sequence[Request], found: Sequence[Sampled | Exception]) -> None:
        """Let requests have their next tokens, or end with an error of their own."""
        for request, sampled in zip(requests, found, strict=True):
            if request.gone:
                self._remove(request, failed=True)
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

    @torch.inference_mode()
    def _give_up_pass(self) -> None:
        """End the pass that is under way, if one is; its requests stand where they were."""
        given_up, self._pass = self._pass, None
        if given_up is not None:
            given_up.give_up()

    def _restart_pass(self) -> None:
        """After a failed step, let those whose pass was under way be computed again: what they had is lost."""
        self._give_up_pass()
        for request in self.scheduler.restart_pass():
            if request.gone:
                self._remove(request, failed=True)

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

    def _launch_first(self, requests: Sequence[Request], stream: Tensor) -> None:
        """Launch the sampling of requests' next tokens by what a pass has computed, [tokens, hidden]."""
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

        Requests give way where it needs their pages; a pass that is under way is computed to its end.
        """
        while self._pass is not None:
            self._advance_pass(())
        needed = pages_for(len(tokens))
        for request in self.scheduler.make_room(needed):
            self.decode_step.leave(request)
        pages = self.cache.pages.take(needed)
        try:
            with self._failing_safely():
                prompt = Prompt(len(tokens), [], len(tokens))
                beside = bool(self.scheduler.running)
                chunks = finished(self._steps([Span(tokens, 0, len(tokens), pages)], [prompt], beside))
                return torch.cat([self.model.logits(x) for x in chunks])
        finally:
            self.cache.pages.release(pages)

    def _steps(self, spans: Sequence[Span], prompts: Sequence[Prompt], beside: bool) -> Pass:
        """Return the steps of a prefill pass."""
        batches = [batch_of(chunk, self.model.rotary, self.model.device) for chunk in cut(spans)]
        return self.policy.prefill(batches, self.cache.layers, prompts, beside)


def _rest(request: Request) -> Span:
    """Return what is to be computed of a request."""
    return Span(request.tokens[request.computed :], request.computed, request.prompt_length, request.pages)


def _prompts(requests: Sequence[Request]) -> list[Prompt]:
    """Return of each request what a pass computes, and what was computed before."""
    coming = {page for request in requests for page in request.pages[request.computed // PAGE_SIZE :]}
    prompts = []
    for request in requests:
        pages = [page for page in request.pages[: request.computed // PAGE_SIZE] if page not in coming]
        behind = request.length - PAGE_SIZE * len(pages)
        prompts.append(Prompt(request.length - request.computed, pages, behind))
    return prompts


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
