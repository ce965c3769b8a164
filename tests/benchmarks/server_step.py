"""What 64 streams over HTTP add to a step of the engine in the same process.

`python -P tests/benchmarks/server_step.py` runs the embedded model's engine with steps that sleep, as a thread does
that waits for a GPU, and prints their mean period: with streams that nobody reads, and with as many clients of a
server, which are another process.
"""

import asyncio
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import httpx

STREAMS, TOKENS = 64, 200


def slow_steps(seconds: float) -> list[float]:
    """Let decode steps only sleep; return where the periods of full ones are collected."""
    from duomoe.engine.decode_step import Sampled
    from duomoe.engine.engine import Engine
    from duomoe.engine.request import Request

    advance_pass, begins, periods = Engine._advance_pass, [0.0], []

    def passing(self: Engine, admitted: Sequence[Request]) -> None:
        begins[0] = 0.0
        advance_pass(self, admitted)

    def step(self: Engine, requests: list[Request]) -> None:
        now = time.perf_counter()
        if begins[0] and len(requests) == STREAMS:
            periods.append(now - begins[0])
        begins[0] = now
        self._hand_over()
        time.sleep(seconds)
        self._accept(requests, [Sampled(500 + request.length % 7, None) for request in requests])

    Engine._advance_pass, Engine._decode = passing, step  # type: ignore[method-assign]
    return periods


def run(kind: str, seconds: float) -> None:
    """Run steps of one kind in this process, and print their mean period in milliseconds."""
    periods = slow_steps(seconds)
    if kind == "unread":
        from duomoe import LLM, SamplingParams

        params = SamplingParams(max_new_tokens=TOKENS, ignore_eos=True)
        LLM(device="cpu", max_batch=STREAMS).generate(["The sea"] * STREAMS, params)
    else:
        from duomoe.serve import main

        main(["--device", "cpu", "--port", "0", "--max-batch", str(STREAMS)])
    print(1e3 * statistics.mean(periods))


async def read_all(url: str) -> None:
    """Read as many streams as there are."""

    async def one(client: httpx.AsyncClient) -> None:
        body = {"prompt": "The sea", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            async for _ in answer.aiter_lines():
                pass

    limits = httpx.Limits(max_connections=STREAMS)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        await asyncio.gather(*(one(client) for _ in range(STREAMS)))


def measure(kind: str, seconds: float) -> float:
    """Return the mean period of steps of one kind, in milliseconds."""
    command = [sys.executable, "-P", __file__, kind, str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    if kind == "served":
        while not (found := re.search(r"ready: \S+ at (\S+)", process.stderr.readline())):
            pass
        asyncio.run(read_all(found[1]))
        process.terminate()
    return float(process.stdout.read())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(sys.argv[1], float(sys.argv[2]))
    else:
        for seconds in (0.015, 0.05):
            unread, served = measure("unread", seconds), measure("served", seconds)
            print(f"{1e3 * seconds:.0f} ms: {unread:.2f} ms unread, {served:.2f} ms served, {served / unread - 1:+.1%}")
