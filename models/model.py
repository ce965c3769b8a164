"""A model: an embedding, blocks and a head, with its weights on the compute device and its experts elsewhere."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from duomoe.kernels import rms_norm
from duomoe.kernels.threads import Threads, product_work
from duomoe.models import block
from duomoe.models.architecture import Architecture
from duomoe.models.batch import Batch, LayerKV, Routing
from duomoe.models.config import ModelConfig
from duomoe.models.rope import Rotary
from duomoe.models.weights import BlockWeights, Sources

P = ParamSpec("P")
R = TypeVar("R")

_copies = itertools.count()


class Model:
    """The non-expert part of a model; knows nothing of slots, streams or policies.

    Weights are allocated here and filled by a loader, which finds each checkpoint tensor's place in `destinations`.

    Args:
        architecture: the model's family.
        config: its shape.
        device: of the weights and of all computation.
        dtype: of the weights and activations.
        compiled: run the blocks through torch.compile.
    """

    def __init__(
        self, architecture: Architecture, config: ModelConfig, device: torch.device, dtype: torch.dtype, compiled: bool
    ) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self.rotary = Rotary(config.rope, device)
        self._filled: list[tuple[Sources, Tensor]] = []
        vocab_by_hidden = (config.vocab_size, config.hidden_size)
        self.embedding = self._allocate([("model.embed_tokens.weight", vocab_by_hidden)])
        self.blocks = [
            BlockWeights(**{name: self._allocate(sources) for name, sources in fields.items()})
            for fields in (architecture.block_sources(config, layer) for layer in range(config.num_layers))
        ]
        self.final_norm = self._allocate([("model.norm.weight", (config.hidden_size,))])
        tied = config.tie_word_embeddings
        self.head = self.embedding if tied else self._allocate([("lm_head.weight", vocab_by_hidden)])
        self._before, self._after = block.before, block.after
        self.compiled = compiled
        if compiled:
            self._before, self._after = _compiled(block.before), _compiled(block.after)

    def _allocate(self, sources: Sources) -> Tensor:
        rows = sum(shape[0] for _, shape in sources)
        tensor = torch.empty(rows, *sources[0][1][1:], dtype=self.dtype, device=self.device)
        self._filled.append((sources, tensor))
        return tensor

    def share_equal_head(self) -> None:
        """Let the embedding serve as the head where their loaded weights are the same."""
        if self.head is not self.embedding and torch.equal(self.head, self.embedding):
            self._filled = [(sources, tensor) for sources, tensor in self._filled if tensor is not self.head]
            self.head = self.embedding

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights held here."""
        return sum(tensor.nbytes for _, tensor in self._filled)

    def destinations(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each checkpoint tensor's name and the contiguous view to be filled with it."""
        for sources, tensor in self._filled:
            yield from stacked(sources, tensor)

    def embed(self, batch: Batch) -> Tensor:
        """Return the residual stream [tokens, hidden] that enters the first block."""
        return F.embedding(batch.tokens, self.embedding)

    def before(self, layer: int, x: Tensor, batch: Batch, kv: LayerKV) -> tuple[Tensor, Tensor, Routing | None]:
        """Run a block up to its experts (block.before)."""
        with self._threads(len(x), self.blocks[layer].qkv):
            return self._before(self.blocks[layer], self.config, self.config.windows[layer], x, batch, kv)

    def after(self, layer: int, x: Tensor, h: Tensor, y: Tensor | None) -> Tensor:
        """Run a block from its experts' sum on (block.after)."""
        weights = self.blocks[layer]
        mlp = weights.shared_gate_up if weights.dense_gate_up is None else weights.dense_gate_up
        with self._threads(len(x), mlp):
            return self._after(weights, x, h, y)

    def logits(self, x: Tensor) -> Tensor:
        """Return float32 logits [tokens, vocab] of the residual stream [tokens, hidden] that left the last block."""
        with self._threads(len(x), self.head):
            return F.linear(rms_norm(x, self.final_norm, self.config.rms_norm_eps), self.head).float()

    def _threads(self, rows: int, weights: Tensor | None) -> AbstractContextManager[None]:
        """Return the threads for a computation of which a product with `weights` is the largest.

        Compiled functions are for one number of threads, so those keep it.
        """
        if self.device.type != "cpu" or self.compiled:
            return nullcontext()
        return Threads(rows * self.config.hidden_size if weights is None else product_work(rows, weights.numel()))


def _compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Return a compiled copy of a function.

    torch.compile keeps what it has compiled with a function's code, and gives up at the eighth variant. Each model gets
    a copy, so that several in one process do not use up each other's; and a block needs more than eight where layers
    differ (experts or dense, window or none), each for one token or many and one sequence or several.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    assert isinstance(function, FunctionType)
    name = f"{function.__name__}_{next(_copies)}"
    copy = FunctionType(function.__code__.replace(co_name=name), function.__globals__, name, function.__defaults__)
    compiled: Callable[P, R] = torch.compile(copy, fullgraph=True, dynamic=True)
    return compiled


def expected_tensors(architecture: Architecture, config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of every checkpoint tensor of a model, its experts' last."""
    yield from dense_tensors(architecture, config)
    yield from expert_tensors(architecture, config)


def dense_tensors(architecture: Architecture, config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of every checkpoint tensor of a model but its experts'."""
    vocab_by_hidden = (config.vocab_size, config.hidden_size)
    yield "model.embed_tokens.weight", vocab_by_hidden
    yield "model.norm.weight", (config.hidden_size,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", vocab_by_hidden
    for layer in range(config.num_layers):
        for sources in architecture.block_sources(config, layer).values():
            yield from sources


def expert_tensors(architecture: Architecture, config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of every checkpoint tensor of a model's experts."""
    for layer in config.moe_layers:
        for expert in range(config.num_experts):
            for sources in architecture.expert_sources(config, layer, expert).values():
                yield from sources


def stacked(sources: Sources, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield each source's name and its rows of `tensor`, in the source's shape."""
    begin = 0
    for name, shape in sources:
        yield name, tensor[begin : begin + shape[0]].view(shape)
        begin += shape[0]
