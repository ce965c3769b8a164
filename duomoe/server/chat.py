"""The answers of /v1/chat/completions."""

from collections.abc import Iterable
from typing import Any

from duomoe.chat_output import Delta
from duomoe.engine.completion import Chunk, Completion
from duomoe.server.answer import Answer
from duomoe.server.generation import Generation
from duomoe.server.logprobs import chat_logprobs
from duomoe.server.protocol import ChatRequest
from duomoe.server.token_text import TokenText


class ChatAnswer(Answer):
    """Choices that are messages.

    Args:
        generation: what is answered.
        texts: how single tokens read.
    """

    def __init__(self, generation: Generation[ChatRequest], texts: TokenText) -> None:
        super().__init__(generation, "chatcmpl", ("chat.completion", "chat.completion.chunk"))
        self._request, self._texts, self._parsers = generation.request, texts, generation.parsers
        count = len(self._parsers)
        self._begun, self._called = [False] * count, [False] * count

    def pieces(self, index: int, chunk: Chunk) -> Iterable[dict[str, Any]]:
        """Return what a chunk adds; the first one says whose message it is."""
        last = chunk.completion is not None
        pieces = [_piece(index, _delta(delta)) for delta in self._deltas(index, chunk.text, last)]
        if self._request.logprobs is not None and chunk.logprobs is not None:
            pieces = pieces or [_piece(index, {})]
            told = [chat_logprobs(chunk.token_id, chunk.logprobs, self._texts)]
            pieces[0]["logprobs"] = {"content": told, "refusal": None}
        if not self._begun[index]:
            self._begun[index] = True
            pieces.insert(0, _piece(index, {"role": "assistant", "content": ""}))
        if chunk.completion is not None:
            pieces.append(_piece(index, {}) | {"finish_reason": self._reason(index, chunk.completion)})
        return pieces

    def choice(self, index: int, completion: Completion) -> dict[str, Any]:
        """Return a whole choice."""
        deltas = list(self._deltas(index, completion.text, last=True))
        content, reasoning = (
            "".join(delta.text for delta in deltas if delta.kind == kind) for kind in ("content", "reasoning")
        )
        calls = [_call(delta) for delta in deltas if delta.kind == "call"]
        message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        told = None
        if self._request.logprobs is not None:
            each = zip(completion.token_ids, completion.logprobs or [], strict=True)
            told = {"content": [chat_logprobs(*pair, self._texts) for pair in each], "refusal": None}
        reason = self._reason(index, completion)
        return {"index": index, "message": message, "logprobs": told, "finish_reason": reason}

    def _deltas(self, index: int, text: str, last: bool) -> Iterable[Delta]:
        """Take some text apart; calls after the first are left out where only one is wanted."""
        parser = self._parsers[index]
        for delta in [*parser.push(text), *(parser.finish() if last else [])]:
            if delta.kind == "call":
                if self._request.one_call and delta.index > 0:
                    continue
                self._called[index] = True
            yield delta

    def _reason(self, index: int, completion: Completion) -> str:
        if self._called[index] and completion.finish_reason == "stop":
            return "tool_calls"
        return completion.finish_reason


def _piece(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _delta(delta: Delta) -> dict[str, Any]:
    """Return a delta as clients read it."""
    if delta.kind == "content":
        return {"content": delta.text}
    if delta.kind == "reasoning":
        return {"reasoning_content": delta.text}
    return {"tool_calls": [{"index": delta.index} | _call(delta)]}


def _call(call: Delta) -> dict[str, Any]:
    """Return a call, which comes in one piece."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.text}}
