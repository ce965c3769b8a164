"""Who runs next, and whose pages are whose: the rules one by one, and random schedules against a plain model."""

from itertools import count

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from duomoe.engine.cost import Costs
from duomoe.engine.scheduler import Limits, Scheduler, State, decide
from duomoe.engine.task import Task
from duomoe.memory.pages import PAGE_SIZE, PageKeys, PagePool, pages_for

arrivals = count()


def task(tokens: list[int] | int, salt: bytes | None = b"", longest: int = 200) -> Task:
    """A task; with tokens like no other's where only their number is given."""
    number = next(arrivals)
    if isinstance(tokens, int):
        tokens = [1000 + number] * tokens
    return Task(tokens=tokens, keys=None if salt is None else PageKeys(salt), longest=longest, arrived=0.0)


def scheduler_of(pages: int, max_batch: int = 8, pass_tokens: int = 100) -> Scheduler[Task]:
    return Scheduler(PagePool(pages), Limits(max_batch, pass_tokens, True))


def add(scheduler: Scheduler[Task], *tokens: list[int] | int) -> list[Task]:
    tasks = [task(each) for each in tokens]
    for each in tasks:
        scheduler.add(each)
    return tasks


def advance(scheduler: Scheduler[Task]) -> tuple[list[Task], list[Task]]:
    """Make one decision true; return who was admitted and who decoded."""
    decision = scheduler.decide(0.0)
    admitted, decoding = list(decision.admitted), list(decision.decoding)
    for each in admitted + decoding:
        scheduler.note_computed(each)
        each.tokens.append(7)
    return admitted, decoding


def test_prompts_share_a_pass_up_to_its_tokens() -> None:
    scheduler = scheduler_of(1000)
    tasks = add(scheduler, 60, 40, 1, 100, 30, 71, 5)
    passes = [admitted for admitted, _ in (advance(scheduler) for _ in range(10)) if admitted]
    assert passes == [tasks[:2], tasks[2:3], tasks[3:4], tasks[4:5], tasks[5:]]


def test_one_prompt_always_fits() -> None:
    scheduler = scheduler_of(1000, pass_tokens=50)
    first, second = add(scheduler, 90, 10)
    assert [advance(scheduler)[0] for _ in range(3)] == [[first], [], [second]]


def test_running_requests_decode_between_two_passes() -> None:
    scheduler = scheduler_of(1000, pass_tokens=10)
    first, second, third = add(scheduler, 10, 10, 10)
    steps = [advance(scheduler) for _ in range(6)]
    assert steps[:5] == [([first], []), ([], [first]), ([second], []), ([], [first, second]), ([third], [])]
    assert steps[5] == ([], [first, second, third])


def test_steps_and_a_pass_under_way_take_turns() -> None:
    scheduler = scheduler_of(12, pass_tokens=60)
    (first,) = add(scheduler, 15)
    assert advance(scheduler)[0] == [first]
    (second,) = add(scheduler, 60)
    advance(scheduler)
    (third,) = add(scheduler, 5)
    assert scheduler.decide(0.0).admitted == [second]
    for _ in range(3):
        assert advance(scheduler) == ([], [first])
        assert scheduler.decide(0.0).passing == [second]
    taken = scheduler.pages.take(scheduler.pages.available)
    while first.length % PAGE_SIZE:  # it has a page for these
        assert advance(scheduler) == ([], [first])
        assert scheduler.decide(0.0).passing == [second]
    advance(scheduler)
    for _ in range(3):  # nobody gives way to go on amid a pass
        assert scheduler.decide(0.0).passing == [second]
    scheduler.pages.release(taken)
    assert advance(scheduler) == ([], [first])
    assert scheduler.decide(0.0).passing == [second]
    scheduler.note_computed(second)
    second.tokens.append(7)
    assert scheduler.passing == [] and advance(scheduler) == ([], [first, second])
    assert advance(scheduler)[0] == [third]


