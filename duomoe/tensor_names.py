"""The names of a checkpoint's tensors, as the families spell them: other spellings, and experts that are stored fused.

What other tools write in front of names, or leave out, is put right. Experts that a layer stores as one tensor,
`mlp.experts.gate_up_proj` [experts, gate over up, hidden] and `mlp.experts.down_proj`, become the experts' own
matrices, which are slices of it on disk: nothing is read that is not needed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from duomoe.checkpoint import StoredTensor
from duomoe.errors import InputError
from duomoe.models import Architecture, ModelConfig

Tensors = Mapping[str, StoredTensor]

# What stands in front of a text model's names, and what is meant.
PREFIXES = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "layers.": "model.layers.",
    "embed_tokens.": "model.embed_tokens.",
    "norm.": "model.norm.",
}

# What follows a fused tensor's name, and what follows an expert's then.
SUFFIXES = {
    "": "weight",
    ".weight": "weight",
    "_scale_inv": "weight_scale_inv",
    ".weight_scale_inv": "weight_scale_inv",
    "_scale": "weight_scale",
    ".weight_scale": "weight_scale",
}


def canonical(tensors: Tensors, architecture: Architecture, config: ModelConfig) -> dict[str, StoredTensor]:
    """Return tensors by the names that the architecture's sources have.

    Raises:
        InputError: when fused experts have another shape than the config asks for.
    """
    found = {_plain_name(name): tensor for name, tensor in tensors.items()}
    for layer in config.moe_layers:
        mlp = f"model.layers.{layer}.mlp"
        ((router, _),) = architecture.block_sources(config, layer)["router"]
        if router not in found and f"{mlp}.gate.weight" in found:
            found[router] = found.pop(f"{mlp}.gate.weight")
        for field, fused in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
            for suffix, own in SUFFIXES.items():
                if (tensor := found.get(name := f"{mlp}.experts.{fused}{suffix}")) is not None:
                    found.update(_slices(name, tensor, own, architecture, config, layer, field))
                    del found[name]
    return found


def _plain_name(name: str) -> str:
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
    return name if prefix is None else PREFIXES[prefix] + name.removeprefix(prefix)


def _slices(
    name: str, tensor: StoredTensor, own: str, architecture: Architecture, config: ModelConfig, layer: int, field: str
) -> Iterator[tuple[str, StoredTensor]]:
    """Yield each expert's matrices, or their scales, in a fused tensor [experts, …]; `own` is what theirs is called."""
    experts = config.num_experts
    count = len(architecture.expert_sources(config, layer, 0)[field])
    (_, (outer, inner)), *_ = architecture.expert_sources(config, layer, 0)[field]
    shape = tensor.shape
    if own == "weight" and shape != (experts, count * outer, inner):
        raise InputError(
            f"{tensor.path}: {name} has shape {list(shape)}, but config.json asks for "
            f"{[experts, count * outer, inner]}: experts, outputs, inputs"
        )
    shared = shape in ((experts,), (experts, 1, 1))  # one scale for all of an expert's matrices here
    if shape[:1] != (experts,) or not (shared or (len(shape) == 3 and shape[1] % count == 0)):
        raise InputError(f"{tensor.path}: {name} has shape {list(shape)}, not that of {experts} experts' scales")
    size = tensor.size // experts
    for expert in range(experts):
        for index, (matrix, _) in enumerate(architecture.expert_sources(config, layer, expert)[field]):
            begin = tensor.begin + expert * size
            if shared:
                part = replace(tensor, shape=(1,), begin=begin, size=size)
            else:
                rows = (shape[1] // count, shape[2])
                part = replace(tensor, shape=rows, begin=begin + index * (size // count), size=size // count)
            yield matrix.removesuffix("weight") + own, part
