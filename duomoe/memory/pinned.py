"""Host memory that the GPU can copy from at full speed, and read directly."""

import contextlib
import warnings
import weakref

import torch
from torch import Tensor

PORTABLE = 1  # cudaHostRegisterPortable: usable from every CUDA context


def pin(tensor: Tensor) -> bool:
    """Lock a contiguous host tensor's memory in place for the GPU, for as long as the tensor lives.

    Memory is registered instead of allocated with `pin_memory=True`, because torch rounds such allocations up to a
    power of two: a 2.8 GB layer of experts would take 4 GB.

    Warns:
        RuntimeWarning: when the system refuses; the tensor stays usable, but copies from it are slower.
    """
    cudart = torch.cuda.cudart()
    status = cudart.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, PORTABLE)
    if int(status) != 0:
        _forget_error()
        warnings.warn(
            f"{tensor.nbytes} bytes of host memory cannot be pinned ({cudart.cudaGetErrorString(status)}); experts "
            "are copied from pageable memory, which is slower. Raise the locked-memory limit (ulimit -l)",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    weakref.finalize(tensor, cudart.cudaHostUnregister, tensor.data_ptr())
    return True


def _forget_error() -> None:
    """Take the last call's error out of CUDA, or the next kernel's launch would be said to have failed with it."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")
