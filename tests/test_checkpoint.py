"""Loading: what is read is what was stored, and every broken folder is named in one line."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from duomoe import LLM, InputError
from duomoe.checkpoint import DTYPES, PIECE_BYTES, Checkpoint


@pytest.fixture
def folder(tiny: Callable[..., Any], tmp_path: Path) -> Path:
    """Return a tiny checkpoint of its own, to be broken."""
    return Path(shutil.copytree(tiny("mixtral").path, tmp_path / "model"))


def shard(folder: Path, parts: int = 3) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for part in range(parts):
        mine = names[part::parts]
        file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        save_file({name: tensors[name] for name in mine}, folder / file)
        weight_map |= {name: file for name in mine}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def fails(folder: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        LLM(folder, device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_shards_read_the_same(folder: Path, prompt_of: Callable[..., list[int]]) -> None:
    whole = LLM(folder, device="cpu").logits(prompt_of(9))
    shard(folder)
    assert torch.equal(LLM(folder, device="cpu").logits(prompt_of(9)), whole)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_converted_piece_by_piece(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    length = PIECE_BYTES // stored.itemsize * 2 + 77  # three pieces, the last a short one
    tensors = {
        "long": torch.randn(length).to(stored),
        "matrix": torch.randn(5, 7).to(stored),
        "none": torch.empty(0, 3),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    found = {name: torch.full(tensor.shape, 7.0).to(wanted) for name, tensor in tensors.items()}
    checkpoint = Checkpoint(tmp_path)
    for name, tensor in tensors.items():
        assert checkpoint.read_into(name, found[name])
        assert torch.equal(found[name], tensor.to(wanted))


def read_apart(checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Read tensors by `read_parts`, with gaps between them that must stay as they are."""
    parts, end = [], 3
    for name in names:
        parts.append((checkpoint.tensors[name], end))
        end += checkpoint.tensors[name].size + 5
    memory = torch.full((end,), 0xA5, dtype=torch.uint8)
    checkpoint.read_parts(parts, memory)
    untouched = torch.ones(end, dtype=torch.bool)
    found = {}
    for name, (tensor, begin) in zip(names, parts, strict=True):
        untouched[begin : begin + tensor.size] = False
        content = memory[begin : begin + tensor.size].clone()
        found[name] = content.view(DTYPES[tensor.dtype]).view(tensor.shape)
    assert memory[untouched].eq(0xA5).all()
    return found


