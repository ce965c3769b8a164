"""Token ids to text, one at a time."""

import codecs
import json
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer as Encoder
from tokenizers import pre_tokenizers

from duomoe.errors import naming_failures

BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


# As the tokenizers library does with bytes that were tokens of their own: U+FFFD for each that is broken.
def _replace_each(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\N{REPLACEMENT CHARACTER}" * (error.end - error.start), error.end


codecs.register_error("duomoe.each", _replace_each)


class Detokenizer:
    """What each token of a tokenizer adds to a text, as bytes.

    A text is its tokens' bytes in a row, as UTF-8: a token may hold a part of a character. This is what the tokenizers
    library makes of the same tokens, but for one thing. Where bytes are tokens of their own (`<0x0A>`), one broken byte
    makes the library give up the whole characters beside it, which a text that streams has already given out.

    Args:
        encoder: the tokenizer.
        special: ids of the tokens that are not part of the text.

    Attributes:
        errors: how bytes that are no UTF-8 become text, a name that `codecs` knows.
        leading: so many spaces at the beginning of a text are not part of it.
    """

    def __init__(self, encoder: Encoder, special: frozenset[int]) -> None:
        self._encoder = encoder
        self._special = special
        decoder = json.loads(encoder.decoder.__getstate__()) if encoder.decoder is not None else {"type": None}
        steps = decoder.get("decoders", [decoder])
        kinds = [step["type"] for step in steps if step["type"] != "Fuse"]
        self._byte_tokens = "ByteFallback" in kinds
        self._replaced: list[tuple[str, str]] = []
        self._alphabet: dict[str, int] = {}
        self.errors = "duomoe.each" if self._byte_tokens else "replace"
        self.leading = 0
        self._separator = ""
        if kinds == ["ByteLevel"]:
            self._alphabet = byte_alphabet()
        elif kinds == [None]:  # the library puts a space between tokens then
            self._separator, self.leading = " ", 1
        elif _is_replacement(steps):
            self._replaced = [(step["pattern"]["String"], step["content"]) for step in steps if "pattern" in step]
            self.leading = steps[-1].get("start", 0)
        self._in_context = not (self._alphabet or self._separator or _is_replacement(steps))
        self._known: dict[int, bytes] = {}

    def of(self, token: int, before: int | None) -> bytes:
        """Return what a token adds to a text.

        Args:
            token: its id.
            before: the id of the last token before it that is part of the text, if there is one.
        """
        if self._in_context and token not in self._special:
            return self._after(token, before)
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._bytes(token)
        return found

    def is_text(self, token: int) -> bool:
        """Return whether a token is part of the text: one that exists and is not special."""
        return token not in self._special and self._encoder.id_to_token(token) is not None

    def _bytes(self, token: int) -> bytes:
        with naming_failures(f"token {token} has no text"):
            text = self._encoder.id_to_token(token)
        if text is None or token in self._special:
            return b""
        if self._byte_tokens and (match := BYTE_TOKEN.fullmatch(text)):
            return bytes.fromhex(match[1])
        if self._alphabet and all(char in self._alphabet for char in text):
            return bytes(self._alphabet[char] for char in text)
        for old, new in self._replaced:
            text = text.replace(old, new)
        return (self._separator + text).encode()

    def _after(self, token: int, before: int | None) -> bytes:
        """Ask the library what a token is behind another one, where its decoder is of an uncommon kind."""
        if self._byte_tokens and BYTE_TOKEN.fullmatch(self._encoder.id_to_token(token) or ""):
            return self._bytes(token)
        with naming_failures(f"token {token} has no text"):
            if before is None:
                return self._encoder.decode([token]).encode()
            text, known = self._encoder.decode([before, token]), self._encoder.decode([before])
            return (text[len(known) :] if text.startswith(known) else self._encoder.decode([token])).encode()


class Decoding:
    """The text of one sequence, token by token; it holds back one unfinished character at most.

    A character that begins in the prompt and ends behind it belongs to the text.

    Args:
        detokenizer: of the sequence's tokenizer.
        prompt: token ids that stand before the text.
    """

    def __init__(self, detokenizer: Detokenizer, prompt: Sequence[int] = ()) -> None:
        self._detokenizer = detokenizer
        self._before = next((token for token in reversed(prompt) if detokenizer.is_text(token)), None)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(detokenizer.errors)
        self._leading = detokenizer.leading  # spaces that are still to be left out
        self._begun = False
        for token in prompt:
            if not self._leading:
                break
            self._strip(detokenizer.of(token, None))
        self._utf8.decode(self._end_of(prompt))

    def push(self, token: int) -> str:
        """Take the next token; return the characters that are whole now."""
        added = self._strip(self._detokenizer.of(token, self._before))
        if self._detokenizer.is_text(token):
            self._before = token
        self._begun = self._begun or bool(added)
        return self._utf8.decode(added)

    def finish(self) -> str:
        """Return what is left once no more tokens come: nothing, or U+FFFD for a character that stays unfinished."""
        return self._utf8.decode(b"", final=True) if self._begun else ""

    def _strip(self, added: bytes) -> bytes:
        while self._leading and added:
            if not added.startswith(b" "):
                self._leading = 0
                break
            added, self._leading = added[1:], self._leading - 1
        return added

    def _end_of(self, prompt: Sequence[int]) -> bytes:
        """Return the prompt's last bytes, enough to hold any character that it leaves unfinished."""
        found = b""
        for index in range(len(prompt) - 1, -1, -1):
            if len(found) >= 3:
                break
            found = self._detokenizer.of(prompt[index], prompt[index - 1] if index else None) + found
        return found


def byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    Printable Latin-1 characters stand for themselves, the other bytes are numbered from U+0100 on.
    """
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    printable = [byte for byte in range(256) if chr(byte) in alphabet]
    others = [byte for byte in range(256) if chr(byte) not in alphabet]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _is_replacement(steps: list[dict[str, Any]]) -> bool:
    """Return whether a decoder replaces within each token, joins them and strips the beginning, as Llama's does."""
    *within, last = [step for step in steps if step["type"] != "Fuse"] or [{}]
    if last.get("type") == "Strip":
        fused = steps[-2:-1] == [{"type": "Fuse"}]
        strips = fused and last.get("content") == " " and last.get("stop") == 0
    else:
        within, strips = [*within, last], True
    plain = all(
        step.get("type") == "ByteFallback" or (step.get("type") == "Replace" and "String" in step["pattern"])
        for step in within
    )
    return bool(steps) and strips and plain
