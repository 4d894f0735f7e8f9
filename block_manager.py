"""Who holds which page of the KV pool: plain Python bookkeeping, no arrays.

The pool has N pages of P tokens. A sequence holds a table of pages: its token at position i lies in
slot i % P of page table[i // P]. What always holds, and `check` asserts:
1. Page 0, the null page, is never free, never in a table and never cached: padding may point there.
2. A page is in exactly refs[page] tables, at most once in each; it is in the free queue exactly
   when refs[page] is 0.
3. A page is written only by the one sequence that holds it, and never while cached: `write` copies
   it first.
4. A cached page is full, and is found by one key; a key finds one page.
"""

from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple


class PageCopy(NamedTuple):
    """A page whose content the device is to copy to another, before anything writes to either."""

    source: int
    target: int


class PrefixKey(NamedTuple):
    """What a cached page is found by."""

    parent: int
    """Serial number of the cached page before it; 0 before the first."""
    tokens: tuple[int, ...]
    """The P tokens that it holds."""


class CachedPage(NamedTuple):
    """What is known of a page in the prefix cache."""

    key: PrefixKey
    serial: int
    """Never used twice: a page that was filled again is not mistaken for what it was."""


class Prefix(NamedTuple):
    """How much of a sequence's prompt is in the prefix cache."""

    pages: int
    serial: int
    """Of the last of these pages; 0 if there are none."""


