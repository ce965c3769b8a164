"""The command line: what it prints where, and one clear line for every kind of bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from duomoe import LLM, SamplingParams, chat
from duomoe.generate import main, parser, sampling_params
from duomoe.grammar import Grammar


def write_tokenizer(folder: Path, **config: Any) -> None:
    """Give a folder a byte-level tokenizer whose every token is one byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:211]
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture
def folder(tiny: Callable[..., Any], tmp_path: Path) -> Path:
    """Return a tiny checkpoint with a tokenizer."""
    copy = Path(shutil.copytree(tiny("qwen3_moe").path, tmp_path / "model"))
    write_tokenizer(copy)
    return copy


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return code, out, err


def test_json_holds_everything(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(
        capsys, "--model", folder, "--prompt", "hello", "--max-new-tokens", 9, "--json", "--device", "cpu"
    )
    assert code == 0
    result = json.loads(out)
    assert out.count("\n") == 1
    assert result["prompt"] == "hello" and result["prompt_tokens"] == 5
    assert len(result["token_ids"]) == 9 and result["finish_reason"] == "length"
    assert 0 < result["ttft_s"] <= result["e2e_s"] and result["tpot_s"] > 0
    assert result["policy"] == "resident"
    assert {"weights_bytes", "expert_slots_bytes", "kv_cache_bytes"} <= result["memory"].keys()
    assert set(result["experts"]) == {
        "streamed_bytes", "demand_bytes", "prefetched_bytes", "prefetch_used_bytes", "prefetch_wasted_bytes",
        "hits", "misses",
    }  # fmt: skip
    assert "TTFT" in err and "tokens/s" in err and err.count("\n") == 1


def test_text_streams_to_stdout_and_equals_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--model", folder, "--prompt", "hello", "--max-new-tokens", 60, "--device", "cpu")
    _, text, _ = run(capsys, *args)
    _, out, _ = run(capsys, *args, "--json")
    assert text == json.loads(out)["text"] + "\n"


@pytest.mark.parametrize("memory", ["10KB", "14KiB", "20000", "100KB"])
def test_less_memory_prints_the_same_text(folder: Path, capsys: pytest.CaptureFixture[str], memory: str) -> None:
    args = ("--model", folder, "--prompt", "hello", "--max-new-tokens", 20, "--json", "--device", "cpu")
    _, whole, _ = run(capsys, *args)
    code, out, err = run(capsys, *args, "--expert-memory", memory)
    if memory == "10KB":
        assert code == 2 and "13.50 KiB" in err
        return
    expected, found = json.loads(whole), json.loads(out)
    assert found["token_ids"] == expected["token_ids"] and found["text"] == expected["text"]
    assert found["policy"] == "duo"
    moved = found["experts"]["demand_bytes"] + found["experts"]["streamed_bytes"]
    assert moved >= found["experts"]["misses"] * 13824 > 0
    assert found["memory"]["expert_slots_bytes"] <= 102400


def test_prompt_from_file_and_stdin(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("hello")
    args = ("--model", folder, "--max-new-tokens", 5, "--json", "--device", "cpu")
    _, by_flag, _ = run(capsys, *args, "--prompt", "hello")
    _, by_file, _ = run(capsys, *args, "--prompt-file", file)
    command = [sys.executable, "-m", "duomoe.generate", *map(str, args)]
    piped = subprocess.run(command, input=b"hello", capture_output=True, check=True)
    os.mkfifo(tmp_path / "pipe")  # as a shell's <(…) and /dev/stdin are
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=["hello"])
    writer.start()
    _, by_pipe, _ = run(capsys, *args, "--prompt-file", tmp_path / "pipe")
    writer.join()
    results = [json.loads(out)["token_ids"] for out in (by_flag, by_file, by_pipe, piped.stdout)]
    assert results[0] == results[1] == results[2] == results[3]


def test_a_seed_repeats_and_another_differs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = (
        "--model",
        folder,
        "--prompt",
        "hi",
        "--max-new-tokens",
        16,
        "--json",
        "--temperature",
        2,
        "--device",
        "cpu",
    )
    outs = [json.loads(run(capsys, *args, "--seed", seed)[1])["token_ids"] for seed in (1, 1, 2)]
    assert outs[0] == outs[1] != outs[2]


def test_generation_config_eos_counts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--model", folder, "--prompt", "hello", "--max-new-tokens", 12, "--json", "--device", "cpu")
    tokens = json.loads(run(capsys, *args)[1])["token_ids"]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7000, tokens[4]]}))
    ended = json.loads(run(capsys, *args)[1])
    first = tokens.index(tokens[4])
    assert ended["token_ids"] == tokens[: first + 1] and ended["finish_reason"] == "stop"
    ignored = json.loads(run(capsys, *args, "--ignore-eos")[1])
    assert ignored["token_ids"] == tokens and ignored["finish_reason"] == "length"


