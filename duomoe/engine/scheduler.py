"""Who runs next. There is no tensor in here, so that it can be simulated by the million (simulation.py).

The rules of `decide`:

1. First come, first served. Waiting requests are admitted in order, together, to one prefill pass, as far as there is
   room: in the batch, in the pass, and in pages. These are for their tokens so far and the next one, and one more for
   each request beside them that may still need it.
2. Between two passes, all running requests decode at least one token. What arrives meanwhile is admitted together.
   While a pass is under way, it and their steps take turns, where the policy allows it and nobody has to give way.
3. Where nothing runs, a pass waits a moment for company: not longer than a decode step takes, nor than a small share of
   what the pass itself is expected to take.
4. A running request takes pages as it grows. When none is left, the latest is preempted: it gives its pages back, waits
   at the head of the queue, and is computed again. The oldest always goes on, so every request ends.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from duomoe.engine.cost import Costs
from duomoe.engine.task import Task
from duomoe.memory.pages import PAGE_SIZE, PagePool, pages_for

# Of what a pass is expected to take, it may wait this share for company.
PATIENT_SHARE = 0.02

AnyTask = TypeVar("AnyTask", bound=Task)


class Limits(NamedTuple):
    """What bounds a decision.

    Attributes:
        max_batch: how many requests may run at once.
        pass_tokens: how many tokens one pass may compute; none has more to compute by itself.
        interruptible: whether steps may run amid a pass.
    """

    max_batch: int
    pass_tokens: int
    interruptible: bool


class State(NamedTuple, Generic[AnyTask]):
    """All that a decision depends on.

    Attributes:
        waiting: in order of arrival.
        running: likewise; all came before those that wait.
        passing: those of them, the latest, whose pass is under way.
        pages: says what is available, and what is there already of somebody's tokens.
        stepped: running requests have decoded since a pass was last advanced, or there are none.
        now: in seconds on the clock of `Task.arrived`.
        costs: what passes and steps are expected to take.
    """

    waiting: Sequence[AnyTask]
    running: Sequence[AnyTask]
    passing: Sequence[AnyTask]
    pages: PagePool
    stepped: bool
    now: float
    costs: Costs


class Decision(NamedTuple, Generic[AnyTask]):
    """What to do next: advance a pass, or take a step for which somebody may be preempted, or nothing.

    Attributes:
        admitted: to be computed in a new pass, in this order.
        passing: whose pass goes on.
        decoding: to advance by one token.
        preempted: to give their pages back first, the latest first.
        until: there is nothing to do before that time, unless something arrives; None where there is, or nobody waits.
    """

    admitted: Sequence[AnyTask] = ()
    passing: Sequence[AnyTask] = ()
    decoding: Sequence[AnyTask] = ()
    preempted: Sequence[AnyTask] = ()
    until: float | None = None


def decide(state: State[AnyTask], limits: Limits) -> Decision[AnyTask]:
    """Say what to do next. Depends on nothing else, and changes nothing but that keys of pages are made."""
    if state.passing:
        others = state.running[: len(state.running) - len(state.passing)]
        if limits.interruptible and others and not state.stepped and sum(_lacking(others)) <= state.pages.available:
            return Decision(decoding=others)
        return Decision(passing=state.passing)
    if state.waiting and state.stepped:
        admitted, tokens = _admissible(state, limits)
        due = state.now
        if admitted and not state.running:
            wait = min(state.costs.decode.at(1), PATIENT_SHARE * state.costs.prefill.at(tokens))
            due = min(admitted[0].arrived, state.now) + wait
        if due > state.now and len(admitted) < limits.max_batch:
            return Decision(until=due)
        if admitted:
            return Decision(admitted=admitted)
    preempted = _preempted(state)
    return Decision(decoding=state.running[: len(state.running) - len(preempted)], preempted=preempted)


def _admissible(state: State[AnyTask], limits: Limits) -> tuple[list[AnyTask], int]:
    """Return whom there is room for in one pass, and how many tokens that computes at most."""
    admitted: list[AnyTask] = []
    spare, tokens = state.pages.available, 0
    growing = sum(task.most_pages > len(task.pages) for task in state.running)
    for task in state.waiting:
        if len(state.running) + len(admitted) == limits.max_batch:
            break
        found = state.pages.find(task.shared_keys())
        rest = task.length - PAGE_SIZE * len(found)
        pages = min(pages_for(task.length + 1), task.most_pages)
        spare -= pages - len(found) + state.pages.unheld(found)
        if spare < growing or (admitted and tokens + rest > limits.pass_tokens):
            break
        tokens += rest
        growing += task.most_pages > pages
        admitted.append(task)
    return admitted, tokens


def _lacking(tasks: Sequence[AnyTask]) -> list[bool]:
    """Return for each task whether it needs another page for its next step."""
    return [pages_for(task.length) > len(task.pages) for task in tasks]


def _preempted(state: State[AnyTask]) -> list[AnyTask]:
    """Return who has to give way, the latest first, so that each of the others has a page for its next token."""
    lacking = _lacking(state.running)
    missing, available = sum(lacking), state.pages.available
    preempted: list[AnyTask] = []
    given: Counter[int] = Counter()  # how many of those who give way hold each page
    while missing > available:
        number = len(lacking) - 1 - len(preempted)
        assert number > 0, "one sequence has room for all the tokens that it may have"
        preempted.append(state.running[number])
        missing -= lacking[number]
        given.update(state.running[number].pages)
        available += sum(given[page] == state.pages.holders(page) for page in state.running[number].pages)
    return preempted


@dataclass
class Counts:
    """What has happened so far.

    Attributes:
        prompt_tokens: of all requests that were admitted for the first time.
        found_tokens: those of them that were in pages already.
        preemptions: how often a request gave way.
    """

    prompt_tokens: int = 0
    found_tokens: int = 0
    preemptions: int = 0


class Scheduler(Generic[AnyTask]):
    """Keeps the queue and the pages as decisions have them.

    Args:
        pages: those of the KV cache.
        limits: of a decision.
    """

    def __init__(self, pages: PagePool, limits: Limits) -> None:
        self.pages, self.limits = pages, limits
        self.waiting: deque[AnyTask] = deque()
        self.running: list[AnyTask] = []
        self.passing: list[AnyTask] = []  # the latest of those, whose pass is under way
        self.costs = Costs()
        self.counts = Counts()
        self._stepped = True

    def add(self, task: AnyTask) -> None:
        """Queue a task."""
        self.waiting.append(task)

    def decide(self, now: float) -> Decision[AnyTask]:
        """Decide, and make the decision true: whoever is to compute has pages for it."""
        stepped = self._stepped or not self.running
        state = State(self.waiting, self.running, self.passing, self.pages, stepped, now, self.costs)
        decision = decide(state, self.limits)
        for task in decision.preempted:
            self._preempt(task)
        # What each was promised, before anybody takes a page that it lies in.
        for task in decision.admitted:
            task.pages = self.pages.find(task.shared_keys())
            self.pages.hold(task.pages)
        for task in decision.admitted:
            self._admit(task, now)
        for task in decision.decoding:
            task.pages += self.pages.take(pages_for(task.length) - len(task.pages))
        self._stepped = not decision.admitted and not decision.passing
        return decision

    def restart_pass(self) -> list[AnyTask]:
        """Let those whose pass is under way wait again, with nothing computed; return them."""
        restarted = list(self.passing)
        for task in reversed(restarted):
            self._preempt(task)
        return restarted

    def _admit(self, task: AnyTask, now: float) -> None:
        """Move the head of the queue to those who run, with the pages that were found for it.

        Its pages can be found from now on, though they are computed only in the pass to come: for those who are
        admitted to the same pass, and are behind it there. So it may find more than it was promised.
        """
        assert self.waiting[0] is task, "first come, first served"
        more = self.pages.find(task.shared_keys())[len(task.pages) :]
        self.pages.hold(more)
        task.pages += more
        task.computed = PAGE_SIZE * len(task.pages)
        task.pages += self.pages.take(pages_for(task.length) - len(task.pages))
        if task.admitted is None:
            task.admitted, task.found = now, task.computed
            self.counts.prompt_tokens += task.length
            self.counts.found_tokens += task.computed
        self._name(task, task.length)
        self.running.append(self.waiting.popleft())
        self.passing.append(task)

    def _name(self, task: AnyTask, tokens: int) -> None:
        """Let the full pages of its first tokens be found, beginning with those that are not computed yet."""
        first, end = task.computed // PAGE_SIZE, tokens // PAGE_SIZE
        if task.keys is not None and first < end:
            for page, key in zip(task.pages[first:end], task.keys.of(task.tokens)[first:end], strict=True):
                self.pages.name(page, key)

    def _preempt(self, task: AnyTask) -> None:
        """Move the latest of those who run back to the head of the queue, with nothing computed."""
        assert self.running[-1] is task, "the latest gives way"
        self._leave_pass(task)
        self.waiting.appendleft(self.running.pop())
        self._give_back(task)
        self.counts.preemptions += 1

    def _give_back(self, task: AnyTask) -> None:
        """Free a task's pages; those that are not computed do not hold what they were named for."""
        self.pages.unname(task.pages[task.computed // PAGE_SIZE :])
        self.pages.release(task.pages)
        task.pages, task.computed = [], 0

    def note_computed(self, task: AnyTask) -> None:
        """Note that all tokens of a task are computed; before the next one is appended."""
        self._name(task, task.length)
        task.computed = task.length
        self._leave_pass(task)

    def _leave_pass(self, task: AnyTask) -> None:
        if task in self.passing:
            self.passing.remove(task)

    def make_room(self, pages: int) -> list[AnyTask]:
        """Preempt the latest until so many pages are available; return who gave way."""
        assert pages <= self.pages.num_pages, "no more is asked for than there is"
        preempted = []
        while self.pages.available < pages:
            preempted.append(self.running[-1])
            self._preempt(self.running[-1])
        return preempted

    def clear(self) -> None:
        """Forget all tasks and all pages."""
        self.waiting.clear()
        self.running.clear()
        self.passing.clear()
        self.pages.clear()

    def remove(self, task: AnyTask) -> None:
        """Forget a task that finished or was given up, wherever it stands, and free its pages."""
        if task in self.running:
            self.running.remove(task)
            self._leave_pass(task)
            self._give_back(task)
        elif task in self.waiting:
            self.waiting.remove(task)
