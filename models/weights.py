"""The tensors of a block and the checkpoint tensors that fill them."""

from typing import NamedTuple

from torch import Tensor

from duomoe.models.config import ModelConfig

# A parameter is filled by checkpoint tensors stacked along its first dimension: each one's name and shape.
Sources = list[tuple[str, tuple[int, ...]]]

QWEN_MLP = ("gate_proj", "up_proj", "down_proj")


class BlockWeights(NamedTuple):
    """The non-expert weights of one block; None where a family or a layer has none.

    A named tuple, so that one compiled function serves all layers with the weights as its input.
    """

    input_norm: Tensor  # [hidden]
    qkv: Tensor  # [q_size + 2 * kv_size, hidden]
    o: Tensor  # [hidden, q_size]
    post_norm: Tensor  # [hidden]
    qkv_bias: Tensor | None = None  # [q_size + 2 * kv_size]
    o_bias: Tensor | None = None  # [hidden]
    q_norm: Tensor | None = None  # [head_dim]
    k_norm: Tensor | None = None  # [head_dim]
    router: Tensor | None = None  # [experts, hidden]
    shared_gate_up: Tensor | None = None  # [2 * shared_intermediate, hidden]
    shared_down: Tensor | None = None  # [hidden, shared_intermediate]
    shared_gate: Tensor | None = None  # [1, hidden]
    dense_gate_up: Tensor | None = None  # [2 * intermediate, hidden]
    dense_down: Tensor | None = None  # [hidden, intermediate]


def attention_sources(c: ModelConfig, prefix: str) -> dict[str, Sources]:
    """Return what the attention half of a block is filled from; `prefix` is as 'model.layers.3'."""
    attn = f"{prefix}.self_attn"
    rows = {"q_proj": c.q_size, "k_proj": c.kv_size, "v_proj": c.kv_size}
    sources: dict[str, Sources] = {
        "input_norm": [(f"{prefix}.input_layernorm.weight", (c.hidden_size,))],
        "qkv": [(f"{attn}.{name}.weight", (size, c.hidden_size)) for name, size in rows.items()],
        "o": [(f"{attn}.o_proj.weight", (c.hidden_size, c.q_size))],
        "post_norm": [(f"{prefix}.post_attention_layernorm.weight", (c.hidden_size,))],
    }
    if c.qkv_bias:
        sources["qkv_bias"] = [(f"{attn}.{name}.bias", (size,)) for name, size in rows.items()]
    if c.o_bias:
        sources["o_bias"] = [(f"{attn}.o_proj.bias", (c.hidden_size,))]
    return sources


def swiglu_sources(c: ModelConfig, prefix: str, size: int, names: tuple[str, str, str]) -> dict[str, Sources]:
    """Return what a SwiGLU MLP is filled from: `gate_up`, the fused gate and up projections, and `down`.

    `names` are those of gate, up and down under `prefix`; `size` is the MLP's intermediate size.
    """
    gate, up, down = (f"{prefix}.{name}.weight" for name in names)
    return {
        "gate_up": [(gate, (size, c.hidden_size)), (up, (size, c.hidden_size))],
        "down": [(down, (c.hidden_size, size))],
    }


def prefixed(prefix: str, sources: dict[str, Sources]) -> dict[str, Sources]:
    """Return `sources` under the BlockWeights fields that begin with `prefix`."""
    return {prefix + name: value for name, value in sources.items()}


def qwen_mlp_sources(c: ModelConfig, prefix: str, layer: int) -> dict[str, Sources]:
    """Return what Qwen's blocks have after attention: a router, or in a dense layer an MLP."""
    if c.is_moe[layer]:
        return {"router": [(f"{prefix}.mlp.gate.weight", (c.num_experts, c.hidden_size))]}
    return prefixed("dense_", swiglu_sources(c, f"{prefix}.mlp", c.intermediate_size, QWEN_MLP))
