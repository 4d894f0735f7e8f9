"""Train a GPT on token files: python train.py PRESET [--key=value ...]

Read `train_step` first: tokens and a TrainState in, a TrainState and two numbers out. The rest feeds it, measures it and keeps
what it makes. Everything random is a function of (seed, step), so a run that was killed and resumed ends in the same bits.
"""

import cli
from config import TRAIN_PRESETS, TrainConfig, changed

if __name__ == "__main__":
    cli.run("train", TrainConfig, TRAIN_PRESETS)

import dataclasses
import json
import math
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

import dry_run
import pretrained
from checkpoints import Checkpoints
from errors import require
from mesh import (
    PEAK_FLOPS,
    connect,
    describe,
    put_batch,
    training_mesh,
    use_cpu_cores,
    whole_sequences,
)
from ops import choose_attention
from utils import (
    TrainState,
    learning_rate_schedule,
    require_same_model,
    write_atomically,
)

EVAL_SEED = 20240229  # of the evaluation batches: the same for every run, so that losses compare between runs


class TokenFile(NamedTuple):
    """A file of token ids and their dtype (uint16 or uint32)."""

    path: Path
    dtype: str

    def read(self) -> np.memmap:
        """All tokens, mapped anew: a mapping that lives on keeps every page it has touched in this process's memory."""
        return np.memmap(self.path, self.dtype, mode="r")


def load_data(data_dir: Path) -> tuple[dict[str, TokenFile], dict]:
    """The splits {"train", "val"} and the meta.json of a directory that prepare.py wrote."""
    require(
        (data_dir / "meta.json").exists(),
        f"there is no data in {data_dir}; write it with: python prepare.py {data_dir.name}, or give --data_dir",
    )
    meta = json.loads((data_dir / "meta.json").read_text())
    return {
        split: TokenFile(data_dir / f"{split}.bin", meta["dtype"]) for split in ("train", "val")
    }, meta


@lru_cache(maxsize=4)  # a batch may straddle two epochs, of two files
def epoch_order(seed: int, epoch: int, windows: int, block_size: int) -> tuple[int, np.ndarray]:
    """Where the first window of an epoch starts, in [0, block_size), and the order in which its windows are seen."""
    rng = np.random.default_rng((seed, epoch))
    return int(rng.integers(block_size)), rng.permutation(windows)


