"""What a model folder says about its model before any weight is read."""

import math
import os
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

from duomoe.checkpoint import Checkpoint
from duomoe.errors import InputError
from duomoe.experts.format import ExpertFormat, fp8_format, int4_format, packed_format, plain_format
from duomoe.experts.layouts import PLAIN
from duomoe.experts.stored import StoredMatrices
from duomoe.model_path import find_model
from duomoe.models import architecture_of
from duomoe.models.config import states_dtype
from duomoe.models.model import dense_tensors, expected_tensors, expert_tensors
from duomoe.tensor_names import canonical
from duomoe.tokenizer import Tokenizer

EMBEDDED_MODEL = Path(__file__).parent / "assets"

EXPERT_DTYPES = ("auto", "plain", "bf16-packed", "fp8", "int4")

# Of experts that are quantised while they are loaded.
INT4_GROUP = 128


class ModelFolder:
    """A folder in Hugging Face layout, of which config.json and the safetensors headers have been read and checked.

    Args:
        path: of the folder, or a name in the hub's cache (model_path.py); None is the model that comes with this
            package.

    Attributes:
        checkpoint: its files; tensors have the architecture's names (tensor_names.py).
        architecture: the model's family.
        config: the model's shape.
        stored: its weights, whatever they are stored as.

    Raises:
        InputError: when the folder cannot be used.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.checkpoint = Checkpoint(EMBEDDED_MODEL if path is None else find_model(path))
        raw = self.checkpoint.config
        self.architecture = architecture_of(raw)
        if not states_dtype(raw):
            raw = raw | {"dtype": self.checkpoint.usual_dtype()}
        if raw.get("quantization_config") is None:
            raw = raw | {"quantization_config": self._stated_beside()}
        self.config = self.architecture.parse(raw)
        self.checkpoint.tensors = canonical(self.checkpoint.tensors, self.architecture, self.config)
        if any(name.startswith("lm_head.") for name in self.checkpoint.tensors):
            # What is stored counts, also where the config says that the head is the embedding.
            self.config = replace(self.config, tie_word_embeddings=False)
        self.stored = StoredMatrices(self.checkpoint, self.config.quantization)
        self.stored.check(expected_tensors(self.architecture, self.config))

    def _stated_beside(self) -> dict[str, object] | None:
        """Return how the checkpoint is quantised, where old tools say it in a file of its own; else None."""
        for method, name in (("gptq", "quantize_config.json"), ("awq", "quant_config.json")):
            if (found := self.checkpoint.read_json(name)) is not None:
                return {"quant_method": method, **found}
        return None

    def expert_format(self, expert_dtype: str, dtype: torch.dtype, device: str) -> ExpertFormat:
        """Return what an expert's row is to look like.

        Args:
            expert_dtype: one of EXPERT_DTYPES; 'auto' is what the checkpoint stores, but for a GPU 'bf16-packed' where
                that is plain bfloat16.
            dtype: of activations, and of plain experts.
            device: "cpu" or "cuda".

        Raises:
            InputError: for 'auto', when the checkpoint does not store all experts alike; for 'bf16-packed', when they
                are not to be plain bfloat16, or so small that they would have more bytes.
        """
        forms = {PLAIN}
        if self.config.quantization is not None:
            forms = {self.stored.form(*tensor) for tensor in expert_tensors(self.architecture, self.config)} or forms
        size = self.config.hidden_size, self.config.moe_intermediate_size
        plain, packed = plain_format(*size, dtype), packed_format(*size)
        if expert_dtype == "auto":
            if len(forms) > 1:
                raise InputError(
                    f"{self.checkpoint.path}: its experts are not all stored in the same form; choose one for all with "
                    f"--expert-dtype plain, fp8 or int4"
                )
            ((expert_dtype, _, _),) = forms
            smaller = packed.row_bytes < plain.row_bytes
            if expert_dtype == "plain" and device == "cuda" and dtype == torch.bfloat16 and smaller:
                return packed
        if expert_dtype == "plain":
            return plain
        if expert_dtype == "bf16-packed":
            if dtype != torch.bfloat16:
                raise InputError(f"--expert-dtype bf16-packed packs bfloat16, not {dtype}; add --dtype bfloat16")
            if forms != {PLAIN}:
                raise InputError(
                    f"{self.checkpoint.path}: its experts are stored quantised, smaller than bf16-packed; leave "
                    f"--expert-dtype out"
                )
            if packed.row_bytes >= plain.row_bytes:
                raise InputError(
                    f"--expert-dtype bf16-packed: experts of this size take {packed.row_bytes} bytes, and as they are "
                    f"{plain.row_bytes}; leave it out"
                )
            return packed
        if expert_dtype == "fp8":
            quantization = self.config.quantization
            return fp8_format(*size, quantization is not None and quantization.dynamic_activations)
        integers = sorted((form for form in forms if form.name == "int4"), key=str)
        if not integers:
            return int4_format(*size, INT4_GROUP, torch.float16)
        return int4_format(*size, integers[0].group, integers[0].scale_dtype)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer; None where there is no tokenizer.json."""
        return Tokenizer(self.checkpoint) if os.path.lexists(self.checkpoint.path / "tokenizer.json") else None

    def need_tokenizer(self) -> Tokenizer:
        """Return the tokenizer.

        Raises:
            InputError: when there is none.
        """
        if self.tokenizer is None:
            raise InputError("this checkpoint has no tokenizer.json; give the prompt as token ids")
        return self.tokenizer

    def routers(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return the names and shapes of the routers."""
        sources = (self.architecture.block_sources(self.config, layer)["router"] for layer in self.config.moe_layers)
        return [router for (router,) in sources]

    def fingerprint(self) -> str:
        """Return what tells this model from any other, a hash of its routers; traces and predictors carry it."""
        return self.checkpoint.fingerprint(part for router in self.routers() for part in self.stored.tensors(*router))

    def dequantised_bytes(self, dtype: torch.dtype) -> int:
        """Return how many bytes more the non-expert weights take in a dtype, where they are stored quantised."""
        if self.config.quantization is None:
            return 0
        more = 0
        for name, shape in dense_tensors(self.architecture, self.config):
            if self.stored.is_quantised(name, shape):
                more += math.prod(shape) * dtype.itemsize - self.stored.size(name, shape)
        return more