def test_chat_applies_the_template(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    args = ("--model", folder, "--max-new-tokens", 4, "--json", "--device", "cpu")
    plain = json.loads(run(capsys, *args, "--prompt", "[user]hello>")[1])["token_ids"]
    write_tokenizer(folder, chat_template=template)
    assert json.loads(run(capsys, *args, "--prompt", "hello", "--chat")[1])["token_ids"] == plain
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(template)
    assert json.loads(run(capsys, *args, "--prompt", "hello", "--chat")[1])["token_ids"] == plain


def test_chats_of_several_messages(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ mood }}{{ loud }}"
    write_tokenizer(folder, chat_template=template)
    args = ("--model", folder, "--max-new-tokens", 4, "--json", "--device", "cpu")
    plain = json.loads(run(capsys, *args, "--prompt", "[system]be[user]hello5True")[1])["token_ids"]
    options = ("--system", "be", "--template-arg", "mood=5", "--template-arg", "loud=true")
    assert json.loads(run(capsys, *args, "--chat", "--prompt", "hello", *options)[1])["token_ids"] == plain
    messages = [{"role": "user", "content": "hello"}]
    (tmp_path / "messages.json").write_text(json.dumps(messages))
    found = json.loads(run(capsys, *args, "--messages", tmp_path / "messages.json", *options)[1])
    assert found["token_ids"] == plain and found["prompt"] == messages


@pytest.mark.parametrize("content", ["{", "{}", "[5]", "[" * 100_000, "[]", '[{"content": "a"}]'])
def test_bad_messages(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str) -> None:
    write_tokenizer(folder, chat_template="{{ messages }}")
    (tmp_path / "messages.json").write_text(content)
    code, out, err = run(capsys, "--model", folder, "--messages", tmp_path / "messages.json")
    assert code == 2 and out == "" and err.startswith("duomoe: error: ") and err.count("\n") == 1


def test_a_chat_ends_at_the_checkpoints_stop_strings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tokenizer(folder, chat_template="{{ messages[0].content }}")
    args = ("--model", folder, "--max-new-tokens", 9, "--json", "--device", "cpu", "--prompt", "hello")
    text = json.loads(run(capsys, *args)[1])["text"]
    write_tokenizer(folder, chat_template="{{ messages[0].content }}", chat_stop_strings=[text[3:5]])
    assert json.loads(run(capsys, *args)[1])["text"] == text
    assert json.loads(run(capsys, *args, "--chat")[1])["text"] == text[: text.index(text[3:5])]


