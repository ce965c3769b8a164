"""What a model's config.json says, in one spelling: old and new Hugging Face names are read alike."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from duomoe.errors import InputError
from duomoe.models.config_reader import MAX_SIZE, ConfigReader, short
from duomoe.models.quantization import Quantization, parse_quantization

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_KEYS = ("dtype", "torch_dtype")

# Two names of one function.
ACTIVATIONS = ("silu", "swish")

# What can be enumerated, and held.
MAX_LAYERS, MAX_EXPERTS, MAX_HEADS, MAX_HEAD_DIM = 10_000, 65_536, 65_536, 65_536

# By how much a context may be stretched, and what else scales rotary embedding: beyond these, float32 does not hold it.
STRETCH, SCALE = (1e-6, 1e6), (1e-6, 1e6)

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")

# What absent keys of `rope_parameters` mean, beside rope_theta, which is the family's.
ROPE_DEFAULTS: dict[str, Any] = {
    "rope_type": "default",
    "partial_rotary_factor": None,
    "factor": None,
    "attention_factor": None,
    "beta_fast": None,
    "beta_slow": None,
    "mscale": None,
    "mscale_all_dim": None,
    "truncate": True,
}

# What absent keys of any family's config mean; the families' own defaults stand beside their `parse`.
DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "head_dim": None,
    "tie_word_embeddings": False,
    "rope_theta": 1e4,
    "rope_parameters": None,
    "quantization_config": None,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: its base and how it is stretched beyond the training context."""

    kind: str  # one of ROPE_KINDS
    theta: float
    head_dim: int
    max_position: int  # max_position_embeddings, in tokens
    factor: float = 1.0
    original_max_position: int = 0  # tokens, before stretching (yarn, llama3)
    attention_factor: float | None = None  # yarn; None derives it from the factor
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0

    @property
    def depends_on_length(self) -> bool:
        """Whether a token's key depends on how long its sequence was when the key was made."""
        return self.kind == "dynamic"


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. Sizes are in elements; tuples have one entry per layer."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int  # of a dense layer's MLP
    moe_intermediate_size: int
    shared_intermediate_size: int  # of the shared expert; 0 without one
    num_experts: int
    top_k: int
    norm_topk_prob: bool
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    windows: tuple[int, ...]  # attention window of each layer; 0 sees everything
    is_moe: tuple[bool, ...]
    max_position: int  # longest sequence the checkpoint is made for, RoPE scaling included
    rope: RopeConfig
    dtype: torch.dtype  # of the checkpoint
    eos_token_ids: tuple[int, ...]
    quantization: Quantization | None  # of the checkpoint

    @property
    def q_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads (and of all value heads)."""
        return self.num_kv_heads * self.head_dim

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Return the numbers of the layers that have experts."""
        return tuple(layer for layer, moe in enumerate(self.is_moe) if moe)


