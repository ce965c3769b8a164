"""Write a checkpoint of random weights in a real model's shape, for measurements where only the shape counts.

`python tests/benchmarks/random_model.py qwen3-30b 8 DIR` writes 8 layers of Qwen3-30B-A3B's shape.
"""

import json
import sys
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


def main(name: str, layers: str, folder: str) -> None:
    """Write the checkpoint, a file for each layer; weights are normal, small enough for activations to stay finite."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    raw = SHAPES[name] | SHARED | {"num_hidden_layers": int(layers)}
    (path / "config.json").write_text(json.dumps(raw))
    architecture = architecture_of(raw)
    files: dict[str, dict[str, torch.Tensor]] = {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for tensor, shape in expected_tensors(architecture, architecture.parse(raw)):
        file = "model-" + (tensor.split(".")[2] if "layers" in tensor else "rest") + ".safetensors"
        values = torch.randn(shape, device=device, dtype=torch.bfloat16) * (0.5 / shape[-1]) ** 0.5
        files.setdefault(file, {})[tensor] = (values if len(shape) > 1 else torch.ones_like(values)).cpu()
    for file, tensors in files.items():
        save_file(tensors, path / file)
    index = {tensor: file for file, tensors in files.items() for tensor in tensors}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


if __name__ == "__main__":
    main(*sys.argv[1:])