def test_a_pass_waits_for_company_a_small_share_of_its_time_and_no_longer_than_a_step() -> None:
    costs = Costs()
    costs.prefill.note(100, 1.0)
    costs.decode.note(1, 0.01)

    def until(now: float, waiting: int = 1, running: int = 0) -> float | None:
        tasks = [task(10) for _ in range(waiting)]
        state = State(tasks, [task(5) for _ in range(running)], [], PagePool(100), True, now, costs)
        decision = decide(state, Limits(4, 100, True))
        assert decision.until is not None or decision.admitted == tasks
        return decision.until

    assert until(0.0) == 0.01  # a step
    costs.decode.note(1, 1000.0)
    assert until(0.0) == 0.02  # 2 % of the pass
    assert until(0.02) is None  # it came at 0
    assert until(0.0, waiting=4) is None  # the batch is full
    assert until(0.0, running=1) is None  # somebody's step has taken that time


def test_a_prompt_waits_for_pages_and_for_one_more_for_each_that_may_need_it() -> None:
    scheduler = scheduler_of(12)
    first, second = add(scheduler, 90, 80)  # 6 pages, and 5 and one for the next token
    assert advance(scheduler)[0] == [first]
    advance(scheduler)
    assert advance(scheduler) == ([], [first]) and scheduler.waiting[0] is second
    first.longest = 97  # of 6 pages, as the last token has no key
    assert advance(scheduler)[0] == [second]


def test_the_latest_gives_way_and_comes_back_with_what_is_left_of_its_pages() -> None:
    scheduler = scheduler_of(9, pass_tokens=200)
    first, second = add(scheduler, 4 * PAGE_SIZE - 1, 3 * PAGE_SIZE)
    assert advance(scheduler)[0] == [first, second]
    while second in scheduler.running:
        advance(scheduler)
    assert scheduler.counts.preemptions == 1 and scheduler.waiting[0] is second
    assert second.pages == [] and second.computed == 0 and second.length > 3 * PAGE_SIZE
    assert advance(scheduler) == ([], [first])  # there is no room to come back to
    scheduler.remove(first)
    assert scheduler.decide(0.0).admitted == [second]
    assert second.computed == 3 * PAGE_SIZE  # its full pages were kept, since nobody needed them


def test_prompts_that_begin_alike_share_pages_in_one_pass_and_later() -> None:
    scheduler = scheduler_of(100, pass_tokens=1000)
    common = list(range(3 * PAGE_SIZE))
    first, second = add(scheduler, [*common, 1], [*common, 2, 3])
    other = task([*common, 1], salt=b"another tenant")
    scheduler.add(other)
    decision = scheduler.decide(0.0)
    assert decision.admitted == [first, second, other]
    assert second.pages[:3] == first.pages[:3] and second.computed == 3 * PAGE_SIZE
    assert other.computed == 0 and not set(other.pages) & set(first.pages)
    assert scheduler.pages.used == 4 + 1 + 4
    for each in (first, second, other):
        scheduler.note_computed(each)
        scheduler.remove(each)
    assert scheduler.pages.used == 0 and scheduler.pages.kept == 6
    (again,) = add(scheduler, [*common, 1, 5])
    assert advance(scheduler)[0] == [again] and again.pages[:3] == first_pages(scheduler, common)


def test_what_a_pass_computes_is_what_it_was_admitted_for() -> None:
    """The pages that were found for one are not taken by who is before it, though nobody holds them."""
    scheduler = scheduler_of(12, pass_tokens=4 * PAGE_SIZE)
    known, other = list(range(5 * PAGE_SIZE)), 5 * PAGE_SIZE
    for each in add(scheduler, [*known, 1], other):  # that has been used least recently, then others
        assert advance(scheduler)[0] == [each]
        scheduler.remove(each)
    assert scheduler.pages.kept == 10
    first, second = add(scheduler, 4 * PAGE_SIZE - 10, [*known, 2])
    decision = scheduler.decide(0.0)
    assert decision.admitted == [first, second] and second.computed == 5 * PAGE_SIZE


