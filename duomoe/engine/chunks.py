"""A prefill pass, cut into chunks: what a layer needs for a moment then does not grow with the pass."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from duomoe.memory.pages import PAGE_SIZE
from duomoe.memory.plan import CHUNK_TOKENS
from duomoe.models import Batch
from duomoe.models.rope import Rotary


class Span(NamedTuple):
    """Consecutive tokens of one sequence."""

    tokens: list[int]
    begin: int  # position of the first one
    prompt_length: int  # of the sequence
    pages: list[int]  # likewise


def cut(spans: Sequence[Span], size: int = CHUNK_TOKENS) -> list[list[Span]]:
    """Fill chunks of `size` tokens with spans, in order; a span that does not fit goes on in the next chunk."""
    chunks: list[list[Span]] = [[]]
    room = size
    for tokens, begin, prompt_length, pages in spans:
        done = 0
        while done < len(tokens):
            if room == 0:
                chunks.append([])
                room = size
            taken = tokens[done : done + room]
            chunks[-1].append(Span(taken, begin + done, prompt_length, pages))
            done += len(taken)
            room -= len(taken)
    return chunks


def batch_of(spans: Sequence[Span], rotary: Rotary, device: torch.device) -> Batch:
    """Return the batch of one chunk."""

    def tensor(values: Sequence[object]) -> torch.Tensor:
        return torch.tensor(values).to(device, non_blocking=True)

    width = max(2, *(len(span.pages) for span in spans))  # never 1, for which torch.compile would make another variant
    page_table = tensor([span.pages + [-1] * (width - len(span.pages)) for span in spans])
    positions = tensor([span.begin + i for span in spans for i in range(len(span.tokens))])
    owner = tensor([number for number, span in enumerate(spans) for _ in span.tokens])
    context_len = tensor([span.begin + len(span.tokens) for span in spans])
    query_start = [0]
    for span in spans:
        query_start.append(query_start[-1] + len(span.tokens))
    # A token's key is made when the sequence ends with it, or with the prompt that it is part of; so it is again.
    lengths = tensor([span.prompt_length for span in spans])[owner].maximum(positions + 1)
    cos, sin = rotary.cos_sin(positions, lengths)
    return Batch(
        tokens=tensor([token for span in spans for token in span.tokens]),
        cos=cos,
        sin=sin,
        rows=page_table[owner, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE,
        page_table=page_table.to(torch.int32),
        query_start=tensor(query_start).to(torch.int32),
        context_len=context_len.to(torch.int32),
        max_query_len=max(len(span.tokens) for span in spans),
    )
