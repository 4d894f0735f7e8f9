"""Drafts by prompt lookup: what came after the newest tokens when they came before (Saxena 2023).

A draft is a guess. The engine samples a token in each of its places, as it would have anyway, and
keeps those up to the first that is another than was guessed: so no draft changes a bit, and a wrong
one costs time alone. Plain Python, no arrays.
"""

from collections.abc import Sequence

NGRAM_SIZES = (4, 3, 2)
"""How many of the newest tokens have to have come before; the longest that have are taken."""

WORTH_IT = 0.25
"""The share of guesses that has to be right for more of them."""

PAUSE = 32
"""Tokens until guesses are tried again that were not worth it."""

MEMORY = 0.9
"""The weight of older guesses against the newest, in the share that was right."""


class PromptLookup:
    """Where in a growing list of tokens each n-gram came last, with something behind it."""

    def __init__(self) -> None:
        self.ends: dict[tuple[int, ...], int] = {}
        """The index behind an n-gram, which is that of the token that followed it."""
        self.indexed = 0
        """Tokens whose n-grams are in `ends`, if they end with one of these."""

    def draft(self, tokens: Sequence[int], count: int) -> list[int]:
        """Return up to `count` tokens that may follow; [] if the newest did not come before.

        tokens: those of the last call, and more behind them."""
        self._index(tokens)
        for size in NGRAM_SIZES:
            end = self.ends.get(tuple(tokens[-size:])) if len(tokens) >= size else None
            if end is not None:
                return continuation(tokens, end, count)
        return []

    def _index(self, tokens: Sequence[int]) -> None:
        """Take in the n-grams that end before the last token: behind those something stands."""
        for end in range(self.indexed + 1, len(tokens)):
            for size in NGRAM_SIZES:
                if end >= size:
                    self.ends[tuple(tokens[end - size : end])] = end
        self.indexed = max(self.indexed, len(tokens) - 1)


def continuation(tokens: Sequence[int], start: int, count: int) -> list[int]:
    """Return `count` tokens from index start on, as if tokens went on from their end as from there.

    So what repeats itself is guessed to go on doing so."""
    extended = list(tokens[start : start + count])
    for i in range(count - len(extended)):
        extended.append(extended[i])
    return extended


class Speculation:
    """What one sequence guesses ahead, and whether that is worth it."""

    def __init__(self) -> None:
        self.lookup = PromptLookup()
        self.share_right = 1.0
        self.resumes_at = 0  # tokens of the sequence

    def draft(self, tokens: Sequence[int], count: int) -> list[int]:
        """Return up to `count` guesses at what follows tokens; [] while guesses do not pay."""
        if len(tokens) < self.resumes_at:
            return []
        return self.lookup.draft(tokens, count)

    def note(self, tokens: Sequence[int], was_right: bool) -> None:
        """Learn how a guess turned out. tokens: all of the sequence by now."""
        self.share_right = MEMORY * self.share_right + (1 - MEMORY) * was_right
        if self.share_right < WORTH_IT:
            self.resumes_at = len(tokens) + PAUSE
            self.share_right = 2 * WORTH_IT  # so that a few wrong ones end the next try
