"""GPT-2 weights from and to Hugging Face's form, as numpy arrays. No JAX in here.

Apart from model.py because most of it is about the Hub, file formats and what can be wrong with a file; the
model sees finished arrays. A checkpoint is data from strangers: names, shapes, dtypes and sizes are checked
before anything is allocated, nothing in it is executed, and what is wrong raises ValueError with a sentence.
"""

import dataclasses
import json
import math
import operator
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable
from functools import partial, reduce
from pathlib import Path
from typing import NamedTuple

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors asks for by name
import numpy as np
from tqdm import tqdm

import tokenizer
from config import GPTConfig
from errors import require

HUB = {
    name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
}
ACTIVATIONS = ("gelu_new", "gelu", "relu", "silu")
# May differ from the checkpoint; block_size may only shrink, bias=False needs biases of zero.
OVERRIDES = ("dropout", "block_size", "bias", "vocab_multiple", "dtype", "remat", "scan_unroll")
SIZES = {
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}
# What GPTConfig cannot express, with the one value that it means.
FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
BUFFER = re.compile(
    r"h\.\d+\.attn\.(bias|masked_bias)"
)  # causal masks, which old transformers saved


class Stored(NamedTuple):
    """A tensor in a checkpoint."""

    name: str  # for messages, with the file
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], np.ndarray]

    def read(self) -> np.ndarray:
        try:
            values = self.load()
        except (
            Exception
        ) as e:  # a file that shrank since it was opened, or one of torch's stranger tensors
            raise ValueError(f"cannot read {self.name}: {first_line(e)}") from e
        require(
            np.isfinite(values).all(), f"{self.name} holds NaN or infinity; the file is damaged"
        )
        return values


def read(
    name_or_dir: str | Path, *, put: Callable = np.asarray, **overrides
) -> tuple[GPTConfig, dict]:
    """(config, params as GPT.params() has them: nested dict of float32, layers stacked, wte padded with
    zeros).

    name_or_dir: gpt2, gpt2-medium, gpt2-large or gpt2-xl, from the Hugging Face Hub or its cache, or a
    directory with a GPT-2 in Hugging Face's form (./gpt2 is a directory). overrides: fields of GPTConfig, see
    OVERRIDES; as in nanoGPT, dropout is 0 unless overridden. A checkpoint always has biases; bias=False
    leaves them out if all are zero, as `write` makes them. put takes each finished array, so that no second
    copy of the weights need exist. Raises ValueError."""
    directory = fetch(name_or_dir, "config.json", "model.safetensors")
    stored = read_config(directory / "config.json")
    config = overridden(stored, overrides)
    tensors = open_checkpoint(directory, stored)
    if "lm_head.weight" in tensors:
        tied = np.array_equal(tensors.pop("lm_head.weight").read(), tensors["wte.weight"].read())
        require(
            tied, f"{directory}: lm_head.weight is not wte.weight; only a tied head is implemented"
        )
    params = {}
    # The largest first, while there is room: each array exists twice for the moment in which put copies it.
    names = {path: hf_names(path, stored.n_layer) for path in shapes(stored)}
    largest_first = sorted(
        shapes(stored).items(), key=lambda item: -len(names[item[0]]) * math.prod(item[1])
    )
    for path, shape in tqdm(largest_first, desc=f"reading {name_or_dir}", disable=None):
        rows = {"wte.embedding": config.padded_vocab_size, "wpe.embedding": config.block_size}
        array = stacked(tensors, names[path], (rows.get(path, shape[0]), *shape[1:]))
        if path.endswith(".bias") and not config.bias:
            require(not array.any(), f"bias=False, but the biases in {directory} are not zero")
        else:
            params[path] = put(array if path.startswith("h.") else array[0])
        del array
    return config, nested(params)


def stacked(tensors: dict[str, Stored], names: list[str], shape: tuple[int, ...]) -> np.ndarray:
    """The tensors of these names, which leave the dict, as one array (len(names), *shape) float32; rows
    beyond the shape are left out, missing ones are zeros."""
    out = np.zeros((len(names), *shape), np.float32)
    for layer, name in zip(out, names):
        values = tensors.pop(name).read()[: shape[0]]
        layer[: len(values)] = values
    return out