def test_a_prompt_that_is_far_too_long(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("hello " * 100_000)
    code, _, err = run(capsys, "--model", folder, "--prompt-file", tmp_path / "long.txt")
    assert code == 2 and "at least" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no') }}", "{% if", "{{ messages.__class__.__mro__ }}", "{{ ''.join(1) }}"],
)
def test_a_bad_chat_template(folder: Path, capsys: pytest.CaptureFixture[str], template: str) -> None:
    write_tokenizer(folder, chat_template=template)
    code, out, err = run(capsys, "--model", folder, "--prompt", "hello", "--chat", "--device", "cpu")
    if "mro" in template and code == 0:
        return  # the sandbox hides the attribute instead of refusing it
    assert code == 2 and out == "" and err.startswith("duomoe: error:") and "template" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--prompt", ""], "empty"),
        (["--prompt", "x" * 256], "256 tokens"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["--prompt", "a", "--max-new-tokens", "many"], "--max-new-tokens"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature"),
        (["--prompt", "a", "--top-k", "-1"], "--top-k"),
        (["--prompt", "a", "--top-k", "9223372036854775808"], "--top-k"),
        (["--prompt", "a", "--link-bandwidth", "0"], "--link-bandwidth"),
        (["--prompt", "a", "--link-bandwidth", "fast"], "25GB/s"),
        (["--prompt", "a", "--link-latency=-1us"], "--link-latency"),
        (["--prompt-file", "/dev/zero"], "bytes of text"),
        (["--prompt", "a", "--top-p", "0"], "--top-p"),
        (["--prompt", "a", "--top-p", "1.5"], "--top-p"),
        (["--prompt", "a", "--seed", "-3"], "--seed"),
        (["--prompt", "a", "--stop", ""], "--stop"),
        (["--prompt", "a", "--expert-memory", "0"], "--expert-memory"),
        (["--prompt", "a", "--expert-memory", "lots"], "500MB, 2GiB or 15%"),
        (["--prompt", "a", "--expert-memory", "-1"], "--expert-memory"),
        (["--prompt", "a", "--expert-memory", "1B"], "at least"),
        (["--prompt", "a", "--policy", "magic"], "'magic'"),
        (["--prompt", "a", "--policy", "resident", "--expert-memory", "50KB"], "--policy duo"),
        (["--prompt", "a", "--dtype", "int3"], "int3"),
        (["--prompt", "a", "--device", "tpu"], "tpu"),
        (["--prompt", "a", "--compile", "maybe"], "maybe"),
        (["--prompt", "a", "--chat"], "chat template"),
        (["--prompt", "a", "--system", "b"], "--chat"),
        (["--prompt", "a", "--template-arg", "b=1"], "--chat"),
        (["--prompt", "a", "--chat", "--template-arg", "b"], "KEY=VALUE"),
        (["--prompt", "a", "--messages", "b"], "not allowed"),
        (["--messages", "/nonexistent/file"], "/nonexistent/file"),
        (["--prompt", "a", "--prompt-file", "b"], "not allowed"),
        (["--prompt-file", "/nonexistent/file"], "/nonexistent/file"),
        (["--prompt", "a", "--frobnicate"], "--frobnicate"),
        (["--prompt", "\udcff"], "UTF-8"),
        (["--prompt", "a", "--logprobs", "2"], "--json"),
        (["--prompt", "a", "--prompt-logprobs", "0"], "--json"),
        (["--prompt", "a", "--logit-bias", "5=1", "--logit-bias", "05=1"], "--logit-bias"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], args: list[str], words: str
) -> None:
    code, out, err = run(capsys, "--model", folder, *args)
    assert code == 2 and out == ""
    assert err.startswith("duomoe: error: ") and err.count("\n") == 1 and words in err


def test_cuda_asked_for_and_absent(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = run(capsys, "--model", folder, "--prompt", "a", "--device", "cuda")
    assert code == 2 and "CUDA" in err


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b'{"model": 3}'])
def test_a_broken_tokenizer(folder: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    code, _, err = run(capsys, "--model", folder, "--prompt", "a")
    assert code == 2 and "tokenizer.json" in err and err.count("\n") == 1


def test_no_tokenizer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "tokenizer.json").unlink()
    code, _, err = run(capsys, "--model", folder, "--prompt", "a")
    assert code == 2 and "no tokenizer.json" in err


