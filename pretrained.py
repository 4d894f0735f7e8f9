"""GPT-2 weights in from Hugging Face's form and out to it, as numpy arrays. No JAX in here.

Start with `read`: it finds the directory (`fetch`), understands its config.json (`read_config`),
opens its tensors without loading them (`open_checkpoint`) and loads one parameter at a time
(`read_parameter`). `write` is the way back. formats/hugging_face.py opens the single files.

This is apart from model.py because most of it is about the Hub, foreign names and what can be wrong
with a file; the model sees finished arrays. A checkpoint is data from strangers: names, shapes,
dtypes and sizes are checked before anything is allocated, nothing in it is executed, and what is
wrong raises UserError with one sentence.

A *path* is our dotted name of a parameter, the layers stacked: h.attn.c_attn.kernel. A *name* is
Hugging Face's name of a tensor, of one layer: h.0.attn.c_attn.weight. C is the embedding width.
"""

import contextlib
import dataclasses
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from config import GPTConfig
from errors import UserError, require
from formats.hugging_face import (
    StoredTensor,
    WeightFiles,
    find_weights,
    first_line,
    load_json,
    quote_some,
    save_json,
)
from tokenizer import Tokenizer, read_tokenizer, write_tokenizer

HUB = {
    name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
}
ACTIVATIONS = ("gelu_new", "gelu", "relu", "silu")
# The fields of GPTConfig that may differ from the checkpoint's. block_size may only shrink;
# bias=False needs biases of zero.
OVERRIDES = ("dropout", "block_size", "bias", "vocab_multiple", "dtype", "remat", "scan_unroll")
# Our sizes and the fields of config.json that hold them.
HF_SIZES = {
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}
# Fields of config.json that GPTConfig cannot express, with the one value that is implemented,
# which is also transformers' default.
HF_FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
# Causal masks, which old versions of transformers saved with the weights.
HF_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
DTYPES = ("F32", "F16", "BF16")


# Reading a model


def read(
    name_or_dir: str | Path, *, put: Callable[[np.ndarray], Any] = np.asarray, **overrides: Any
) -> tuple[GPTConfig, dict[str, Any]]:
    """Return the config and the parameters of a GPT-2 in Hugging Face's form.

    name_or_dir is gpt2, gpt2-medium, gpt2-large or gpt2-xl, from the Hugging Face Hub or its cache,
    or a directory (./gpt2 is a directory). overrides are fields of GPTConfig, see OVERRIDES; as in
    nanoGPT, dropout is 0 unless overridden. A checkpoint always has biases; bias=False leaves them
    out if all are zero, as `write` makes them.

    The parameters are as GPT.params() has them: a nested dict of float32 arrays, layers stacked,
    wte padded with zeros. put takes each finished array, so that no second copy of the weights need
    exist. Raises UserError."""
    directory = fetch(name_or_dir, "config.json", "model.safetensors")
    weights = find_weights(directory)
    stored = read_config(directory / "config.json")
    config = apply_overrides(stored, overrides)
    tensors = open_checkpoint(directory, weights, stored)
    drop_tied_head(directory, tensors)
    params = {}
    for path in tqdm(largest_first(stored), desc=f"reading {name_or_dir}", disable=None):
        array = read_parameter(tensors, path, stored, config)
        if path.endswith(".bias") and not config.bias:
            require(not array.any(), f"bias=False, but the biases in {directory} are not zero")
        else:
            params[path] = put(array)
        del array  # before the next one is read
    return config, nested(params)


def largest_first(config: GPTConfig) -> list[str]:
    """Return the paths of all parameters, the largest first.

    Each array exists twice while `put` copies it: the largest are read while there is room."""
    sizes = {
        path: len(hf_names(path, config.n_layer)) * math.prod(shape)
        for path, shape in parameter_shapes(config).items()
    }
    return sorted(sizes, key=sizes.__getitem__, reverse=True)


def read_parameter(
    tensors: dict[str, StoredTensor], path: str, stored: GPTConfig, config: GPTConfig
) -> np.ndarray:
    """Return a parameter, float32, read from its tensors, which leave the dict.

    The embeddings get the rows that config asks for: rows beyond are left out, missing ones are
    zeros. A parameter under h has the layers stacked in front."""
    names = hf_names(path, stored.n_layer)
    rows, *columns = parameter_shapes(stored)[path]
    if path == "wte.embedding":
        rows = config.padded_vocab_size
    elif path == "wpe.embedding":
        rows = config.block_size
    stacked = np.zeros((len(names), rows, *columns), np.float32)
    for layer, name in zip(stacked, names, strict=True):
        values = tensors.pop(name).read()[:rows]
        layer[: len(values)] = values
    return stacked if path.startswith("h.") else stacked[0]


