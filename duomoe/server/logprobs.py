"""Log-probabilities as the two endpoints tell them."""

from collections.abc import Sequence
from typing import Any

from duomoe.engine.completion import Logprobs
from duomoe.server.token_text import TokenText


def chat_logprobs(token: int, told: Logprobs, texts: TokenText) -> dict[str, Any]:
    """Return one entry of a chat choice's `logprobs.content`."""
    top = [_entry(each, logprob, texts) for each, logprob in told.top]
    return _entry(token, told.logprob, texts) | {"top_logprobs": top}


def _entry(token: int, logprob: float, texts: TokenText) -> dict[str, Any]:
    text, raw = texts.of(token)
    return {"token": text, "logprob": _finite(logprob), "bytes": raw}


class CompletionLogprobs:
    """Log-probabilities of a text completion: lists side by side.

    Args:
        texts: how tokens read.
        top: how many likeliest tokens are told at each place.
    """

    def __init__(self, texts: TokenText, top: int) -> None:
        self._texts, self._top = texts, top
        self._offset = 0

    def lists(self, tokens: Sequence[int], told: Sequence[Logprobs | None]) -> dict[str, Any]:
        """Return the lists for some tokens that follow those of the call before; nothing is told of a text's first."""
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, each in zip(tokens, told, strict=True):
            text, _ = self._texts.of(token)
            found["tokens"].append(text)
            found["token_logprobs"].append(None if each is None else _finite(each.logprob))
            found["top_logprobs"].append(None if each is None else self._likeliest(token, each))
            found["text_offset"].append(self._offset)
            self._offset += len(text)
        return found

    def _likeliest(self, token: int, told: Logprobs) -> dict[str, float]:
        """Return the likeliest tokens by text, and the token itself; of several that read alike, the likeliest."""
        found: dict[str, float] = {}
        for each, logprob in [*told.top[: self._top], (token, told.logprob)]:
            found.setdefault(self._texts.of(each)[0], _finite(logprob))
        return found


def _finite(logprob: float) -> float:
    """Return a log-probability as JSON has it; a token that cannot come has a very small one."""
    return max(logprob, -9999.0)
