"""Checkpoints of a training run, proved whole before they are used.

`read_run` reads the parameters of a run that somebody wants to use: to sample, serve, score or
export it. It reads through `Checkpoint`, which compares every array with the checksum in the
checkpoint's record, and raises DamagedCheckpoint rather than return other numbers than were saved.
What saves them and resumes from them is training/checkpoints.py.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.experimental import multihost_utils

from config import Dtype, GPTConfig
from errors import UserError, require
from formats.checksums import Record, named_leaves, path_name, read_sealed

log = logging.getLogger(__name__)

RECORD = "record"
"""Name, within a checkpoint, of the item that holds its Record."""
READ_ATTEMPTS = 3
"""Times that read_run looks for a checkpoint, while a run that trains deletes what it has found."""
READ_THREADS = 8
"""Arrays that are read at a time."""
LONGEST_REASON = 300
"""Characters of a library's message that are passed on."""

# --- One checkpoint.


class DamagedCheckpoint(UserError):
    """A checkpoint that does not hold what was saved."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"the checkpoint {path} is damaged: {reason}", param="out_dir")
        self.step = int(path.name)
        """Its updates."""
        self.path = path
        """Its directory."""
        self.reason = reason
        """What is wrong, in one line."""


def read_array(directory: Path, name: str, like: Any) -> jax.Array:
    """Read one array of an item of a checkpoint, in the shape, dtype and sharding of `like`.

    Each process reads what its devices hold, equal shards once. Raises what TensorStore raises."""
    database = {"driver": "ocdbt", "base": f"file://{directory.absolute()}/", "path": f"{name}/"}
    stored = tensorstore.open({"driver": "zarr", "kvstore": database}).result()
    if (stored.shape, stored.dtype.name) != (like.shape, str(like.dtype)):
        raise ValueError(f"{name} is {stored.dtype.name} {stored.shape}, not as in its record")

    @lru_cache
    def read_shard(bounds: tuple[tuple[int, int], ...]) -> np.ndarray:
        return stored[tuple(slice(*ends) for ends in bounds)].read().result()

    def read_index(index: Any) -> np.ndarray:  # one slice a dimension
        ends = [part.indices(size) for part, size in zip(index, like.shape, strict=True)]
        return read_shard(tuple((start, stop) for start, stop, _ in ends))

    return jax.make_array_from_callback(like.shape, like.sharding, read_index)


def reason_of(error: BaseException, directory: Path) -> str:
    """Return, in one short line, what a library's exception says was its first cause.

    Paths in it become relative to the directory."""
    while error.__cause__ is not None:
        error = error.__cause__
    message = str(error).partition(" [tensorstore_spec=")[0] or type(error).__name__
    message = message.replace(f"{directory.absolute()}/", "").replace(f"{directory}/", "")
    line = " ".join(message.split())
    return line if len(line) <= LONGEST_REASON else line[:LONGEST_REASON] + "..."


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint on disk, which may be damaged."""

    path: Path
    """Its directory, whose name is the step."""

    @property
    def step(self) -> int:
        """Updates done."""
        return int(self.path.name)

    def record(self) -> Record | None:
        """Return its record; None if it was saved without one. Raises DamagedCheckpoint.

        The versions of this project before there were checksums wrote none."""
        if not self.has_record():
            return None
        file = self.path / RECORD / "metadata"
        try:
            record = Record.from_json(read_sealed(file))
        except OSError as error:
            raise DamagedCheckpoint(self.path, f"{file}: {error.strerror}") from error
        except UserError as error:
            raise DamagedCheckpoint(self.path, str(error)) from error
        if record.step != self.step:
            raise DamagedCheckpoint(self.path, f"{file} belongs to step {record.step}")
        return record

    def has_record(self) -> bool:
        """Say whether it was saved with a record, which may be missing now.

        Orbax's list of its items tells, if that is there."""
        items = self.path / "_CHECKPOINT_METADATA"
        listed = items.exists() and f'"{RECORD}"'.encode() in items.read_bytes()
        return listed or (self.path / RECORD).exists()

    def val_loss(self) -> float | None:
        """Return the validation loss; None if it was not measured. Raises DamagedCheckpoint."""
        record = self.record()
        if record is not None:
            return record.val_loss
        file = self.path / "metrics" / "metrics"  # of a version before there were records
        if not file.exists():
            return None
        try:
            return float(json.loads(file.read_text())["val_loss"])
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedCheckpoint(self.path, f"{file}: {error}") from error

    def shapes_of_params(self) -> dict[str, Any]:
        """Return the shapes and dtypes of the parameters, a nested dict of jax.ShapeDtypeStruct.

        Raises DamagedCheckpoint."""
        record = self.record()
        if record is None:
            with self.damage_found():
                return ocp.StandardCheckpointHandler().metadata(self.path / "params").tree
        shapes: dict[str, Any] = {}
        for name, saved in record.arrays.items():
            item, *parents, last = name.split(".")
            if item == "params":
                parent = shapes
                for key in parents:
                    parent = parent.setdefault(key, {})
                parent[last] = jax.ShapeDtypeStruct(saved.shape, saved.dtype)
        return shapes

    def read(self, items: dict[str, Any]) -> dict[str, Any]:
        """Return items of the checkpoint, proved to be what was saved.

        `items` are trees of arrays, perhaps abstract, by name, which is params or opt_state: what
        is returned has their shapes, dtypes and shardings. All processes of a run call this.
        Raises DamagedCheckpoint, in all of them; UserError if another model was saved."""
        arrays: dict[str, Any] = {}
        record = None
        error = None
        try:
            record = self.record()
            self.require_readable()
            self.require_same_arrays(record, items)
            arrays = self.read_unproved(items)
        except DamagedCheckpoint as damage:
            error = damage
        self.agree_on(error)
        if record is None:
            log.warning("%s was saved without checksums: it cannot be verified", self.path)
        else:
            self.verify(record, arrays)
        return arrays

    def require_readable(self) -> None:
        """Raise UserError for a file that this user may not read: that does no damage to it."""
        for path in (self.path, *self.path.rglob("*")):
            needed = os.R_OK | os.X_OK if path.is_dir() else os.R_OK
            allowed = os.access(path, needed) or not path.exists()
            require(allowed, f"{path} cannot be read: permission denied", "out_dir")

    def require_same_arrays(self, record: Record | None, items: dict[str, Any]) -> None:
        """Raise UserError if arrays of other names, shapes or dtypes were saved than are wanted."""
        if record is None:
            return
        wanted = {(name, leaf.shape, str(leaf.dtype)) for name, leaf in named_leaves(items).items()}
        saved = {
            (name, array.shape, array.dtype)
            for name, array in record.arrays.items()
            if name.split(".")[0] in items
        }
        differing = sorted(wanted ^ saved)
        if differing:
            name, shape, dtype = differing[0]
            raise UserError(
                f"{self.path} was saved by a run of another model or optimizer: "
                f"only one of the two has {name} {shape} {dtype}; resume with that run's flags",
                param="out_dir",
            )

    def read_unproved(self, items: dict[str, Any]) -> dict[str, Any]:
        """Return items as they are on disk. Raises DamagedCheckpoint.

        This asks TensorStore and not Orbax, which waits for the other processes (those would wait
        forever for one that has found damage), and which after an error leaves reads under way that
        print a page of traceback each."""

        def read_leaf(path: tuple, leaf: Any) -> Any:
            item, name = path_name(path).split(".", 1)
            return pool.submit(read_array, self.path / item, name, leaf)

        with ThreadPoolExecutor(READ_THREADS) as pool:
            futures = jax.tree_util.tree_map_with_path(read_leaf, items)
            with self.damage_found():
                return jax.tree.map(Future.result, futures)

    @contextlib.contextmanager
    def damage_found(self) -> Iterator[None]:
        """Inside, whatever TensorStore and Orbax raise becomes DamagedCheckpoint.

        Their exceptions have no class in common. Out of memory stays what it is."""
        try:
            yield
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            raise DamagedCheckpoint(self.path, reason_of(error, self.path)) from error

    def agree_on(self, error: DamagedCheckpoint | None) -> None:
        """Raise DamagedCheckpoint in all processes of a run if there is an error in one of them."""
        if jax.process_count() > 1:
            failed = multihost_utils.process_allgather(np.int32(error is not None))
            if error is None and failed.any():
                reason = f"process {int(failed.argmax())} could not read it"
                error = DamagedCheckpoint(self.path, reason)
        if error is not None:
            raise error

    def verify(self, record: Record, items: dict[str, Any]) -> None:
        """Raise DamagedCheckpoint if an array has other numbers than were saved."""
        arrays = Record.of(record.step, record.val_loss, items).arrays
        differing = [name for name, array in arrays.items() if array != record.arrays[name]]
        if differing:
            raise DamagedCheckpoint(
                self.path,
                f"{len(differing)} of {len(arrays)} arrays hold other numbers than were saved, "
                f"the first is {differing[0]}",
            )


