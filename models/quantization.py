"""How a checkpoint's linear layers are quantised, as its config says; which of them are, its tensors say.

Tools write null for what they have not set, so a null says as little as a key that is absent. The one exception is
fp8's `weight_block_size`, which is null where a scale is a whole matrix's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from duomoe.errors import InputError
from duomoe.kernels.quantised import FP8_BLOCK
from duomoe.models.config_reader import ConfigReader, short

WHERE = "config.json: quantization_config"

METHODS = ("fp8", "awq", "gptq", "compressed-tensors")

# Of one weight, how many numbers share a scale.
MAX_GROUP = 2**16


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint's linear layers are quantised; those that it stores as they are have a plain weight.

    Attributes:
        layout: what their tensors are called, and how they lie: 'scaled' (a number of 8 bits for each value), 'awq',
            'gptq' or 'packed' (compressed-tensors' integers).
        bits: of an integer.
        dtype: 'scaled': of the numbers, as safetensors headers spell it.
        block: outputs and inputs that share a scale; 0 inputs are all of them. None where each matrix has one scale.
        zero_offset: what is to be added to a stored zero point; GPTQ's first version stores one less.
        symmetric: whether zero points are said to lie in the middle; None where nothing is said.
        reorders: GPTQ: inputs may have been quantised in another order, so that each says which group it belongs to.
        dynamic_activations: fp8: activations are to be multiplied in fp8, too, scaled as they come.
    """

    layout: str
    bits: int = 8
    dtype: str = "F8_E4M3"
    block: tuple[int, int] | None = None
    zero_offset: int = 0
    symmetric: bool | None = None
    reorders: bool = False
    dynamic_activations: bool = False


def parse_quantization(raw: Any) -> Quantization | None:
    """Read a config.json's `quantization_config`; None where there is none.

    Raises:
        InputError: when it is malformed, or says something that is not supported.
    """
    if raw is None:
        return None
    if not isinstance(raw, Mapping):
        raise InputError(f"{WHERE}: the checkpoint is quantised, but how must be an object, found {short(raw)}")
    method = raw.get("quant_method")
    if method not in METHODS:
        raise InputError(f"{WHERE}: this checkpoint is quantised by {short(method)}; supported: {', '.join(METHODS)}")
    read = _reader(raw, f"{WHERE} of {method}")
    match method:
        case "fp8":
            return _parse_fp8(read, raw)
        case "awq":
            return _parse_awq(read)
        case "gptq":
            return _parse_gptq(read)
        case _:
            return _parse_compressed(read)


def _reader(raw: Mapping[str, Any], where: str) -> ConfigReader:
    return ConfigReader({key: value for key, value in raw.items() if value is not None}, DEFAULTS, where)


DEFAULTS: dict[str, Any] = {
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "expert_dtype": "fp8",
    "version": "gemm",
    "format": None,
    "group_size": 128,
    "zero_point": True,
    "sym": None,
    "desc_act": False,
    "symmetric": True,
    "is_marlin_format": False,
    "pack_dtype": "int32",
    "dynamic": None,
    "strategy": "tensor",
    "actorder": None,
    "input_activations": None,
    "transform_config": None,
    "sparsity_config": None,
}


def _parse_fp8(read: ConfigReader, raw: Mapping[str, Any]) -> Quantization:
    _choose(read, "fmt", "e4m3", "float8_e4m3fn")
    _choose(read, "expert_dtype", "fp8")
    dynamic = _choose(read, "activation_scheme", "dynamic", "static") == "dynamic"
    size = raw.get("weight_block_size", [FP8_BLOCK, FP8_BLOCK])
    return Quantization("scaled", block=None if size is None else _block(read, size), dynamic_activations=dynamic)


def _parse_awq(read: ConfigReader) -> Quantization:
    if read.count("bits", "w_bit") != 4:
        raise read.unusable("bits", read.value("bits", "w_bit"), "4")
    _choose(read, "version" if "version" in read.raw else "format", "gemm", None)
    symmetric = not read.flag("zero_point")
    return Quantization("awq", 4, block=(1, _group(read, "group_size", "q_group_size")), symmetric=symmetric)


