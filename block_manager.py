"""Who holds which page of the KV pool: plain Python bookkeeping, no arrays.

The pool has N pages of P tokens. A sequence holds a table of pages: its token at position i lies in slot i % P of page
table[i // P]. What always holds, and `check` asserts:
1. Page 0, the null page, is never free, never in a table and never cached: padding may point there.
2. A page is in exactly refs[page] tables, at most once in each; it is in the free queue exactly when refs[page] is 0.
3. A page is written only by the one sequence that holds it, and never while cached: `write` copies it first.
4. A cached page is full, holds prompt tokens only, and is found by one key; a key finds one page.
"""

from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence


class BlockManager:
    """Lends the pages 1 to num_pages - 1. Pages that were filled by prefill stay findable by their tokens (the prefix cache)
    after their last holder has gone, until the pool needs them: least recently held first.

    The prefix cache is a trie: a page's key is (serial number of the page before it, its P tokens), 0 standing before the
    first. A dict compares the tokens themselves on a hit, and a serial number is never used twice, so two prefixes cannot
    be taken for each other, as colliding hashes can."""

    def __init__(self, num_pages: int, page_size: int):
        assert num_pages >= 2, f"{num_pages} pages: one is the null page, so at least 2 are needed"
        self.num_pages, self.page_size = num_pages, page_size
        self.refs = [0] * num_pages
        self.tables: dict[Hashable, list[int]] = {}
        self.free_queue = OrderedDict.fromkeys(
            range(1, num_pages)
        )  # the next to be taken is in front
        self.page_of: dict[tuple, int] = {}  # the prefix cache
        self.cached: dict[int, tuple[tuple, int]] = {}  # page -> its key and its serial number
        self.chains: dict[
            Hashable, tuple[int, int]
        ] = {}  # sequence -> how many pages of it are in the trie, last serial
        self.serial = 0
        self.queried_tokens = self.hit_tokens = 0

    @property
    def num_free(self) -> int:
        """Pages that can be taken: nobody holds them, though they may be cached."""
        return len(self.free_queue)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def open(self, seq: Hashable, prompt: Sequence[int], use_cache: bool = True) -> int:
        """Gives seq a table with the cached pages its prompt begins with; returns how many tokens they hold.

        At least the prompt's last token is left to compute: the first new token is sampled from what follows it."""
        assert seq not in self.tables, f"{seq} has a table already"
        table, serial = [], 0
        while use_cache and (len(table) + 1) * self.page_size < len(prompt):
            page = self.page_of.get((serial, self._tokens(prompt, len(table))))
            if page is None:
                break
            self._hold(page)
            table.append(page)
            serial = self.cached[page][1]
        self.tables[seq] = table
        self.chains[seq] = len(table), serial
        return len(table) * self.page_size

    def count_hits(self, prompt_tokens: int, hit_tokens: int) -> None:
        """For the statistics: a sequence was admitted."""
        self.queried_tokens += prompt_tokens
        self.hit_tokens += hit_tokens

    def write(self, seq: Hashable, start: int, end: int) -> list[tuple[int, int]] | None:
        """Makes the positions start to end - 1 of seq writable: new pages behind its table, own copies of shared ones.

        Returns the copies (from page, to page) to be made on the device before it writes, or None, with nothing changed,
        if there are too few free pages."""
        table = self.tables[seq]
        assert start <= len(table) * self.page_size, (
            f"{seq}: writing from {start} leaves a hole after {len(table)} pages"
        )
        shared = [
            i
            for i in range(start // self.page_size, min(len(table), self.pages_for(end)))
            if self.refs[table[i]] > 1
        ]
        new = max(0, self.pages_for(end) - len(table))
        if len(shared) + new > self.num_free:
            return None
        copies = []
        for i in shared:
            page = self._take()
            copies.append((table[i], page))
            self.refs[table[i]] -= 1
            table[i] = page
        table += [self._take() for _ in range(new)]
        for page in table[start // self.page_size : self.pages_for(end)]:
            assert self.refs[page] == 1 and page not in self.cached, (
                f"{seq} would write page {page}, which others read"
            )
        return copies

    def filled(self, seq: Hashable, prompt: Sequence[int], tokens: int) -> None:
        """Prefill has filled the first `tokens` positions of seq: puts their full pages into the prefix cache."""
        assert tokens <= len(prompt), (
            f"{seq}: prefill of {tokens} tokens of a prompt of {len(prompt)}"
        )
        depth, serial = self.chains[seq]
        while (depth + 1) * self.page_size <= tokens:
            key = serial, self._tokens(prompt, depth)
            if (
                key not in self.page_of
            ):  # else another sequence computed the same page: that one stays
                self.serial += 1
                self.page_of[key] = self.tables[seq][depth]
                self.cached[self.tables[seq][depth]] = key, self.serial
            depth, serial = depth + 1, self.cached[self.page_of[key]][1]
        self.chains[seq] = depth, serial

    def fork(self, parent: Hashable, child: Hashable) -> None:
        """Gives child the pages of parent, shared until one of them writes."""
        assert child not in self.tables, f"{child} has a table already"
        self.tables[child], self.chains[child] = list(self.tables[parent]), self.chains[parent]
        for page in self.tables[child]:
            self.refs[page] += 1

    def forget(self) -> None:
        """Empties the prefix cache."""
        self.page_of.clear()
        self.cached.clear()

    def free(self, seq: Hashable) -> None:
        """Takes the table of seq away. Its last pages come first in the queue: a prefix is worth more than what follows it."""
        for page in reversed(self.tables.pop(seq)):
            self.refs[page] -= 1
            if self.refs[page] == 0:
                self.free_queue[page] = None
                self.free_queue.move_to_end(page, last=page in self.cached)
        del self.chains[seq]

    def _tokens(self, prompt: Sequence[int], i: int) -> tuple[int, ...]:
        return tuple(prompt[i * self.page_size : (i + 1) * self.page_size])

    def _hold(self, page: int) -> None:
        self.free_queue.pop(page, None)
        self.refs[page] += 1

    def _take(self) -> int:
        """A page for writing; if it is cached, its tokens are forgotten."""
        page, _ = self.free_queue.popitem(last=False)
        if page in self.cached:
            del self.page_of[self.cached.pop(page)[0]]
        self.refs[page] += 1
        return page

    def check(self) -> None:
        """Asserts the module's invariants that bookkeeping alone can break (1, 2, 4)."""
        held = Counter(page for table in self.tables.values() for page in table)
        for seq, table in self.tables.items():
            assert len(set(table)) == len(table), f"{seq} has a page twice: {table}"
        assert held[0] == 0 and 0 not in self.free_queue and 0 not in self.cached, (
            "the null page is in use"
        )
        for page in range(1, self.num_pages):
            assert self.refs[page] == held[page], (
                f"page {page} is in {held[page]} tables, refs says {self.refs[page]}"
            )
            assert (page in self.free_queue) == (held[page] == 0), (
                f"page {page}: {held[page]} holders, yet free or lost"
            )
        assert {page: key for key, page in self.page_of.items()} == {
            page: key for page, (key, _) in self.cached.items()
        }, "a cached page and its key do not find each other"
        assert self.tables.keys() == self.chains.keys(), "tables and chains differ"
