"""GGUF files, as llama.cpp has them: what one says in the words of Hugging Face's form.

Start with `open_gguf`. A file holds everything of a model: metadata, the tokenizer (see
gguf_tokenizer.py) and the weights, often quantised. The package `gguf` reads and dequantises; here
its names become those of Hugging Face's form, which pretrained.py understands, and what llama.cpp
has rearranged is put back. The file is data from strangers: what is wrong raises UserError with one
sentence, before anything large is allocated.
"""

import math
import re
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType
from gguf.quants import dequantize

from errors import UserError, require
from formats.hugging_face import StoredTensor, first_line, quote_some

Metadata = dict[str, Any]
"""What a file says of its model, by llama.cpp's keys: numbers, texts and lists of them."""

UNPACKED = ("F32", "F16", "BF16")
WHOLE_BLOCKS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
QUANTISATIONS = (*UNPACKED, *WHOLE_BLOCKS)

MOST_VALUES = 3_000_000
"""Texts, counts and numbers in a file's metadata: a vocabulary of 256,000 tokens has 1.8 million.
gguf keeps an array of 200 bytes for each."""

LONGEST_TEXT = 2**24
"""Bytes of a text in a file's metadata."""

ROWS_AT_A_TIME = 1024
"""Rows of a matrix that are dequantised at once, because gguf takes three times their memory."""


class GGUFFile(NamedTuple):
    """A GGUF file whose metadata has been read, and whose tensors have not."""

    path: Path
    metadata: Metadata
    hf_config: dict[str, Any]
    """What config.json would say of the model."""
    tensors: dict[str, StoredTensor]
    """The tensors by Hugging Face's names; each is read, as float32, when it is asked for."""


class Architecture(NamedTuple):
    """How llama.cpp writes down the models of one family."""

    keys: dict[str, str]
    """The keys that a file must have, without the architecture, and the fields of config.json."""
    optional_keys: dict[str, str]
    """Those that it may leave out."""
    checked_keys: frozenset[str]
    """Those that say once more what others say, or what `rope_scaling` reads."""
    prefix: str
    """What Hugging Face's names of all tensors but the head's begin with."""
    modules: dict[str, str]
    """The modules outside of the blocks, and Hugging Face's names of them."""
    layer_modules: dict[str, str]
    """The modules of a block, likewise."""
    turned_pairs: bool = False
    """Whether llama.cpp has reordered the rows of q and k: see `unturned`."""
    transposed: frozenset[str] = frozenset()
    """The modules whose matrices Hugging Face's form has as (in, out)."""


LLAMA = Architecture(
    keys={
        "context_length": "max_position_embeddings",
        "block_count": "num_hidden_layers",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    },
    optional_keys={
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "attention.sliding_window": "sliding_window",
        "rope.freq_base": "rope_theta",
        "expert_count": "num_local_experts",
    },
    checked_keys=frozenset(
        {
            "vocab_size",
            "attention.value_length",
            "rope.dimension_count",
            "rope.scaling.type",
            "rope.scaling.factor",
            "rope.scaling.original_context_length",
            "rope.scaling.finetuned",
            "expert_used_count",
        }
    ),
    prefix="model.",
    modules={"token_embd": "embed_tokens", "output_norm": "norm"},
    layer_modules={
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    },
    turned_pairs=True,
)

QWEN = LLAMA._replace(turned_pairs=False)

GPT2 = Architecture(
    keys={
        "context_length": "n_positions",
        "block_count": "n_layer",
        "embedding_length": "n_embd",
        "feed_forward_length": "n_inner",
        "attention.head_count": "n_head",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
    },
    optional_keys={},
    checked_keys=frozenset({"vocab_size"}),
    prefix="transformer.",
    modules={"token_embd": "wte", "position_embd": "wpe", "output_norm": "ln_f"},
    layer_modules={
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    },
    transposed=frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
)

ARCHITECTURES = {"llama": LLAMA, "qwen2": QWEN, "qwen3": QWEN, "gpt2": GPT2}
"""The architectures by the names that llama.cpp and config.json's model_type share."""

