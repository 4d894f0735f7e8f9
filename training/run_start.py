"""How a training run begins: from scratch, from its latest checkpoint or from a pretrained model.

Read `start_run`; it calls the others in their order.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

import pretrained
import tokenizer
from checkpoints import Checkpoints
from config import GPTConfig, TrainConfig, changed
from errors import require
from mesh import training_mesh, use_cpu_cores, whole_sequences
from model import Params
from ops import choose_attention
from utils import TrainState, write_atomically

# Fields of GPTConfig that say what a model's parameters mean, not how they are computed with.
MODEL_FIELDS = (
    "block_size",
    "vocab_size",
    "n_layer",
    "n_head",
    "n_embd",
    "bias",
    "activation",
    "layer_norm_epsilon",
    "vocab_multiple",
)


def start_run(
    config: TrainConfig, meta: dict[str, Any], processes: int
) -> tuple[TrainConfig, TrainState, Checkpoints]:
    """Return the state that a run begins with, and config with the model that it turned out to be.

    meta is the data's meta.json; processes is how many there are in this run."""
    config, params = prepare_model(config, meta)
    use_cpu_cores(config, processes)
    mesh = training_mesh(config)
    config_to_write = config  # without what is chosen for the devices that happen to be here
    model = choose_attention(config.model, whole_sequences(mesh))
    config = dataclasses.replace(config, model=model)
    checkpoints = open_checkpoints(config, meta)
    if checkpoints.latest() is None:
        state = TrainState.create(config, params, mesh)
    else:
        state = checkpoints.restore(TrainState.abstract(config, mesh))
    if jax.process_index() == 0:
        write_description(config_to_write, meta)
    return config, state, checkpoints


def prepare_model(config: TrainConfig, meta: dict[str, Any]) -> tuple[TrainConfig, Params | None]:
    """Return config with the model that data and config.init_from make it, and its weights.

    Weights are on the host; there are none where a run begins from scratch or goes on."""
    model = dataclasses.replace(config.model, vocab_size=meta["vocab_size"])
    if config.init_from in ("scratch", "resume"):
        return dataclasses.replace(config, model=model), None
    model, params = pretrained.read(config.init_from, **changed(model))
    require(
        model.vocab_size == meta["vocab_size"],
        f"{config.init_from} has vocab_size={model.vocab_size}, the data {meta['vocab_size']}: "
        "prepare the data with the model's tokenizer",
        param="init_from",
    )
    return dataclasses.replace(config, model=model), params


def open_checkpoints(config: TrainConfig, meta: dict[str, Any]) -> Checkpoints:
    """Open the checkpoints in config.out_dir.

    Raises UserError if there are any, but of another model, or not to be resumed from."""
    checkpoints = Checkpoints(config.out_dir)
    latest = checkpoints.latest()
    if latest is not None:
        require(
            config.init_from == "resume",
            f"out_dir={config.out_dir} holds a run at step {latest}: go on with "
            "--init_from=resume, or choose another --out_dir",
            param="out_dir",
        )
        require_same_model(config.out_dir, config.model, meta)
    return checkpoints


def require_same_model(out_dir: Path, config: GPTConfig, meta: dict[str, Any]) -> None:
    """Raise UserError if the run in out_dir has another model than config, or another tokenizer.

    meta is the content of the meta.json of the data, which describes its tokenizer."""
    saved = json.loads((out_dir / "config.json").read_text())["model"]
    for name in MODEL_FIELDS:
        value = getattr(config, name)
        require(
            saved[name] == value,
            f"{name}={value}, but the run in out_dir={out_dir} has {name}={saved[name]}",
            param=name,
        )
    saved_meta = json.loads((out_dir / "meta.json").read_text())
    require(
        tokenizer.from_meta(saved_meta).meta() == tokenizer.from_meta(meta).meta(),
        f"the data has another tokenizer than the run in out_dir={out_dir}",
        param="out_dir",
    )


def write_description(config: TrainConfig, meta: dict[str, Any]) -> None:
    """Write config.json and meta.json (the tokenizer) beside the checkpoints."""
    description = {
        "model": dataclasses.asdict(config.model),
        "train": dataclasses.asdict(config),
    }
    text = json.dumps(description, indent=1, default=str)
    write_atomically(config.out_dir / "config.json", text)
    write_atomically(config.out_dir / "meta.json", json.dumps(meta, indent=1))
