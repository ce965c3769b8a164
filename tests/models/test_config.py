"""Every key of every family's config.json, absent, null, empty and in both spellings, against transformers."""

import json
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
import transformers

from duomoe import InputError
from duomoe.models import ModelConfig, architecture_of
from duomoe.models.rope import Rotary

CLASSES = {
    "mixtral": (transformers.MixtralConfig, transformers.models.mixtral.modeling_mixtral.MixtralModel),
    "qwen2_moe": (transformers.Qwen2MoeConfig, transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeModel),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeModel),
}

BASE: dict[str, Any] = dict(
    vocab_size=211,
    hidden_size=96,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=16,
    num_key_value_heads=4,
    max_position_embeddings=256,
    moe_intermediate_size=24,
    shared_expert_intermediate_size=40,
    num_experts=8,
    num_experts_per_tok=3,
    norm_topk_prob=True,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    qkv_bias=False,
    attention_bias=True,
    use_sliding_window=True,
    sliding_window=7,
    max_window_layers=2,
    mlp_only_layers=[1],
    decoder_sparse_step=1,
    head_dim=20,
    eos_token_id=5,
    torch_dtype="bfloat16",
    hidden_act="silu",
    rope_theta=5e5,
)

ABSENT = object()

YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)

KEYS = [*BASE, "num_local_experts", "layer_types", "rope_scaling", "rope_parameters", "dtype", "quantization_config"]

# What may be written in more than one way, as changes of BASE.
SPELLINGS: dict[str, dict[str, Any]] = {
    "rope_scaling {} beside rope_parameters": dict(rope_scaling={}, rope_parameters=dict(rope_theta=3e4)),
    "rope_scaling null beside rope_parameters": dict(rope_scaling=None, rope_parameters=dict(rope_theta=3e4)),
    "rope_parameters {}": dict(rope_parameters={}),
    "rope_parameters {} beside rope_scaling": dict(rope_scaling=dict(type="linear", factor=2.0), rope_parameters={}),
    "rope_parameters beside rope_scaling": dict(
        rope_scaling=dict(type="linear", factor=2.0), rope_parameters=dict(rope_type="linear", factor=4.0)
    ),
    "rope_theta in both": dict(rope_parameters=dict(rope_theta=3e4, rope_type="default")),
    "rope_theta nowhere": dict(rope_theta=ABSENT, rope_parameters=dict(rope_type="default")),
    "rope_theta null": dict(rope_theta=None, rope_parameters=dict(rope_type="default")),
    "rope_theta null within": dict(rope_parameters=dict(rope_type="default", rope_theta=None)),
    "type beside rope_type": dict(rope_scaling=dict(type="linear", rope_type="default", factor=2.0)),
    "rope_type null": dict(rope_scaling=dict(type="linear", rope_type=None, factor=2.0)),
    "partial_rotary_factor null": dict(partial_rotary_factor=None),
    "yarn": dict(rope_scaling=YARN),
    "yarn, no original": dict(rope_scaling=dict(rope_type="yarn", factor=4.0)),
    "yarn, original outside": dict(rope_scaling=YARN, original_max_position_embeddings=32),
    "yarn, factor null": dict(rope_scaling=YARN | dict(factor=None)),
    "yarn, truncate null": dict(rope_scaling=YARN | dict(truncate=None)),
    "yarn, truncate false": dict(rope_scaling=YARN | dict(truncate=False)),
    "yarn, attention factor": dict(rope_scaling=YARN | dict(attention_factor=0.7)),
    "yarn, one mscale": dict(rope_scaling=YARN | dict(mscale=0.7)),
    "yarn, both mscales": dict(rope_scaling=YARN | dict(mscale=0.7, mscale_all_dim=0.3)),
    "yarn, nulls": dict(
        rope_scaling=YARN
        | dict(beta_fast=None, beta_slow=None, attention_factor=None, mscale=None, mscale_all_dim=None)
    ),
    "yarn, zeros": dict(rope_scaling=YARN | dict(beta_fast=0, beta_slow=0, mscale=0, mscale_all_dim=0)),
    "llama3": dict(rope_scaling=LLAMA3),
    "llama3, integers": dict(rope_scaling=LLAMA3 | dict(factor=8, low_freq_factor=1, high_freq_factor=4)),
    "dynamic": dict(rope_scaling=dict(type="dynamic", factor=2.0)),
    "dtype over torch_dtype": dict(dtype="float16"),
    "dtype null": dict(dtype=None),
    "torch_dtype null": dict(dtype="float16", torch_dtype=None),
    "both null": dict(dtype=None, torch_dtype=None),
    "num_local_experts": dict(num_experts=ABSENT, num_local_experts=6),
    "num_local_experts beside num_experts": dict(num_local_experts=6),
    "several ends": dict(eos_token_id=[5, 6]),
    "swish": dict(hidden_act="swish"),
    "layer_types": dict(layer_types=["full_attention", "sliding_attention", "full_attention"]),
    "no windows": dict(use_sliding_window=False),
    "no windows, and none stated": dict(use_sliding_window=False, sliding_window=None),
    "sparse step": dict(decoder_sparse_step=2, mlp_only_layers=ABSENT),
}

# What we read though transformers does not: null where a family has no such field, and what it spells otherwise.
READ_HERE_ONLY = [
    ("mixtral", dict(num_local_experts=None)),  # num_experts beside it is the one that counts
    ("qwen2_moe", dict(head_dim=None)),
    ("qwen3_moe", dict(head_dim=None)),
]

