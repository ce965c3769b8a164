"""How a checkpoint's linear layers are quantised, by its config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from duomoe.errors import InputError
from duomoe.kernels.quantised import FP8_BLOCK, INT4_GROUPS
from duomoe.models.config_reader import ConfigReader, short

WHERE = "config.json: quantization_config"


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint's linear layers are quantised; those that it stores as they are have a plain weight."""

    method: str  # 'fp8', 'awq' or 'gptq'
    group_size: int  # inputs that share a scale (fp8: and as many outputs)
    zero_offset: int = 0  # what is to be added to a stored zero point; GPTQ's first version stores one less
    dynamic_activations: bool = False  # fp8: activations are to be multiplied in fp8, too, scaled as they come


def parse_quantization(raw: Any) -> Quantization | None:
    """Read a config.json's `quantization_config`; None where there is none.

    Raises:
        InputError: when it is malformed, or says something that is not supported.
    """
    if raw is None:
        return None
    where = WHERE
    if not isinstance(raw, Mapping):
        raise InputError(f"{where}: the checkpoint is quantised, but how must be an object, found {short(raw)}")
    method = raw.get("quant_method")

    def require(key: str, value: object, *allowed: object) -> None:
        if value not in allowed:
            known = ", ".join(map(str, allowed))
            raise InputError(f"{where}: {key} {short(value)} is not supported for {method}; supported: {known}")

    if method == "fp8":
        require("fmt", raw.get("fmt", "e4m3"), "e4m3")
        require("weight_block_size", raw.get("weight_block_size"), [FP8_BLOCK, FP8_BLOCK])
        dynamic = raw.get("activation_scheme", "dynamic") == "dynamic"
        return Quantization("fp8", FP8_BLOCK, dynamic_activations=dynamic)
    if method not in ("awq", "gptq"):
        raise InputError(f"{where}: this checkpoint is quantised by {short(method)}; supported: fp8, awq, gptq")
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
