"""Pages of the KV cache, by number: who holds each, and whose tokens it may serve again.

A full page is found by its key, a hash of its tokens and of all tokens before them. So sequences that begin alike share
pages, and what a finished sequence leaves is there for those that go on from it.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

PAGE_SIZE = 16  # tokens


def pages_for(tokens: int) -> int:
    """Return how many pages hold that many tokens."""
    return -(-tokens // PAGE_SIZE)


class PageKeys:
    """The keys of a sequence's full pages, made as its tokens come.

    Args:
        salt: sequences with different ones share nothing.
        known: keys of the first pages, where they are not to be made of tokens.
    """

    def __init__(self, salt: bytes, known: Iterable[bytes] = ()) -> None:
        self._keys = list(known)
        # By another function than pages, or a salt could be made that is the key of somebody's page.
        self._last = hashlib.blake2b(salt, digest_size=32, person=b"salt").digest()

    def of(self, tokens: Sequence[int]) -> list[bytes]:
        """Return the keys of the full pages of all tokens so far, which begin as they did in the last call."""
        for page in range(len(self._keys), len(tokens) // PAGE_SIZE):
            content = array("Q", tokens[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]).tobytes()
            self._last = hashlib.blake2b(self._last + content, digest_size=32).digest()
            self._keys.append(self._last)
        return self._keys


class PagePool:
    """Says which pages are held and how often, which are kept for their content, and which are free.

    A page with a key that nobody holds any more is kept until pages are needed; the one goes first that nobody has
    held for longest.

    Args:
        num_pages: pages are numbered from 0.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.clear()

    def clear(self) -> None:
        """Let all pages be free, whoever holds them, and their content unknown."""
        self._free = list(range(self.num_pages - 1, -1, -1))  # popped from the end: lowest numbers first
        self._holders = [0] * self.num_pages
        self._kept: OrderedDict[int, None] = OrderedDict()  # those that nobody holds, the longest unheld first
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Pages that can be taken: those that are free, and those that are only kept."""
        return len(self._free) + len(self._kept)

    @property
    def used(self) -> int:
        """Pages that sequences hold."""
        return self.num_pages - self.available

    @property
    def kept(self) -> int:
        """Pages that nobody holds, and that are kept for their content."""
        return len(self._kept)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Return the pages that these keys name, up to the first that names none."""
        found: list[int] = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def unheld(self, pages: Iterable[int]) -> int:
        """Return how many of some pages nobody holds: so many fewer are available once they are held."""
        return sum(self._holders[page] == 0 for page in pages)

    def holders(self, page: int) -> int:
        """Return how many sequences hold a page."""
        return self._holders[page]

    def hold(self, pages: Iterable[int]) -> None:
        """Add a holder to pages that have been found."""
        for page in pages:
            if self._holders[page] == 0:
                del self._kept[page]
            self._holders[page] += 1

    def take(self, count: int) -> list[int]:
        """Return pages with one holder and unknown content; there must be as many available."""
        assert count <= self.available, "more pages are taken than are available"
        taken = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._kept.popitem(last=False)
                del self._page_of[self._key_of.pop(page)]
            assert self._holders[page] == 0, "a page that is held was taken"
            self._holders[page] = 1
            taken.append(page)
        return taken

    def name(self, page: int, key: bytes) -> None:
        """Let a page be found by a key, from now on; not where another page is found by it already."""
        assert self._holders[page] > 0, "a page is named by one who holds it"
        if page not in self._key_of and key not in self._page_of:
            self._page_of[key], self._key_of[page] = page, key

    def unname(self, pages: Iterable[int]) -> None:
        """Let pages not be found any more: they do not hold what their keys say."""
        for page in pages:
            if page in self._key_of:
                del self._page_of[self._key_of.pop(page)]

    def release(self, pages: Sequence[int]) -> None:
        """Take a holder away from all pages of a sequence; of those that are kept, the last ones go first."""
        for page in reversed(pages):
            assert self._holders[page] > 0, "a page came back twice"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._key_of:
                    self._kept[page] = None
                else:
                    self._free.append(page)
