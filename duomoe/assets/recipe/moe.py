"""The embedded model as it is trained: a Qwen3-MoE decoder with every expert computed at once.

A Mixture-of-Experts layer with E experts of width F is a dense SwiGLU layer of width E x F whose
hidden activations are multiplied, expert by expert, by the router's weights (zero for the experts
that were not chosen).  With experts this narrow, one large matrix product over all of them is faster
than gathering the four that a token needs, and it is exactly the same function.

Weights are exported in the layout of Qwen3-MoE checkpoints, one tensor per expert.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class MoeConfig:
    """Shape of the model."""

    vocab_size: int = 4096
    hidden: int = 224
    layers: int = 8
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 32
    top_k: int = 4
    expert_width: int = 32
    rope_theta: float = 10_000.0
    context: int = 4096
    norm_eps: float = 1e-6
    aux_coefficient: float = 0.01

    def to_hugging_face(self) -> dict[str, object]:
        """The ``config.json`` that describes this shape to transformers."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "decoder_sparse_step": 1,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.experts * self.expert_width,
            "max_position_embeddings": self.context,
            "mlp_only_layers": [],
            "moe_intermediate_size": self.expert_width,
            "norm_topk_prob": True,
            "num_attention_heads": self.heads,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "output_router_logits": False,
            "rms_norm_eps": self.norm_eps,
            "rope_scaling": None,
            "rope_theta": self.rope_theta,
            "router_aux_loss_coef": self.aux_coefficient,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": self.vocab_size,
        }


class RmsNorm(nn.Module):
    """Root-mean-square normalisation, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.float()).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the rotate-half convention."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query causal attention with per-head RMS norms on queries and keys."""

    def __init__(self, config: MoeConfig) -> None:
        super().__init__()
        self.config = config
        self.q_proj = nn.Linear(config.hidden, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden, config.kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.hidden, bias=False)
        self.q_norm = RmsNorm(config.head_dim, config.norm_eps)
        self.k_norm = RmsNorm(config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend over [batch, length, hidden]; ``cos`` and ``sin`` are the rotary tables of its positions."""
        batch, length, _ = x.shape
        shape = (batch, length, -1, self.config.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2), cos, sin)
        k = rotate(self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        repeats = self.config.heads // self.config.kv_heads
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True)
        merged: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
        return merged


class DenseExperts(nn.Module):
    """All experts as one wide SwiGLU layer, gated per expert by the router."""

    def __init__(self, config: MoeConfig) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(config.hidden, config.experts, bias=False)
        self.gate = nn.Parameter(torch.empty(config.experts, config.expert_width, config.hidden))
        self.up = nn.Parameter(torch.empty(config.experts, config.expert_width, config.hidden))
        self.down = nn.Parameter(torch.empty(config.experts, config.hidden, config.expert_width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output, the load-balancing loss and each expert's share of the assignments."""
        config = self.config
        probabilities = self.router(x).float().softmax(-1)
        weights, chosen = probabilities.topk(config.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        mixture = torch.zeros_like(probabilities).scatter(-1, chosen, weights)
        hidden = F.silu(F.linear(x, self.gate.flatten(0, 1))) * F.linear(x, self.up.flatten(0, 1))
        hidden = hidden.view(*x.shape[:-1], config.experts, config.expert_width)
        hidden = hidden * mixture.to(hidden.dtype).unsqueeze(-1)
        out = F.linear(hidden.flatten(-2), self.down.transpose(1, 2).flatten(0, 1).t())
        load = (mixture > 0).float().flatten(0, 1).mean(0) / config.top_k
        balance = config.experts * (load * probabilities.flatten(0, 1).mean(0)).sum()
        return out, balance, load


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, config: MoeConfig) -> None:
        super().__init__()
        self.input_norm = RmsNorm(config.hidden, config.norm_eps)
        self.attention = Attention(config)
        self.post_norm = RmsNorm(config.hidden, config.norm_eps)
        self.experts = DenseExperts(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the layer's output, its load-balancing loss and its experts' load."""
        x = x + self.attention(self.input_norm(x), cos, sin)
        out, balance, load = self.experts(self.post_norm(x))
        return x + out, balance, load


class MoeModel(nn.Module):
    """The decoder, with tied input and output embeddings."""

    def __init__(self, config: MoeConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RmsNorm(config.hidden, config.norm_eps)
        frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        angles = torch.arange(config.context).float()[:, None] * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.initialise()

    def initialise(self) -> None:
        """Small normal weights; projections into the residual stream start smaller still."""
        residual = 0.02 / (2 * self.config.layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                continue
            nn.init.normal_(parameter, std=residual if name.endswith(("o_proj.weight", "down")) else 0.02)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, the mean load-balancing loss and the load of every layer's experts."""
        x: Tensor = self.embed(tokens)
        length = tokens.shape[1]
        if torch.is_autocast_enabled(tokens.device.type):
            x = x.to(torch.get_autocast_dtype(tokens.device.type))
        cos, sin = self.get_buffer("cos")[:length].to(x.dtype), self.get_buffer("sin")[:length].to(x.dtype)
        balances: list[Tensor] = []
        loads: list[Tensor] = []
        for block in self.blocks:
            x, balance, load = block(x, cos, sin)
            balances.append(balance)
            loads.append(load)
        logits = F.linear(self.norm(x), self.embed.weight)
        return logits, torch.stack(balances).mean(), torch.stack(loads)

    def loss(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Training loss over windows of length + 1 tokens: total, cross-entropy alone, expert loads."""
        logits, balance, loads = self(tokens[:, :-1])
        entropy = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        return entropy + self.config.aux_coefficient * balance, entropy.detach(), loads.detach()


def export_names(config: MoeConfig) -> dict[str, tuple[str, int | None]]:
    """Checkpoint tensor name -> (parameter of :class:`MoeModel`, expert index or None)."""
    names: dict[str, tuple[str, int | None]] = {
        "model.embed_tokens.weight": ("embed.weight", None),
        "model.norm.weight": ("norm.weight", None),
    }
    for layer in range(config.layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        names[f"{theirs}.input_layernorm.weight"] = (f"{ours}.input_norm.weight", None)
        names[f"{theirs}.post_attention_layernorm.weight"] = (f"{ours}.post_norm.weight", None)
        for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            names[f"{theirs}.self_attn.{part}.weight"] = (f"{ours}.attention.{part}.weight", None)
        names[f"{theirs}.mlp.gate.weight"] = (f"{ours}.experts.router.weight", None)
        for expert in range(config.experts):
            for part in ("gate", "up", "down"):
                names[f"{theirs}.mlp.experts.{expert}.{part}_proj.weight"] = (f"{ours}.experts.{part}", expert)
    return names


def export(model: MoeModel, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write ``model.safetensors``, ``config.json`` and ``generation_config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    parameters = {name: value.detach().cpu() for name, value in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for theirs, (ours, expert) in export_names(model.config).items():
        value = parameters[ours] if expert is None else parameters[ours][expert]
        tensors[theirs] = value.to(dtype).contiguous().clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    config = model.config.to_hugging_face() | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"eos_token_id": 0, "pad_token_id": 0, "do_sample": True, "temperature": 0.8, "top_p": 0.95}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def load_exported(folder: Path, config: MoeConfig | None = None) -> MoeModel:
    """Load a checkpoint that :func:`export` wrote, as float32."""
    model = MoeModel(config or MoeConfig())
    tensors = load_file(folder / "model.safetensors")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for theirs, (ours, expert) in export_names(model.config).items():
            target = parameters[ours] if expert is None else parameters[ours][expert]
            target.copy_(tensors[theirs].float())
    return model
