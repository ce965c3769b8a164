"""Named tensors with metadata in a safetensors file: what traces and predictors are kept in.

A file's schema says which tensors it has, of which types, and what their dimensions are called: those of one name are
equal. It is compared with the file's header before any tensor is read.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from duomoe.errors import InputError
from duomoe.output_file import replaced


@dataclass(frozen=True)
class TensorSchema:
    """What a file says of a tensor.

    Attributes:
        dtypes: one of these, as safetensors headers spell them.
        dims: the names of its dimensions.
        required: whether every file has it.
    """

    dtypes: tuple[str, ...]
    dims: tuple[str, ...]
    required: bool = True


@dataclass(frozen=True)
class FileSchema:
    """What a kind of file contains.

    Attributes:
        kind: what a complaint calls it, as "a trace".
        format: what its metadata say of `format`.
        remedy: what a complaint ends with, as "make it again".
    """

    kind: str
    format: str
    remedy: str

    def metadata(self, path: Path) -> dict[str, str]:
        """Return a file's metadata.

        Raises:
            InputError: when it cannot be read, or is of another kind.
        """
        with _opened(path, self) as file:
            found: dict[str, str] = file.metadata() or {}
        if found.get("format") != self.format:
            raise InputError(f"{path}: not {self.kind}; {self.remedy}")
        return found

    def load(self, path: Path, tensors: Mapping[str, TensorSchema], sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Return a file's tensors, on the CPU.

        Args:
            path: of the file.
            tensors: what it has; what it has besides is left alone.
            sizes: of the dimensions that are known.

        Raises:
            InputError: when it cannot be read, or its header says something else.
        """
        known = dict(sizes)
        with _opened(path, self) as file:
            names = [name for name in tensors if tensors[name].required or name in file.keys()]  # noqa: SIM118
            for name in names:
                self._check(path, file, name, tensors[name], known)
            return {name: file.get_tensor(name) for name in names}

    def _check(self, path: Path, file: Any, name: str, schema: TensorSchema, sizes: dict[str, int]) -> None:
        """Check a tensor by the header, and note how long its dimensions are."""
        if name not in file.keys():  # noqa: SIM118
            raise self.damaged(path, f"{name} is missing")
        header = file.get_slice(name)
        dtype, shape = header.get_dtype(), header.get_shape()
        if dtype not in schema.dtypes:
            raise self.damaged(path, f"{name} is of type {dtype}, not {' or '.join(schema.dtypes)}")
        fits = len(shape) == len(schema.dims)
        if not fits or any(sizes.setdefault(dim, size) != size for dim, size in zip(schema.dims, shape, strict=True)):
            expected = ", ".join(f"{dim} {sizes[dim]}" if dim in sizes else dim for dim in schema.dims)
            raise self.damaged(path, f"{name} has shape {shape[:8]}, but should be [{expected}]")

    def damaged(self, path: Path, problem: str) -> InputError:
        """Return a complaint about a file of this kind."""
        return InputError(f"{path}: damaged, or {self.kind} of another model: {problem}; {self.remedy}")


@contextmanager
def _opened(path: Path, schema: FileSchema) -> Iterator[Any]:
    """Open a safetensors file for reading; what goes wrong is an InputError."""
    try:
        if not os.path.isfile(path):
            raise InputError(f"{path}: cannot be read as {schema.kind}: no such regular file")
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as {schema.kind}: {error}") from None


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file, through links; one of that name is replaced at once or not at all, also when interrupted.

    Raises:
        InputError: when it cannot be written.
    """
    try:
        with replaced(path) as file:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be written: {error}") from None