def checkpoints_in(directory: Path) -> dict[int, Checkpoint]:
    """Return the complete checkpoints in OUT_DIR/checkpoints by step, in that order."""
    if not directory.is_dir():
        return {}
    steps = sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())
    return {step: Checkpoint(directory / str(step)) for step in steps}


def best_step(val_losses: dict[int, float | None]) -> int | None:
    """Return the step with the lowest loss, the latest of them; None if there are no losses."""
    measured = [
        (loss, -step)
        for step, loss in val_losses.items()
        if loss is not None and math.isfinite(loss)
    ]
    return -min(measured)[1] if measured else None


# --- A run that somebody wants to use.


def read_run(out_dir: Path, dtype: Dtype | None = None) -> tuple[GPTConfig, dict, dict, int]:
    """Read the best checkpoint of a run, or the latest if none was evaluated.

    Returns the model's config, with `dtype` if that is given; its parameters on one device, a
    nested dict (model.Params); the content of meta.json, which describes the tokenizer; and the
    checkpoint's step. The run may still be training: nothing is made or deleted. Raises UserError
    where out_dir holds no complete checkpoint, or a damaged one."""
    out_dir = Path(out_dir)
    for name in ("config.json", "meta.json", "checkpoints"):
        require(
            (out_dir / name).exists(),
            f"out_dir={out_dir} holds no trained model: there is no {out_dir / name}",
            param="out_dir",
        )
    checkpoint, params = read_best_params(out_dir)
    stored, meta = read_description(out_dir, checkpoint)
    config = GPTConfig.from_json(stored)
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)
    return config, params, meta, checkpoint.step


