"""The simulation runs the scheduler as it is; a log of an engine is told again."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from duomoe import LLM, SamplingParams
from duomoe.engine.cost import Costs, Line
from duomoe.engine.scheduler import Limits, Scheduler
from duomoe.engine.simulation import Simulated, replay, simulate
from duomoe.errors import InputError
from duomoe.memory.pages import PAGE_SIZE, PageKeys, PagePool
from duomoe.simulate import main


def costs_of(pass_s: float, token_s: float, step_s: float, sequence_s: float) -> Costs:
    costs = Costs()
    for size in (1, 100):
        costs.prefill.note(size, pass_s + size * token_s)
        costs.decode.note(size, step_s + size * sequence_s)
    return costs


def arrival(at: float, prompt: int, new: int, begin: int = 0) -> Simulated:
    return Simulated(tokens=[begin] * prompt, keys=PageKeys(b""), arrived=at, longest=prompt + new)


def test_a_line_is_found_and_follows_what_changes() -> None:
    line = Line()
    assert line.at(5) == 0
    line.note(10, 3.0)
    assert line.at(99) == 3.0  # one size says nothing of others
    line.note(20, 5.0)
    assert line.at(30) == pytest.approx(7.0) and line.at(0) == pytest.approx(1.0)
    for size in range(1000):
        line.note(size % 50, 9.0)
    assert line.at(30) == pytest.approx(9.0, abs=0.01)
    line = Line()
    line.note(1, 2.0)
    line.note(2, 1.0)
    assert line.at(3) == pytest.approx(1.5, abs=0.01)  # nothing takes less because it is larger


def test_times_are_those_that_one_adds_up_by_hand() -> None:
    costs = costs_of(1.0, 0.01, 0.1, 0.02)
    tasks = [arrival(0.0, 50, 3, begin=1), arrival(0.5, 100, 2, begin=2), arrival(9.0, 50, 1, begin=1)]
    simulate(tasks, Scheduler(PagePool(100), Limits(8, 1000)), costs)
    first = 0.02 * 1.5 + 1.5  # it waits for company: 2 % of its pass
    step = first + 0.12  # the first decodes before the second is computed
    second = step + 2.0
    both = second + 0.14
    assert [task.first_token for task in tasks[:2]] == pytest.approx([first, second])
    assert [task.ended for task in tasks[:2]] == pytest.approx([both, both])
    rest = 50 - 3 * PAGE_SIZE  # the third begins as the first
    assert tasks[2].first_token == pytest.approx(9.0 + 1.02 * (1.0 + 0.01 * rest))


def random_tasks(generator: random.Random, count: int, rate: float, longest: int) -> list[Simulated]:
    now, tasks = 0.0, []
    for number in range(count):
        now += generator.expovariate(rate)
        shared = generator.choice([[], [9998] * 40, [9999] * 200])
        prompt = shared + [number] * generator.randint(1, longest - 250)
        new = generator.randint(1, longest - len(prompt))
        tasks.append(Simulated(tokens=prompt, keys=PageKeys(b""), arrived=now, longest=len(prompt) + new))
    return tasks


@pytest.mark.parametrize("decisions", [20_000, pytest.param(1_000_000, id="million")])
def test_everybody_ends_in_order_of_arrival_whatever_arrives(decisions: int, request: pytest.FixtureRequest) -> None:
    if decisions > 100_000 and not request.config.getoption("--long"):
        pytest.skip("takes a minute: --long")
    generator = random.Random(decisions)
    done = 0
    while done < decisions:
        longest = generator.choice([300, 1000])
        pages = generator.choice([1, 2, 8]) * -(-longest // PAGE_SIZE)
        scheduler: Scheduler[Simulated] = Scheduler(PagePool(pages), Limits(generator.choice([1, 4, 64]), longest))
        costs = costs_of(*(generator.choice([0.0, 0.01, 1.0]) / size for size in (1, 500, 20, 100)))
        tasks = random_tasks(generator, 60, generator.choice([0.1, 5.0, 1e9]), longest)
        lengths = [len(task.tokens) for task in tasks]
        done += simulate(tasks, scheduler, costs)
        firsts = [task.first_token for task in tasks]
        assert firsts == sorted(firsts, key=lambda first: first or 0)  # first come, first served
        for task, length in zip(tasks, lengths, strict=True):
            assert task.first_token is not None and task.ended is not None and task.length == task.longest
            assert task.arrived <= task.first_token <= task.ended and length < task.length
        assert scheduler.pages.used == 0 and not scheduler.running and not scheduler.waiting


def test_a_log_is_told_again(
    tiny: Callable[..., Any], prompt_of: Callable[..., list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.jsonl"
    common = prompt_of(40)
    with LLM(tiny("qwen3_moe").path, device="cpu", engine_log=path, max_batch=3) as llm:
        for number in range(3):
            prompts = [[*common, *prompt_of(5 + number, seed=n)] for n in range(4)]
            llm.generate(prompts, SamplingParams(max_new_tokens=6, ignore_eos=True))
        stream = llm.stream(prompt_of(9), SamplingParams(max_new_tokens=200, ignore_eos=True))
        next(stream)
        stream.close()
        counts = llm.engine.scheduler.counts
    events = [json.loads(line) for line in path.read_text().splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds.count("arrive") == kinds.count("end") == 13 and events[-1]["failed"]
    assert sum(event["tokens"] for event in events if event["event"] == "prefill") == (
        counts.prompt_tokens - counts.found_tokens
    )
    found = replay(path)
    assert found.requests == 12
    assert 0 <= found.ttft_error < 10 and 0 <= found.step_error < 10  # what it is depends on the machine
    assert main([str(path)]) == 0
    assert "12 requests" in capsys.readouterr().out


def test_a_simulation_of_a_simulation_is_exact(tmp_path: Path) -> None:
    """A log whose times are those of a simulation is told again without any error."""
    costs = costs_of(0.0, 0.01, 0.1, 0.0)
    tasks = [arrival(float(number), 30, 5, begin=number) for number in range(40)]
    events: list[dict[str, Any]] = [{"event": "begin", "pages": 100, "max_batch": 4, "pass_tokens": 100}]
    for number, task in enumerate(tasks):
        at = task.arrived
        events.append({"event": "arrive", "id": number, "at": at, "tokens": 30, "keys": None})
        at += 0.02 * 0.3  # company
        events.append({"event": "prefill", "ids": [number], "at": at, "seconds": 0.3, "tokens": 30})
        for step in range(4):
            events.append(
                {"event": "decode", "ids": [number], "at": at + 0.3 + 0.1 * step, "seconds": 0.1, "tokens": 1}
            )
        events.append({"event": "end", "id": number, "at": at + 0.7, "tokens": 35, "failed": False})
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    found = replay(path)
    assert max(found.ttft_error, found.e2e_error, found.pass_error, found.step_error) < 1e-6
    simulate(tasks, Scheduler(PagePool(100), Limits(4, 100)), costs)
    assert [task.ended for task in tasks] == pytest.approx([task.arrived + 0.706 for task in tasks])


@pytest.mark.parametrize(
    "content",
    ["", "no JSON", "{}", "[1]", '{"event": "arrive"}', '{"event": "begin", "pages": "9"}', "[" * 100_000, "\x00"],
)
def test_what_is_no_log_is_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log"
    path.write_text(content)
    with pytest.raises(InputError, match="engine's log"):
        replay(path)
    assert main([str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    begin = '{"event": "begin", "pages": 9, "max_batch": 1, "pass_tokens": 9}\n'
    path.write_text(begin)
    with pytest.raises(InputError, match="no request has ended"):
        replay(path)


def test_a_log_that_cannot_be_written_is_refused_at_once(tiny: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--engine-log: .*No such file"):
        LLM(tiny("mixtral").path, device="cpu", engine_log=tmp_path / "nowhere" / "log")