def get_batch(
    file: TokenFile, t: int, shape: tuple[int, ...], seed: int, rows: slice = slice(None)
) -> np.ndarray:
    """Batch t of shape (..., B, T): tokens (..., B, T+1) int32, whose first T are the input and whose last T are the targets; or
    only `rows` of the B. A batch is the same tokens however it is divided.

    A pure function of its arguments. In every epoch the file is cut into windows of T at another offset, and each window is seen
    once, in shuffled order; the order of an epoch is the only thing kept in memory (8 bytes a window)."""
    data, T, n = file.read(), shape[-1], math.prod(shape[:-1])
    windows = (len(data) - T) // T
    require(
        windows >= 1,
        f"{file.path} has {len(data)} tokens, too few for block_size={T}: it needs at least {2 * T}",
    )
    which = np.arange(t * n, (t + 1) * n).reshape(shape[:-1])[..., rows]
    starts = []
    for i in which.flat:
        offset, order = epoch_order(seed, i // windows, windows, T)
        starts.append(offset + T * order[i % windows])
    return data[np.array(starts).reshape(*which.shape, 1) + np.arange(T + 1)].astype(np.int32)


def load_batch(mesh: Mesh, file: TokenFile, t: int, shape: tuple[int, ...], seed: int) -> jax.Array:
    """get_batch with its rows on the mesh's devices; each process reads those of its own devices."""
    return put_batch(
        mesh, (*shape[:-1], shape[-1] + 1), lambda rows: get_batch(file, t, shape, seed, rows)
    )


def batches(
    file: TokenFile, config: TrainConfig, start: int, mesh: Mesh | None = None
) -> Iterator[jax.Array | np.ndarray]:
    """Batches start, start + 1, ... (A, B, T+1) on `mesh` (numpy without one), each prepared by a thread while the one before
    it is used."""
    load = partial(load_batch, mesh) if mesh else get_batch
    shape = (config.gradient_accumulation_steps, config.batch_size, config.model.block_size)
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(load, file, start, shape, config.seed)
        for t in range(start, config.max_iters):
            batch, ahead = ahead.result(), pool.submit(load, file, t + 1, shape, config.seed)
            yield batch


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def train_step(state: TrainState, batch: jax.Array, config: TrainConfig) -> tuple[TrainState, dict]:
    """One update from batch (A, B, T+1): A micro-batches, gradients averaged. `state` is donated.

    Returns the new state and {"loss", "grad_norm"}: float32 scalars, of the parameters before the update, before clipping."""
    A = batch.shape[0]
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)

    def loss_and_grads(tokens, micro):
        dropout_key = jax.random.fold_in(key, micro) if config.model.dropout else None

        def loss(params):
            model = dataclasses.replace(state, params=params).model
            return model.loss(
                tokens[:, :-1], tokens[:, 1:], chunks=config.loss_chunks, dropout_key=dropout_key
            )

        loss, grads = jax.value_and_grad(loss)(state.params)
        return loss, state.lay_out(grads)

    if A == 1:
        loss, grads = loss_and_grads(batch[0], 0)
    else:

        def add(total, tokens_micro):
            return jax.tree.map(jnp.add, total, loss_and_grads(*tokens_micro)), None

        zero = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params)
        total, _ = jax.lax.scan(add, zero, (batch, jnp.arange(A)))
        loss, grads = jax.tree.map(lambda x: x / A, total)
    updates, opt_state = state.tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    return state.lay_out(
        dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state)
    ), metrics


@partial(jax.jit, static_argnames="config")
def eval_step(state: TrainState, tokens: jax.Array, config: TrainConfig) -> jax.Array:
    """Mean loss of tokens (B, T+1), without dropout; targets of -1 do not count."""
    return state.model.loss(
        jnp.maximum(tokens[:, :-1], 0), tokens[:, 1:], chunks=config.loss_chunks
    )


def estimate_loss(
    state: TrainState, config: TrainConfig, files: dict[str, TokenFile]
) -> dict[str, float]:
    """Mean loss of each split over batches 0 to eval_iters - 1 of its own shuffled order under EVAL_SEED: the same tokens at
    every evaluation of every run with this batch_size and block_size. With config.eval_full "val" is every token of the file."""
    shape = (config.batch_size, config.model.block_size)
    losses = {}
    for split, file in files.items():
        if split == "val" and config.eval_full:
            losses[split] = full_loss(state, config, file)
        else:
            # Dispatched one after the other, awaited once.
            each = [
                eval_step(state, load_batch(state.mesh, file, t, shape, EVAL_SEED), config)
                for t in range(config.eval_iters)
            ]
            losses[split] = float(np.mean(jax.device_get(each), dtype=np.float64))
    return losses


def full_loss(state: TrainState, config: TrainConfig, file: TokenFile) -> float:
    """Mean loss over every token of the file but the first, in consecutive windows of block_size (each token sees only its
    own window). What does not fill the last window or the last batch is padded with targets that do not count."""
    data, (B, T) = file.read(), (config.batch_size, config.model.block_size)
    total = 0.0
    for start in range(0, len(data) - 1, B * T):
        tokens = data[start : start + B * T + 1].astype(np.int32)
        count = len(tokens) - 1
        tokens = np.pad(tokens, (0, B * T - count), constant_values=-1)
        windows = tokens[np.arange(B)[:, None] * T + np.arange(T + 1)]
        total += (
            float(
                eval_step(
                    state, put_batch(state.mesh, windows.shape, lambda rows: windows[rows]), config
                )
            )
            * count
        )
    return total / (len(data) - 1)