@pytest.mark.parametrize("most", [None, 1000])
def test_parts_are_read_to_where_they_belong_though_the_system_reads_less_at_a_time(
    tmp_path: Path, most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "a": {"one": torch.randn(7, 11), "two": torch.randn(300).half(), "none": torch.empty(0, 3), "a": torch.ones(9)},
        "b": {"three": torch.randint(-9, 9, (40, 5), dtype=torch.int32), "four": torch.randn(123).bfloat16()},
    }
    for file, tensors in files.items():
        save_file(tensors, tmp_path / f"{file}.safetensors")
    places = {name: f"{file}.safetensors" for file, tensors in files.items() for name in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (tmp_path / "config.json").write_text("{}")
    preadv = os.preadv

    def reluctant(descriptor: int, pieces: list[memoryview], offset: int) -> int:
        left, some = most or 1 << 40, []
        for piece in pieces:
            some.append(piece[:left])
            left -= len(some[-1])
        return preadv(descriptor, some, offset)

    monkeypatch.setattr(os, "preadv", reluctant)
    expected = files["a"] | files["b"]
    for order in (list(expected), sorted(expected), ["four", "two", "a"]):
        found = read_apart(Checkpoint(tmp_path), order)
        assert all(torch.equal(found[name], expected[name]) for name in order)


def test_what_lies_side_by_side_is_read_by_one_call(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, calls, preadv = Checkpoint(folder), [], os.preadv
    expert = [f"model.layers.0.block_sparse_moe.experts.1.{name}.weight" for name in ("w1", "w3", "w2")]
    expected = load_file(folder / "model.safetensors")

    def counted(descriptor: int, pieces: list[memoryview], offset: int) -> int:
        calls.append(descriptor)
        return preadv(descriptor, pieces, offset)

    monkeypatch.setattr(os, "preadv", counted)
    for _ in range(2):
        found = read_apart(checkpoint, expert)
        assert all(torch.equal(found[name], expected[name]) for name in expert)
    assert len(calls) == 2 and len(set(calls)) == 1, "the file was opened again"
    checkpoint.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(calls[0])
    assert torch.equal(checkpoint.read(expert[0]), expected[expert[0]])
    checkpoint.close()


def test_nan_weights_are_warned_about_by_name(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors["model.norm.weight"][3].fill_(float("nan")))
    with pytest.warns(RuntimeWarning, match=r"model\.norm\.weight holds NaN or infinity"):
        LLM(folder, device="cpu").generate([1, 2, 3])  # and still it ends


def test_values_that_overflow_the_compute_dtype_are_warned_about(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors["model.norm.weight"][3].fill_(1e6))
    LLM(folder, device="cpu")
    with pytest.warns(RuntimeWarning, match=r"model\.norm\.weight holds NaN or infinity"):
        LLM(folder, device="cpu", dtype="float16")


def test_superfluous_tensors_are_warned_about(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update(extra=torch.zeros(3)))
    with pytest.warns(RuntimeWarning, match="1 tensors are not part of the model and were ignored, first extra"):
        LLM(folder, device="cpu")


def test_a_missing_folder(tmp_path: Path) -> None:
    fails(tmp_path / "nowhere", "nowhere", "no such folder")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    fails(tmp_path, "no config.json")


def test_config_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    fails(folder, "config.json", "JSON")


FP8 = dict(quant_method="fp8", weight_block_size=[128, 128])
AWQ = dict(quant_method="awq", bits=4, group_size=128, version="gemm", zero_point=True)
GPTQ = dict(quant_method="gptq", bits=4, group_size=128, desc_act=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(model_type="llama"), ["'llama'", "mixtral, qwen2_moe, qwen3_moe"]),
        (dict(model_type=None), ["model_type"]),
        (dict(hidden_size="48"), ["hidden_size", "'48'"]),
        (dict(hidden_size=-1), ["hidden_size", "-1"]),
        (dict(num_experts_per_tok=9), ["num_experts_per_tok", "8 experts"]),
        (dict(num_key_value_heads=3), ["4 attention heads", "3"]),
        (dict(head_dim=11), ["head_dim", "even"]),
        (dict(hidden_act="gelu"), ["gelu", "silu"]),
        (dict(dtype="float8"), ["float8", "bfloat16"]),
        (dict(rope_parameters=dict(rope_type="longrope", factor=2.0)), ["longrope", "yarn"]),
        (dict(quantization_config="awq"), ["quantised", "'awq'"]),
        (dict(quantization_config=dict(quant_method="exl2")), ["quantised", "exl2", "fp8, awq, gptq"]),
        (dict(quantization_config=dict(quant_method="fp8")), ["weight_block_size", "[128, 128]"]),
        (dict(quantization_config=FP8 | dict(weight_block_size=[64, 64])), ["weight_block_size", "[64, 64]"]),
        (dict(quantization_config=FP8 | dict(fmt="e5m2")), ["fmt", "e5m2", "e4m3"]),
        (dict(quantization_config=AWQ | dict(bits=8)), ["bits 8", "awq", "supported: 4"]),
        (dict(quantization_config=AWQ | dict(group_size=32)), ["group_size 32", "64, 128"]),
        (dict(quantization_config=AWQ | dict(version="gemv")), ["version", "gemv"]),
        (dict(quantization_config=AWQ | dict(zero_point=False)), ["zero_point"]),
        (dict(quantization_config=GPTQ | dict(desc_act=True)), ["desc_act", "gptq"]),
        (dict(quantization_config=GPTQ | dict(checkpoint_format="marlin")), ["checkpoint_format", "marlin"]),
        (dict(eos_token_id="end"), ["eos_token_id"]),
        (dict(num_hidden_layers=5), ["no tensor", "model.layers.3"]),
        (dict(intermediate_size=57), ["experts.0.w1.weight", "[56, 48]", "[57, 48]"]),
        (dict(vocab_size=0), ["vocab_size"]),
        (dict(vocab_size=10**30), ["vocab_size", "absurdly"]),
        (dict(hidden_size=10**9), ["shape", "1000000000"]),
        (dict(num_hidden_layers=10**6), ["num_hidden_layers"]),
        (dict(num_local_experts=10**6), ["gate.weight", "[1000000, 48]"]),
        (dict(model_type=["mixtral"]), ["model_type"]),
        (dict(model_type={}), ["model_type"]),
        (dict(rms_norm_eps=10**400), ["rms_norm_eps"]),
        (dict(dtype=[]), ["dtype"]),
        (dict(rope_parameters=dict(rope_type="default", rope_theta=1.0)), ["rope_theta"]),
        (dict(rope_parameters=dict(rope_type="yarn", factor=2.0, mscale="x")), ["mscale"]),
        (dict(rope_parameters=dict(rope_type="yarn", factor=2.0, truncate="no")), ["truncate"]),
        (dict(rope_parameters=dict(rope_type="llama3", factor=2.0, low_freq_factor=4.0)), ["low_freq_factor"]),
        (dict(rope_parameters=dict(full_attention=dict(rope_type="default"))), ["rope_parameters"]),
    ],
)
def test_a_config_that_cannot_be_met(folder: Path, change: dict[str, Any], words: list[str]) -> None:
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    fails(folder, *words)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    fails(folder, "model.safetensors", "convert")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_weights(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    fails(folder, "model.safetensors", "truncated")


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[1, 2]",
        b'{"x": 3}',
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 0]}}',
        b'{"x": {"dtype": "F32", "shape": "a", "data_offsets": [0, 0]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
        b' "y": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_corrupt_headers(folder: Path, header: bytes) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    fails(folder, "model.safetensors", "corrupt")


