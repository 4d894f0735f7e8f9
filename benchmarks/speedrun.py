"""The race to nanoGPT's loss: start with bench_speedrun.

nanoGPT's recipe for a CPU is trained by its own train.py, as it is, and a preset of ours, in turns,
a pair for each seed. Losses are means over the whole validation split. Seconds are those of updates
with their data, without start, compilation and evaluations.
"""

import dataclasses
import math
import multiprocessing
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np

from benchmarks.training import load_nanogpt
from config import TrainConfig
from errors import require, require_at_least
from flags import default_is
from training.presets import TRAIN_PRESETS
from training.token_files import read_meta

NANOGPT_EVALS = 250  # updates between two evaluations of nanoGPT's own, which are no stepping
NANOGPT_UPDATES = 2000
# "I only have a macbook" of nanoGPT's README; its config/train_shakespeare_char.py says the rest.
NANOGPT_FLAGS: dict[str, Any] = {
    "device": "cpu",
    "compile": False,
    "eval_iters": 20,
    "log_interval": 1,
    "block_size": 64,
    "batch_size": 12,
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "max_iters": NANOGPT_UPDATES,
    "lr_decay_iters": NANOGPT_UPDATES,
    "dropout": 0.0,
    "eval_interval": NANOGPT_EVALS,
    "always_save_checkpoint": True,
    "out_dir": "out",
}
UPDATE_LINE = re.compile(r"^iter (\d+): loss \S+ time ([\d.]+)ms", re.MULTILINE)
EVALUATION_LINE = re.compile(r"^step (\d+): train loss \S+ val loss ([\d.]+)", re.MULTILINE)
SEED = "manual_seed(1337 "
ROWS_AT_A_TIME = 64  # of an evaluation


@dataclass(frozen=True)
class BenchSpeedrunConfig:
    """Seconds until nanoGPT's final loss of its CPU recipe: its own train.py against a preset."""

    nanogpt: Path
    """a checkout of nanoGPT (needs torch)"""
    preset: str = "shakespeare_char_fast"
    """preset of train.py that races against it"""
    data_dir: Path = Path("data/shakespeare_char")
    """what `python prepare.py shakespeare_char` has written"""
    seeds: int = 3
    """pairs of runs, each with a seed of its own; medians count"""
    evaluate_every: int = 10
    """updates of ours between two looks at the loss"""
    plot: Annotated[Path | None, default_is("no picture")] = None
    """a PNG of all curves to write"""

    def __post_init__(self):
        require_at_least(self, 1, "seeds", "evaluate_every")
        require(
            self.preset in TRAIN_PRESETS,
            f"preset={self.preset}: there are {', '.join(TRAIN_PRESETS)}",
            param="preset",
        )


class Point(NamedTuple):
    """What a run had reached when."""

    seconds: float
    loss: float


def bench_speedrun(config: BenchSpeedrunConfig) -> dict:
    """Return the seconds that both took to nanoGPT's final loss."""
    program = config.nanogpt / "train.py"
    require(program.exists(), f"there is no {program}", param="nanogpt")
    data = config.data_dir / "val.bin"
    written_by = "python prepare.py shakespeare_char"
    require(data.exists(), f"there is no {data}; write it with: {written_by}", param="data_dir")
    ours: list[list[Point]] = []
    theirs: list[list[Point]] = []
    for seed in range(config.seeds):
        theirs.append(in_a_process(train_nanogpt, config, seed))
        ours.append(in_a_process(train_ours, config, seed))
        for name, curve in (("nanoGPT", theirs[-1]), (config.preset, ours[-1])):
            seconds, loss = curve[-1]
            print(f"seed {seed}: {name:22} loss {loss:.4f} after {seconds:.1f} s", flush=True)
    if config.plot is not None:
        draw(config.plot, {"nanoGPT": theirs, config.preset: ours}, final_loss(theirs))
    return {"bench": "speedrun", "preset": config.preset, **speedrun_figures(theirs, ours)}


