"""The updates that train_step skipped because loss or gradients were not finite: count and limit.

Start with `SkippedUpdates`.
"""

import math
from typing import Any, NamedTuple

import jax
import optax

from config import TrainConfig
from errors import UserError
from utils import TrainState


class Figures(NamedTuple):
    """What is known of an update."""

    step: int
    loss: float
    grad_norm: float

    @property
    def is_finite(self) -> bool:
        """Whether the update was made: train_step's condition."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, gradient norm {self.grad_norm:.4g}"


class SkippedUpdates:
    """The updates of a run that were skipped.

    They are found when the metrics are read, which waits for the device, so that is done seldom.
    `total` needs no place in a checkpoint: the optimizer counts the updates that were made."""

    def __init__(self, config: TrainConfig, state: TrainState, in_a_row: int = 0) -> None:
        """in_a_row: how many of the latest updates of `state` were skipped."""
        self.config = config
        self.total = int(state.step) - updates_made(state)
        """Skipped updates since step 0, before the run was resumed too."""
        self.in_a_row = in_a_row
        """How many of the latest updates were skipped, before the run was resumed too."""
        self.last_finite: Figures | None = None
        self.unread: list[tuple[int, dict[str, jax.Array]]] = []
        self.farewell: str | None = None
        """Why the run must end, once it must."""

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Take the metrics of an update, the one that ends at `step`; nothing is awaited."""
        self.unread.append((step, metrics))

    def read(self) -> dict[int, str]:
        """Return what to say of the skipped updates among those added since the last call, by step.

        This waits for all of them."""
        notes = {}
        steps = [step for step, _ in self.unread]
        metrics = jax.device_get([metrics for _, metrics in self.unread])
        self.unread = []
        for step, values in zip(steps, metrics, strict=True):
            figures = Figures(step, float(values["loss"]), float(values["grad_norm"]))
            if figures.is_finite:
                self.in_a_row = 0
                self.last_finite = figures
                continue
            self.in_a_row += 1
            self.total += 1
            notes[step] = f"step {step}: skipped, {figures}; {self.total} skipped in all"
            if self.in_a_row > self.config.skip_nonfinite and self.farewell is None:
                self.farewell = self.reason_to_end(figures)
        return notes

    def require_few(self) -> None:
        """Raise UserError if more than config.skip_nonfinite in a row have been read."""
        if self.farewell is not None:
            raise UserError(self.farewell, param="skip_nonfinite")

    def reason_to_end(self, figures: Figures) -> str:
        """Return why the run ends at this update: all that is known."""
        if self.last_finite is None:
            last = "no update since this start had a finite loss"
        else:
            last = f"the last finite one was step {self.last_finite.step}: {self.last_finite}"
        return (
            f"the loss or the gradients are not finite at step {figures.step} ({figures}), in "
            f"{self.in_a_row} updates in a row, where skip_nonfinite={self.config.skip_nonfinite} "
            f"may be skipped; {last}. Go on from the latest checkpoint with --init_from=resume and "
            f"a lower learning_rate (now {self.config.learning_rate}) or grad_clip "
            f"(now {self.config.grad_clip})"
        )


def updates_made(state: TrainState) -> int:
    """Return how many updates the optimizer has made, the skipped ones not among them."""
    counts: list[Any] = optax.tree.get_all_with_path(state.opt_state, "count")
    return int(counts[0][1])
