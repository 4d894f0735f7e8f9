"""Weights in from Hugging Face's form and out to it, as numpy arrays. No JAX in here.

Start with `read`: it finds the directory (formats/hub.py), understands its config.json, opens its
tensors without loading them (`open_model`) and loads one parameter at a time (`read_parameter`).
`read_family` does the same with tensors from elsewhere; `write` is the way back. What families of
models there are is in formats/families.py; formats/hugging_face.py and formats/gguf_file.py open
the single files.

This is apart from model.py because most of it is about the Hub, foreign names and what can be wrong
with a file; the model sees finished arrays. A checkpoint is data from strangers: names, shapes,
dtypes and sizes are checked before anything is allocated, nothing in it is executed, and what is
wrong raises UserError with one sentence.

A *path* is our dotted name of a parameter, the layers stacked: h.attn.c_attn.kernel. A *name* is
Hugging Face's name of a tensor, of one layer: h.0.attn.c_attn.weight.
"""

import dataclasses
import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from config import GPTConfig
from errors import require
from formats.families import (
    FAMILIES,
    HEAD,
    Family,
    cut,
    family_of,
    hf_config,
    layers_of,
    names_of,
    read_config,
    tensor_shapes,
)
from formats.gguf_file import is_gguf, open_gguf
from formats.hub import HUB, fetch  # noqa: F401  HUB is this module's too
from formats.hugging_face import (
    StoredTensor,
    WeightFiles,
    find_weights,
    load_json,
    quote_some,
    save_json,
)
from formats.parameters import EMBEDDINGS, parameter_shapes
from tokenizer import HFTokenizer, Tokenizer, read_tokenizer, write_tokenizer

# The fields of GPTConfig that may differ from the checkpoint's. block_size may only shrink;
# bias=False needs biases of zero.
OVERRIDES = ("dropout", "block_size", "bias", "vocab_multiple", "dtype", "remat", "scan_unroll")
# Causal masks and rotary angles, which old versions of transformers saved with the weights.
HF_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)|.*\.rotary_emb\.inv_freq")
DTYPES = ("F32", "F16", "BF16")

Params = dict[str, Any]  # as GPT.params() has them


# Reading a model


def read(
    name_or_dir: str | Path, *, put: Callable[[np.ndarray], Any] = np.asarray, **overrides: Any
) -> tuple[GPTConfig, Params]:
    """Return the config and the parameters of a model in Hugging Face's form or in a GGUF file.

    name_or_dir is gpt2, gpt2-medium, gpt2-large or gpt2-xl, from the Hugging Face Hub or its cache,
    or a directory (./gpt2 is a directory) of one of FAMILIES, or a GGUF file of one. overrides are
    fields of GPTConfig, see OVERRIDES; as in nanoGPT, dropout is 0 unless overridden. A GPT-2
    always has biases; bias=False leaves them out if all are zero, as `write` makes them.

    The parameters are as GPT.params() has them: a nested dict of float32 arrays, layers stacked,
    the vocabulary padded with zeros. put takes each finished array, so that no second copy of the
    weights need exist. Raises UserError."""
    family, stored, tensors = open_model(name_or_dir)
    config = apply_overrides(stored, overrides)

    def take(name: str) -> np.ndarray:
        return tensors.pop(name).read()  # popped, so that torch's memory is freed

    if stored.tied_head and HEAD in tensors:
        require_tied(family, take(HEAD), tensors[names_of(family, "wte.embedding", 0)[0]].read())
    source = Source(family, stored, take, str(name_or_dir))
    return config, read_parameters(source, config, put)


def stored_model(directory: Path) -> tuple[Family, GPTConfig]:
    """Return the family and the config of the model in a directory. Raises UserError."""
    path = directory / "config.json"
    return read_config(load_json(path), str(path))


def read_family(
    hf_config: dict[str, Any],
    tensors: Mapping[str, Any],
    *,
    label: str = "the model",
    put: Callable[[np.ndarray], Any] = np.asarray,
    **overrides: Any,
) -> tuple[GPTConfig, Params]:
    """Return what `read` does, of a model whose tensors are not in Hugging Face's files.

    hf_config is what its config.json would hold. tensors are by Hugging Face's names and of its
    shapes; each value, which numpy.asarray must be able to make an array of, is looked up once and
    dropped before the next one, so it may be made then. label stands for the model in messages.
    Raises UserError."""
    family, stored = read_config(hf_config, label)
    config = apply_overrides(stored, overrides)
    names = {name.removeprefix(family.prefix): name for name in tensors}
    require_names(label, names, family, stored)
    shapes = tensor_shapes(family, stored)

    def take(name: str) -> np.ndarray:
        array = np.asarray(tensors[names[name]])
        require(
            array.shape == shapes[name],
            f"{label}: {names[name]} is {array.shape}, not {shapes[name]}",
        )
        require(bool(np.isfinite(array).all()), f"{label}: {names[name]} holds NaN or infinity")
        return array

    return config, read_parameters(Source(family, stored, take, label), config, put)


