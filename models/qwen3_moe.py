"""Qwen3-MoE (30B-A3B, 235B-A22B; arXiv 2505.09388): query and key heads are normalised, no shared expert."""

from collections.abc import Mapping
from typing import Any

from duomoe.models.architecture import Architecture
from duomoe.models.config import ConfigReader, ModelConfig, count_layers, parse_config, sparse_layers, uniform_window
from duomoe.models.weights import QWEN_MLP, Sources, attention_sources, qwen_mlp_sources, swiglu_sources


def parse(raw: Mapping[str, Any]) -> ModelConfig:
    """Read a Qwen3-MoE config.json."""
    read = ConfigReader(raw)
    layers = count_layers(raw)
    sliding = read.flag("use_sliding_window", default=False)
    bias = read.flag("attention_bias", default=False)
    return parse_config(
        raw,
        "qwen3_moe",
        moe_intermediate_size=read.count("moe_intermediate_size"),
        norm_topk_prob=read.flag("norm_topk_prob", default=False),
        default_theta=1e4,
        default_eps=1e-6,
        qkv_bias=bias,
        o_bias=bias,
        windows=uniform_window(raw, layers, default=4096) if sliding else (0,) * layers,
        is_moe=sparse_layers(raw, layers),
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
