"""Train a GPT on token files: python train.py PRESET [--key=value ...]

Read `train_step` first: tokens and a TrainState in, a TrainState and two numbers out. `get_batch`
feeds it, `estimate_loss` measures it, `Run` is the loop around it. training/run_start.py makes the state
that a run begins with, training/run_log.py tells what it does. Everything random is a function of
(seed, step), so a run that was killed and resumed ends in the same bits.

Shapes: A micro-batches of an update, B rows of a micro-batch, T block_size.
"""

import cli
from config import TrainConfig
from training.presets import TRAIN_PRESETS

if __name__ == "__main__":
    cli.run("train", TrainConfig, TRAIN_PRESETS)

import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from checkpoints import Checkpoints
from errors import require
from mesh import PEAK_FLOPS, connect, describe, put_batch
from model import Params
from training import dry_run
from training.run_log import Log, require_packages, silence_expected_warnings
from training.run_start import start_run
from utils import TrainState, learning_rate_schedule

# Seed of the evaluation batches: the same for every run, so that losses compare between runs.
EVAL_SEED = 20240229
# The profiler traces updates from the first number to the second, counted from where a run begins:
# the ones before compile.
PROFILED_FROM, PROFILED_TO = 10, 20
# A process that a signal has ended exits with this plus the signal's number, by the shell's custom.
SIGNAL_EXIT_CODE = 128

# --- Data.


class TokenFile(NamedTuple):
    """A file of token ids and their dtype (uint16 or uint32)."""

    path: Path
    dtype: str

    def read(self) -> np.memmap:
        """Return all tokens, mapped anew.

        A mapping that lives on keeps every page it has touched in this process's memory."""
        return np.memmap(self.path, self.dtype, mode="r")


def load_data(data_dir: Path) -> tuple[dict[str, TokenFile], dict[str, Any]]:
    """Return the splits {"train", "val"} and the meta.json of a directory that prepare.py wrote."""
    require(
        (data_dir / "meta.json").exists(),
        f"there is no data in {data_dir}; write it with: python prepare.py {data_dir.name}, "
        "or give --data_dir",
        param="data_dir",
    )
    meta = json.loads((data_dir / "meta.json").read_text())
    files = {
        split: TokenFile(data_dir / f"{split}.bin", meta["dtype"]) for split in ("train", "val")
    }
    return files, meta


@lru_cache(maxsize=4)  # a batch may straddle two epochs, of two files
def epoch_order(seed: int, epoch: int, windows: int, block_size: int) -> tuple[int, np.ndarray]:
    """Return where an epoch's first window starts, and the order in which its windows are seen.

    The start is in [0, block_size)."""
    rng = np.random.default_rng((seed, epoch))
    offset = int(rng.integers(block_size))
    return offset, rng.permutation(windows)


