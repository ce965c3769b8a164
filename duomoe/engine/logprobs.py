"""Log-probabilities of tokens, in the model's own distribution: of what is sampled, and of a prompt."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from duomoe.engine.completion import Logprobs
from duomoe.models import Model
from duomoe.sampling import MOST_LOGPROBS


class TokenLogprobs(NamedTuple):
    """Of one token of each row, and of the likeliest ones.

    Attributes:
        own: [rows] float32.
        top: [rows, MOST_LOGPROBS] float32, or fewer where the vocabulary is smaller; the likeliest first.
        tokens: as `top`, int64.
    """

    own: Tensor
    top: Tensor
    tokens: Tensor

    def read(self, counts: Sequence[int]) -> list[Logprobs]:
        """Wait for them; return those of the first rows, each with so many of the likeliest."""
        own, top, tokens = self.own.tolist(), self.top.tolist(), self.tokens.tolist()  # host-sync ok: a step is over
        each = zip(own, top, tokens, counts, strict=False)  # behind them is padding
        return [Logprobs(mine, list(zip(ids[:n], values[:n], strict=True))) for mine, values, ids, n in each]


def logprobs_of(logits: Tensor, tokens: Tensor) -> TokenLogprobs:
    """Return the log-probabilities of tokens [rows] int64 by logits [rows, vocab] float32."""
    total = logits.logsumexp(-1, keepdim=True)
    top, likeliest = logits.topk(min(MOST_LOGPROBS, logits.shape[1]))
    return TokenLogprobs((logits.gather(1, tokens[:, None]) - total).squeeze(1), top - total, likeliest)


def prompt_logprobs(
    model: Model, stream: Tensor, prompt: Sequence[int], count: int, rows: int
) -> list[Logprobs | None]:
    """Return the log-probability of each token of a prompt, given those before it; of the first one, None.

    Args:
        model: its head.
        stream: [tokens, hidden], what left the last block.
        prompt: its tokens.
        count: how many of the likeliest to tell of.
        rows: how many tokens' logits may be there at a time.
    """
    found: list[Logprobs | None] = [None]
    if len(prompt) == 1:
        return found
    following = torch.tensor(prompt[1:], dtype=torch.int64).to(stream.device)
    for inputs, tokens in zip(stream[:-1].split(rows), following.split(rows), strict=True):
        found += logprobs_of(model.logits(inputs), tokens).read([count] * len(tokens))
    return found
