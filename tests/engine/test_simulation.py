"""The simulation runs the scheduler as it is; a log of an engine is told again."""

import contextlib
import json
import os
import random
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from within_time import within_time

from duomoe import LLM, SamplingParams
from duomoe.engine.cost import Costs, Line
from duomoe.engine.log_reader import read_log
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
    simulate(tasks, Scheduler(PagePool(100), Limits(8, 1000, False)), costs)
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
        scheduler: Scheduler[Simulated] = Scheduler(
            PagePool(pages), Limits(generator.choice([1, 4, 64]), longest, generator.random() < 0.5)
        )
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


@pytest.mark.parametrize("overlaps", [False, True])
def test_whatever_happened_its_log_can_be_read(
    overlaps: bool, tiny: Callable[..., Any], prompt_of: Callable[..., list[int]], tmp_path: Path
) -> None:
    """Callers in several threads, some of which leave; steps that fail; and so few pages that some give way."""
    path = tmp_path / "log.jsonl"
    with LLM(tiny("qwen3_moe").path, device="cpu", engine_log=path, max_batch=4, max_model_len=64) as llm:
        llm.engine.overlaps = overlaps
        taken = llm.engine.cache.pages.take(llm.engine.cache.pages.num_pages - 6)
        read, steps = llm.engine.decode_step.read, iter(range(10**6))

        def failing() -> Any:
            if next(steps) % 17 == 11:
                raise ZeroDivisionError
            return read()

        llm.engine.decode_step.read = failing  # type: ignore[method-assign]

        def use(number: int) -> None:
            params = SamplingParams(max_new_tokens=5 + number % 30, ignore_eos=True)
            stream = llm.stream([*prompt_of(16), *prompt_of(1 + number % 13, seed=number)], params)
            with contextlib.suppress(ZeroDivisionError):
                for count, _ in enumerate(stream):
                    if number % 5 == 0 and count == 3:
                        break
            stream.close()

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(use, range(60)))
        assert llm.stats().preemptions > 0
        llm.engine.cache.pages.release(taken)
    log = read_log(path)
    assert len(log.requests) == 60 and all(request.ended is not None for request in log.requests)
    assert {request.failed for request in log.requests} == {False, True}
    assert replay(path).requests == sum(not request.failed for request in log.requests)


def test_a_simulation_of_a_simulation_is_exact(tmp_path: Path) -> None:
    """A log whose times are those of a simulation is told again without any error."""
    costs = costs_of(0.0, 0.01, 0.1, 0.0)
    tasks = [arrival(float(number), 30, 5, begin=number) for number in range(40)]
    events: list[dict[str, Any]] = [
        {"event": "begin", "pages": 100, "max_batch": 4, "pass_tokens": 100, "interruptible": False}
    ]
    for number, task in enumerate(tasks):
        at = task.arrived
        events.append({"event": "arrive", "id": number, "at": at, "tokens": 30, "keys": None})
        at += 0.02 * 0.3  # company
        events.append({"event": "prefill", "ids": [number], "at": at + 0.3, "seconds": 0.3, "tokens": 30})
        for step in range(4):
            events.append(
                {"event": "decode", "ids": [number], "at": at + 0.4 + 0.1 * step, "seconds": 0.1, "tokens": 1}
            )
        events.append({"event": "end", "id": number, "at": at + 0.7, "tokens": 35, "failed": False})
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    found = replay(path)
    assert max(found.ttft_error, found.e2e_error, found.pass_error, found.step_error) < 1e-6
    simulate(tasks, Scheduler(PagePool(100), Limits(4, 100, False)), costs)
    assert [task.ended for task in tasks] == pytest.approx([task.arrived + 0.706 for task in tasks])


