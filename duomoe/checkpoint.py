"""A model folder in Hugging Face layout: its JSON files, and its safetensors read straight to where they belong.

Tensors are read with `preadv` into their destination instead of through the safetensors library, which maps whole
shards: mapped pages count as memory of this process, so a model would be held twice while it loads. The format is a
little-endian uint64 header length, a JSON header and the tensors' bytes (https://github.com/huggingface/safetensors).
"""

import ctypes
import hashlib
import io
import json
import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, local
from typing import Any

import torch
from torch import Tensor

from duomoe.errors import InputError
from duomoe.memory.staging import StagingRing, staging_memory

# The floating-point types that are read, by their name in a safetensors header.
STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# All that are read: quantised checkpoints have these besides.
DTYPES = STORED_DTYPES | {"F8_E4M3": torch.float8_e4m3fn, "I32": torch.int32}

# What is not read straight to where it belongs is read in pieces of this many bytes, so that a bounce buffer stays
# small whatever the tensor.
PIECE_BYTES = 2 << 20

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
    """A folder with config.json and one or more safetensors files. Several threads may read from it.

    Every call to the system gives up Python's lock, and all threads that read compete for it. So there are few: files
    stay open from their first reading until `close`, and what lies side by side is read by one call.

    Attributes:
        config: config.json.
        tensors: where each tensor lies, by name.
        reading_seconds: how long threads have waited for files, added up.

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
        self.reading_seconds = 0.0
        self._files: dict[Path, io.FileIO] = {}
        self._lock = Lock()
        self._thread = local()  # each thread's bounce buffers

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

    def warn_of_unused(self, used: Iterable[str]) -> None:
        """Warn (RuntimeWarning) where there are tensors that the model has no use for."""
        unused = sorted(self.tensors.keys() - set(used))
        unused = [name for name in unused if not name.endswith("rotary_emb.inv_freq")]
        if unused:
            warn(f"{self.path}: {len(unused)} tensors are not part of the model and were ignored, first {unused[0]}")

    def read(self, name: str) -> Tensor:
        """Return a tensor as it is stored, on the host.

        Raises:
            InputError: when reading fails.
        """
        stored = self.tensors[name]
        found = torch.empty(stored.size, dtype=torch.uint8)
        self.read_parts([(stored, 0)], found)
        return found.view(DTYPES[stored.dtype]).view(stored.shape)

    def read_parts(self, parts: Sequence[tuple[StoredTensor, int]], memory: Tensor) -> None:
        """Read tensors as they are stored into parts of host memory.

        Args:
            parts: some of `tensors`, and the byte of the memory where each begins; they may not overlap there.
            memory: uint8 [n], contiguous.

        Raises:
            InputError: when reading fails.
        """
        room = _memory(memory)
        in_order = sorted(parts, key=lambda part: (part[0].path, part[0].begin))
        runs: list[
            tuple[StoredTensor, list[memoryview]]
        ] = []  # the first tensor, and where it goes, and all that follow
        path, end = None, 0
        for tensor, begin in in_order:
            if (tensor.path, tensor.begin) != (path, end):
                runs.append((tensor, []))
            runs[-1][1].append(room[begin : begin + tensor.size])
            path, end = tensor.path, tensor.begin + tensor.size
        for first, pieces in runs:
            self._read(first.path, first.begin, pieces)

    def read_into(self, name: str, destination: Tensor) -> bool:
        """Fill a tensor with the values of a stored one, piece by piece.

        Args:
            name: of a tensor of floats.
            destination: contiguous and of the stored shape, on any device and of any float type; values are converted.

        Returns:
            Whether all values there are finite.

        Raises:
            InputError: when reading fails.
        """
        stored, flat = self.tensors[name], destination.view(-1)
        if flat.is_cuda:
            self._read_across(stored, flat)
        elif flat.dtype == STORED_DTYPES[stored.dtype]:
            self._read(stored.path, stored.begin, [_memory(flat)])
        else:
            bounce = torch.empty(PIECE_BYTES, dtype=torch.uint8)
            for target, begin in _pieces(stored, flat):
                target.copy_(self._read_piece(stored, begin, target.numel(), bounce))
        return bool(finite(flat))  # host-sync ok: while weights are loaded

    def _read_across(self, stored: StoredTensor, flat: Tensor) -> None:
        """Fill a tensor on a GPU: a piece crosses while the next one is read into the thread's other buffer."""
        if not hasattr(self._thread, "ring"):
            self._thread.ring = StagingRing(staging_memory(2 * PIECE_BYTES), 2, torch.cuda.Event)
        ring: StagingRing = self._thread.ring
        try:
            for target, begin in _pieces(stored, flat):
                with ring.buffer() as buffer:
                    piece = self._read_piece(stored, begin, target.numel(), buffer.memory)
                    target.copy_(piece, non_blocking=True)
        finally:  # the buffers go with the thread
            torch.cuda.current_stream().synchronize()  # host-sync ok: while weights are loaded

    def _read_piece(self, stored: StoredTensor, begin: int, count: int, bounce: Tensor) -> Tensor:
        """Read `count` values of a tensor from a byte of its file on, into a buffer, and return them."""
        dtype = STORED_DTYPES[stored.dtype]
        piece = bounce[: count * dtype.itemsize].view(dtype)
        self._read(stored.path, begin, [_memory(piece)])
        return piece

    def _read(self, path: Path, offset: int, pieces: list[memoryview]) -> None:
        """Read a file from `offset` on, piece after piece."""
        begin = time.perf_counter()
        with self._lock:
            if path not in self._files:
                self._files[path] = _open(path)
            descriptor = self._files[path].fileno()
        _fill(descriptor, pieces, offset, path)
        with self._lock:
            self.reading_seconds += time.perf_counter() - begin

    def close(self) -> None:
        """Close the files that were read, when no thread reads any more; who reads again opens them again."""
        while self._files:
            self._files.popitem()[1].close()

    def fingerprint(self, names: Iterable[str]) -> str:
        """Return a hash of some tensors as they are stored.

        Raises:
            InputError: when they cannot be read.
        """
        found = hashlib.sha256()
        for name in names:
            stored = self.tensors[name]
            found.update(repr((name, stored.dtype, stored.shape)).encode())
            content = self.read(name)  # held by a name: `_memory` does not hold it
            found.update(_memory(content))
        self.close()
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
    item = DTYPES.get(tensor.dtype)
    if item is not None and tensor.size != math.prod(shape) * item.itemsize:
        raise ValueError(f"{tensor.size} bytes do not hold shape {list(shape)} of {tensor.dtype}")
    return tensor


