"""Where compiled kernels are kept from one start to the next: Triton's folder, ~/.triton or TRITON_CACHE_DIR."""

import os
import tempfile
import warnings
from pathlib import Path

from duomoe.errors import InputError

# Kernels of one model take a few MiB. Where so many bytes cannot be written, none are kept.
ENOUGH_BYTES = 16 << 20


def check_kernel_cache() -> None:
    """Give Triton a folder that ends with the process where it cannot write to its own.

    Raises:
        InputError: where there is no such folder, either.

    Warns:
        RuntimeWarning: where there is.
    """
    from triton import knobs

    try:
        folder = Path(knobs.cache.dir)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, ENOUGH_BYTES)
    except (OSError, RuntimeError) as error:  # RuntimeError where there is no home
        try:
            temporary = tempfile.TemporaryDirectory(prefix="duomoe-", ignore_cleanup_errors=True)
        except OSError:
            raise InputError(
                f"compiled kernels can be written nowhere: {error}; name a folder that can be written to with "
                f"TRITON_CACHE_DIR"
            ) from None
        _kept_until_exit.append(temporary)
        knobs.cache.dir = temporary.name
        warnings.warn(
            f"compiled kernels cannot be kept, so every start compiles them again: {error}. Free some space there, or "
            f"name another folder with TRITON_CACHE_DIR",
            RuntimeWarning,
            stacklevel=3,
        )


_kept_until_exit: list[tempfile.TemporaryDirectory[str]] = []
