"""Qwen3-MoE (30B-A3B, 235B-A22B; arXiv 2505.09388): query and key heads are normalised, no shared expert."""

from collections.abc import Mapping
from typing import Any

from duomoe.models.architecture import Architecture
from duomoe.models.config import DEFAULTS, ModelConfig, count_layers, parse_config, sparse_layers
from duomoe.models.config_reader import ConfigReader
from duomoe.models.weights import QWEN_MLP, Sources, attention_sources, qwen_mlp_sources, swiglu_sources

# What absent keys mean, as in transformers' Qwen3MoeConfig.
QWEN3_DEFAULTS = DEFAULTS | {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "num_local_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
}


def parse(raw: Mapping[str, Any]) -> ModelConfig:
    """Read a Qwen3-MoE config.json."""
    read = ConfigReader(raw, QWEN3_DEFAULTS)
    layers = count_layers(read)
    window = read.optional_count("sliding_window") if read.flag("use_sliding_window") else None
    bias = read.flag("attention_bias")
    return parse_config(
        read,
        "qwen3_moe",
        moe_intermediate_size=read.count("moe_intermediate_size"),
        expert_keys=("num_local_experts", "num_experts"),
        norm_topk_prob=read.flag("norm_topk_prob"),
        qkv_bias=bias,
        o_bias=bias,
        windows=(window or 0,) * layers,
        is_moe=sparse_layers(read, layers),
    )


def block_sources(c: ModelConfig, layer: int) -> dict[str, Sources]:
    """Name the checkpoint tensors of a block."""
    prefix = f"model.layers.{layer}"
    norms: dict[str, Sources] = {
        name: [(f"{prefix}.self_attn.{name}.weight", (c.head_dim,))] for name in ("q_norm", "k_norm")
    }
    return attention_sources(c, prefix) | norms | qwen_mlp_sources(c, prefix, layer)


def expert_sources(c: ModelConfig, layer: int, expert: int) -> dict[str, Sources]:
    """Name the checkpoint tensors of an expert."""
    return swiglu_sources(c, f"model.layers.{layer}.mlp.experts.{expert}", c.moe_intermediate_size, QWEN_MLP)


QWEN3_MOE = Architecture(parse, block_sources, expert_sources)