def speedrun_figures(theirs: list[list[Point]], ours: list[list[Point]]) -> dict:
    """Return the loss that nanoGPT ends with and the seconds to it, medians of all seeds.

    Where most of our runs do not get there, our seconds and the ratio are None."""
    goal = final_loss(theirs)
    nanogpt_seconds = statistics.median(curve[-1].seconds for curve in theirs)
    seconds = statistics.median(seconds_to(goal, curve) for curve in ours)
    is_reached = math.isfinite(seconds)
    return {
        "loss": round(goal, 4),
        "final_loss": round(final_loss(ours), 4),
        "seconds": round(seconds, 2) if is_reached else None,
        "nanogpt_seconds": round(nanogpt_seconds, 2),
        "ratio": round(nanogpt_seconds / seconds, 2) if is_reached else None,
    }


def final_loss(curves: list[list[Point]]) -> float:
    """Return the median of the losses at the ends of curves."""
    return statistics.median(curve[-1].loss for curve in curves)


def in_a_process(function: Callable[..., list[Point]], *args: Any) -> list[Point]:
    """Return function(*args), called in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def seconds_to(goal: float, curve: list[Point]) -> float:
    """Return the seconds to the first point whose loss is at most goal; infinity if none is."""
    return next((point.seconds for point in curve if point.loss <= goal), math.inf)


def train_ours(config: BenchSpeedrunConfig, seed: int) -> list[Point]:
    """Train the preset to its end; return its loss after every so many updates."""
    import jax

    import train
    from mesh import training_mesh
    from training.processes import use_cpu_cores
    from utils import TrainState

    preset = TRAIN_PRESETS[config.preset].config
    run = dataclasses.replace(preset, seed=seed, model=sized(preset, config.data_dir))
    use_cpu_cores(run)
    mesh = training_mesh(run)
    file, val = (train.TokenFile(config.data_dir / f"{s}.bin", "uint16") for s in ("train", "val"))
    evaluation = dataclasses.replace(run, batch_size=ROWS_AT_A_TIME)

    warm_up = TrainState.create(run, mesh=mesh)
    warm_up, _ = train.train_step(warm_up, next(train.batches(file, run, 0, mesh)), run)
    state = TrainState.create(run, mesh=mesh)
    curve = [Point(0.0, train.full_loss(state, evaluation, val))]
    seconds = 0.0
    batches = train.batches(file, run, 0, mesh)
    while int(state.step) < run.max_iters:
        left = run.max_iters - int(state.step)
        begin = time.perf_counter()
        for _ in range(min(config.evaluate_every, left)):
            state, _ = train.train_step(state, next(batches), run)
        jax.block_until_ready(state)
        seconds += time.perf_counter() - begin
        curve.append(Point(seconds, train.full_loss(state, evaluation, val)))
    return curve


def sized(preset: TrainConfig, data_dir: Path) -> Any:
    """Return the preset's model with the vocabulary of a data set."""
    return dataclasses.replace(
        preset.model, vocab_size=read_meta(data_dir / "meta.json")["vocab_size"]
    )


def train_nanogpt(config: BenchSpeedrunConfig, seed: int) -> list[Point]:
    """Run nanoGPT's train.py on our token files; return what its evaluations say, and its loss at
    the end over the whole validation split."""
    with tempfile.TemporaryDirectory() as directory:
        here = Path(directory)
        copy_nanogpt(config.nanogpt, here, seed)
        give_data(config.data_dir, here / "data" / "shakespeare_char")
        flags = [f"--{name}={value}" for name, value in NANOGPT_FLAGS.items()]
        done = subprocess.run(
            [sys.executable, "train.py", "config/train_shakespeare_char.py", *flags],
            cwd=here,
            capture_output=True,
            text=True,
        )
        require(done.returncode == 0, f"nanoGPT's train.py has failed: {done.stderr[-500:]}")
        loss = nanogpt_loss(here, config.data_dir / "val.bin")
    curve = read_curve(done.stdout)
    return [*curve[:-1], Point(curve[-1].seconds, loss)]


