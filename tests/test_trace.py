"""Traces: what the router chose, token by token, and refusal of what does not belong to the model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from duomoe import LLM, InputError, SamplingParams
from duomoe.experts.trace import Recorder, Trace
from duomoe.llm import EMBEDDED_MODEL
from duomoe.trace import main


def test_a_trace_holds_what_the_router_chose(
    tiny: Callable[..., Any], prompt_of: Callable[..., list[int]], tmp_path: Path
) -> None:
    model = tiny("qwen3_moe", mlp_only_layers=[1])
    llm = LLM(model.path, device="cpu")
    recorder = Recorder(len(llm.config.moe_layers), with_hidden=True)
    llm.policy.observer = recorder.observe
    prompts = [prompt_of(20), prompt_of(5, seed=1)]
    sequences = []
    for prompt in prompts:
        recorder.begin()
        sequences.append(prompt + llm.generate(prompt, SamplingParams(max_new_tokens=8))[0].token_ids[:-1])
    recorder.trace(llm.fingerprint(), llm.config.num_experts).save(tmp_path / "trace")
    trace = Trace.load(tmp_path / "trace", llm.fingerprint())

    assert trace.request.tolist() == [0] * 27 + [1] * 12
    assert trace.position.tolist() == [*range(27), *range(12)]
    assert trace.decode.tolist() == [False] * 20 + [True] * 7 + [False] * 5 + [True] * 7
    assert trace.hidden is not None and trace.hidden.shape == (39, 2, 48)
    gates = [layer.mlp.gate for layer in model.reference.model.layers if hasattr(layer.mlp, "gate")]
    seen: list[torch.Tensor] = []
    for gate in gates:
        gate.register_forward_hook(lambda _, __, out: seen.append(out[2]))
    for number, sequence in enumerate(sequences):
        seen.clear()
        model.logits(sequence)
        expected = torch.stack(seen[: len(gates)], 1)
        assert torch.equal(trace.experts[trace.request == number].long(), expected)


def test_the_command_writes_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "The sea"}\n{"prompt": "def main():"}\n')
    out = tmp_path / "trace.safetensors"
    args = ["--prompts", str(prompts), "--out", str(out), "--max-new-tokens", "4", "--device", "cpu"]
    assert main(args) == 0
    trace = Trace.load(out, LLM(EMBEDDED_MODEL, device="cpu").fingerprint())
    assert trace.hidden is None and trace.num_experts == 32 and trace.experts.shape[1:] == (8, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl", "trace.safetensors"]
    assert "2 prompts" in capsys.readouterr().err


def test_a_trace_of_another_model_is_refused(tiny: Callable[..., Any], tmp_path: Path) -> None:
    llm, other = LLM(tiny("mixtral").path, device="cpu"), LLM(tiny("mixtral", seed=5).path, device="cpu")
    recorder = Recorder(3, with_hidden=False)
    llm.policy.observer = recorder.observe
    recorder.begin()
    llm.generate([1, 2, 3], SamplingParams(max_new_tokens=2))
    recorder.trace(llm.fingerprint(), 8).save(tmp_path / "trace")
    Trace.load(tmp_path / "trace", llm.fingerprint())
    with pytest.raises(InputError, match="another model"):
        Trace.load(tmp_path / "trace", other.fingerprint())


@pytest.mark.parametrize("content", [b"", b"nonsense" * 20, (2).to_bytes(8, "little") + b"{}"])
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "trace").write_bytes(content)
    with pytest.raises(InputError, match="trace"):
        Trace.load(tmp_path / "trace", "")
    with pytest.raises(InputError, match="trace"):
        Trace.load(tmp_path / "nowhere", "")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "", "no prompts"),
        ("a.jsonl", '{"prompt": 3}', "line 1"),
        ("a.jsonl", '{"prompt": "x"}\nx', "line 2"),
        ("a.txt", None, "a.txt"),
    ],
)
def test_bad_prompt_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | None, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    assert main(["--prompts", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("duomoe: error: ") and err.count("\n") == 1 and words in err
    assert not (tmp_path / "out").exists()