def test_bytes_behind_the_last_tensor(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"more")
    fails(folder, "damaged")


def test_a_stored_head_is_used_though_the_config_ties_it(
    tiny: Callable[..., Any], tmp_path: Path, prompt_of: Callable[..., list[int]]
) -> None:
    tied = tiny("qwen3_moe", tie_word_embeddings=True)
    folder = Path(shutil.copytree(tied.path, tmp_path / "model"))
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    same = LLM(folder, device="cpu")
    assert torch.equal(same.logits(prompt_of(5)), LLM(tied.path, device="cpu").logits(prompt_of(5)))
    assert same.memory == LLM(tied.path, device="cpu").memory  # and is held once
    rewrite(folder, lambda tensors: tensors["lm_head.weight"].mul_(2))
    assert torch.equal(LLM(folder, device="cpu").logits(prompt_of(5)), 2 * same.logits(prompt_of(5)))


def test_integer_weights(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(48, dtype=torch.int32)}))
    fails(folder, "model.norm.weight", "I32", "BF16")


def test_an_index_that_names_a_missing_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    fails(folder, "model-00002-of-00003.safetensors", "no such file")


def test_an_index_that_points_outside_the_folder(folder: Path) -> None:
    shard(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002", "../model-00002"))
    fails(folder, "../model-00002")


def test_an_index_that_misplaces_a_tensor(folder: Path) -> None:
    shard(folder)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = "model-00003-of-00003.safetensors"
    index.write_text(json.dumps(content))
    fails(folder, "lm_head.weight", "model-00003-of-00003.safetensors")


def test_a_malformed_index(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    fails(folder, "weight_map")


def test_a_missing_tensor(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.5.w2.weight"))
    fails(folder, "model.layers.1.block_sparse_moe.experts.5.w2.weight")


def test_the_model_is_never_held_twice(tmp_path: Path) -> None:
    """Peak memory while loading stays within 10 % of the checkpoint, above what the process had before."""
    experts, hidden, inner = 8, 512, 2048
    config = dict(
        model_type="mixtral",
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_local_experts=experts,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        torch_dtype="float32",
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {
        "model.embed_tokens.weight": (64, hidden),
        "lm_head.weight": (64, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(4):
        prefix = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = (hidden,)
        for name in "qkvo":
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = (hidden, hidden)
        tensors[f"{prefix}.block_sparse_moe.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            for name, shape in (("w1", (inner, hidden)), ("w3", (inner, hidden)), ("w2", (hidden, inner))):
                tensors[f"{prefix}.block_sparse_moe.experts.{expert}.{name}.weight"] = shape
    save_file({name: torch.rand(shape) for name, shape in tensors.items()}, tmp_path / "model.safetensors")
    program = (
        "import resource, sys, torch\n"
        "from duomoe import LLM\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "import duomoe.llm\n"
        "torch.rand(64, 64) @ torch.rand(64, 64)\n"
        "before = peak()\n"
        "llm = LLM(sys.argv[1], device='cpu', max_batch=1)\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 400 << 20
    assert int(done.stdout) < 1.1 * size
