"""Who is admitted to a pass."""

from duomoe.engine.request import Request
from duomoe.engine.scheduler import Scheduler
from duomoe.memory.kv_cache import PageAllocator
from duomoe.sampling import SamplingParams
from duomoe.text_stream import TextStream


def queue(scheduler: Scheduler, *lengths: int) -> None:
    for number, length in enumerate(lengths):
        prompt = [1] * length
        stream = TextStream(None, (), prompt)
        scheduler.add(Request(number, prompt, SamplingParams(max_new_tokens=1), 0, 1000, stream))


def admitted(scheduler: Scheduler) -> list[int]:
    return [request.number for request in scheduler.admit()]


def test_prompts_share_a_pass_up_to_its_tokens() -> None:
    scheduler = Scheduler(PageAllocator(1000), max_batch=8, pass_tokens=100)
    queue(scheduler, 60, 40, 1, 100, 30, 71, 5)
    assert [admitted(scheduler) for _ in range(5)] == [[0, 1], [2], [3], [4], [5, 6]]
    assert admitted(scheduler) == [] and len(scheduler.running) == 7


def test_one_prompt_always_fits() -> None:
    scheduler = Scheduler(PageAllocator(1000), max_batch=8, pass_tokens=50)
    queue(scheduler, 90, 10)
    assert [admitted(scheduler), admitted(scheduler)] == [[0], [1]]


def test_a_prompt_that_waits_for_tokens_reserves_no_pages() -> None:
    scheduler = Scheduler(PageAllocator(12), max_batch=8, pass_tokens=100)
    queue(scheduler, 90, 90)
    assert admitted(scheduler) == [0] and scheduler.pages.unreserved == 6
