"""What a checkpoint costs, and its checksums of it: start with bench_checkpoint."""

import dataclasses
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.contender import in_words
from config import TrainConfig
from errors import require_at_least
from training.presets import TRAIN_PRESETS

# --help lists train.py's flags among the others, under no heading of their own.
Inlined = Annotated[TrainConfig, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True)
class BenchCheckpointConfig:
    """Seconds to save and to restore the training state of a preset of train.py, with its flags.

    Nothing is trained: the state is noise, which does not compress, as one in training."""

    preset: Annotated[str, tyro.conf.Suppress] = "gpt2"
    train: Inlined = TRAIN_PRESETS["gpt2"].config
    directory: Path = Path("/tmp")
    """a directory of the disk to measure; what is written there is deleted"""
    rounds: int = 3
    """saves, and restores; medians count"""

    def __post_init__(self):
        require_at_least(self, 1, "rounds")


def bench_checkpoint(config: BenchCheckpointConfig) -> dict:
    """Return the seconds of a save, of a restore with its proof, and of the checksums in each."""
    from checkpoints import Checkpoint
    from training.checkpoints import Checkpoints, read_state
    from utils import TrainState

    state = noise(TrainState.create(config.train))
    abstract = TrainState.abstract(config.train, state.mesh)
    checksums_of(state)  # pays for what only the first does: a run compiles it once
    turns = defaultdict(list)
    with tempfile.TemporaryDirectory(dir=config.directory) as out_dir:
        for step in range(1, config.rounds + 1):
            state = at_step(state, step)
            saved = Checkpoints(Path(out_dir), keep=1)
            begin = time.perf_counter()
            saved.save(state)
            turns["save_until_training_goes_on"].append(time.perf_counter() - begin)
            saved.close()
            turns["save"].append(time.perf_counter() - begin)
            turns["checksums"].append(seconds_of(checksums_of, state))
            checkpoint = Checkpoint(saved.directory / str(step))
            turns["restore"].append(seconds_of(read_state, checkpoint, abstract))
    seconds = {name: round(statistics.median(times), 3) for name, times in turns.items()}
    print(in_words(seconds))
    return {
        "bench": "checkpoint",
        "preset": config.preset,
        "state_gb": round(state_bytes(state) / 1e9, 3),
        "seconds": seconds,
        "checksums_of_save": round(seconds["checksums"] / seconds["save"], 3),
        "checksums_of_restore": round(seconds["checksums"] / seconds["restore"], 3),
    }


def noise(state: Any) -> Any:
    """Return a TrainState like this one with random numbers in all that has a shape."""
    import jax

    def fill(array: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.key(array.size), array.shape, array.dtype)

    arrays = (state.params, state.opt_state)
    params, opt_state = jax.tree.map(lambda a: fill(a) if a.ndim else a, arrays)
    return dataclasses.replace(state, params=params, opt_state=opt_state)


def at_step(state: Any, step: int) -> Any:
    """Return the TrainState as if so many updates were made."""
    import jax.numpy as jnp

    return dataclasses.replace(state, step=jnp.int32(step))


def checksums_of(state: Any) -> Any:
    """Return the record of a checkpoint of the state: Checkpoints.save makes it, and each proof."""
    from formats.checksums import Record

    items = {"params": state.params, "opt_state": state.opt_state}
    return Record.of(int(state.step), None, items)


def seconds_of(function: Callable, *args: Any) -> float:
    """Return how long function(*args) takes, its result included."""
    import jax

    begin = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - begin


def state_bytes(state: Any) -> int:
    """Return the bytes of the parameters and of the optimizer's state."""
    import jax

    return sum(a.nbytes for a in jax.tree.leaves((state.params, state.opt_state)))