def test_a_prompt_that_is_not_text(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "prompt.bin"
    file.write_bytes(b"\xff\xfe\x00")
    code, _, err = run(capsys, "--model", folder, "--prompt-file", file)
    assert code == 2 and "UTF-8" in err
    code, _, err = run(capsys, "--model", folder, "--prompt-file", tmp_path)
    assert code == 2 and err.count("\n") == 1


def start(folder: Path, *args: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "duomoe.generate", "--model", str(folder), "--prompt", "hello", *args]

    def hear_interrupts() -> None:
        # A shell's background job, as these tests may be, ignores them, and so would its children.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=hear_interrupts)


def test_a_closed_pipe_ends_silently(folder: Path) -> None:
    process = start(folder, "--max-new-tokens", "250", "--device", "cpu")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == b""


@pytest.mark.parametrize("args", [[], ["--json"]])
def test_a_full_disk_is_an_error(folder: Path, args: list[str]) -> None:
    command = [sys.executable, "-m", "duomoe.generate", "--model", str(folder), "--prompt", "hello", "--device", "cpu"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*command, *args], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"No space left" in done.stderr


def test_closed_standard_streams(folder: Path) -> None:
    command = f"{sys.executable} -m duomoe.generate --model {folder} --prompt hello --device cpu --max-new-tokens 3"
    done = subprocess.run(["bash", "-c", f"{command} >&-"], capture_output=True)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1
    done = subprocess.run(["bash", "-c", f"{command} 2>&-"], capture_output=True)
    assert done.returncode == 0 and done.stdout.endswith(b"\n")


@pytest.mark.parametrize("wait", ["at once", "while generating"])
def test_interrupt_ends_with_130(folder: Path, wait: str) -> None:
    process = start(folder, "--max-new-tokens", "250", "--device", "cpu")
    assert process.stdout is not None and process.stderr is not None
    if wait == "while generating":
        process.stdout.read(1)
    else:
        maps = Path(f"/proc/{process.pid}/maps")
        while "libtorch" not in maps.read_text():  # torch is being imported
            time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert b"Traceback" not in process.stderr.read()


def test_output_is_utf8_whatever_the_locale(folder: Path) -> None:
    environment = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    command = [
        sys.executable,
        "-m",
        "duomoe.generate",
        "--model",
        folder,
        "--prompt",
        "hello",
        "--max-new-tokens",
        "60",
    ]
    done = subprocess.run([*map(str, command), "--device", "cpu"], capture_output=True, env=environment, check=True)
    done.stdout.decode("utf-8")


def test_sampling_flags_reach_the_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["yes", "no"]}')
    base = ["--prompt", "The sea", "--device", "cpu", "--json", "--max-new-tokens", "12"]

    def run(*flags: str) -> dict[str, Any]:
        assert main([*base, *flags]) == 0
        return json.loads(capsys.readouterr().out)

    assert json.loads(run("--json-schema", str(schema))["text"]) in ("yes", "no")
    assert set(run("--regex", "a{4}b")["text"]) == {"a", "b"}
    plain = run("--logprobs", "2", "--prompt-logprobs", "0")
    assert [len(each["top"]) for each in plain["logprobs"]] == [2] * len(plain["token_ids"])
    assert plain["prompt_logprobs"][0] is None and len(plain["prompt_logprobs"]) == plain["prompt_tokens"]
    first = plain["token_ids"][0]
    assert first not in run("--logit-bias", f"{first}=-100", "--min-p", "0.1")["token_ids"]
    assert run("--stop-token-id", str(first))["token_ids"] == [first]
    assert len(run("--stop-token-id", str(first), "--min-tokens", "5")["token_ids"]) >= 5
    repeated = run("--repetition-penalty", "1.9", "--presence-penalty", "1", "--frequency-penalty", "1")
    assert len(set(repeated["token_ids"])) > 8
    for flags in (["--logit-bias", "5"], ["--json-schema", "nowhere"], ["--regex", "("], ["--logprobs", "21"]):
        assert main([*base, *flags]) == 2
        assert capsys.readouterr().err.count("\n") == 1