def finite(values: Tensor) -> Tensor:
    """Return whether floats are all finite, bool [] on their device.

    Their least and largest say so, since NaN is passed on: one pass over them, many times as fast as `isfinite`.
    """
    if values.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=values.device)
    return torch.stack(torch.aminmax(values)).isfinite().all()


def _pieces(stored: StoredTensor, flat: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Yield a flat tensor in pieces that are PIECE_BYTES as they are stored, and where each begins in the file."""
    item = STORED_DTYPES[stored.dtype].itemsize
    step = PIECE_BYTES // item
    for low in range(0, flat.numel(), step):
        yield flat[low : low + step], stored.begin + low * item


def _open(path: Path) -> io.FileIO:
    """Open a file for reading.

    Raises:
        InputError: when that fails, though its header has been read.
    """
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def _fill(descriptor: int, pieces: list[memoryview], offset: int, path: Path) -> None:
    """Read what lies in a file from `offset` on into one piece of memory after the other."""
    left = [piece for piece in pieces if len(piece)]
    while left:
        try:
            count = os.preadv(descriptor, left, offset)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
        if count == 0:
            raise InputError(f"{path}: truncated while it was read")
        offset += count
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if left:
            left[0] = left[0][count:]


def _memory(tensor: Tensor) -> memoryview:
    """Return a contiguous host tensor's memory; through ctypes, because numpy is not needed at run time."""
    if tensor.nbytes == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def warn(message: str) -> None:
    """Warn of what is strange about a checkpoint."""
    warnings.warn(message, RuntimeWarning, stacklevel=3)
