"""The answers of /v1/completions."""

from collections.abc import Iterable
from typing import Any

from duomoe.engine.completion import Chunk, Completion, Logprobs
from duomoe.server.answer import Answer
from duomoe.server.generation import Generation
from duomoe.server.logprobs import CompletionLogprobs
from duomoe.server.protocol import CompletionRequest
from duomoe.server.token_text import TokenText


class CompletionAnswer(Answer):
    """Choices that are text, perhaps with the prompt in front.

    Args:
        generation: what is answered.
        texts: how single tokens read; None where there is no tokenizer.
    """

    def __init__(self, generation: Generation[CompletionRequest], texts: TokenText | None) -> None:
        super().__init__(generation, "cmpl", ("text_completion", "text_completion"))
        self._counts_tokens = not generation.request.scored
        self._request, self._prompts, self._texts = generation.request, generation.prompts, texts
        count = len(generation.streams)
        self._begun = [False] * count
        top = self._request.logprobs
        self._logprobs = [CompletionLogprobs(texts, top) for _ in range(count) if top is not None and texts is not None]

    def pieces(self, index: int, chunk: Chunk) -> Iterable[dict[str, Any]]:
        """Return what a chunk adds; the first one of an echo brings the prompt."""
        reason = chunk.completion.finish_reason if chunk.completion is not None else None
        text = "" if self._request.scored else chunk.text
        if self._request.echo and not self._begun[index]:
            self._begun[index] = True
            text = self._prompt_text(index) + text
        elif not (text or reason or self._logprobs):
            return []
        told = self._logprobs[index].lists([chunk.token_id], [chunk.logprobs]) if self._logprobs else None
        return [_choice(index, text, told, reason)]

    def choice(self, index: int, completion: Completion) -> dict[str, Any]:
        """Return a whole choice."""
        text = "" if self._request.scored else completion.text
        if self._request.echo:
            text = self._prompt_text(index) + text
        told = self._told(index, completion) if self._logprobs else None
        return _choice(index, text, told, completion.finish_reason)

    def _told(self, index: int, completion: Completion) -> dict[str, Any]:
        """Return a whole choice's log-probabilities: those of the prompt, if it is there, and those of what follows."""
        tokens: list[int] = []
        told: list[Logprobs | None] = []
        if self._request.echo:
            tokens += self._prompt(index)
            told += completion.prompt_logprobs or []
        if not self._request.scored:
            tokens += completion.token_ids
            told += completion.logprobs or []
        return self._logprobs[index].lists(tokens, told)

    def _prompt(self, index: int) -> list[int]:
        return self._prompts[index // self._request.sampling.n]

    def _prompt_text(self, index: int) -> str:
        """Return a choice's prompt as the client wrote it, or else as its tokens read."""
        given = self._request.prompts[index // self._request.sampling.n]
        if isinstance(given, str):
            return given
        return "" if self._texts is None else self._texts.decode(given)


def _choice(index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
