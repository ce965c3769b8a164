"""Grammars: what may come next is what keeps an answer the beginning of a valid one, and answers are valid."""

import itertools
import json
import random
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from duomoe import LLM, InputError, SamplingParams
from duomoe import grammar as grammars
from duomoe.engine.completion import Chunk
from duomoe.engine.masks import changed_masks
from duomoe.engine.request import Request
from duomoe.grammar import LARGEST_SOURCE, Grammar, GrammarCompiler, GrammarError
from duomoe.memory.pages import PagePool
from duomoe.text_stream import TextStream

# Some begin alike, so tokens of several letters end within them.
NAMES = ["the", "there", "then", "a", "and"]

OBJECT = {
    "type": "object",
    "properties": {"name": {"enum": NAMES}, "big": {"type": "boolean"}, "sizes": {"const": [1, {"a": None}]}},
    "required": ["name", "big", "sizes"],
    "additionalProperties": False,
}

NUMBERS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 40}

NESTED = 'start: "(" start ")" | name\nname: "the" | "there" | "a"'

# Each grammar with all of its answers; of NESTED, all that a short walk comes to.
CASES = [
    pytest.param(
        Grammar.regex("(the|there|then|a|and)( [ab]{1,2})?!"),
        [name + end + "!" for name in NAMES for end in ["", *(f" {x}{y}" for x in "ab" for y in ["", "a", "b"])]],
        id="regex",
    ),
    pytest.param(
        Grammar.lark(NESTED),
        ["(" * depth + name + ")" * depth for name in ("the", "there", "a") for depth in range(60)],
        id="lark",
    ),
    pytest.param(
        Grammar.json_schema(OBJECT),
        [json.dumps({"name": name, "big": big, "sizes": [1, {"a": None}]}) for name in NAMES for big in (True, False)],
        id="json_schema",
    ),
    pytest.param(
        Grammar.json_schema(json.dumps({"type": "array", "items": {"type": "boolean"}, "maxItems": 3})),
        [json.dumps(list(items)) for size in range(4) for items in itertools.product([True, False], repeat=size)],
        id="array",
    ),
]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(device="cpu", max_model_len=256)


def compiler(llm: LLM, vocab: int, eos: list[int]) -> GrammarCompiler:
    assert llm.tokenizer is not None
    return GrammarCompiler(llm.tokenizer.encoder.to_str(), vocab, eos)


def tokens_in(mask: bytes) -> set[int]:
    return {token for token in range(8 * len(mask)) if mask[token >> 3] >> (token & 7) & 1}


@pytest.mark.parametrize(("grammar", "answers"), CASES)
def test_masks_are_what_trying_every_token_finds(llm: LLM, grammar: Grammar, answers: list[str]) -> None:
    """Along walks; the vocabulary has tokens that the tokenizer does not know, and more than one that ends."""
    assert llm.tokenizer is not None
    known = llm.config.vocab_size
    texts = [llm.tokenizer.encoder.decode([token], skip_special_tokens=False) for token in range(known)]
    ends = {0, texts.index("~")}
    beginnings = {answer[:length] for answer in answers for length in range(len(answer) + 1)}
    compiled, chosen = compiler(llm, known + 70, sorted(ends)), 0
    for seed in range(4):
        draws, matcher, text = random.Random(seed), compiled.matcher(grammar), ""
        for _ in range(24):
            expected = {token for token in range(known) if token not in ends and text + texts[token] in beginnings}
            expected |= ends if text in answers else set()
            allowed = tokens_in(matcher.allowed())
            assert allowed and allowed == expected
            chosen += len(allowed) > 1
            if not allowed - ends:
                break
            token = draws.choice(sorted(allowed - ends))
            matcher.follow([token])
            text += texts[token]
    assert chosen >= 5


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_answers_are_valid(llm: LLM, temperature: float) -> None:
    """Together in one batch, and of one set of parameters for several prompts."""
    for case in CASES:
        grammar, answers = case.values
        params = SamplingParams(max_new_tokens=200, temperature=temperature, grammar=grammar, logit_bias={8: 3.0})
        for completion in llm.generate(["The sea", "A cat", "In"], params):
            stopped = completion.finish_reason == "stop"
            assert completion.text in answers if stopped else completion.text[:100] == "(" * 100


def test_any_object_is_one(llm: LLM) -> None:
    found = llm.generate("A", SamplingParams(max_new_tokens=240, temperature=1, seed=3, grammar=Grammar.json_object()))
    assert found[0].finish_reason == "length" or isinstance(json.loads(found[0].text), dict)
    assert found[0].text.startswith("{")


