"""`python -m duomoe.chat`: a chat in the terminal."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizer_folders import write_json

from duomoe import LLM, InputError, SamplingParams
from duomoe.chat import Conversation, main
from duomoe.chat_output import Delta
from duomoe.llm import EMBEDDED_MODEL


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(device="cpu", max_model_len=200) as llm:
        yield llm


def talk(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, lines: str, *args: str) -> Any:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    code = main(["--device", "cpu", "--max-new-tokens", "20", *args])
    return code, *capsys.readouterr()


def test_turns_and_a_new_beginning(
    llm: LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_new_tokens=20)
    system = {"role": "system", "content": "Be brief."}
    first = llm.chat([system, {"role": "user", "content": "Who is dead?"}], params).text
    turns = [{"role": "user", "content": "Who is dead?"}, {"role": "assistant", "content": first}]
    second = llm.chat([system, *turns, {"role": "user", "content": "Why?"}], params).text
    lines = "Who is dead?\n\nWhy?\n/reset\n/what\nWho is dead?\n/exit\nmore\n"
    code, out, err = talk(capsys, monkeypatch, lines, "--system", "Be brief.")
    assert code == 0 and out == f"{first}\n{second}\n{first}\n"
    assert err.count("/reset") == 2  # at the beginning, and for what is no command


def test_what_fails_does_not_end_the_chat(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = f"Who is dead?\n{'long ' * 5000}\nWho is dead?\n"
    code, out, err = talk(capsys, monkeypatch, lines)
    assert code == 0 and out.count("\n") == 2 and err.count("duomoe: error: the prompt has") == 1
    code, out, err = talk(capsys, monkeypatch, "a\n", "--template-arg", "x")
    assert code == 2 and "KEY=VALUE" in err


@pytest.mark.parametrize("flag", ["--logprobs", "--prompt-logprobs"])
def test_a_chat_tells_no_log_probabilities(
    flag: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = talk(capsys, monkeypatch, "a\n", flag, "2")
    assert code == 2 and out == "" and flag in err and err.count("\n") == 1


def test_an_interrupt_ends_the_answer_and_not_the_chat(
    llm: LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = Conversation(llm, llm.chat_params(SamplingParams(max_new_tokens=100)), None, {})
    stream = llm.stream

    class Interrupted:
        def __init__(self, inner: Any) -> None:
            self._inner, self._count = inner, 0

        def __enter__(self) -> "Interrupted":
            return self

        def __exit__(self, *error: object) -> None:
            self._inner.close()

        def __iter__(self) -> "Interrupted":
            return self

        def __next__(self) -> Any:
            self._count += 1
            if self._count > 4:
                raise KeyboardInterrupt
            return next(self._inner)

    monkeypatch.setattr(llm, "stream", lambda *args, **options: Interrupted(stream(*args, **options)))
    conversation.say("Tell me of the king.")
    partly = capsys.readouterr().out
    monkeypatch.setattr(llm, "stream", stream)
    assert conversation.messages[-1] == {"role": "assistant", "content": partly.rstrip()}
    conversation.say("Why?")
    assert len(conversation.messages) == 4 and conversation.messages[0]["content"] == "Tell me of the king."


def test_reasoning_is_shown_and_kept_apart(
    llm: LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = Conversation(llm, SamplingParams(), None, {})
    deltas = [Delta("reasoning", "hm"), Delta("content", "so"), Delta("content", " it is")]
    monkeypatch.setattr(conversation, "_answer", lambda prompt: iter(deltas))
    conversation.say("Why?")
    assert capsys.readouterr().out == "hm\n\nso it is\n"
    assert conversation.messages[-1] == {"role": "assistant", "content": "so it is", "reasoning_content": "hm"}


def test_the_embedded_model_answers_with_a_speech(llm: LLM) -> None:
    assert llm.chat_stop == ("\n\n",)
    tokens = llm.chat_tokens([{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "Who?"}])
    assert llm.tokenizer is not None
    assert llm.tokenizer.decode(tokens) == "SYSTEM\nBe brief.\n\nUSER\nWho?\n\nASSISTANT\n"
    answers = [
        llm.chat("Who is there?", SamplingParams(max_new_tokens=150, temperature=0.8, seed=seed)) for seed in range(6)
    ]
    assert all(answer.text.strip() and "\n\n" not in answer.text for answer in answers)
    assert sum(answer.finish_reason == "stop" for answer in answers) >= 4


def test_stop_strings_that_are_none(tmp_path: Path) -> None:
    for file in EMBEDDED_MODEL.iterdir():
        if file.is_file():
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer_config.json").unlink()
    for bad in (5, [5], [""], {"a": 1}):
        write_json(tmp_path / "tokenizer_config.json", {"chat_stop_strings": bad})
        with pytest.raises(InputError, match="chat_stop_strings"):
            LLM(tmp_path, device="cpu")
