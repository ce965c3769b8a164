"""Many small requests over real HTTP, a third of them abandoned, leave the server as it was."""

import asyncio
import json
import random
from typing import Any

import httpx
import psutil
import pytest
from servers import Process, metric, wait_idle

from duomoe import LLM, SamplingParams

PATH = "/v1/completions"
PROMPTS = ["The sea", "In the beginning", "def main():", "Emma was", "/* The", "KING RICHARD\n", "It was", "Fellow"]


def alone(llm: LLM) -> list[tuple[dict[str, Any], str]]:
    """Requests, and what each is answered where nothing else runs."""
    cases = []
    for number, prompt in enumerate(PROMPTS):
        length = 4 + 3 * number
        params = SamplingParams(max_new_tokens=length, temperature=0.8, seed=number)
        text = llm.generate(prompt, params)[0].text
        fields = {"prompt": prompt, "max_tokens": length, "temperature": 0.8, "top_p": 1, "seed": number}
        cases.append((fields, text))
    return cases


def test_a_soak(process: Process, llm: LLM, pytestconfig: pytest.Config) -> None:
    long = pytestconfig.getoption("--long")
    cases, chance = alone(llm), random.Random(0)
    server = psutil.Process(process.process.pid)

    async def one(client: httpx.AsyncClient, slots: asyncio.Semaphore) -> None:
        (fields, expected), abandoned = chance.choice(cases), chance.random() < 1 / 3
        streamed = abandoned or chance.random() < 0.5
        async with slots:
            if not streamed:
                answer = await client.post(PATH, json=fields)
                assert answer.json()["choices"][0]["text"] == expected
                return
            body = fields | {"stream": True} | ({"max_tokens": 2000, "ignore_eos": True} if abandoned else {})
            async with client.stream("POST", PATH, json=body) as answer:
                lines = [line async for line in limited(answer.aiter_lines(), 6 if abandoned else None)]
            if not abandoned:
                assert text_of(lines) == expected

    async def many(count: int) -> None:
        slots = asyncio.Semaphore(24)
        async with httpx.AsyncClient(base_url=process.url, timeout=120) as client:
            await asyncio.gather(*(one(client, slots) for _ in range(count)))

    def held() -> tuple[int, int, int]:
        wait_idle(process)
        return server.num_fds(), server.num_threads(), server.memory_info().rss

    asyncio.run(many(100))
    files, threads, memory = held()
    abandoned = metric(process, "duomoe:requests_abandoned_total")
    asyncio.run(many(9900 if long else 200))
    later = held()
    assert metric(process, "duomoe:requests_abandoned_total") > abandoned
    assert later[0] <= files + 2
    assert later[1] == threads
    assert later[2] <= memory + (32 << 20)


async def limited(lines: Any, most: int | None) -> Any:
    count = 0
    async for line in lines:
        yield line
        count += 1
        if count == most:
            return


def text_of(lines: list[str]) -> str:
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line and line != "data: [DONE]"]
    return "".join(event["choices"][0]["text"] for event in events)
