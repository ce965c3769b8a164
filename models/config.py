"""What a model's config.json says, in one spelling: old and new Hugging Face names are read alike."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from duomoe.errors import InputError
from duomoe.kernels.quantised import FP8_BLOCK, INT4_GROUPS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

MAX_LAYERS = 10_000

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")


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
class Quantization:
    """How a checkpoint's linear layers are quantised; those that it stores as they are have a plain weight."""

    method: str  # 'fp8', 'awq' or 'gptq'
    group_size: int  # inputs that share a scale (fp8: and as many outputs)
    zero_offset: int = 0  # what is to be added to a stored zero point; GPTQ's first version stores one less
    dynamic_activations: bool = False  # fp8: activations are to be multiplied in fp8, too, scaled as they come


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


class ConfigReader:
    """Typed access to a config.json; every complaint names the key.

    Raises:
        InputError: from any method, when a value is missing, of the wrong type or out of range.
    """

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw

    def count(self, *keys: str, default: int | None = None, low: int = 1) -> int:
        """Return the first of `keys` that is set, as an integer of at least `low`."""
        value = self._first(keys, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**31:
            raise InputError(f"config.json: {keys[0]} must be a whole number of at least {low}, found {_short(value)}")
        return value

    def number(self, *keys: str, default: float | None = None) -> float:
        """Return the first of `keys` that is set, as a positive number."""
        value = self._first(keys, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
            raise InputError(f"config.json: {keys[0]} must be a positive number, found {_short(value)}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean."""
        value = self._first((key,), default)
        if not isinstance(value, bool):
            raise InputError(f"config.json: {key} must be true or false, found {value!r}")
        return value

    def _first(self, keys: tuple[str, ...], default: Any) -> Any:
        for key in keys:
            if self.raw.get(key) is not None:
                return self.raw[key]
        if default is None:
            raise InputError(f"config.json: {keys[0]} is missing")
        return default


def parse_config(
    raw: Mapping[str, Any],
    family: str,
    *,
    moe_intermediate_size: int,
    shared_intermediate_size: int = 0,
    norm_topk_prob: bool,
    default_theta: float,
    default_eps: float,
    qkv_bias: bool = False,
    o_bias: bool = False,
    windows: tuple[int, ...],
    is_moe: tuple[bool, ...],
) -> ModelConfig:
    """Read what all families share; the caller, a model's own `parse`, gives what they spell or default differently.

    Raises:
        InputError: when a value is missing, malformed, or not supported.
    """
    read = ConfigReader(raw)
    if raw.get("hidden_act", "silu") != "silu":
        raise InputError(f"config.json: hidden_act {raw['hidden_act']!r} is not supported; only 'silu' is")

    hidden, heads = read.count("hidden_size"), read.count("num_attention_heads")
    kv_heads = read.count("num_key_value_heads", default=heads)
    head_dim = read.count("head_dim", default=max(hidden // heads, 1))
    if heads % kv_heads:
        raise InputError(f"config.json: {heads} attention heads cannot share {kv_heads} key-value heads evenly")
    if head_dim % 2:
        raise InputError(f"config.json: head_dim must be even for rotary embedding, found {head_dim}")
    experts, top_k = read.count("num_local_experts", "num_experts"), read.count("num_experts_per_tok")
    if top_k > experts:
        raise InputError(f"config.json: num_experts_per_tok is {top_k}, but there are only {experts} experts")

    rope = _parse_rope(raw, head_dim, default_theta)
    stretched = rope.factor if rope.kind in ("linear", "dynamic", "yarn") else 1.0
    trained = rope.original_max_position if rope.kind == "yarn" else rope.max_position
    return ModelConfig(
        family=family,
        vocab_size=read.count("vocab_size"),
        hidden_size=hidden,
        num_layers=read.count("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=read.count("intermediate_size"),
        moe_intermediate_size=moe_intermediate_size,
        shared_intermediate_size=shared_intermediate_size,
        num_experts=experts,
        top_k=top_k,
        norm_topk_prob=norm_topk_prob,
        rms_norm_eps=read.number("rms_norm_eps", default=default_eps),
        tie_word_embeddings=read.flag("tie_word_embeddings", default=False),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        windows=windows,
        is_moe=is_moe,
        max_position=max(rope.max_position, int(trained * stretched)),
        rope=rope,
        dtype=_parse_dtype(raw),
        eos_token_ids=token_ids(raw.get("eos_token_id"), "config.json"),
        quantization=parse_quantization(raw.get("quantization_config")),
    )


def parse_quantization(raw: Any) -> Quantization | None:
    """Read a config.json's `quantization_config`; None where there is none.

    Raises:
        InputError: when it is malformed, or says something that is not supported.
    """
    if raw is None:
        return None
    where = "config.json: quantization_config"
    if not isinstance(raw, Mapping):
        raise InputError(f"{where}: the checkpoint is quantised, but how must be an object, found {_short(raw)}")
    method = raw.get("quant_method")

    def require(key: str, value: object, *allowed: object) -> None:
        if value not in allowed:
            known = ", ".join(map(str, allowed))
            raise InputError(f"{where}: {key} {_short(value)} is not supported for {method}; supported: {known}")

    if method == "fp8":
        require("fmt", raw.get("fmt", "e4m3"), "e4m3")
        require("weight_block_size", raw.get("weight_block_size"), [FP8_BLOCK, FP8_BLOCK])
        dynamic = raw.get("activation_scheme", "dynamic") == "dynamic"
        return Quantization("fp8", FP8_BLOCK, dynamic_activations=dynamic)
    if method not in ("awq", "gptq"):
        raise InputError(f"{where}: this checkpoint is quantised by {_short(method)}; supported: fp8, awq, gptq")
    group = raw.get("group_size", raw.get("q_group_size"))
    require("bits", raw.get("bits", raw.get("w_bit")), 4)
    require("group_size", group, *INT4_GROUPS)
    if method == "awq":
        require("version", str(raw.get("version", "gemm")).lower(), "gemm")
        require("zero_point", raw.get("zero_point", True), True)
        return Quantization("awq", int(group))
    if not raw.get("static_groups"):
        require("desc_act", raw.get("desc_act", False), False)
    require("checkpoint_format", raw.get("checkpoint_format", "gptq"), "gptq", "gptq_v2")
    return Quantization("gptq", int(group), zero_offset=0 if raw.get("checkpoint_format") == "gptq_v2" else 1)


def count_layers(raw: Mapping[str, Any]) -> int:
    """Return the number of layers, having checked that it is one that can be enumerated."""
    layers = ConfigReader(raw).count("num_hidden_layers")
    if layers > MAX_LAYERS:
        raise InputError(f"config.json: num_hidden_layers is {layers}; at most {MAX_LAYERS} make sense")
    return layers


def uniform_window(raw: Mapping[str, Any], layers: int, default: int = 0) -> tuple[int, ...]:
    """Return the sliding window that every layer of `layers` has, 0 where the config has none."""
    window = raw.get("sliding_window", default) or 0
    return (ConfigReader({"sliding_window": window}).count("sliding_window", low=0),) * layers


def sparse_layers(raw: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """Return which layers have experts: every `decoder_sparse_step`-th that is not in `mlp_only_layers` (Qwen)."""
    step = ConfigReader(raw).count("decoder_sparse_step", default=1)
    dense = raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise InputError(f"config.json: mlp_only_layers must be a list of layer numbers, found {dense!r}")
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))


def token_ids(value: Any, source: str) -> tuple[int, ...]:
    """Return a config's token id or list of token ids as a tuple; `source` is the file's name, for complaints."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
        raise InputError(f"{source}: eos_token_id must be a token id or a list of them, found {value!r}")
    return tuple(ids)


def _parse_dtype(raw: Mapping[str, Any]) -> torch.dtype:
    found = next((raw[key] for key in ("dtype", "torch_dtype") if raw.get(key) is not None), "float32")
    name = found.removeprefix("torch.") if isinstance(found, str) else None
    if name not in DTYPES:
        raise InputError(f"config.json: dtype {_short(found)} is not supported; supported: {', '.join(DTYPES)}")
    return DTYPES[name]


def _parse_rope(raw: Mapping[str, Any], head_dim: int, default_theta: float) -> RopeConfig:
    """Read `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before)."""
    found: Any = next((raw[key] for key in ("rope_scaling", "rope_parameters") if raw.get(key) is not None), {})
    if not isinstance(found, Mapping) or any(isinstance(value, Mapping) for value in found.values()):
        raise InputError(f"config.json: rope_parameters must be one flat object, found {_short(found)}")
    inherited = {"rope_theta": raw.get("rope_theta", default_theta)}
    read = ConfigReader({**inherited, **{key: value for key, value in found.items() if value is not None}})
    kind = read.raw.get("rope_type", read.raw.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_KINDS:
        raise InputError(f"config.json: RoPE type {_short(kind)} is not supported; supported: {', '.join(ROPE_KINDS)}")
    if read.number("partial_rotary_factor", default=raw.get("partial_rotary_factor") or 1.0) != 1.0:
        raise InputError("config.json: a partial_rotary_factor other than 1 is not supported")
    max_position = ConfigReader(raw).count("max_position_embeddings")
    original = raw.get("original_max_position_embeddings") or read.raw.get("original_max_position_embeddings")
    original = ConfigReader({"original_max_position_embeddings": original or max_position}).count(
        "original_max_position_embeddings"
    )
    if kind == "yarn":
        factor = read.number("factor", default=max_position / original)
    else:
        factor = 1.0 if kind == "default" else read.number("factor")
    theta = read.number("rope_theta")
    low, high = read.number("low_freq_factor", default=1.0), read.number("high_freq_factor", default=4.0)
    if theta <= 1:
        raise InputError(f"config.json: rope_theta must be greater than 1, found {theta}")
    if low >= high:
        raise InputError(f"config.json: low_freq_factor {low} must be less than high_freq_factor {high}")
    return RopeConfig(
        kind=kind,
        theta=theta,
        head_dim=head_dim,
        max_position=max_position,
        factor=factor,
        original_max_position=original,
        attention_factor=read.number("attention_factor") if "attention_factor" in read.raw else None,
        beta_fast=read.number("beta_fast", default=32.0),
        beta_slow=read.number("beta_slow", default=1.0),
        mscale=read.number("mscale") if read.raw.get("mscale") else 0.0,
        mscale_all_dim=read.number("mscale_all_dim") if read.raw.get("mscale_all_dim") else 0.0,
        truncate=read.flag("truncate", default=True),
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _short(value: object) -> str:
    """Return a value for a message of one line."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**20 else "an absurdly large one"
    return text if len(text) <= 60 else text[:57] + "..."
