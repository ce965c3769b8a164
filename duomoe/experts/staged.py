"""Experts as they are stored, read into staging buffers ahead of their conversion on a GPU."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from torch import Tensor

from duomoe.checkpoint import DTYPES, StoredTensor
from duomoe.experts.format import aligned
from duomoe.experts.stored import Place, StoredMatrices, places
from duomoe.memory.staging import StagingBuffer, StagingRing
from duomoe.models.weights import Sources

# The GPU may still copy from so many buffers while the others are read into. One is enough: when the copy of an expert
# has ended, the GPU still has that expert to convert and the next one to copy.
COPIED = 1

# A ring has at least so many buffers, so that one is read into while another one waits to be copied from.
FEWEST_BUFFERS = COPIED + 2

# An expert of more bytes is read by several threads, since there are few of its size at a time.
ONE_READ_BYTES = 32 << 20

# Tensors of a checkpoint, and where in a buffer each of them belongs.
Parts = list[tuple[StoredTensor, int]]

# Begins to read tensors into a buffer's memory (Checkpoint.read_parts).
Read = Callable[[Parts, Tensor], Future[None]]


@dataclass(frozen=True)
class StagedExpert:
    """An expert as it is stored, and how it lies in a buffer: its tensors one behind the other, aligned as in a row.

    Attributes:
        places: of its matrices.
        matrices: for each of them the tensors that it is stored as, in the order of `StoredMatrices.read`.
        buffer_bytes: that they take in a buffer.
    """

    places: list[Place]
    matrices: list[Parts]
    buffer_bytes: int

    @property
    def stored_bytes(self) -> int:
        """Bytes of its tensors in the checkpoint."""
        return sum(tensor.size for parts in self.matrices for tensor, _ in parts)

    @property
    def kind(self) -> tuple[tuple[tuple[str, tuple[int, ...]], ...], ...]:
        """What experts have in common that are stored alike: the types and shapes of their tensors."""
        return tuple(tuple((tensor.dtype, tensor.shape) for tensor, _ in parts) for parts in self.matrices)

    def views(self, memory: Tensor) -> list[list[Tensor]]:
        """Return the tensors of each matrix as they lie in memory, uint8 [buffer_bytes], of any device."""
        return [
            [memory[at : at + each.size].view(DTYPES[each.dtype]).view(each.shape) for each, at in parts]
            for parts in self.matrices
        ]

    def reads(self) -> list[Parts]:
        """Return the tensors by whom they are read: by one thread, or each matrix by another one."""
        if self.buffer_bytes > ONE_READ_BYTES:
            return self.matrices
        return [[part for parts in self.matrices for part in parts]]


def staged_expert(stored: StoredMatrices, sources: Mapping[str, Sources]) -> StagedExpert:
    """Return how an expert is stored, by its sources (Architecture.expert_sources)."""
    its_places, matrices, end = places(sources), [], 0
    for place in its_places:
        parts: Parts = []
        for name in stored.tensors(place.source, place.shape):
            tensor = stored.checkpoint.tensors[name]
            parts.append((tensor, end))
            end = aligned(end + tensor.size)
        matrices.append(parts)
    return StagedExpert(its_places, matrices, end)


class StagedExperts:
    """Experts in order, each in a buffer. Reading runs ahead as far as there are buffers.

    Args:
        experts: in their order.
        ring: of at least FEWEST_BUFFERS, each with room for any of them.
        read: begins to read.
    """

    def __init__(self, experts: Iterable[StagedExpert], ring: StagingRing, read: Read) -> None:
        self._experts: Iterator[StagedExpert] = iter(experts)
        self._ring, self._read = ring, read
        self._under_way: deque[tuple[StagedExpert, StagingBuffer, Sequence[Future[None]]]] = deque()
        self._read_on()

    def _read_on(self) -> None:
        while self._ring.idle > COPIED and (expert := next(self._experts, None)) is not None:
            buffer = self._ring.take()
            reads = [self._read(parts, buffer.memory) for parts in expert.reads()]
            self._under_way.append((expert, buffer, reads))

    def take(self) -> tuple[StagedExpert, StagingBuffer]:
        """Return the next expert, when it has been read, and its buffer, which is to be given back.

        Raises:
            InputError: when reading has failed.
        """
        expert, buffer, reads = self._under_way.popleft()
        for each in reads:
            each.result()
        return expert, buffer

    def give_back(self, buffer: StagingBuffer) -> None:
        """Give back an expert's buffer behind the copy from it, and read on."""
        self._ring.give_back(buffer)
        self._read_on()
