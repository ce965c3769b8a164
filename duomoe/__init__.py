"""DuoMoE: serves Mixture-of-Experts language models whose experts do not fit in GPU memory."""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from duomoe.version import __version__

if TYPE_CHECKING:
    from duomoe.config import EngineConfig
    from duomoe.errors import InputError
    from duomoe.grammar import Grammar
    from duomoe.llm import LLM, Chunk, Completion, Logprobs, Metrics
    from duomoe.sampling import SamplingParams

__all__ = [
    "LLM",
    "Chunk",
    "Completion",
    "EngineConfig",
    "Grammar",
    "InputError",
    "Logprobs",
    "Metrics",
    "SamplingParams",
    "__version__",
]

# What torch says as it is imported where there is no numpy, which nothing here needs.
NO_NUMPY = "Failed to initialize NumPy"

_HOMES = {
    "EngineConfig": "config",
    "InputError": "errors",
    "LLM": "llm",
    "Chunk": "llm",
    "Completion": "llm",
    "Grammar": "grammar",
    "Logprobs": "llm",
    "Metrics": "llm",
    "SamplingParams": "sampling",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch takes seconds, and not every use of the package needs it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'duomoe' has no attribute {name!r}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", NO_NUMPY)
        return getattr(import_module(f"duomoe.{_HOMES[name]}"), name)