HEAD = "output"
ROPE_FACTORS = "rope_freqs.weight"
"""A tensor with a number for each pair that rotary positions turn: by how much slower it turns."""

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What all Llama 3's have; their factors differ."""


def is_gguf(name: str | Path) -> bool:
    """Return whether what a user calls a model is a GGUF file, by its ending."""
    return str(name).lower().endswith(".gguf") and not Path(name).is_dir()


# Opening a file


def open_gguf(path: str | Path) -> GGUFFile:
    """Return what a file says. Raises UserError, naming the file and what is wrong with it."""
    path = Path(path)
    require(path.is_file(), f"there is no file {path}")
    status = path.stat()
    return read_once(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1)  # the model, the tokenizer and the chat template are asked for one by one
def read_once(path: Path, size: int, changed_at: int) -> GGUFFile:
    """Return what open_gguf does; size and changed_at tell a file from what replaces it."""
    reader = read_header(path)
    metadata = {key: contents(field, path) for key, field in reader.fields.items()}
    name = metadata.get("general.architecture")
    require(
        isinstance(name, str) and name in ARCHITECTURES,
        f"{path}: architecture {str(name)[:40]!r} is not implemented, only "
        f"{', '.join(ARCHITECTURES)}",
    )
    architecture = ARCHITECTURES[str(name)]
    stored = {tensor.name: stored_tensor(tensor, path) for tensor in reader.tensors}
    hf = hf_config_of(str(name), metadata, stored, path)
    stored.pop(ROPE_FACTORS, None)
    tensors = dict(rename(architecture, tensor, hf, path) for tensor in stored.items())
    return GGUFFile(path, metadata, hf, tensors)


class BoundedReader(GGUFReader):
    """gguf's reader, which believes what a file says of its own sizes, made to check each of them.

    Its methods raise ValueError if the file cannot be so."""

    values = 0
    """Values read so far."""

    def _get(
        self, offset: int, dtype: Any, count: int = 1, override_order: Any = None
    ) -> np.ndarray:
        """Return `count` values at an offset."""
        if self.byte_order != "I":
            raise ValueError("it is written for machines of the other byte order")
        self._require_bytes(offset, np.dtype(dtype).itemsize * int(count))
        self.values += 1
        if self.values > MOST_VALUES:
            raise ValueError(f"its metadata has more than {MOST_VALUES} values")
        # A plain array: a slice of a memmap takes three times the time and the memory.
        return np.ndarray((int(count),), dtype, self.data, int(offset))

    def _get_str(self, offset: int) -> Any:
        """Return the length and the bytes of a text."""
        length, text = super()._get_str(offset)
        if len(text) > LONGEST_TEXT:
            raise ValueError(f"its metadata has a text of {len(text)} bytes")
        return length, text

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        """Return the value of a key, piece by piece."""
        if raw_type == GGUFValueType.ARRAY:
            kind = GGUFValueType(self._get(orig_offs, np.uint32)[0])
            count = int(self._get(orig_offs + 4, np.uint64)[0])
            # A text has its length before it; an array the type of its values too.
            least = np.dtype(self.gguf_scalar_to_np.get(kind, np.uint64)).itemsize
            self._require_bytes(orig_offs + 12, count * least)
        return super()._get_field_parts(orig_offs, raw_type)

    def _require_bytes(self, offset: int, size: int) -> None:
        """Raise ValueError unless so many bytes of the file follow an offset."""
        end = int(offset) + size
        if end > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data)}, and speaks of byte {end}")


def read_header(path: Path) -> GGUFReader:
    """Return gguf's view of a file. Raises UserError where the file is damaged."""
    try:
        with np.errstate(over="raise"):
            return BoundedReader(path)
    except (ValueError, LookupError, ArithmeticError, TypeError, RecursionError) as e:
        message = e.args[0] if isinstance(e, KeyError) else e  # str() would quote it
        raise UserError(f"{path} is truncated or no GGUF file: {first_line(message)}") from e


