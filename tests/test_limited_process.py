"""Limited processes: they are shared, killed, begun again, forked away from, and reach nothing."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from duomoe import InputError, chat_template, grammar
from duomoe.errors import Busy
from duomoe.limited import process as processes
from duomoe.limited.process import Ended, Failed, LimitedProcess, TooSlow
from duomoe.model_folder import ModelFolder
from duomoe.server.errors import as_api_error

# Says what it began with, and does what it is asked to.
WORKER = """
import ctypes, json, os, socket, sys, time
from duomoe.limited.worker import serve

def escapes(_):
    done = []
    for name, attempt in {
        "read": lambda: open("/etc/hostname"),
        "write": lambda: open("/tmp/x", "w"),
        "socket": socket.socket,
        "environment": lambda: os.environ["SECRET"],
    }.items():
        try:
            attempt()
            done.append(name)
        except (OSError, KeyError):
            pass
    return ",".join(done)

def begin(message):
    return lambda request: {
        "begun": lambda _: json.dumps([os.getpid(), message]),
        "echo": lambda given: given,
        "escape": escapes,
        "sleep": lambda given: str(time.sleep(given)),
        "take": lambda given: str(len(bytearray(given))),
        "die": lambda _: os._exit(3),
        "crash": lambda _: ctypes.string_at(0),
        "fail": lambda given: [][given],
        "exit": lambda given: sys.exit(given),
    }[request[0]](request[1])

serve(begin, 64 << 20)
"""


def request(what: str, given: Any = None) -> bytes:
    return json.dumps([what, given]).encode()


def process_of(folder: Path, monkeypatch: pytest.MonkeyPatch, program: str, **options: Any) -> LimitedProcess:
    """Return a process that runs a program; its module's name is its folder's."""
    name = f"worker_{abs(hash(folder))}"
    (folder / f"{name}.py").write_text(program)
    monkeypatch.syspath_prepend(folder)
    return LimitedProcess(name, "works", "json", "install json", **options)


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LimitedProcess]:
    made = process_of(tmp_path, monkeypatch, WORKER)
    yield made
    made.close()


def test_it_reaches_neither_files_nor_network(process: LimitedProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what has escaped a sandbox: what the process itself can do."""
    monkeypatch.setenv("SECRET", "1")
    assert process.ask(request("escape")) == ""


def test_what_fails_leaves_the_process_to_others(process: LimitedProcess) -> None:
    begun = process.ask(request("begun"))
    for what, given, reason in (
        ("fail", 5, "out of range"),
        ("exit", "no", "no"),
        ("take", 1 << 30, "64 MiB of memory"),
    ):
        with pytest.raises(Failed, match=reason):
            process.ask(request(what, given))
    assert process.ask(request("take", 1 << 20)) == str(1 << 20)
    assert process.ask(request("begun")) == begun


def test_what_ends_the_process_is_told_and_another_begins(
    process: LimitedProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = [process.ask(request("begun"))]
    for what in ("die", "crash"):
        with pytest.raises(Ended, match="its process ended"):
            process.ask(request(what))
        begun.append(process.ask(request("begun")))
    monkeypatch.setattr(processes, "SECONDS", 0.3)
    with pytest.raises(TooSlow, match=r"more than 0\.3 seconds"):
        process.ask(request("sleep", 60))
    begun.append(process.ask(request("begun")))
    assert len(set(begun)) == 4


def test_what_it_works_with_is_sent_once(process: LimitedProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []
    original = processes._send
    monkeypatch.setattr(processes, "_send", lambda to, message: (sent.append(message), original(to, message))[1])
    large = json.dumps("é" * (1 << 20)).encode()
    for number in range(3):
        assert process.ask(request("echo", str(number)), large) == str(number)
    assert [message == large for message in sent] == [True, False, False, False]
    first, with_large = json.loads(process.ask(request("begun"), large))
    assert with_large == "é" * (1 << 20)
    second, with_other = json.loads(process.ask(request("begun"), b"[1]"))
    assert with_other == [1] and second != first


def test_threads_take_turns(process: LimitedProcess) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: process.ask(request("echo", str(n))), range(200)))
    assert found == [str(n) for n in range(200)]


