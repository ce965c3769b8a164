"""Checkpoints whose tensors have other names, or hold all experts of a layer, against transformers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from duomoe import LLM, InputError
from duomoe.checkpoint import Checkpoint
from duomoe.model_folder import ModelFolder

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe"]
PROMPT = list(range(0, 200, 9))


def fuse(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stack the experts of each layer, as transformers 5 holds them."""
    fused = {}
    layers = {name.split(".mlp.")[0].split(".block_sparse_moe.")[0] for name in tensors if ".experts." in name}
    for layer in layers:
        moe = "mlp" if f"{layer}.mlp.experts.0.up_proj.weight" in tensors else "block_sparse_moe"
        gate, up, down = ("gate_proj", "up_proj", "down_proj") if moe == "mlp" else ("w1", "w3", "w2")
        count = len({name.split(".experts.")[1].split(".")[0] for name in tensors if f"{layer}.{moe}.experts." in name})
        experts = [f"{layer}.{moe}.experts.{expert}" for expert in range(count)]
        stacked = [torch.cat([tensors[f"{each}.{name}.weight"] for name in (gate, up)]) for each in experts]
        fused[f"{layer}.mlp.experts.gate_up_proj"] = torch.stack(stacked)
        fused[f"{layer}.mlp.experts.down_proj"] = torch.stack([tensors[f"{each}.{down}.weight"] for each in experts])
    others = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    return {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in others.items()} | fused


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def configure(folder: Path, **change: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))


@torch.inference_mode()
def logits_of_transformers(folder: Path) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return model(torch.tensor([PROMPT])).logits[0].float()


@pytest.mark.parametrize("policy", ["resident", "duo"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_experts(family: str, policy: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny(family)
    folder = Path(shutil.copytree(model.path, tmp_path / "model"))
    rewrite(folder, fuse)
    llm = LLM(folder, device="cpu", policy=policy, expert_memory=None if policy == "resident" else "30%")
    torch.testing.assert_close(llm.logits(PROMPT), logits_of_transformers(folder), atol=1e-4, rtol=0)
    assert torch.equal(llm.logits(PROMPT), LLM(model.path, device="cpu").logits(PROMPT))
    assert llm.fingerprint() == LLM(model.path, device="cpu").fingerprint()
    # Each byte is read once.
    assert llm.startup.loaded_bytes == sum(tensor.size for tensor in Checkpoint(folder).tensors.values())


@pytest.mark.parametrize("scales", ["blocks", "channels", "one for each expert"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_experts_in_fp8(family: str, scales: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    intermediate = {"intermediate_size" if family == "mixtral" else "moe_intermediate_size": 128}
    model = tiny(family, hidden_size=256, num_hidden_layers=2, **intermediate)
    folder, plain = (Path(shutil.copytree(model.path, tmp_path / name)) for name in ("model", "plain"))
    values = fuse(load_file(folder / "model.safetensors"))
    stored = dict(values)
    tall, wide = dict(blocks=(128, 128), channels=(1, 256)).get(scales, (256, 256))
    for name in [name for name in values if ".experts." in name]:
        experts, outer, inner = values[name].shape
        high, broad = min(tall, outer), min(wide, inner)
        scale = torch.rand(experts, outer // high, inner // broad) * 0.001 + 0.001
        stored[name] = (values[name] / 0.002).to(torch.float8_e4m3fn)
        values[name] = stored[name].float() * scale.repeat_interleave(high, 1).repeat_interleave(broad, 2)
        stored[name + "_scale_inv"] = scale.flatten() if scales == "one for each expert" else scale
    save_file(values, plain / "model.safetensors")
    save_file(stored, folder / "model.safetensors")
    size = None if scales == "one for each expert" else [tall, wide]
    configure(folder, quantization_config=dict(quant_method="fp8", weight_block_size=size))
    llm = LLM(folder, device="cpu")
    assert llm.plan.expert_format.name == ("plain" if scales == "channels" else "fp8")
    torch.testing.assert_close(llm.logits(PROMPT), logits_of_transformers(plain), atol=1e-4, rtol=0)


def without_model(name: str) -> str:
    return name.removeprefix("model.")


def under_language_model(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def as_a_part(name: str) -> str:
    return f"language_model.{name}"


@pytest.mark.parametrize("rename", [without_model, under_language_model, as_a_part])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_prefixes(
    family: str, fused: bool, rename: Callable[[str], str], tiny: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny(family)
    folder = Path(shutil.copytree(model.path, tmp_path / "model"))
    if fused:
        rewrite(folder, fuse)
    rewrite(folder, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})
    assert torch.equal(LLM(folder, device="cpu").logits(PROMPT), LLM(model.path, device="cpu").logits(PROMPT))


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_tensors_without_a_use_may_be_there_or_in_absent_shards(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("qwen3_moe")
    folder = Path(shutil.copytree(model.path, tmp_path / "model"))
    more = ["mtp.fc.weight", "model.visual.patch.weight", "visual.x", "model.layers.0.self_attn.rotary_emb.inv_freq"]
    rewrite(folder, lambda tensors: tensors | {name: torch.zeros(3) for name in more})
    expected = LLM(model.path, device="cpu").logits(PROMPT)
    assert torch.equal(LLM(folder, device="cpu").logits(PROMPT), expected)
    index = dict.fromkeys(load_file(model.path / "model.safetensors"), "part/model-1.safetensors")
    index |= dict.fromkeys(more, "model-2.safetensors") | {"mtp.norm.weight": "part/model-1.safetensors"}
    (folder / "model.safetensors").unlink()
    (folder / "part").mkdir()
    shutil.copy(model.path / "model.safetensors", folder / "part" / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=index)))
    assert torch.equal(LLM(folder, device="cpu").logits(PROMPT), expected)


@pytest.mark.parametrize(
    "change",
    [lambda t: t.transpose(1, 2).contiguous(), lambda t: t[:-1].contiguous(), lambda t: t[0].contiguous()],
)
def test_fused_experts_of_another_shape(
    change: Callable[[Tensor], Tensor], tiny: Callable[..., Any], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny("mixtral").path, tmp_path / "model"))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    rewrite(folder, lambda tensors: (fused := fuse(tensors)) | {name: change(fused[name])})
    with pytest.raises(InputError, match=rf"{name} has shape .* asks for \[8, 112, 48\]"):
        ModelFolder(folder)
