"""Text that streams: never half a character, never a part of a stop string."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_folders import KINDS, byte_level, load, save

from duomoe.text_stream import StopStrings, TextStream
from duomoe.tokenizer import Tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {name: load(save(tmp_path_factory.mktemp(name), make())) for name, make in KINDS.items()}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Return a tokenizer whose every token is one byte, so that most characters take several."""
    return load(save(tmp_path_factory.mktemp("bytes"), byte_level(words=())))


def pieces(tokenizer: Tokenizer, tokens: list[int], stop: list[str], prompt: list[int] | None = None) -> list[str]:
    stream = TextStream(tokenizer, stop, prompt or [])
    found = []
    for token in tokens:
        found.append(stream.push(token))
        if stream.stopped:
            break
    found.append(stream.finish())
    assert stream.text == "".join(found)
    return found


def library(tokenizer: Tokenizer, tokens: list[int]) -> str:
    return str(tokenizer.encoder.decode(tokens, skip_special_tokens=True))


def in_ids(tokenizer: Tokenizer, numbers: list[int]) -> list[int]:
    """Spread numbers over the vocabulary and one id that has no token."""
    return [number % (tokenizer.encoder.get_vocab_size() + 1) for number in numbers]


IDS = st.lists(st.one_of(st.integers(0, 400), st.integers(100, 300)), max_size=24)


def mixed_run(tokenizer: Tokenizer, tokens: list[int]) -> bool:
    """Return whether a run of byte tokens is neither UTF-8 nor broken throughout: the library spoils all of it."""
    names = [tokenizer.encoder.id_to_token(t) for t in tokens]
    line = " ".join(name for name in names if name and name not in ("<s>", "</s>", "<unk>"))
    for run in re.findall(r"(?:<0x[0-9A-F]{2}> ?)+", line):
        data = bytes.fromhex("".join(re.findall(r"<0x(..)>", run)))
        try:
            data.decode()
        except UnicodeDecodeError:
            if set(data.decode(errors="replace")) != {BROKEN}:
                return True
    return False


@pytest.mark.parametrize("kind", KINDS)
@given(prompt=IDS, answer=IDS)
@settings(max_examples=300, deadline=None)
def test_any_tokens_behind_any_prompt(
    tokenizers: dict[str, Tokenizer], kind: str, prompt: list[int], answer: list[int]
) -> None:
    tokenizer = tokenizers[kind]
    prompt, answer = in_ids(tokenizer, prompt), in_ids(tokenizer, answer)
    found = "".join(pieces(tokenizer, answer, [], prompt))
    before, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + answer)
    if found:
        assert whole.endswith(found)
        rest = whole[: len(whole) - len(found)]
        # What is left of the prompt: its text, but for a character that ends in the answer.
        assert before.startswith(rest) and before[len(rest) :] in ("", BROKEN, BROKEN * 2, BROKEN * 3)
    else:
        assert whole == before
    if not mixed_run(tokenizer, prompt + answer):
        assert whole == library(tokenizer, prompt + answer)


@given(text=st.text())
@settings(max_examples=300, deadline=None)
def test_pieces_make_up_the_text(tokenizer: Tokenizer, text: str) -> None:
    text = library(tokenizer, tokenizer.encode(text))  # composed, as the tokenizer does first
    found = pieces(tokenizer, tokenizer.encode(text), [])
    assert "".join(found) == text
    if BROKEN not in text:
        assert all(BROKEN not in piece for piece in found)


@given(numbers=IDS)
@settings(max_examples=200, deadline=None)
def test_no_more_than_one_character_is_held_back(tokenizer: Tokenizer, numbers: list[int]) -> None:
    stream = TextStream(tokenizer, [])
    for count, token in enumerate(in_ids(tokenizer, numbers), start=1):
        stream.push(token)
        whole = library(tokenizer, in_ids(tokenizer, numbers)[:count])
        # Two bytes of a surrogate, which would be a character of three if it were one, are broken each by itself.
        assert whole in (stream.text, stream.text + BROKEN, stream.text + BROKEN * 2)


