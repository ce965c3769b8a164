"""Text that comes token by token and ends at a stop string."""

from collections.abc import Sequence

from duomoe.detokenizer import Decoding
from duomoe.tokenizer import Tokenizer


class TextStream:
    """Turns one sequence's tokens into text as they come, and ends it where the first stop string ends.

    What is held back is one unfinished character at most, and text that a stop string may begin with. A token costs the
    same however long the text is, however many stop strings there are.

    Args:
        tokenizer: None where the checkpoint has none; the text stays empty then.
        stop: strings that end the text; they are not part of it.
        prompt: what the sequence begins with; the text continues it.
        shown: special tokens that are part of the text all the same.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        stop: Sequence[str],
        prompt: Sequence[int] = (),
        shown: Sequence[str] = (),
    ) -> None:
        self._decoding = None if tokenizer is None else Decoding(tokenizer.detokenizer(shown), prompt)
        self._stop = StopStrings(stop)
        self._state = 0  # of the search for stop strings
        self._held = ""  # decoded, not yet given out
        self._given: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """All that was given out."""
        self._given = ["".join(self._given)]
        return self._given[0]

    def push(self, token: int) -> str:
        """Take the next token; return the text that is now certain."""
        if self._decoding is None or self.stopped:
            return ""
        return self._add(self._decoding.push(token))

    def finish(self) -> str:
        """Return what was held back, once no more tokens come; half a character becomes U+FFFD."""
        if self._decoding is None or self.stopped:
            return ""
        certain = self._add(self._decoding.finish())
        if not self.stopped:
            self._given.append(self._held)
            certain, self._held = certain + self._held, ""
        return certain

    def _add(self, text: str) -> str:
        self._state, end, length = self._stop.search(self._state, text)
        self.stopped = length > 0
        seen = self._held + text
        cut = len(self._held) + end - length if self.stopped else len(seen) - self._stop.depth[self._state]
        certain, self._held = seen[:cut], "" if self.stopped else seen[cut:]
        if certain:
            self._given.append(certain)
        return certain


class StopStrings:
    """Finds the first of many strings in a text that comes in pieces (Aho and Corasick's automaton).

    A state stands for the longest end of the text that a string begins with; 0 is the empty one.

    Attributes:
        depth: how long that end is, for each state.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.depth = [0]
        self._next: dict[tuple[int, str], int] = {}
        self._match = [0]  # the length of the longest string that ends here; 0: none does
        for text in strings:
            state = 0
            for char in text:
                state = self._next.setdefault((state, char), len(self.depth))
                if state == len(self.depth):
                    self.depth.append(0)
                    self._match.append(0)
            self._match[state] = len(text)
        self._shorter = [0] * len(self.depth)  # the state of the next shorter end that a string begins with
        self._link()

    def _link(self) -> None:
        # The shallow ones first: what a state needs is known of all that are less deep.
        reached: dict[int, list[tuple[int, str, int]]] = {}
        for (state, char), following in self._next.items():
            self.depth[following] = self.depth[state] + 1  # a state comes after the one it continues
            reached.setdefault(self.depth[following], []).append((state, char, following))
        for depth in sorted(reached):
            for state, char, following in reached[depth]:
                shorter = self._shorter[following] = self._step(self._shorter[state], char) if state else 0
                self._match[following] = self._match[following] or self._match[shorter]

    def search(self, state: int, text: str) -> tuple[int, int, int]:
        """Go on with a text.

        Returns:
            The state behind the text; where in it the first string ends (0 if none does), and that string's length.
        """
        if len(self.depth) == 1:
            return 0, 0, 0
        for end, char in enumerate(text, start=1):
            state = self._step(state, char)
            if self._match[state]:
                return state, end, self._match[state]
        return state, 0, 0

    def _step(self, state: int, char: str) -> int:
        while state and (state, char) not in self._next:
            state = self._shorter[state]
        return self._next.get((state, char), 0)
