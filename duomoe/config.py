"""How a model is to be run, and how sizes are written."""

import re
from dataclasses import dataclass

import torch

from duomoe.errors import InputError
from duomoe.experts.link import Pace
from duomoe.models.config import DTYPES, ModelConfig

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(frozen=True)
class EngineConfig:
    """The user's choices; every field has the command line's spelling and default."""

    device: str = "auto"  # auto (cuda where there is one), cpu, cuda
    dtype: str = "auto"  # auto (the checkpoint's), float32, bfloat16, float16
    policy: str = "auto"  # auto (resident where every expert has a slot, else lru), or a policy's name
    expert_memory: str | int | None = None  # of expert slots on the device: bytes or a size as "2GiB"; None: no limit
    compile: str = "auto"  # torch.compile for the non-expert layers: auto (on for CUDA), on, off
    graph: bool = True  # decode steps as CUDA graphs, on CUDA
    link_bandwidth: str | int | None = None  # pace the CPU's link: bytes per second or a size as "25GB/s"
    link_latency: str | float = 0.0  # of each copy over a paced link: seconds or a time as "10us"
    max_batch: int = 8  # sequences decoded together
    max_model_len: int | None = None  # longest sequence in tokens; None: what the checkpoint is made for

    def __post_init__(self) -> None:
        _choose("device", self.device, ("auto", "cpu", "cuda"))
        _choose("dtype", self.dtype, ("auto", *DTYPES))
        _choose("compile", self.compile, ("auto", "on", "off"))
        for name in ("max_batch", "max_model_len"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"{_flag(name)} must be a whole number of at least 1, got {value!r}")

        self.expert_bytes()
        if self.pace() is not None and self.torch_device().type == "cuda":
            raise InputError("--link-bandwidth paces the CPU's link; leave it out, or say --device cpu")

    def torch_device(self) -> torch.device:
        """Return the device to compute on.

        Raises:
            InputError: when CUDA is asked for and there is none.
        """
        present = torch.cuda.is_available()
        if self.device == "cuda" and not present:
            raise InputError("--device cuda: no usable CUDA GPU was found; use --device cpu or auto")
        return torch.device("cuda" if present and self.device != "cpu" else "cpu")

    def torch_dtype(self, model: ModelConfig) -> torch.dtype:
        """Return the dtype of weights and activations."""
        return model.dtype if self.dtype == "auto" else DTYPES[self.dtype]

    def pace(self) -> Pace | None:
        """Return how fast the link between host and device is to be, or None for as fast as it is."""
        latency = parse_time(self.link_latency, "--link-latency")
        if self.link_bandwidth is None:
            return None
        rate = str(self.link_bandwidth).strip().removesuffix("/s")
        return Pace(parse_size(rate, "--link-bandwidth", "25GB/s"), latency)

    def expert_bytes(self) -> int | None:
        """Return the limit on expert slots in bytes, or None for no limit."""
        return None if self.expert_memory is None else parse_size(self.expert_memory, "--expert-memory")


def parse_size(text: str | int, name: str, example: str = "500MB or 2GiB") -> int:
    """Return a size in bytes: a number, or a number with B, KB, MB, GB (powers of 1000) or KiB, MiB, GiB (of 1024).

    Raises:
        InputError: when it is not a size greater than zero; `name` says what was given.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if not found or found[2].upper() not in UNITS:
        raise InputError(f"{name}: {text!r} is not a size; write it as {example}")
    size = int(min(float(found[1]), 1e30) * UNITS[found[2].upper()])
    if size < 1:
        raise InputError(f"{name}: must be greater than zero, got {text!r}")
    return size


def parse_time(text: str | float, name: str) -> float:
    """Return a time in seconds: a number, or a number with s, ms or us.

    Raises:
        InputError: when it is not a time of at least zero; `name` says what was given.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|ms|us)?\s*", str(text))
    if not found:
        raise InputError(f"{name}: {text!r} is not a time; write it as 10us or 0.5ms")
    return float(found[1]) * {"s": 1.0, "ms": 1e-3, "us": 1e-6}[found[2] or "s"]


def format_size(size: int) -> str:
    """Return a size for people, in binary units."""
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            break
        amount /= 1024
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.2f} {unit}"


def _choose(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{_flag(name)}: {value!r} is not one of {', '.join(allowed)}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
