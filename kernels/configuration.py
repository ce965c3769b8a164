"""What the kernels' launchers share: the GPU's limits, and a description of each specialisation they can choose.

A GPU is known here by its compute capability times ten (90 is Hopper). Without a GPU, as in Triton's interpreter, the
capability is 0, and the limits are those that every supported GPU meets.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

# Shared memory that one program may use, in KiB (CUDA programming guide, "Technical Specifications per Compute
# Capability"). GPUs that are not listed have at least the 99 KiB of the smallest.
_SHARED_KIB = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}
_SMALLEST_SHARED_KIB = 99

TRITON_TYPE = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Configuration:
    """One specialisation of a kernel that its launcher can choose, enough to compile it on a machine without a GPU.

    `signature` gives the Triton type of each run-time argument; a suffix `:16` says that the pointer or the integer is
    divisible by 16, as Triton finds on its own at a launch. An argument that is missing there is None. `options` are
    what the launcher passes by name: the `constexpr` arguments in capitals, `num_warps` and `num_stages`.
    """

    kernel: Any
    signature: dict[str, str]
    options: dict[str, Any]
    tensor_cores: bool = False
    """Must multiply with tensor-core instructions."""
    wide_loads: bool = False
    """Must read its weights 16 bytes at a time."""


@cache
def capability(device: torch.device) -> int:
    """Return ten times the compute capability of a GPU, 0 for a device that is none."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has; 1 for a device that is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def shared_memory(capability: int) -> int:
    """Return how many bytes of shared memory one program may use on GPUs of this capability."""
    return 1024 * _SHARED_KIB.get(capability, _SMALLEST_SHARED_KIB)