def contents(field: Any, path: Path) -> Any:
    """Return the value of a key of the metadata."""
    try:
        return field.contents()
    except (ValueError, LookupError, TypeError) as e:
        name = quote_some([field.name])
        raise UserError(f"{path}: {name} cannot be read: {first_line(e)}") from e


def stored_tensor(tensor: Any, path: Path) -> StoredTensor:
    """Return a tensor of the file, not read yet. Raises UserError for other quantisations."""
    label = f"{quote_some([tensor.name])} in {path}"
    kind = tensor.tensor_type.name
    require(
        kind in QUANTISATIONS,
        f"{label} is quantised as {kind}, only {', '.join(QUANTISATIONS)} are implemented",
    )
    shape = tuple(tensor.shape[::-1].tolist())  # ggml counts the dimensions from the last
    load = partial(
        load_tensor,
        path,
        tensor.tensor_type,
        tensor.data_offset,
        tensor.n_bytes,
        shape,
    )
    return StoredTensor(label, shape, kind, load)


def load_tensor(
    path: Path, kind: GGMLQuantizationType, offset: int, size: int, shape: tuple[int, ...]
) -> np.ndarray:
    """Return a tensor as float32. It is `size` bytes of the file at an offset.

    It is read, not memory-mapped: mapped pages would count as a second copy of the weights."""
    raw = np.fromfile(path, np.uint8, count=size, offset=offset)
    if raw.size != size:
        raise ValueError(f"the file holds {raw.size} of its {size} bytes")
    raw = raw.reshape(*shape[:-1], -1)
    values = np.empty(shape, np.float32)
    for start in range(0, len(values), ROWS_AT_A_TIME) if values.ndim > 1 else [0]:
        rows = slice(start, start + ROWS_AT_A_TIME) if values.ndim > 1 else slice(None)
        values[rows] = dequantize(raw[rows], kind)
    return values


# config.json


def hf_config_of(
    name: str, metadata: Metadata, tensors: dict[str, StoredTensor], path: Path
) -> dict[str, Any]:
    """Return what config.json would say of the model. Raises UserError.

    What the numbers must be is checked where config.json is: in families.py."""
    architecture = ARCHITECTURES[name]
    said = {
        key.removeprefix(f"{name}."): value
        for key, value in metadata.items()
        if key.startswith(f"{name}.")
    }
    fields = {**architecture.keys, **architecture.optional_keys}
    missing = [f"{name}.{key}" for key in architecture.keys if key not in said]
    require(not missing, f"{path} does not say {quote_some(missing)}")
    unknown = said.keys() - fields.keys() - architecture.checked_keys
    keys = quote_some(f"{name}.{key}" for key in unknown)
    require(not unknown, f"{path} says {keys}, which is not implemented")
    blocks = said["block_count"]
    require(
        type(blocks) is int and blocks <= len(tensors),
        f"{path} says {name}.block_count={str(blocks)[:40]}, and has {len(tensors)} tensors",
    )
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{path} has no matrix token_embd.weight")
    hf = {
        "model_type": name,
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": f"{HEAD}.weight" not in tensors,
        **{field: said[key] for key, field in fields.items() if key in said},
    }
    require_same(said, "vocab_size", embedding.shape[0], path)
    if "rope.freq_base" in fields:
        hf |= read_llama(said, hf, tensors, path)
    return hf


def read_llama(
    said: Metadata, hf: dict[str, Any], tensors: dict[str, StoredTensor], path: Path
) -> dict[str, Any]:
    """Return the fields of config.json that Llama and its kin have beyond those with a key."""
    for key in ("embedding_length", "attention.head_count"):
        size = said[key]
        require(type(size) is int and size > 0, f"{path}: {key}={str(size)[:40]} must be above 0")
    head_size = said.get(
        "attention.key_length", said["embedding_length"] // said["attention.head_count"]
    )
    require_same(said, "rope.dimension_count", head_size, path)
    require_same(said, "attention.value_length", head_size, path)
    return {
        "head_dim": head_size,
        "rope_scaling": rope_scaling(said, head_size, tensors, path),
        "use_sliding_window": "attention.sliding_window" in said,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }


