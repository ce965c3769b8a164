"""Widen the embedded model to a real model's bytes for each expert, at no change of what it computes.

`python tests/benchmarks/wide_model.py DIR` writes a checkpoint with experts of 9.4 MB, as Qwen3-30B-A3B has them, that
gives the embedded model's text and routing. Added neurons come in pairs whose outputs cancel, with weights as scattered
as real ones, so that they take their bytes and pack. Added dimensions are zero, and norms are rescaled for them.
"""

import json
import math
import shutil
import sys
import zlib
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from duomoe.model_folder import EMBEDDED_MODEL, ModelFolder

HIDDEN, HEAD, INTERMEDIATE = 256, 64, 6144


class Widening:
    """How each tensor of a model becomes one of the wider model.

    Args:
        config: of the narrow model, as in config.json.
    """

    def __init__(self, config: dict[str, int]) -> None:
        self.hidden, self.head = config["hidden_size"], config["head_dim"]
        self.heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
        self.heads["v"] = self.heads["k"]
        self.random = torch.Generator().manual_seed(0)
        self.noise = (torch.randn(INTERMEDIATE, HIDDEN, generator=self.random) * 0.05).to(torch.bfloat16)
        # A head's elements are rotated in pairs, one of either half: these places turn at the rates they had.
        half, step = torch.arange(self.head // 2), HEAD // self.head
        self.places = torch.cat([half * step, HEAD // 2 + half * step])

    def widen(self, name: str, tensor: Tensor) -> Tensor:
        """Return what a tensor becomes."""
        kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if ".experts." in name:
            return self._down(tensor) if kind == "down_proj" else self._gate_or_up(name, tensor)
        if kind in ("q_proj", "k_proj", "v_proj"):
            return self._heads(self._inputs(tensor), self.heads[kind[0]])
        if kind == "o_proj":
            return self._outputs(self._heads(tensor.T.contiguous(), self.heads["q"]).T)
        if kind in ("q_norm", "k_norm"):
            scale = 1.0 if kind == "q_norm" else math.sqrt(self.head / HEAD)  # attention divides by a longer head
            wide = torch.ones(HEAD, dtype=tensor.dtype)
            wide[self.places] = (tensor.float() * scale).to(tensor.dtype)
            return wide
        if kind.endswith("norm"):
            wide = torch.ones(HIDDEN, dtype=tensor.dtype)
            wide[: self.hidden] = (tensor.float() * math.sqrt(self.hidden / HIDDEN)).to(tensor.dtype)
            return wide
        return self._inputs(tensor)  # the router, the embedding, the head

    def _inputs(self, matrix: Tensor) -> Tensor:
        wide = torch.zeros(len(matrix), HIDDEN, dtype=matrix.dtype)
        wide[:, : self.hidden] = matrix
        return wide

    def _outputs(self, matrix: Tensor) -> Tensor:
        wide = torch.zeros(HIDDEN, matrix.shape[1], dtype=matrix.dtype)
        wide[: self.hidden] = matrix
        return wide

    def _heads(self, matrix: Tensor, heads: int) -> Tensor:
        wide = torch.zeros(heads, HEAD, matrix.shape[1], dtype=matrix.dtype)
        wide[:, self.places] = matrix.view(heads, self.head, -1)
        return wide.flatten(0, 1)

    def _gate_or_up(self, name: str, matrix: Tensor) -> Tensor:
        """Added neurons are alike two by two, whatever the input; those of gate and up have the same weights."""
        count, half = len(matrix), (INTERMEDIATE - len(matrix)) // 2
        expert = name.rsplit(".", 2)[0]
        wide = self.noise.roll(zlib.crc32(expert.encode()) % INTERMEDIATE, 0).clone()
        wide[:count] = 0.01  # what meets the added inputs, which are zero
        wide[:count, : self.hidden] = matrix
        wide[count + half : count + 2 * half] = wide[count : count + half]
        return wide

    def _down(self, matrix: Tensor) -> Tensor:
        """Two neurons that are alike have opposite weights."""
        count, half = matrix.shape[1], (INTERMEDIATE - matrix.shape[1]) // 2
        wide = torch.zeros(HIDDEN, INTERMEDIATE, dtype=matrix.dtype)
        wide[: self.hidden, :count] = matrix
        noise = self.noise[:half].T[:, torch.randperm(half, generator=self.random)]
        wide[:, count : count + half], wide[:, count + half : count + 2 * half] = noise, -noise
        return wide


def main(out: Path) -> None:
    """Write the checkpoint, a file for each layer, with the embedded model's predictor."""
    out.mkdir(parents=True, exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(EMBEDDED_MODEL / file, out / file)
    config = json.loads((EMBEDDED_MODEL / "config.json").read_text())
    wide = {"moe_intermediate_size": INTERMEDIATE, "head_dim": HEAD, "hidden_size": HIDDEN}
    (out / "config.json").write_text(json.dumps(config | wide))
    widening = Widening(config)
    files: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(EMBEDDED_MODEL / "model.safetensors").items():
        file = f"model-{name.split('.')[2] if '.layers.' in name else 'rest'}.safetensors"
        files.setdefault(file, {})[name] = widening.widen(name, tensor).contiguous()
    for file, tensors in files.items():
        save_file(tensors, out / file)
    index = {name: file for file, tensors in files.items() for name in tensors}
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    copy_predictor(out)


def copy_predictor(out: Path) -> None:
    """Copy the embedded model's predictor, whose inputs become longer by zeros, for the wide model's fingerprint."""
    with safe_open(EMBEDDED_MODEL / "predictor.safetensors", "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    narrow = json.loads((EMBEDDED_MODEL / "config.json").read_text())["hidden_size"]
    for name, tensor in tensors.items():
        if tensor.shape[-1] == narrow:
            tensors[name] = torch.nn.functional.pad(tensor, (0, HIDDEN - narrow)).contiguous()
    before, after = ModelFolder(EMBEDDED_MODEL).fingerprint(), ModelFolder(out).fingerprint()
    metadata = {name: value.replace(before, after) for name, value in metadata.items()}
    save_file(tensors, out / "predictor.safetensors", metadata=metadata)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