def written(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def good_log() -> list[dict[str, Any]]:
    """Two sequences that begin alike; the second is cancelled, and a third one is still under way."""
    keys = ["00112233445566aa", "00112233445566bb"]
    return [
        {"event": "begin", "pages": 8, "max_batch": 2, "pass_tokens": 100, "interruptible": True},
        {"event": "arrive", "id": 0, "at": 5.0, "tokens": 34, "keys": keys},
        {"event": "arrive", "id": 1, "at": 5.1, "tokens": 40, "keys": [keys[0], "00112233445566cc"]},
        {"event": "prefill", "ids": [0, 1], "at": 5.7, "seconds": 0.5, "tokens": 58},
        {"event": "decode", "ids": [0, 1], "at": 5.8, "seconds": 0.1, "tokens": 2},
        {"event": "end", "id": 1, "at": 5.8, "tokens": 42, "failed": True},
        {"event": "arrive", "id": 2, "at": 5.75, "tokens": 16, "keys": None},
        {"event": "decode", "ids": [0], "at": 6.0, "seconds": 0.1, "tokens": 1},
        {"event": "end", "id": 0, "at": 6.0, "tokens": 37, "failed": False},
        {"event": "prefill", "ids": [2], "at": 6.4, "seconds": 0.3, "tokens": 16},
    ]


def refused(path: Path, line: int, *words: str) -> None:
    with within_time(path.read_text()), pytest.raises(InputError) as caught:
        replay(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: line {line} is not that of an engine's log: "), message
    assert all(word in message for word in words), message


def test_a_good_log_is_told_again(tmp_path: Path) -> None:
    assert replay(written(tmp_path / "log", good_log())).requests == 1


NUMBERS = [-1, 10**400, 1.5, float("nan"), float("inf"), -float("inf"), True, None, "1", [1]]


@pytest.mark.parametrize(
    ("line", "name", "values"),
    [
        (1, "pages", [*NUMBERS, 0, 10**11]),
        (1, "max_batch", [*NUMBERS, 0]),
        (1, "pass_tokens", [*NUMBERS, 0]),
        (2, "id", NUMBERS),
        (2, "tokens", [*NUMBERS, 0, 10**9]),
        (4, "tokens", [*NUMBERS, 0, 10**9]),
        (6, "tokens", [*NUMBERS, 0, 10**9]),
    ],
)
def test_whole_numbers_of_a_log_are_checked(line: int, name: str, values: list[Any], tmp_path: Path) -> None:
    for value in values:
        lines = good_log()
        lines[line - 1][name] = value
        refused(written(tmp_path / "log", lines), line, name)
    del lines[line - 1][name]
    refused(written(tmp_path / "log", lines), line, name)


@pytest.mark.parametrize(("line", "name"), [(2, "at"), (4, "at"), (4, "seconds"), (5, "at"), (5, "seconds"), (9, "at")])
def test_times_of_a_log_are_checked(line: int, name: str, tmp_path: Path) -> None:
    for value in [*(each for each in NUMBERS if each != 1.5), -0.5, 1e11]:
        lines = good_log()
        lines[line - 1][name] = value
        refused(written(tmp_path / "log", lines), line, name)


@pytest.mark.parametrize("line", range(1, 11))
def test_every_field_of_a_log_is_needed(line: int, tmp_path: Path) -> None:
    for name in good_log()[line - 1]:
        lines = good_log()
        del lines[line - 1][name]
        refused(written(tmp_path / "log", lines), line, name)


@pytest.mark.parametrize(
    ("line", "change", "words"),
    [
        (2, {"keys": False}, "keys"),
        (2, {"keys": [["00112233445566aa"]] * 2}, "keys"),
        (2, {"keys": ["00112233445566aa"]}, "keys"),  # there are two full pages
        (2, {"keys": ["00112233445566aa"] * 2}, "keys"),
        (2, {"keys": ["00112233445566aa", ""]}, "keys"),
        (2, {"keys": ["00112233445566aa", "00112233445566zz"]}, "keys"),
        (2, {"event": "begin"}, "begin"),
        (2, {"event": "depart"}, "event"),
        (2, {"event": ["arrive"]}, "event"),
        (3, {"id": 0}, "id 0"),
        (2, {"tokens": 129}, "8 pages"),
        (4, {"ids": [0, 9]}, "id 9"),
        (4, {"ids": [0, 0]}, "id 0"),
        (4, {"ids": [[0]]}, "ids"),
        (4, {"ids": [False]}, "ids"),
        (4, {"ids": {"0": 1}}, "ids"),
        (8, {"ids": [1]}, "id 1"),
        (4, {"at": 5.05}, "before"),
        (5, {"at": 5.1}, "before"),
        (6, {"id": 9}, "id 9"),
        (6, {"at": 5.0}, "before"),
        (9, {"at": 5.7}, "before"),
        (9, {"id": 1}, "id 1"),
        (9, {"tokens": 33}, "tokens"),
        (9, {"tokens": 38}, "tokens"),  # more than it was given
        (9, {"failed": 0}, "failed"),
    ],
)
def test_what_the_lines_of_a_log_say_fits_together(
    line: int, change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    lines = good_log()
    lines[line - 1] |= change
    refused(written(tmp_path / "log", lines), line, words)


def test_a_log_has_a_beginning_and_is_not_endless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(written(tmp_path / "log", good_log()[1:]), 1, "begin")
    lines = [*good_log()[:1], *({"event": "arrive", "id": n, "at": 5.0, "tokens": 100, "keys": None} for n in range(9))]
    monkeypatch.setattr("duomoe.engine.log_reader.MOST_TOKENS", 850)
    refused(written(tmp_path / "log", lines), 10, "850 tokens")


def test_only_a_regular_file_is_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero"), tmp_path / "none", Path("a\0b")):
        with within_time(str(path)):
            assert main([str(path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


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
    begin = '{"event": "begin", "pages": 9, "max_batch": 1, "pass_tokens": 9, "interruptible": true}\n'
    path.write_text(begin)
    with pytest.raises(InputError, match="no request has ended"):
        replay(path)


NASTY = st.sampled_from(
    [
        *(None, True, False, 0, 1, -1, 2, 7, 16, 129, 10**6, 10**9, 10**11, 2**31, 2**63, 10**30, 10**400),
        *(-0.0, 1e-320, 0.5, 5.0, 5.8, 1e9, 1e300, float("nan"), float("inf"), -float("inf")),
        *("", "0", "\0", "\ud800", "\x1b[31m", "begin", "arrive", "prefill", "decode", "end", "00112233445566aa"),
        *([], {}, [0], [1], [2], [0, 0], [[0]], [True], ["00112233445566aa"] * 2, ["00112233445566dd"], {"0": 0}),
    ]
)
NAMES = st.sampled_from(
    ["event", "id", "ids", "at", "seconds", "tokens", "keys", "failed", "pages", "max_batch", "more"]
)
LINES = st.integers(0, len(good_log()) - 1)
CHANGES = st.one_of(
    st.tuples(st.just("set"), LINES, NAMES, NASTY),
    st.tuples(st.just("leave out"), LINES, NAMES, NASTY),
    st.tuples(st.just("move"), LINES, LINES, NASTY),
    st.tuples(st.just("repeat"), LINES, LINES, NASTY),
    st.tuples(st.just("drop"), LINES, NAMES, NASTY),
    st.tuples(st.just("instead"), LINES, NAMES, NASTY),
)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(CHANGES, min_size=1, max_size=4))
def test_any_log_is_told_again_or_refused(changes: list[tuple[str, int, Any, Any]], tmp_path: Path) -> None:
    lines: list[Any] = good_log()
    for kind, at, where, value in changes:
        line = lines[at % len(lines)]
        if kind in ("set", "leave out") and isinstance(line, dict):
            line.pop(where, None)
            if kind == "set":
                line[where] = value
        elif kind == "move":
            lines.remove(line)
            lines.insert(where, line)
        elif kind == "repeat":
            lines.insert(where, json.loads(json.dumps(line)))
        elif kind == "drop" and len(lines) > 1:
            lines.remove(line)
        elif kind == "instead":
            lines[at % len(lines)] = value
    with within_time(str(changes)):
        try:
            assert replay(written(tmp_path / "log", lines)).requests > 0
        except InputError as error:
            assert str(error).startswith(str(tmp_path / "log")) and str(error).isprintable()


def test_what_has_no_room_is_not_waited_for() -> None:
    for scheduler, task in (
        (Scheduler[Simulated](PagePool(2), Limits(8, 1000, True)), arrival(0.0, 50, 3)),
        (Scheduler[Simulated](PagePool(0), Limits(8, 1000, True)), arrival(0.0, 1, 3)),
        (Scheduler[Simulated](PagePool(9), Limits(0, 1000, True)), arrival(0.0, 1, 3)),
    ):
        with within_time("no room"), pytest.raises(InputError, match="never"):
            simulate([task], scheduler, costs_of(1.0, 0.01, 0.1, 0.02))


def test_tasks_come_in_the_order_of_their_arrival() -> None:
    tasks = [arrival(float(at), 20, 2, begin=at) for at in (3, 1, 2)]
    simulate(tasks, Scheduler(PagePool(9), Limits(1, 100, True)), costs_of(1.0, 0.01, 0.1, 0.02))
    firsts = [task.first_token or 0.0 for task in tasks]
    assert firsts[1] < firsts[2] < firsts[0]


@pytest.mark.parametrize("name", ["nowhere/log", "", ".", "fifo", "loop", "a\0b", "\ud800", "x" * 256, "/dev/full"])
def test_a_log_that_cannot_be_written_is_refused_before_weights_are_loaded(
    name: str, tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.setattr("duomoe.llm.load_weights", lambda *_: 1 / 0)
    with within_time(name), pytest.raises(InputError, match=r"--engine-log: ") as caught:
        LLM(tiny("mixtral").path, device="cpu", engine_log=name and tmp_path / name)
    assert str(caught.value).isprintable()


def test_a_log_is_left_alone_or_let_go_where_loading_fails(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "log").write_text("the last one")
    with pytest.raises(InputError):
        LLM(tmp_path, device="cpu", engine_log=tmp_path / "log")
    assert (tmp_path / "log").read_text() == "the last one"
    monkeypatch.setattr("duomoe.llm.load_weights", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        LLM(tiny("mixtral").path, device="cpu", engine_log=tmp_path / "log")
    assert str(tmp_path / "log") not in [os.path.realpath(each) for each in Path("/proc/self/fd").iterdir()]


@pytest.mark.parametrize("action", ["error", "always"])
def test_a_log_that_fails_ends_and_nothing_else_does(
    action: Literal["error", "always"], tiny: Callable[..., Any], prompt_of: Callable[..., list[int]], tmp_path: Path
) -> None:
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    with LLM(tiny("qwen3_moe").path, device="cpu", engine_log=tmp_path / "log") as llm:
        expected = llm.generate(prompt_of(5), params)[0].token_ids
        lines = (tmp_path / "log").read_text().count("\n")
        log = llm.engine.log
        assert log is not None and log._file is not None
        log._file.close()
        full = Path("/dev/full").open("w", encoding="utf-8", buffering=1)  # noqa: SIM115 (it is the log's to close)
        log._file = full
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter(action)
            for _ in range(2):
                assert llm.generate(prompt_of(5), params)[0].token_ids == expected
            assert log._file is None and full.closed
        said = [str(each.message) for each in caught]
        assert said == (
            [] if action == "error" else [f"--engine-log: {log.path}: No space left on device; the log ends"]
        )
    assert (tmp_path / "log").read_text().count("\n") == lines


def test_who_fails_while_its_step_is_computed_is_no_longer_in_the_log(
    tiny: Callable[..., Any], prompt_of: Callable[..., list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where tokens are handed over during the next step, as on a GPU."""
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    with LLM(tiny("qwen3_moe").path, device="cpu", engine_log=tmp_path / "log") as llm:
        llm.engine.overlaps = True
        expected = llm.generate(prompt_of(9), params)[0].token_ids
        streams = [llm.submit(prompt_of(length), params) for length in (5, 9)]
        next(streams[1])
        monkeypatch.setattr(streams[0]._request.stream, "push", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(streams[0])
        assert [chunk.token_id for chunk in streams[1]] == expected[1:]
    assert replay(tmp_path / "log").requests == 2
