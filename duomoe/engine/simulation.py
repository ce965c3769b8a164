"""A simulation of the engine: the scheduler as it is, over a clock and costs instead of a model."""

import json
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duomoe.engine.cost import Costs
from duomoe.engine.scheduler import Limits, Scheduler
from duomoe.engine.task import Task
from duomoe.errors import InputError
from duomoe.memory.pages import PageKeys, PagePool
from duomoe.text_file import read_text


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
        arrivals: in order of `arrived`.
        scheduler: an empty one.
        costs: what passes and steps take; the scheduler is given the same.

    Returns:
        How many decisions that took.
    """
    scheduler.costs = costs
    coming = deque(arrivals)
    now, decisions = 0.0, 0
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
        advancing = decision.admitted or decision.decoding
        if decision.admitted:
            now += costs.prefill.at(sum(task.length - task.computed for task in advancing))
        else:
            now += costs.decode.at(len(advancing))
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
    begin, events = _read(path)
    costs, pass_errors, step_errors = _learn(events)
    ends = {event["id"]: event for event in events if event["event"] == "end"}
    firsts: dict[int, float] = {}
    for event in events:
        if event["event"] == "prefill":
            for number in event["ids"]:
                firsts.setdefault(number, event["at"] + event["seconds"])
    arrivals = [event for event in events if event["event"] == "arrive" and event["id"] in ends]
    tasks = {event["id"]: _task(event, ends[event["id"]]) for event in arrivals}
    limits = Limits(begin["max_batch"], begin["pass_tokens"])
    decisions = simulate(tasks.values(), Scheduler(PagePool(begin["pages"]), limits), costs)
    ttft, e2e = [], []
    for number, task in tasks.items():
        if number in firsts and not ends[number]["failed"]:
            assert task.first_token is not None and task.ended is not None, "what is simulated ends"
            ttft.append(_error(task.first_token - task.arrived, firsts[number] - task.arrived))
            e2e.append(_error(task.ended - task.arrived, ends[number]["at"] - task.arrived))
    if not e2e:
        raise InputError(f"{path}: no request has ended in this log")
    return Replay(len(e2e), decisions, *map(_median, (pass_errors, step_errors, ttft, e2e)))


def _learn(events: list[dict[str, Any]]) -> tuple[Costs, list[float], list[float]]:
    """Return the costs that a log shows, and how far each pass and each step was from those before it."""
    costs = Costs()
    errors: dict[str, list[float]] = {"prefill": [], "decode": []}
    for event in events:
        kind = event["event"]
        if kind in errors:
            line = costs.prefill if kind == "prefill" else costs.decode
            if line.count > 0:
                errors[kind].append(_error(line.at(event["tokens"]), event["seconds"]))
            line.note(event["tokens"], event["seconds"])
    return costs, errors["prefill"], errors["decode"]


# What an event of each kind has to say.
SCHEMA: dict[str, dict[str, Any]] = {
    "begin": {"pages": int, "max_batch": int, "pass_tokens": int},
    "arrive": {"id": int, "at": float, "tokens": int},
    "prefill": {"ids": list, "at": float, "seconds": float, "tokens": int},
    "decode": {"ids": list, "at": float, "seconds": float, "tokens": int},
    "end": {"id": int, "at": float, "tokens": int, "failed": bool},
}


def _read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the log's beginning, and the events behind it."""
    events = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        try:
            event = json.loads(line)
            whole = all(isinstance(event[name], kind) for name, kind in SCHEMA[event["event"]].items())
            keys = event.get("keys") or []
            known = all(isinstance(key, str) and bytes.fromhex(key) for key in keys)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            whole = known = False
        if not whole or not known or (event["event"] == "begin") != (number == 1):
            raise InputError(f"{path}: line {number} is not that of an engine's log")
        events.append(event)
    if not events:
        raise InputError(f"{path}: an engine's log is not empty")
    return events[0], events[1:]


def _task(arrival: dict[str, Any], end: dict[str, Any]) -> Simulated:
    keys = arrival.get("keys")
    return Simulated(
        tokens=[0] * arrival["tokens"],
        keys=None if keys is None else PageKeys(str(arrival["id"]).encode(), map(bytes.fromhex, keys)),
        arrived=arrival["at"],
        longest=max(arrival["tokens"] + 1, end["tokens"]),
    )


def _error(estimate: float, observed: float) -> float:
    return abs(estimate - observed) / observed if observed > 0 else float(estimate > 0)


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else 0.0
