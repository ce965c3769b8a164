"""Grammars made to do harm: they are refused in time, within memory, and take no process with them."""

import json
import os
import random
import resource
import subprocess
import sys
from typing import Any

import pytest

from duomoe.grammar import LARGEST_SOURCE, Grammar, GrammarCompiler, GrammarError
from duomoe.model_folder import ModelFolder

SECONDS = 60  # before a test takes a process to hang; the trial's own limit is far below
MEMORY = 8 << 30  # bytes of addresses, of which torch takes most

# Compiles grammars for the embedded model in threads with little stack, and says what became of each.
COMPILE = """
import json, sys, threading
from duomoe import InputError
from duomoe.grammar import Grammar, GrammarCompiler
from duomoe.model_folder import ModelFolder

folder = ModelFolder(None)
tokenizer = folder.need_tokenizer().encoder.to_str()
compiler = GrammarCompiler(tokenizer, folder.config.vocab_size, folder.config.eos_token_ids)

def compile(kind, source):
    try:
        compiler.matcher(Grammar(kind, source))
        print("compiled", flush=True)
    except InputError as error:
        print("refused", error, flush=True)

threading.stack_size(2 << 20)
for line in sys.stdin:
    thread = threading.Thread(target=compile, args=json.loads(line))
    thread.start()
    thread.join()
"""


def outcomes(grammars: list[tuple[str, str]]) -> list[str]:
    """Return what becomes of grammars in a process that has hardly any memory and stack to spare."""
    found = subprocess.run(
        [sys.executable, "-P", "-c", COMPILE],
        input="".join(f"{json.dumps(grammar)}\n" for grammar in grammars),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
    )
    assert found.returncode == 0, f"the process ended by {found.returncode}: {found.stderr[-300:]}"
    assert len(found.stdout.splitlines()) == len(grammars)
    return found.stdout.splitlines()


def chained(link: dict[str, Any], count: int) -> str:
    """Return a schema of definitions each of which refers to the next one, as `link` holds it."""
    text = json.dumps(link)
    links = {f"a{n}": json.loads(text.replace("NEXT", f"#/$defs/a{n + 1}")) for n in range(count)}
    return json.dumps({"$defs": links | {f"a{count}": {"type": "string"}}, "$ref": "#/$defs/a0"})


def chained_rules(count: int) -> str:
    return "start: a0\n" + "\n".join(f"a{n}: a{n + 1}" for n in range(count)) + f'\na{count}: "x"'


def patterns(count: int) -> list[str]:
    return [f".*a.{{{number}}}" for number in range(1, count)]


REF = {"$ref": "NEXT"}
LINKS: dict[str, dict[str, Any]] = {
    "chain": REF,
    "chain of arrays": {"type": "array", "items": REF},
    "chain of alternatives": {"anyOf": [REF, {"type": "null"}]},
}
COSTLY = "more than 128 MiB of memory or is too deeply nested"
SOURCES = {
    "chain": ("json_schema", chained(REF, 3000), COSTLY),
    "chain of rules": ("lark", chained_rules(4000), COSTLY),
    "multiples": ("json_schema", json.dumps({"type": "integer", "multipleOf": 123456789}), COSTLY),
    "patterns at once": (
        "json_schema",
        json.dumps({"allOf": [{"type": "string", "pattern": pattern} for pattern in patterns(40)]}),
        COSTLY,
    ),
    "expressions at once": ("lark", "start: A\nA: " + " & ".join(f"/{each}/" for each in patterns(40)), COSTLY),
    "slow expressions": (
        "lark",
        "start: A (B|C)*\n"
        r"A: /((\sa))*/ & /((((b){50,50}([ab]a))|ab))*/ & /(((\s|\p{L})|(b)*)ab)/ & ~/\w/"
        "\n"
        r"B: /((([ab]){3,103}){1,101}|(((?i:ab)ab)|([^a])*))/ & ~/((b)*(([^a]\s)\PL))/"
        r" & /((((\w|\p{L})|(b){1,8})((\PL){50,3050}){50,51})|((([^a]|ab)([ab].))(((?i:ab).)|[ab])))/"
        r" & ~/((\PL)*([ab])*)/"
        "\n"
        r"C: ~/a/ & /((([ab][^a])ab)|\w)/",
        "",
    ),
}


def test_what_costs_too_much_is_refused() -> None:
    """And what comes between is compiled."""
    assert all(len(source) <= LARGEST_SOURCE for _, source, _ in SOURCES.values())
    good = ("regex", "[ab]{3}")
    found = outcomes([grammar for kind, source, _ in SOURCES.values() for grammar in ((kind, source), good)])
    assert found[1::2] == ["compiled"] * len(SOURCES)
    for name, outcome, (_, _, reason) in zip(SOURCES, found[::2], SOURCES.values(), strict=True):
        assert outcome.startswith("refused the grammar cannot be used: it takes more than"), (name, outcome)
        assert reason in outcome, (name, outcome)


@pytest.mark.parametrize("name", [*LINKS, "chain of rules"])
def test_what_passes_does_not_overflow_the_stack(name: str) -> None:
    """At all depths near the one that is too much; the process has twice the stack of the trial."""
    depths = [20, 60, *range(100, 320, 20), 400, 500, 640, 800, 1000]
    grammars = [
        ("json_schema", chained(LINKS[name], depth)) if name in LINKS else ("lark", chained_rules(depth))
        for depth in depths
    ]
    passed = [outcome == "compiled" for outcome in outcomes(grammars)]
    assert passed == sorted(passed, reverse=True) and passed[1] and not passed[-1]


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    folder = ModelFolder(None)
    return GrammarCompiler(folder.need_tokenizer().encoder.to_str(), folder.config.vocab_size, [0])


GROWING = {
    "ambiguous": (Grammar.lark('start: s\ns: s* t+\nt: s* "a"'), "a"),
    "counting": (Grammar.regex(".*a.{60}"), "ab"),
}


@pytest.mark.parametrize("name", GROWING)
def test_what_grows_with_the_answer_ends(compiler: GrammarCompiler, name: str) -> None:
    encoder, draws = ModelFolder(None).need_tokenizer().encoder, random.Random(1)
    grammar, letters = GROWING[name]
    matcher = compiler.matcher(grammar)
    with pytest.raises(GrammarError, match="the grammar failed: ") as caught:
        for _ in range(20_000):
            matcher.allowed()
            matcher.follow([encoder.token_to_id(draws.choice(letters))])
    assert matcher.taken > 20 and "\n" not in str(caught.value)


def test_deep_answers_are_followed(compiler: GrammarCompiler) -> None:
    encoder = ModelFolder(None).need_tokenizer().encoder
    opening = encoder.token_to_id("[")
    schema = {"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}}
    matcher = compiler.matcher(Grammar.json_schema(schema))
    for _ in range(100):
        matcher.follow([opening] * 1000)
        mask = matcher.allowed()
        assert mask[opening >> 3] >> (opening & 7) & 1
