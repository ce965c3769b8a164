"""Text to token ids: limits, and failures of the library."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_folders import KINDS, byte_fallback, byte_level, load, save
from tokenizers import AddedToken, normalizers, pre_tokenizers

from duomoe.errors import InputError
from duomoe.token_bound import TokenBound
from duomoe.tokenizer import Tokenizer


def stripping() -> Any:
    encoder = byte_level()
    encoder.add_tokens([AddedToken("<x>", lstrip=True, rstrip=True)])
    return encoder


def dropping() -> Any:
    encoder = byte_level()
    split = pre_tokenizers.Split("b", "removed")
    encoder.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return encoder


def trimming() -> Any:
    encoder = byte_fallback()
    encoder.normalizer = normalizers.Strip()
    return encoder


BOUNDED = KINDS | {"stripping": stripping, "dropping": dropping, "trimming": trimming}

ENCODERS = {name: (encoder, TokenBound(encoder)) for name, encoder in ((name, BOUNDED[name]()) for name in BOUNDED)}

TEXTS = st.lists(
    st.sampled_from(["the", " there", "ab", "abab", "€", "é", "e\u0301", "    ", "<|end|>", "<x>", "\n", "日本", "b"]),
    max_size=30,
).map("".join)


@pytest.mark.parametrize("kind", BOUNDED)
@given(text=TEXTS)
@settings(max_examples=150, deadline=None)
def test_a_text_has_at_least_as_many_tokens_as_the_bound_says(kind: str, text: str) -> None:
    encoder, bound = ENCODERS[kind]
    assert bound.least_tokens(text) <= len(encoder.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "stripping"])
def test_a_text_that_is_far_too_long_is_refused_before_it_is_tokenised(tmp_path: Path, kind: str) -> None:
    tokenizer = load(save(tmp_path, BOUNDED[kind]()))

    class Unused:
        def encode(self, *args: object, **options: object) -> None:
            raise AssertionError("the text was turned into tokens")

    text = "abé" * 2000
    assert len(tokenizer.encode(text, limit=8000)) <= 8000
    tokenizer._bound, tokenizer.encoder = tokenizer._bound, Unused()  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"at least \d+ tokens; .* 100 tokens"):
        tokenizer.encode(text, limit=100)


class Panic(BaseException):
    """As the library's PanicException, which is no Exception."""


def test_panics_are_input_errors(tmp_path: Path) -> None:
    tokenizer = load(save(tmp_path, byte_level()))

    class Panicking:
        def encode(self, *args: object, **options: object) -> None:
            raise Panic("index out of bounds")

        id_to_token = encode

    tokenizer.detokenizer()._encoder = Panicking()  # type: ignore[assignment]
    tokenizer.encoder = Panicking()  # type: ignore[assignment]
    with pytest.raises(InputError, match="index out of bounds"):
        tokenizer.encode("a")
    with pytest.raises(InputError, match="index out of bounds"):
        tokenizer.decode([5])


def test_a_tokenizer_that_panics(tmp_path: Path) -> None:
    """The library's own panic, which it also tells on stderr."""
    encoder = byte_level()
    encoder.pre_tokenizer = pre_tokenizers.FixedLength(0)
    with pytest.raises(InputError, match="the prompt cannot be turned into tokens: chunk size"):
        load(save(tmp_path, encoder)).encode("the")


def test_a_file_that_makes_the_library_panic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def panic(*args: object) -> None:
        raise Panic("called `Option::unwrap()` on a `None` value")

    class Encoder:
        from_file = staticmethod(panic)

    folder = save(tmp_path, byte_level())
    monkeypatch.setattr("duomoe.tokenizer.Encoder", Encoder)
    with pytest.raises(InputError, match="not a tokenizer"):
        load(folder)


def test_lone_surrogates_are_refused(tmp_path: Path) -> None:
    tokenizer: Tokenizer = load(save(tmp_path, byte_level()))
    for text in ("\ud800", "\ud800" * 1000):
        with pytest.raises(InputError, match="the prompt"):
            tokenizer.encode(text, limit=10)
