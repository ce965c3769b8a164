"""Pages: thousands of random steps against a plain model."""

import hashlib
from array import array

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from duomoe.memory.pages import PAGE_SIZE, PageKeys, PagePool

NUM_PAGES = 6


class Pages(RuleBasedStateMachine):
    """A pool beside a list of who holds what, a dict of names, and a list of what is kept, oldest first."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(NUM_PAGES)
        self.held: list[list[int]] = []
        self.names: dict[bytes, int] = {}
        self.kept: list[int] = []

    @rule(count=st.integers(0, NUM_PAGES))
    def take(self, count: int) -> None:
        if count > self.pool.available:
            return
        free = NUM_PAGES - len({page for pages in self.held for page in pages}) - len(self.kept)
        evicted, self.kept = self.kept[: max(0, count - free)], self.kept[max(0, count - free) :]
        self.names = {key: page for key, page in self.names.items() if page not in evicted}
        taken = self.pool.take(count)
        assert set(evicted) <= set(taken) and len(set(taken)) == count
        assert not set(taken) & {page for pages in self.held for page in pages} and not set(taken) & set(self.kept)
        self.held.append(taken)

    @rule(holder=st.integers(0, 9), place=st.integers(0, 5), key=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def name(self, holder: int, place: int, key: bytes) -> None:
        if holder < len(self.held) and place < len(self.held[holder]):
            page = self.held[holder][place]
            self.pool.name(page, key)
            if key not in self.names and page not in self.names.values():
                self.names[key] = page

    @rule(keys=st.lists(st.sampled_from([b"a", b"b", b"c", b"d"]), unique=True))
    def find_and_hold(self, keys: list[bytes]) -> None:
        found = self.pool.find(keys)
        expected = []
        for key in keys:
            if key not in self.names:
                break
            expected.append(self.names[key])
        assert found == expected and self.pool.unheld(found) == len(set(found) & set(self.kept))
        before = self.pool.available
        self.pool.hold(found)
        assert self.pool.available == before - len(set(found) & set(self.kept))
        self.kept = [page for page in self.kept if page not in found]
        self.held.append(found)

    @rule(holder=st.integers(0, 9))
    def release(self, holder: int) -> None:
        if holder < len(self.held):
            pages = self.held.pop(holder)
            others = {page for pages in self.held for page in pages}
            for page in set(pages):
                assert self.pool.holders(page) == sum(each.count(page) for each in [*self.held, pages])
            self.pool.release(pages)
            self.kept += [page for page in reversed(pages) if page in self.names.values() and page not in others]

    @rule(holder=st.integers(0, 9))
    def unname(self, holder: int) -> None:
        if holder < len(self.held):
            self.pool.unname(self.held[holder])
            self.names = {key: page for key, page in self.names.items() if page not in self.held[holder]}

    @invariant()
    def numbers_agree(self) -> None:
        held = {page for pages in self.held for page in pages}
        assert self.pool.used == len(held)
        assert self.pool.kept == len(self.kept)
        assert self.pool.available == NUM_PAGES - len(held)


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


@given(st.lists(st.integers(0, 3), max_size=5 * PAGE_SIZE), st.lists(st.integers(0, 3), max_size=5 * PAGE_SIZE))
def test_keys_are_equal_just_as_far_as_tokens_are(first: list[int], second: list[int]) -> None:
    together = first[:PAGE_SIZE] + second
    for a, b in ((first, second), (first, together)):
        keys = zip(PageKeys(b"").of(a), PageKeys(b"").of(b), strict=False)
        for page, (one, other) in enumerate(keys, start=1):
            assert (one == other) == (a[: page * PAGE_SIZE] == b[: page * PAGE_SIZE])
    assert not set(PageKeys(b"x").of(first)) & set(PageKeys(b"").of(first))


def test_no_salt_makes_the_keys_of_another() -> None:
    """Not even one that is made of what the hash of a page is made of."""
    tokens = list(range(3 * PAGE_SIZE))
    root = hashlib.blake2b(b"", digest_size=32).digest()
    crafted = root + array("Q", tokens[:PAGE_SIZE]).tobytes()
    assert not set(PageKeys(crafted).of(tokens[PAGE_SIZE:])) & set(PageKeys(b"").of(tokens))


def test_keys_grow_with_the_tokens() -> None:
    tokens, keys = list(range(5 * PAGE_SIZE)), PageKeys(b"")
    for end in range(len(tokens) + 1):
        assert keys.of(tokens[:end]) == PageKeys(b"").of(tokens)[: end // PAGE_SIZE]
