"""How a single token reads, for log-probabilities."""

import re
from functools import lru_cache

from duomoe.tokenizer import Tokenizer


class TokenText:
    """The text and the bytes of each token of a vocabulary.

    Args:
        tokenizer: the checkpoint's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encoder = tokenizer.encoder
        # A token reads as the continuation of another: by itself it may lose its leading space.
        self._before = tokenizer.encode("a", special=False)[-1:]
        self._known = self.decode(self._before)
        self.of = lru_cache(maxsize=1 << 16)(self._of)

    def _of(self, token: int) -> tuple[str, list[int] | None]:
        """Return a token's text, and its bytes of UTF-8; None where they cannot be told."""
        text = self.decode([*self._before, token])[len(self._known) :]
        if "\N{REPLACEMENT CHARACTER}" not in text:
            return text, list(text.encode("utf-8"))
        return text, _raw_bytes(self._encoder.id_to_token(token) or "")

    def decode(self, tokens: list[int]) -> str:
        """Return the text of some tokens, special ones as they are written."""
        text: str = self._encoder.decode(tokens, skip_special_tokens=False)
        return text


def _raw_bytes(piece: str) -> list[int] | None:
    """Return the bytes that an entry of a vocabulary stands for, where it is a part of a character."""
    if found := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        return [int(found[1], 16)]
    codes = [_BYTE_OF.get(character) for character in piece]
    return None if None in codes else [code for code in codes if code is not None]


def _byte_alphabet() -> dict[str, int]:
    """Return which byte each character stands for in byte-level vocabularies: printable ones for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
