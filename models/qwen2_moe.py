"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B; arXiv 2407.10671): a shared expert beside the routed ones.

The shared expert sees every token and is scaled by a sigmoid gate; q, k and v have a bias; the chosen probabilities
are used as they are unless `norm_topk_prob` says otherwise; some layers may be dense.
"""

from collections.abc import Mapping
from typing import Any

from duomoe.models.architecture import Architecture
from duomoe.models.config import DEFAULTS, ModelConfig, count_layers, parse_config, sparse_layers
from duomoe.models.config_reader import ConfigReader
from duomoe.models.weights import QWEN_MLP, Sources, attention_sources, prefixed, qwen_mlp_sources, swiglu_sources

SLIDING, FULL = "sliding_attention", "full_attention"

# What absent keys mean, as in transformers' Qwen2MoeConfig.
QWEN2_DEFAULTS = DEFAULTS | {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "qkv_bias": True,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
}


def parse(raw: Mapping[str, Any]) -> ModelConfig:
    """Read a Qwen2-MoE config.json."""
    read = ConfigReader(raw, QWEN2_DEFAULTS)
    layers = count_layers(read)
    return parse_config(
        read,
        "qwen2_moe",
        moe_intermediate_size=read.count("moe_intermediate_size"),
        shared_intermediate_size=read.count("shared_expert_intermediate_size"),
        expert_keys=("num_experts", "num_local_experts"),
        norm_topk_prob=read.flag("norm_topk_prob"),
        qkv_bias=read.flag("qkv_bias"),
        windows=_windows(read, layers),
        is_moe=sparse_layers(read, layers),
    )


def _windows(read: ConfigReader, layers: int) -> tuple[int, ...]:
    """Return each layer's sliding window: by `layer_types`, or where it is not written, as transformers derives it."""
    slides, limit = read.flag("use_sliding_window"), read.count("max_window_layers", low=0)
    kinds = read.value("layer_types")
    if kinds is None:
        kinds = [SLIDING if slides and layer % 2 == 0 and layer < limit else FULL for layer in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in (SLIDING, FULL) for kind in kinds):
        raise read.unusable("layer_types", kinds, f"a list of {layers} entries, each {SLIDING} or {FULL}")
    # transformers gives a layer of kind SLIDING no window where use_sliding_window is false, and then cannot run it.
    window = read.optional_count("sliding_window") if slides and SLIDING in kinds else None
    return tuple((window or 0) if kind == SLIDING else 0 for kind in kinds)


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