def test_an_end_waits_for_the_least_tokens_where_the_grammar_goes_on(llm: LLM) -> None:
    ended = llm.generate("The sea", SamplingParams(grammar=Grammar.regex("a{1,40}"), logit_bias={0: 100}))[0]
    assert len(ended.token_ids) == 2  # the second one is the end
    later = llm.generate("The sea", SamplingParams(grammar=Grammar.regex("a{1,40}"), logit_bias={0: 100}, min_tokens=7))
    assert len(later[0].token_ids) == 8 and set(later[0].text) == {"a"}
    # Where it is over, it is over.
    for options in (dict(min_tokens=20), dict(ignore_eos=True)):
        over = llm.generate("The sea", SamplingParams(max_new_tokens=40, grammar=Grammar.regex("abc"), **options))[0]
        assert over.text == "abc" and over.finish_reason == "stop"


def request_of(params: SamplingParams) -> Request:
    return Request(
        tokens=[1, 2],
        keys=None,
        longest=50,
        prompt_length=2,
        params=params,
        seed=0,
        stream=TextStream(None, (), [1, 2]),
    )


def test_ends_are_forbidden_until_there_are_enough_tokens() -> None:
    """Without a grammar a mask is sent at the beginning and when it ends, and at no step between."""
    request, eos = request_of(SamplingParams(min_tokens=3, stop_token_ids=[9, 500])), frozenset([4])
    sent, anew = [], []
    for step in range(5):
        for begun, found in ((step == 0, sent), (True, anew)):
            masks, failures = changed_masks([request], eos, 20, begun)
            assert not failures
            found.append({key: None if mask is None else tokens_in(mask) for key, mask in masks.items()})
        request.tokens.append(7)
    others = set(range(24)) - {4, 9}
    assert sent == [{request: others}, {}, {}, {request: None}, {}]
    # A row that is written anew allows everything.
    assert anew == [{request: others}] * 3 + [{}, {}]


def test_a_grammar_that_is_over_may_end_before_the_least_tokens(llm: LLM) -> None:
    request = request_of(SamplingParams(min_tokens=9, grammar=Grammar.regex("a")))
    request.matcher = compiler(llm, llm.config.vocab_size, [3]).matcher(Grammar.regex("a"))
    assert llm.tokenizer is not None
    request.tokens += llm.tokenizer.encoder.encode("a").ids
    masks, _ = changed_masks([request], frozenset([3]), llm.config.vocab_size, begun=False)
    assert tokens_in(masks[request] or b"") == {3}


def test_who_is_preempted_goes_on_with_its_grammar() -> None:
    """With penalties, a bias, least tokens and draws, which all begin anew with the row."""
    llm = LLM(device="cpu", dtype="float32", max_model_len=160)
    common = dict(max_new_tokens=70, temperature=0.8, repetition_penalty=1.2, frequency_penalty=0.2, min_tokens=66)
    each = [
        SamplingParams(grammar=Grammar.regex("[a-z]+( [a-z]+)*"), seed=1, **common),
        SamplingParams(grammar=Grammar.lark('start: (/[a-z]{1,5}/ ";")+'), seed=2, logit_bias={8: -5}, **common),
        SamplingParams(grammar=Grammar.json_schema(NUMBERS), seed=3, **common),
        SamplingParams(seed=4, **common),
    ]
    prompts = ["The sea was calm", "Once upon a time there was", "A", "In the town of"]
    alone = [llm.generate(prompt, params)[0].token_ids for prompt, params in zip(prompts, each, strict=True)]
    llm.engine.cache.pages = llm.engine.scheduler.pages = PagePool(10)
    together = llm.generate(prompts, each)
    assert [completion.token_ids for completion in together] == alone
    assert llm.stats().preemptions > 0


def test_what_becomes_too_complex_ends_its_own_request(llm: LLM) -> None:
    """While others are in the same steps, which have the tokens that they have alone; and its pages are free again."""
    fine = SamplingParams(max_new_tokens=12, ignore_eos=True), SamplingParams(grammar=Grammar.regex("[a-z ]{20}"))
    alone = [llm.generate("The sea", params)[0].token_ids for params in fine]
    words = "\n".join(f"A{n}: /[a-z ]*{chr(97 + n % 26)}[a-z ]{{{n // 26 + 5}}}{n}/" for n in range(300))
    either = " | ".join(f"A{n}" for n in range(300))
    hard = SamplingParams(grammar=Grammar.lark(f'start: b b b ";" ({either})\nb: /[b-d]/\n{words}'))
    streams = [llm.stream("The sea", params) for params in (fine[0], hard, fine[1])]
    before: list[Chunk] = []
    with pytest.raises(GrammarError, match="the grammar failed") as caught:
        for chunk in streams[1]:
            before.append(chunk)
    assert 0 < len(before) < 12
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert [[chunk.token_id for chunk in stream] for stream in (streams[0], streams[2])] == alone
    assert llm.stats().used_pages == llm.stats().running == 0


