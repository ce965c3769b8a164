"""How a model is to be run."""

import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch

from duomoe.errors import InputError
from duomoe.experts.link import Pace
from duomoe.memory.plan import DEFAULT_SHARE, Limits, Plan, check_host, device_memory, host_memory, make_plan
from duomoe.model_folder import EXPERT_DTYPES, ModelFolder
from duomoe.models.config import DTYPES, ModelConfig
from duomoe.sizes import format_size, parse_size, parse_size_or_share, parse_time

HOST = torch.device("cpu")


@dataclass(frozen=True)
class EngineConfig:
    """The user's choices; every field has the command line's spelling and default."""

    device: str = "auto"  # auto (cuda where there is one), cpu, cuda
    dtype: str = "auto"  # auto (the checkpoint's), float32, bfloat16, float16
    expert_dtype: str = "auto"  # auto (see --help), plain (the dtype), bf16-packed, or fp8, int4 (quantised on loading)
    policy: str = "auto"  # auto (resident where all experts fit, else duo), or a policy's name
    gpu_memory: str | int | None = None  # in all: bytes or "8GiB"; None: 90 % of what is free, on a CPU no limit
    expert_memory: str | int | None = None  # of expert slots: bytes, "2GiB" or a share, "15%"; None: what is left
    predictor: str | os.PathLike[str] | None = None  # a file, "gate" or "none"; None: beside the checkpoint, or gate
    compile: str = "auto"  # torch.compile for the non-expert layers: on, off; auto is off, which is as fast
    graph: bool = True  # decode steps as CUDA graphs, on CUDA
    link_bandwidth: str | int | None = None  # pace the CPU's link: bytes per second or a size as "25GB/s"
    link_latency: str | float = 0.0  # of each copy over a paced link: seconds or a time as "10us"
    prefix_caching: bool = True  # keep what was computed, for prompts that begin alike
    engine_log: str | os.PathLike[str] | None = None  # a file for what the engine does, and how long that takes
    max_batch: int = 8  # sequences decoded together
    max_model_len: int | None = None  # longest sequence in tokens; None: the checkpoint's, or what memory allows

    def __post_init__(self) -> None:
        _choose("device", self.device, ("auto", "cpu", "cuda"))
        _choose("dtype", self.dtype, ("auto", *DTYPES))
        _choose("expert_dtype", self.expert_dtype, EXPERT_DTYPES)
        _choose("compile", self.compile, ("auto", "on", "off"))
        for name in ("max_batch", "max_model_len"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"{_flag(name)} must be a whole number of at least 1, got {value!r}")

        self.device_limit()
        self.expert_limit()
        if self.pace() is not None and self.torch_device().type == "cuda":
            raise InputError("--link-bandwidth paces the CPU's link; leave it out, or say --device cpu")

    def torch_device(self) -> torch.device:
        """Return the device to compute on: of several GPUs the one that is torch's current one in this thread.

        Raises:
            InputError: when CUDA is asked for and there is none.
        """
        present = torch.cuda.is_available()
        if self.device == "cuda" and not present:
            raise InputError("--device cuda: no usable CUDA GPU was found; use --device cpu or auto")
        return torch.device("cuda", torch.cuda.current_device()) if present and self.device != "cpu" else HOST

    def torch_dtype(self, model: ModelConfig) -> torch.dtype:
        """Return the dtype of weights and activations."""
        return model.dtype if self.dtype == "auto" else DTYPES[self.dtype]

    def pace(self) -> Pace | None:
        """Return how fast the link between host and device is to be, or None for as fast as it is."""
        latency = parse_time(self.link_latency, "--link-latency")
        if self.link_bandwidth is None:
            if latency > 0:
                raise InputError("--link-latency paces the link together with --link-bandwidth; give both")
            return None
        rate = str(self.link_bandwidth).strip().removesuffix("/s")
        return Pace(parse_size(rate, "--link-bandwidth", "25GB/s"), latency)

    def device_limit(self) -> int | None:
        """Return the stated limit on the device's memory in bytes, or None."""
        return None if self.gpu_memory is None else parse_size(self.gpu_memory, "--gpu-memory", "8GiB or 500MB")

    def expert_limit(self) -> int | Fraction | None:
        """Return the limit on expert slots: bytes as an int, a share of all experts as a Fraction, or None."""
        return None if self.expert_memory is None else parse_size_or_share(self.expert_memory, "--expert-memory")

    def predictor_file(self, folder: ModelFolder) -> Path | None:
        """Return the predictor's file, or None where the choice is "gate" or "none", or there is no file.

        Raises:
            InputError: when a file was named that is not there.
        """
        if self.predictor is None:
            beside = folder.checkpoint.path / "predictor.safetensors"
            return beside if beside.is_file() else None
        if self.predictor in ("gate", "none"):
            return None
        if not Path(self.predictor).is_file():
            raise InputError(f"--predictor: {self.predictor} is not a file; give one, or gate or none")
        return Path(self.predictor)

    def predictor_bytes(self, folder: ModelFolder, dtype: torch.dtype) -> int:
        """Return how much memory a predictor's weights and state take at most."""
        if self.predictor == "none":
            return 0
        file, model = self.predictor_file(folder), folder.config
        experts = len(model.moe_layers) * model.num_experts
        routers = experts * model.hidden_size * dtype.itemsize
        # A file may hold numbers of 2 bytes that become 4. Four numbers for each expert are float32 in any case.
        return routers + (0 if file is None else file.stat().st_size * max(1, dtype.itemsize // 2) + experts * 16)

    def plan(self, model: ModelFolder | str | os.PathLike[str] | None = None) -> Plan:
        """Return how the device's memory will be divided; reads no weights and allocates nothing.

        Args:
            model: a folder in Hugging Face layout; None is the model that comes with this package.

        Raises:
            InputError: when the folder cannot be used, or memory does not suffice.
        """
        folder = model if isinstance(model, ModelFolder) else ModelFolder(model)
        device, dtype = self.torch_device(), self.torch_dtype(folder.config)
        memory, name = self.device_limit(), "--gpu-memory"
        if device.type == "cuda":
            free = device_memory()
            if memory is None:
                memory, name = int(free * DEFAULT_SHARE), "90 % of the GPU's free memory"
            elif memory > free:
                raise InputError(f"--gpu-memory: {format_size(memory)} is more than the GPU's free {format_size(free)}")
        limits = Limits(
            device=device.type,
            policy=self.policy,
            memory=memory,
            memory_name=name,
            host_memory=host_memory(),
            experts=self.expert_limit(),
            max_model_len=self.max_model_len,
            max_batch=self.max_batch,
            predictor_bytes=self.predictor_bytes(folder, dtype),
            graphs=self.graph and device.type == "cuda",
            prefix_caching=self.prefix_caching,
        )
        expert_format = folder.expert_format(self.expert_dtype, dtype, device.type)
        dequantised = folder.dequantised_bytes(dtype)
        plan = make_plan(folder.architecture, folder.config, dtype, expert_format, dequantised, limits)
        check_host(plan)
        return plan


def _choose(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{_flag(name)}: {value!r} is not one of {', '.join(allowed)}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
