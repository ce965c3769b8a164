"""Activation traces: which experts the router chose for every token and layer, and what it saw.

A trace is a safetensors file:

| tensor | dtype, shape | |
|---|---|---|
| `experts` | int16 [tokens, layers, top_k] | the experts chosen in each MoE layer, most likely first |
| `request` | int32 [tokens] | the number of the prompt that the token belongs to |
| `position` | int32 [tokens] | where it stands in its sequence |
| `decode` | bool [tokens] | whether it was computed in a decode step rather than in a prefill |
| `hidden` | bfloat16 [tokens, layers, hidden] | the router's input in each MoE layer; only if asked for |

Its metadata has `format` ("duomoe-trace-1"), `fingerprint` of the model and `num_experts`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from duomoe.errors import InputError
from duomoe.experts.tensor_file import FileSchema, TensorSchema, save_tensors
from duomoe.models import Routing

FORMAT = "duomoe-trace-1"

FILE = FileSchema("a trace", FORMAT, "make one with python -m duomoe.trace")

TENSORS = {
    "experts": TensorSchema(("I16",), ("tokens", "layers", "top_k")),
    "request": TensorSchema(("I32",), ("tokens",)),
    "position": TensorSchema(("I32",), ("tokens",)),
    "decode": TensorSchema(("BOOL",), ("tokens",)),
    "hidden": TensorSchema(("BF16",), ("tokens", "layers", "hidden"), required=False),
}


@dataclass(frozen=True)
class Trace:
    """The tokens of some prompts with what they routed to; see the module's docstring for shapes."""

    fingerprint: str
    num_experts: int
    experts: Tensor
    request: Tensor
    position: Tensor
    decode: Tensor
    hidden: Tensor | None = None

    def save(self, path: Path) -> None:
        """Write the trace; a file of that name is replaced at once or not at all.

        Raises:
            InputError: when it cannot be written.
        """
        tensors = {name: getattr(self, name) for name in ("experts", "request", "position", "decode")}
        if self.hidden is not None:
            tensors["hidden"] = self.hidden
        metadata = {"format": FORMAT, "fingerprint": self.fingerprint, "num_experts": str(self.num_experts)}
        save_tensors(path, tensors, metadata)

    @staticmethod
    def load(path: Path, fingerprint: str) -> "Trace":
        """Read a trace.

        Raises:
            InputError: when it is not a trace, or one of another model than that of the fingerprint.
        """
        metadata = FILE.metadata(path)
        if metadata.get("fingerprint") != fingerprint:
            raise InputError(f"{path}: a trace of another model; make one of this model with python -m duomoe.trace")
        tensors = FILE.load(path, TENSORS, {})
        experts = metadata.get("num_experts", "")
        if not re.fullmatch(r"[1-9][0-9]{0,4}", experts):
            raise FILE.damaged(path, "its metadata do not say how many experts there are")
        return Trace(fingerprint, int(experts), **tensors)


class Recorder:
    """Collects a trace, one prompt after the other; `observe` is a policy's observer.

    Args:
        num_layers: MoE layers of the model.
        with_hidden: also keep the router's input.
    """

    def __init__(self, num_layers: int, with_hidden: bool) -> None:
        self.num_layers, self.with_hidden = num_layers, with_hidden
        self._experts: list[Tensor] = []  # of the pass under way, a layer each
        self._hidden: list[Tensor] = []
        self._passes: list[dict[str, Tensor]] = []
        self._request = -1
        self._position = 0

    def begin(self) -> None:
        """Begin the next prompt."""
        self._request += 1
        self._position = 0

    def observe(self, index: int, h: Tensor, routing: Routing) -> None:
        """Take what a MoE layer's router saw, `h` [tokens, hidden], and what it chose."""
        self._experts.append(routing.experts.to("cpu", torch.int16))
        if self.with_hidden:
            self._hidden.append(h.to("cpu", torch.bfloat16))
        if index == self.num_layers - 1:
            self._end_pass()

    def _end_pass(self) -> None:
        tokens = len(self._experts[0])
        found = {
            "experts": torch.stack(self._experts, 1),
            "request": torch.full((tokens,), self._request, dtype=torch.int32),
            "position": torch.arange(self._position, self._position + tokens, dtype=torch.int32),
            "decode": torch.full((tokens,), self._position > 0),
        }
        if self.with_hidden:
            found["hidden"] = torch.stack(self._hidden, 1)
        self._passes.append(found)
        self._position += tokens
        self._experts, self._hidden = [], []

    def trace(self, fingerprint: str, num_experts: int) -> Trace:
        """Return all that was collected."""
        joined = {name: torch.cat([found[name] for found in self._passes]) for name in self._passes[0]}
        return Trace(fingerprint, num_experts, **joined)
