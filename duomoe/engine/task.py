"""A request as the scheduler sees it."""

from dataclasses import dataclass, field

from duomoe.memory.pages import PAGE_SIZE, PageKeys, pages_for


@dataclass(eq=False, kw_only=True)
class Task:
    """Tokens, how many of them are computed, and the pages that hold their keys and values.

    What there is to do is always the same: to compute the rest. A new prompt has all of it before it, one that begins
    as another did a part, one that was preempted all of it again, and one that decodes a single token.

    Attributes:
        tokens: the prompt's, and behind them those that were generated.
        keys: by which its full pages are found; None where they serve no other sequence.
        longest: the most tokens it may have, prompt included.
        reuses: it takes pages that others have computed; not where something is asked of each of its tokens.
        arrived: when it came, in seconds on some clock.
        deadline: when its next token is due, on the same clock; None is never. No rule looks at it yet.
        pages: of its tokens so far, in order.
        computed: so many tokens, from the first on, have keys and values in pages.
        admitted: when it was first admitted, on the clock of `arrived`; None before.
        found: how many of them others had computed when it was first admitted; None before.
    """

    tokens: list[int]
    keys: PageKeys | None
    longest: int
    arrived: float
    reuses: bool = True
    deadline: float | None = None
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    admitted: float | None = None
    found: int | None = None

    @property
    def length(self) -> int:
        """Tokens so far."""
        return len(self.tokens)

    @property
    def most_pages(self) -> int:
        """Pages that it may ever need: its last token's key is never made."""
        return pages_for(self.longest - 1)

    def shared_keys(self) -> list[bytes]:
        """Return the keys of the pages that it may take from others: never all, for the last token is computed anew."""
        if self.keys is None or not self.reuses:
            return []
        return self.keys.of(self.tokens)[: (self.length - 1) // PAGE_SIZE]
