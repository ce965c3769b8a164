"""What only a real server shows: its clients, connections, signals, and how it ends."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import psutil
import pytest
from servers import NAME, Process, metric, wait_for, wait_idle

from duomoe import LLM, SamplingParams

PATH = "/v1/completions"
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


def connect(process: Process) -> socket.socket:
    url = urlsplit(process.url)
    return socket.create_connection((url.hostname, url.port), timeout=20)


def head(path: str = PATH, length: int = 0) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: a", "content-type: application/json", f"content-length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


def answered(process: Process) -> bool:
    body = {"prompt": "The sea", "max_tokens": 2, "temperature": 0}
    return httpx.post(process.url + PATH, json=body, timeout=20).status_code == 200


# Clients.


@pytest.fixture
def client(process: Process) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{process.url}/v1", api_key="any", max_retries=0, timeout=60)


def test_the_openai_package(client: openai.OpenAI, llm: LLM) -> None:
    expected = llm.generate("The sea", SamplingParams(max_new_tokens=8))[0].text
    asked: dict[str, Any] = {"model": NAME, "prompt": "The sea", "max_tokens": 8, "temperature": 0}
    assert client.completions.create(**asked).choices[0].text == expected
    assert "".join(event.choices[0].text for event in client.completions.create(**asked, stream=True)) == expected
    assert [model.id for model in client.models.list()] == [NAME]
    talk: dict[str, Any] = {"model": NAME, "messages": HELLO, "max_completion_tokens": 8, "seed": 1}
    whole = client.chat.completions.create(**talk)
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 8
    stream = client.chat.completions.create(**talk, stream=True, stream_options={"include_usage": True})
    events = list(stream)
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == whole.choices[0].message.content
    assert events[-1].usage == whole.usage


def test_the_openai_packages_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=NAME, messages=HELLO, temperature=-1)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=NAME, prompt=[1] * 5000)
    assert long.value.code == "context_length_exceeded"


def test_the_openai_package_in_coroutines(process: Process) -> None:
    async def talk() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{process.url}/v1", api_key="any", timeout=60) as client:

            async def one(streamed: bool) -> str:
                asked: dict[str, Any] = {"model": NAME, "messages": HELLO, "max_tokens": 8, "seed": 2}
                if not streamed:
                    return (await client.chat.completions.create(**asked)).choices[0].message.content or ""
                stream = await client.chat.completions.create(**asked, stream=True)
                return "".join([event.choices[0].delta.content or "" async for event in stream])

            return list(await asyncio.gather(*(one(number % 2 == 0) for number in range(20))))

    assert len(set(asyncio.run(talk()))) == 1


def test_curl(process: Process) -> None:
    body = json.dumps({"prompt": "The sea", "max_tokens": 3, "temperature": 0})
    command = ["curl", "-sS", "-f", process.url + PATH, "-H", "Content-Type: application/json", "-d", body]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert json.loads(done.stdout)["usage"]["completion_tokens"] == 3, done.stderr
    large = [*command[:2], "-o", "/dev/stdout", "-w", "%{http_code}", *command[3:6], "--data-binary", "@-"]
    done = subprocess.run(large, input=b" " * (100 << 20), capture_output=True, timeout=30)
    assert done.stdout.endswith(b"413"), done.stderr


# Clients that go away, or only hold connections.


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_away_frees_its_pages(process: Process, streamed: bool) -> None:
    before = metric(process, "duomoe:requests_abandoned_total")
    body = json.dumps(
        {"prompt": "The sea", "max_tokens": 4000, "ignore_eos": True, "n": 3, "stream": streamed}
    ).encode()
    with connect(process) as connection:
        connection.sendall(head(length=len(body)) + body)
        wait_for(lambda: metric(process, "vllm:num_requests_running") == 3)
        if streamed:
            assert b"200 OK" in connection.recv(100)
    wait_idle(process)
    assert metric(process, "duomoe:requests_abandoned_total") == before + 1


def test_a_half_closed_connection_is_one_that_went_away(process: Process) -> None:
    body = json.dumps({"prompt": "The sea", "max_tokens": 4000, "ignore_eos": True}).encode()
    with connect(process) as connection:
        connection.sendall(head(length=len(body)) + body)
        wait_for(lambda: metric(process, "vllm:num_requests_running") == 1)
        connection.shutdown(socket.SHUT_WR)
        wait_idle(process)


def test_what_is_no_request_is_refused_in_the_same_shape(process: Process) -> None:
    for sent in (b"\x16\x03\x01 hello\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * (1 << 20)):
        with connect(process) as connection, contextlib.suppress(ConnectionError):
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(sent)
            answer = connection.makefile("rb").read()
            assert answer.startswith(b"HTTP/1.1 400"), answer
            assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["type"] == "invalid_request_error"
    assert answered(process)


def test_many_idle_and_slow_connections_do_not_keep_others_out(process: Process) -> None:
    connections = [
        connect(process) for _ in range(2000 if psutil.Process().rlimit(psutil.RLIMIT_NOFILE)[0] > 4000 else 500)
    ]
    try:
        for number, connection in enumerate(connections):
            if number % 2:
                connection.sendall(head(length=1000)[:-3] if number % 4 == 1 else head(length=1000) + b'{"prompt"')
        assert answered(process)
    finally:
        for connection in connections:
            connection.close()
    assert answered(process)
    server = psutil.Process(process.process.pid)
    wait_for(lambda: server.num_fds() < 200)


def test_a_client_that_does_not_read_does_not_hold_up_others(process: Process) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 4000, "ignore_eos": True, "n": 8, "stream": True}).encode()
    with connect(process) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(head(length=len(body)) + body)
        wait_for(lambda: metric(process, "vllm:num_requests_running") == 8)
        assert answered(process)
    wait_idle(process)
    # Bodies in parts, several requests on a connection, and one behind another.
    with connect(process) as connection:
        body = b'{"prompt": "a", "max_tokens": 1}'
        connection.sendall((head(length=len(body)) + body) * 2)
        received = b""
        while received.count(b"text_completion") < 2:
            received += connection.recv(65536)


# The process.


def test_a_signal_lets_requests_end_and_a_second_one_does_not(starting: Callable[..., Process]) -> None:
    process = starting("--access-log")
    process.wait_ready()
    body = {"prompt": "The sea", "max_tokens": 600, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", process.url + PATH, json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{process.url}/health").json() == {"status": "draining"})
        refused = httpx.post(process.url + PATH, json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert process.process.wait(20) == 0
    assert process.process.stdout is not None
    logged = [json.loads(line) for line in process.process.stdout]
    (line,) = [line for line in logged if line["completion_tokens"]]
    assert (line["status"], line["path"], line["completion_tokens"]) == (200, PATH, 600)


def test_a_second_signal_ends_requests(starting: Callable[..., Process]) -> None:
    process = starting()
    process.wait_ready()
    body = {"prompt": "The sea", "max_tokens": 4000, "n": 8, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", process.url + PATH, json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{process.url}/health").json() == {"status": "draining"})
        process.process.send_signal(signal.SIGINT)
        assert process.process.wait(20) == 128 + signal.SIGINT
        del lines  # which kept the connection


def test_a_signal_while_the_model_loads_ends_it(starting: Callable[..., Process]) -> None:
    process = starting()
    assert httpx.get(f"{process.url}/health").json() == {"status": "loading"}
    assert process.stop() == 128 + signal.SIGTERM


# Serves, and has the engine's thread die within the given step.
DYING = """
import sys
from duomoe.engine.engine import Engine
steps = [0]
step = Engine.step
def dying_step(self):
    steps[0] += 1
    if steps[0] > 30:
        Engine.fail = None
        raise RuntimeError("injected")
    step(self)
