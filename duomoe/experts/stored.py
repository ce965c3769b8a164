"""Matrices as checkpoints store them: plain, fp8 in blocks, AWQ or GPTQ; and an expert's row filled from them.

A matrix that a family's sources call `X.weight` is, by method,

- fp8 (DeepSeek's layout): `X.weight` F8_E4M3 [out, in] and `X.weight_scale_inv` [out blocks, in blocks];
- awq (AutoAWQ's GEMM layout): `X.qweight` I32 [in, out / 8], `X.qzeros` I32 [groups, out / 8] and `X.scales`
  [groups, out]; an integer holds outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight, from its lowest four bits up;
- gptq (AutoGPTQ's layout): `X.qweight` I32 [in / 8, out], eight inputs in an integer, `X.qzeros` and `X.scales` as
  before, but eight outputs in order, and `X.g_idx`, each input's group. Zero points are stored less one, unless the
  checkpoint's format is gptq_v2.

Layers that a checkpoint does not quantise have a plain `X.weight`: what is there decides, not the config's list.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from duomoe.checkpoint import STORED_DTYPES, Checkpoint, finite
from duomoe.errors import InputError
from duomoe.experts.format import ExpertFormat
from duomoe.experts.matrix import (
    Fp8Matrix,
    Int4Matrix,
    Matrix,
    PackedMatrix,
    PlainMatrix,
    Require,
    at_once,
)
from duomoe.kernels.quantised import FP8_BLOCK
from duomoe.models.config import Quantization
from duomoe.models.weights import Sources

# Which of eight outputs each four bits of an AWQ integer hold, and each four bits of a GPTQ one.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GPTQ_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)

Expected = tuple[tuple[int, ...], tuple[str, ...]]  # a stored tensor's shape, and the dtypes that are read


@dataclass
class Filled:
    """What is to be said of matrices that have been put into rows.

    Attributes:
        squared_error: of quantised values, from those they were made of, summed; 0 where none were quantised.
        squared_norm: of the latter.
        not_finite: the names of plain matrices with values that are NaN or infinity.
    """

    squared_error: float = 0.0
    squared_norm: float = 0.0
    not_finite: list[str] = field(default_factory=list)

    def count(self, squared_error: float, squared_norm: float) -> None:
        """Add up what quantised matrices have lost."""
        self.squared_error += squared_error
        self.squared_norm += squared_norm

    def add(self, other: "Filled") -> None:
        """Count what is to be said of other matrices, too."""
        self.count(other.squared_error, other.squared_norm)
        self.not_finite += other.not_finite

    @property
    def error(self) -> float:
        """‖quantised − plain‖ / ‖plain‖."""
        return (self.squared_error / self.squared_norm) ** 0.5 if self.squared_norm else 0.0


class StoredMatrices:
    """The linear layers of a checkpoint, whatever they are stored as.

    Args:
        checkpoint: where they are.
        quantization: what config.json says of it.
    """

    def __init__(self, checkpoint: Checkpoint, quantization: Quantization | None) -> None:
        self.checkpoint = checkpoint
        self.quantization = quantization

    def tensors(self, name: str, shape: tuple[int, ...]) -> dict[str, Expected]:
        """Return what a parameter `name` (X.weight) of a shape is stored as, in the order that `read` takes."""
        floats = tuple(STORED_DTYPES)
        prefix, found = name.removesuffix(".weight"), self.checkpoint.tensors
        if self.quantization is None or len(shape) != 2:
            return {name: (shape, floats)}
        group, (outer, inner) = self.quantization.group_size, shape
        if self.quantization.method == "fp8":
            if name in found and found[name].dtype in floats:
                return {name: (shape, floats)}
            blocks = (-(-outer // FP8_BLOCK), -(-inner // FP8_BLOCK))
            return {name: (shape, ("F8_E4M3",)), f"{prefix}.weight_scale_inv": (blocks, floats)}
        if name in found:
            return {name: (shape, floats)}
        groups = -(-inner // group)
        awq = self.quantization.method == "awq"
        if outer % 8 or (inner % 8 and not awq):
            raise InputError(
                f"{self.checkpoint.path}: {prefix}.qweight cannot hold shape {list(shape)}, eight by eight"
            )
        weight = (inner, outer // 8) if awq else (inner // 8, outer)
        tensors: dict[str, Expected] = {
            f"{prefix}.qweight": (weight, ("I32",)),
            f"{prefix}.qzeros": ((groups, outer // 8), ("I32",)),
            f"{prefix}.scales": ((groups, outer), ("F16", "BF16")),
        }
        if f"{prefix}.g_idx" in found:
            tensors[f"{prefix}.g_idx"] = ((inner,), ("I32",))
        return tensors

    def is_quantised(self, name: str, shape: tuple[int, ...]) -> bool:
        """Return whether a parameter is stored as more than its values."""
        return len(self.tensors(name, shape)) > 1

    def size(self, name: str, shape: tuple[int, ...]) -> int:
        """Return the bytes of what a parameter is stored as."""
        return sum(self.checkpoint.tensors[part].size for part in self.tensors(name, shape))

    def form(self, name: str, shape: tuple[int, ...]) -> tuple[str, torch.dtype]:
        """Return the form of a matrix that has been through `check` ('plain', 'fp8', 'int4'), and its scales' dtype.

        A plain matrix's own dtype does not matter, nor that of the scales of an fp8 one: float32 holds them all.
        """
        names = list(self.tensors(name, shape))
        if len(names) < 3:
            return ("fp8" if len(names) == 2 else "plain"), torch.float32
        return "int4", STORED_DTYPES[self.checkpoint.tensors[names[2]].dtype]

    def check(self, expected: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        """Check that every expected tensor is there, in the shapes and types of its method.

        Raises:
            InputError: at the first that is not.
        """
        for source, source_shape in expected:
            for name, (shape, dtypes) in self.tensors(source, source_shape).items():
                stored = self.checkpoint.tensors.get(name)
                if stored is None:
                    raise InputError(f"{self.checkpoint.path}: the checkpoint has no tensor {name}")
                if stored.shape != shape:
                    raise InputError(
                        f"{stored.path}: {name} has shape {list(stored.shape)}, but config.json asks for {list(shape)}"
                    )
                if stored.dtype not in dtypes:
                    supported = ", ".join(dtypes)
                    raise InputError(f"{stored.path}: {name} is stored as {stored.dtype}; supported: {supported}")

    def read(self, name: str, shape: tuple[int, ...]) -> list[Tensor]:
        """Return what a matrix that has been through `check` is stored as, in host memory, for `matrix`.

        Raises:
            InputError: when reading fails.
        """
        return [self.checkpoint.read(each) for each in self.tensors(name, shape)]

    def matrix(self, name: str, shape: tuple[int, ...], parts: list[Tensor], require: Require = at_once) -> Matrix:
        """Return the matrix that `read` has read, where its parts are by now.

        Args:
            name: of the parameter.
            shape: of it.
            parts: what was read, in that order.
            require: is asked that scales are finite, and that a GPTQ matrix has its inputs in order; else InputError.
        """
        if len(parts) == 1:
            return PlainMatrix(parts[0])
        assert self.quantization is not None
        path, scales = self.checkpoint.path, parts[1 if len(parts) == 2 else 2]
        require(finite(scales), InputError(f"{path}: the scales of {name} are NaN or infinity"))
        if self.quantization.method == "fp8":
            return Fp8Matrix(parts[0], scales.float())
        group, inner = self.quantization.group_size, shape[1]
        weight, zeros, *groups_of = parts[0], parts[1], *parts[3:]
        for group_of in groups_of:
            in_order = torch.arange(inner, device=weight.device) // group
            problem = f"{path}: {name} is quantised in another order (desc_act), which is not supported"
            require((group_of == in_order).all(), InputError(problem))
        order = AWQ_ORDER if self.quantization.method == "awq" else GPTQ_ORDER
        nibbles = _unpack(weight, order).T if order is AWQ_ORDER else _unpack(weight.T, order)
        zero = _unpack(zeros, order).T + self.quantization.zero_offset
        return Int4Matrix(nibbles, scales.T, zero, group)


def _unpack(packed: Tensor, order: Sequence[int]) -> Tensor:
    """Return the four-bit numbers in int32 [rows, columns] as uint8 [rows, 8 * columns]; `order` is that of eight."""
    found = torch.empty(*packed.shape, 8, dtype=torch.uint8, device=packed.device)
    for position, place in enumerate(order):
        found[..., place] = packed >> (4 * position) & 15
    return found.flatten(1)


@dataclass(frozen=True)
class Place:
    """Where a matrix of an expert belongs in its row.

    Attributes:
        source: the parameter's name in the checkpoint.
        shape: of it.
        name: of the row's tensor that holds it, 'gate_up' or 'down'.
        index: which of the matrices stacked there it is.
        count: how many there are.
    """

    source: str
    shape: tuple[int, ...]
    name: str
    index: int
    count: int


def places(sources: Mapping[str, Sources]) -> list[Place]:
    """Return the places of an expert's matrices, by its sources (Architecture.expert_sources)."""
    return [
        Place(source, shape, name, index, len(matrices))
        for name, matrices in sources.items()
        for index, (source, shape) in enumerate(matrices)
    ]


