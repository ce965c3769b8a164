"""Host memory that the GPU can copy from at full speed, and read directly."""

import contextlib
import ctypes
import mmap
import os
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

PORTABLE = 1  # cudaHostRegisterPortable: usable from every CUDA context

# Memory is touched in parts of this many bytes, few enough for every thread to have one of a layer's.
TOUCHED_BYTES = 8 << 20


def touched(size: int) -> Tensor:
    """Return memory of the host, uint8 [size], whose pages are there already: huge ones, where the system gives them.

    Pinning it then takes a fraction of the time: the system gives pages to one thread at a time, and few of 2 MiB
    sooner than many of 4 KiB (docs/measurements.md).
    """
    # Private, because shared memory has huge pages only where the system was told so.
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        region.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(region, dtype=torch.uint8)
    first = memory.data_ptr()

    def touch(begin: int) -> None:
        ctypes.memset(first + begin, 0, min(TOUCHED_BYTES, size - begin))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "duomoe-touch") as pool:
        list(pool.map(touch, range(0, size, TOUCHED_BYTES)))
    return memory


def pin(tensor: Tensor) -> bool:
    """Lock memory in place as `register` does, and return whether the system has let it.

    Warns:
        RuntimeWarning: when the system refuses; the tensor stays usable, but copies from it are slower.
    """
    refusal = register(tensor)
    if refusal is not None:
        warnings.warn(
            f"{tensor.nbytes} bytes of host memory cannot be pinned ({refusal}); experts "
            "are copied from pageable memory, which is slower. Raise the locked-memory limit (ulimit -l)",
            RuntimeWarning,
            stacklevel=2,
        )
    return refusal is None


def register(tensor: Tensor) -> str | None:
    """Lock a contiguous host tensor's memory in place for the GPU, for as long as the tensor lives.

    Memory is registered instead of allocated with `pin_memory=True`, because torch rounds such allocations up to a
    power of two (a 2.8 GB layer of experts would take 4 GB), and never gives them back to the system.

    Returns:
        Why the system refuses, where it does.
    """
    cudart = torch.cuda.cudart()
    status = cudart.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, PORTABLE)
    if int(status) != 0:
        _forget_error()
        return str(cudart.cudaGetErrorString(status))
    weakref.finalize(tensor, cudart.cudaHostUnregister, tensor.data_ptr())
    return None


def _forget_error() -> None:
    """Take the last call's error out of CUDA, or the next kernel's launch would be said to have failed with it."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")
