"""Random schedules of an engine: arrivals, steps, cancels and faults of the link in any order.

Every request that finishes has the tokens and the text that it has alone; every one that fails was in a step that did;
and in the end no page, no slot and no request is left.
"""

from dataclasses import dataclass
from functools import cache
from itertools import count
from queue import Empty
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from duomoe import LLM, SamplingParams
from duomoe.engine.completion import Completion
from duomoe.engine.request import Request
from duomoe.experts.link import Copy, HostLink, LinkError
from duomoe.memory.pages import PagePool

# The embedded model has a tokenizer, so that texts can end at stop strings; experts are what matters here.
# Some begin alike, for more than a page.
NUMBERS = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, "
PROMPTS = ["The sea", "def main():\n", "Emma was not at all surprised when", "a", NUMBERS, NUMBERS * 2, NUMBERS + "and"]
PAGES = 9  # fewer than three sequences may need
STOPS: list[tuple[str, ...]] = [(), ("e",), (" the", "\n")]
FAULT = OSError("a fault of the link")


@cache
def model(policy: str, slots: str) -> LLM:
    bounded = {} if policy == "resident" else {"expert_memory": slots}
    llm = LLM(dtype="float32", device="cpu", policy=policy, max_batch=3, max_model_len=96, **bounded)
    llm.engine.cache.pages = llm.engine.scheduler.pages = PagePool(PAGES)
    return llm


@cache
def alone(prompt: str, params: SamplingParams) -> Completion:
    return model("resident", "").generate(prompt, params)[0]


@dataclass
class Followed:
    """A request, what it has alone, and what has come of it so far."""

    request: Request
    expected: Completion
    tokens: list[int]
    text: str = ""
    ended: bool = False


class Schedules(RuleBasedStateMachine):
    """Drives an engine from this thread, as its own thread would; that one waits for messages that do not come.

    What is drawn does not depend on what happens: a model remembers what earlier examples did.
    """

    @initialize(
        policy=st.sampled_from(["duo", "lru", "resident", "on_demand"]),
        slots=st.sampled_from(["1%", "8%", "40%"]),
        overlaps=st.booleans(),
    )
    def begin(self, policy: str, slots: str, overlaps: bool) -> None:
        self.llm = model(policy, slots)
        self.engine = self.llm.engine
        self.engine.overlaps = overlaps
        self.live: list[Followed] = []
        self.faulty = 0  # so many copies from now on fails one; 0 for none
        self.faults = self.failures = 0  # copies that have failed, and steps; a copy fails the step that waits for it

        def at_once(link: HostLink, copy: Copy, queue: Any) -> Copy:
            """Copy in this thread: when a fault hits must not depend on how threads take turns."""
            self.faulty -= 1
            if self.faulty == 0:
                self.faults += 1
                copy.error = FAULT
            else:
                copy.slot[: copy.source.nbytes].copy_(copy.source)
                copy.moved = copy.source.nbytes
                copy.ahead = copy.moved * (queue is link._ahead)
                link.ahead_bytes += copy.ahead
            copy.arrived.set()
            return copy

        clock = count()
        self.patch = pytest.MonkeyPatch()
        # A tenth of a second passes whenever the engine looks.
        self.patch.setattr("duomoe.engine.engine.time", SimpleNamespace(perf_counter=lambda: next(clock) / 10))
        self.patch.setattr(HostLink, "_queue", at_once)

    @rule(
        prompt=st.sampled_from(PROMPTS),
        stop=st.sampled_from(STOPS),
        new=st.integers(1, 40),
        temperature=st.sampled_from([0.0, 0.9]),
    )
    def arrive(self, prompt: str, stop: tuple[str, ...], new: int, temperature: float) -> None:
        params = SamplingParams(max_new_tokens=new, stop=stop, temperature=temperature, seed=3)
        request = self.llm._request(prompt, params)
        self.engine.add([request])
        self.live.append(Followed(request, alone(prompt, params), []))

    @rule()
    def step(self) -> None:
        self.engine.step()
        self.failures += any([self.read(followed) is not None for followed in list(self.live)])  # one step, all read
        assert self.failures <= self.faults
        assert len(self.engine.scheduler.running) <= 3

    def read(self, followed: Followed) -> BaseException | None:
        """Compare what has come of a request with what it has alone; return the error that has ended it, if one has."""
        failure = None
        while True:
            try:
                event = followed.request.outbox.get(timeout=0)
            except Empty:
                return failure
            assert not followed.ended, "something came behind the end"
            if isinstance(event, BaseException):
                assert isinstance(event, LinkError) and event.__cause__ is FAULT
                self.live.remove(followed)
                followed.ended = True
                failure = event
                continue
            followed.tokens.append(event.token_id)
            followed.text += event.text
            assert followed.tokens == followed.expected.token_ids[: len(followed.tokens)]
            if event.completion is not None:
                assert followed.tokens == event.completion.token_ids == followed.expected.token_ids
                assert followed.text == event.completion.text == followed.expected.text
                assert event.completion.finish_reason == followed.expected.finish_reason
                self.live.remove(followed)
                followed.ended = True

    @rule(number=st.integers(0, 5))
    def cancel(self, number: int) -> None:
        if number < len(self.live):
            self.engine.cancel(self.live.pop(number).request)

    @rule(prompt=st.sampled_from(PROMPTS))
    def look_at_logits(self, prompt: str) -> None:
        tokens = self.llm._tokens(prompt)
        try:
            logits = self.engine.logits(tokens)
        except LinkError:
            self.failures += 1
            assert self.failures <= self.faults
            return
        assert torch.equal(logits, first_logits(prompt))

    @rule(copies=st.integers(1, 60))
    def break_a_copy(self, copies: int) -> None:
        self.faulty = copies

    @invariant()
    def pages_belong_to_those_who_run(self) -> None:
        if hasattr(self, "engine"):
            held = {page for request in self.engine.scheduler.running for page in request.pages}
            assert self.engine.cache.pages.used == len(held)

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.patch.undo()
            for followed in self.live:
                self.engine.cancel(followed.request)
            assert self.engine.cache.pages.used == 0 and not self.engine.has_work


@cache
def first_logits(prompt: str) -> torch.Tensor:
    return model("resident", "").logits(model("resident", "")._tokens(prompt))


@pytest.fixture(autouse=True, scope="module")
def _end() -> Any:
    yield
    model.cache_clear()


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(
    max_examples=15, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_schedules_for_long(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--long"):
        pytest.skip("takes minutes: --long")
    from hypothesis.stateful import run_state_machine_as_test

    many = settings(max_examples=400, stateful_step_count=80, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Schedules, settings=many)
