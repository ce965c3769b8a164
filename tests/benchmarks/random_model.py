"""Write a checkpoint of random weights in a real model's shape, for measurements where only the shape counts.

`python tests/benchmarks/random_model.py qwen3-30b 8 DIR` writes 8 layers of Qwen3-30B-A3B's shape, in bfloat16; a last
argument of fp8, awq or gptq has the experts quantised.
"""

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

from duomoe.models import architecture_of
from duomoe.models.model import expected_tensors

SHAPES = {
    "qwen3-30b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "vocab_size": 151936,
        "rope_theta": 1e6,
    },
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "rope_theta": 1e6,
    },
}
SHARED = {
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


QUANTIZATION: dict[str, dict[str, object]] = {
    "plain": {},
    "fp8": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    "awq": {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}},
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
}


def main(name: str, layers: str, folder: str, method: str = "plain") -> None:
    """Write the checkpoint, a file for each layer; weights are normal, small enough for activations to stay finite."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    raw = SHAPES[name] | SHARED | QUANTIZATION[method] | {"num_hidden_layers": int(layers)}
    (path / "config.json").write_text(json.dumps(raw))
    architecture = architecture_of(raw)
    files: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for tensor, shape in expected_tensors(architecture, architecture.parse(raw)):
        file = "model-" + (tensor.split(".")[2] if "layers" in tensor else "rest") + ".safetensors"
        files.setdefault(file, []).append((tensor, shape))

    def write(file: str) -> list[str]:
        tensors = dict(each for tensor, shape in files[file] for each in _random(tensor, shape, method))
        save_file(tensors, path / file)
        return list(tensors)

    with ThreadPoolExecutor(8) as pool:
        written = zip(files, pool.map(write, files), strict=True)
        index = {tensor: file for file, tensors in written for tensor in tensors}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _random(name: str, shape: tuple[int, ...], method: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a tensor is stored as."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if method == "plain" or ".experts." not in name:
        values = torch.randn(shape, device=device, dtype=torch.bfloat16) * (0.5 / shape[-1]) ** 0.5
        yield name, (values if len(shape) > 1 else torch.ones_like(values)).cpu()
        return
    (outer, inner), prefix = shape, name.removesuffix(".weight")
    if method == "fp8":
        sign = torch.randint(0, 2, shape, device=device, dtype=torch.uint8) << 7
        bits = torch.randint(0, 127, shape, device=device, dtype=torch.uint8) | sign  # 127 is NaN
        yield name, bits.view(torch.float8_e4m3fn).cpu()
        yield f"{prefix}.weight_scale_inv", torch.full((-(-outer // 128), -(-inner // 128)), 1e-4)
        return
    weight = (inner, outer // 8) if method == "awq" else (inner // 8, outer)
    for part, size in (("qweight", weight), ("qzeros", (inner // 128, outer // 8))):
        words = torch.randint(-(1 << 31), 1 << 31, size, device=device, dtype=torch.int64)
        yield f"{prefix}.{part}", words.int().cpu()
    yield f"{prefix}.scales", torch.full((inner // 128, outer), 1e-3, dtype=torch.float16)


if __name__ == "__main__":
    main(*sys.argv[1:])
