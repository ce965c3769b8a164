"""A simulation of the engine: the scheduler as it is, over a clock and costs instead of a model."""

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from duomoe.engine.cost import Costs
from duomoe.engine.log_reader import LoggedRequest, Work, read_log
from duomoe.engine.scheduler import Scheduler
from duomoe.engine.task import Task
from duomoe.errors import InputError
from duomoe.memory.pages import PageKeys, PagePool


@dataclass(eq=False, kw_only=True)
class Simulated(Task):
    """A task that ends at its longest, and when it got what.

    Attributes:
        first_token: when it got its first one, in seconds on the clock of `arrived`.
        ended: when it got its last one.
    """

    first_token: float | None = None
    ended: float | None = None


def simulate(arrivals: Iterable[Simulated], scheduler: Scheduler[Simulated], costs: Costs) -> int:
    """Let tasks run until all have ended, and note in each when it got its tokens.

    Args:
        arrivals: in any order; each fits in the scheduler's pages.
        scheduler: an empty one.
        costs: what passes and steps take; the scheduler is given the same.

    Returns:
        How many decisions that took.

    Raises:
        InputError: when there is never room for one of them.
    """
    scheduler.costs = costs
    coming = deque(sorted(arrivals, key=lambda task: task.arrived))
    now, decisions = 0.0, 0
    left = 0.0  # seconds of the pass under way
    while coming or scheduler.waiting or scheduler.running:
        if not scheduler.waiting and not scheduler.running:
            now = max(now, coming[0].arrived)
        while coming and coming[0].arrived <= now:
            scheduler.add(coming.popleft())
        decision = scheduler.decide(now)
        decisions += 1
        if decision.until is not None:
            now = min([decision.until] + [task.arrived for task in list(coming)[:1]])
            continue
        advancing = decision.admitted or decision.passing or decision.decoding
        if not advancing:
            raise InputError("there is never room for what waits: it needs more pages, or a batch of at least 1")
        others = len(scheduler.running) - len(scheduler.passing)
        if decision.decoding:
            now += costs.decode.at(others)
        else:
            if decision.admitted:
                left = costs.prefill.at(sum(task.length - task.computed for task in advancing))
            slice_ = min(left, costs.decode.at(others)) if others and scheduler.limits.interruptible else left
            now, left = now + slice_, left - slice_
            if left > 0:
                continue
        for task in list(advancing):
            scheduler.note_computed(task)
            _give(task, now, scheduler)
    return decisions


def _give(task: Simulated, now: float, scheduler: Scheduler[Simulated]) -> None:
    """Give a task its next token."""
    task.tokens.append(0)
    if task.first_token is None:
        task.first_token = now
    if task.length >= task.longest:
        task.ended = now
        scheduler.remove(task)


@dataclass(frozen=True)
class Replay:
    """How well a simulation of what arrived tells what happened.

    Attributes:
        requests: that ended as they should.
        decisions: of the simulation.
        pass_error: of the costs: the median of |estimate - observed| / observed over the log's passes.
        step_error: the same over its decode steps.
        ttft_error: of the simulation: the median of |simulated - observed| / observed over requests.
        e2e_error: the same of the time to the last token.
    """

    requests: int
    decisions: int
    pass_error: float
    step_error: float
    ttft_error: float
    e2e_error: float


def replay(path: Path) -> Replay:
    """Simulate what arrived by an engine's log, with costs that are learned from it, and compare.

    Requests that failed or were cancelled are simulated up to where they ended, and not compared.

    Raises:
        InputError: when the file is no engine's log, or no request has ended in it.
    """
    log = read_log(path)
    costs, pass_errors, step_errors = _learn(log.work)
    ended = [(request, _task(request)) for request in log.requests if request.ended is not None]
    decisions = simulate((task for _, task in ended), Scheduler(PagePool(log.pages), log.limits), costs)
    ttft, e2e = [], []
    for request, task in ended:
        if request.first_token is not None and request.ended is not None and not request.failed:
            assert task.first_token is not None and task.ended is not None, "what is simulated ends"
            ttft.append(_error(task.first_token - task.arrived, request.first_token - task.arrived))
            e2e.append(_error(task.ended - task.arrived, request.ended - task.arrived))
    if not e2e:
        raise InputError(f"{path}: no request has ended in this log")
    return Replay(len(e2e), decisions, *map(_median, (pass_errors, step_errors, ttft, e2e)))


def _learn(work: Iterable[Work]) -> tuple[Costs, list[float], list[float]]:
    """Return the costs that a log shows, and how far each pass and each step was from those before it."""
    costs = Costs()
    pass_errors: list[float] = []
    step_errors: list[float] = []
    for each in work:
        line, errors = (costs.prefill, pass_errors) if each.prefill else (costs.decode, step_errors)
        if line.count > 0:
            errors.append(_error(line.at(each.tokens), each.seconds))
        line.note(each.tokens, each.seconds)
    return costs, pass_errors, step_errors


def _task(request: LoggedRequest) -> Simulated:
    keys = request.keys
    return Simulated(
        tokens=[0] * request.prompt,
        keys=None if keys is None else PageKeys(str(request.number).encode(), keys),
        arrived=request.arrived,
        longest=max(request.prompt + 1, request.length),
    )


def _error(estimate: float, observed: float) -> float:
    return abs(estimate - observed) / observed if observed > 0 else float(estimate > 0)


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else 0.0
