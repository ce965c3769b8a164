"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B; arXiv 2407.10671): a shared expert beside the routed ones.

The shared expert sees every token and is scaled by a sigmoid gate; q, k and v have a bias; the chosen probabilities
are used as they are unless `norm_topk_prob` says otherwise; some layers may be dense.
"""

from collections.abc import Mapping
from typing import Any

from duomoe.errors import InputError
from duomoe.models.architecture import Architecture
from duomoe.models.config import ConfigReader, ModelConfig, count_layers, parse_config, sparse_layers, uniform_window
from duomoe.models.weights import QWEN_MLP, Sources, attention_sources, prefixed, qwen_mlp_sources, swiglu_sources


def parse(raw: Mapping[str, Any]) -> ModelConfig:
    """Read a Qwen2-MoE config.json."""
    read = ConfigReader(raw)
    layers = count_layers(raw)
    return parse_config(
        raw,
        "qwen2_moe",
        moe_intermediate_size=read.count("moe_intermediate_size"),
        shared_intermediate_size=read.count("shared_expert_intermediate_size"),
        norm_topk_prob=read.flag("norm_topk_prob", default=False),
        default_theta=1e4,
        default_eps=1e-6,
        qkv_bias=read.flag("qkv_bias", default=True),
        windows=_windows(raw, layers),
        is_moe=sparse_layers(raw, layers),
    )


def _windows(raw: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Return each layer's sliding window: by `layer_types`, or where it is not written, as transformers derives it."""
    if not ConfigReader(raw).flag("use_sliding_window", default=False):
        return (0,) * layers
    limit = ConfigReader(raw).count("max_window_layers", default=28, low=0)
    derived = ["sliding_attention" if layer % 2 == 0 and layer < limit else "full_attention" for layer in range(layers)]
    kinds = raw.get("layer_types") or derived
    known = ("sliding_attention", "full_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in known for kind in kinds):
        raise InputError(f"config.json: layer_types must be a list of {layers} entries, each one of {', '.join(known)}")
    window = uniform_window(raw, 1, default=4096)[0]
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def block_sources(c: ModelConfig, layer: int) -> dict[str, Sources]:
    """Name the checkpoint tensors of a block."""
    prefix = f"model.layers.{layer}"
    sources = attention_sources(c, prefix) | qwen_mlp_sources(c, prefix, layer)
    if c.is_moe[layer]:
        shared = swiglu_sources(c, f"{prefix}.mlp.shared_expert", c.shared_intermediate_size, QWEN_MLP)
        sources |= prefixed("shared_", shared)
        sources["shared_gate"] = [(f"{prefix}.mlp.shared_expert_gate.weight", (1, c.hidden_size))]
    return sources


def expert_sources(c: ModelConfig, layer: int, expert: int) -> dict[str, Sources]:
    """Name the checkpoint tensors of an expert."""
    return swiglu_sources(c, f"model.layers.{layer}.mlp.experts.{expert}", c.moe_intermediate_size, QWEN_MLP)


QWEN2_MOE = Architecture(parse, block_sources, expert_sources)
