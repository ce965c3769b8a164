"""Text that streams: never half a character, never a part of a stop string."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Encoder
from tokenizers import decoders, models, pre_tokenizers

from duomoe.checkpoint import Checkpoint
from duomoe.tokenizer import TextStream, Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Return a tokenizer whose every token is one byte, so that most characters take several."""
    folder: Path = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    encoder = Encoder(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoder.decoder = decoders.ByteLevel()
    encoder.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + json.dumps({}).encode())
    return Tokenizer(Checkpoint(folder))


def pieces(tokenizer: Tokenizer, text: str, stop: list[str]) -> list[str]:
    stream = TextStream(tokenizer, stop)
    found = []
    for token in tokenizer.encode(text):
        found.append(stream.push(token))
        if stream.stopped:
            break
    found.append(stream.finish())
    assert stream.text == "".join(found)
    return found


@given(text=st.text())
@settings(max_examples=300, deadline=None)
def test_pieces_make_up_the_text(tokenizer: Tokenizer, text: str) -> None:
    found = pieces(tokenizer, text, [])
    assert "".join(found) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in found)


@given(text=st.text("abé "), stop=st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
@settings(max_examples=300, deadline=None)
def test_text_ends_before_the_first_stop_string(tokenizer: Tokenizer, text: str, stop: list[str]) -> None:
    def first_end() -> int | None:
        """Return the length of the shortest beginning of the text that has a stop string in it."""
        return next((end for end in range(len(text) + 1) if any(s in text[:end] for s in stop)), None)

    end = first_end()
    seen = text if end is None else text[:end]
    expected = min((seen.index(s) for s in stop if s in seen), default=len(seen))
    assert "".join(pieces(tokenizer, text, stop)) == seen[:expected]


def test_half_a_character_is_held_back_until_the_end(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, [])
    pushed = [stream.push(token) for token in tokenizer.encode("a€")[:-1]]
    assert pushed == ["a", "", ""]
    assert stream.finish() == "\ufffd" and stream.text == "a\ufffd"


def test_broken_bytes_after_text_that_was_given_out() -> None:
    """A decoder with byte fallback reads a run of bytes anew when it turns out not to be UTF-8."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁world": 256, "▁a": 257}
    encoder = Encoder(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    encoder.decoder = decoders.Sequence(fallback)
    tokenizer = Tokenizer.__new__(Tokenizer)
    tokenizer.encoder = encoder
    stream = TextStream(tokenizer, [])
    assert [stream.push(token) for token in (10, 0xF0, 256)] == ["\n", "", "\ufffd world"]
    # As the continuation of a prompt, a word keeps its leading space.
    assert TextStream(tokenizer, [], prompt=[257]).push(256) == " world"
    assert TextStream(tokenizer, []).push(256) == "world"


def test_without_a_tokenizer_the_text_is_empty() -> None:
    stream = TextStream(None, [])
    assert stream.push(5) == stream.finish() == stream.text == ""
