"""A model folder in Hugging Face layout: its JSON files, and its safetensors read straight to where they belong.

Tensors are read with `preadv` into their destination instead of through the safetensors library, which maps whole
shards: mapped pages count as memory of this process, so a model would be held twice while it loads. The format is a
little-endian uint64 header length, a JSON header and the tensors' bytes (https://github.com/huggingface/safetensors).
"""

import ctypes
import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import local
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from duomoe.errors import InputError

# The floating-point types that are read, by their name in a safetensors header.
STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# What quantised checkpoints store besides.
QUANTISED_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "I32": torch.int32}

# Tensors are read in pieces of this many bytes, so that a bounce buffer stays small whatever the tensor.
PIECE_BYTES = 8 << 20

READERS = 4

MAX_HEADER_BYTES = 100 << 20


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies on disk."""

    path: Path
    dtype: str  # as the safetensors header spells it
    shape: tuple[int, ...]
    begin: int  # byte offset in the file
    size: int  # bytes


class Checkpoint:
    """A folder with config.json and one or more safetensors files.

    Raises:
        InputError: when the folder, its config or its tensors' headers cannot be read, or files are missing or
            truncated.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not os.path.isdir(self.path):
            raise InputError(f"{self.path}: no such folder; a model is a folder with config.json and safetensors files")
        config = self.read_json("config.json")
        if config is None:
            raise InputError(f"{self.path}: no config.json; a model is a folder in Hugging Face layout")
        self.config = config
        self.tensors = self._find_tensors()

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Return a JSON object from the folder, or None when there is no such file."""
        file = self.path / name
        if not file.exists() and not file.is_symlink():
            return None
        if not file.is_file():
            raise InputError(f"{file}: not a file")
        try:
            content = json.loads(file.read_text("utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{file}: cannot be read as JSON: {error}") from None
        if not isinstance(content, dict):
            raise InputError(f"{file}: expected a JSON object")
        return content

    def load(self, destinations: Iterable[tuple[str, Tensor]], quiet: bool = False) -> None:
        """Fill every destination from the checkpoint tensor of its name, several files and tensors at a time.

        Args:
            destinations: names and contiguous tensors, on any device and of any float type; values are converted. The
                names and shapes have been checked (StoredMatrices.check).
            quiet: show no progress bar.

        Raises:
            InputError: when reading fails.

        Warns:
            RuntimeWarning: for a tensor with values that are not finite (any more, once converted).
        """
        wanted = dict(destinations)
        # In file order, so that the readers move through each file front to back.
        jobs = sorted(wanted, key=lambda name: (self.tensors[name].path, self.tensors[name].begin))
        total = sum(self.tensors[name].size for name in jobs)
        reader = _Reader()
        with (
            tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=quiet, leave=False) as bar,
            ThreadPoolExecutor(READERS, thread_name_prefix="duomoe-load") as pool,
        ):
            futures = [pool.submit(reader.read, self.tensors[name], wanted[name]) for name in jobs]
            try:
                for name, future in zip(jobs, futures, strict=True):
                    if future.result():
                        _warn(f"{self.tensors[name].path}: {name} holds NaN or infinity, and so will the output")
                    bar.update(self.tensors[name].size)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def warn_of_unused(self, used: Iterable[str]) -> None:
        """Warn (RuntimeWarning) where there are tensors that the model has no use for."""
        unused = sorted(self.tensors.keys() - set(used))
        unused = [name for name in unused if not name.endswith("rotary_emb.inv_freq")]
        if unused:
            _warn(f"{self.path}: {len(unused)} tensors are not part of the model and were ignored, first {unused[0]}")

    def read(self, name: str) -> Tensor:
        """Return a tensor as it is stored, on the host.

        Raises:
            InputError: when reading fails.
        """
        stored = self.tensors[name]
        found = torch.empty(stored.shape, dtype=(STORED_DTYPES | QUANTISED_DTYPES)[stored.dtype])
        with stored.path.open("rb", buffering=0) as file:
            _fill(file.fileno(), found, stored.begin, stored.path)
        return found

    def fingerprint(self, names: Iterable[str]) -> str:
        """Return a hash of some tensors as they are stored.

        Raises:
            InputError: when they cannot be read.
        """
        found = hashlib.sha256()
        for name in names:
            stored = self.tensors[name]
            content = torch.empty(stored.size, dtype=torch.uint8)
            with stored.path.open("rb", buffering=0) as file:
                _fill(file.fileno(), content, stored.begin, stored.path)
            found.update(repr((name, stored.dtype, stored.shape)).encode())
            found.update(_memory(content))
        return found.hexdigest()[:32]

    def _find_tensors(self) -> dict[str, StoredTensor]:
        index = self.read_json("model.safetensors.index.json")
        if index is None:
            single = self.path / "model.safetensors"
            if not os.path.isfile(single):
                hint = "; convert its .bin files to safetensors first" if any(self.path.glob("*.bin")) else ""
                raise InputError(f"{self.path}: neither model.safetensors nor model.safetensors.index.json{hint}")
            return read_header(single)
        places = index.get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
            raise InputError(f"{self.path / 'model.safetensors.index.json'}: weight_map must map tensors to file names")
        shards: dict[str, dict[str, StoredTensor]] = {}
        for shard in sorted(set(places.values())):
            file = self.path / shard
            if Path(shard).name != shard or not os.path.isfile(file):
                raise InputError(f"{self.path}: the index names {shard}, but there is no such file in the folder")
            shards[shard] = read_header(file)
        for name, shard in places.items():
            if name not in shards[shard]:
                raise InputError(f"{self.path}: the index says that {name} is in {shard}, but it is not")
        return {name: shards[shard][name] for name, shard in places.items()}


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return where each tensor of a safetensors file lies.

    Raises:
        InputError: when the file is truncated or its header is not a valid one.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise InputError(f"{path}: not a safetensors file, or truncated ({size} bytes)")
            header = json.loads(file.read(length))
        tensors = {name: _stored(path, 8 + length, entry) for name, entry in header.items() if name != "__metadata__"}
        end = 8 + length
        for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.size)):
            if tensor.begin != end:
                raise ValueError(f"a gap or an overlap at byte {end}")
            end += tensor.size
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: the safetensors header is corrupt: {error}") from None
    if end != size:
        kind = "truncated" if end > size else "damaged"
        raise InputError(f"{path}: {kind}: its tensors end at byte {end}, the file has {size}")
    return tensors


def _stored(path: Path, start: int, entry: dict[str, Any]) -> StoredTensor:
    """Read one tensor's entry in a header; `start` is where the tensors' bytes begin."""
    (begin, end), shape = entry["data_offsets"], tuple(entry["shape"])
    if any(type(number) is not int or number < 0 for number in (begin, end, *shape)) or end < begin:
        raise ValueError(f"offsets {begin} to {end} of shape {list(shape)}")
    tensor = StoredTensor(path, str(entry["dtype"]), shape, start + begin, end - begin)
    item = (STORED_DTYPES | QUANTISED_DTYPES).get(tensor.dtype)
    if item is not None and tensor.size != math.prod(shape) * item.itemsize:
        raise ValueError(f"{tensor.size} bytes do not hold shape {list(shape)} of {tensor.dtype}")
    return tensor


class _Reader:
    """Reads tensors from several threads; each thread has a bounce buffer of its own."""

    def __init__(self) -> None:
        self._thread = local()

    def read(self, stored: StoredTensor, destination: Tensor) -> bool:
        """Fill `destination` piece by piece; return whether it now holds a value that is not finite."""
        dtype = STORED_DTYPES[stored.dtype]
        flat = destination.view(-1)
        direct = destination.dtype == dtype and destination.device.type == "cpu"
        step = PIECE_BYTES // dtype.itemsize
        unusual = False
        with stored.path.open("rb", buffering=0) as file:
            for low in range(0, flat.numel(), step):
                target = flat[low : low + step]
                piece = (
                    target
                    if direct
                    else self._bounce(destination.device)[: target.numel() * dtype.itemsize].view(dtype)
                )
                _fill(file.fileno(), piece, stored.begin + low * dtype.itemsize, stored.path)
                converted = piece.to(destination.dtype)
                unusual = unusual or not bool(converted.isfinite().all())
                if not direct:
                    target.copy_(converted)
        return unusual

    def _bounce(self, device: torch.device) -> Tensor:
        if not hasattr(self._thread, "buffer"):
            self._thread.buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
        buffer: Tensor = self._thread.buffer
        return buffer


def _fill(descriptor: int, piece: Tensor, offset: int, path: Path) -> None:
    """Read `piece.nbytes` bytes at `offset` into a contiguous host tensor."""
    view = _memory(piece)
    done = 0
    while done < len(view):
        try:
            count = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
        if count == 0:
            raise InputError(f"{path}: truncated while it was read")
        done += count


def _memory(tensor: Tensor) -> memoryview:
    """Return a contiguous host tensor's memory; through ctypes, because numpy is not needed at run time."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)