def fetch(name_or_dir: str | Path, *files: str) -> Path:
    """A local directory as it is; for a name of HUB its directory in the cache, with files downloaded."""
    if name_or_dir not in HUB:
        require(
            Path(name_or_dir).is_dir(),
            f"there is no directory {name_or_dir}; the models that can be "
            f"downloaded are {', '.join(HUB)}",
        )
        return Path(name_or_dir)
    import huggingface_hub as hub  # here, because a local directory does not need it

    for file in files:
        try:
            path = hub.hf_hub_download(
                HUB[name_or_dir], file
            )  # by way of the cache; shows its own progress
        except (
            Exception
        ) as e:  # whatever the client and the libraries under it raise, there is no model
            raise ValueError(
                f"cannot get {file} of {HUB[name_or_dir]} from {hub.constants.ENDPOINT} or the "
                f"cache: {first_line(e)} ({type(e).__name__}); a directory needs none"
            ) from e
    return Path(path).parent


def load_tokenizer(name_or_dir: str | Path) -> tokenizer.Tokenizer:
    """The tokenizer of a model directory or of a Hub model. Raises ValueError if there is none."""
    directory = fetch(name_or_dir, "config.json", "vocab.json", "merges.txt")
    if (directory / "meta.json").is_file():  # of a CharTokenizer, see write_tokenizer
        return tokenizer.from_meta(load_json(directory / "meta.json"))
    return tokenizer.HFTokenizer(directory)


def read_config(path: Path) -> GPTConfig:
    """Hugging Face's config.json as a GPTConfig. What is not implemented is refused by name."""
    hf = {**FIXED, "model_type": None, **load_json(path)}
    for key, value in {"model_type": "gpt2", **FIXED}.items():
        require(hf[key] == value, f"{path}: {key}={hf[key]!r} is not implemented, only {value!r}")
    sizes = {ours: hf.get(theirs) for ours, theirs in SIZES.items()}
    for ours, n in sizes.items():
        require(
            type(n) is int and n > 0,
            f"{path}: {SIZES[ours]}={n!r} must be a whole number of at least 1",
        )
    inner, wide = hf.get("n_inner"), 4 * sizes["n_embd"]
    require(
        inner in (None, wide),
        f"{path}: n_inner={inner!r} is not implemented, only 4 n_embd = {wide}",
    )
    activation, epsilon = (
        hf.get("activation_function", "gelu_new"),
        hf.get("layer_norm_epsilon", 1e-5),
    )
    require(
        activation in ACTIVATIONS,
        f"{path}: activation_function={activation!r} is not implemented, only "
        f"{', '.join(ACTIVATIONS)}",
    )
    require(
        type(epsilon) is float and 0 < epsilon < 1,
        f"{path}: layer_norm_epsilon={epsilon!r} is not in (0, 1)",
    )
    return GPTConfig(**sizes, activation=activation, layer_norm_epsilon=epsilon)


def overridden(stored: GPTConfig, overrides: dict) -> GPTConfig:
    """stored with overrides, if that is a model that its weights can make."""
    config = dataclasses.replace(stored, **overrides)
    for name, value in overrides.items():
        was = getattr(stored, name)
        require(
            name in OVERRIDES or value == was,
            f"{name}={value}, but the checkpoint has {name}={was}; "
            f"only {', '.join(OVERRIDES)} can be chosen",
        )
    require(
        config.block_size <= stored.block_size,
        f"block_size={config.block_size}, but the checkpoint has "
        f"only {stored.block_size} positions: it can be made shorter, not longer",
    )
    return config


def shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Dotted path of each parameter -> its shape in a checkpoint, of one layer under h."""
    C = config.n_embd
    out = {"wte.embedding": (config.vocab_size, C), "wpe.embedding": (config.block_size, C)}
    for norm in ("h.ln_1", "h.ln_2", "ln_f"):
        out |= {f"{norm}.scale": (C,), f"{norm}.bias": (C,)}
    for linear, kernel in {
        "attn.c_attn": (C, 3 * C),
        "attn.c_proj": (C, C),
        "mlp.c_fc": (C, 4 * C),
        "mlp.c_proj": (4 * C, C),
    }.items():
        out |= {f"h.{linear}.kernel": kernel, f"h.{linear}.bias": kernel[1:]}
    return out


def hf_names(path: str, n_layer: int) -> list[str]:
    """wte.embedding -> [wte.weight]; h.ln_1.scale -> [h.0.ln_1.weight, h.1.ln_1.weight, ...]"""
    name = re.sub(r"\.(kernel|embedding|scale)$", ".weight", path)
    return [f"h.{i}.{name[2:]}" for i in range(n_layer)] if name.startswith("h.") else [name]


def nested(flat: dict) -> dict:
    """{"a.b": x} -> {"a": {"b": x}}"""
    root = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        reduce(lambda node, key: node.setdefault(key, {}), parents, root)[leaf] = value
    return root


def open_checkpoint(directory: Path, config: GPTConfig) -> dict[str, Stored]:
    """The tensors by name, without "transformer." and without buffers: exactly those that config asks for, of
    the right shape and dtype, and lm_head.weight where there is one."""
    for file, open_file in (
        ("model.safetensors", open_safetensors),
        ("pytorch_model.bin", open_torch),
    ):
        index = directory / f"{file}.index.json"
        if (directory / file).is_file() or index.is_file():
            files = [directory / file] if (directory / file).is_file() else shards(index)
            break
    else:
        raise ValueError(
            f"{directory} has neither model.safetensors nor pytorch_model.bin, whole or as shards"
        )
    tensors = {}
    for path in files:
        for name, tensor in open_file(path).items():
            name = name.removeprefix("transformer.")
            if not BUFFER.fullmatch(name):
                require(name not in tensors, f"{path}: {listed([name])} is there twice")
                tensors[name] = tensor
    misfit = f"{directory} is not the GPT-2 that its config.json describes"
    require(
        config.n_layer <= len(tensors),
        f"{misfit}: n_layer={config.n_layer}, but there are only {len(tensors)} tensors",
    )  # before so many names are made
    want = {
        name: shape
        for path, shape in shapes(config).items()
        for name in hf_names(path, config.n_layer)
    }
    missing, unexpected = want.keys() - tensors.keys(), tensors.keys() - {*want, "lm_head.weight"}
    require(
        not missing and not unexpected,
        f"{misfit}: missing {listed(missing)}; unexpected {listed(unexpected)}",
    )
    want["lm_head.weight"] = want["wte.weight"]
    wrong = [
        f"{name} is {t.shape}, not {want[name]}"
        for name, t in tensors.items()
        if t.shape != want[name]
    ]
    require(not wrong, f"{misfit}: {listed(wrong)}")
    wrong = [
        f"{name} is {t.dtype}"
        for name, t in tensors.items()
        if t.dtype not in ("F32", "F16", "BF16")
    ]
    require(not wrong, f"{directory}: weights must be F32, F16 or BF16, but {listed(wrong)}")
    least, size = 2 * config.num_params(), sum(path.stat().st_size for path in files)
    require(
        least <= size,
        f"{directory}: the weights take at least {least} bytes, but the files have {size}",
    )
    return tensors


def shards(index: Path) -> list[Path]:
    """The files that an index.json names; they lie beside it."""
    weight_map = load_json(index).get("weight_map")
    require(isinstance(weight_map, dict) and bool(weight_map), f"{index} has no weight_map")
    files = sorted(set(map(str, weight_map.values())))
    for file in files:
        require(Path(file).name == file, f"{index} names {file!r}, which is not a file beside it")
        require((index.parent / file).is_file(), f"{index} names {file}, which is missing")
    return [index.parent / file for file in files]


def open_safetensors(path: Path) -> dict[str, Stored]:
    """Nothing but the header is read here; the library checks it against the file's size."""
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(
            path, "numpy", backend="pread"
        )  # mapped pages would count as a second copy
        slices = {name: file.get_slice(name) for name in file.keys()}
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} is truncated or no safetensors file: {first_line(e)}") from e
    load = lambda name: partial(file.get_tensor, name)
    return {
        name: Stored(f"{name} in {path}", tuple(s.get_shape()), s.get_dtype(), load(name))
        for name, s in slices.items()
    }


def open_torch(path: Path) -> dict[str, Stored]:
    """A pytorch_model.bin, whole in memory. weights_only: no code in the pickle is run."""
    import torch  # here, because safetensors do not need it

    try:
        if zipfile.is_zipfile(path):  # files older than torch 1.6 are not
            size = sum(entry.file_size for entry in zipfile.ZipFile(path).infolist())
            require(
                size <= path.stat().st_size,
                f"it would unpack to {size} bytes, and torch packs nothing",
            )
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        require(isinstance(tensors, dict), f"it is a {type(tensors).__name__}")
        for name, t in tensors.items():
            require(
                type(name) is str and type(t) in (torch.Tensor, torch.nn.Parameter),
                f"{name} is a {type(t).__name__}",
            )
    except Exception as e:  # a hostile file can raise anything in an unpickler
        raise ValueError(
            f"{path} is truncated or holds something else than tensors by name, none of it was run: "
            f"{first_line(e)}"
        ) from e
    dtypes = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    load = lambda t: (
        lambda: t.detach().float().numpy()
    )  # float, because numpy does not know torch's bfloat16
    return {
        name: Stored(
            f"{name} in {path}", tuple(t.shape), dtypes.get(t.dtype, str(t.dtype)), load(t)
        )
        for name, t in tensors.items()
    }


