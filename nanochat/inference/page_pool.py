"""Which page of the cache belongs to whom: counted, shared, and kept after its end for those who begin alike.

A full page is published under (the page before it, its tokens), so a prompt is looked up page by page from its start,
and what is found is equal, not alike by hash. A page that nobody holds waits among the free ones, the longest unused
first, and keeps what it has until it is given away.

Source of the idea: automatic prefix caching of vLLM (docs, design of the V1 engine).
"""

from collections import OrderedDict
from collections.abc import Sequence

ROOT = 0
"""The name of what stands before the first page."""


class PagePool:
    """The pages of a cache by number; page 0 is nobody's, for padding."""

    def __init__(self, pages: int, page_tokens: int) -> None:
        self.pages, self.page_tokens = pages - 1, page_tokens
        self._holders = [0] * pages
        self._free = OrderedDict.fromkeys(range(1, pages))
        self._published: dict[tuple[int, tuple[int, ...]], tuple[int, int]] = {}
        """By (name of the page before, tokens): the page, and its own name."""
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._last_name = ROOT

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """Give away the page that has not been used for longest; what it had is forgotten. Some must be free."""
        page, _ = self._free.popitem(last=False)
        if page in self._key_of:
            del self._published[self._key_of.pop(page)]
        self._holders[page] = 1
        return page

    def find(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        """Return the pages that hold the longest known beginning of tokens, held once more, and the last one's name."""
        pages: list[int] = []
        name = ROOT
        for first in range(0, len(tokens) - self.page_tokens + 1, self.page_tokens):
            found = self._published.get((name, tuple(tokens[first : first + self.page_tokens])))
            if found is None:
                break
            page, name = found
            self._free.pop(page, None)
            self._holders[page] += 1
            pages.append(page)
        return pages, name

    def publish(self, page: int, before: int, tokens: Sequence[int]) -> int:
        """Let others find a full page that stands after the one named `before`; return its name, or its twin's."""
        key = (before, tuple(tokens))
        if key not in self._published:
            self._last_name += 1
            self._published[key] = (page, self._last_name)
            self._key_of[page] = key
        return self._published[key][1]

    def release(self, pages: Sequence[int]) -> None:
        """Let go of a sequence's pages; the last is given away first, since the others lead to it."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free[page] = None
                if page not in self._key_of:
                    self._free.move_to_end(page, last=False)