Engine.step = dying_step
from duomoe.serve import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_death_of_the_engine_is_told_and_ends_the_process(starting: Callable[..., Process]) -> None:
    process = starting(command=["-c", DYING])
    process.wait_ready()
    body = {"prompt": "The sea", "max_tokens": 1000, "ignore_eos": True}

    async def ask() -> tuple[httpx.Response, httpx.Response, str]:
        async with httpx.AsyncClient(base_url=process.url, timeout=30) as client:
            whole = asyncio.create_task(client.post(PATH, json=body))
            streamed = await client.post(PATH, json=body | {"stream": True})
            health = ""
            with contextlib.suppress(httpx.TransportError):
                health = (await client.get("/health")).text
            return await whole, streamed, health

    whole, streamed, health = asyncio.run(ask())
    assert whole.status_code == 500
    assert whole.json()["error"]["type"] == "server_error"
    assert "server_error" in streamed.text
    assert "[DONE]" not in streamed.text
    assert not health or json.loads(health)["status"] == "failed"
    assert process.process.wait(15) == 1
    assert any("the engine has failed" in line for line in process.said)


def run(*args: str, **options: Any) -> tuple[int, str]:
    """Run the command; return its exit code and what it said."""
    command = [sys.executable, "-P", "-m", "duomoe.serve", "--device", "cpu", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, **options)
    return done.returncode, done.stderr


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, said = run("--port", str(taken.getsockname()[1]))
        assert (code, said.count("\n")) == (2, 1)
        assert "in use" in said
    secret = tmp_path / "keys"
    secret.write_text("\n")
    for args, part in (
        (("--port", "99999"), "--port"),
        (("--host", "no.such.host.invalid"), "--host"),
        (("--api-key-file", str(tmp_path / "none")), "No such file"),
        (("--api-key-file", str(secret)), "no keys"),
        (("--api-key", "ä"), "printable ASCII"),
        (("--max-sequences", "0"), "--max-sequences"),
        (("--max-body", "much"), "--max-body"),
        (("--request-timeout", "0s"), "--request-timeout"),
        (("--surprise",), "--surprise"),
    ):
        code, said = run(*args)
        assert (code, said.count("\n")) == (2, 1), said
        assert part in said
    code, said = run("--port", "0", "--model", str(tmp_path))
    assert (code, said.count("\n")) == (2, 2), said  # where it listens, and the mistake
    assert "config.json" in said