def get_batch(
    file: TokenFile, t: int, shape: tuple[int, ...], seed: int, rows: slice = slice(None)
) -> np.ndarray:
    """Return batch t of `shape` (..., B, T), or only `rows` of the B.

    It is tokens (..., B, T+1) int32, whose first T are the input and whose last T are the targets:
    the same tokens however they are divided. A pure function of its arguments.

    In every epoch the file is cut into windows of T at another offset, and each window is seen
    once, in shuffled order; the order of an epoch is the only thing kept in memory (8 bytes a
    window). Raises UserError if the file is too short."""
    data = file.read()
    T = shape[-1]
    rows_per_batch = math.prod(shape[:-1])
    windows = (len(data) - T) // T
    require(
        windows >= 1,
        f"{file.path} has {len(data)} tokens, too few for block_size={T}: it needs at least "
        f"{2 * T}",
        param="block_size",
    )
    numbers = np.arange(t * rows_per_batch, (t + 1) * rows_per_batch)
    numbers = numbers.reshape(shape[:-1])[..., rows]  # which windows these rows are, from step 0
    starts = []
    for number in numbers.flat:
        offset, order = epoch_order(seed, number // windows, windows, T)
        starts.append(offset + T * order[number % windows])
    positions = np.array(starts).reshape(*numbers.shape, 1) + np.arange(T + 1)
    return data[positions].astype(np.int32)


def load_batch(mesh: Mesh, file: TokenFile, t: int, shape: tuple[int, ...], seed: int) -> jax.Array:
    """Return get_batch with its rows on the mesh's devices.

    Each process reads the rows of its own devices."""
    batch_shape = (*shape[:-1], shape[-1] + 1)
    return put_batch(mesh, batch_shape, lambda rows: get_batch(file, t, shape, seed, rows))


def batches(
    file: TokenFile, config: TrainConfig, start: int, mesh: Mesh | None = None
) -> Iterator[jax.Array | np.ndarray]:
    """Yield batches start, start + 1, ... (A, B, T+1) on `mesh`, numpy without one.

    Each is prepared by a thread while the one before it is used."""
    load: Callable[..., Any] = get_batch if mesh is None else partial(load_batch, mesh)
    shape = (config.gradient_accumulation_steps, config.batch_size, config.model.block_size)
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(load, file, start, shape, config.seed)
        for t in range(start, config.max_iters):
            batch = ahead.result()
            ahead = pool.submit(load, file, t + 1, shape, config.seed)
            yield batch


# --- The update.


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def train_step(
    state: TrainState, batch: jax.Array, config: TrainConfig
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Make one update from batch (A, B, T+1): the mean of A gradients. `state` is donated.

    Returns the new state and {"loss", "grad_norm"}: float32 scalars, of the parameters before the
    update, before clipping."""
    loss, grads = mean_loss_and_grads(state, batch, config)
    updates, opt_state = state.tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    new_state = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)
    return state.lay_out(new_state), metrics


def mean_loss_and_grads(
    state: TrainState, batch: jax.Array, config: TrainConfig
) -> tuple[jax.Array, Params]:
    """Return loss and gradients, each the mean over the micro-batches of batch (A, B, T+1)."""
    A = batch.shape[0]
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    if A == 1:
        return loss_and_grads(state, batch[0], key, 0, config)

    def add(total: tuple, tokens_and_number: tuple) -> tuple[tuple, None]:
        tokens, number = tokens_and_number
        own = loss_and_grads(state, tokens, key, number, config)
        return jax.tree.map(jnp.add, total, own), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
    total, _ = jax.lax.scan(add, zero, (batch, jnp.arange(A)))
    return jax.tree.map(lambda x: x / A, total)


def loss_and_grads(
    state: TrainState,
    tokens: jax.Array,
    key: jax.Array,
    number: int | jax.Array,
    config: TrainConfig,
) -> tuple[jax.Array, Params]:
    """Return loss and gradients of tokens (B, T+1): micro-batch `number` of an update.

    key is the update's, for dropout."""
    dropout_key = jax.random.fold_in(key, number) if config.model.dropout else None

    def loss_of(params: Params) -> jax.Array:
        model = dataclasses.replace(state, params=params).model
        inputs = tokens[:, :-1]
        targets = tokens[:, 1:]
        return model.loss(inputs, targets, chunks=config.loss_chunks, dropout_key=dropout_key)

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    return loss, state.lay_out(grads)


# --- Evaluation.


@partial(jax.jit, static_argnames="config")
def eval_step(state: TrainState, tokens: jax.Array, config: TrainConfig) -> jax.Array:
    """Return the mean loss of tokens (B, T+1), without dropout; targets of -1 do not count."""
    inputs = jnp.maximum(tokens[:, :-1], 0)
    return state.model.loss(inputs, tokens[:, 1:], chunks=config.loss_chunks)


def estimate_loss(
    state: TrainState, config: TrainConfig, files: dict[str, TokenFile]
) -> dict[str, float]:
    """Return the mean loss of each split over its first eval_iters batches under EVAL_SEED.

    These are the same tokens at every evaluation of every run with this batch_size and block_size.
    With config.eval_full "val" is every token of the file."""
    losses = {}
    for split, file in files.items():
        if split == "val" and config.eval_full:
            losses[split] = full_loss(state, config, file)
        else:
            losses[split] = mean_loss(state, config, file)
    return losses


def mean_loss(state: TrainState, config: TrainConfig, file: TokenFile) -> float:
    """Return the mean loss over batches 0 to eval_iters - 1 of a file under EVAL_SEED."""
    shape = (config.batch_size, config.model.block_size)
    # They are dispatched one after the other and awaited once.
    losses = [
        eval_step(state, load_batch(state.mesh, file, t, shape, EVAL_SEED), config)
        for t in range(config.eval_iters)
    ]
    return float(np.mean(jax.device_get(losses), dtype=np.float64))


def full_loss(state: TrainState, config: TrainConfig, file: TokenFile) -> float:
    """Return the mean loss over every token of the file but the first.

    The windows of block_size follow one another, and each token sees only its own. What does not
    fill the last window or the last batch is padded with targets that do not count."""
    data = file.read()
    B, T = config.batch_size, config.model.block_size
    total = 0.0
    for start in range(0, len(data) - 1, B * T):
        tokens = data[start : start + B * T + 1].astype(np.int32)
        targets = len(tokens) - 1
        padded = np.pad(tokens, (0, B * T - targets), constant_values=-1)
        windows = padded[np.arange(B)[:, None] * T + np.arange(T + 1)]  # (B, T+1)
        batch = put_batch(state.mesh, windows.shape, windows.__getitem__)
        total += float(eval_step(state, batch, config)) * targets
    return total / (len(data) - 1)


# --- A run.


class StopSignals:
    """Inside, SIGTERM and Ctrl-C are remembered instead of ending the process.

    A second Ctrl-C ends it."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.handlers_before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGTERM, signal.SIGINT):
            self.handlers_before[number] = signal.signal(number, self.remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)

    def remember(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def agreed(self) -> int | None:
        """Return a signal that any process of the run has received, None if none has.

        All processes ask together, and get the same answer."""
        if jax.process_count() == 1:
            return self.received
        received = multihost_utils.process_allgather(np.int32(self.received or 0))
        return int(received.max()) or None


class Throughput:
    """A stopwatch that counts the tokens of updates."""

    def __init__(self, tokens_per_update: int) -> None:
        self.tokens_per_update = tokens_per_update
        self.started = 0.0  # seconds, by time.perf_counter
        self.first_step = 0

    def restart(self, step: int) -> None:
        """Count from here, where `step` updates are done."""
        self.started = time.perf_counter()
        self.first_step = step

    def read(self, step: int) -> float:
        """Return tokens per second since the last restart, and restart."""
        tokens = (step - self.first_step) * self.tokens_per_update
        rate = tokens / (time.perf_counter() - self.started)
        self.restart(step)
        return rate


class Run:
    """A run of training under way: its state, and what happens between updates."""

    def __init__(
        self,
        config: TrainConfig,
        files: dict[str, TokenFile],
        state: TrainState,
        checkpoints: Checkpoints,
    ) -> None:
        self.config = config
        self.files = files
        self.state = state
        self.checkpoints = checkpoints
        self.step = int(state.step)
        self.first_step = self.step
        self.learning_rate = learning_rate_schedule(config)
        model = config.model
        self.tokens_per_update = (
            config.gradient_accumulation_steps * config.batch_size * model.block_size
        )
        self.throughput = Throughput(self.tokens_per_update)
        self.profiling = False
        self.log = Log(config, self.step)
        self.introduce()
        self.bar = tqdm(
            total=config.max_iters,
            initial=self.step,
            unit="step",
            dynamic_ncols=True,
            disable=self.log.silent or None,  # None: where stderr is no terminal
        )

    def introduce(self) -> None:
        """Say what is trained, on what, and from where."""
        config = self.config
        model = config.model
        self.log.say(
            f"{model.num_params() / 1e6:.2f}M parameters, {self.tokens_per_update:,} tokens an "
            f"update, {model.dtype}, {model.training_attention} attention, "
            f"{describe(self.state.mesh)}; step {self.step} of {config.max_iters}"
        )
        if config.warmup_steps < config.warmup_iters:
            self.log.say(
                f"warmup over {config.warmup_steps} updates, a tenth of the run: it is too short "
                f"for warmup_iters={config.warmup_iters}"
            )
        if config.profile and config.max_iters - self.step <= PROFILED_FROM:
            self.log.say(
                f"no profile: it begins after {PROFILED_FROM} updates, and only "
                f"{config.max_iters - self.step} are to be made"
            )

    def train(self, stop_signals: StopSignals) -> int | None:
        """Train to config.max_iters, or until a signal: return its number, or None."""
        config = self.config
        if config.eval_only or self.step == 0:
            self.evaluate()
        if config.eval_only:
            return None
        self.throughput.restart(self.step)
        for batch in batches(self.files["train"], config, self.step, self.state.mesh):
            metrics = self.update(batch)
            if self.is_due(config.log_interval):
                self.log_update(metrics)
            received = self.signal_received(stop_signals)
            evaluation_is_due = self.is_due(config.eval_interval)
            if evaluation_is_due or received is not None:
                self.checkpoints.save(self.state, self.evaluate() if evaluation_is_due else None)
                self.throughput.restart(self.step)
            if received is not None:
                return received
        return None

    def update(self, batch: jax.Array | np.ndarray) -> dict[str, jax.Array]:
        """Make one update from a batch (A, B, T+1); return its metrics, as train_step does."""
        if self.config.profile and self.step == self.first_step + PROFILED_FROM:
            jax.profiler.start_trace(self.config.out_dir / "profile")
            self.profiling = True
        self.state, metrics = train_step(self.state, batch, self.config)
        self.step += 1
        self.bar.update()
        if self.profiling and self.step == self.first_step + PROFILED_TO:
            self.stop_profile()
        return metrics

    def stop_profile(self) -> None:
        """Write the profiler's trace, when the updates in it are done."""
        jax.block_until_ready(self.state)
        jax.profiler.stop_trace()
        self.profiling = False

    def is_due(self, interval: int) -> bool:
        """Say whether what happens every so many updates, and after the last, happens now."""
        return self.step % interval == 0 or self.step == self.config.max_iters

    def signal_received(self, stop_signals: StopSignals) -> int | None:
        """Return the signal that ends the run now, or None.

        Many processes must wait for each other to agree on one, so they ask seldom."""
        if jax.process_count() == 1 or self.step % self.config.log_interval == 0:
            return stop_signals.agreed()
        return None

    def log_update(self, metrics: dict[str, jax.Array]) -> None:
        """Log the last update. Raises UserError if its loss is not finite."""
        loss = float(metrics["loss"])  # waits for the update
        rate = self.throughput.read(self.step)
        row = {
            "loss": loss,
            "lr": float(self.learning_rate(self.step - 1)),
            "grad_norm": float(metrics["grad_norm"]),
            "tokens_per_s": round(rate),
        }
        on_bar = f"loss {loss:.4f}, {rate:,.0f} tokens/s"
        peak_flops = PEAK_FLOPS.get(jax.devices()[0].device_kind)
        if peak_flops is not None:
            flops = rate * self.config.model.flops_per_token
            row["mfu"] = flops / (peak_flops * self.state.mesh.size)
            on_bar += f", MFU {row['mfu']:.1%}"
        self.log.write(self.step, **row)
        self.bar.set_postfix_str(on_bar)
        require(
            math.isfinite(loss),
            f"the loss is {loss} at step {self.step}: resume with a lower learning_rate "
            f"(now {self.config.learning_rate})",
            param="learning_rate",
        )

    def evaluate(self) -> float:
        """Measure and tell the losses; return that of the validation split."""
        losses = estimate_loss(self.state, self.config, self.files)
        if not self.config.eval_only:
            self.log.write(self.step, **{f"{split}_loss": x for split, x in losses.items()})
            self.log.plot()
        self.log.say(
            f"step {self.step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}"
        )
        return losses["val"]

    def close(self) -> None:
        """Wait until checkpoints, log and profile are on disk."""
        self.bar.close()
        if self.profiling:
            self.stop_profile()
        self.checkpoints.close()
        self.log.close()


def main(config: TrainConfig) -> int:
    """Train to config.max_iters, or until a signal.

    Returns the exit code: 0, or 128 + the signal's number."""
    if config.dry_run:
        print(*dry_run.report(config, train_step), sep="\n")
        return 0
    require_packages(config)
    silence_expected_warnings()
    files, meta = load_data(config.data_path)
    config, state, checkpoints = start_run(config, meta, connect(config))
    run = Run(config, files, state, checkpoints)
    with StopSignals() as stop_signals:
        received = run.train(stop_signals)
    run.close()
    if received is None:
        return 0
    run.log.say(
        f"stopped by {signal.Signals(received).name}, saved at step {run.step}; "
        "--init_from=resume goes on"
    )
    return SIGNAL_EXIT_CODE + received
