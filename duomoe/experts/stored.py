"""The matrices of a checkpoint, whatever they are stored as, and an expert's row filled from them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from duomoe.checkpoint import Checkpoint, finite
from duomoe.errors import InputError
from duomoe.experts.format import ExpertFormat
from duomoe.experts.layouts import Expected, Form, Layout, Shape, layout_of
from duomoe.experts.matrix import Matrix, PackedMatrix, PlainMatrix, Require, at_once
from duomoe.models.quantization import Quantization
from duomoe.models.weights import Sources


@dataclass
class Filled:
    """What is to be said of matrices that have been put into rows.

    Attributes:
        squared_error: of quantised values, from those they were made of, summed; 0 where none were quantised.
        squared_norm: of the latter.
        not_finite: the names of matrices with values that are NaN or infinity.
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
        self._in_order: dict[str, bool] = {}

    def layout(self, name: str, shape: Shape) -> Layout:
        """Return how a parameter `name` (X.weight) of a shape is stored.

        Raises:
            InputError: when it cannot be stored so.
        """
        try:
            return layout_of(name, shape, self.quantization, self.checkpoint.tensors, self._is_in_order)
        except InputError as error:
            raise InputError(f"{self.checkpoint.path}: {error}") from None

    def _is_in_order(self, name: str, group: int) -> bool:
        """Return whether a tensor that says each input's group names them one after the other."""
        if name not in self._in_order:
            stored = self.checkpoint.tensors[name]
            if stored.dtype != "I32" or len(stored.shape) != 1:
                return True  # of which `check` complains
            group_of = self.checkpoint.read(name)
            self._in_order[name] = torch.equal(group_of, torch.arange(len(group_of), dtype=torch.int32) // group)
        return self._in_order[name]

    def tensors(self, name: str, shape: Shape) -> Mapping[str, Expected]:
        """Return what a parameter is stored as, in the order that `read` takes."""
        return self.layout(name, shape).parts

    def is_quantised(self, name: str, shape: Shape) -> bool:
        """Return whether a parameter is stored as more than its values."""
        return len(self.tensors(name, shape)) > 1

    def size(self, name: str, shape: Shape) -> int:
        """Return the bytes of what a parameter is stored as."""
        return sum(self.checkpoint.tensors[part].size for part in self.tensors(name, shape))

    def form(self, name: str, shape: Shape) -> Form:
        """Return what a matrix that has been through `check` may be in a row without losing anything."""
        return self.layout(name, shape).form

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

    def matrix(self, name: str, shape: Shape, parts: list[Tensor], require: Require = at_once) -> Matrix:
        """Return the matrix that `read` has read, where its parts are by now.

        Args:
            name: of the parameter.
            shape: of it.
            parts: what was read, in that order.
            require: is asked what must hold of its layout (layouts.py), else InputError.
        """

        def require_of_file(holds: Tensor, problem: Exception) -> None:
            require(holds, InputError(f"{self.checkpoint.path}: {problem}"))

        return self.layout(name, shape).matrix(parts, require_of_file)

    def read_into(self, name: str, destination: Tensor) -> bool:
        """Fill a tensor with the values of a parameter; those of a quantised one are worked out on the host.

        On a GPU, several at a time would take more memory than is planned.

        Args:
            name: of the parameter.
            destination: contiguous and of its shape, on any device and of any float type.

        Returns:
            Whether all values there are finite.

        Raises:
            InputError: when reading fails, or what is stored contradicts the config.
        """
        shape = tuple(destination.shape)
        if not self.is_quantised(name, shape):
            return self.checkpoint.read_into(name, destination)
        values = self.matrix(name, shape, self.read(name, shape)).values()
        destination.copy_(values)
        return bool(finite(values.to(destination.dtype)))  # host-sync ok: is on the host


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
    """A matrix holds NaN or infinity, which is warned of."""


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
        require: is asked what `StoredMatrices.matrix` and `ExpertFormat.write` ask, and that a matrix is finite
            (NotFinite).

    Returns:
        Where it is quantised by that, float64 [2]: the square of what it has lost, and of what it was; else None.
    """
    matrix = stored.matrix(place.source, place.shape, parts, require)

    def require_of_source(holds: Tensor, problem: Exception) -> None:
        named = InputError(f"{stored.checkpoint.path}: {place.source} {problem}")
        require(holds, named if isinstance(problem, InputError) else problem)

    views = {name: view[0] for name, view in expert_format.views(row[None]).items()}
    converted = expert_format.write(matrix, views, place.name, place.index, place.count, require_of_source)
    # A plain row may have no room for what is finite elsewhere.
    require((converted if isinstance(converted, PlainMatrix) else matrix).finite(), NotFinite(place.source))
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