def drop_tied_head(directory: Path, tensors: dict[str, StoredTensor]) -> None:
    """Take lm_head.weight, if there is one, out of tensors.

    Raises UserError unless it is wte.weight once more."""
    if "lm_head.weight" not in tensors:
        return
    head = tensors.pop("lm_head.weight").read()
    require(
        np.array_equal(head, tensors["wte.weight"].read()),
        f"{directory}: lm_head.weight is not wte.weight; only a tied head is implemented",
    )


def load_tokenizer(name_or_dir: str | Path) -> Tokenizer:
    """Return the tokenizer of a model directory or of a Hub model. Raises UserError."""
    return read_tokenizer(fetch(name_or_dir, "config.json", "vocab.json", "merges.txt"))


# The Hub


def fetch(name_or_dir: str | Path, *files: str) -> Path:
    """Return a local directory as it is, or the cache's directory of a name of HUB.

    Of the latter, files are downloaded unless the cache has them. Raises UserError."""
    if name_or_dir in HUB:
        return download(HUB[str(name_or_dir)], files)
    require(
        Path(name_or_dir).is_dir(),
        f"there is no directory {name_or_dir}; the models that can be downloaded are "
        f"{', '.join(HUB)}",
    )
    return Path(name_or_dir)


def download(repository: str, files: Iterable[str]) -> Path:
    """Return the directory of the cache that holds these files of a repository of the Hub.

    The client shows its own progress."""
    import huggingface_hub as hub  # here, because a local directory does not need it

    with one_hub_warning():
        for file in files:
            try:
                path = hub.hf_hub_download(repository, file)
            except Exception as e:  # whatever the client and the libraries under it raise
                raise UserError(
                    f"cannot get {file} of {repository} from {hub.constants.ENDPOINT} or the "
                    f"cache: {first_line(e)} ({type(e).__name__}); a local directory needs neither"
                ) from e
    return Path(path).parent


@contextlib.contextmanager
def one_hub_warning() -> Iterator[None]:
    """Inside, the Hub's client warns once, in one line.

    By itself it writes two lines for each of its retries, which go on for about half a minute if
    there is no network."""
    from huggingface_hub.utils import logging as hub_logging  # attaches the client's own handler

    first_only = FirstWarning()
    # A program that configured logging, such as the server, gets each record a second time.
    handlers = [*hub_logging.get_logger().handlers, *logging.getLogger().handlers]
    for handler in handlers:
        handler.addFilter(first_only)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(first_only)


class FirstWarning(logging.Filter):
    """Lets the first warning of the Hub's client through, as one line, and drops the later ones."""

    def __init__(self) -> None:
        super().__init__("huggingface_hub")
        self.warned = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is to be shown."""
        is_of_client = super().filter(record)
        if not is_of_client or record.levelno != logging.WARNING:
            return True
        if self.warned:
            return False
        self.warned = True
        line = first_line(record.getMessage())
        record.msg = f"{line} (later warnings, also of retries, are not shown)"
        record.args = ()
        return True


# config.json


def read_config(path: Path) -> GPTConfig:
    """Return Hugging Face's config.json as a GPTConfig.

    Raises UserError, naming the field, for what is not implemented."""
    hf = load_json(path)
    require_fixed_fields(path, hf)
    sizes = read_sizes(path, hf)
    inner = hf.get("n_inner")
    width = 4 * sizes["n_embd"]
    require(
        inner in (None, width),
        f"{path}: n_inner={inner!r} is not implemented, only 4 n_embd = {width}",
    )
    activation = hf.get("activation_function", "gelu_new")
    require(
        activation in ACTIVATIONS,
        f"{path}: activation_function={activation!r} is not implemented, only "
        f"{', '.join(ACTIVATIONS)}",
    )
    epsilon = hf.get("layer_norm_epsilon", 1e-5)
    require(
        type(epsilon) is float and 0 < epsilon < 1,
        f"{path}: layer_norm_epsilon={epsilon!r} is not in (0, 1)",
    )
    return GPTConfig(**sizes, activation=activation, layer_norm_epsilon=epsilon)


def require_fixed_fields(path: Path, hf: dict[str, Any]) -> None:
    """Raise UserError unless this is a GPT-2 of the one kind that is implemented."""
    fields = {"model_type": None, **HF_FIXED, **hf}
    for key, implemented in {"model_type": "gpt2", **HF_FIXED}.items():
        require(
            fields[key] == implemented,
            f"{path}: {key}={fields[key]!r} is not implemented, only {implemented!r}",
        )


def read_sizes(path: Path, hf: dict[str, Any]) -> dict[str, Any]:
    """Return the sizes in config.json by our names."""
    sizes = {}
    for ours, theirs in HF_SIZES.items():
        n = hf.get(theirs)
        require(
            type(n) is int and n > 0,  # not isinstance: true is an int to Python
            f"{path}: {theirs}={n!r} must be a whole number of at least 1",
        )
        sizes[ours] = n
    return sizes


def hf_config(config: GPTConfig) -> dict[str, Any]:
    """Return what config.json says about the model, the special tokens left out."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "torch_dtype": "float32",
        **{theirs: getattr(config, ours) for ours, theirs in HF_SIZES.items()},
        "n_inner": None,
        **HF_FIXED,
        "activation_function": config.activation,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
    }


