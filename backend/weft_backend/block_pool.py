"""The pages of the KV cache, by reference count."""

from __future__ import annotations

from collections import OrderedDict


class BlockPool:
    """Gives out pages 0 to ``num_pages - 1``.

    A page in use has a reference for each sequence that has it. A page without references is free; if it has a name,
    by which a prefix is found, it is *idle*: still free, but given out last, the longest idle first.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._references = [0] * num_pages
        self._blank = list(range(num_pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._names: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Pages that can be given out now, idle ones included."""
        return len(self._blank) + len(self._idle)

    @property
    def idle_pages(self) -> list[int]:
        """The named pages that no sequence has."""
        return list(self._idle)

    def num_references(self, page: int) -> int:
        """Sequences that have the page."""
        return self._references[page]

    def allocate(self) -> tuple[int, bytes | None]:
        """A page with one reference, and the name that was given up for it, if any. Needs ``num_free > 0``."""
        if self._blank:
            page, name = self._blank.pop(), None
        else:
            page = self._idle.popitem(last=False)[0]
            name = self._names.pop(page)
        self._references[page] = 1
        return page, name

    def share(self, page: int) -> None:
        """Add a reference to a page in use or idle."""
        if self._references[page] == 0:
            del self._idle[page]
        self._references[page] += 1

    def release(self, pages: list[int]) -> None:
        """Drop a reference of each page. The last page is idle longest, so that a prefix loses its end first."""
        references, names = self._references, self._names
        for page in reversed(pages):
            num_left = references[page] = references[page] - 1
            assert num_left >= 0, f"page {page} was released twice"
            if num_left == 0:
                if page in names:
                    self._idle[page] = None
                else:
                    self._blank.append(page)

    def name(self, page: int, name: bytes) -> bool:
        """Name a page in use, unless it has a name; whether it took this one."""
        return self._names.setdefault(page, name) is name

    def unname(self, page: int) -> bytes | None:
        """Take away a page's name, and return it."""
        if page in self._idle:
            del self._idle[page]
            self._blank.append(page)
        return self._names.pop(page, None)
