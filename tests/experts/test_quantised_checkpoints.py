"""Quantised checkpoints: run as they are, they give what a plain one of their values gives, whatever is resident."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stored_cases import awq, fp8, gptq
from torch import Tensor

from duomoe import LLM, InputError, SamplingParams, generate
from duomoe.experts.matrix import PlainMatrix, to_fp8, to_int4
from duomoe.experts.policies import BOUNDED

HIDDEN, INTERMEDIATE = 80, 24  # two groups of 64 inputs, and part of one

METHODS: dict[str, tuple[Callable[[int, int, int], tuple[dict[str, Tensor], Tensor]], dict[str, Any]]] = {
    "fp8": (fp8, dict(quant_method="fp8", weight_block_size=[128, 128])),
    "awq": (awq, dict(quant_method="awq", bits=4, group_size=64, version="gemm")),
    "gptq": (gptq, dict(quant_method="gptq", bits=4, group_size=64)),
}

# Bytes of an expert by the format's definition: gate over up [48, 80] and down [80, 24], each tensor in blocks of 256.
ROW_BYTES = {
    "plain": 4 * 48 * 80 + 4 * 80 * 24,
    "fp8": 48 * 80 + 256 + 2048 + 256,  # two scales for gate and up, one for down
    "int4": 48 * 64 + 256 + 256 + 80 * 64 + 512 + 256,  # 2 groups: 96 scales of 2 bytes, 96 zeros; 160 and 160
}


def sizes_of(family: str) -> dict[str, int]:
    intermediate = "intermediate_size" if family == "mixtral" else "moe_intermediate_size"
    return dict(hidden_size=HIDDEN, num_hidden_layers=2) | {intermediate: INTERMEDIATE}


def is_linear(name: str) -> bool:
    return ".experts." in name or ".self_attn.q_proj.weight" in name or ".self_attn.o_proj.weight" in name


Made = tuple[Path, Path]


@pytest.fixture(scope="module")
def quantised(tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Made]:
    """Make a quantised checkpoint of a family, and a plain one of its values; the same again for the same arguments."""
    made: dict[tuple[str, str], Made] = {}

    def make(family: str, method: str) -> Made:
        if (family, method) not in made:
            source, (draw, config) = tiny(family, **sizes_of(family)).path, METHODS[method]
            quantised, plain = (Path(tmp_path_factory.mktemp(f"{family}-{method}")) / name for name in ("q", "plain"))
            for folder in (quantised, plain):
                shutil.copytree(source, folder)
            tensors, values = load_file(source / "model.safetensors"), load_file(source / "model.safetensors")
            for seed, name in enumerate(filter(is_linear, list(tensors))):
                stored, values[name] = draw(seed, *tensors.pop(name).shape)
                tensors |= {f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in stored.items()}
            save_file(tensors, quantised / "model.safetensors")
            save_file(values, plain / "model.safetensors")
            raw = json.loads((source / "config.json").read_text()) | dict(quantization_config=config)
            (quantised / "config.json").write_text(json.dumps(raw))
            made[family, method] = quantised, plain
        return made[family, method]

    return make


def form_of(method: str) -> str:
    return "fp8" if method == "fp8" else "int4"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_every_policy_gives_what_the_values_give(
    family: str, method: str, quantised: Callable[[str, str], Made], prompt_of: Callable[..., list[int]]
) -> None:
    stored, plain = quantised(family, method)
    prompt, params, size = prompt_of(50), SamplingParams(max_new_tokens=6), ROW_BYTES[form_of(method)]
    expected = LLM(plain, device="cpu")
    whole = LLM(stored, device="cpu")
    assert whole.policy_name == "resident" and whole.memory["expert_slots_bytes"] == 16 * size
    # The reference dequantises to float32, in which this checkpoint's plain layers are computed: the same bits.
    assert torch.equal(whole.logits(prompt), expected.logits(prompt))
    assert torch.equal(LLM(stored, device="cpu", expert_dtype="plain").logits(prompt), expected.logits(prompt))
    tokens = whole.generate(prompt, params)[0].token_ids
    assert tokens == expected.generate(prompt, params)[0].token_ids
    for policy in BOUNDED:
        for slots in (1, 3, 10):
            llm = LLM(stored, device="cpu", policy=policy, expert_memory=slots * size)
            assert torch.equal(llm.logits(prompt), expected.logits(prompt))
            assert llm.generate(prompt, params)[0].token_ids == tokens


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("policy", BOUNDED)
def test_every_budget_gives_the_same_bits_on_a_gpu(
    policy: str, method: str, quantised: Callable[[str, str], Made], prompt_of: Callable[..., list[int]]
) -> None:
    stored, plain = quantised("qwen3_moe", method)
    prompt, params, size = prompt_of(50), SamplingParams(max_new_tokens=6), ROW_BYTES[form_of(method)]
    whole = LLM(stored, dtype="bfloat16", compile="off")
    of_values = LLM(plain, dtype="bfloat16", compile="off").logits(prompt)
    # Activations in fp8 have three bits of mantissa, and now and then another expert is chosen for it: by position.
    error = (whole.logits(prompt) - of_values).norm(dim=1) / of_values.norm(dim=1)
    assert error.median() < (0.1 if method == "fp8" else 0.01)
    for slots in (1, 3, 10):
        llm = LLM(stored, dtype="bfloat16", compile="off", policy=policy, expert_memory=slots * size)
        assert torch.equal(llm.logits(prompt), whole.logits(prompt))
        assert llm.generate(prompt, params)[0].token_ids == whole.generate(prompt, params)[0].token_ids


@pytest.mark.parametrize("method", METHODS)
def test_a_prefill_moves_the_bytes_of_the_format(
    method: str, quantised: Callable[[str, str], Made], prompt_of: Callable[..., list[int]]
) -> None:
    stored, plain = quantised("qwen3_moe", method)
    misses = []
    for path, form in ((stored, form_of(method)), (plain, "plain")):
        llm = LLM(path, device="cpu", policy="on_demand", expert_memory=2 * ROW_BYTES[form])
        assert llm.memory["expert_store_bytes"] == 16 * ROW_BYTES[form]
        moved = llm.generate(prompt_of(50), SamplingParams(max_new_tokens=1))[0].metrics.experts
        assert moved.link_bytes == moved.misses * ROW_BYTES[form]
        misses.append(moved.misses)
    assert misses[0] == misses[1] > 0


@pytest.mark.parametrize("expert_dtype", ["fp8", "int4"])
@pytest.mark.parametrize("policy", ["resident", "duo"])
def test_experts_are_quantised_while_loading(
    expert_dtype: str, policy: str, tiny: Callable[..., Any], tmp_path: Path, prompt_of: Callable[..., list[int]]
) -> None:
    source = tiny("qwen3_moe", **sizes_of("qwen3_moe")).path
    shutil.copytree(source, folder := tmp_path / "values")
    tensors = load_file(source / "model.safetensors")
    lost = [[0.0, 0.0], [0.0, 0.0]]
    for name, tensor in tensors.items():
        if ".experts." in name:
            matrix = PlainMatrix(tensor)
            tensors[name] = (to_fp8(matrix) if expert_dtype == "fp8" else to_int4(matrix, 128, torch.float16)).values()
            layer = lost[int(name.split(".")[2])]
            layer[0] += float((tensors[name] - tensor).double().square().sum())
            layer[1] += float(tensor.double().square().sum())
    save_file(tensors, folder / "model.safetensors")
    memory = None if policy == "resident" else "20%"
    llm = LLM(source, device="cpu", policy=policy, expert_memory=memory, expert_dtype=expert_dtype)
    assert torch.equal(llm.logits(prompt_of(30)), LLM(folder, device="cpu").logits(prompt_of(30)))
    assert llm.quantisation_errors == pytest.approx([(error / norm) ** 0.5 for error, norm in lost])
    assert min(llm.quantisation_errors) > 0


def test_scales_of_bfloat16_stay_so(
    quantised: Callable[[str, str], Made], tmp_path: Path, prompt_of: Callable[..., list[int]]
) -> None:
    shutil.copytree(quantised("mixtral", "awq")[0], folder := tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: t.bfloat16() if name.endswith(".scales") else t for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    llm = LLM(folder, device="cpu")
    assert llm.plan.expert_format.tensors["down_scales"].dtype == torch.bfloat16
    assert llm.quantisation_errors == [0, 0]
    assert torch.equal(llm.logits(prompt_of(9)), LLM(folder, device="cpu", expert_dtype="plain").logits(prompt_of(9)))


def test_activations_are_fp8_where_the_checkpoint_says_so(
    quantised: Callable[[str, str], Made], tmp_path: Path
) -> None:
    stored, plain = quantised("mixtral", "fp8")
    llm = LLM(stored, device="cpu")
    assert llm.plan.expert_format.fp8_activations and llm.plan.workspace()["fp8 activations"] > 0
    assert not LLM(stored, device="cpu", expert_dtype="int4").plan.expert_format.fp8_activations
    assert not LLM(plain, device="cpu", expert_dtype="fp8").plan.expert_format.fp8_activations
    shutil.copytree(stored, folder := tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["activation_scheme"] = "static"
    (folder / "config.json").write_text(json.dumps(config))
    llm = LLM(folder, device="cpu")
    assert not llm.plan.expert_format.fp8_activations and llm.plan.workspace()["fp8 activations"] == 0


def test_the_plan_says_what_dequantised_layers_cost(quantised: Callable[[str, str], Made]) -> None:
    plan = LLM(quantised("mixtral", "awq")[0], device="cpu", policy="duo", expert_memory="20%").plan
    # q and o of two layers, 80 by 80: 4 bytes a value instead of a half, less 160 scales of 2 and 160 zeros of a half.
    assert plan.dequantised == 4 * (80 * 80 * 7 // 2 - 160 * 5 // 2)
    assert "more than stored" in plan.table() and "int4" in plan.table()
    assert plan.as_dict()["expert_dtype"] == "int4"


def test_errors_are_shown_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--device", "cpu", "--prompt", "The sea", "--max-new-tokens", "2", "--verbose"]
    assert generate.main([*args, "--expert-dtype", "int4"]) == 0
    assert "layer 1 " in (err := capsys.readouterr().err) and "error by quantisation" in err
    assert generate.main(args) == 0
    assert "error by quantisation" not in capsys.readouterr().err


def test_bad_input_is_one_line(quantised: Callable[[str, str], Made], tmp_path: Path) -> None:
    shutil.copytree(quantised("mixtral", "awq")[0], folder := tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    prefix = "model.layers.1.block_sparse_moe.experts.3.w2"

    def fails(changed: dict[str, Tensor], *words: str, **options: Any) -> None:
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(InputError) as caught:
            LLM(folder, device="cpu", **options)
        assert "\n" not in str(caught.value)
        for word in words:
            assert word in str(caught.value)

    fails({name: t for name, t in tensors.items() if name != f"{prefix}.scales"}, "no tensor", f"{prefix}.scales")
    fails(tensors, "--expert-dtype", "'int3'", expert_dtype="int3")
    fails(tensors, "stored quantised", "--expert-dtype", expert_dtype="bf16-packed", dtype="bfloat16")
    mixed = {name: t for name, t in tensors.items() if not name.startswith(f"{prefix}.")}
    mixed[f"{prefix}.weight"] = torch.randn(HIDDEN, INTERMEDIATE)
    fails(mixed, "not all stored in the same form", "--expert-dtype")
    assert LLM(folder, device="cpu", expert_dtype="int4").quantisation_errors[1] > 0
    mixed[f"{prefix}.weight"][3, 5] = float("nan")
    fails(mixed, f"{prefix}.weight", "NaN", expert_dtype="int4")


def test_quantised_weights_that_are_not_finite_are_warned_about(
    quantised: Callable[[str, str], Made], tmp_path: Path
) -> None:
    """Of experts and of others."""
    shutil.copytree(quantised("mixtral", "awq")[0], folder := tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.layers.1.block_sparse_moe.experts.3.w2", "model.layers.1.self_attn.q_proj"):
        broken = {f"{name}.scales": tensors[f"{name}.scales"] * float("inf")}
        save_file(tensors | broken, folder / "model.safetensors")
        with pytest.warns(RuntimeWarning, match=rf"{name}\.weight holds NaN or infinity"):
            LLM(folder, device="cpu")


def test_quantised_values_that_overflow_a_plain_row_are_warned_about(
    quantised: Callable[[str, str], Made], tmp_path: Path
) -> None:
    shutil.copytree(quantised("mixtral", "awq")[0], folder := tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.3.w2"
    save_file(
        tensors | {f"{name}.scales": torch.full_like(tensors[f"{name}.scales"], 3e4)}, folder / "model.safetensors"
    )
    with pytest.warns(RuntimeWarning, match=rf"{name}\.weight holds NaN or infinity"):
        LLM(folder, device="cpu", dtype="float16", expert_dtype="plain")
    LLM(folder, device="cpu", dtype="float16")