class Source(NamedTuple):
    """Where parameters come from."""

    family: Family
    config: GPTConfig
    """The model as it is stored, without overrides."""
    take: Callable[[str], np.ndarray]
    """Returns the tensor of a name, which is asked for once."""
    label: str
    """What it is, for messages."""


def read_parameters(source: Source, config: GPTConfig, put: Callable[[np.ndarray], Any]) -> Params:
    """Return all parameters that config asks for, the largest first, each through `put`.

    Each array exists twice while `put` copies it: the largest are read while there is room."""
    shapes = parameter_shapes(source.config)
    sizes = {
        path: len(layers_of(path, source.config)) * math.prod(shape)
        for path, shape in shapes.items()
    }
    largest_first = sorted(sizes, key=sizes.__getitem__, reverse=True)
    params = {}
    wanted = parameter_shapes(config)
    for path in tqdm(largest_first, desc=f"reading {source.label}", disable=None):
        array = read_parameter(source, path, config)
        if path in wanted:
            params[path] = put(array)
        else:
            require(not array.any(), f"bias=False, but the biases in {source.label} are not zero")
        del array  # before the next one is read
    return nested(params)


def read_parameter(source: Source, path: str, config: GPTConfig) -> np.ndarray:
    """Return a parameter, float32, made of its tensors.

    The embeddings get the rows that config asks for: rows beyond are left out, missing ones are
    zeros. A parameter under h has the layers stacked in front."""
    rows, *columns = parameter_shapes(source.config)[path]
    if path in EMBEDDINGS:
        rows = config.padded_vocab_size
    elif path == "wpe.embedding":
        rows = config.block_size
    layers = layers_of(path, source.config)
    stacked = np.zeros((len(layers), rows, *columns), np.float32)
    for i, layer in zip(layers, stacked, strict=True):
        views = cut(source.family, path, layer, source.config)
        for name, view in zip(names_of(source.family, path, i), views, strict=True):
            values = source.take(name)
            if path.endswith("kernel") and source.family.kernels_transposed:
                values = values.T
            if path.endswith("embedding"):
                values = values[:rows]
                view = view[: len(values)]
            view[...] = values.reshape(view.shape)
    return stacked if path.startswith("h.") else stacked[0]


def require_tied(family: Family, head: np.ndarray, embedding: np.ndarray) -> None:
    """Raise UserError unless a head that is to be tied is the token embedding once more."""
    [name] = names_of(family, "wte.embedding", 0)
    require(
        np.array_equal(head, embedding),
        f"{HEAD} is not {name}, but tie_word_embeddings is true; only one of the two can be",
    )


def load_tokenizer(name_or_dir: str | Path) -> Tokenizer:
    """Return the tokenizer of a model directory, a GGUF file or a Hub model. Raises UserError."""
    if is_gguf(name_or_dir):
        return HFTokenizer.from_gguf(name_or_dir)
    return read_tokenizer(fetch(name_or_dir, "config.json", "vocab.json", "merges.txt"))


# What a user may change


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
    require(
        stored.bias or not config.bias,
        f"bias={config.bias}, but the checkpoint has bias={stored.bias}: biases can be left out, "
        "not made",
        param="bias",
    )
    return config


# Trees


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
    """Return what nested dicts hold at a dotted path, None if there is nothing."""
    node: Any = tree
    for key in path.split("."):
        if key not in node:
            return None
        node = node[key]
    return node


# Opening a checkpoint


def open_model(name_or_dir: str | Path) -> tuple[Family, GPTConfig, dict[str, StoredTensor]]:
    """Return the family, the config and the tensors, not read yet, of what `read` reads."""
    if not is_gguf(name_or_dir):
        directory = fetch(name_or_dir, "config.json", "model.safetensors")
        weights = find_weights(directory)
        family, config = stored_model(directory)
        return family, config, open_checkpoint(directory, weights, family, config)
    file = open_gguf(name_or_dir)
    family, config = read_config(file.hf_config, str(file.path))
    tensors = {name.removeprefix(family.prefix): t for name, t in file.tensors.items()}
    require_names(str(file.path), tensors, family, config)
    require_shapes(str(file.path), tensors, family, config)
    return family, config, tensors


