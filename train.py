"""Train a GPT on token files: python train.py PRESET [--key=value ...]

Read `train_step` first: tokens and a TrainState in, a TrainState and two numbers out. `get_batch`
of training/token_files.py feeds it, `estimate_loss` measures it, `Run` is the loop around it.
training/run_start.py makes the state that a run begins with, training/run_log.py tells what it
does, training/skipped_updates.py counts the updates that train_step skips. Everything random is a
function of (seed, step), so a run that was killed and resumed ends in the same bits.

Shapes: A micro-batches of an update, B rows of a micro-batch, T block_size.
"""

import cli
from config import TrainConfig
from training.presets import TRAIN_PRESETS

if __name__ == "__main__":
    cli.run("train", TrainConfig, TRAIN_PRESETS)

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from errors import UserError, require
from mesh import PEAK_FLOPS, describe, put_batch
from model import Params
from training import dry_run
from training.checkpoints import Checkpoints
from training.processes import connect
from training.run_lock import RunLock
from training.run_log import Log, require_packages, silence_orbax
from training.run_start import start_evaluation, start_run
from training.skipped_updates import SkippedUpdates
from training.token_files import TokenFile, get_batch, load_data, windows_in_order
from utils import TrainState, learning_rate_schedule

# Seed of the evaluation batches: the same for every run, so that losses compare between runs.
EVAL_SEED = 20240229
# The profiler traces updates from the first number to the second, counted from where a run begins:
# the ones before compile.
PROFILED_FROM, PROFILED_TO = 10, 20
# A process that a signal has ended exits with this plus the signal's number, by the shell's custom.
SIGNAL_EXIT_CODE = 128

# --- Data.


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
    update, before clipping. Where one of them is not finite the update is skipped: the new state
    has the parameters and the optimizer's state of the old one, and the next step."""
    loss, grads = mean_loss_and_grads(state, batch, config)
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = state.tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    params = select(is_finite, params, state.params)
    opt_state = select(is_finite, opt_state, state.opt_state)
    new_state = dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)
    return state.lay_out(new_state), {"loss": loss, "grad_norm": grad_norm}


def select(condition: jax.Array, tree: Any, otherwise: Any) -> Any:
    """Return `tree` where the condition () holds, and `otherwise`, a tree like it, where not."""
    return jax.tree.map(partial(jnp.where, condition), tree, otherwise)


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


def read_tokens(tokens: jax.Array) -> jax.Array:
    """Return the ids of tokens as get_batch gives them, where ~id is a token that is no target."""
    return jnp.where(tokens < 0, ~tokens, tokens)


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
        inputs = read_tokens(tokens[:, :-1])
        targets = tokens[:, 1:]
        return model.loss(inputs, targets, chunks=config.loss_chunks, dropout_key=dropout_key)

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    return loss, state.lay_out(grads)


# --- Evaluation.


