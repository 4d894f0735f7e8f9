"""Checkpoints of a training run, complete or invisible."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers


class Checkpoints:
    """The checkpoints of one run: OUT_DIR/checkpoints/STEP, of which the latest and the best are kept.

    A checkpoint is complete or invisible: Orbax writes it beside its place, asynchronously, and renames it; one that is no longer
    wanted is renamed away before it is deleted. So a kill at any moment leaves the last complete one."""

    def __init__(self, out_dir: Path):
        self.directory = Path(out_dir).absolute() / "checkpoints"
        keep = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(1),
                checkpoint_managers.BestN(
                    get_metric_fn=lambda m: m["val_loss"],
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        self.trash = self.directory / "deleted"
        self.empty_trash()
        self.manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keep,
                todelete_subdir=self.trash.name,
                cleanup_tmp_directories=True,
                best_fn=lambda m: m["val_loss"],
                best_mode="min",
            ),
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none."""
        return self.manager.latest_step()

    def save(self, state: Any, val_loss: float | None = None) -> None:
        """Begin to save in the background. The arrays are copied before this returns, so `state` may be donated."""
        step = int(state.step)
        if step == self.latest():
            return
        self.manager.save(
            step,
            metrics=None if val_loss is None else {"val_loss": float(val_loss)},
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                opt_state=ocp.args.StandardSave(state.opt_state),
            ),
        )
        self.empty_trash()

    def empty_trash(self) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(self.trash, ignore_errors=True)

    def restore(self, state: Any) -> Any:
        """The newest checkpoint, in the shapes, dtypes and shardings of `state` (see TrainState.abstract): the mesh need not be the
        one that saved it."""
        step = self.latest()
        abstract = lambda tree: ocp.args.StandardRestore(
            jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
        )
        got = self.manager.restore(
            step,
            args=ocp.args.Composite(
                params=abstract(state.params), opt_state=abstract(state.opt_state)
            ),
        )
        step = jax.device_put(np.int32(step), state.step.sharding)
        return dataclasses.replace(state, step=step, params=got.params, opt_state=got.opt_state)

    def close(self) -> None:
        """Wait until everything is on disk."""
        self.manager.close()
        self.empty_trash()