Facts = dict[str, Any]


def changed(family: str, change: dict[str, Any]) -> dict[str, Any]:
    raw = {**BASE, "model_type": family, **change}
    return {key: value for key, value in raw.items() if value is not ABSENT}


def theirs(raw: dict[str, Any]) -> Facts | None:
    """What transformers makes of a config; None where it refuses it, or cannot make a model of it."""
    config_class, model_class = CLASSES[raw["model_type"]]
    text = json.dumps({key: value for key, value in raw.items() if key != "model_type"})
    try:
        config = config_class(**json.loads(text))
        with torch.device("meta"):
            model = model_class(config)
        rotary = type(model.rotary_emb)(config)
        layers = model.layers
        experts = [layer.mlp.experts.gate_up_proj.shape if hasattr(layer.mlp, "experts") else None for layer in layers]
        ends = config.eos_token_id
        windows = [getattr(layer.self_attn, "sliding_window", None) or 0 for layer in layers]
        if raw["model_type"] == "mixtral":
            windows = [config.sliding_window or 0] * len(layers)
        return dict(
            embedding=tuple(model.embed_tokens.weight.shape),
            q=tuple(layers[0].self_attn.q_proj.weight.shape),
            k=tuple(layers[0].self_attn.k_proj.weight.shape),
            bias=(layers[0].self_attn.q_proj.bias is not None, layers[0].self_attn.o_proj.bias is not None),
            experts=[None if shape is None else tuple(shape) for shape in experts],
            dense=[layer.mlp.gate_proj.weight.shape[0] for layer in layers if hasattr(layer.mlp, "gate_proj")],
            shared=[
                layer.mlp.shared_expert.up_proj.weight.shape[0]
                for layer in layers
                if hasattr(layer.mlp, "shared_expert")
            ],
            top_k=config.num_experts_per_tok,
            norm_topk_prob=getattr(config, "norm_topk_prob", None) if raw["model_type"] != "mixtral" else True,
            eps=config.rms_norm_eps,
            tied=config.tie_word_embeddings,
            windows=windows,
            positions=config.max_position_embeddings,
            dtype=config.dtype or torch.float32,
            ends=tuple([] if ends is None else ends if isinstance(ends, list) else [ends]),
            rates=[round(rate, 7) for rate in rotary.inv_freq.tolist()],
            amplitude=pytest.approx(rotary.attention_scaling),
        )
    except Exception:
        return None


def ours(raw: dict[str, Any]) -> Facts | None:
    """What we make of it; None where we refuse it."""
    try:
        c: ModelConfig = architecture_of(raw).parse(raw)
    except InputError:
        return None
    rotary = Rotary(c.rope, torch.device("cpu"))
    expert = (c.num_experts, 2 * c.moe_intermediate_size, c.hidden_size)
    return dict(
        embedding=(c.vocab_size, c.hidden_size),
        q=(c.q_size, c.hidden_size),
        k=(c.kv_size, c.hidden_size),
        bias=(c.qkv_bias, c.o_bias),
        experts=[expert if moe else None for moe in c.is_moe],
        dense=[c.intermediate_size for moe in c.is_moe if not moe],
        shared=[c.shared_intermediate_size for moe in c.is_moe if moe and c.shared_intermediate_size],
        top_k=c.top_k,
        norm_topk_prob=c.norm_topk_prob,
        eps=c.rms_norm_eps,
        tied=c.tie_word_embeddings,
        windows=list(c.windows),
        positions=c.rope.max_position,
        dtype=c.dtype,
        ends=c.eos_token_ids,
        rates=[round(rate, 7) for rate in rotary.rates.tolist()],
        amplitude=rotary.amplitude,
    )


def single_changes() -> Iterator[tuple[str, Any]]:
    yield from product(KEYS, (ABSENT, None))
    yield from (("rope_scaling", {}), ("rope_parameters", {}), ("mlp_only_layers", []))


@pytest.mark.parametrize("family", CLASSES)
def test_absent_null_and_empty_mean_what_they_mean_to_transformers(family: str) -> None:
    for key, value in single_changes():
        raw, expected = changed(family, {key: value}), changed(family, {key: value})
        if (family, {key: value}) in READ_HERE_ONLY:
            del expected[key]
        assert (ours(raw), key, value) == (theirs(expected), key, value)


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("family", CLASSES)
def test_every_spelling_reads_as_transformers_reads_it(family: str, name: str) -> None:
    raw = changed(family, SPELLINGS[name])
    expected = dict(raw)
    if (family, name) == ("qwen2_moe", "num_local_experts"):  # which transformers does not know of this family
        expected["num_experts"] = expected.pop("num_local_experts")
    assert ours(raw) == theirs(expected)


@pytest.mark.parametrize("value", [0, -1, "", "8", [], {}, False, True, 1.5, 2.0, 10**30, 1e300, float("nan"), [[]]])
@pytest.mark.parametrize("family", CLASSES)
def test_a_value_of_another_kind_is_refused_or_read_as_transformers_reads_it(family: str, value: Any) -> None:
    for key in KEYS:
        raw = changed(family, {key: value})
        found = ours(raw)
        if found is not None:
            expected = theirs(raw)
            assert expected is None or (found, key) == (expected, key)
