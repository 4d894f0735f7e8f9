"""What a training run tells: metrics.jsonl, a picture of the loss, TensorBoard, Weights & Biases.

Start with `Log.write`.
"""

import dataclasses
import importlib.util
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from config import TrainConfig
from errors import UserError, about_file, require
from training.run_lock import is_at
from utils import write_atomically

# Lines of loss.png: the name in metrics.jsonl, the label, matplotlib's style.
CURVES: list[tuple[str, str, dict[str, Any]]] = [
    ("loss", "training batch", {"lw": 0.8, "alpha": 0.5}),
    ("train_loss", "train", {"marker": "o", "ms": 4}),
    ("val_loss", "validation", {"marker": "o", "ms": 4}),
]
# What TensorStore's threads say as they end, if Orbax has given up on a save.
END_OF_AN_ABANDONED_WRITE = "Event loop is closed"


def silence_orbax() -> None:
    """Keep what Orbax logs, and what its threads print, from the screen.

    What fails, it raises too, and Checkpoints tells that in a sentence, which pages of tracebacks
    would bury; its warnings are of no use to somebody who trains."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    sys.unraisablehook = print_unraisable


def print_unraisable(unraisable: Any) -> None:
    """Print an exception that nobody can catch, unless it is END_OF_AN_ABANDONED_WRITE."""
    if str(unraisable.exc_value) != END_OF_AN_ABANDONED_WRITE:
        sys.__unraisablehook__(unraisable)


def require_packages(config: TrainConfig) -> None:
    """Raise UserError if a package that the log needs is not installed."""
    training = "pip install -r requirements/training.txt"
    require_package("matplotlib", "train.py draws loss.png with", training)
    if config.tensorboard:
        without = f"{training}, or train with --tensorboard=False"
        require_package("tensorboardX", "--tensorboard writes with", without, "tensorboard")
    if config.wandb_log:
        require_package("wandb", "--wandb_log needs", "pip install wandb", "wandb_log")


def require_package(package: str, who: str, way_out: str, param: str | None = None) -> None:
    """Raise UserError if the package is not installed; nothing is imported."""
    require(
        importlib.util.find_spec(package) is not None,
        f"{who} the package {package}, which is not installed: {way_out}",
        param=param,
    )


class Log:
    """Everything a run tells. Of many processes, the first one tells it.

    metrics.jsonl has one object a line, each with its "step". `rows` holds them all, for loss.png.
    In a process that is `silent` nothing is open and every method does nothing."""

    def __init__(self, config: TrainConfig, step: int):
        """Open the log of a run that goes on after update `step`, 0 for a new one.

        What a killed run logged after its last checkpoint is dropped: it is logged again."""
        self.silent = jax.process_index() > 0
        self.path = config.out_dir / "metrics.jsonl"
        self.image = config.out_dir / "loss.png"
        self.rows: list[dict[str, Any]] = []
        self.file: Any = None
        self.tensorboard: Any = None
        self.wandb: Any = None
        if self.silent:
            return
        lines = lines_until(self.path, step)
        write_atomically(self.path, "".join(lines))
        self.rows = [json.loads(line) for line in lines]
        self.file = self.path.open("a")
        if config.tensorboard:
            self.tensorboard = open_tensorboard(config, step)
        if config.wandb_log:
            self.wandb = open_wandb(config)

    def write(self, step: int, **values: float) -> None:
        """Log these values of an update. One that is not finite is null: JSON has no other word."""
        if self.silent:
            return
        finite = {name: x if math.isfinite(x) else None for name, x in values.items()}
        self.write_row({"step": step, **finite})
        if self.tensorboard is not None:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def note(self, step: int, text: str) -> None:
        """Print a line that belongs into metrics.jsonl too, as the "note" at an update."""
        self.say(text)
        if not self.silent:
            self.write_row({"step": step, "note": text})

    def write_row(self, row: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl. Raises UserError if somebody has removed the file."""
        require(
            is_at(self.path, self.file.fileno()),
            f"{self.path} was removed while this run was writing it",
            param="out_dir",
        )
        self.rows.append(row)
        with about_file(self.path):
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    def plot(self) -> None:
        """Draw loss.png again."""
        if not self.silent:
            plot_losses(self.rows, self.path.parent.name, self.image)

    def say(self, text: str) -> None:
        """Print a line, above the progress bar."""
        if not self.silent:
            tqdm.write(text)

    def close(self) -> None:
        """Close all that was opened."""
        if self.silent:
            return
        self.file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def lines_until(path: Path, step: int) -> list[str]:
    """Return the lines of a metrics.jsonl up to update `step`: none if that is 0.

    A last line that was cut off by a kill is left out. Raises UserError if another is damaged."""
    if step == 0 or not path.exists():
        return []
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    return [line for number, line in enumerate(whole, 1) if step_of(path, number, line) <= step]


def step_of(path: Path, number: int, line: str) -> int:
    """Return the update that a line of a metrics.jsonl is about. Raises UserError."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"line {number} of {path} is damaged: remove it", "out_dir") from error


def open_tensorboard(config: TrainConfig, step: int) -> Any:
    """Open a writer of TensorBoard's files; what they hold after update `step` is not shown."""
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(config.out_dir / "tensorboard"), purge_step=step + 1)


def open_wandb(config: TrainConfig) -> Any:
    """Begin a run at Weights & Biases."""
    import wandb

    return wandb.init(
        project=config.wandb_project,
        name=config.wandb_run_name,
        config=dataclasses.asdict(config),
    )


def plot_losses(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw training and validation loss against updates; the file is replaced as a whole."""
    import matplotlib

    matplotlib.use("Agg")  # to a file, whether there is a screen or not
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), dpi=120)
    for name, label, style in CURVES:
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
        if points and name == "val_loss":
            write_last_value(axes, points[-1])
    axes.set(xlabel="updates", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    temporary = path.with_name("loss.tmp.png")
    with about_file(temporary):
        figure.savefig(temporary)
    temporary.replace(path)
    plt.close(figure)


def write_last_value(axes: Any, point: tuple[float, float]) -> None:
    """Write the loss at the last point of a curve above it."""
    axes.annotate(f"{point[1]:.4f}", point, xytext=(0, 8), textcoords="offset points", ha="right")