def test_as_few_give_way_as_can() -> None:
    """What two of them share is free when both have given way."""
    scheduler = scheduler_of(100, pass_tokens=1000)
    common = list(range(4 * PAGE_SIZE))
    tasks = add(scheduler, *[PAGE_SIZE] * 5, *([*common, *[number] * PAGE_SIZE] for number in (1, 2)))
    assert advance(scheduler)[0] == tasks  # now each needs one more page
    taken = scheduler.pages.take(scheduler.pages.available)
    decision = scheduler.decide(0.0)
    assert decision.decoding == tasks[:5] and decision.preempted == tasks[:4:-1]
    scheduler.pages.release(taken)


def first_pages(scheduler: Scheduler[Task], tokens: list[int]) -> list[int]:
    return scheduler.pages.find(PageKeys(b"").of(tokens))


def test_the_last_token_is_always_computed() -> None:
    scheduler = scheduler_of(100)
    tokens = list(range(2 * PAGE_SIZE))
    (first,) = add(scheduler, list(tokens))
    advance(scheduler)
    (again,) = add(scheduler, list(tokens))
    advance(scheduler)
    assert scheduler.decide(0.0).admitted == [again] or again in scheduler.running
    assert again.pages[0] == first.pages[0] and again.pages[1] != first.pages[1]


def test_what_a_failed_pass_was_to_compute_is_not_found() -> None:
    scheduler = scheduler_of(100)
    tokens = list(range(3 * PAGE_SIZE + 5))
    add(scheduler, tokens[: PAGE_SIZE + 1])
    advance(scheduler)
    (failed,) = add(scheduler, list(tokens))
    advance(scheduler)
    assert scheduler.decide(0.0).admitted == [failed] and failed.computed == PAGE_SIZE
    scheduler.remove(failed)  # before anything was computed
    assert len(first_pages(scheduler, tokens)) == 1


WORDS = [[word] * PAGE_SIZE for word in range(3)]


