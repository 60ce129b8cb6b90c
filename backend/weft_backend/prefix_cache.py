"""Finds the pages that already hold the keys and values of a prompt's beginning.

A full page is named by the hash of its tokens and of all tokens before them, so equal names mean equal prefixes. The
chain starts from the request's cache salt: requests with different salts never meet. BLAKE2 is used because a
collision would hand one request another's keys and values.

Two tiers hold named pages: the device's (``BlockPool`` keeps them until they are reused) and, with swap space, the
host's, to which a page moves when the device gives it up.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from hashlib import blake2b

from weft_backend.block_pool import BlockPool
from weft_backend.sequence import Sequence
from weft_backend.step import Int32Array

PageMove = tuple[int, int]  # (from, to)


@dataclass(slots=True)
class Match:
    """The longest cached beginning of a sequence: device pages to share, then host pages to bring back."""

    device_pages: list[int] = field(default_factory=list)
    host_pages: list[int] = field(default_factory=list)

    @property
    def num_pages(self) -> int:
        return len(self.device_pages) + len(self.host_pages)


class HostTier:
    """Named pages in host memory, the least recently used given up first."""

    def __init__(self, num_pages: int) -> None:
        self._blank = list(range(num_pages - 1, -1, -1))
        self._pages: OrderedDict[bytes, int] = OrderedDict()
        self._in_use: set[bytes] = set()  # named by moves that are not planned yet

    def find(self, name: bytes) -> int | None:
        """The host page of that name."""
        return self._pages.get(name)

    def touch(self, name: bytes) -> None:
        """Mark a page as used now; it stays until ``settle``."""
        self._pages.move_to_end(name)
        self._in_use.add(name)

    def settle(self) -> None:
        """The moves named so far are in a plan; later plans may give their pages up, for steps run in order."""
        self._in_use.clear()

    def place(self, name: bytes) -> int | None:
        """A page to copy that content to; None if it is here already, or if no page can be given up."""
        if name in self._pages:
            return None
        if self._blank:
            page = self._blank.pop()
        else:
            oldest = next(iter(self._pages), None)
            if oldest is None or oldest in self._in_use:
                return None
            page = self._pages.pop(oldest)
        self._pages[name] = page
        self._in_use.add(name)
        return page

    def forget(self, name: bytes) -> None:
        """Give up the page of that name, if there is one."""
        if name in self._pages:
            self._blank.append(self._pages.pop(name))

    def clear(self) -> None:
        """Give up every page."""
        self._blank.extend(self._pages.values())
        self._pages.clear()


class PrefixCache:
    """Names of pages in both tiers."""

    def __init__(self, pool: BlockPool, block_size: int, num_host_pages: int = 0, enabled: bool = True) -> None:
        self.pool = pool
        self.block_size = block_size
        self.enabled = enabled
        self.host = HostTier(num_host_pages)
        self._swap_out: list[PageMove] = []
        self._pages: dict[bytes, int] = {}

    def match(self, sequence: Sequence) -> Match:
        """What is cached of the sequence's beginning, leaving at least its last token to compute."""
        match = Match()
        if not self.enabled or sequence.request.sampling.prompt_logprobs is not None:
            return match  # the logits of every prompt token are wanted, so all of them must be computed
        num_pages = (len(sequence.token_ids) - 1) // self.block_size
        self._hash_pages(sequence, sequence.token_ids, num_pages)
        for name in sequence.page_hashes[:num_pages]:
            page = self._pages.get(name)
            host_page = self.host.find(name)
            if page is not None and not match.host_pages:
                match.device_pages.append(page)
            elif host_page is not None:
                match.host_pages.append(host_page)
            else:
                break
        return match

    def take(self, sequence: Sequence, match: Match) -> list[PageMove]:
        """Give the sequence the matched pages; returns the moves (host page, device page) that this needs."""
        for page in match.device_pages:
            self.pool.share(page)
        sequence.page_ids = list(match.device_pages)
        first = len(match.device_pages)
        names = sequence.page_hashes[first : first + len(match.host_pages)]
        for name in names:
            self.host.touch(name)
        swap_in: list[PageMove] = []
        for name, host_page in zip(names, match.host_pages, strict=True):
            page = self.allocate()
            swap_in.append((host_page, page))
            sequence.page_ids.append(page)
            self._name(page, name)
        return swap_in

    def allocate(self) -> int:
        """A page to write; the name of what it held, if any, moves to the host tier."""
        page, name = self.pool.allocate()
        if name is not None:
            del self._pages[name]
            host_page = self.host.place(name)
            if host_page is not None:
                self._swap_out.append((page, host_page))
        return page

    def take_swap_out(self) -> list[PageMove]:
        """The moves (device page, host page) that allocations since the last call need; they belong in this plan."""
        moves, self._swap_out = self._swap_out, []
        self.host.settle()
        return moves

    def register(self, sequence: Sequence, token_ids: Int32Array, start: int, end: int) -> None:
        """Name the pages that tokens ``start`` to ``end - 1`` of ``token_ids``, computed now, have filled."""
        if self.enabled:
            first, last = start // self.block_size, end // self.block_size
            self._hash_pages(sequence, token_ids, last)
            for page, name in zip(sequence.page_ids[first:last], sequence.page_hashes[first:last], strict=True):
                self._name(page, name)

    def forget(self, sequence: Sequence) -> None:
        """Let none of a sequence's pages be found again, in either tier, whoever else has them."""
        for page in sequence.page_ids:
            self._unname(page)
        for name in sequence.page_hashes:
            self.host.forget(name)

    def reset(self) -> int:
        """Forget every page that no sequence has, in both tiers; returns how many device pages that were."""
        idle = self.pool.idle_pages
        for page in idle:
            self._unname(page)
        self.host.clear()
        return len(idle)

    def _name(self, page: int, name: bytes) -> None:
        # The same content may be computed twice, and a shared page has a name: the first stands.
        if name not in self._pages and self.pool.name(page, name):
            self._pages[name] = page

    def _unname(self, page: int) -> None:
        name = self.pool.unname(page)
        if name is not None:
            del self._pages[name]

    def _hash_pages(self, sequence: Sequence, token_ids: Int32Array, num_pages: int) -> None:
        """Name the first pages of a sequence, as far as they have no name yet."""
        names = sequence.page_hashes
        if len(names) < num_pages:
            size = self.block_size * token_ids.itemsize
            tokens = token_ids[len(names) * self.block_size : num_pages * self.block_size].tobytes()
            previous = names[-1] if names else blake2b(sequence.request.cache_salt.encode(), digest_size=16).digest()
            for offset in range(0, len(tokens), size):
                previous = blake2b(previous + tokens[offset : offset + size], digest_size=16).digest()
                names.append(previous)