def require_same(said: Metadata, key: str, value: int, path: Path) -> None:
    """Raise UserError unless a key that says something once more says the same."""
    again = said.get(key, value)
    require(again == value, f"{path} says {key}={str(again)[:40]}, and elsewhere {value}")


def rope_scaling(
    said: Metadata, head_size: int, tensors: dict[str, StoredTensor], path: Path
) -> dict[str, Any] | None:
    """Return config.json's rope_scaling, None where rotary positions are not scaled.

    Llama 3's is in the file as its result, a factor for each pair: the numbers that config.json
    has are found from it, and refused if they do not make these factors."""
    kind = said.get("rope.scaling.type", "none")
    if kind != "none":
        return {"rope_type": str(kind)[:40]}  # families.py refuses it by name
    if ROPE_FACTORS not in tensors:
        return None
    stored = tensors[ROPE_FACTORS]
    require(stored.shape == (head_size // 2,), f"{stored.label} is not ({head_size // 2},)")
    factors = stored.read()
    scaling = {**LLAMA3_SCALING, "factor": float(factors.max())}
    theta = said.get("rope.freq_base", 10000.0)
    is_number = type(theta) is float and theta > 1
    require(
        is_number and np.allclose(factors, llama3_factors(scaling, head_size, theta), rtol=1e-4),
        f"{stored.label}: only Llama 3's factors for rotary positions are implemented",
    )
    return scaling


def llama3_factors(scaling: dict[str, Any], head_size: int, theta: float) -> np.ndarray:
    """Return by how much slower Llama 3 turns each pair of a head: see formats/parameters.py."""
    waves = 2 * math.pi * theta ** (np.arange(0, head_size, 2) / head_size)  # in tokens
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / waves
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - kept) / scaling["factor"] + kept)


# Tensors


def rename(
    architecture: Architecture, item: tuple[str, StoredTensor], hf: dict[str, Any], path: Path
) -> tuple[str, StoredTensor]:
    """Return Hugging Face's name of a tensor and the tensor as it is there.

    Raises UserError for a name that the architecture does not have."""
    name, tensor = item
    match = re.fullmatch(r"(?:blk\.(\d{1,6})\.)?(\w+)\.(weight|bias)", name)
    modules = {HEAD: "lm_head"}
    if match and match[1]:
        prefix = f"{architecture.prefix}{'h' if architecture is GPT2 else 'layers'}.{match[1]}."
        modules = architecture.layer_modules
    elif match and match[2] != HEAD:
        prefix = architecture.prefix
        modules = architecture.modules
    else:
        prefix = ""
    if match is None or match[2] not in modules:
        raise UserError(f"{path} has a tensor {quote_some([name])}, which is not implemented")
    module, leaf = match[2], match[3]
    if architecture.turned_pairs and module in ("attn_q", "attn_k"):
        key = "num_attention_heads" if module == "attn_q" else "num_key_value_heads"
        heads = hf.get(key, hf["num_attention_heads"])
        tensor = changed(tensor, tensor.shape, partial(unturned, heads=heads))
    if module in architecture.transposed and leaf == "weight":
        tensor = changed(tensor, tensor.shape[::-1], np.transpose)
    return f"{prefix}{modules[module]}.{leaf}", tensor


def changed(
    tensor: StoredTensor, shape: tuple[int, ...], change: Callable[[np.ndarray], np.ndarray]
) -> StoredTensor:
    """Return a tensor that is changed once it is read."""

    def load() -> np.ndarray:
        return change(tensor.load())

    return tensor._replace(shape=shape, load=load)


def unturned(rows: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows of q or k in Hugging Face's order.

    Rotary positions turn pairs of a head's numbers. Those of a pair are half a head apart in
    Hugging Face's form, and side by side in llama.cpp's llama (convert_hf_to_gguf.py: permute)."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
