"""Mixtral (8x7B, 8x22B; Jiang et al., arXiv 2401.04088): every layer has experts, whose weights are renormalised."""

from collections.abc import Mapping
from typing import Any

from duomoe.models.architecture import Architecture
from duomoe.models.config import ConfigReader, ModelConfig, count_layers, parse_config, uniform_window
from duomoe.models.weights import Sources, attention_sources, swiglu_sources


def parse(raw: Mapping[str, Any]) -> ModelConfig:
    """Read a Mixtral config.json."""
    read = ConfigReader(raw)
    layers = count_layers(raw)
    return parse_config(
        raw,
        "mixtral",
        moe_intermediate_size=read.count("intermediate_size"),
        norm_topk_prob=True,
        default_theta=1e6,
        default_eps=1e-5,
        windows=uniform_window(raw, layers),
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