FLAGS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "max new tokens": (["--max-new-tokens", "9"], {"max_new_tokens": 9}),
    "temperature": (["--temperature", "0.5"], {"temperature": 0.5}),
    "top-k": (["--top-k", "3"], {"top_k": 3}),
    "top-p": (["--top-p", "0.9"], {"top_p": 0.9}),
    "min-p": (["--min-p", "0.1"], {"min_p": 0.1}),
    "repetition": (["--repetition-penalty", "1.3"], {"repetition_penalty": 1.3}),
    "presence": (["--presence-penalty", "-0.5"], {"presence_penalty": -0.5}),
    "frequency": (["--frequency-penalty", "0.25"], {"frequency_penalty": 0.25}),
    "bias": (["--logit-bias", "5=-100", "--logit-bias", "6=.5"], {"logit_bias": {5: -100.0, 6: 0.5}}),
    "seed": (["--seed", "7"], {"seed": 7}),
    "stop": (["--stop", "a", "--stop", "b"], {"stop": ("a", "b")}),
    "stop tokens": (["--stop-token-id", "1", "--stop-token-id", "2"], {"stop_token_ids": (1, 2)}),
    "min tokens": (["--min-tokens", "4"], {"min_tokens": 4}),
    "ignore eos": (["--ignore-eos"], {"ignore_eos": True}),
    "object": (["--json-object"], {"grammar": Grammar.json_object()}),
    "schema": (["--json-schema", "schema"], {"grammar": Grammar.json_schema('{"enum": [5]}')}),
    "regex": (["--regex", "a+"], {"grammar": Grammar.regex("a+")}),
    "grammar": (["--grammar", "grammar"], {"grammar": Grammar.lark('start: "a"')}),
}


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize("name", FLAGS)
def test_each_sampling_flag_is_its_parameter(
    name: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("schema").write_text('{"enum": [5]}')
    Path("grammar").write_text('start: "a"')
    flags, expected = FLAGS[name]
    grammar = parser() if command == "generate" else chat.parser()
    found = sampling_params(grammar.parse_args(flags))
    assert found == SamplingParams(**{"logit_bias": {}} | expected) != SamplingParams(logit_bias={})


def test_every_sampling_flag_has_a_test() -> None:
    tested = {flag for flags, _ in FLAGS.values() for flag in flags}
    (group,) = (each for each in parser()._action_groups if each.title == "sampling")
    assert {action.option_strings[0] for action in group._group_actions} <= tested


def test_answers_follow_grammars_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "grammar").write_text('start: "<" /[a-z]{3}/ ">"')
    base = ["--prompt", "The sea", "--device", "cpu", "--json", "--max-new-tokens", "200", "--temperature", "1"]
    for flags, pattern in (
        (["--json-object", "--seed", "3"], r"\s*\{[\s\S]*\}\s*"),
        (["--grammar", str(tmp_path / "grammar")], "<[a-z]{3}>"),
    ):
        assert main([*base, *flags]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["finish_reason"] == "stop" and re.fullmatch(pattern, answer["text"]), answer["text"]
        if "--json-object" in flags:
            assert isinstance(json.loads(answer["text"]), dict)
    for flags in (["--grammar", "nowhere"], ["--grammar", str(tmp_path)], ["--json-object", "--regex", "a"]):
        assert main([*base, *flags]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "grammar").write_text("start: (")
    assert main([*base, "--grammar", str(tmp_path / "grammar")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "params"),
    [
        (["--repetition-penalty", "1.7"], SamplingParams(max_new_tokens=20, repetition_penalty=1.7)),
        (["--presence-penalty", "2"], SamplingParams(max_new_tokens=20, presence_penalty=2)),
        (["--frequency-penalty", "2"], SamplingParams(max_new_tokens=20, frequency_penalty=2)),
    ],
)
def test_penalties_of_the_command_line_change_the_answer(
    flags: list[str], params: SamplingParams, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with LLM(folder, device="cpu") as llm:
        plain, changed = llm.generate(["hello"] * 2, [SamplingParams(max_new_tokens=20), params])
    assert plain.token_ids != changed.token_ids
    args = ("--model", folder, "--prompt", "hello", "--device", "cpu", "--json", "--max-new-tokens", 20)
    assert json.loads(run(capsys, *args, *flags)[1])["token_ids"] == changed.token_ids