def load_json(path: Path) -> dict:
    """The JSON object in a file."""
    require(path.is_file(), f"there is no {path}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not JSON: {first_line(e)}") from e
    require(isinstance(value, dict), f"{path} holds no JSON object")
    return value


def listed(names: Iterable[str], most: int = 8) -> str:
    """The first names, shortened, in one line: a stranger chose them."""
    names = [ascii(name)[1:-1][:100] for name in sorted(names)]
    more = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join(names[:most] + more) or "none"


def first_line(e: Exception) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0]


def write(directory: str | Path, config: GPTConfig, params: dict, tok: tokenizer.Tokenizer) -> None:
    """A directory that transformers, and so vLLM and llama.cpp's converter, load as it is: config.json,
    generation_config.json, model.safetensors in float32 and the tokenizer's files. It appears complete or not
    at all; an existing one is refused (ValueError).

    params as GPT.params() has them; they keep their bits. The vocabulary padding is left out. Hugging Face's
    GPT-2 always has biases: for bias=False they are written as zeros."""
    from safetensors.numpy import save_file

    directory = Path(directory)
    require(not directory.exists(), f"{directory} exists already: remove it or name another")
    tensors = {}
    for path, shape in shapes(config).items():
        names = hf_names(path, config.n_layer)
        if path.endswith(".bias") and not config.bias:
            array = np.zeros((len(names), *shape), np.float32)
        else:
            array = np.asarray(reduce(operator.getitem, path.split("."), params))
            array = np.ascontiguousarray(
                array if path.startswith("h.") else array[None, : shape[0]]
            )
        assert array.shape == (len(names), *shape) and array.dtype == np.float32, (
            f"{path} is {array.dtype}"
        )
        tensors |= {f"transformer.{name}": row for name, row in zip(names, array)}
    temporary = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    special = {
        "bos_token_id": tok.eos_id,
        "eos_token_id": tok.eos_id,
    }  # also null: the default is 50256
    hf = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "torch_dtype": "float32",
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "n_inner": None,
        **FIXED,
        "activation_function": config.activation,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        **special,
    }
    save_json(temporary / "config.json", hf)
    save_json(temporary / "generation_config.json", special)
    write_tokenizer(temporary, tok, config.block_size)
    save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
    temporary.rename(directory)


def write_tokenizer(directory: Path, tok: tokenizer.Tokenizer, block_size: int) -> None:
    """tokenizer.json, vocab.json, merges.txt and tokenizer_config.json: AutoTokenizer then encodes as tok
    does, but reads the text of a special token as that token, and drops characters that a CharTokenizer
    refuses."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
    }
    if isinstance(tok, tokenizer.CharTokenizer):
        hf = Tokenizer(models.BPE(tok.ids, []))  # no merges: each character is a token
        hf.decoder = decoders.Fuse()  # characters are joined without spaces
        save_json(directory / "meta.json", tok.meta())
    elif isinstance(tok, tokenizer.GPT2Tokenizer):
        char_of = {byte: c for c, byte in tokenizer.BYTE_OF.items()}
        text = lambda token: "".join(char_of[b] for b in token)
        ranks = {tok.token_bytes(i): i for i in range(tok.vocab_size) if i != tok.eos_id}
        merges = [tuple(map(text, merged_from(token, ranks))) for token in ranks if len(token) > 1]
        vocab = {text(token): i for token, i in ranks.items()} | {"<|endoftext|>": tok.eos_id}
        hf = Tokenizer(models.BPE(vocab, merges))
        hf.pre_tokenizer, hf.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        hf.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
        settings["tokenizer_class"] = "GPT2Tokenizer"
    else:
        hf = Tokenizer.from_str(tok.json)
    if tok.eos_id is not None:
        settings |= {
            "bos_token": hf.id_to_token(tok.eos_id),
            "eos_token": hf.id_to_token(tok.eos_id),
        }
    hf.save(str(directory / "tokenizer.json"))
    hf.model.save(str(directory))
    save_json(directory / "tokenizer_config.json", settings)


def merged_from(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that BPE merges last to make token: tiktoken has ranks, merges.txt wants pairs."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def save_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