@partial(jax.jit, static_argnames="config")
def eval_step(state: TrainState, tokens: jax.Array, config: TrainConfig) -> jax.Array:
    """Return the mean loss of tokens (B, T+1), without dropout; targets below 0 do not count."""
    inputs = read_tokens(tokens[:, :-1])
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

    The windows of block_size follow one another, and each token sees only its own."""
    shape = (config.batch_size, config.model.block_size)
    total = 0.0
    count = 0
    for windows, targets in windows_in_order(file, shape):
        batch = put_batch(state.mesh, windows.shape, windows.__getitem__)
        total += float(eval_step(state, batch, config)) * targets
        count += targets
    require(
        count > 0,
        f"{file.path} has no token that is learned: give it conversations with an assistant's turn "
        "that fits into block_size",
        param="data_dir",
    )
    return total / count


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
        lock: RunLock,
    ) -> None:
        self.config = config
        self.files = files
        self.state = state
        self.checkpoints = checkpoints
        self.lock = lock
        self.step = int(state.step)
        self.first_step = self.step
        self.learning_rate = learning_rate_schedule(config)
        self.skipped = SkippedUpdates(config, state, checkpoints.skipped_in_a_row)
        self.throughput = Throughput(tokens_per_update(config))
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
        self.log.say(introduction(config, self.state))
        for note in self.checkpoints.notes:
            self.log.note(self.step, note)
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
        if self.step == 0:
            self.evaluate()
        self.throughput.restart(self.step)
        for batch in batches(self.files["train"], config, self.step, self.state.mesh):
            metrics = self.update(batch)
            if self.is_due(config.log_interval):
                self.log_update(metrics)
            received = self.signal_received(stop_signals)
            evaluation_is_due = self.is_due(config.eval_interval)
            if evaluation_is_due or received is not None:
                self.tell_skipped()
                self.skipped.require_few()
                self.require_out_dir()
                val_loss = self.evaluate() if evaluation_is_due else None
                self.checkpoints.save(self.state, val_loss, self.skipped.in_a_row)
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
        self.skipped.add(self.step, metrics)
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
        """Log the last update. Raises UserError if too many updates were skipped."""
        self.tell_skipped()  # waits for the update
        self.require_out_dir()
        loss = float(metrics["loss"])
        rate = self.throughput.read(self.step)
        row = {
            "loss": loss,
            "lr": float(self.learning_rate(self.step - 1 - self.skipped.total)),
            "grad_norm": float(metrics["grad_norm"]),
            "tokens_per_s": round(rate),
            "skipped": self.skipped.total,
        }
        on_bar = f"loss {loss:.4f}, {rate:,.0f} tokens/s"
        peak_flops = PEAK_FLOPS.get(jax.devices()[0].device_kind)
        if peak_flops is not None:
            flops = rate * self.config.model.flops_per_token
            row["mfu"] = flops / (peak_flops * self.state.mesh.size)
            on_bar += f", MFU {row['mfu']:.1%}"
        self.log.write(self.step, **row)
        self.bar.set_postfix_str(on_bar)
        self.skipped.require_few()

    def require_out_dir(self) -> None:
        """Raise UserError if nothing can or may be saved any more: see RunLock and Checkpoints."""
        self.lock.require_held()
        self.checkpoints.require_saved()

    def tell_skipped(self) -> None:
        """Tell of the updates that were skipped since the last call, and wait for all of them."""
        for step, note in self.skipped.read().items():
            self.log.note(step, note)

    def evaluate(self) -> float:
        """Measure and tell the losses; return that of the validation split."""
        losses = estimate_loss(self.state, self.config, self.files)
        self.log.write(self.step, **{f"{split}_loss": x for split, x in losses.items()})
        self.log.plot()
        self.log.say(losses_line(self.step, losses))
        return losses["val"]

    def close(self) -> None:
        """Wait until checkpoints, log and profile are on disk."""
        self.bar.close()
        if self.profiling:
            self.stop_profile()
        self.checkpoints.close()
        self.log.close()


def tokens_per_update(config: TrainConfig) -> int:
    """Return the tokens of a batch, over all micro-batches and devices."""
    return config.gradient_accumulation_steps * config.batch_size * config.model.block_size


def introduction(config: TrainConfig, state: TrainState) -> str:
    """Return what is trained, on what, and from where, in a line."""
    model = config.model
    return (
        f"{model.num_params() / 1e6:.2f}M parameters, {tokens_per_update(config):,} tokens an "
        f"update, {model.dtype}, {model.training_attention} attention, "
        f"{describe(state.mesh)}; step {int(state.step)} of {config.max_iters}"
    )


def losses_line(step: int, losses: dict[str, float]) -> str:
    """Return the line that tells an evaluation's losses."""
    return f"step {step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}"


def evaluate_only(
    config: TrainConfig, files: dict[str, TokenFile], meta: dict[str, Any], processes: int
) -> int:
    """Print the losses of the state that a run would begin with; return the exit code."""
    config, state = start_evaluation(config, meta, processes)
    if jax.process_index() == 0:
        print(introduction(config, state))
    losses = estimate_loss(state, config, files)
    if jax.process_index() == 0:
        print(losses_line(int(state.step), losses))
    return 0


def main(config: TrainConfig) -> int:
    """Train to config.max_iters, or until a signal.

    Returns the exit code: 0, or 128 + the signal's number."""
    if config.dry_run:
        print(*dry_run.report(config, train_step), sep="\n")
        return 0
    require_packages(config)
    silence_orbax()
    files, meta = load_data(config.data_path)
    processes = connect(config)
    if config.eval_only:
        return evaluate_only(config, files, meta, processes)
    with RunLock(config.out_dir) as lock:
        config, state, checkpoints = start_run(config, meta, processes, lock)
        run = Run(config, files, state, checkpoints, lock)
        with StopSignals() as stop_signals:
            try:
                received = run.train(stop_signals)
            except (UserError, OSError):
                # A checkpoint that was begun is finished, and no bar crosses the sentence.
                with contextlib.suppress(UserError, OSError):
                    run.close()
                raise
        run.close()
    if received is None:
        return 0
    run.log.say(
        f"stopped by {signal.Signals(received).name}, saved at step {run.step}; "
        "--init_from=resume goes on"
    )
    return SIGNAL_EXIT_CODE + received