class NotFinite(Exception):
    """A plain matrix holds NaN or infinity, which is warned of."""


def fill(
    stored: StoredMatrices,
    expert_format: ExpertFormat,
    place: Place,
    parts: list[Tensor],
    row: Tensor,
    require: Require,
) -> Tensor | None:
    """Put a matrix into its place, converted where its parts are.

    Args:
        stored: the checkpoint's matrices.
        expert_format: of the row.
        place: the matrix, and where it belongs.
        parts: what `StoredMatrices.read` has read of it, on any device by now.
        row: uint8 [row_bytes], on any device.
        require: is asked what `StoredMatrices.matrix` and `ExpertFormat.write` ask, and that a plain matrix is finite
            (NotFinite).

    Returns:
        Where it is quantised by that, float64 [2]: the square of what it has lost, and of what it was; else None.
    """
    matrix = stored.matrix(place.source, place.shape, parts, require)
    if isinstance(matrix, PlainMatrix):
        require(finite(matrix.weight), NotFinite(place.source))

    def require_of_source(holds: Tensor, problem: Exception) -> None:
        named = InputError(f"{stored.checkpoint.path}: {place.source} {problem}")
        require(holds, named if isinstance(problem, InputError) else problem)

    views = {name: view[0] for name, view in expert_format.views(row[None]).items()}
    converted = expert_format.write(matrix, views, place.name, place.index, place.count, require_of_source)
    if converted is matrix or isinstance(converted, PlainMatrix | PackedMatrix):
        return None
    values = matrix.values()
    return torch.stack([each.square().sum(dtype=torch.float64) for each in (converted.values() - values, values)])