ENDLESS = [
    Grammar.lark('start: ("x" | "y") A a\nA: /(ab)*/\na: a "x"'),
    Grammar.lark('start: ("x" | "y") A a\nA: /(ab)*/\na: a "x"\n%llguidance {"no_forcing": false}'),
    Grammar.lark(
        'start: ("x" | "y") %lark {\n  start: A a\n  A: /(ab)*/\n  a: a "x"\n%llguidance {"no_forcing": false}\n}'
    ),
]


@pytest.mark.parametrize("grammar", ENDLESS, ids=["plain", "that asks for it", "nested"])
def test_a_text_without_an_end_is_not_looked_for(llm: LLM, grammar: Grammar) -> None:
    """It is certain what comes after x, for ever; that is found token by token."""
    assert llm.tokenizer is not None
    encoder, matcher, text = llm.tokenizer.encoder, compiler(llm, llm.config.vocab_size, [0]).matcher(grammar), ["x"]

    def follow() -> None:
        matcher.follow([encoder.token_to_id("x")])
        for _ in range(30):
            token = min(tokens_in(matcher.allowed()))
            text.append(encoder.decode([token]))
            matcher.follow([token])

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive() and len(text) == 31
    assert ("x" + "ab" * 200).startswith("".join(text))


def test_a_token_that_cannot_come_is_an_error(llm: LLM) -> None:
    matcher = compiler(llm, llm.config.vocab_size, [0]).matcher(Grammar.regex("aaa"))
    assert llm.tokenizer is not None
    with pytest.raises(GrammarError):
        matcher.follow(llm.tokenizer.encoder.encode("b").ids)