def test_a_missing_extra_is_one_line() -> None:
    program = (
        "import sys; sys.modules['uvicorn'] = None; from duomoe.serve import main; sys.exit(main(['--port', '0']))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "duomoe: error: serving needs uvicorn; install it with: pip install 'duomoe[serve]'\n"


def test_keys_come_from_flags_files_or_the_environment(starting: Callable[..., Process], tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("filed-1\n\n  filed-2  \n")
    os.environ["DUOMOE_API_KEY"] = "from-environment"
    try:
        process = starting("--api-key-file", str(file))
    finally:
        del os.environ["DUOMOE_API_KEY"]

    def status(key: str) -> int:
        return httpx.get(f"{process.url}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code

    assert [status(key) for key in ("from-environment", "filed-1", "filed-2", "other")] == [200, 200, 200, 401]
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{process.url}/v1", api_key="other", max_retries=0).models.list()


# Serves, with little patience, room for few connections, and small buffers.
IMPATIENT = """
import socket, sys
import duomoe.server.connection as connection
connection.PATIENCE = 0.5
connection.MAX_CONNECTIONS = 20
made = connection.Connection.connection_made
def small(self, transport):
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    made(self, transport)
    transport.set_write_buffer_limits(4096)
connection.Connection.connection_made = small
from duomoe.serve import main
sys.exit(main(sys.argv[1:]))
"""


def test_connections_that_only_hold_on_are_ended(starting: Callable[..., Process]) -> None:
    process = starting(command=["-c", IMPATIENT])
    process.wait_ready()
    for sent in (b"", head(length=1000)[:-3]):
        with connect(process) as connection:
            connection.sendall(sent)
            assert connection.recv(100) == b""
    with connect(process) as kept:
        held = [connect(process) for _ in range(60)]
        try:
            assert answered(process)
            assert kept.recv(100) == b""  # the one that had idled longest
        finally:
            for connection in held:
                connection.close()
    # One that reads nothing ends, however long its answer would be.
    body = json.dumps({"prompt": "a", "max_tokens": 4000, "ignore_eos": True, "n": 8, "stream": True}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        url = urlsplit(process.url)
        connection.connect((url.hostname, url.port))
        connection.sendall(head(length=len(body)) + body)
        wait_for(lambda: metric(process, "vllm:num_requests_running") == 8)
        wait_idle(process)
        assert metric(process, "duomoe:requests_abandoned_total") == 1
