"""What proves a file or an array: JSON that carries its own digest, and checksums of arrays.

They find accidents, such as flipped bits and files that were cut short or mixed up, and not
somebody who means to deceive. Start with `Record`, which each checkpoint has, then `checksum`.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from errors import UserError, require

SEAL = "sha256"
"""Key of a JSON object that holds the digest of all its other keys."""

# Files


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """Return content with one more key, SEAL: the digest of the others."""
    return {**content, SEAL: digest(content)}


def digest(content: dict[str, Any]) -> str:
    """Return the SHA-256 of content as JSON, in hexadecimal. The order of its keys is no matter."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def read_sealed(path: Path, sealed: bool = True) -> dict[str, Any]:
    """Return the content of a JSON file that `seal` has made, without the seal.

    With sealed=False the file need not have a seal; one that it has must fit all the same. Raises
    UserError if the file is damaged, OSError if it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it is not JSON ({error})") from error
    require(isinstance(content, dict), f"{path} is damaged: it holds no JSON object")
    stored = content.pop(SEAL, None)
    require(
        stored == digest(content) or (stored is None and not sealed),
        f"{path} is damaged, or was changed by hand: its content does not fit its {SEAL}",
    )
    return content


# Arrays


def mixed(x: jax.Array) -> jax.Array:
    """Return uint32 numbers whose bits all depend on all bits of x: MurmurHash3's finaliser.

    It is a bijection."""
    x = x ^ (x >> 16)
    x = x * np.uint32(0x85EBCA6B)
    x = x ^ (x >> 13)
    x = x * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def flat_index(shape: tuple[int, ...]) -> jax.Array:
    """Return the place of each element of an array of `shape`, in C order and modulo 2^32.

    It is a sum over the dimensions, so that each device computes it for its own shard."""
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for dimension in reversed(range(len(shape))):
        along = jax.lax.broadcasted_iota(jnp.uint32, shape, dimension)
        index = index + along * np.uint32(stride % 2**32)
        stride *= shape[dimension]
    return index


def add_pairs(total: tuple, other: tuple) -> tuple:
    """Add two pairs of numbers, element by element."""
    return total[0] + other[0], total[1] + other[1]


def checksum(array: jax.Array) -> jax.Array:
    """Return two sums (2,) uint32 over hashes of each element's bits and its place. Inside jit.

    Integers add up to the same in any order, so the sums do not depend on how the array is cut
    over devices. One changed element always changes them; if more have changed, or changed places,
    they stay the same once in 2^64. Both sums are one pass over the array: on a CPU two reductions
    take ten times as long."""
    words = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")
    first = mixed(words.astype(jnp.uint32) ^ mixed(flat_index(array.shape)))
    second = mixed(first ^ np.uint32(0x9E3779B9))
    zeros = (np.uint32(0), np.uint32(0))
    every_dimension = tuple(range(array.ndim))
    return jnp.stack(jax.lax.reduce((first, second), zeros, add_pairs, every_dimension))


@jax.jit
def stacked_checksums(arrays: list[jax.Array]) -> jax.Array:
    """Return the checksums (N, 2) uint32 of N arrays."""
    return jnp.stack([checksum(array) for array in arrays])


def checksums(arrays: list[jax.Array]) -> list[str]:
    """Return the checksum of each array in hexadecimal; all processes of a run get the same."""
    return [f"{first:08x}{second:08x}" for first, second in np.asarray(stacked_checksums(arrays))]


# What a checkpoint says about itself


@dataclasses.dataclass(frozen=True)
class SavedArray:
    """What a Record says about one array."""

    shape: tuple[int, ...]
    dtype: str
    checksum: str
    """What `checksums` returns."""


@dataclasses.dataclass(frozen=True)
class Record:
    """What a checkpoint says about itself, in a sealed JSON file."""

    step: int
    """Updates done."""
    val_loss: float | None
    """Validation loss at this step, if it was measured. The lowest is the best."""
    arrays: dict[str, SavedArray]
    """All arrays of the checkpoint, by named_leaves' names."""
    skipped_in_a_row: int
    """How many of the latest updates were skipped: a run that goes on counts from there."""

    @classmethod
    def of(
        cls, step: int, val_loss: float | None, items: dict[str, Any], skipped_in_a_row: int = 0
    ) -> "Record":
        """Describe items, the trees of arrays by name. All processes of a run call this."""
        leaves = named_leaves(items)
        sums = checksums(list(leaves.values()))
        arrays = {
            name: SavedArray(leaf.shape, str(leaf.dtype), checksum)
            for (name, leaf), checksum in zip(leaves.items(), sums, strict=True)
        }
        return cls(step, val_loss, arrays, skipped_in_a_row)

    def to_json(self) -> dict[str, Any]:
        """Return what from_json reads."""
        return seal(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Record":
        """Return the record that to_json has written, also before skipped updates were counted."""
        arrays = {
            name: SavedArray(tuple(saved["shape"]), saved["dtype"], saved["checksum"])
            for name, saved in content["arrays"].items()
        }
        skipped_in_a_row = content.get("skipped_in_a_row", 0)
        return cls(content["step"], content["val_loss"], arrays, skipped_in_a_row)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by their path_name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves}


def path_name(path: tuple) -> str:
    """Return the key path of a leaf as Orbax writes it, such as params.h.attn.c_attn.kernel."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
