"""Servers of the embedded model: one within this process, and one that is a process of its own."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import NAME, InProcess, Process, start

from duomoe import LLM
from duomoe.model_folder import EMBEDDED_MODEL


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, whose answers in chats end at no string."""
    path = tmp_path_factory.mktemp("model") / NAME
    path.mkdir()
    for file in EMBEDDED_MODEL.iterdir():
        if file.is_file() and file.name != "tokenizer_config.json":
            (path / file.name).symlink_to(file)
    settings = json.loads((EMBEDDED_MODEL / "tokenizer_config.json").read_text())
    settings.pop("chat_stop_strings")
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="session")
def llm(folder: Path) -> Iterator[LLM]:
    # In float32, so that a sequence has the same tokens whatever else is in its batch.
    with LLM(folder, device="cpu", dtype="float32", max_batch=16) as llm:
        yield llm


@pytest.fixture(scope="session")
def server(llm: LLM) -> InProcess:
    return InProcess(llm)


@pytest.fixture
def starting() -> Iterator[Callable[..., Process]]:
    """Start servers that end with the test."""
    started: list[Process] = []

    def begin(*args: str, **options: Any) -> Process:
        started.append(start(*args, **options))
        return started[-1]

    yield begin
    for each in started:
        each.process.kill()
        each.process.wait(10)


@pytest.fixture(scope="session")
def process(folder: Path) -> Iterator[Process]:
    """A server that all tests share which need sockets."""
    served = start("--model", str(folder), "--dtype", "float32", "--max-batch", "16")
    try:
        served.wait_ready()
        yield served
    finally:
        served.process.kill()
        served.process.wait(10)