def test_a_run_of_broken_bytes_is_given_out_and_hides_no_stop_string(tokenizer: Tokenizer) -> None:
    broken, stop = tokenizer.encode("ÿ")[:1] * 5, tokenizer.encode("stop")
    stream = TextStream(tokenizer, ["stop"])
    assert "".join(stream.push(token) for token in broken) == BROKEN * 4
    for token in stop:
        stream.push(token)
    assert stream.stopped and stream.text == BROKEN * 5


def test_half_a_character_is_held_back_until_the_end(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, [])
    pushed = [stream.push(token) for token in tokenizer.encode("a€")[:-1]]
    assert pushed == ["a", "", ""]
    assert stream.finish() == BROKEN and stream.text == "a" + BROKEN


def test_a_character_that_begins_in_the_prompt(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("x€y")
    assert pieces(tokenizer, tokens[3:], [], tokens[:3]) == ["€", "y", ""]
    assert pieces(tokenizer, [], [], tokens[:3]) == [""]
    assert pieces(tokenizer, tokens[3:], [], tokens[:3] + [tokenizer.encoder.token_to_id("<|end|>")] * 20)[0] == "€"


def test_broken_bytes_after_text_that_was_given_out(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_fallback"]
    id_of = tokenizer.encoder.token_to_id
    stream = TextStream(tokenizer, [])
    pushed = [stream.push(id_of(token)) for token in ("<0x0A>", "<0xF0>", "▁ab")]
    assert pushed == ["\n", "", BROKEN + " ab"]
    # As the continuation of a prompt, a word keeps its leading space, behind nothing but special tokens it does not.
    assert TextStream(tokenizer, [], [id_of("a")] * 9 + [id_of("<s>")] * 9).push(id_of("▁ab")) == " ab"
    assert TextStream(tokenizer, [], [id_of("<s>")] * 9).push(id_of("▁ab")) == "ab"


def first_end(text: str, stop: list[str]) -> int | None:
    """Return the length of the shortest beginning of the text that has a stop string in it."""
    return next((end for end in range(len(text) + 1) if any(s in text[:end] for s in stop)), None)


@given(text=st.text("abé "), stop=st.lists(st.text("abé", min_size=1, max_size=5), max_size=4))
@settings(max_examples=500, deadline=None)
def test_text_ends_before_the_first_stop_string(tokenizer: Tokenizer, text: str, stop: list[str]) -> None:
    end = first_end(text, stop)
    seen = text if end is None else text[:end]
    expected = min((seen.index(s) for s in stop if s in seen), default=len(seen))
    assert "".join(pieces(tokenizer, tokenizer.encode(text), stop)) == seen[:expected]


@given(text=st.text("ab", max_size=40), stop=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=5))
@settings(max_examples=500, deadline=None)
def test_what_is_held_back_could_begin_a_stop_string(text: str, stop: list[str]) -> None:
    strings, state = StopStrings(stop), 0
    for end in range(1, len(text) + 1):
        state, found, _ = strings.search(state, text[end - 1])
        if found:
            assert any(text[:end].endswith(s) for s in stop)
            break
        assert not any(text[:end].endswith(s) for s in stop)
        held = max((n for n in range(end + 1) if any(s.startswith(text[end - n : end]) for s in stop)), default=0)
        assert strings.depth[state] == held


def test_the_search_takes_as_many_steps_as_there_are_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a text that nearly matches each of 1,000 long stop strings, over and over."""
    strings = StopStrings([f"{'a' * 500}{number}" for number in range(1000)])
    looked_up = 0

    class Counting(dict[tuple[int, str], int]):
        def __contains__(self, key: object) -> bool:
            nonlocal looked_up
            looked_up += 1
            return super().__contains__(key)

    strings._next = Counting(strings._next)
    text = ("a" * 499 + "b") * 20
    assert strings.search(0, text)[1] == 0
    assert looked_up <= 2 * len(text)


def test_without_a_tokenizer_the_text_is_empty() -> None:
    stream = TextStream(None, [])
    assert stream.push(5) == stream.finish() == stream.text == ""
