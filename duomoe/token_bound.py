"""How few tokens a text can have: tells that it is too long without turning it into tokens."""

import json
import math
import unicodedata
from collections import Counter
from typing import Any

from tokenizers import Tokenizer as Encoder
from tokenizers import models

from duomoe.detokenizer import byte_alphabet

SPACE = "▁"  # stands for a space in vocabularies that are not byte-level


class TokenBound:
    """A lower bound of a text's tokens, from what each of its characters accounts for.

    Each character lies in one token. If the longest token with an `e` in it has 20 characters, an `e` accounts for a
    twentieth of a token at least. Added up over a text, that is at most its number of tokens.

    Args:
        encoder: a tokenizer. Where it may drop or shorten text in ways not known here, the bound is 0.
    """

    def __init__(self, encoder: Encoder) -> None:
        normalizing, splitting = _steps(encoder.normalizer), _steps(encoder.pre_tokenizer)
        self._composes = any(step["type"] == "NFC" for step in normalizing)
        self._byte_level = any(step["type"] == "ByteLevel" for step in splitting)
        self._letters = {byte: char for char, byte in byte_alphabet().items()}
        added = encoder.get_added_tokens_decoder().values()
        self._strips = any(token.lstrip or token.rstrip for token in added)
        self._longest: dict[str, int] = {}
        self._unknown = 0.0  # what a character accounts for that is in no token
        known = all(_keeps_text(step) for step in (*normalizing, *splitting))
        if not known or not isinstance(encoder.model, models.BPE):
            return
        vocabulary = encoder.get_vocab(with_added_tokens=False)
        for text in vocabulary:
            self._note(Counter(text), len(text))
        for token in added:
            counts = self._counts(token.content)
            self._note(counts, counts.total())
        if encoder.model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
            self._unknown = 1.0
        else:  # a character that is no token by itself may be dropped
            self._longest = {char: longest for char, longest in self._longest.items() if char in vocabulary}

    def least_tokens(self, text: str) -> int:
        """Return how many tokens a text has at least."""
        if self._strips:  # tokens that take the spaces beside them with them, however many
            text = "".join(text.split())
        if self._composes:
            text = unicodedata.normalize("NFC", text)
        counts = self._counts(text)
        parts = (
            count / self._longest[char] if char in self._longest else count * self._unknown
            for char, count in counts.items()
        )
        return math.ceil(math.fsum(parts) - 1e-6)

    def _counts(self, text: str) -> Counter[str]:
        """Return how often each of the vocabulary's characters is in a text."""
        if self._byte_level:
            return Counter({self._letters[byte]: n for byte, n in Counter(text.encode(errors="surrogatepass")).items()})
        counts = Counter(text)
        counts[SPACE] += counts.pop(" ", 0)
        return counts

    def _note(self, counts: Counter[str], length: int) -> None:
        for char in counts:
            self._longest[char] = max(self._longest.get(char, 0), length)


def _steps(part: Any) -> list[dict[str, Any]]:
    """Return what a normalizer or pre-tokenizer does, one after the other."""
    if part is None:
        return []
    state: dict[str, Any] = json.loads(part.__getstate__())
    steps: list[dict[str, Any]] = state.get("normalizers") or state.get("pretokenizers") or [state]
    return steps


def _keeps_text(step: dict[str, Any]) -> bool:
    """Return whether a step keeps every character, or writes a space as the vocabulary does, or composes accents."""
    if step["type"] == "Replace":
        return bool(step["pattern"] == {"String": " "} and step["content"] == SPACE)
    if step["type"] in ("Split", "Punctuation"):
        return bool(step["behavior"] != "Removed")
    return step["type"] in ("NFC", "Prepend", "ByteLevel", "Metaspace", "Digits")
