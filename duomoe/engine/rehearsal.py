"""A rehearsal: padding passes through the model's layers, so that their kernels are compiled while weights load.

Padding has no key and no expert, so what a pass of it computes from weights that are not there yet goes nowhere.
"""

import threading
from collections.abc import Sequence

import torch

from duomoe.cuda import rehearsal_stream
from duomoe.engine.chunks import Span, batch_of
from duomoe.experts.compute import ExpertSum, LayerSum
from duomoe.experts.format import ExpertFormat
from duomoe.memory.pages import PAGE_SIZE, pages_for
from duomoe.memory.plan import CHUNK_TOKENS
from duomoe.models import LayerKV, Model


class Rehearsal:
    """Passes of padding, each in a thread of its own, for as long as the context lasts.

    Args:
        model: on a GPU; its weights need not be loaded.
        expert_format: of its experts.
        prompts: lengths of prompts, in tokens, whose prefill is rehearsed; with one, a decode step of one sequence is,
            too. Without any, nothing is.
    """

    def __init__(self, model: Model, expert_format: ExpertFormat, prompts: Sequence[int]) -> None:
        self._model, self._format = model, expert_format
        self._problem: BaseException | None = None
        chunks = {min(length, CHUNK_TOKENS) for length in prompts} | {length % CHUNK_TOKENS for length in prompts}
        self._threads = [
            threading.Thread(target=self._run, args=(number, tokens), name=f"duomoe-rehearsal-{tokens}")
            for number, tokens in enumerate(sorted(chunks | {1} if prompts else ()))
            if tokens > 0
        ]

    def __enter__(self) -> "Rehearsal":
        for thread in self._threads:
            thread.start()
        return self

    def wait(self) -> None:
        """Wait for all passes, and raise what has stopped one."""
        self._end()
        if self._problem is not None:
            raise self._problem

    def __exit__(self, *error: object) -> None:
        self._end()

    def _end(self) -> None:
        for thread in self._threads:
            thread.join()
        if self._threads:
            torch._C._cuda_clearCublasWorkspaces()  # those of the threads' streams, which compute nothing more

    def _run(self, number: int, tokens: int) -> None:
        try:
            with torch.inference_mode(), torch.cuda.stream(rehearsal_stream(self._model.device, number)):
                pass_padding(self._model, self._format, tokens)
                torch.cuda.current_stream().synchronize()  # host-sync ok: while weights are loaded
        except BaseException as problem:  # whatever it is, the one who waits must hear of it
            self._problem = problem


def pass_padding(model: Model, expert_format: ExpertFormat, tokens: int) -> None:
    """Let a chunk of padding through one layer of each kind.

    Args:
        model: its weights may hold anything.
        expert_format: of its experts.
        tokens: of the chunk; 1 is a decode step of one sequence.
    """
    config = model.config
    span = Span([0] * tokens, 0, tokens, [-1] * pages_for(tokens))
    batch = batch_of([span], model.rotary, model.device)
    batch = batch._replace(context_len=torch.zeros_like(batch.context_len))
    size = (1, PAGE_SIZE, config.num_kv_heads, config.head_dim)
    kv = LayerKV(*(torch.empty(size, dtype=model.dtype, device=model.device) for _ in range(2)))
    weights = expert_format.views(torch.empty(1, expert_format.row_bytes, dtype=torch.uint8, device=model.device))
    nowhere = torch.full((config.num_experts,), -1, dtype=torch.int32, device=model.device)
    kinds = {(config.windows[layer], config.is_moe[layer]): layer for layer in range(config.num_layers)}
    x = model.embed(batch)
    for layer in kinds.values():
        stream, h, routing = model.before(layer, x, batch, kv)
        y = None
        if routing is not None:
            total = ExpertSum(h, routing, config.num_experts, config.moe_intermediate_size, expert_format)
            layer_sum = LayerSum([total], expands_quantised=False)
            layer_sum.wave(weights, nowhere, 1)
            (y,) = layer_sum.totals()
        model.after(layer, stream, h, y)
    model.logits(x[-1:]).argmax(-1)