def changed(config: GPTConfig) -> dict[str, Any]:
    """Return what differs from GPT-2's defaults: what a user overrides in a pretrained model."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return {name: value for name, value in values.items() if value != defaults[name]}


def apply_overrides(stored: GPTConfig, overrides: dict[str, Any]) -> GPTConfig:
    """Return stored with overrides. Raises UserError if its weights cannot make that model."""
    config = dataclasses.replace(stored, **overrides)
    for name, value in overrides.items():
        stored_value = getattr(stored, name)
        require(
            name in OVERRIDES or value == stored_value,
            f"{name}={value}, but the checkpoint has {name}={stored_value}; "
            f"only {', '.join(OVERRIDES)} can be chosen",
            param=name,
        )
    require(
        config.block_size <= stored.block_size,
        f"block_size={config.block_size}, but the checkpoint has only {stored.block_size} "
        "positions: it can be made shorter, not longer",
        param="block_size",
    )
    return config


# Names and shapes


def parameter_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Return the path of each parameter with its shape in a checkpoint, of one layer under h."""
    C = config.n_embd
    shapes: dict[str, tuple[int, ...]] = {
        "wte.embedding": (config.vocab_size, C),
        "wpe.embedding": (config.block_size, C),
    }
    for norm in ("h.ln_1", "h.ln_2", "ln_f"):
        shapes[f"{norm}.scale"] = (C,)
        shapes[f"{norm}.bias"] = (C,)
    kernels = {
        "h.attn.c_attn": (C, 3 * C),
        "h.attn.c_proj": (C, C),
        "h.mlp.c_fc": (C, 4 * C),
        "h.mlp.c_proj": (4 * C, C),
    }
    for linear, (inputs, outputs) in kernels.items():
        shapes[f"{linear}.kernel"] = (inputs, outputs)
        shapes[f"{linear}.bias"] = (outputs,)
    return shapes