class Log:
    """Everything a run tells: metrics.jsonl (one object a line), loss.png, TensorBoard files and, if asked for, W&B. Of many
    processes, the first one tells it."""

    def __init__(self, config: TrainConfig, step: int):
        self.silent = jax.process_index() > 0
        if self.silent:
            return
        self.path, self.image = config.out_dir / "metrics.jsonl", config.out_dir / "loss.png"
        # What a killed run logged after its last checkpoint is logged again.
        old = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        kept = [
            line
            for line in old
            if step > 0 and line.endswith("\n") and json.loads(line)["step"] <= step
        ]
        write_atomically(self.path, "".join(kept))
        self.rows = [json.loads(line) for line in kept]
        self.file = self.path.open("a")
        self.tensorboard = self.wandb = None
        if config.tensorboard:
            from tensorboardX import SummaryWriter

            self.tensorboard = SummaryWriter(
                str(config.out_dir / "tensorboard"), purge_step=step + 1
            )
        if config.wandb_log:
            import wandb

            self.wandb = wandb.init(
                project=config.wandb_project,
                name=config.wandb_run_name,
                config=dataclasses.asdict(config),
            )

    def write(self, step: int, **values: float) -> None:
        if self.silent:
            return
        self.rows.append({"step": step, **values})
        self.file.write(json.dumps(self.rows[-1]) + "\n")
        self.file.flush()
        if self.tensorboard:
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(values, step=step)

    def plot(self) -> None:
        """Training and validation loss against updates, replaced as a whole."""
        if self.silent:
            return
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(8, 5), dpi=120)
        for name, label, style in [
            ("loss", "training batch", dict(lw=0.8, alpha=0.5)),
            ("train_loss", "train", dict(marker="o", ms=4)),
            ("val_loss", "validation", dict(marker="o", ms=4)),
        ]:
            points = [(row["step"], row[name]) for row in self.rows if name in row]
            if points:
                axes.plot(*zip(*points), label=label, **style)
                if name == "val_loss":
                    axes.annotate(
                        f"{points[-1][1]:.4f}",
                        points[-1],
                        xytext=(0, 8),
                        textcoords="offset points",
                        ha="right",
                    )
        axes.set(xlabel="updates", ylabel="loss (nats per token)", title=self.path.parent.name)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.tight_layout()
        temporary = self.image.with_name("loss.tmp.png")
        figure.savefig(temporary)
        temporary.replace(self.image)
        plt.close(figure)

    def say(self, text: str) -> None:
        """To the screen, above the progress bar."""
        if not self.silent:
            tqdm.write(text)

    def close(self) -> None:
        if self.silent:
            return
        self.file.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


class StopSignals:
    """Inside, SIGTERM and Ctrl-C are remembered in `received` instead of ending the process; a second Ctrl-C ends it."""

    received: int | None = None

    def __enter__(self) -> "StopSignals":
        self.before = {s: signal.signal(s, self.remember) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def remember(self, number, frame) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def agreed(self) -> int | None:
        """A signal that any process of the run has received. All of them ask together, and get the same answer."""
        if jax.process_count() == 1:
            return self.received
        return int(multihost_utils.process_allgather(np.int32(self.received or 0)).max()) or None

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def start(
    config: TrainConfig, meta: dict, processes: int
) -> tuple[TrainConfig, TrainState, Checkpoints]:
    """The state that a run begins with, as config.init_from says, and config with the model that it turned out to be.

    Writes config.json and meta.json (the tokenizer) beside the checkpoints."""
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, vocab_size=meta["vocab_size"])
    )
    params = None
    if config.init_from not in ("scratch", "resume"):
        model, params = pretrained.read(config.init_from, **changed(config.model))  # on the host
        require(
            model.vocab_size == meta["vocab_size"],
            f"{config.init_from} has vocab_size={model.vocab_size}, the data "
            f"{meta['vocab_size']}: prepare the data with the model's tokenizer",
        )
        config = dataclasses.replace(config, model=model)
    use_cpu_cores(config, processes)
    mesh = training_mesh(config)
    saved = config  # as config.json tells it: which kernels run here is nothing of the model
    config = dataclasses.replace(
        config, model=choose_attention(config.model, whole_sequences(mesh))
    )
    checkpoints = Checkpoints(config.out_dir)
    latest = checkpoints.latest()
    if latest is not None:
        require(
            config.init_from == "resume",
            f"out_dir={config.out_dir} holds a run at step {latest}: go on with "
            "--init_from=resume, or choose another --out_dir",
        )
        require_same_model(config.out_dir, config.model, meta)
    if latest is None:
        state = TrainState.create(config, params, mesh)
    else:
        state = checkpoints.restore(TrainState.abstract(config, mesh))
    if jax.process_index() == 0:
        write_atomically(
            config.out_dir / "config.json",
            json.dumps(
                {"model": dataclasses.asdict(saved.model), "train": dataclasses.asdict(saved)},
                indent=1,
                default=str,
            ),
        )
        write_atomically(config.out_dir / "meta.json", json.dumps(meta, indent=1))
    return config, state, checkpoints