def _parse_gptq(read: ConfigReader) -> Quantization:
    if (bits := read.count("bits")) not in (4, 8):
        raise read.unusable("bits", bits, "4 or 8")
    _choose(read, "pack_dtype", "int32")
    if read.flag("is_marlin_format"):
        raise InputError(f"{read.where}: is_marlin_format is not supported; convert it to the format gptq")
    overridden = read.value("dynamic") or {}
    if not isinstance(overridden, Mapping) or any(not str(key).startswith("-:") for key in overridden):
        raise InputError(f"{read.where}: dynamic gives some layers other parameters, which is not supported")
    stated = {str(read.raw[key]).lower() for key in ("checkpoint_format", "format") if key in read.raw}
    if len(stated) > 1:
        raise InputError(f"{read.where}: checkpoint_format and format are not the same; correct the wrong one")
    version = (stated or {"gptq"}).pop()
    if version not in ("gptq", "gptq_v2"):
        raise read.unusable("checkpoint_format", version, "gptq or gptq_v2")
    symmetric = None if read.value("sym") is None else read.flag("sym")
    offset = 0 if version == "gptq_v2" else 1
    block = 1, _group(read, "group_size")
    reorders = read.flag("desc_act")
    return Quantization("gptq", bits, block=block, zero_offset=offset, symmetric=symmetric, reorders=reorders)


def _parse_compressed(read: ConfigReader) -> Quantization:
    """Read what compressed-tensors writes: groups of layers, of which all that are quantised must be so alike."""
    for key in ("transform_config", "sparsity_config"):
        content = read.value(key)
        if content and not (isinstance(content, Mapping) and content.get("format") == "dense"):
            raise InputError(f"{read.where}: {key} is not supported; only quantised weights are")
    groups = read.value("config_groups")
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(each, Mapping) for each in groups.values()):
        raise read.unusable("config_groups", groups, "an object with at least one object in it")
    found = [_parse_group(read, name, group) for name, group in groups.items() if group.get("weights") is not None]
    if not found or any(each != found[0] for each in found):
        raise InputError(f"{read.where}: config_groups must quantise all their layers' weights alike")
    return found[0]


def _parse_group(outer: ConfigReader, name: str, group: Mapping[str, Any]) -> Quantization:
    where = f"{outer.where}: {short(name)}"
    weights, inputs = group["weights"], group.get("input_activations")
    if not isinstance(weights, Mapping):
        raise InputError(f"{where}: weights must be an object, found {short(weights)}")
    read = _reader(weights, where)
    form = group.get("format") or outer.value("format") or "dense"
    bits, kind = read.count("num_bits"), _choose(read, "type", "int", "float")
    _choose(read, "actorder", None, "weight", "static", False)
    match _choose(read, "strategy", "tensor", "channel", "group", "block"):
        case "tensor":
            block = None
        case "channel":
            block = (1, 0)
        case "group":
            block = (1, _group(read, "group_size"))
        case _:
            block = _block(read, read.value("block_structure"))
    dynamic = isinstance(inputs, Mapping) and inputs.get("dynamic") is True
    if form == "pack-quantized" and kind == "int" and bits in (4, 8) and block is not None and block[0] == 1:
        return Quantization("packed", bits, block=block, symmetric=read.flag("symmetric"))
    if form in ("float-quantized", "naive-quantized") and kind == "float" and bits == 8:
        return Quantization("scaled", block=block, dynamic_activations=dynamic)
    if form in ("int-quantized", "naive-quantized") and kind == "int" and bits == 8 and read.flag("symmetric"):
        return Quantization("scaled", dtype="I8", block=block)
    raise InputError(
        f"{where}: {bits} bits of type {kind} in the format {short(form)} are not supported; supported: pack-quantized "
        f"(int, 4 or 8 bits), float-quantized and symmetric int-quantized (8 bits)"
    )


def _choose(read: ConfigReader, key: str, *allowed: object) -> Any:
    """Return a value that must be one of some; of strings, any case does."""
    value = read.value(key)
    value = value.lower() if isinstance(value, str) else value
    if not any(value is each or (isinstance(each, str) and value == each) for each in allowed):
        raise read.unusable(key, value, " or ".join(str(each) for each in allowed if isinstance(each, str)))
    return value


def _group(read: ConfigReader, *keys: str) -> int:
    """Return how many inputs share a scale; 0 for all, which files write as -1."""
    return 0 if read.value(*keys) == -1 else read.count(*keys, high=MAX_GROUP)


def _block(read: ConfigReader, size: Any) -> tuple[int, int]:
    """Return how many outputs and inputs share a scale."""
    if not isinstance(size, Sequence) or len(size) != 2 or not all(type(n) is int and 1 <= n < 2**31 for n in size):
        raise read.unusable("the block size", size, "two whole numbers")
    return size[0], size[1]