def read_description(out_dir: Path, checkpoint: Checkpoint) -> tuple[dict, dict]:
    """Return the model's config and the content of meta.json, which lie beside the checkpoint.

    Raises UserError if one of the files is damaged; there is no proof of that in a run of a version
    before there were records."""
    sealed = checkpoint.has_record()
    description = read_sealed(out_dir / "config.json", sealed)
    meta = read_sealed(out_dir / "meta.json", sealed)
    for file, content, key in (
        ("config.json", description, "model"),
        ("meta.json", meta, "tokenizer"),
    ):
        require(key in content, f"{out_dir / file} is damaged: it has no {key!r}", "out_dir")
    return description["model"], meta


def read_best_params(out_dir: Path) -> tuple[Checkpoint, dict]:
    """Return the best checkpoint, or else the latest, and its parameters.

    Raises UserError."""
    for attempts_left in reversed(range(READ_ATTEMPTS)):
        found = checkpoints_in(out_dir / "checkpoints")
        require(bool(found), f"out_dir={out_dir} holds no complete checkpoint yet", "out_dir")
        try:
            best = best_step({step: checkpoint.val_loss() for step, checkpoint in found.items()})
            step = max(found) if best is None else best
            return found[step], read_params(found[step])
        except DamagedCheckpoint as error:
            if error.path.exists() or attempts_left == 0:
                raise UserError(
                    f"{error}; move it out of {error.path.parent} to use another", error.param
                ) from error
    raise AssertionError("the last attempt returns or raises")


def read_params(checkpoint: Checkpoint) -> dict:
    """Read the parameters of a checkpoint, whatever mesh has saved them.

    They lie on one device: the default device of JAX if there is one, or the first."""
    device = jnp.zeros(0).sharding

    def on_device(saved: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(saved.shape, saved.dtype, sharding=device)

    shapes = jax.tree.map(on_device, checkpoint.shapes_of_params())
    return checkpoint.read({"params": shapes})["params"]