def hf_names(path: str, n_layer: int) -> list[str]:
    """Return the names of the tensors that make a parameter.

    wte.embedding -> [wte.weight]; h.ln_1.scale -> [h.0.ln_1.weight, h.1.ln_1.weight, ...]"""
    name = re.sub(r"\.(kernel|embedding|scale)$", ".weight", path)
    if not name.startswith("h."):
        return [name]
    name_in_layer = name.removeprefix("h.")
    return [f"h.{i}.{name_in_layer}" for i in range(n_layer)]


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Return a dict of dotted paths as nested dicts: {"a.b": x} -> {"a": {"b": x}}."""
    root: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = root
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = value
    return root


def value_at(tree: dict[str, Any], path: str) -> Any:
    """Return what nested dicts hold at a dotted path."""
    node = tree
    for key in path.split("."):
        node = node[key]
    return node


# Opening a checkpoint


def open_checkpoint(
    directory: Path, weights: WeightFiles, config: GPTConfig
) -> dict[str, StoredTensor]:
    """Return the tensors by name, without "transformer." and without buffers.

    They are exactly those that config asks for, of the right shape and dtype, and lm_head.weight if
    there is one. Only headers are read; a pytorch_model.bin, however, is loaded whole."""
    tensors: dict[str, StoredTensor] = {}
    for path in weights.paths:
        for name, tensor in weights.open_file(path).items():
            name = name.removeprefix("transformer.")
            if not HF_BUFFER.fullmatch(name):
                require(name not in tensors, f"{path}: {quote_some([name])} is there twice")
                tensors[name] = tensor
    require_names_and_shapes(directory, tensors, config)
    wrong = [f"{name} is {t.dtype}" for name, t in tensors.items() if t.dtype not in DTYPES]
    require(
        not wrong,
        f"{directory}: weights must be one of {', '.join(DTYPES)}, but {quote_some(wrong)}",
    )
    least = 2 * config.num_params()  # bytes, in half precision
    size = sum(path.stat().st_size for path in weights.paths)
    require(
        least <= size,
        f"{directory}: the weights take at least {least} bytes, but the files have {size}",
    )
    return tensors


def require_names_and_shapes(
    directory: Path, tensors: dict[str, StoredTensor], config: GPTConfig
) -> None:
    """Raise UserError unless tensors are those of config, with or without lm_head.weight."""
    misfit = f"{directory} is not the GPT-2 that its config.json describes"
    require(
        config.n_layer <= len(tensors),  # before so many names are made
        f"{misfit}: n_layer={config.n_layer}, but there are only {len(tensors)} tensors",
    )
    expected: dict[str, tuple[int, ...]] = {}
    for path, shape in parameter_shapes(config).items():
        expected |= dict.fromkeys(hf_names(path, config.n_layer), shape)
    missing = expected.keys() - tensors.keys()
    expected["lm_head.weight"] = expected["wte.weight"]
    unexpected = tensors.keys() - expected.keys()
    require(
        not missing and not unexpected,
        f"{misfit}: missing {quote_some(missing)}; unexpected {quote_some(unexpected)}",
    )
    wrong = [
        f"{name} is {tensor.shape}, not {expected[name]}"
        for name, tensor in tensors.items()
        if tensor.shape != expected[name]
    ]
    require(not wrong, f"{misfit}: {quote_some(wrong)}")


# Writing a model


def write(
    directory: str | Path,
    config: GPTConfig,
    params: dict[str, Any],
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write a directory that transformers, and so vLLM and llama.cpp's converter, load as it is.

    It gets config.json, generation_config.json, model.safetensors in float32 and, if there is a
    tokenizer, its files. params are as GPT.params() has them and keep their bits; the padding of
    the vocabulary is left out. The directory appears complete or not at all. Raises UserError if it
    exists already."""
    from safetensors.numpy import save_file

    directory = Path(directory)
    require(not directory.exists(), f"{directory} exists already: remove it or name another")
    tensors = hf_tensors(config, params)
    temporary = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    eos_id = None if tokenizer is None else tokenizer.eos_id
    # Written even where they are null: transformers' default is GPT-2's 50256.
    special_tokens = {"bos_token_id": eos_id, "eos_token_id": eos_id}
    save_json(temporary / "config.json", hf_config(config) | special_tokens)
    save_json(temporary / "generation_config.json", special_tokens)
    if tokenizer is not None:
        write_tokenizer(temporary, tokenizer, config.block_size)
    weights = temporary / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})  # readable for its owner only
    weights.chmod((temporary / "config.json").stat().st_mode)
    temporary.rename(directory)


def hf_tensors(config: GPTConfig, params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the parameters by Hugging Face's names, which all begin with "transformer.".

    Hugging Face's GPT-2 always has biases: for bias=False they are zeros."""
    tensors = {}
    for path, shape in parameter_shapes(config).items():
        names = hf_names(path, config.n_layer)
        if path.endswith(".bias") and not config.bias:
            layers = np.zeros((len(names), *shape), np.float32)
        else:
            array = np.asarray(value_at(params, path))
            layers = array if path.startswith("h.") else array[None, : shape[0]]
        assert layers.shape == (len(names), *shape), f"{path} is {layers.shape}"
        assert layers.dtype == np.float32, f"{path} is {layers.dtype}"
        layers = np.ascontiguousarray(layers)  # safetensors writes the memory as it lies
        for name, tensor in zip(names, layers, strict=True):
            tensors[f"transformer.{name}"] = tensor
    return tensors
