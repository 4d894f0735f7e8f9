"""How a training run begins: from scratch, from its latest checkpoint or from a pretrained model.

Read `start_run`; it calls the others in their order.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

import pretrained
import tokenizer
from checkpoints import Checkpoint, checkpoints_in, read_description
from config import GPTConfig, TrainConfig
from errors import UserError, require
from formats.checksums import read_sealed, seal
from mesh import training_mesh, whole_sequences
from model import Params
from ops import choose_attention
from training.checkpoints import Checkpoints, read_state
from training.processes import use_cpu_cores
from training.run_lock import RunLock
from utils import TrainState, write_atomically

# Fields of GPTConfig that say what a model's parameters mean, not how they are computed with.
MODEL_FIELDS = (
    "block_size",
    "vocab_size",
    "n_layer",
    "n_head",
    "n_kv_head",
    "head_size",
    "n_embd",
    "norm",
    "positions",
    "rope_theta",
    "rope_scaling",
    "mlp",
    "mlp_width",
    "bias",
    "qkv_bias",
    "qk_norm",
    "tied_head",
    "activation",
    "layer_norm_epsilon",
    "vocab_multiple",
)


def start_run(
    config: TrainConfig, meta: dict[str, Any], processes: int, lock: RunLock
) -> tuple[TrainConfig, TrainState, Checkpoints]:
    """Return the state that a run begins with, and config with the model that it turned out to be.

    meta is the data's meta.json; processes is how many there are in this run. The first of them
    takes the lock of out_dir."""
    config_to_write, params = prepare_model(config, meta)  # without what is chosen for the devices
    config, mesh = prepare_devices(config_to_write, processes)
    take(lock)
    checkpoints = open_checkpoints(config, meta)
    if checkpoints.latest() is None:
        state = TrainState.create(config, params, mesh)
    else:
        state = checkpoints.restore(TrainState.abstract(config, mesh))
    if jax.process_index() == 0:
        write_description(config_to_write, meta)
    return config, state, checkpoints


def start_evaluation(
    config: TrainConfig, meta: dict[str, Any], processes: int
) -> tuple[TrainConfig, TrainState]:
    """Return what start_run does for a state that is only looked at: nothing is made or written.

    Raises UserError where there is no checkpoint to resume from, or a damaged one."""
    config, params = prepare_model(config, meta)
    config, mesh = prepare_devices(config, processes)
    found = checkpoints_in(config.out_dir.absolute() / "checkpoints")
    require_resume(config, max(found, default=None))
    if config.init_from != "resume":
        return config, TrainState.create(config, params, mesh)
    require(
        bool(found),
        f"there is nothing to evaluate: out_dir={config.out_dir} holds no complete checkpoint",
        param="out_dir",
    )
    newest = found[max(found)]
    require_same_model(config.out_dir, newest, config.model, meta)
    return config, read_state(newest, TrainState.abstract(config, mesh))


def take(lock: RunLock) -> None:
    """Acquire the lock in the first process of a run; all of them raise an error if it fails."""
    error: UserError | OSError | None = None
    if jax.process_index() == 0:
        try:
            lock.acquire()
        except (UserError, OSError) as own_error:
            error = own_error
    if jax.process_count() > 1:
        refused = multihost_utils.broadcast_one_to_all(np.int32(error is not None))
        if refused and error is None:
            error = UserError(f"process 0 could not take out_dir={lock.out_dir}", "out_dir")
    if error is not None:
        raise error


def prepare_devices(config: TrainConfig, processes: int) -> tuple[TrainConfig, Mesh]:
    """Return the mesh, and config with what is chosen for it."""
    use_cpu_cores(config, processes)
    mesh = training_mesh(config)
    model = choose_attention(config.model, whole_sequences(mesh))
    return dataclasses.replace(config, model=model), mesh


def prepare_model(config: TrainConfig, meta: dict[str, Any]) -> tuple[TrainConfig, Params | None]:
    """Return config with the model that data and config.init_from make it, and its weights.

    Weights are on the host; there are none where a run begins from scratch or goes on."""
    model = dataclasses.replace(config.model, vocab_size=meta["vocab_size"])
    if config.init_from == "resume":
        model = resumed_model(config, model)
    if config.init_from in ("scratch", "resume"):
        return dataclasses.replace(config, model=model), None
    model, params = pretrained.read(config.init_from, **pretrained.changed(model))
    require(
        model.vocab_size == meta["vocab_size"],
        f"{config.init_from} has vocab_size={model.vocab_size}, the data {meta['vocab_size']}: "
        "prepare the data with the model's tokenizer",
        param="init_from",
    )
    return dataclasses.replace(config, model=model), params


def resumed_model(config: TrainConfig, model: GPTConfig) -> GPTConfig:
    """Return model or, if the run in config.out_dir began from a pretrained one, what that was.

    Nobody described such a model by flags, so nobody need do it to go on. A flag that was given
    stays, and open_checkpoints refuses one that contradicts the run."""
    if began_from(config) in ("scratch", "resume"):
        return model
    saved = GPTConfig.from_json(read_sealed(config.out_dir / "config.json", sealed=True)["model"])
    given = pretrained.changed(model)
    kept = {name: getattr(saved, name) for name in MODEL_FIELDS if name not in given}
    return dataclasses.replace(model, **kept)


def began_from(config: TrainConfig) -> str:
    """Return the init_from that the run in config.out_dir had when it began."""
    description = config.out_dir / "config.json"
    if config.init_from != "resume" or not description.is_file():
        return config.init_from
    return read_sealed(description, sealed=False).get("began_from", "scratch")


def open_checkpoints(config: TrainConfig, meta: dict[str, Any]) -> Checkpoints:
    """Open the checkpoints in config.out_dir.

    Raises UserError if there are any, but of another model, or not to be resumed from."""
    checkpoints = Checkpoints(config.out_dir, config.keep_checkpoints)
    latest = checkpoints.latest()
    require_resume(config, latest)
    if latest is not None:
        newest = Checkpoint(checkpoints.directory / str(latest))
        require_same_model(config.out_dir, newest, config.model, meta)
    return checkpoints


def require_resume(config: TrainConfig, latest: int | None) -> None:
    """Raise UserError if out_dir holds a run, at step `latest`, that is not to be resumed."""
    require(
        latest is None or config.init_from == "resume",
        f"out_dir={config.out_dir} holds a run at step {latest}: go on with "
        "--init_from=resume, or choose another --out_dir",
        param="out_dir",
    )


def require_same_model(
    out_dir: Path, newest: Checkpoint, config: GPTConfig, meta: dict[str, Any]
) -> None:
    """Raise UserError if the run in out_dir has another model than config, or another tokenizer.

    meta is the content of the meta.json of the data, which describes its tokenizer."""
    description, saved_meta = read_description(out_dir, newest)
    saved = GPTConfig.from_json(description)
    for name in MODEL_FIELDS:
        value, saved_value = getattr(config, name), getattr(saved, name)
        require(
            saved_value == value,
            f"{name}={value}, but the run in out_dir={out_dir} has {name}={saved_value}",
            param=name,
        )
    saved_tokenizer = tokenizer.from_meta(saved_meta, out_dir / "meta.json")
    require(
        saved_tokenizer.meta() == tokenizer.from_meta(meta).meta(),
        f"the data has another tokenizer than the run in out_dir={out_dir}",
        param="out_dir",
    )


def write_description(config: TrainConfig, meta: dict[str, Any]) -> None:
    """Write config.json and meta.json (the tokenizer) beside the checkpoints."""
    description = {
        "model": dataclasses.asdict(config.model),
        "train": dataclasses.asdict(config),
        "began_from": began_from(config),
    }
    for name, content in (("config.json", description), ("meta.json", meta)):
        text = json.dumps(seal(content), indent=1, default=str)
        write_atomically(config.out_dir / name, text)
