"""Every layout of quantised checkpoints against transformers, on values that the test has worked out."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from stored_cases import awq, gptq, pack_quantized, packed, scaled
from torch import Tensor

from duomoe import LLM, InputError, train_predictor
from duomoe.experts.policies import BOUNDED
from duomoe.model_folder import ModelFolder

HIDDEN, INTERMEDIATE = 160, 72  # parts of blocks and groups everywhere

Draw = Callable[[int, int, int], tuple[dict[str, Tensor], Tensor]]


def compressed(form: str, weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    group = dict(targets=["Linear"], weights=weights, input_activations=None, output_activations=None, **more)
    return dict(
        quant_method="compressed-tensors",
        format=form,
        config_groups=dict(group_0=group),
        ignore=["lm_head"],
        kv_cache_scheme=None,
        quantization_status="compressed",
        sparsity_config={},
        transform_config={},
    )


def integers(bits: int, strategy: str, group: int | None = None, symmetric: bool = True) -> dict[str, Any]:
    weights = dict(num_bits=bits, type="int", strategy=strategy, group_size=group, symmetric=symmetric)
    return compressed("pack-quantized", weights | dict(dynamic=False, actorder=None, block_structure=None))


def floats(strategy: str, block: list[int] | None = None, form: str = "float-quantized") -> dict[str, Any]:
    weights = dict(num_bits=8, type="float", strategy=strategy, symmetric=True, block_structure=block, group_size=None)
    return compressed(form, weights)


FP8 = dict(quant_method="fp8")
GPTQ = dict(quant_method="gptq", bits=4, desc_act=False, sym=False)
AWQ = dict(quant_method="awq", bits=4, version="gemm")


def reordered(seed: int, outer: int, inner: int, bits: int = 4) -> tuple[dict[str, Tensor], Tensor]:
    """A matrix as GPTQ stores one whose inputs were quantised in another order."""
    stored, values = gptq(seed, outer, inner, bits=bits)
    order = torch.randperm(inner, generator=torch.Generator().manual_seed(seed))
    numbers, count = torch.empty(inner, outer, dtype=torch.int32), 32 // bits
    for place in range(count):
        numbers[place::count] = stored["qweight"] >> bits * place & 2**bits - 1
    numbers = numbers[order].T.tolist()
    stored["qweight"] = packed(numbers, tuple(range(count))).T.contiguous()
    stored["g_idx"] = stored["g_idx"][order]
    return stored, values[:, order]


# The matrices, the config, and what experts are in a row.
CASES: dict[str, tuple[Draw, dict[str, Any], str]] = {
    "W4A16, groups of 32": (partial(pack_quantized, group=32), integers(4, "group", 32), "plain"),
    "W4A16, groups of 64": (pack_quantized, integers(4, "group", 64), "int4"),
    "W4A16, groups of 128": (partial(pack_quantized, group=128), integers(4, "group", 128), "int4"),
    "W4A16, per channel": (partial(pack_quantized, group=0), integers(4, "channel"), "int4"),
    "W4A16, zero points": (partial(pack_quantized, symmetric=False), integers(4, "group", 64, False), "int4"),
    "W4A16, zero points per channel": (
        partial(pack_quantized, symmetric=False, group=0),
        integers(4, "channel", None, False),
        "int4",
    ),
    "W8A16, groups of 32": (partial(pack_quantized, group=32, bits=8), integers(8, "group", 32), "plain"),
    "W8A16, per channel": (partial(pack_quantized, group=0, bits=8), integers(8, "channel"), "plain"),
    "W8A16, zero points": (partial(pack_quantized, symmetric=False, bits=8), integers(8, "group", 64, False), "plain"),
    "FP8, per channel": (partial(scaled, block=(1, 0)), floats("channel"), "plain"),
    "FP8, per tensor": (partial(scaled, scale_shape="one"), floats("tensor"), "fp8"),
    "FP8, naive": (partial(scaled, scale_shape="one"), floats("tensor", form="naive-quantized"), "fp8"),
    "FP8, in blocks": (partial(scaled, block=(128, 128)), floats("block", [128, 128]), "fp8"),
    "FP8, in small blocks": (partial(scaled, block=(64, 32)), floats("block", [64, 32]), "plain"),
    "INT8, per channel": (
        partial(scaled, block=(1, 0), dtype=torch.int8),
        compressed("int-quantized", dict(num_bits=8, type="int", strategy="channel", symmetric=True)),
        "plain",
    ),
    "fp8 of one scale": (partial(scaled, scale_shape="scalar"), FP8 | dict(activation_scheme="static"), "fp8"),
    "fp8 of one scale, no blocks": (
        partial(scaled, scale_shape="one", name="weight_scale_inv"),
        FP8 | dict(weight_block_size=None),
        "fp8",
    ),
    "fp8 per channel, flat": (partial(scaled, block=(1, 0), scale_shape="flat"), FP8, "plain"),
    "fp8 in blocks of 256": (
        partial(scaled, block=(256, 256), name="weight_scale_inv"),
        FP8 | dict(weight_block_size=[256, 256]),
        "fp8",
    ),
    "fp8 in blocks of 32": (
        partial(scaled, block=(32, 32), name="weight_scale_inv"),
        FP8 | dict(weight_block_size=[32, 32]),
        "plain",
    ),
    "fp8, powers of two": (
        partial(scaled, block=(128, 128), scale_dtype=torch.float8_e8m0fnu, name="weight_scale_inv"),
        FP8 | dict(weight_block_size=[128, 128], scale_fmt="ue8m0"),
        "fp8",
    ),
    "fp8, nulls": (
        partial(scaled, block=(128, 128), name="weight_scale_inv"),
        FP8 | dict(weight_block_size=[128, 128], fmt=None, activation_scheme=None, modules_to_not_convert=None),
        "fp8",
    ),
    "gptq, groups of 32": (partial(gptq, group=32), GPTQ | dict(group_size=32), "plain"),
    "gptq, one group": (partial(gptq, group=0), GPTQ | dict(group_size=-1), "int4"),
    "gptq, 8 bits": (partial(gptq, bits=8, group=32), GPTQ | dict(group_size=32, bits=8), "plain"),
    "gptq, symmetric": (partial(gptq, symmetric=True), GPTQ | dict(group_size=64, sym=True), "int4"),
    "gptq, ordered desc_act": (gptq, GPTQ | dict(group_size=64, desc_act=True), "int4"),
    "gptq, desc_act": (reordered, GPTQ | dict(group_size=64, desc_act=True), "plain"),
    "gptq of 8 bits, desc_act": (
        partial(reordered, bits=8),
        GPTQ | dict(group_size=64, bits=8, desc_act=True),
        "plain",
    ),
    "gptq_v2 by format": (partial(gptq, less=0), GPTQ | dict(group_size=64, format="gptq_v2"), "int4"),
    "gptq, float32 scales": (partial(gptq, scale_dtype=torch.float32), GPTQ | dict(group_size=64), "int4"),
    "gptq, nulls": (
        gptq,
        GPTQ | dict(group_size=64, checkpoint_format=None, desc_act=None, sym=None, static_groups=None, format=None),
        "int4",
    ),
    "awq, old spelling": (awq, dict(quant_method="awq", w_bit=4, q_group_size=64, version="GEMM"), "int4"),
    "awq, nulls": (awq, AWQ | dict(group_size=64, version=None, zero_point=None, modules_to_not_convert=None), "int4"),
}


# One for each layout and what it becomes.
UNDER_ALL_POLICIES = ("W4A16, zero points", "W8A16, per channel", "fp8 of one scale", "gptq, symmetric", "awq, nulls")


def is_linear(name: str) -> bool:
    return ".experts." in name or "self_attn.q_proj.weight" in name or "self_attn.o_proj.weight" in name


def everything(name: str) -> bool:
    return is_linear(name) or name in ("lm_head.weight", "model.embed_tokens.weight")


def write(source: Path, folder: Path, draw: Draw, config: dict[str, Any] | None, chosen: Callable[[str], bool]) -> Path:
    """Quantise the chosen matrices of a checkpoint into `folder`; return one of their values beside it."""
    shutil.copytree(source, folder)
    shutil.copytree(source, plain := folder.with_name("plain"))
    tensors = load_file(source / "model.safetensors")
    values = dict(tensors)
    for seed, name in enumerate(filter(chosen, list(tensors))):
        stored, values[name] = draw(seed, *tensors.pop(name).shape)
        tensors |= {f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in stored.items()}
    save_file(tensors, folder / "model.safetensors")
    save_file(values, plain / "model.safetensors")
    raw = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | (dict(quantization_config=config) if config else {})))
    return plain


@torch.inference_mode()
def logits_of_transformers(folder: Path, prompt: list[int]) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return model(torch.tensor([prompt])).logits[0].float()


def sizes_of(family: str) -> dict[str, int]:
    intermediate, experts = ("intermediate_size", "num_local_experts") if family == "mixtral" else QWEN_KEYS
    return dict(hidden_size=HIDDEN, num_hidden_layers=2, vocab_size=208) | {intermediate: INTERMEDIATE, experts: 4}


QWEN_KEYS = ("moe_intermediate_size", "num_experts")
FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str, case: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    draw, config, form = CASES[case]
    plain = write(tiny(family, **sizes_of(family)).path, folder := tmp_path / "model", draw, config, is_linear)
    prompt = list(range(0, 200, 7))
    expected = logits_of_transformers(plain, prompt)
    whole = LLM(folder, device="cpu")
    assert whole.plan.expert_format.name == form
    assert not any(whole.quantisation_errors)
    torch.testing.assert_close(whole.logits(prompt), expected, atol=1e-4, rtol=0)
    for policy in BOUNDED if family == "mixtral" and case in UNDER_ALL_POLICIES else ["duo"]:
        bounded = LLM(folder, device="cpu", policy=policy, expert_memory="30%")
        assert torch.equal(bounded.logits(prompt), whole.logits(prompt))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "case", ["W4A16, groups of 128", "FP8, per channel", "gptq, symmetric", "awq, nulls", "fp8, nulls"]
)
def test_quantised_heads_and_embeddings(case: str, tied: bool, tiny: Callable[..., Any], tmp_path: Path) -> None:
    draw, config, _ = CASES[case]
    model = tiny("qwen3_moe", **sizes_of("qwen3_moe"), tie_word_embeddings=tied)
    plain = write(model.path, folder := tmp_path / "model", draw, config, everything)
    prompt = list(range(0, 200, 7))
    torch.testing.assert_close(
        LLM(folder, device="cpu").logits(prompt), logits_of_transformers(plain, prompt), atol=1e-4, rtol=0
    )


def test_a_stored_quantised_head_counts_though_the_config_ties_it(tiny: Callable[..., Any], tmp_path: Path) -> None:
    draw, config, _ = CASES["awq, nulls"]
    model = tiny("qwen3_moe", **sizes_of("qwen3_moe"))
    plain = write(model.path, folder := tmp_path / "model", draw, config, lambda name: name == "lm_head.weight")
    raw = json.loads((folder / "config.json").read_text()) | dict(tie_word_embeddings=True)
    (folder / "config.json").write_text(json.dumps(raw))
    prompt = [1, 2, 3]
    torch.testing.assert_close(
        LLM(folder, device="cpu").logits(prompt), logits_of_transformers(plain, prompt), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("case", "file", "content"),
    [
        ("gptq, symmetric", "quantize_config.json", dict(bits=4, group_size=64, desc_act=False, sym=True)),
        ("awq, nulls", "quant_config.json", dict(w_bit=4, q_group_size=64, zero_point=True, version="GEMM")),
    ],
)
def test_a_file_beside_the_config_says_how(
    case: str, file: str, content: dict[str, Any], tiny: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny("qwen3_moe", **sizes_of("qwen3_moe"))
    plain = write(model.path, folder := tmp_path / "model", CASES[case][0], None, is_linear)
    (folder / file).write_text(json.dumps(content))
    assert torch.equal(LLM(folder, device="cpu").logits([1, 2, 3]), LLM(plain, device="cpu").logits([1, 2, 3]))
    (folder / file).write_text(json.dumps(content | dict(bits=3, w_bit=3)))
    with pytest.raises(InputError, match="bits"):
        ModelFolder(folder)


def test_quantised_routers_are_read_by_the_trainer(tiny: Callable[..., Any], tmp_path: Path) -> None:
    draw, config, _ = CASES["fp8, nulls"]
    model = tiny("qwen3_moe", **sizes_of("qwen3_moe"))
    plain = write(model.path, folder := tmp_path / "model", draw, config, lambda name: name.endswith("mlp.gate.weight"))
    (found, _), (expected, _) = train_predictor._routers_of(str(folder)), train_predictor._routers_of(str(plain))
    for ours, theirs in zip(found.blocks, expected.blocks, strict=True):
        assert torch.equal(ours.router, theirs.router)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (compressed("nvfp4-pack-quantized", dict(num_bits=4, type="float", strategy="tensor")), ["4 bits", "nvfp4"]),
        (compressed("pack-quantized", dict(num_bits=2, type="int", strategy="channel")), ["2 bits"]),
        (integers(4, "group", 64) | dict(transform_config=dict(config_groups={})), ["transform_config"]),
        (integers(4, "group", 64) | dict(sparsity_config=dict(format="sparse-24-bitmask")), ["sparsity_config"]),
        (integers(4, "group", 64) | dict(config_groups={}), ["config_groups"]),
        (compressed("pack-quantized", dict(num_bits=4, type="int", strategy="group", actorder="group")), ["actorder"]),
        (GPTQ | dict(group_size=64, checkpoint_format="gptq", format="gptq_v2"), ["checkpoint_format", "format"]),
        (GPTQ | dict(group_size=64, dynamic={"+:.*down.*": dict(bits=8)}), ["dynamic"]),
        (GPTQ | dict(group_size=0), ["group_size"]),
        (GPTQ | dict(group_size=10**9), ["group_size"]),
        (GPTQ | dict(group_size=64, is_marlin_format=True), ["is_marlin_format"]),
        (FP8 | dict(weight_block_size=[0, 128]), ["block size"]),
        (FP8 | dict(expert_dtype="fp4"), ["expert_dtype", "fp4"]),
        (dict(quant_method="mxfp4"), ["mxfp4", "supported"]),
        ({}, ["null", "supported"]),
    ],
)
def test_a_config_that_is_not_supported_is_refused_in_one_line(
    config: dict[str, Any], words: list[str], tiny: Callable[..., Any], tmp_path: Path
) -> None:
    shutil.copytree(tiny("mixtral").path, folder := tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text()) | dict(quantization_config=config)
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(InputError) as caught:
        ModelFolder(folder)
    message = str(caught.value)
    assert (
        "\n" not in message and len(message) < 400 and all(word in message for word in ["quantization_config", *words])
    )


def test_inputs_in_groups_that_there_are_not(tiny: Callable[..., Any], tmp_path: Path) -> None:
    draw, config, _ = CASES["gptq, desc_act"]
    write(tiny("qwen3_moe", **sizes_of("qwen3_moe")).path, folder := tmp_path / "model", draw, config, is_linear)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.experts.2.up_proj.g_idx"][5] = 7
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.experts\.2\.up_proj\.weight .* \(g_idx\)"):
        LLM(folder, device="cpu")
