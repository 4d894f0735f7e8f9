"""Sequences of tokens packed into rows that are tries, and what a model sees of them.

A beginning that several sequences share (the context of four endings, the examples of a few-shot
task) stands in a row once. Start with `pack`, then read Trie, which takes a cache's place.

Shapes: B rows, T tokens of a row, H heads, KV heads of keys and values, D head_dim.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ops import einsum, fold_groups, unfold_groups

SHORTEST_ROW = 512  # tokens; longer rows are this times a power of two
OPEN = -1  # the end, in a Row, of a token that the next sequence may still continue


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trie:
    """Takes a cache's place in GPT.hidden where rows hold tries in depth-first order.

    It keeps no keys and values."""

    # (B, T) int32: the position of each token in its sequence.
    depth: jax.Array
    # (B, T, T) bool: [b, t, s] is whether token t sees token s, that is, whether s is on its path.
    visible: jax.Array
    dtype: str = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(
        cls, depth: jax.Array | np.ndarray, end: jax.Array | np.ndarray, dtype: str
    ) -> "Trie":
        """depth, end (B, T) int32: the tokens that continue token s are s + 1 to end[s] - 1."""
        t = jnp.arange(depth.shape[1])[:, None]
        return cls(jnp.asarray(depth), (t >= t.T) & (t < end[:, None, :]), dtype)

    def positions(self, T: int) -> jax.Array:
        """Return the position of each token in its own sequence: (B, T)."""
        return self.depth

    def attend(
        self, layer: Any, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, "Trie"]:
        """Let each token attend to its path.

        q (B, T, H, D), k and v (B, T, KV, D); returns (B, T, H, D) float32, and itself."""
        T = q.shape[1]
        q = fold_groups(q * q.shape[-1] ** -0.5, k.shape[2]).swapaxes(1, 2)  # (B, KV, T G, D)
        k = k.swapaxes(1, 2)
        v = v.swapaxes(1, 2)
        scores = einsum("bhtd,bhsd->bhts", q, k, self.dtype)
        visible = jnp.repeat(self.visible, q.shape[2] // T, axis=1)  # (B, T G, T)
        scores = jnp.where(visible[:, None], scores, -jnp.inf)
        out = einsum("bhts,bhsd->bhtd", jax.nn.softmax(scores), v, self.dtype)
        return unfold_groups(out.swapaxes(1, 2), T), self

    def advance(self, T: int) -> "Trie":
        """Return itself: nothing comes after a trie."""
        return self


class Scored(NamedTuple):
    """A token whose probability is asked for."""

    request: int
    place: int  # index in the row of the token that it is to follow
    target: int  # the token itself


class Row:
    """A row of a fixed number of tokens that is being packed with sequences."""

    def __init__(self, length: int):
        self.length = length
        self.tokens: list[int] = []
        self.depth: list[int] = []  # of each token: its position in its sequence
        self.end: list[int] = []  # of each token: the index after the last one that continues it
        self.path: list[int] = []  # indices in the row of the tokens of the last sequence
        self.scored: list[Scored] = []

    def add(self, request: int, sequence: list[int], targets: list[int]) -> bool:
        """Add a sequence and score the targets that follow its last tokens.

        Returns False, and changes nothing, if it is too long for the row."""
        shared = self._shared_with_path(sequence)
        tokens = len(self.tokens) + len(sequence) - shared
        scored = len(self.scored) + len(targets)
        if max(tokens, scored) > self.length:
            return False
        self.close(shared)
        for depth, token in enumerate(sequence[shared:], shared):
            self.path.append(len(self.tokens))
            self.tokens.append(token)
            self.depth.append(depth)
            self.end.append(OPEN)
        followed = self.path[-len(targets) :]
        for place, target in zip(followed, targets, strict=True):
            self.scored.append(Scored(request, place, target))
        return True

    def _shared_with_path(self, sequence: list[int]) -> int:
        """Return how many tokens the sequence begins with that the last one began with too."""
        shared = 0
        # The shorter one ends the comparison.
        for index, token in zip(self.path, sequence, strict=False):
            if self.tokens[index] != token:
                break
            shared += 1
        return shared

    def close(self, depth: int = 0) -> None:
        """Note that no more tokens will continue those of the path from `depth` on."""
        for index in self.path[depth:]:
            self.end[index] = len(self.tokens)
        del self.path[depth:]


def pack(
    requests: list[int], sequences: list[list[int]], targets: list[list[int]], T: int
) -> list[Row]:
    """Pack the sequences of these requests, which are indices, into rows of T tokens.

    They go in sorted order, in which neighbours share the most."""
    rows = [Row(T)]
    for i in sorted(requests, key=sequences.__getitem__):
        if rows[-1].add(i, sequences[i], targets[i]):
            continue
        rows[-1].close()
        rows.append(Row(T))
        fits = rows[-1].add(i, sequences[i], targets[i])
        assert fits, f"{len(sequences[i])} tokens do not fit a row of {T}"
    rows[-1].close()
    return rows


class PackedRows(NamedTuple):
    """Rows as arrays of int32, filled up to B rows of T tokens and B T scored places."""

    tokens: np.ndarray  # (B, T)
    depth: np.ndarray  # (B, T), as in Trie.create
    end: np.ndarray  # (B, T), as in Trie.create
    places: np.ndarray  # (B T,) indices into the B T tokens
    targets: np.ndarray  # (B T,) tokens that are scored as what follows there


def arrays(rows: list[Row], B: int) -> PackedRows:
    """Return rows as arrays, with up to B - 1 empty rows. A token that fills up a row sees only
    itself."""
    T = rows[0].length
    packed = PackedRows(
        tokens=np.zeros((B, T), np.int32),
        depth=np.zeros((B, T), np.int32),
        end=np.tile(np.arange(1, T + 1, dtype=np.int32), (B, 1)),
        places=np.zeros(B * T, np.int32),
        targets=np.zeros(B * T, np.int32),
    )
    count = 0
    for b, row in enumerate(rows):
        n = len(row.tokens)
        packed.tokens[b, :n] = row.tokens
        packed.depth[b, :n] = row.depth
        packed.end[b, :n] = row.end
        for scored in row.scored:
            packed.places[count] = b * T + scored.place
            packed.targets[count] = scored.target
            count += 1
    return packed


def row_lengths(longest: int) -> list[int]:
    """Return the lengths that rows have, ascending; the last is `longest`, the model's context.

    Few lengths, so that few shapes are compiled."""
    lengths = [min(SHORTEST_ROW, longest)]
    while lengths[-1] < longest:
        lengths.append(min(2 * lengths[-1], longest))
    return lengths
