"""Pages: thousands of random steps against a plain model."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from duomoe.memory.kv_cache import PAGE_SIZE, PageAllocator, pages_for

NUM_PAGES = 12


class Pages(RuleBasedStateMachine):
    """Start, grow, finish and abort sequences in any order."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.allocator = PageAllocator(NUM_PAGES)
        self.limits: dict[int, int] = {}
        self.held: dict[int, list[int]] = {}
        self.count = 0

    @rule(target=sequences, tokens=st.integers(1, NUM_PAGES * PAGE_SIZE + 20))
    def start(self, tokens: int) -> object:
        self.count += 1
        promised = sum(pages_for(limit) for limit in self.limits.values())
        admitted = self.allocator.reserve(self.count, tokens)
        assert admitted == (promised + pages_for(tokens) <= NUM_PAGES)
        if not admitted:
            return multiple()
        self.limits[self.count], self.held[self.count] = tokens, []
        return self.count

    @rule(sequence=sequences, share=st.floats(0, 1))
    def grow(self, sequence: int, share: float) -> None:
        tokens = round(self.limits[sequence] * share)
        before = self.held[sequence]
        pages = list(self.allocator.grow(sequence, tokens))
        assert pages[: len(before)] == before  # what it had stays where it was
        assert len(pages) == max(len(before), pages_for(tokens))
        self.held[sequence] = pages

    @rule(sequence=consumes(sequences))
    def finish(self, sequence: int) -> None:
        self.allocator.release(sequence)
        del self.limits[sequence], self.held[sequence]

    @invariant()
    def no_page_is_shared_or_lost(self) -> None:
        taken = [page for pages in self.held.values() for page in pages]
        assert len(set(taken)) == len(taken)
        assert set(taken) <= set(range(NUM_PAGES))
        assert self.allocator.used == len(taken)
        assert self.allocator.unreserved == NUM_PAGES - sum(pages_for(limit) for limit in self.limits.values())


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
