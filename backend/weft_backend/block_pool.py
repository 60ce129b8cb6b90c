"""The pages of the KV cache, by reference count."""

from __future__ import annotations

from collections import OrderedDict


class BlockPool:
    """Gives out pages 0 to ``num_pages - 1``.

    A page in use has a reference for each sequence that has it. A page without references is free; if its content is
    kept for prefix hits it is *idle*: still free, but given out last, the longest idle first.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._references = [0] * num_pages
        self._blank = list(range(num_pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._kept: set[int] = set()

    @property
    def num_free(self) -> int:
        """Pages that can be given out now, idle ones included."""
        return len(self._blank) + len(self._idle)

    def num_references(self, page: int) -> int:
        """Sequences that have the page."""
        return self._references[page]

    def allocate(self) -> tuple[int, bool]:
        """A page with one reference, and whether its kept content was given up for it. Needs ``num_free > 0``."""
        if self._blank:
            page, was_kept = self._blank.pop(), False
        else:
            page, was_kept = self._idle.popitem(last=False)[0], True
            self._kept.discard(page)
        self._references[page] = 1
        return page, was_kept

    def share(self, page: int) -> None:
        """Add a reference to a page in use or idle."""
        if self._references[page] == 0:
            del self._idle[page]
        self._references[page] += 1

    def release(self, pages: list[int]) -> None:
        """Drop a reference of each page. The last page is idle longest, so that a prefix loses its end first."""
        for page in reversed(pages):
            self._references[page] -= 1
            assert self._references[page] >= 0, f"page {page} was released twice"
            if self._references[page] == 0:
                if page in self._kept:
                    self._idle[page] = None
                else:
                    self._blank.append(page)

    def keep(self, page: int) -> None:
        """Keep the page's content for prefix hits once it is released."""
        assert self._references[page] > 0, f"page {page} is not in use"
        self._kept.add(page)

    def forget(self, page: int) -> None:
        """Stop keeping the page's content."""
        self._kept.discard(page)
        if page in self._idle:
            del self._idle[page]
            self._blank.append(page)
