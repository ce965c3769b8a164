"""One decode step: every running sequence by one token. First a forward to logits, then a token is chosen from each.

What both are computed from lies on the device (`Sequences`), and so does what one step hands to the next. While the
forward runs, the host makes the masks of grammars. On a GPU both are captured as CUDA graphs for each batch size, the
second also for each kind of sampling that batches have needed, so that the host launches them at once. A batch is
padded to the next such size; padding has no key, no expert and no result. Graphs are captured before the first token of
the requests that need them (`prepare`), never between two tokens of a request that runs alone.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from duomoe.cuda import captured
from duomoe.engine.completion import Logprobs
from duomoe.engine.logprobs import TokenLogprobs, logprobs_of
from duomoe.engine.masks import changed_masks
from duomoe.engine.request import Request
from duomoe.engine.sampler import Adjustments, Chances, Draw, Needs, adjust, choose, needs_of
from duomoe.experts.policies import Policy
from duomoe.memory.kv_cache import KVCache
from duomoe.memory.pages import PAGE_SIZE
from duomoe.memory.sequences import (
    FREQUENCY,
    LENGTH,
    MIN_P,
    PAGES,
    REPETITION,
    SEED,
    TEMPERATURE,
    TOKEN,
    TOP_K,
    TOP_P,
    Sequences,
    row_pages,
)
from duomoe.models import Batch, Model
from duomoe.sampling import SamplingParams

R = TypeVar("R")


class Sampled(NamedTuple):
    """A sequence's next token."""

    token: int
    logprobs: Logprobs | None  # where the request asks for them


