"""How the engine stands between two steps, read without waiting for one."""

import asyncio
import contextlib
from dataclasses import dataclass

from duomoe.engine.engine import Engine
from duomoe.experts.link import Traffic
from duomoe.llm import LLM

# A reader waits so many seconds for the step that goes on; then it gets what was read last.
PATIENCE = 0.2


@dataclass(frozen=True)
class Gauges:
    """The engine between two steps.

    Attributes:
        running: sequences that are being computed.
        waiting: sequences that wait for their prefill.
        pages_used: of the KV cache.
        pages: of the KV cache, in all.
        slots: for experts, on the device.
        experts: of all layers.
        traffic: what has crossed the link so far, and why.
    """

    running: int
    waiting: int
    pages_used: int
    pages: int
    slots: int
    experts: int
    traffic: Traffic


class GaugeReader:
    """Reads gauges for coroutines of one event loop.

    Args:
        llm: whose engine is read.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._last: Gauges | None = None
        self._reading: asyncio.Future[Gauges] | None = None

    async def read(self) -> Gauges | None:
        """Return how the engine stands, or stood when it was last read; None where it never was."""
        if self._reading is None:
            self._reading = self._ask()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                await asyncio.shield(self._reading)
        return self._last

    def _ask(self) -> asyncio.Future[Gauges]:
        """Have the engine's thread read, between two steps; return what will have the result."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Gauges] = loop.create_future()

        def arrive(gauges: Gauges | None) -> None:
            self._reading = None
            self._last = gauges or self._last
            if gauges is not None and not future.done():
                future.set_result(gauges)

        def look(engine: Engine) -> None:
            gauges = None
            # Whatever fails here must not end requests: a GPU that answers no more is found by the next step.
            with contextlib.suppress(Exception):
                gauges = self._look(engine)
            with contextlib.suppress(RuntimeError):  # the loop may be closed by now
                loop.call_soon_threadsafe(arrive, gauges)

        self._llm.between_steps(look)
        return future

    def _look(self, engine: Engine) -> Gauges:
        pages, plan = engine.cache.allocator, self._llm.plan
        return Gauges(
            running=len(engine.scheduler.running),
            waiting=len(engine.scheduler.waiting),
            pages_used=pages.used,
            pages=pages.num_pages,
            slots=plan.num_slots,
            experts=plan.num_experts,
            traffic=engine.policy.traffic_so_far(),
        )