def open_checkpoint(
    directory: Path, weights: WeightFiles, family: Family, config: GPTConfig
) -> dict[str, StoredTensor]:
    """Return the tensors by name, without the family's prefix and without buffers.

    They are exactly those that config asks for, of the right shape and dtype, and lm_head.weight if
    there is one. Only headers are read; a pytorch_model.bin, however, is loaded whole."""
    tensors: dict[str, StoredTensor] = {}
    for path in weights.paths:
        for name, tensor in weights.open_file(path).items():
            name = name.removeprefix(family.prefix)
            if not HF_BUFFER.fullmatch(name):
                require(name not in tensors, f"{path}: {quote_some([name])} is there twice")
                tensors[name] = tensor
    require_names(str(directory), tensors, family, config)
    require_shapes(str(directory), tensors, family, config)
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


def require_names(label: str, names: Iterable[str], family: Family, config: GPTConfig) -> None:
    """Raise UserError unless these are the names of a model's tensors.

    lm_head.weight may be among them where it is tied."""
    given = set(names)
    misfit = f"{label} is not the {family.architecture} that its config.json describes"
    require(
        config.n_layer <= len(given),  # before so many names are made
        f"{misfit}: n_layer={config.n_layer}, but there are only {len(given)} tensors",
    )
    expected = tensor_shapes(family, config).keys()
    missing = expected - given
    unexpected = given - expected - {HEAD}
    require(
        not missing and not unexpected,
        f"{misfit}: missing {quote_some(missing)}; unexpected {quote_some(unexpected)}",
    )


def require_shapes(
    label: str, tensors: dict[str, StoredTensor], family: Family, config: GPTConfig
) -> None:
    """Raise UserError unless the tensors have the shapes that config asks for."""
    expected = tensor_shapes(family, config)
    [embedding] = names_of(family, "wte.embedding", 0)
    expected[HEAD] = expected[embedding]
    wrong = [
        f"{name} is {tensor.shape}, not {expected[name]}"
        for name, tensor in tensors.items()
        if tensor.shape != expected[name]
    ]
    misfit = f"{label} is not the {family.architecture} that its config.json describes"
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
    model_type, as_theirs = family_of(config)
    tensors = hf_tensors(FAMILIES[model_type], as_theirs, params)
    temporary = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    special_tokens = hf_special_tokens(tokenizer)
    description = hf_config(model_type, as_theirs) | special_tokens
    save_json(temporary / "config.json", description)
    save_json(temporary / "generation_config.json", special_tokens)
    if tokenizer is not None:
        write_tokenizer(temporary, tokenizer, config.block_size)
    weights = temporary / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})  # readable for its owner only
    weights.chmod((temporary / "config.json").stat().st_mode)
    temporary.rename(directory)


def hf_special_tokens(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return what config.json and generation_config.json say about begin and end.

    It is written even where it is null: transformers' defaults are others in every family."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None}
    eos_id = tokenizer.eos_id
    others = sorted(tokenizer.stop_ids - {eos_id})
    return {
        "bos_token_id": eos_id if tokenizer.bos_id is None else tokenizer.bos_id,
        "eos_token_id": [eos_id, *others] if others else eos_id,
    }


def hf_tensors(family: Family, config: GPTConfig, params: Params) -> dict[str, np.ndarray]:
    """Return the parameters by Hugging Face's names, with the family's prefix.

    Biases that config has and params have not are zeros."""
    tensors = {}
    for path, shape in parameter_shapes(config).items():
        layers = layers_of(path, config)
        stored = value_at(params, path)
        if stored is None and path.endswith(".bias"):
            stored = np.zeros((len(layers), *shape) if path.startswith("h.") else shape, np.float32)
        array = np.asarray(stored)
        stacked = array if path.startswith("h.") else array[None, : shape[0]]
        assert stacked.shape == (len(layers), *shape), f"{path} is {stacked.shape}"
        assert stacked.dtype == np.float32, f"{path} is {stacked.dtype}"
        for i, layer in zip(layers, stacked, strict=True):
            views = cut(family, path, layer, config)
            for name, view in zip(names_of(family, path, i), views, strict=True):
                tensor = view.reshape(*shape[:-1], -1)
                if path.endswith("kernel") and family.kernels_transposed:
                    tensor = tensor.T
                prefix = "" if name == HEAD else family.prefix
                # safetensors writes the memory as it lies
                tensors[prefix + name] = np.ascontiguousarray(tensor)
    return tensors
