"""What compiles grammars with llguidance: on trial in a process of its own, and then in the one that follows them.

The trial is `python -P -m duomoe.limited.grammars`. Some grammars make llguidance recurse until its stack is full, or
compute without end; that ends this process alone. The first message is a tokenizer's arguments (`tokenizer_of`); a
request is [kind, source], and the reply is empty when the grammar can be used.
"""

import json
import resource
import threading
from collections.abc import Callable
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from duomoe.limited.worker import serve

# For one grammar. With a vocabulary of 128,000 tokens, an object of 2,000 optional properties takes 27 MiB, a choice of
# 8,000 words 18 MiB. The process that follows answers has so much for each answer.
MEMORY_BYTES = 128 << 20

# In which a grammar has to compile on trial. The threads that compile it again have 8 MiB, as the system gives them, or
# 2 MiB where it sets no limit. A schema can have 200 references one behind another, or 100 arrays one in another.
STACK_BYTES = 1 << 20

# What a step may cost, and what a matcher may keep. With llguidance's own limits, masks took up to 103 ms by ambiguity,
# 108 ms by counting and 270 ms by multiples of a large number, and a matcher grew by 330 MB. That was on one core of a
# Xeon, with vocabularies of 4,096 and 128,000 tokens. With the limits below, ambiguity takes up to 60 ms, and what else
# was tried up to 42 ms, but for single steps of up to 90 ms in which the tables of a large automaton grow. A matcher
# grew by 180 MB at most. An object may have 250 optional properties, and a text with a `maxLength` 28,000 characters.
LIMITS = LLParserLimits(
    max_items_in_row=1000,
    step_max_items=8_000,
    step_lexer_fuel=100_000,
    max_lexer_states=100_000,
    verbose_errors=False,
)

# Keeps llguidance from looking for the text that is certain to come, which no limit bounds: of some grammars that text
# has no end, as of `start: /x|y/ A a` with `A: /(ab)*/` and `a: a`, which would hang the engine behind the first token.
# The last such line of a grammar counts.
NO_FORCING = '\n%llguidance {"no_forcing": true}'


def tokenizer_of(tokenizer: str, vocab_size: int, eos: list[int]) -> LLTokenizer:
    """Return llguidance's form of a tokenizer.json; raises whatever its Rust part says."""
    return LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=eos)


def compiled(tokenizer: LLTokenizer, kind: str, source: str) -> LLMatcher:
    """Compile a grammar, also for its first token: what is too complex from the start shows here, not in the engine.

    Args:
        tokenizer: whose tokens follow it.
        kind: of the source: "json_schema", "regex" or "lark".
        source: the grammar's text.

    Raises:
        ValueError: when it cannot be used; the message is a line. The library may panic, too.
    """
    matcher = LLMatcher(tokenizer, _lark(kind, source), log_level=0, limits=LIMITS)
    matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(reason(matcher))
    return matcher


def _lark(kind: str, source: str) -> str:
    """Return a grammar in llguidance's variant of Lark's syntax; errors come when it is used."""
    if kind == "json_schema":
        given = LLMatcher.grammar_from_json_schema(
            source,
            # On one line, since a model that may write blanks anywhere may write nothing else.
            overrides={
                "coerce_one_of": True,
                "whitespace_flexible": False,
                "item_separator": ", ",
                "key_separator": ": ",
            },
        )
        text = f"start: %json {json.dumps(json.loads(given)['grammars'][0]['json_schema'])}"
    elif kind == "regex":
        text = json.loads(LLMatcher.grammar_from_regex(source))["grammars"][0]["lark_grammar"]
    else:
        text = source
    return LLMatcher.grammar_from_lark(text + NO_FORCING)


def reason(matcher: LLMatcher) -> str:
    """Return llguidance's complaint, which may go on for pages, as a line."""
    lines = matcher.get_error().strip().splitlines() or [""]
    if lines[0].startswith("NoExtension"):
        return "nothing matches it"
    # A regular expression is quoted, and marked where it is wrong, before it is said what is wrong.
    wrong = next((line.removeprefix("error") for line in lines[1:] if line.startswith("error: ")), "")
    first = lines[0].split("failed to compile JSON schema: ")[-1]
    return first[:400].removesuffix(":") + wrong[:200]


def begin(arguments: list[Any]) -> Callable[[Any], str]:
    """Return what tries grammars with a tokenizer, given by the arguments of `tokenizer_of`."""
    tokenizer = tokenizer_of(*arguments)

    def trial(request: list[str]) -> str:
        compiled(tokenizer, *request)
        return ""

    trial(["json_schema", json.dumps({"type": "object"})])
    return trial


if __name__ == "__main__":
    allowed = resource.getrlimit(resource.RLIMIT_STACK)[0]
    threading.stack_size(STACK_BYTES if allowed == resource.RLIM_INFINITY else min(STACK_BYTES, allowed // 2))
    threading.Thread(target=serve, args=(begin, MEMORY_BYTES)).start()