def copy_nanogpt(nanogpt: Path, here: Path, seed: int) -> None:
    """Copy nanoGPT's programs, of which one has its seed written in it, that gets another."""
    shutil.copytree(nanogpt / "config", here / "config")
    for file in nanogpt.glob("*.py"):
        shutil.copy(file, here)
    program = (here / "train.py").read_text(encoding="utf-8")
    require(SEED in program, f"{nanogpt / 'train.py'} has no {SEED!r}", param="nanogpt")
    program = program.replace(SEED, f"manual_seed({1337 + seed} ")
    (here / "train.py").write_text(program, encoding="utf-8")


def give_data(data_dir: Path, directory: Path) -> None:
    """Put our token files where nanoGPT looks for its own, which are the same."""
    directory.mkdir(parents=True)
    for split in ("train", "val"):
        (directory / f"{split}.bin").symlink_to((data_dir / f"{split}.bin").absolute())
    with (directory / "meta.pkl").open("wb") as file:
        pickle.dump({"vocab_size": read_meta(data_dir / "meta.json")["vocab_size"]}, file)


def read_curve(log: str) -> list[Point]:
    """Return nanoGPT's evaluations, over 20 batches each, by the seconds of the updates before.

    The time that it prints of an update after an evaluation holds that too: such an update counts
    as the median of the others."""
    milliseconds = {int(step): float(time) for step, time in UPDATE_LINE.findall(log)}
    usual = statistics.median(ms for step, ms in milliseconds.items() if step % NANOGPT_EVALS)
    curve = []
    seconds = 0.0
    losses = {int(step): float(loss) for step, loss in EVALUATION_LINE.findall(log)}
    for step in range(NANOGPT_UPDATES + 1):
        if step in losses:
            curve.append(Point(seconds, losses[step]))
        seconds += (milliseconds[step] if step % NANOGPT_EVALS else usual) / 1000
    return curve


def nanogpt_loss(here: Path, val: Path) -> float:
    """Return the loss of nanoGPT's checkpoint over the whole validation split, as ours is told."""
    import torch

    from training.token_files import TokenFile, windows_in_order

    nanogpt = load_nanogpt(here)
    checkpoint = torch.load(here / "out" / "ckpt.pt", map_location="cpu", weights_only=False)
    model = nanogpt.GPT(nanogpt.GPTConfig(**checkpoint["model_args"]))
    model.load_state_dict(checkpoint["model"])
    model.eval()
    total = 0.0
    count = 0
    shape = (ROWS_AT_A_TIME, model.config.block_size)
    with torch.no_grad():
        for windows, learned in windows_in_order(TokenFile(val, "uint16"), shape):
            tokens = torch.from_numpy(np.where(windows < 0, ~windows, windows)).long()
            targets = torch.from_numpy(np.maximum(windows[:, 1:], -1)).long()  # -1 does not count
            _, loss = model(tokens[:, :-1].contiguous(), targets.contiguous())
            total += loss.item() * learned
            count += learned
    return total / count


def draw(path: Path, curves: dict[str, list[list[Point]]], goal: float) -> None:
    """Draw the loss of all runs by their seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for color, (name, runs) in zip(("tab:gray", "tab:blue"), curves.items(), strict=True):
        for number, run in enumerate(runs):
            label = name if number == 0 else None
            axes.plot(*zip(*run, strict=True), color=color, marker="o", ms=3, label=label)
    axes.axhline(goal, color="black", lw=0.8, ls=":", label=f"nanoGPT's final loss, {goal:.3f}")
    axes.set(xlabel="seconds of stepping", ylabel="validation loss", ylim=(goal - 0.2, goal + 1))
    axes.legend()
    figure.savefig(path)
