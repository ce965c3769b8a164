"""Servers for tests: one within this process, and ones that are processes of their own."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

from duomoe import LLM
from duomoe.server.app import make_app
from duomoe.server.served_model import ServedModel
from duomoe.server.service import Limits, Service

R = TypeVar("R")

NAME = "tiny-chat"


class InProcess:
    """An application in an event loop of its own thread, asked without sockets."""

    def __init__(self, llm: LLM | None, limits: Limits | None = None, keys: list[str] | None = None) -> None:
        self.service = Service([NAME], limits or Limits())
        if llm is not None:
            self.service.ready(ServedModel(llm, self.service))
        self.app = make_app(self.service, keys or [])
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._client = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://127.0.0.1")

    def run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.run(self._client.get(path, **options))

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        options = {"json": body} | options if body is not None else options
        return self.run(self._client.post(path, **options))

    def complete(self, **fields: Any) -> dict[str, Any]:
        answer = self.post("/v1/completions", fields)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def chat(self, **fields: Any) -> dict[str, Any]:
        answer = self.post("/v1/chat/completions", fields)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def error(self, path: str, status: int, body: Any = None, **options: Any) -> dict[str, Any]:
        """The error that a request ends with."""
        answer = self.post(path, body, **options)
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"] and "\n" not in error["message"]
        return error


@dataclass
class Process:
    """A server that is a process of its own."""

    process: subprocess.Popen[str]
    url: str
    said: list[str] = field(default_factory=list)

    def wait_ready(self, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while httpx.get(f"{self.url}/health").status_code != 200:
            assert self.process.poll() is None and time.monotonic() < end, self.said
            time.sleep(0.05)

    def stop(self, sig: int = signal.SIGTERM) -> int:
        self.process.send_signal(sig)
        return self.process.wait(30)


def start(*args: str, command: list[str] | None = None) -> Process:
    """Start a server at a free port, and wait until it listens."""
    program = [sys.executable, "-P", *(command or ["-m", "duomoe.serve"])]
    options = ["--port", "0", "--device", "cpu", *args]
    process = subprocess.Popen(program + options, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = process.stderr.readline()
    found = re.search(r"listening at (http://\S+);", line)
    assert found, line + process.stderr.read()
    served = Process(process, found[1], [line])
    threading.Thread(target=lambda: served.said.extend(process.stderr), daemon=True).start()
    return served


def events(process: Process, path: str, **fields: Any) -> list[dict[str, Any]]:
    """The events of a streamed answer, but for the end."""
    with httpx.stream("POST", process.url + path, json=fields | {"stream": True}, timeout=60) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def metric(process: Process, name: str) -> float:
    lines = httpx.get(f"{process.url}/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(name + "{")).split()[-1])


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def wait_idle(process: Process) -> None:
    """Wait until nothing runs, and no page is held."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    wait_for(lambda: all(metric(process, name) == 0 for name in names))