class BlockManager:
    """Lends the pages 1 to num_pages - 1.

    Pages of which `filled` was told stay findable by their tokens (the prefix cache) after their
    last holder has gone, until the pool needs them: least recently held first.

    The prefix cache is a trie. A dict compares the tokens themselves on a hit, and a serial number
    is never used twice, so two prefixes cannot be taken for each other, as colliding hashes can."""

    def __init__(self, num_pages: int, page_size: int):
        assert num_pages >= 2, f"{num_pages} pages: one is the null page, so at least 2 are needed"
        self.num_pages = num_pages
        self.page_size = page_size
        self.refs = [0] * num_pages
        self.tables: dict[Hashable, list[int]] = {}
        # Used as an ordered set; the next page to be taken is in front.
        self.free_queue: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_pages))
        self.page_of: dict[PrefixKey, int] = {}  # the prefix cache
        self.cached: dict[int, CachedPage] = {}  # its inverse, by page
        self.prefixes: dict[Hashable, Prefix] = {}  # of each sequence that has a table
        self.last_serial = 0
        self.queried_tokens = 0  # prompt tokens of admitted sequences
        self.hit_tokens = 0  # those of them that were found in the prefix cache

    @property
    def num_free(self) -> int:
        """Pages that can be taken: nobody holds them, though they may be cached."""
        return len(self.free_queue)

    def pages_for(self, tokens: int) -> int:
        """Return how many pages so many tokens need."""
        return -(-tokens // self.page_size)

    def open(self, seq: Hashable, prompt: Sequence[int], use_cache: bool = True) -> int:
        """Give seq a table with the cached pages its prompt begins with; return their token count.

        At least the prompt's last token is left to compute: the first new token is sampled from
        what follows it."""
        assert seq not in self.tables, f"{seq} has a table already"
        table: list[int] = []
        serial = 0
        while use_cache and (len(table) + 1) * self.page_size < len(prompt):
            page = self.page_of.get(PrefixKey(serial, self._page_tokens(prompt, len(table))))
            if page is None:
                break
            self._hold(page)
            table.append(page)
            serial = self.cached[page].serial
        self.tables[seq] = table
        self.prefixes[seq] = Prefix(len(table), serial)
        return len(table) * self.page_size

    def count_hits(self, prompt_tokens: int, hit_tokens: int) -> None:
        """Note for the statistics that a sequence was admitted."""
        self.queried_tokens += prompt_tokens
        self.hit_tokens += hit_tokens

    def write(self, seq: Hashable, start: int, end: int) -> list[PageCopy] | None:
        """Make the positions start to end - 1 of seq writable.

        Adds new pages behind its table and replaces shared ones by copies of its own. Returns the
        copies to be made on the device before it writes, or None, with nothing changed, if there
        are too few free pages."""
        table = self.tables[seq]
        assert start <= len(table) * self.page_size, (
            f"{seq}: writing from {start} leaves a hole after {len(table)} pages"
        )
        shared = self._shared(table, start, end)
        num_new = max(0, self.pages_for(end) - len(table))
        if len(shared) + num_new > self.num_free:
            return None
        copies = [self._replace_shared(table, i) for i in shared]
        table += [self._take() for _ in range(num_new)]
        for page in table[start // self.page_size : self.pages_for(end)]:
            assert self.refs[page] == 1 and page not in self.cached, (
                f"{seq} would write page {page}, which others read"
            )
        return copies

    def filled(self, seq: Hashable, token_ids: Sequence[int], computed: int) -> None:
        """Put the full pages among the first `computed` positions of seq into the prefix cache.

        token_ids: of seq, at least so many. What they hold must have the bits that the same tokens
        get as a prompt."""
        assert computed <= len(token_ids), (
            f"{seq}: {computed} tokens are in pages, of {len(token_ids)}"
        )
        pages, serial = self.prefixes[seq]
        while (pages + 1) * self.page_size <= computed:
            key = PrefixKey(serial, self._page_tokens(token_ids, pages))
            if key not in self.page_of:
                self._put_into_cache(key, self.tables[seq][pages])
            # Another sequence may have computed the same page before: then that one stays.
            serial = self.cached[self.page_of[key]].serial
            pages += 1
        self.prefixes[seq] = Prefix(pages, serial)

    def fork(self, parent: Hashable, child: Hashable) -> None:
        """Give child the pages of parent, shared until one of them writes."""
        assert child not in self.tables, f"{child} has a table already"
        self.tables[child] = list(self.tables[parent])
        self.prefixes[child] = self.prefixes[parent]
        for page in self.tables[child]:
            self.refs[page] += 1

    def forget(self) -> None:
        """Empty the prefix cache."""
        self.page_of.clear()
        self.cached.clear()

    def free(self, seq: Hashable) -> None:
        """Take the table of seq away.

        Its last pages come first in the queue: a prefix is worth more than what follows it."""
        for page in reversed(self.tables.pop(seq)):
            self.refs[page] -= 1
            if self.refs[page] == 0:
                self.free_queue[page] = None
                self.free_queue.move_to_end(page, last=page in self.cached)
        del self.prefixes[seq]

    def check(self) -> None:
        """Assert the module's invariants that bookkeeping alone can break (1, 2, 4)."""
        held = Counter(page for table in self.tables.values() for page in table)
        null_page_in_use = held[0] > 0 or 0 in self.free_queue or 0 in self.cached
        assert not null_page_in_use, "the null page is in use"
        for seq, table in self.tables.items():
            assert len(set(table)) == len(table), f"{seq} has a page twice: {table}"
        for page in range(1, self.num_pages):
            assert self.refs[page] == held[page], (
                f"page {page} is in {held[page]} tables, refs says {self.refs[page]}"
            )
            assert (page in self.free_queue) == (held[page] == 0), (
                f"page {page}: {held[page]} holders, yet free or lost"
            )
        key_by_page = {page: key for key, page in self.page_of.items()}
        assert key_by_page == {page: cached.key for page, cached in self.cached.items()}, (
            "a cached page and its key do not find each other"
        )
        assert self.tables.keys() == self.prefixes.keys(), "tables and prefixes differ"

    def _page_tokens(self, token_ids: Sequence[int], i: int) -> tuple[int, ...]:
        """Return those of a sequence's tokens that its page i holds."""
        return tuple(token_ids[i * self.page_size : (i + 1) * self.page_size])

    def _shared(self, table: list[int], start: int, end: int) -> list[int]:
        """Return which entries of table, of those for start to end - 1, are in other tables."""
        first = start // self.page_size
        behind_last = min(len(table), self.pages_for(end))
        return [i for i in range(first, behind_last) if self.refs[table[i]] > 1]

    def _replace_shared(self, table: list[int], i: int) -> PageCopy:
        """Put a free page in the place of a shared one; return the copy that makes them equal."""
        shared = table[i]
        table[i] = self._take()
        self.refs[shared] -= 1
        return PageCopy(shared, table[i])

    def _put_into_cache(self, key: PrefixKey, page: int) -> None:
        """Make a page findable by its key."""
        self.last_serial += 1
        self.page_of[key] = page
        self.cached[page] = CachedPage(key, self.last_serial)

    def _hold(self, page: int) -> None:
        """Count one more table that has the page."""
        self.free_queue.pop(page, None)
        self.refs[page] += 1

    def _take(self) -> int:
        """Return a free page for writing; if it is cached, its tokens are forgotten."""
        page, _ = self.free_queue.popitem(last=False)
        if page in self.cached:
            del self.page_of[self.cached.pop(page).key]
        self.refs[page] += 1
        return page
