"""The conversion of an expert on a GPU, captured once and replayed for every expert that is stored alike.

A conversion is some sixty small operations. To launch them one by one takes the host many times as long as the GPU
needs to run them.
"""

import torch
from torch import Tensor

from duomoe.cuda import captured
from duomoe.experts.format import ExpertFormat
from duomoe.experts.stored import Place, StoredMatrices, fill


class Conversion:
    """Converts experts whose matrices have parts of the same shapes and types.

    Args:
        stored: the checkpoint's matrices.
        expert_format: of the rows.
        places: of an expert's matrices.
        parts: what `StoredMatrices.read` has read of each, on the host.
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
        places: list[Place],
        parts: list[list[Tensor]],
        device: torch.device,
    ) -> None:
        self._stored, self._format, self._places = stored, expert_format, places
        self._parts = [[torch.empty_like(part, device=device) for part in each] for each in parts]
        self.row = torch.empty(expert_format.row_bytes, dtype=torch.uint8, device=device)
        self.squares = torch.zeros(2, dtype=torch.float64, device=device)
        self._send(parts)
        self._fill()  # compiles what has to be
        self.squares.zero_()
        self._graph = torch.cuda.CUDAGraph()
        with captured(self._graph, device):
            self.holds = self._fill()

    def run(self, parts: list[list[Tensor]]) -> None:
        """Queue the conversion of an expert, from parts on the host as at construction."""
        self._send(parts)
        self._graph.replay()

    def _send(self, parts: list[list[Tensor]]) -> None:
        for there, here in zip(self._parts, parts, strict=True):
            for target, part in zip(there, here, strict=True):
                target.copy_(part, non_blocking=True)

    def _fill(self) -> Tensor:
        held: list[Tensor] = []
        for place, parts in zip(self._places, self._parts, strict=True):
            squares = fill(self._stored, self._format, place, parts, self.row, lambda holds, _: held.append(holds))
            if squares is not None:
                self.squares += squares
        return torch.stack(held).all()
