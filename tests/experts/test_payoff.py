"""Whether looking ahead pays: the faster setting is found and kept, whatever the noise, at the price of few trials."""

from collections.abc import Callable
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duomoe.experts.payoff import INTERVAL, LONGEST, SETTLE, WINDOW, Payoff

TRIAL = SETTLE + WINDOW


def drive(payoff: Payoff, steps: int, seconds: Callable[[bool], float], sequences: int = 1) -> list[bool]:
    """Run steps that take so long with and without looking ahead; return what they did."""
    did = []
    for _ in range(steps):
        did.append(payoff.pays)
        payoff.note(sequences, seconds(payoff.pays))
    return did


def longest_run(did: list[bool], setting: bool) -> int:
    run = longest = 0
    for each in did:
        run = run + 1 if each == setting else 0
        longest = max(longest, run)
    return longest


@given(faster=st.booleans(), slower_by=st.floats(1.12, 30), seed=st.integers(0, 999), slow=st.sampled_from([1, 50]))
def test_the_faster_setting_is_kept(faster: bool, slower_by: float, seed: int, slow: float) -> None:
    """Steps differ by up to 2 %, and every third may take long."""
    payoff, random, count = Payoff(), Random(seed), 0

    def seconds(setting: bool) -> float:
        nonlocal count
        count += 1
        return random.uniform(0.98, 1.02) * (1 if setting == faster else slower_by) * (slow if count % 3 == 0 else 1)

    early, late = drive(payoff, 2 * TRIAL, seconds), drive(payoff, 3000, seconds)
    assert early[:TRIAL] == [True] * TRIAL and early[TRIAL:] == [False] * TRIAL
    assert payoff.pays == faster
    assert late.count(not faster) <= 6 * TRIAL
    assert longest_run(late, not faster) == TRIAL


@given(seed=st.integers(0, 999))
def test_of_equal_settings_none_replaces_the_other(seed: int) -> None:
    random = Random(seed)
    did = drive(Payoff(), 5000, lambda setting: random.uniform(0.98, 1.02))
    assert longest_run(did, False) == TRIAL
    assert did.count(False) <= 8 * TRIAL  # at first, after 128 steps more, 256, 512, and then at most every 1024


@given(seed=st.integers(0, 999), spread=st.floats(1, 4))
def test_trials_take_at_most_a_sixth_of_the_steps(seed: int, spread: float) -> None:
    """Whatever the times: a setting that was just given up is not tried again for `INTERVAL` steps."""
    random = Random(seed)
    did = drive(Payoff(), 3000, lambda setting: spread ** random.random())[2 * TRIAL :]
    changes = [step for step in range(1, len(did)) if did[step] != did[step - 1]]
    runs = [end - begin for begin, end in pairwise(changes)]
    assert all(run == TRIAL or run >= INTERVAL for run in runs)
    assert all(max(pair) >= INTERVAL for pair in pairwise(runs))
    assert TRIAL * 6 <= INTERVAL + TRIAL


@pytest.mark.parametrize("first", [True, False])
def test_a_change_of_conditions_is_noticed(first: bool) -> None:
    """At the latest when the longest interval is over; and that they change back soon after it, when one is short."""

    def before(setting: bool) -> float:
        return 1.0 if setting == first else 1.5

    payoff, did = Payoff(), [first]
    assert drive(payoff, 5000, before).count(first) > 4800
    while did[-TRIAL - 1 :] != [not first] * (TRIAL + 1):  # longer than a trial
        did += drive(payoff, 1, lambda setting: 1.5 if setting == first else 1.0)
        assert len(did) < LONGEST + 3 * TRIAL
    drive(payoff, INTERVAL + TRIAL, before)
    assert drive(payoff, 2 * TRIAL, before) == [first] * 2 * TRIAL


def test_batch_sizes_are_judged_apart() -> None:
    payoff, one, eight = Payoff(), [], []
    for _ in range(40):
        one += drive(payoff, 30, lambda setting: 1.0 if setting else 1.5)
        eight += drive(payoff, 30, lambda setting: 9.0 if setting else 6.0, sequences=8)
    assert one[600:].count(True) > 0.9 * 600
    assert eight[600:].count(False) > 0.9 * 600


def test_a_new_batch_size_begins_with_what_was_kept() -> None:
    payoff = Payoff()
    drive(payoff, 2 * TRIAL + INTERVAL, lambda setting: 1.5 if setting else 1.0)
    assert payoff.pays  # a trial
    drive(payoff, 1, lambda setting: 1.0, sequences=2)
    assert not payoff.pays


def test_steps_after_a_prefill_do_not_count() -> None:
    """They are slow while looking ahead; otherwise nothing differs."""
    payoff, did = Payoff(), []
    for _ in range(200):
        payoff.settle()
        did += drive(payoff, SETTLE, lambda setting: 9.0 if setting else 1.0)
        did += drive(payoff, 2, lambda setting: 1.0)
    assert did.count(False) < len(did) / 6


def test_steps_after_a_change_of_size_do_not_count() -> None:
    payoff, did = Payoff(), []
    for _ in range(100):
        did += drive(payoff, SETTLE, lambda setting: 1.0)
        did += drive(payoff, SETTLE, lambda setting: 1.0, sequences=2)
    assert all(did)