class DecodeStep:
    """Runs decode steps.

    Args:
        model: the non-expert part.
        policy: runs the blocks with their experts.
        cache: the KV pages.
        max_batch: the most sequences of a step.
        max_tokens: the most tokens of a sequence.
        captured: use CUDA graphs, where the policy allows it.
        eos: token ids that end a sequence.
    """

    def __init__(
        self,
        model: Model,
        policy: Policy,
        cache: KVCache,
        max_batch: int,
        max_tokens: int,
        captured: bool,
        eos: frozenset[int],
    ) -> None:
        self.model, self.policy, self.cache, self.eos = model, policy, cache, eos
        self.max_batch, self.max_pages = max_batch, row_pages(max_tokens)
        self.sequences = Sequences(model.device, max_batch, self.max_pages, model.config.vocab_size)
        self.padded = model.device.type == "cuda"
        self.captured = captured and self.padded and policy.can_be_captured
        self._launched: _Launched | None = None
        self._prepared: set[tuple[int, Needs]] = set()  # batch sizes and kinds of sampling
        self._forwards: dict[int, _Graph[Tensor]] = {}
        self._samplings: dict[tuple[int, Needs], _Graph[_Tokens]] = {}
        if self.captured:
            # What goes from one graph to the other; and a pool for all graphs, because never two of them run at once.
            self._logits = torch.empty(max_batch, model.config.vocab_size, dtype=torch.float32, device=model.device)
            self._pool = torch.cuda.graph_pool_handle()

    def prepare(self, sequences: int, params: Sequence[SamplingParams]) -> None:
        """Compile and capture the steps of so many sequences and of all fewer, on a GPU, where they are missing.

        A step of padding runs first, which compiles what has to be and leaves nothing behind.

        Args:
            sequences: how many there are to be.
            params: theirs.
        """
        if not (self.padded and self.policy.can_be_captured) or self.policy.observer is not None:
            return
        needs = needs_of(params, self.model.config.vocab_size)
        for size in _sizes(sequences, self.max_batch):
            if (size, needs) not in self._prepared:
                self._choose([], size)
                self.policy.prepare_decode()
                self._sample(self._forward(size, self.max_pages), needs)
                if self.captured:
                    self._capture(size, needs)
                self._prepared.add((size, needs))

    def _capture(self, size: int, needs: Needs) -> None:
        logits, device = self._logits[:size], self.model.device
        if size not in self._forwards:
            forward = lambda: logits.copy_(self._forward(size, self.max_pages))  # noqa: E731
            self._forwards[size] = _Graph(forward, device, self._pool)
        self._samplings[size, needs] = _Graph(lambda: self._sample(logits, needs), device, self._pool)

    def begin(self, requests: Sequence[Request], logits: Tensor) -> None:
        """Give sequences their rows, and launch the sampling of their next tokens behind a prefill.

        Args:
            requests: whose tokens all have keys.
            logits: [requests, vocab] float32, of their last tokens.
        """
        for request in requests:
            tokens = request.tokens, request.prompt_length
            self.sequences.join(request, *tokens, request.pages, request.seed, request.params)
        self._choose(requests, len(requests))
        self._launch_sampling(requests, logits, None, begun=True)

    def launch(self, requests: Sequence[Request]) -> None:
        """Launch a step of requests that have begun; their last tokens' keys go into the cache."""
        for request in requests:
            self.sequences.extend(request, request.pages)
        # Never of a width of 1, for which torch.compile makes another variant.
        size, width = len(requests), max(2, *(len(request.pages) for request in requests))
        if self.padded:
            size, width = _sizes(size, self.max_batch)[-1], self.max_pages
        self._choose(requests, size)
        self.policy.prepare_decode()
        graph = self._forwards.get(size) if self.policy.observer is None else None
        logits = self._forward(size, width) if graph is None else graph.run()
        self._launch_sampling(requests, logits, graph, begun=False)

    def read(self) -> list[Sampled | Exception]:
        """Wait for what was launched; return each request's token, or what is wrong with that request alone."""
        assert self._launched is not None, "a step is launched before it is read"
        requests, (tokens, logprobs), failures = self._launched
        self._launched = None
        read: list[int] = tokens.tolist()  # host-sync ok: the one read of a step
        if min(read) < 0:
            raise RuntimeError("a decode step had fewer slots for experts than it needs")
        counts = [request.params.logprobs for request in requests]
        told = [] if logprobs is None else logprobs.read([count or 0 for count in counts])
        sampled = [Sampled(token, None) for token in read[: len(requests)]]
        for place, count in enumerate(counts):
            if count is not None:
                sampled[place] = Sampled(read[place], told[place])
        return [failures.get(request, found) for request, found in zip(requests, sampled, strict=True)]

    def leave(self, request: Request) -> None:
        """Take a request's row back, if it has one; it may begin again."""
        self.sequences.leave(request)

    def _choose(self, requests: Sequence[Request], size: int) -> None:
        self.sequences.choose(requests, size)
        self.sequences.send()

    def _launch_sampling(
        self, requests: Sequence[Request], logits: Tensor, forward: "_Graph[Tensor] | None", begun: bool
    ) -> None:
        """Choose tokens by logits, which a graph has given, or none; `begun` says that rows were just written."""
        masks, failures = changed_masks(requests, self.eos, logits.shape[1], begun)
        self.sequences.allow(masks)
        needs = needs_of((request.params for request in requests), logits.shape[1])
        # A graph that does more serves those who need less, too.
        ready = [each for size, each in self._samplings if size == len(logits) and each.serves(needs)]
        if forward is None or not ready:
            tokens = self._sample(logits, needs)
        else:
            tokens = self._samplings[len(logits), min(ready)].run()
        self._launched = _Launched(requests, tokens, failures)

    def _forward(self, size: int, width: int) -> Tensor:
        """Compute logits [size, vocab] float32 for the step's first rows; nothing in it waits for the host.

        Args:
            size: rows.
            width: pages of the longest sequence.
        """
        rows = self.sequences.table[:, : PAGES + width].index_select(0, self.sequences.step_rows[:size])
        lengths, page_table = rows[:, LENGTH], rows[:, PAGES:]
        positions = (lengths - 1).clamp(min=0)
        pages = page_table.gather(1, positions[:, None] // PAGE_SIZE).squeeze(1)
        cos, sin = self.model.rotary.cos_sin(positions, lengths)
        batch = Batch(
            tokens=rows[:, TOKEN].contiguous(),
            cos=cos,
            sin=sin,
            rows=torch.where(lengths > 0, pages * PAGE_SIZE + positions % PAGE_SIZE, -1),
            page_table=page_table.to(torch.int32),
            query_start=torch.arange(size + 1, dtype=torch.int32, device=rows.device),
            context_len=lengths.to(torch.int32),
            max_query_len=1,
        )
        return self.model.logits(self.policy.decode(batch, self.cache.layers))

    def _sample(self, logits: Tensor, needs: Needs) -> "_Tokens":
        """Choose a token for each of the step's first rows, by their logits, and add it; this does not wait either."""
        held = self.sequences
        rows = held.step_rows[: len(logits)]
        chances, by = None, logits
        if needs.draw != Draw.GREEDY or needs.adjusts:
            words, numbers = (table[:, :PAGES].index_select(0, rows) for table in (held.table, held.numbers))
            single = numbers.to(torch.float32)
            chances = Chances(
                temperature=single[:, TEMPERATURE],
                top_k=words[:, TOP_K],
                top_p=numbers[:, TOP_P],
                min_p=single[:, MIN_P],
                seed=words[:, SEED],
                position=words[:, LENGTH],
            )
            if needs.adjusts:
                tables = (table.index_select(0, rows) for table in (held.bias, held.seen, held.allowed))
                by = adjust(logits, Adjustments(*tables, *single[:, REPETITION : FREQUENCY + 1].unbind(1)))
        tokens = choose(by, needs.draw, chances)
        held.advance(rows, tokens, count=needs.adjusts)
        if (lacking := self.policy.lacking) is not None:
            tokens = tokens.masked_fill(lacking, -1)
        return _Tokens(tokens, logprobs_of(logits, tokens) if needs.logprobs else None)


class _Tokens(NamedTuple):
    """What was chosen in a step: [rows] int64, -1 where experts were left out."""

    tokens: Tensor
    logprobs: TokenLogprobs | None


class _Launched(NamedTuple):
    """A step under way: whose it is, what comes of it, and what is wrong with some of its requests."""

    requests: Sequence[Request]
    tokens: _Tokens
    failures: dict[Hashable, Exception]


def _sizes(sequences: int, most: int) -> list[int]:
    """Return the sizes to which steps of up to so many sequences are padded: powers of two, and at last `most`."""
    powers = [1 << bits for bits in range((sequences - 1).bit_length() + 1)]
    return [min(power, most) for power in powers]


class _Graph(Generic[R]):
    """What a function launches, captured.

    Args:
        function: launches it; what it returns is overwritten at each run.
        device: on which GPU.
        pool: where its memory comes from.
    """

    def __init__(self, function: Callable[[], R], device: torch.device, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with captured(self._graph, device, pool):
            self._result = function()

    def run(self) -> R:
        """Launch it again, and return what comes of it."""
        self._graph.replay()
        return self._result
