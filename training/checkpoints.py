"""The checkpoints that a training run saves and resumes from: complete or invisible.

Start with `Checkpoints`. How one of them is read and proved whole is in checkpoints.py.
"""

import contextlib
import dataclasses
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from checkpoints import (
    RECORD,
    Checkpoint,
    DamagedCheckpoint,
    best_step,
    checkpoints_in,
    reason_of,
)
from errors import UserError
from formats.checksums import Record


@dataclasses.dataclass
class LatestAndBest(PreservationPolicy):
    """What Orbax keeps when a checkpoint is saved."""

    latest: int
    """How many of the latest checkpoints to keep."""
    val_losses: dict[int, float | None]
    """Validation loss of each step, as far as it is known. The best is kept too."""
    unknown: set[int]
    """Steps whose loss cannot be read: they are kept."""

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Say of each checkpoint, in the order of their steps, whether it is kept."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = best_step({step: self.val_losses.get(step) for step in steps})
        preserved = {best, *steps[-self.latest :], *self.unknown}
        return [step in preserved for step in steps]


class Checkpoints:
    """The checkpoints of one run, OUT_DIR/checkpoints/STEP: the latest `keep` and the best.

    A checkpoint is complete or invisible: Orbax writes it beside its place, asynchronously, and
    renames it; one that is no longer wanted is renamed away before it is deleted. So a kill at any
    moment leaves the last complete one. One that turns out to be damaged is not deleted: see
    `restore`."""

    def __init__(self, out_dir: Path, keep: int = 3) -> None:
        """Open the checkpoints in out_dir, which is made where there is none."""
        self.directory = Path(out_dir).absolute() / "checkpoints"
        self.trash = self.directory / "deleted"
        self.notes: list[str] = []
        """What the user should know about the checkpoints that were found."""
        self.skipped_in_a_row = 0
        """How many of the latest updates of the restored checkpoint were skipped."""
        self.policy = LatestAndBest(keep, {}, set())
        self.empty_trash()
        self.manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self.policy,
                todelete_subdir=self.trash.name,
                cleanup_tmp_directories=True,
                lightweight_initialize=True,  # reads no files of the checkpoints
            ),
        )
        self.read_losses()

    def read_losses(self) -> None:
        """Read the validation loss of each checkpoint."""
        for step, checkpoint in checkpoints_in(self.directory).items():
            try:
                self.policy.val_losses[step] = checkpoint.val_loss()
            except DamagedCheckpoint:
                self.policy.unknown.add(step)

    def latest(self) -> int | None:
        """Return the step of the newest complete checkpoint, None if there is none."""
        return self.manager.latest_step()

    def save(self, state: Any, val_loss: float | None = None, skipped_in_a_row: int = 0) -> None:
        """Begin to save a TrainState in the background, with its validation loss if that is known.

        skipped_in_a_row: how many of its latest updates were skipped. The arrays are copied before
        this returns, so `state` may be donated afterwards. Raises UserError if this, or the save
        before, fails."""
        step = int(state.step)
        if step == self.latest():
            return
        loss = val_loss if val_loss is not None and math.isfinite(val_loss) else None
        items = {"params": state.params, "opt_state": state.opt_state}
        record = Record.of(step, loss, items, skipped_in_a_row)
        self.policy.val_losses[step] = loss
        with self.failure_told():
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    opt_state=ocp.args.StandardSave(state.opt_state),
                    **{RECORD: ocp.args.JsonSave(record.to_json())},
                ),
            )
        self.empty_trash()

    @contextlib.contextmanager
    def failure_told(self) -> Iterator[None]:
        """Inside, whatever Orbax and TensorStore raise when they cannot write becomes UserError."""
        try:
            yield
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            raise UserError(
                f"cannot save a checkpoint in {self.directory}: "
                f"{system_error(error) or reason_of(error, self.directory)}; those that are "
                "complete are whole",
                param="out_dir",
            ) from error

    def require_saved(self) -> None:
        """Raise UserError if the last save has failed. Does not wait for one that is under way."""
        if not self.manager.is_saving_in_progress():
            with self.failure_told():
                self.manager.wait_until_finished()

    def empty_trash(self) -> None:
        """Delete for good what Orbax has renamed away; of many processes, the first one does it."""
        if jax.process_index() == 0:
            shutil.rmtree(self.trash, ignore_errors=True)

    def restore(self, state: Any) -> Any:
        """Return the newest whole checkpoint as read_state does.

        Damaged ones that are newer are set aside, and `notes` tells of them. Raises UserError if
        none is whole."""
        damaged: list[Checkpoint] = []
        for checkpoint in reversed(checkpoints_in(self.directory).values()):
            try:
                restored = read_state(checkpoint, state)
            except DamagedCheckpoint as error:
                self.notes.append(str(error))
                damaged.append(checkpoint)
            else:
                self.set_aside(damaged)
                record = checkpoint.record()
                self.skipped_in_a_row = 0 if record is None else record.skipped_in_a_row
                return restored
        raise UserError(
            f"no checkpoint in {self.directory} is whole, and nothing was deleted: "
            + "; ".join(self.notes),
            param="out_dir",
        )

    def set_aside(self, damaged: list[Checkpoint]) -> None:
        """Rename checkpoints to checkpoints/damaged/STEP, out of the way of later ones."""
        if not damaged:
            return
        if jax.process_index() == 0:
            for checkpoint in damaged:
                aside = free_name(self.directory / "damaged" / checkpoint.path.name)
                aside.parent.mkdir(exist_ok=True)
                checkpoint.path.rename(aside)
                self.notes.append(f"{checkpoint.path} was renamed to {aside}")
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self.manager.reload()

    def close(self) -> None:
        """Wait until everything is on disk. Raises UserError if the last save has failed."""
        with self.failure_told():
            self.manager.close()
        self.empty_trash()


def read_state(checkpoint: Checkpoint, state: Any) -> Any:
    """Return a checkpoint in the shapes, dtypes and shardings of `state`, proved whole.

    `state` may be abstract (see TrainState.abstract). Its mesh need not be the mesh that saved the
    checkpoint. Raises DamagedCheckpoint."""
    read = checkpoint.read({"params": state.params, "opt_state": state.opt_state})
    step = jax.device_put(np.int32(checkpoint.step), state.step.sharding)
    return dataclasses.replace(state, step=step, **read)


def system_error(error: BaseException) -> str | None:
    """Return what the operating system has said, such as "No space left on device", if it has."""
    if isinstance(error, OSError):
        return error.strerror
    number = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore's exceptions
    return os.strerror(int(number[1])) if number else None


def free_name(path: Path) -> Path:
    """Return path, or path with a number, that does not exist."""
    candidate = path
    number = 2
    while candidate.exists():
        candidate = path.with_name(f"{path.name}-{number}")
        number += 1
    return candidate
