"""Training against arithmetic done here: the optimizer, dropout, what a run logs and keeps.

Where the arithmetic is the run's and not the model's, the update itself is replaced by numbers, so
that nothing is compiled. test_nonfinite.py has updates that are skipped.
"""

import dataclasses
import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import model
import ops
import sample
import train
from checkpoints import read_run
from cli import parse
from config import GPTConfig, SampleConfig, TrainConfig
from errors import UserError
from mesh import make_abstract_mesh, make_mesh
from model import GPT
from tiny_training import CHARS, META, TINY, VAL_TOKENS, VOCAB_SIZE
from tokenizer import CharTokenizer
from training import run_start
from training.checkpoints import Checkpoints
from training.dry_run import activation_bytes
from training.presets import TRAIN_PRESETS
from training.run_start import write_description
from training.token_files import load_data
from utils import TrainState, create_optimizer, learning_rate_schedule, open_model

pytestmark = pytest.mark.slow

SMALL = dataclasses.replace(
    TINY, model=dataclasses.replace(TINY.model, n_layer=1, n_embd=16, bias=False)
)


def tokens_of(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Return random tokens."""
    return np.random.default_rng(seed).integers(VOCAB_SIZE, size=shape, dtype=np.int32)


def with_dropout(rate: float) -> TrainConfig:
    """Return SMALL with dropout."""
    return dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, dropout=rate))


# The optimizer.


def test_adamw_is_loshchilovs_and_hutters():
    """Catches betas that are not the flags', moments of unclipped gradients, decay of a bias or
    without the learning rate, a schedule that is a step off: three updates in numpy."""
    config = dataclasses.replace(
        SMALL,
        beta1=0.7,
        beta2=0.9,
        weight_decay=0.3,
        grad_clip=0.5,
        learning_rate=0.1,
        min_lr=0.02,
        max_iters=50,
        lr_decay_iters=2,
        warmup_iters=0,
    )
    rates = [0.1, 0.06, 0.02]  # half a cosine over two updates
    decays = {"kernel": 0.3, "bias": 0.0}
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=5) for name in decays}
    moments = {name: (np.zeros(5), np.zeros(5)) for name in decays}
    tx = create_optimizer(config)
    theirs = jax.tree.map(jnp.float32, params)
    opt_state = tx.init(theirs)
    update = jax.jit(tx.update)
    for t, rate in enumerate(rates, start=1):
        grads = {name: rng.normal(size=5) for name in decays}
        updates, opt_state = update(jax.tree.map(jnp.float32, grads), opt_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        assert norm > 0.5
        for name, decay in decays.items():
            g = grads[name] * 0.5 / norm
            m, v = moments[name]
            m = 0.7 * m + 0.3 * g
            v = 0.9 * v + 0.1 * g**2
            moments[name] = (m, v)
            step = (m / (1 - 0.7**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-8)
            params[name] = params[name] - rate * (step + decay * params[name])
        for name in decays:
            np.testing.assert_allclose(theirs[name], params[name], rtol=1e-4, err_msg=f"{t} {name}")


@pytest.mark.parametrize("lr_schedule, at_half", [("cosine", 0.55), ("wsd", 1.0)])
def test_the_rate_arrives_at_lr_decay_iters(lr_schedule, at_half):
    """Catches a decay that goes by max_iters where lr_decay_iters is given, and a rate that falls
    or rises again after it."""
    config = dataclasses.replace(
        SMALL,
        max_iters=1000,
        lr_decay_iters=200,
        warmup_iters=20,
        learning_rate=1.0,
        min_lr=0.1,
        lr_schedule=lr_schedule,
    )
    rate = learning_rate_schedule(config)
    assert rate(20) == pytest.approx(1.0)
    assert rate(110) == pytest.approx(at_half)
    assert rate(199) > 0.1
    for step in (200, 201, 600, 1000):
        assert rate(step) == pytest.approx(0.1), step


# Dropout.


def test_evaluation_has_no_dropout(data_dir):
    """Catches an evaluation with dropout."""
    files, _ = load_data(data_dir)
    losses = []
    for rate in (0.0, 0.5):
        config = with_dropout(rate)
        losses.append(train.estimate_loss(TrainState.create(config), config, files))
    assert losses[0] == losses[1]


def test_each_step_drops_others():
    """Catches a dropout key that does not depend on the step, or on anything but seed and step."""
    config = with_dropout(0.5)
    state = TrainState.create(config)
    tokens = tokens_of((1, 4, 17))

    @jax.jit
    def loss_at(step: jax.Array) -> jax.Array:
        at_step = dataclasses.replace(state, step=step)
        return train.mean_loss_and_grads(at_step, tokens, config)[0]

    losses = [float(loss_at(jnp.int32(step))) for step in (0, 1, 2, 0)]
    assert len(set(losses[:3])) == 3
    assert losses[3] == losses[0]


def test_each_place_of_dropout_drops_its_share(monkeypatch):
    """Catches a place without dropout, at another rate, with what is left not scaled, or with the
    mask of another place, layer or row: embedding, probabilities, attention, MLP."""
    rate = 0.3
    B, T, H, C, L = 8, 32, 2, 64, 2
    found: list[tuple[np.ndarray, np.ndarray]] = []
    real_dropout = ops.dropout

    def recorded(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
        y = real_dropout(x, rate, keys)
        jax.debug.callback(lambda x, y: found.append((np.asarray(x), np.asarray(y))), x, y)
        return y

    for module in (model, ops):
        monkeypatch.setattr(module, "dropout", recorded)
    config = GPTConfig(
        block_size=T, vocab_size=VOCAB_SIZE, n_layer=L, n_head=H, n_embd=C, dropout=rate
    )
    state = TrainState.create(dataclasses.replace(SMALL, model=config))
    tokens = tokens_of((B, T))
    jax.block_until_ready(
        jax.jit(lambda: state.model.loss(tokens, tokens, dropout_key=jax.random.key(1)))()
    )
    jax.effects_barrier()

    shapes = sorted(x.shape for x, _ in found)
    assert shapes == [(B, H, T, T)] * L + [(B, T, C)] * (1 + 2 * L)
    masks = set()
    for x, y in found:
        alive = x != 0  # probabilities of later positions are 0 anyhow
        dropped = alive & (y == 0)
        share = dropped.sum() / alive.sum()
        deviation = math.sqrt(rate * (1 - rate) / alive.sum())
        assert abs(share - rate) < 5 * deviation, (x.shape, share)
        np.testing.assert_allclose(y[alive & ~dropped], x[alive & ~dropped] / (1 - rate), rtol=1e-5)
        masks |= {dropped[row].tobytes() for row in range(B)}
    assert len(masks) == B * len(found)


# What a run logs and keeps.


@pytest.fixture
def scripted(monkeypatch):
    """Return a function that runs train.main with scripted losses in place of updates.

    losses: {step: (train, val)} are those of the evaluations."""

    def run(config: TrainConfig, losses: dict[int, tuple[float, float]]) -> int:
        def update(state: TrainState, batch: jax.Array, config: TrainConfig) -> tuple:
            metrics = {"loss": jnp.float32(2.5), "grad_norm": jnp.float32(0.5)}
            return dataclasses.replace(state, step=state.step + 1), metrics

        def estimate(state: TrainState, config: TrainConfig, files: dict) -> dict[str, float]:
            return dict(zip(("train", "val"), losses[int(state.step)], strict=True))

        monkeypatch.setattr(run_start, "use_cpu_cores", lambda config, processes: None)
        monkeypatch.setattr(train, "train_step", update)
        monkeypatch.setattr(train, "estimate_loss", estimate)
        return train.main(config)

    return run


def test_a_run_whose_end_is_no_evaluation_of_its_own(data_dir, tmp_path, scripted):
    """Catches a last update that is not evaluated or saved because the interval does not divide the
    run, the best by training loss, the latest taken for the best, an evaluation without a line."""
    out_dir = tmp_path / "out"
    config = dataclasses.replace(
        SMALL, data_dir=data_dir, out_dir=out_dir, max_iters=7, eval_interval=5, log_interval=3
    )
    losses = {0: (3.0, 3.0), 5: (2.0, 1.0), 7: (1.0, 2.0)}
    assert scripted(config, losses) == 0
    _, _, _, best = read_run(out_dir)
    assert best == 5
    checkpoints = Checkpoints(out_dir)
    assert checkpoints.latest() == 7
    checkpoints.close()
    log = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    evaluations = {
        row["step"]: (row["train_loss"], row["val_loss"]) for row in log if "val_loss" in row
    }
    assert evaluations == losses
    assert [row["step"] for row in log if "loss" in row] == [3, 6, 7]


def test_logged_figures_are_arithmetic(tmp_path, monkeypatch):
    """Catches tokens per second without the accumulated micro-batches, MFU of one device for many,
    FLOPs without attention, the learning rate of the next update for that of the last, and figures
    that count from the start of the run."""
    devices = 8
    config = dataclasses.replace(
        SMALL,
        out_dir=tmp_path,
        batch_size=16,
        gradient_accumulation_steps=3,
        learning_rate=1.0,
        min_lr=0.1,
        warmup_iters=10,
        max_iters=110,
    )
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    peak = 1e9
    monkeypatch.setattr(train, "PEAK_FLOPS", {jax.devices()[0].device_kind: peak})
    state = SimpleNamespace(
        step=0,
        mesh=make_abstract_mesh(f"data:{devices}", devices),
        opt_state=optax.adam(1.0).init({"w": jnp.zeros(1)}),
    )
    run = train.Run(config, {}, state, SimpleNamespace(notes=[], skipped_in_a_row=0), None)
    monkeypatch.setattr(run, "require_out_dir", lambda: None)
    run.throughput.restart(0)
    for step, seconds in ((20, 5.0), (60, 2.0)):
        run.step = step
        clock.now += seconds
        run.log_update({"loss": jnp.float32(2.0), "grad_norm": jnp.float32(1.5)})
    run.log.close()
    run.bar.close()
    first, second = (json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines())

    tokens = 3 * 16 * 16  # an update: A x B x T
    assert first["tokens_per_s"] == round(20 * tokens / 5.0)
    assert second["tokens_per_s"] == round(40 * tokens / 2.0)
    C, T, V = 16, 16, VOCAB_SIZE
    parameters = (12 * C * C + 2 * C) + C + V * C  # one block, ln_f, wte
    flops = 6 * parameters + 12 * 1 * C * T
    assert first["mfu"] == pytest.approx(20 * tokens / 5.0 * flops / (peak * devices))
    assert second["mfu"] == pytest.approx(40 * tokens / 2.0 * flops / (peak * devices))
    # Update 60 is the 50th after the warmup; of the 100 that decay, 49 came before it.
    cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * 49 / 100)) / 2
    assert second["lr"] == pytest.approx(cosine, rel=1e-5)
    assert (second["loss"], second["grad_norm"], second["skipped"]) == (2.0, 1.5, 0)


def test_eval_full_reads_every_token(data_dir, monkeypatch):
    """Catches --eval_full that is parsed and not followed, or is taken for both splits."""
    files, _ = load_data(data_dir)
    seen: list[int] = []

    def count(state: TrainState, tokens: jax.Array, config: TrainConfig) -> float:
        seen.append(int((tokens[:, 1:] >= 0).sum()))
        return 1.0

    monkeypatch.setattr(train, "eval_step", count)
    state = SimpleNamespace(mesh=make_mesh("data:1", jax.devices()[:1]))
    flags = ["shakespeare_char_cpu", "--batch_size=4", "--block_size=16", "--eval_iters=3"]
    batch = 4 * 16
    for more, val in (
        ([], [batch] * 3),
        (["--eval_full"], [batch] * 7 + [VAL_TOKENS - 1 - 7 * batch]),
    ):
        config = parse(TrainConfig, TRAIN_PRESETS, [*flags, *more])
        seen.clear()
        train.estimate_loss(state, config, files)
        assert seen == [batch] * 3 + val


# A run's model is its own.

OTHER_VALUES = {
    "block_size": 8,
    "vocab_size": 24,
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 32,
    "bias": True,
    "activation": "relu",
    "layer_norm_epsilon": 1e-6,
    "vocab_multiple": 32,
}


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory) -> Path:
    """OUT_DIR of a run of SMALL at step 0."""
    out_dir = tmp_path_factory.mktemp("run")
    config = dataclasses.replace(SMALL, out_dir=out_dir)
    checkpoints = Checkpoints(out_dir)
    checkpoints.save(TrainState.create(config), 3.0)
    checkpoints.close()
    write_description(config, META)
    return out_dir


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_resume_refuses_another_model(out_dir, name):
    """Catches a field that a resumed run may change without a word, such as the activation, which
    no shape gives away."""
    value = OTHER_VALUES[name]
    resume = partial(run_start.open_checkpoints, meta=META)
    config = dataclasses.replace(SMALL, out_dir=out_dir, init_from="resume")
    changed = dataclasses.replace(config.model, **{name: value})
    with pytest.raises(UserError, match=f"{name}={value}.*{name}={getattr(config.model, name)}"):
        resume(dataclasses.replace(config, model=changed))


def test_resume_refuses_another_tokenizer(out_dir):
    """Catches a run that goes on with ids that mean other characters, in a vocabulary as large;
    and a check that refuses the run's own, or what may change."""
    config = dataclasses.replace(SMALL, out_dir=out_dir, init_from="resume")
    with pytest.raises(UserError, match="another tokenizer"):
        run_start.open_checkpoints(config, {**META, **CharTokenizer(CHARS[::-1]).meta()})
    may_change = dataclasses.replace(config.model, dropout=0.1, dtype="bfloat16", remat=True)
    resumed = dataclasses.replace(config, model=may_change)
    run_start.open_checkpoints(resumed, {**META, "source": "elsewhere"}).close()


def test_a_plan_has_the_logits_of_a_chunk():
    """Catches logits without their gradient, of all chunks, or of the whole vocabulary where it is
    cut: for a large vocabulary they are most of what a step takes."""
    model = GPTConfig(block_size=32, vocab_size=256, n_layer=1, n_head=2, n_embd=8)
    config = TrainConfig(model=model, batch_size=6, loss_chunks=4)
    planned = activation_bytes(config, make_abstract_mesh("data:3,tensor:2", 6))
    of_a_chunk = 4 * (6 // 3) * (32 // 4) * (256 // 2)  # float32
    assert planned.logits == 2 * of_a_chunk


# Flags of sample.py, followed to what they change.


def test_dtype_changes_what_is_computed(out_dir):
    """Catches --dtype that is ignored for a run of train.py."""
    logits = {}
    for dtype in (None, "float32", "bfloat16"):
        opened, _, _ = open_model(SampleConfig(out_dir=out_dir, dtype=dtype))
        assert opened.config.dtype == (dtype or "float32")
        logits[dtype] = np.asarray(opened(jnp.arange(16)[None])[0])[..., :VOCAB_SIZE]
    assert (logits[None] == logits["float32"]).all()
    rounding = np.abs(logits["bfloat16"] - logits["float32"]).max()
    assert 0 < rounding < 0.1 * np.abs(logits["float32"]).max()


def test_dtype_of_a_model_of_others(tmp_path):
    """Catches --dtype that is ignored for a Hugging Face directory, or asked for by default."""
    config = GPTConfig(block_size=8, vocab_size=3, n_layer=1, n_head=1, n_embd=8)
    GPT(config, rngs=nnx.Rngs(0)).save_pretrained(tmp_path / "hf", CharTokenizer("abc"))
    for dtype in (None, "float32", "bfloat16"):
        opened, _, _ = open_model(SampleConfig(init_from=str(tmp_path / "hf"), dtype=dtype))
        assert opened.config.dtype == (dtype or "float32")


def test_top_p_reaches_the_sampler(out_dir, capsys):
    """Catches sample.py --top_p that is parsed and not followed: the smallest set of all is the
    likeliest token."""

    def printed(*flags: str) -> str:
        argv = [f"--out_dir={out_dir}", "--start=abc", "--num_samples=1", "--max_new_tokens=9"]
        sample.main(parse(SampleConfig, None, [*argv, *flags]))
        return capsys.readouterr().out.split("\n\n", 1)[1]

    likeliest = printed("--temperature=0")
    assert printed("--temperature=1", "--top_p=0.001") == likeliest
    assert printed("--temperature=1", "--top_p=1") != likeliest
