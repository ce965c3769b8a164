"""`python -m duomoe.plan`, and the flags that it shares with the other tools."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from duomoe import generate, plan
from duomoe.config import EngineConfig

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tiny: Callable[..., Any]) -> Run:
    def run(*args: object, tool: Any = plan) -> tuple[int, str, str]:
        code = tool.main(["--model", str(tiny("qwen3_moe").path), "--device", "cpu", *map(str, args)])
        return code, *capsys.readouterr()

    return run


def test_the_table_and_the_numbers(run: Run, tiny: Callable[..., Any]) -> None:
    args = ("--gpu-memory", "3MB", "--max-model-len", 64, "--max-batch", 2, "--expert-memory", "50%")
    code, out, err = run(*args)
    assert code == 0 and err == ""
    for words in ("policy duo", "non-expert weights", "KV pages", "workspace", "prefill ring", "in host memory"):
        assert words in out
    code, numbers, err = run(*args, "--json")
    config = EngineConfig(
        device="cpu", gpu_memory="3MB", max_model_len=64, max_batch=2, expert_memory="50%", link_latency="0us"
    )
    expected = config.plan(tiny("qwen3_moe").path)
    assert code == 0 and err == "" and json.loads(numbers) == expected.as_dict()
    assert json.loads(numbers)["slots"] == 12
    assert out == expected.table() + "\n"


def test_generate_shows_the_plan_when_asked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["--device", "cpu", "--gpu-memory", "40MB", "--max-batch", "2"]
    assert plan.main(args) == 0
    table = capsys.readouterr().out
    assert generate.main([*args, "--prompt", "The sea", "--max-new-tokens", "2", "--verbose"]) == 0
    out, err = capsys.readouterr()
    assert table in err and "memory plan" not in out
    assert generate.main([*args, "--prompt", "The sea", "--max-new-tokens", "2", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "memory plan" not in err
    assert json.loads(out)["memory"]["kv_cache_bytes"] > 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--gpu-memory", "1KB"], "KV pages for 256 tokens"),
        (["--gpu-memory", "1B"], "2 expert slots"),
        (["--gpu-memory", "1KB", "--max-model-len", "30"], "KV pages for 30 tokens"),
        (["--gpu-memory", "1KB", "--expert-memory", "20KB"], "1 expert slot "),
        (["--gpu-memory", "1KB", "--policy", "resident"], "24 expert slots"),
        (["--gpu-memory", "0"], "greater than zero"),
        (["--gpu-memory", "-5GB"], "--gpu-memory"),
        (["--gpu-memory=-5GB"], "'-5GB' is not a size"),
        (["--gpu-memory", "50%"], "'50%' is not a size"),
        (["--gpu-memory", "nan"], "'nan' is not a size"),
        (["--gpu-memory", "inf"], "'inf' is not a size"),
        (["--gpu-memory", "1e9"], "'1e9' is not a size"),
        (["--expert-memory", "200%"], "at most 100%"),
        (["--expert-memory", "0%"], "more than 0%"),
        (["--expert-memory", "nan%"], "'nan%' is not a size"),
        (["--expert-memory=-5%"], "'-5%' is not a size"),
        (["--expert-memory", "1%"], "at least 13.50 KiB"),
        (["--expert-memory", "50%", "--policy", "resident"], "--policy duo"),
        (["--max-model-len", "0"], "--max-model-len"),
        (["--max-batch", "many"], "--max-batch"),
        (["--policy", "magic"], "'magic'"),
        (["--link-latency", "10us"], "--link-bandwidth"),
        (["--model", "/nonexistent"], "/nonexistent"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run: Run, args: list[str], words: str) -> None:
    code, out, err = run(*args)
    assert code == 2 and out == ""
    assert err.startswith("duomoe: error: ") and err.count("\n") == 1 and words in err


def test_slots_that_are_asked_for_may_be_one(run: Run) -> None:
    code, out, _ = run("--expert-memory", 13824, "--json")
    assert code == 0 and json.loads(out)["slots"] == 1