def test_one_thread_at_a_time_waits_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others that come meanwhile have other work to do."""
    process = process_of(tmp_path, monkeypatch, WORKER, patience=60.0)
    with ThreadPoolExecutor(1) as pool:
        with process._lock:
            first = pool.submit(process.ask, request("echo", "first"))
            while not process._waiting.locked():
                time.sleep(0.01)
            with pytest.raises(Busy, match="try again later"):
                process.ask(request("echo", "second"))
        assert first.result(30) == "first"
    assert process.ask(request("echo", "third")) == "third" and not process._waiting.locked()
    process.close()


def test_who_waits_too_long_is_told_to_try_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = process_of(tmp_path, monkeypatch, WORKER, patience=0.1)
    with process._lock, pytest.raises(Busy, match="try again later"):
        process.ask(request("echo", "a"))
    assert process.ask(request("echo", "a")) == "a"
    process.close()
    answered = as_api_error(Busy("again"))
    assert answered.status == 503 and answered.retry_after


def test_a_fork_has_a_process_of_its_own(process: LimitedProcess) -> None:
    """Also where another thread's turn was on."""
    begun = process.ask(request("begun"))
    with process._lock:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = 0 if process.ask(request("begun")) != begun else 2
            finally:
                os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert process.ask(request("begun")) == begun


def test_a_process_that_was_killed_is_begun_again(process: LimitedProcess) -> None:
    begun = process.ask(request("begun"))
    assert process._process is not None
    process._process.kill()
    process._process.wait()
    assert process.ask(request("begun")) != begun


@pytest.mark.parametrize("begun", [True, False])
def test_an_interrupt_leaves_no_reply_to_the_next_request(
    begun: bool, process: LimitedProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a reply is waited for, or for the process to begin."""
    if begun:
        process.ask(request("echo", "0"))

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(processes, "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            process.ask(request("echo", "1"))
    assert process.ask(request("echo", "2")) == "2"


@pytest.mark.parametrize(
    "reply", [b"\xff" * 8, (2).to_bytes(8, "little") + b"[]", (1).to_bytes(8, "little") + b"x", b""]
)
def test_a_process_that_does_not_keep_to_the_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reply: bytes
) -> None:
    read = "import sys\nsys.stdin.buffer.read(12)\n"
    process = process_of(tmp_path, monkeypatch, read + f"sys.stdout.buffer.write(b'ready' + {reply!r})")
    with pytest.raises(Ended):
        process.ask(b"[]")
    process = process_of(tmp_path, monkeypatch, "")
    with pytest.raises(InputError, match="the process that works does not start"):
        process.ask(b"[]")


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "json", None)
    with pytest.raises(InputError, match="install json"):
        LimitedProcess("worker", "works", "json", "install json").ask(b"[]")


def is_running(process: int) -> bool:
    """Return whether a process has not ended; one that nobody has waited for yet has no command line."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes() != b""
    except OSError:
        return False


@pytest.mark.parametrize("end", ["", "import os; os._exit(0)", "raise SystemExit(3)"])
def test_processes_end_with_the_program(tmp_path: Path, end: str) -> None:
    """Templates' and grammars', which are two."""
    folder = ModelFolder(None)
    arguments = [folder.need_tokenizer().encoder.to_str(), folder.config.vocab_size, [0]]
    (tmp_path / "begin.json").write_text(json.dumps(arguments))
    program = f"""
from pathlib import Path
from duomoe import chat_template, grammar
chat_template.render("", {{}})
assert grammar.PROCESS.ask(b'["regex", "a"]', Path({str(tmp_path / "begin.json")!r}).read_bytes()) == ""
print(chat_template.PROCESS._process.pid, grammar.PROCESS._process.pid, flush=True)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program + end], capture_output=True, text=True)
    assert done.stderr == ""
    deadline = time.monotonic() + 20
    one, other = map(int, done.stdout.split())
    assert one != other
    while is_running(one) or is_running(other):
        assert time.monotonic() < deadline, "a process lives on"
        time.sleep(0.01)


def test_nothing_in_them_imports_torch() -> None:
    program = "import sys, duomoe.limited.templates, duomoe.limited.grammars; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True).stdout == "False\n"


def test_templates_do_not_wait_for_grammars() -> None:
    with grammar.PROCESS._lock:
        assert chat_template.render("{{ a }}", {"a": 1}) == "1"