class Schedules(RuleBasedStateMachine):
    """Arrivals, growth, ends and failures in any order; pages hold what was written to them last.

    What is written is the tokens from the beginning, so a page that serves the wrong sequence is found out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = scheduler_of(14, max_batch=4, pass_tokens=7 * PAGE_SIZE)
        self.longest = 12 * PAGE_SIZE
        self.stepped = False
        self.written: dict[int, dict[int, tuple[int, ...]]] = {}  # page: offset: tokens up to there

    @rule(
        words=st.lists(st.sampled_from(WORDS), max_size=6), more=st.integers(1, 20), salt=st.sampled_from([b"", None])
    )
    def arrive(self, words: list[list[int]], more: int, salt: bytes | None) -> None:
        self.scheduler.add(task([token for word in words for token in word] + [9] * more, salt, self.longest))

    @rule(fails=st.integers(0, 9), token=st.integers(0, 2), turns=st.integers(0, 3))
    def step(self, fails: int, token: int, turns: int) -> None:
        """Make a decision true; a pass may be through only after some turns."""
        before = [*self.scheduler.running, *self.scheduler.waiting]
        passing, giving_way = list(self.scheduler.passing), self.who_has_to_give_way()
        decision = self.scheduler.decide(0.0)
        if passing:
            assert not decision.admitted and not decision.preempted
            assert bool(decision.passing) != bool(decision.decoding)
            assert not set(passing) & set(decision.decoding)
            giving_way = 0
        if decision.decoding:
            assert not self.stepped or not passing  # they take turns
        self.stepped = bool(decision.decoding)
        if (decision.admitted or decision.passing) and turns and fails:
            assert self.scheduler.passing == self.scheduler.running[-len(self.scheduler.passing) :]
            return
        advancing = [*decision.admitted, *decision.passing, *decision.decoding]
        if len(decision.admitted) > 1:
            assert sum(each.length - each.computed for each in decision.admitted) <= self.scheduler.limits.pass_tokens
        assert len(decision.preempted) == (0 if decision.admitted else giving_way)
        assert bool(advancing) == bool(before)
        assert [*self.scheduler.running, *self.scheduler.waiting] == before  # the order is that of arrival
        if fails == 0:  # before anything is written
            for each in advancing:
                for page in each.pages[each.computed // PAGE_SIZE :]:
                    self.written[page] = {}
            for each in advancing:
                self.scheduler.remove(each)
            return
        for each in advancing:
            assert each.computed < each.length <= len(each.pages) * PAGE_SIZE
            for position in range(each.computed):  # what is taken as computed is what it should be
                assert self.at(each, position) == tuple(each.tokens[: position + 1])
            for position in range(each.computed, each.length):
                page_content = self.written.setdefault(each.pages[position // PAGE_SIZE], {})
                page_content[position % PAGE_SIZE] = tuple(each.tokens[: position + 1])
        for each in advancing:
            self.scheduler.note_computed(each)
            each.tokens.append(token)
            if each.length >= self.longest:
                self.scheduler.remove(each)

    def who_has_to_give_way(self) -> int:
        """How many of the latest must, so that each of the others has pages for its next token."""
        running = list(self.scheduler.running)
        while running:
            missing = sum(pages_for(each.length) - len(each.pages) for each in running)
            if missing <= self.scheduler.pages.num_pages - len({page for each in running for page in each.pages}):
                break
            running.pop()
        return len(self.scheduler.running) - len(running)

    def at(self, each: Task, position: int) -> tuple[int, ...]:
        return self.written[each.pages[position // PAGE_SIZE]][position % PAGE_SIZE]

    @rule(number=st.integers(0, 9))
    def leave(self, number: int) -> None:
        tasks = [*self.scheduler.running, *self.scheduler.waiting]
        if number < len(tasks):
            self.scheduler.remove(tasks[number])

    @rule()
    def restart(self) -> None:
        """A step has failed, and what a pass under way had with it."""
        passing, before = list(self.scheduler.passing), [*self.scheduler.running, *self.scheduler.waiting]
        for each in passing:
            for page in each.pages[each.computed // PAGE_SIZE :]:
                self.written[page] = {}
        assert self.scheduler.restart_pass() == passing
        assert [*self.scheduler.running, *self.scheduler.waiting] == before and not self.scheduler.passing

    @precondition(lambda self: not self.scheduler.passing)
    @rule(pages=st.integers(1, 14))
    def make_room(self, pages: int) -> None:
        self.scheduler.make_room(pages)
        taken = self.scheduler.pages.take(pages)
        for page in taken:
            self.written[page] = {}
        self.scheduler.pages.release(taken)

    @invariant()
    def pages_are_accounted_for(self) -> None:
        pool, running = self.scheduler.pages, self.scheduler.running
        held = [page for each in running for page in each.pages]
        assert [held.count(page) for page in range(pool.num_pages)] == pool._holders
        assert pool.used == len(set(held))
        assert len(pool._free) + len(pool._kept) + pool.used == pool.num_pages
        assert not set(pool._free) & set(pool._kept)
        assert set(pool._kept) <= set(pool._key_of) and not set(pool._free) & set(pool._key_of)
        assert {page: key for key, page in pool._page_of.items()} == pool._key_of
        for each in running:
            assert len(each.pages) >= pages_for(each.computed)
            own = each.pages[(each.length - 1) // PAGE_SIZE :]
            assert all(pool._holders[page] == 1 for page in own)  # nobody else reads what is still written to
        assert all(each.pages == [] and each.computed == 0 for each in self.scheduler.waiting)

    def teardown(self) -> None:
        while self.scheduler.running or self.scheduler.waiting:
            self.step(fails=1, token=0, turns=0)


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
