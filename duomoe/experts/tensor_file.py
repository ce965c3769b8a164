"""Named tensors with metadata in a safetensors file: what traces and predictors are kept in."""

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from duomoe.errors import InputError


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file; one of that name is replaced at once or not at all.

    Raises:
        InputError: when it cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, metadata)
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        unfinished.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written: {error}") from None


def load_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a file's tensors, to the CPU, and its metadata; `kind` is what a complaint calls it, as "a trace".

    Raises:
        InputError: when it cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as {kind}: {error}") from None