def parse_config(
    read: ConfigReader,
    family: str,
    *,
    moe_intermediate_size: int,
    shared_intermediate_size: int = 0,
    expert_keys: tuple[str, ...],
    norm_topk_prob: bool,
    qkv_bias: bool = False,
    o_bias: bool = False,
    windows: tuple[int, ...],
    is_moe: tuple[bool, ...],
) -> ModelConfig:
    """Read what all families share; the caller, a model's own `parse`, gives what they spell differently.

    Raises:
        InputError: when a value is missing, malformed, or not supported.
    """
    read.choice("hidden_act", of=ACTIVATIONS)
    hidden, heads = read.count("hidden_size"), read.count("num_attention_heads", high=MAX_HEADS)
    kv_heads = read.count("num_key_value_heads", high=MAX_HEADS)
    head_dim = read.optional_count("head_dim") or max(hidden // heads, 1)
    if heads % kv_heads:
        raise InputError(f"config.json: {heads} attention heads cannot share {kv_heads} key-value heads evenly")
    if head_dim % 2 or head_dim > MAX_HEAD_DIM:
        raise InputError(
            f"config.json: head_dim must be even for rotary embedding, and at most {MAX_HEAD_DIM}, found {head_dim}"
        )
    experts = read.count(*expert_keys, high=MAX_EXPERTS)
    top_k = read.count("num_experts_per_tok")
    if top_k > experts:
        raise InputError(f"config.json: num_experts_per_tok is {top_k}, but there are only {experts} experts")

    rope = _parse_rope(read, head_dim)
    stretched = rope.factor if rope.kind in ("linear", "dynamic", "yarn") else 1.0
    trained = rope.original_max_position if rope.kind == "yarn" else rope.max_position
    return ModelConfig(
        family=family,
        vocab_size=read.count("vocab_size"),
        hidden_size=hidden,
        num_layers=count_layers(read),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=read.count("intermediate_size"),
        moe_intermediate_size=moe_intermediate_size,
        shared_intermediate_size=shared_intermediate_size,
        num_experts=experts,
        top_k=top_k,
        norm_topk_prob=norm_topk_prob,
        rms_norm_eps=read.number("rms_norm_eps"),
        tie_word_embeddings=read.flag("tie_word_embeddings"),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        windows=windows,
        is_moe=is_moe,
        max_position=min(max(rope.max_position, int(trained * stretched)), MAX_SIZE),
        rope=rope,
        dtype=_parse_dtype(read),
        eos_token_ids=token_ids(read.value("eos_token_id"), "config.json"),
        quantization=parse_quantization(read.value("quantization_config")),
    )


def count_layers(read: ConfigReader) -> int:
    """Return the number of layers, having checked that it is one that can be enumerated."""
    return read.count("num_hidden_layers", high=MAX_LAYERS)


def sparse_layers(read: ConfigReader, layers: int) -> tuple[bool, ...]:
    """Return which layers have experts: every `decoder_sparse_step`-th that is not in `mlp_only_layers` (Qwen)."""
    step = read.count("decoder_sparse_step")
    value = read.value("mlp_only_layers")
    dense = [] if value is None else value
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise read.unusable("mlp_only_layers", value, "a list of layer numbers")
    plain = set(dense)
    return tuple(layer not in plain and (layer + 1) % step == 0 for layer in range(layers))


def token_ids(value: Any, source: str) -> tuple[int, ...]:
    """Return a config's token id or list of token ids as a tuple; `source` is the file's name, for complaints."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
        raise InputError(f"{source}: eos_token_id must be a token id or a list of them, found {short(value)}")
    return tuple(ids)


def states_dtype(raw: Mapping[str, Any]) -> bool:
    """Return whether a config.json says of which dtype the weights are."""
    return any(raw.get(key) is not None for key in DTYPE_KEYS)


def _parse_dtype(read: ConfigReader) -> torch.dtype:
    found = next((read.raw[key] for key in DTYPE_KEYS if read.raw.get(key) is not None), "float32")
    name = found.removeprefix("torch.") if isinstance(found, str) else None
    if name not in DTYPES:
        raise read.unusable("dtype", found, f"one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _parse_rope(config: ConfigReader, head_dim: int) -> RopeConfig:
    """Read `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before)."""
    found = config.raw.get("rope_scaling") or config.value("rope_parameters")
    found = {} if found is None else found
    if not isinstance(found, Mapping) or any(isinstance(value, Mapping) for value in found.values()):
        raise config.unusable("rope_parameters", found, "one flat object")
    max_position = config.count("max_position_embeddings")
    # What these do not say may stand beside them.
    beside = {key: config.raw[key] for key in ("rope_theta", "partial_rotary_factor") if key in config.raw}
    defaults = ROPE_DEFAULTS | {
        "rope_theta": config.defaults["rope_theta"],
        "original_max_position_embeddings": max_position,
    }
    read = ConfigReader(found, defaults | beside, "config.json: rope_parameters")
    kind = read.choice("rope_type", "type", of=ROPE_KINDS)
    # transformers 5 ignores it for the default kind, and old versions applied it; nobody can have meant both.
    if read.value("partial_rotary_factor") not in (None, 1):
        raise InputError("config.json: a partial_rotary_factor other than 1 is not supported")
    theta = read.number("rope_theta", 1.001)
    rope = RopeConfig(kind, theta, head_dim, max_position)
    if kind == "default":
        return rope
    if kind == "dynamic" and head_dim == 2:
        raise InputError("config.json: RoPE of type dynamic needs a head_dim of more than 2")
    if kind in ("linear", "dynamic"):
        return replace(rope, factor=read.number("factor", *STRETCH))
    # At the top level it takes precedence.
    stated = config if "original_max_position_embeddings" in config.raw else read
    rope = replace(rope, original_max_position=stated.count("original_max_position_embeddings"))
    return _parse_yarn(read, rope) if kind == "yarn" else _parse_llama3(read, rope)


def _parse_yarn(read: ConfigReader, rope: RopeConfig) -> RopeConfig:
    factor = rope.max_position / rope.original_max_position
    return replace(
        rope,
        factor=factor if read.value("factor") is None else read.number("factor", *STRETCH),
        attention_factor=None if read.value("attention_factor") is None else read.number("attention_factor", *SCALE),
        beta_fast=read.optional_number("beta_fast", *SCALE) or 32.0,
        beta_slow=read.optional_number("beta_slow", *SCALE) or 1.0,
        mscale=read.optional_number("mscale", *SCALE) or 0.0,
        mscale_all_dim=read.optional_number("mscale_all_dim", *SCALE) or 0.0,
        truncate=read.value("truncate") is not None and read.flag("truncate"),
    )


def _parse_llama3(read: ConfigReader, rope: RopeConfig) -> RopeConfig:
    low, high = read.number("low_freq_factor", *SCALE), read.number("high_freq_factor", *SCALE)
    if low >= high:
        raise InputError(f"config.json: low_freq_factor {low} must be less than high_freq_factor {high}")
    return replace(rope, factor=read.number("factor", *STRETCH), low_freq_factor=low, high_freq_factor=high)
