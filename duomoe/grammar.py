"""Grammars that an answer has to follow, by llguidance, which says of each next token whether it may come.

A grammar is a stranger's, and some make llguidance use all time, all memory, or all of the stack. So each is compiled
in a process of its own first, where it can do no harm (`duomoe.limited.grammars`), and only then in the thread of
whoever asks for it.
"""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from duomoe.errors import InputError, naming_failures
from duomoe.limited.process import Ended, Failed, LimitedProcess, TooSlow

if TYPE_CHECKING:
    import llguidance

# The longest source of a grammar, in bytes. It bounds what is sent and hashed, not what a grammar costs: a regular
# expression of so many takes 20 ms to compile, and a schema of 51 bytes would take minutes. The trial bounds that.
LARGEST_SOURCE = 1 << 17

# So many grammars that passed their trial are remembered, each in 32 bytes.
REMEMBERED = 1024

MISSING = "grammars need llguidance; install it with: pip install 'duomoe[grammar]'"

# The trial's. Templates have another process, so no grammar delays a template there. Grammars are tried one at a time:
# who sends a slow one delays those of others by the time that a trial may take. One thread waits for so many seconds,
# and is then told to try again, as all others are at once, so that a row of slow ones does not hold up the threads of a
# server. What has passed before is not tried again, so clients that use the same grammars are not delayed at all.
PROCESS = LimitedProcess("duomoe.limited.grammars", "tries grammars", "llguidance", MISSING, patience=5.0)

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
            # Written anew, so that what Python does not take for JSON never gets further.
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
    """Compiles grammars for one tokenizer, each on trial first.

    Threads may share it.

    Args:
        tokenizer: its tokenizer.json.
        vocab_size: of the model; it may be larger than the tokenizer's.
        eos: token ids that end an answer.
    """

    def __init__(self, tokenizer: str, vocab_size: int, eos: Sequence[int]) -> None:
        self._arguments = tokenizer, vocab_size, list(eos)
        self._lock = threading.Lock()
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._begin = b""
        self._passed: OrderedDict[bytes, None] = OrderedDict()

    def matcher(self, grammar: Grammar) -> "Matcher":
        """Compile a grammar, and return what follows one answer by it.

        Raises:
            InputError: when llguidance is not installed or does not accept the grammar or the tokenizer, or the grammar
                takes more time, memory or stack than it may.
            Busy: when grammars of others took too long before this one's turn came.
        """
        try:
            from duomoe.limited.grammars import compiled
        except ImportError:
            raise InputError(MISSING) from None
        tokenizer = self._compiled_tokenizer()
        self._try(grammar)
        with naming_failures("the grammar cannot be used"):
            return Matcher(compiled(tokenizer, grammar.kind, grammar.source))

    def _compiled_tokenizer(self) -> "llguidance.LLTokenizer":
        from duomoe.limited.grammars import tokenizer_of

        with self._lock:
            if self._tokenizer is None:
                if not self._arguments[2]:
                    raise InputError("a grammar needs an end-of-sequence token, and this model has none")
                try:
                    self._tokenizer = tokenizer_of(*self._arguments)
                except Exception as error:  # the library raises whatever its Rust part says
                    raise InputError(f"grammars cannot be used with this tokenizer: {error}") from None
                self._begin = json.dumps(self._arguments).encode()
            return self._tokenizer

    def _try(self, grammar: Grammar) -> None:
        """Compile a grammar where it can do no harm, unless that went well before."""
        from duomoe.limited.grammars import MEMORY_BYTES

        request = json.dumps([grammar.kind, grammar.source]).encode()
        name = hashlib.sha256(request).digest()
        with self._lock:
            if name in self._passed:
                self._passed.move_to_end(name)
                return
        try:
            PROCESS.ask(request, self._begin)
        except Ended:
            most = f"{MEMORY_BYTES >> 20} MiB of memory"
            raise InputError(f"the grammar cannot be used: it takes more than {most} or is too deeply nested") from None
        except TooSlow as error:
            raise InputError(f"the grammar cannot be used: {error} to compile") from None
        except Failed as error:
            raise InputError(f"the grammar cannot be used: {error}") from None
        with self._lock:
            self._passed[name] = None
            while len(self._passed) > REMEMBERED:
                self._passed.popitem(last=False)


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
                raise self._failure()

    def allowed(self) -> bytes:
        """Return which tokens may come next, a bit for each in little-endian order; EOS tokens where it may end.

        Raises:
            GrammarError: when that has become too hard to say.
        """
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise self._failure()
        return mask

    def _failure(self) -> GrammarError:
        from duomoe.limited.grammars import reason

        return GrammarError(f"the grammar failed: {reason(self._matcher)}")
