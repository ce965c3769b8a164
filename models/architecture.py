"""What sets one family of models apart: how its config reads and what its tensors are called."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from duomoe.models.config import ModelConfig
from duomoe.models.weights import Sources


@dataclass(frozen=True)
class Architecture:
    """One family of models. How a block computes is the same for all of them (block.py)."""

    parse: Callable[[Mapping[str, Any]], ModelConfig]  # from config.json
    block_sources: Callable[[ModelConfig, int], dict[str, Sources]]  # a layer's BlockWeights fields
    expert_sources: Callable[[ModelConfig, int, int], dict[str, Sources]]  # of a layer and expert: gate_up and down
