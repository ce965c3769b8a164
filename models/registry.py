"""The families of models this runtime knows, by the `model_type` of their config.json."""

from collections.abc import Mapping
from typing import Any

from duomoe.errors import InputError
from duomoe.models.architecture import Architecture
from duomoe.models.mixtral import MIXTRAL
from duomoe.models.qwen2_moe import QWEN2_MOE
from duomoe.models.qwen3_moe import QWEN3_MOE

ARCHITECTURES = {"mixtral": MIXTRAL, "qwen2_moe": QWEN2_MOE, "qwen3_moe": QWEN3_MOE}


def architecture_of(raw: Mapping[str, Any]) -> Architecture:
    """Return the family that a config.json belongs to.

    Raises:
        InputError: when it is none of `ARCHITECTURES`.
    """
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise InputError(f"config.json: model_type {family!r} is not supported; supported: {supported}")
    return ARCHITECTURES[family]