def fill_row(
    stored: StoredMatrices, expert_format: ExpertFormat, sources: Mapping[str, Sources], row: Tensor
) -> Filled:
    """Fill an expert's row from a checkpoint; what needs converting is converted on the host.

    Args:
        stored: the checkpoint's matrices, which have been through `check`.
        expert_format: of the row.
        sources: of its `gate_up` and `down` (Architecture.expert_sources).
        row: uint8 [row_bytes], on any device.

    Raises:
        InputError: when reading fails, or a matrix has values that cannot be used.
        DoesNotPack: when the format is packed and a matrix does not pack.
    """
    filled = Filled()

    def require(holds: Tensor, problem: Exception) -> None:
        if not isinstance(problem, NotFinite):
            at_once(holds, problem)
        elif not bool(holds):  # host-sync ok: is on the host
            filled.not_finite.append(str(problem))

    for place in places(sources):
        if needs_converting(stored, expert_format, place):
            parts = stored.read(place.source, place.shape)
            squares = fill(stored, expert_format, place, parts, row, require)
            if squares is not None:
                filled.count(*squares.tolist())  # host-sync ok: is on the host
        else:
            view = expert_format.views(row[None])[place.name][0].chunk(place.count)[place.index]
            if not stored.checkpoint.read_into(place.source, view):
                filled.not_finite.append(place.source)
    return filled


def needs_converting(stored: StoredMatrices, expert_format: ExpertFormat, place: Place) -> bool:
    """Return whether more than a float's type changes when a matrix goes into a row."""
    return expert_format.name != "plain" or stored.is_quantised(place.source, place.shape)