DEEP = '{"not":' * 100_000 + "true" + "}" * 100_000


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Grammar("ebnf", "a"), "'ebnf'"),
        (lambda: Grammar.regex(5), "text, not int"),  # type: ignore[arg-type]
        (lambda: Grammar.lark("\ud800"), "UTF-8"),
        (lambda: Grammar.regex("é" * (LARGEST_SOURCE // 2 + 1)), f"{LARGEST_SOURCE} bytes"),
        (lambda: Grammar.json_schema({"enum": ["x" * LARGEST_SOURCE]}), f"{LARGEST_SOURCE} bytes"),
        (lambda: Grammar.json_schema(DEEP), "cannot be read"),
        (lambda: Grammar.json_schema('{"minimum": NaN}'), "cannot be read"),
        (lambda: Grammar.json_schema('{"minimum": 1e999}'), "cannot be read"),
        (lambda: Grammar.json_schema('{"minimum": ' + "9" * 5000 + "}"), "cannot be read"),
        (lambda: Grammar.json_schema({"const": {1, 2}}), "cannot be read"),
        (lambda: Grammar.json_schema("null"), "JSON object"),
    ],
)
def test_what_is_no_grammar_is_refused_at_once(make: Callable[[], Grammar], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        make()
    Grammar.regex("é" * (LARGEST_SOURCE // 2))


def both(count: int) -> str:
    return " & ".join(f"/.*a.{{{number}}}/" for number in range(1, count))


REFUSED: dict[str, Any] = {
    "regex that matches nothing": Grammar.regex(r"[^\s\S]"),
    "regex with look-ahead": Grammar.regex("(?=a)b"),
    "regex that nests deeply": Grammar.regex("(" * 60_000 + "a" + ")" * 60_000),
    "lark that nests deeply": Grammar.lark("start: " + "(" * 60_000 + '"a"' + ")" * 60_000),
    "lark without a start": Grammar.lark('begin: "a"'),
    "lark that never ends": Grammar.lark("start: start"),
    "lark of a token in itself": Grammar.lark('start: A\nA: A "b"'),
    "lark of intersections": Grammar.lark("start: A\nA: " + both(16)),
    "lark that doubles": Grammar.lark(
        "start: A0\n" + "\n".join(f"A{n}: A{n + 1} A{n + 1}" for n in range(60)) + '\nA60: "x"'
    ),
    "schema that refers to itself": Grammar.json_schema({"$ref": "#"}),
    "schema that refers to a file": Grammar.json_schema({"$ref": "file:///etc/hostname"}),
    "schema that forbids all": Grammar.json_schema({"type": "string", "pattern": "^a+$", "format": "uuid"}),
    "schema with a keyword that is not known": Grammar.json_schema({"type": "array", "uniqueItems": True}),
    "schema that multiplies": Grammar.json_schema(
        {"allOf": [{"anyOf": [{"properties": {f"{n}{m}": {"type": "null"}}} for m in range(4)]} for n in range(14)]}
    ),
}


@pytest.mark.parametrize("grammar", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_followed_is_refused_before_it_runs(llm: LLM, grammar: Grammar) -> None:
    before = llm.stats()
    with pytest.raises(InputError, match="the grammar cannot be used") as caught:
        llm.stream("The sea", SamplingParams(grammar=grammar))
    assert type(caught.value) is InputError and "\n" not in str(caught.value) and len(str(caught.value)) < 700
    assert llm.stats() == before


def test_what_grammars_need_is_named(llm: LLM, tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(grammar=Grammar.regex("a"))
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        LLM(tiny("mixtral").path, device="cpu").generate([1, 2], params)
    with pytest.raises(InputError, match="end-of-sequence token"):
        compiler(llm, llm.config.vocab_size, []).matcher(Grammar.regex("a"))
    with pytest.raises(InputError, match="with this tokenizer"):
        GrammarCompiler("{}", 10, [0]).matcher(Grammar.regex("a"))
    monkeypatch.delitem(sys.modules, "duomoe.limited.grammars")
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InputError, match=r"pip install 'duomoe\[grammar\]'"):
        llm.generate("The sea", params)


REASONS = {
    "an open group": (Grammar.regex("("), "unclosed group"),
    "a group that lacks its end, over lines": (Grammar.regex("a\n(b"), "unclosed group"),
    "a pattern": (Grammar.json_schema({"type": "string", "pattern": "*"}), "repetition operator missing expression"),
    "letters that are none": (Grammar.regex(r"[^\s\S]"), "nothing matches it"),
    "two that exclude each other": (Grammar.lark("start: A\nA: /a/ & /b/"), "nothing matches it"),
    "a keyword": (Grammar.json_schema({"uniqueItems": True}), 'Unimplemented keys: ["uniqueItems"]'),
    "no object": (Grammar.json_schema("false"), "Expecting object schema to apply options"),
    "a name": (Grammar.lark("start: a"), 'unknown name: "a"'),
}


@pytest.mark.parametrize(("grammar", "reason"), REASONS.values(), ids=REASONS)
def test_a_reason_is_one_line_that_says_why(llm: LLM, grammar: Grammar, reason: str) -> None:
    with pytest.raises(InputError, match="the grammar cannot be used: ") as caught:
        compiler(llm, llm.config.vocab_size, [0]).matcher(grammar)
    assert str(caught.value).endswith(reason) and "\n" not in str(caught.value)


def test_a_grammar_is_tried_once_while_it_is_remembered(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    ask = grammars.PROCESS.ask

    def noted(request: bytes, begin: bytes) -> str:
        tried.append(json.loads(request)[1])
        return ask(request, begin)

    monkeypatch.setattr(grammars.PROCESS, "ask", noted)
    monkeypatch.setattr(grammars, "REMEMBERED", 2)
    compiled = compiler(llm, llm.config.vocab_size, [0])
    for pattern in ("a", "b", "a", "c", "a", "b"):
        compiled.matcher(Grammar.regex(pattern))
    assert tried == ["a", "b", "c", "b"]
    tried.clear()
    for _ in range(2):
        with pytest.raises(InputError):
            compiled.matcher(Grammar.regex("("))
    compiled.matcher(Grammar.lark("start: /b/"))
    compiled.matcher(Grammar.lark("start: /b/"))
    assert tried == ["(", "(", "start: /b/"]


def test_threads_compile_at_once(llm: LLM) -> None:
    compiled = compiler(llm, llm.config.vocab_size, [0])

    def outcome(number: int) -> bool:
        try:
            compiled.matcher(Grammar.regex(f"a{{{number}}}" if number % 3 else f"(a{{{number}}}"))
        except InputError as error:
            assert "unclosed group" in str(error)
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(outcome, range(90))) == [number % 3 > 0 for number in range(90)]
