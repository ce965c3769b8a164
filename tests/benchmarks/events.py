"""What it costs the engine's thread to hand a step's chunks to many streams, read by coroutines or by threads.

`python tests/benchmarks/events.py` prints the microseconds a step of each number of streams spends on it, and what
share that is of a step of 15 ms, which eight sequences of a model of Qwen3-30B's layers take on an H100.
"""

import asyncio
import statistics
import threading
import time
from collections.abc import Callable

from duomoe.engine.completion import Chunk
from duomoe.engine.outbox import Outbox

STEP_S = 0.015
STEPS = 100


def hand_out(outboxes: list[Outbox]) -> float:
    """Do as an engine: steps that sleep, as a thread does that waits for a GPU; return the median seconds of events."""
    spent = []
    for step in range(STEPS):
        time.sleep(STEP_S)
        begin = time.perf_counter()
        for outbox in outboxes:
            outbox.put(Chunk("text", step, None))
        spent.append(time.perf_counter() - begin)
    return statistics.median(spent)


def by_coroutines(count: int) -> float:
    """Read by coroutines of one loop."""
    outboxes = [Outbox() for _ in range(count)]
    results: list[float] = []

    async def read(outbox: Outbox) -> None:
        for _ in range(STEPS):
            await outbox.get_async(10)

    async def every() -> None:
        engine = threading.Thread(target=lambda: results.append(hand_out(outboxes)))
        engine.start()
        await asyncio.gather(*map(read, outboxes))
        engine.join()

    asyncio.run(every())
    return results[0]


def by_threads(count: int) -> float:
    """Read by a thread each."""
    outboxes = [Outbox() for _ in range(count)]

    def read(outbox: Outbox) -> None:
        for _ in range(STEPS):
            outbox.get(10)

    readers = [threading.Thread(target=read, args=(outbox,)) for outbox in outboxes]
    for reader in readers:
        reader.start()
    median = hand_out(outboxes)
    for reader in readers:
        reader.join()
    return median


if __name__ == "__main__":
    ways: dict[str, Callable[[int], float]] = {"coroutines": by_coroutines, "threads": by_threads}
    for name, way in ways.items():
        for count in (1, 8, 64, 256):
            seconds = way(count)
            print(f"{name}, {count} streams: {seconds * 1e6:.0f} µs, {100 * seconds / STEP_S:.2f} % of a step")
