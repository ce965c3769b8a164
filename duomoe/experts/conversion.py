"""The conversion of an expert on a GPU, captured once and replayed for every expert that is stored alike.

A conversion is some sixty small operations. To launch them one by one takes the host many times as long as the GPU
needs to run them.
"""

import torch
from torch import Tensor

from duomoe.cuda import captured
from duomoe.experts.format import ExpertFormat
from duomoe.experts.staged import StagedExpert
from duomoe.experts.stored import StoredMatrices, fill


class Conversion:
    """Converts experts that are stored alike.

    Args:
        stored: the checkpoint's matrices.
        expert_format: of the rows.
        expert: one of them.
        device: the GPU.

    Attributes:
        row: uint8 [row_bytes] on the GPU, the expert that was converted last.
        holds: bool [] on the GPU, whether all held there that `fill` requires.
        squares: float64 [2] on the GPU, the sums of what `fill` has returned, of all experts so far.
    """

    def __init__(
        self,
        stored: StoredMatrices,
        expert_format: ExpertFormat,
        expert: StagedExpert,
        device: torch.device,
    ) -> None:
        self._stored, self._format, self._places = stored, expert_format, expert.places
        self._memory = torch.zeros(expert.buffer_bytes, dtype=torch.uint8, device=device)
        self._parts = expert.views(self._memory)
        self.row = torch.empty(expert_format.row_bytes, dtype=torch.uint8, device=device)
        self.squares = torch.zeros(2, dtype=torch.float64, device=device)
        self._fill()  # compiles what has to be; of zeros, which anything can be made of
        self.squares.zero_()
        self._graph = torch.cuda.CUDAGraph()
        with captured(self._graph, device):
            self.holds = self._fill()

    def send(self, memory: Tensor) -> None:
        """Queue the copy of an expert, the one that `run` converts, from where it has been read."""
        self._memory.copy_(memory[: len(self._memory)], non_blocking=True)

    def run(self) -> None:
        """Queue the conversion of the expert that was sent last."""
        self._graph.replay()

    def _fill(self) -> Tensor:
        held: list[Tensor] = []
        for place, parts in zip(self._places, self._parts, strict=True):
            squares = fill(self._stored, self._format, place, parts, self.row, lambda holds, _: held.append(holds))
            if squares is not None:
                self.squares += squares
        return torch.stack(held).all()
