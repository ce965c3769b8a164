"""Mixtral (8x7B, 8x22B; Jiang et al., arXiv 2401.04088): every layer has experts, whose weights are renormalised."""

from collections.abc import Mapping
from typing import Any

from duomoe.models.architecture import Architecture
from duomoe.models.config import DEFAULTS, ModelConfig, count_layers, parse_config
from duomoe.models.config_reader import ConfigReader
from duomoe.models.weights import Sources, attention_sources, swiglu_sources

# What absent keys mean, as in transformers' MixtralConfig.
MIXTRAL_DEFAULTS = DEFAULTS | {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "eos_token_id": 2,
}


def parse(raw: Mapping[str, Any]) -> ModelConfig:
    """Read a Mixtral config.json."""
    read = ConfigReader(raw, MIXTRAL_DEFAULTS)
    layers = count_layers(read)
    return parse_config(
        read,
        "mixtral",
        moe_intermediate_size=read.count("intermediate_size"),
        expert_keys=("num_experts", "num_local_experts"),
        norm_topk_prob=True,
        windows=(read.optional_count("sliding_window") or 0,) * layers,
        is_moe=(True,) * layers,
    )


def block_sources(c: ModelConfig, layer: int) -> dict[str, Sources]:
    """Name the checkpoint tensors of a block."""
    prefix = f"model.layers.{layer}"
    sources = attention_sources(c, prefix)
    sources["router"] = [(f"{prefix}.block_sparse_moe.gate.weight", (c.num_experts, c.hidden_size))]
    return sources


def expert_sources(c: ModelConfig, layer: int, expert: int) -> dict[str, Sources]:
    """Name the checkpoint tensors of an expert."""
    prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
    return swiglu_sources(c, prefix, c.moe_intermediate_size, ("w1", "w3", "w2"))


MIXTRAL = Architecture(parse, block_sources, expert_sources)
