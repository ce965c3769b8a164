"""Rows of sequences on the device hold what lists would, and a step sends only what changed."""

import contextlib
import struct
import sys
from types import FrameType
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from duomoe.memory.pages import PAGE_SIZE
from duomoe.memory.sequences import (
    LENGTH,
    PAGES,
    SEED,
    TEMPERATURE,
    TOKEN,
    TOP_K,
    Sequences,
    row_pages,
    sequences_bytes,
)
from duomoe.sampling import SamplingParams

CPU = torch.device("cpu")


class Rows(RuleBasedStateMachine):
    """Joins, steps and leaves in any order, beside plain lists."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = Sequences(CPU, 3, 6, 40)
        self.held: dict[str, tuple[list[int], int, list[int], SamplingParams, int]] = {}
        self.allowed: dict[str, set[int]] = {}  # where not all are

    @rule(
        name=st.sampled_from("abcd"),
        length=st.integers(1, 40),
        prompt=st.integers(1, 40),
        penalty=st.sampled_from([0.0, 0.5]),
        bias=st.sampled_from([None, {3: 2.5}]),
    )
    def join(self, name: str, length: int, prompt: int, penalty: float, bias: dict[int, float] | None) -> None:
        if name not in self.held and len(self.held) == 3:
            return
        tokens = [(7 * number + length) % 40 for number in range(length)]
        pages = [100 + length + number for number in range(-(-length // PAGE_SIZE))]
        params = SamplingParams(temperature=0.5, top_k=length, presence_penalty=penalty, logit_bias=bias)
        self.rows.join(name, tokens, min(prompt, length), pages, length, params)
        self.held[name] = tokens, min(prompt, length), pages, params, length
        self.allowed.pop(name, None)

    @rule(name=st.sampled_from("abcd"))
    def leave(self, name: str) -> None:
        self.rows.leave(name)
        self.held.pop(name, None)
        self.allowed.pop(name, None)

    @rule(
        masks=st.dictionaries(st.sampled_from("abcd"), st.none() | st.sets(st.integers(0, 39))),
        size=st.sampled_from([5, 8, 12]),
    )
    def allow(self, masks: dict[str, set[int] | None], size: int) -> None:
        """Of sequences whose parameters change logits; in as many bytes as the tokens need, in whole words or more."""
        masks = {name: mask for name, mask in masks.items() if name in self.held and self.held[name][3].changes_logits}
        bits = {name: None if mask is None else sum(1 << token for token in mask) for name, mask in masks.items()}
        self.rows.allow({name: None if mask is None else mask.to_bytes(size, "little") for name, mask in bits.items()})
        for name, mask in masks.items():
            self.allowed.pop(name, None)
            if mask is not None:
                self.allowed[name] = mask

    @rule(names=st.lists(st.sampled_from("abcd"), unique=True), padding=st.integers(0, 2), token=st.integers(0, 39))
    def step(self, names: list[str], padding: int, token: int) -> None:
        names = [name for name in names if name in self.held]
        size = min(3, len(names) + padding)
        for name in names:
            tokens, _, pages, _, _ = self.held[name]
            if len(tokens) % PAGE_SIZE == 0 and len(pages) < 6:
                pages.append(len(tokens))
            self.rows.extend(name, pages)
        self.rows.choose(names, size)
        self.rows.send()
        chosen = torch.tensor([(token + place) % 40 for place in range(size)], dtype=torch.int64)
        self.rows.advance(self.rows.step_rows[:size], chosen, count=True)
        for place, name in enumerate(names):
            self.held[name][0].append((token + place) % 40)
        for name, (tokens, prompt, pages, params, seed) in self.held.items():
            row = self.rows._rows[name]
            words = self.rows.table[row].tolist()
            assert words[LENGTH] == len(tokens) and words[SEED] == seed and words[TOP_K] == params.top_k
            assert words[TOKEN] == tokens[-1] or name not in names
            assert words[PAGES : PAGES + len(pages)] == pages
            assert struct.unpack("d", struct.pack("q", words[TEMPERATURE])) == (0.5,)
            bias = [(params.logit_bias or {}).get(each, 0.0) for each in range(40)]
            assert self.rows.bias[row].tolist() == (bias if params.changes_logits else [0.0] * 40)
            bits = [word >> bit & 1 for word in self.rows.allowed[row].tolist() for bit in range(32)]
            assert {token for token in range(40) if bits[token]} == self.allowed.get(name, set(range(40)))
            if params.counts_tokens:
                output = tokens[prompt:]
                assert self.rows.seen[row].tolist() == [
                    2 * output.count(each) + (each in tokens[:prompt]) for each in range(40)
                ]

    @invariant()
    def padding_stays_what_it_is(self) -> None:
        self.rows.send()
        assert self.rows.table[3, : LENGTH + 1].tolist() == [0, 0]
        assert not self.rows.bias[3].any() and not self.rows.seen[3].any() and (self.rows.allowed[3] == -1).all()


TestRows = Rows.TestCase
TestRows.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_what_a_step_sends_does_not_grow_with_the_longest_sequence() -> None:
    sent = []
    for max_tokens in (256, 131_072):
        rows = Sequences(CPU, 8, row_pages(max_tokens), 100)
        assert rows.num_bytes == sequences_bytes(8, row_pages(max_tokens), 100)
        pages = list(range(16))
        for name in range(8):
            rows.join(name, [1] * 255, 255, pages, 0, SamplingParams())
        rows.choose(range(8), 8)
        joined = len(rows._changes)
        rows.send()
        rows.choose(range(8), 8)
        again = len(rows._changes)
        rows.extend(3, [*pages, 99])
        sent.append((joined, again, len(rows._changes)))
    assert sent[0] == sent[1] and sent[0][1:] == (0, 1)


def test_a_fault_at_any_line_loses_no_row() -> None:
    rows, params = Sequences(CPU, 2, 6, 40), SamplingParams()

    def use(at: int) -> int:
        """Join and leave, with a fault at one line of both; return how many lines there are."""
        lines = 0

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal lines
            if event == "line" and frame.f_code.co_name in ("join", "leave"):
                lines += 1
                if lines == at:
                    raise ZeroDivisionError
            return trace

        sys.settrace(trace)
        try:
            with contextlib.suppress(ZeroDivisionError):
                rows.join("one", [1, 2], 2, [0], 0, params)
            with contextlib.suppress(ZeroDivisionError):
                rows.leave("one")
        finally:
            sys.settrace(None)
        rows.leave("one")  # as who ends a request after a fault does
        return lines

    for at in range(1, use(-1) + 1):
        for _ in range(3):
            use(at)
        for owner in ("one", "other"):
            rows.join(owner, [1, 2], 2, [0], 0, params)
        for owner in ("one", "other"):
            rows.leave(owner)