def main(config: TrainConfig) -> int:
    """Run to config.max_iters, or until a signal. Returns the exit code: 0, or 128 + the signal's number."""
    if config.dry_run:
        print(*dry_run.report(config, train_step), sep="\n")
        return 0
    files, meta = load_data(config.data_path)
    config, state, checkpoints = start(config, meta, connect(config))
    step = first = int(state.step)
    schedule, log = learning_rate_schedule(config), Log(config, step)
    tokens_per_step = (
        config.gradient_accumulation_steps * config.batch_size * config.model.block_size
    )
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    log.say(
        f"{config.model.num_params() / 1e6:.2f}M parameters, {tokens_per_step:,} tokens an update, "
        f"{config.model.dtype}, {config.model.training_attention} attention, {describe(state.mesh)}; "
        f"step {step} of {config.max_iters}"
    )
    bar = tqdm(
        total=config.max_iters,
        initial=step,
        unit="step",
        dynamic_ncols=True,
        disable=log.silent or None,
    )

    def evaluate() -> float:
        losses = estimate_loss(state, config, files)
        if not config.eval_only:
            log.write(step, **{f"{split}_loss": loss for split, loss in losses.items()})
            log.plot()
        log.say(f"step {step}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        return losses["val"]

    received = None
    with StopSignals() as stop:
        if config.eval_only or step == 0:
            evaluate()
        since, timed = time.perf_counter(), step
        for batch in () if config.eval_only else batches(files["train"], config, step, state.mesh):
            if config.profile and step == first + 10:
                jax.profiler.start_trace(config.out_dir / "profile")
            state, metrics = train_step(state, batch, config)
            step += 1
            bar.update()
            if config.profile and step == first + 20:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
            if step % config.log_interval == 0 or step == config.max_iters:
                loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
                rate = (step - timed) * tokens_per_step / (time.perf_counter() - since)
                since, timed = time.perf_counter(), step
                row = {
                    "loss": loss,
                    "lr": float(schedule(step - 1)),
                    "grad_norm": grad_norm,
                    "tokens_per_s": round(rate),
                }
                if peak:
                    row["mfu"] = rate * config.model.flops_per_token / (peak * state.mesh.size)
                log.write(step, **row)
                bar.set_postfix_str(
                    f"loss {loss:.4f}, {rate:,.0f} tokens/s"
                    + (f", MFU {row['mfu']:.1%}" if peak else "")
                )
                require(
                    math.isfinite(loss),
                    f"the loss is {loss} at step {step}: resume with a lower learning_rate "
                    f"(now {config.learning_rate})",
                )
            evaluated = step % config.eval_interval == 0 or step == config.max_iters
            if (
                jax.process_count() == 1 or step % config.log_interval == 0
            ):  # processes wait for each other to agree
                received = stop.agreed()
            if evaluated or received:
                checkpoints.save(state, evaluate() if evaluated else None)
                since, timed = time.perf_counter(), step
            if received:
                break
    bar.close()
    checkpoints.close()
    log.close()
    if received:
        log.say(
            f"stopped by {signal.Signals(received).name}, saved at step {step}; --init_from=resume goes on"
        )
    return 128 + received if received else 0
