"""Fixtures for all tests: tiny random checkpoints, written by transformers, of every family."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Before triton is imported: kernels then run in its interpreter. On a GPU the same tests run them compiled.
    os.environ["TRITON_INTERPRET"] = "1"

import transformers

# The models are so tiny that a second thread would cost more than it gains.
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCAB = 211


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests that take minutes, too")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@dataclass
class Tiny:
    """A tiny model as transformers runs it, and the folder it was saved to."""

    reference: Any
    path: Path

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        return self.reference(torch.tensor([tokens])).logits[0].float()

    @torch.inference_mode()
    def greedy(self, tokens: list[int], count: int) -> list[int]:
        ids = torch.tensor([tokens])
        # The mask is given, because generate would otherwise take a prompt's zeros for padding.
        out = self.reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
        return out[0, len(tokens) :].tolist()


FAMILIES = {
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
    "qwen2_moe": (transformers.Qwen2MoeConfig, transformers.Qwen2MoeForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
}


def make_tiny(path: Path, family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Tiny:
    config_class, model_class = FAMILIES[family]
    sizes: dict[str, Any] = dict(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=None,
        bos_token_id=None,
    )
    if family != "mixtral":
        sizes |= dict(moe_intermediate_size=24, num_experts=8, num_experts_per_tok=3)
    if family == "qwen2_moe":
        sizes |= dict(shared_expert_intermediate_size=40)
    torch.manual_seed(seed)
    model = model_class(config_class(**(sizes | overrides))).eval()
    with torch.no_grad():
        # Larger than the usual initialisation, so that logits are far enough apart for greedy tokens to be certain.
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(noise * 0.2 if parameter.dim() > 1 else parameter + noise * 0.1)
    model.to(dtype).save_pretrained(path)
    return Tiny(model, path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tiny]:
    """Make a tiny checkpoint of a family; the same arguments give the same one again."""
    made: dict[str, Tiny] = {}

    def make(family: str, **overrides: Any) -> Tiny:
        key = f"{family} {sorted(overrides.items(), key=lambda item: item[0])}"
        if key not in made:
            made[key] = make_tiny(tmp_path_factory.mktemp(family), family, **overrides)
        return made[key]

    return make


@pytest.fixture
def prompt_of() -> Callable[..., list[int]]:
    """Draw a prompt of a given length."""

    def draw(length: int, seed: int = 0) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, VOCAB, (length,), generator=generator).tolist()

    return draw
