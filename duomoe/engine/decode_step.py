"""One decode step: every running sequence by one token, from a table of integers to sampled tokens.

On a GPU the step is captured as a CUDA graph for each batch size, so that the host launches it at once, and the batch
is padded to the next such size; padding has no key, no expert and no result. Graphs are captured before the first token
of the requests that need them (`prepare`), never between two tokens of a request that runs alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from duomoe.cuda import captured
from duomoe.engine.request import Request
from duomoe.experts.policies import Policy
from duomoe.memory.kv_cache import KVCache
from duomoe.memory.pages import PAGE_SIZE, pages_for
from duomoe.models import Batch, Model
from duomoe.sampling import sample

# Columns of the table in front of a sequence's pages. The length counts the token; 0 is padding.
TOKEN, LENGTH, SEED, TOP_K, PAGES = range(5)


class DecodeStep:
    """Runs decode steps.

    Args:
        model: the non-expert part.
        policy: runs the blocks with their experts.
        cache: the KV pages.
        max_batch: the most sequences of a step.
        max_tokens: the most tokens of a sequence.
        captured: use CUDA graphs, where the policy allows it.
    """

    def __init__(
        self, model: Model, policy: Policy, cache: KVCache, max_batch: int, max_tokens: int, captured: bool
    ) -> None:
        self.model, self.policy, self.cache = model, policy, cache
        self.max_batch, self.max_pages = max_batch, max(2, pages_for(max_tokens))
        self.padded = model.device.type == "cuda"
        self.captured = captured and self.padded and policy.can_be_captured
        self._graphs: dict[tuple[int, bool], _Graph | None] = {}  # by batch size and whether all are greedy
        # One for all graphs, because never two of them run at once.
        self._pool = torch.cuda.graph_pool_handle() if self.captured else None

    def prepare(self, sequences: int, greedy: bool) -> None:
        """Compile and capture the steps of so many sequences and of all fewer, on a GPU, where they are missing.

        A step of padding runs first, which compiles what has to be and leaves nothing behind.
        """
        if not (self.padded and self.policy.can_be_captured) or self.policy.observer is not None:
            return
        for size in _sizes(sequences, self.max_batch):
            if (size, greedy) not in self._graphs:
                self.policy.prepare_decode()
                integers = torch.zeros(size, PAGES + self.max_pages, dtype=torch.int64)
                integers[:, PAGES:] = -1
                floats = torch.tensor([[0.0, 1.0]] * size)
                self._step(integers.to(self.model.device), floats.to(self.model.device), greedy)
                self._graphs[size, greedy] = _Graph(self, integers, floats, greedy) if self.captured else None

    def run(self, requests: Sequence[Request]) -> Tensor:
        """Return the next token of each request, int64 [requests]; their last tokens' keys go into the cache."""
        integers, floats, greedy = self._table(requests)
        size, device = len(integers), self.model.device
        # A graph that draws tokens serves greedy requests, too.
        greedy = greedy and ((size, True) in self._graphs or (size, False) not in self._graphs)
        self.policy.prepare_decode()
        graph = self._graphs.get((size, greedy))
        if graph is None or self.policy.observer is not None:
            tokens = self._step(integers.to(device), floats.to(device), greedy)
        else:
            tokens = graph.run(integers, floats)
        return tokens[: len(requests)]

    def _table(self, requests: Sequence[Request]) -> tuple[Tensor, Tensor, bool]:
        """Return what the step is computed from, on the host: int64 [size, 4 + pages], float32 [size, 2], greedy."""
        size, width = len(requests), 2  # never 1 page, for which torch.compile would make another variant
        pages = [request.pages for request in requests]
        if self.padded:
            size, width = _sizes(size, self.max_batch)[-1], self.max_pages
        width = max(width, *map(len, pages))
        rows = []
        for request, held in zip(requests, pages, strict=True):
            # A seed is any 63-bit number, so the table is int64 throughout.
            row = [request.tokens[-1], request.length, request.seed, request.params.top_k]
            rows.append(row + held + [-1] * (width - len(held)))
        rows += [[0, 0, 0, 0] + [-1] * width] * (size - len(requests))
        params = [request.params for request in requests]
        chances = [[p.temperature, p.top_p] for p in params] + [[0.0, 1.0]] * (size - len(requests))
        return torch.tensor(rows), torch.tensor(chances), all(p.temperature == 0 for p in params)

    def _step(self, integers: Tensor, floats: Tensor, greedy: bool) -> Tensor:
        """Compute one step on the device; nothing in it waits for the host."""
        lengths, page_table = integers[:, LENGTH], integers[:, PAGES:]
        positions = (lengths - 1).clamp(min=0)
        pages = page_table.gather(1, positions[:, None] // PAGE_SIZE).squeeze(1)
        cos, sin = self.model.rotary.cos_sin(positions, lengths)
        batch = Batch(
            tokens=integers[:, TOKEN].contiguous(),
            cos=cos,
            sin=sin,
            rows=torch.where(lengths > 0, pages * PAGE_SIZE + positions % PAGE_SIZE, -1),
            page_table=page_table.to(torch.int32),
            query_start=torch.arange(len(integers) + 1, dtype=torch.int32, device=integers.device),
            context_len=lengths.to(torch.int32),
            max_query_len=1,
        )
        logits = self.model.logits(self.policy.decode(batch, self.cache.layers))
        if greedy:
            return logits.argmax(-1)
        return sample(logits, floats[:, 0], integers[:, TOP_K], floats[:, 1], integers[:, SEED], lengths)


def _sizes(sequences: int, most: int) -> list[int]:
    """Return the sizes to which steps of up to so many sequences are padded: powers of two, and at last `most`."""
    powers = [1 << bits for bits in range((sequences - 1).bit_length() + 1)]
    return [min(power, most) for power in powers]


class _Graph:
    """A step of one batch size, captured."""

    def __init__(self, step: DecodeStep, integers: Tensor, floats: Tensor, greedy: bool) -> None:
        device = step.model.device
        self.integers, self.floats = integers.to(device), floats.to(device)
        self.graph = torch.cuda.CUDAGraph()
        with captured(self.graph, device, step._pool):
            self.tokens = step._step(self.integers, self.floats, greedy)

    def run(self, integers: Tensor, floats: Tensor) -> Tensor:
        """Replay the step over new values; the result is overwritten by the next replay."""
        self.integers.copy_(integers, non_blocking=True)
        self.floats.copy_(floats, non_blocking=True)
        self.graph.replay()
        return self.tokens
