"""Grammars that an answer has to follow, by llguidance, which says of each next token whether it may come.

A grammar is compiled in the thread of whoever asks for it, within limits, and never sees files or the network.
"""

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from duomoe.errors import InputError, naming_failures

if TYPE_CHECKING:
    import llguidance

# The longest source of a grammar, in bytes. A regular expression of so many takes 20 ms to compile, the worst schema
# that was tried a second; llguidance gives up by itself on what costs more, at compilation and at each token.
LARGEST_SOURCE = 1 << 17

# How llguidance knows the kinds of source.
JSON_SCHEMA, REGEX, LARK = "json_schema", "regex", "lark"


@dataclass(frozen=True)
class Grammar:
    """What an answer has to be. It is checked when a model is asked to follow it.

    Attributes:
        kind: of the source: "json_schema", "regex" or "lark".
        source: the grammar's text.

    Raises:
        InputError: when the source is no text, or too long.
    """

    kind: str
    source: str

    def __post_init__(self) -> None:
        if self.kind not in (JSON_SCHEMA, REGEX, LARK):
            raise InputError(f"a grammar is a json_schema, a regex or lark, not {self.kind!r}")
        if not isinstance(self.source, str):
            raise InputError(f"a grammar's source is text, not {type(self.source).__name__}")
        try:
            size = len(self.source.encode("utf-8"))
        except UnicodeError:
            raise InputError("a grammar's source is not UTF-8 text") from None
        if size > LARGEST_SOURCE:
            raise InputError(f"a grammar's source may have {LARGEST_SOURCE} bytes, this one has {size}")

    @classmethod
    def json_schema(cls, schema: str | dict[str, Any]) -> "Grammar":
        """Return the grammar of JSON by a schema, given as JSON text or as what that stands for; it is on one line.

        `oneOf` is taken as `anyOf`. What llguidance does not know of JSON Schema is refused by name.

        Raises:
            InputError: when it is not JSON.
        """
        try:
            # Written anew, because deeper ones than Python reads or writes would crash llguidance.
            value = json.loads(schema) if isinstance(schema, str) else schema
            text = json.dumps(value, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"the JSON schema cannot be read: {error}") from None
        if not isinstance(value, dict | bool):
            raise InputError("a JSON schema is a JSON object")
        return cls(JSON_SCHEMA, text)

    @classmethod
    def json_object(cls) -> "Grammar":
        """Return the grammar of any JSON object."""
        return cls(JSON_SCHEMA, '{"type": "object"}')

    @classmethod
    def regex(cls, pattern: str) -> "Grammar":
        """Return the grammar of what a regular expression (Rust's syntax, without look-around) matches as a whole."""
        return cls(REGEX, pattern)

    @classmethod
    def lark(cls, text: str) -> "Grammar":
        """Return a context-free grammar in llguidance's variant of Lark's syntax; its first rule is `start`."""
        return cls(LARK, text)


class GrammarError(InputError):
    """A grammar became too complex while an answer followed it."""


class GrammarCompiler:
    """Compiles grammars for one tokenizer.

    Args:
        tokenizer: its tokenizer.json.
        vocab_size: of the model; it may be larger than the tokenizer's.
        eos: token ids that end an answer.
    """

    def __init__(self, tokenizer: str, vocab_size: int, eos: Sequence[int]) -> None:
        self._source, self._vocab_size, self._eos = tokenizer, vocab_size, list(eos)
        self._lock = threading.Lock()
        self._tokenizer: llguidance.LLTokenizer | None = None

    def matcher(self, grammar: Grammar) -> "Matcher":
        """Compile a grammar, and return what follows one answer by it.

        Raises:
            InputError: when llguidance is not installed, or does not accept the grammar or the tokenizer.
        """
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise InputError("grammars need llguidance; install it with: pip install 'duomoe[grammar]'") from None
        tokenizer = self._compiled_tokenizer()
        with naming_failures("the grammar cannot be used"):
            matcher = LLMatcher(tokenizer, _compiled(grammar), log_level=0)
            matcher.compute_bitmask()  # what is too complex from the start shows here, and not in the engine's thread
        if matcher.is_error():
            raise InputError(f"the grammar cannot be used: {_reason(matcher)}")
        return Matcher(matcher)

    def _compiled_tokenizer(self) -> "llguidance.LLTokenizer":
        from llguidance import LLTokenizer

        with self._lock:
            if self._tokenizer is None:
                if not self._eos:
                    raise InputError("a grammar needs an end-of-sequence token, and this model has none")
                try:
                    self._tokenizer = LLTokenizer(self._source, n_vocab=self._vocab_size, eos_token=self._eos)
                except Exception as error:  # the library raises whatever its Rust part says
                    raise InputError(f"grammars cannot be used with this tokenizer: {error}") from None
            return self._tokenizer


def _compiled(grammar: Grammar) -> str:
    """Return a grammar as llguidance's own; errors come when it is used."""
    from llguidance import LLMatcher

    if grammar.kind == JSON_SCHEMA:
        return LLMatcher.grammar_from_json_schema(
            grammar.source,
            # On one line, since a model that may write blanks anywhere may write nothing else.
            overrides={
                "coerce_one_of": True,
                "whitespace_flexible": False,
                "item_separator": ", ",
                "key_separator": ": ",
            },
        )
    return (LLMatcher.grammar_from_regex if grammar.kind == REGEX else LLMatcher.grammar_from_lark)(grammar.source)


def _reason(matcher: "llguidance.LLMatcher") -> str:
    """Return the first line of llguidance's complaint, which may go on for pages."""
    return (matcher.get_error().split("<state>")[0].strip().splitlines() or ["no token may come first"])[0][:500]


class Matcher:
    """Follows one answer by its grammar.

    Args:
        matcher: llguidance's, at the answer's beginning.

    Attributes:
        taken: so many of the answer's tokens it has followed.
    """

    def __init__(self, matcher: "llguidance.LLMatcher") -> None:
        self._matcher = matcher
        self.taken = 0

    def follow(self, tokens: Sequence[int]) -> None:
        """Take in the next tokens of the answer.

        Raises:
            GrammarError: when one of them cannot come, or that has become too hard to say.
        """
        for token in tokens:
            self.taken += 1
            if not self._matcher.consume_token(token):
                raise GrammarError(f"the grammar failed: {_reason(self._matcher)}")

    def allowed(self) -> bytes:
        """Return which tokens may come next, a bit for each in little-endian order; EOS tokens where it may end.

        Raises:
            GrammarError: when that has become too hard to say.
        """
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise GrammarError(f"the grammar failed: {_reason(self._matcher)}")
        return mask
