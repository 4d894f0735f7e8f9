"""Small GGUF files, written as llama.cpp's converter writes them: not a test file itself."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
import transformers
from gguf import GGMLQuantizationType as Kind

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "rope_theta": 50000.0,
}
RANDOM_BLOCKS = {Kind.Q4_K: (144, [0, 2]), Kind.Q6_K: (210, [208])}
"""What gguf reads and cannot write: bytes of a block, and where in it float16 numbers are."""


def make_bpe() -> tokenizers.Tokenizer:
    """Return a small byte-level BPE with SPECIAL."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=bpe.pre_tokenizer.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    words = "the user said to the assistant that they're there, then 1234 12 99  the  end\n\n the"
    bpe.train_from_iterator([words] * 9 + ["x = 3;\n\n    y  = 12  \t34"] * 5, trainer)
    return bpe


def make_hf(model_type: str, **fields: Any) -> transformers.PreTrainedModel:
    """Return a model of transformers in which every parameter is random."""
    torch.manual_seed(0)
    if model_type == "gpt2":
        sizes = {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 320}
        config = transformers.GPT2Config(**sizes | fields)
    else:
        config = transformers.AutoConfig.for_model(model_type, **SIZES | fields)
    hf = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in hf.named_parameters():
            p.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.1)
    return hf


def write_gguf(
    path: Path,
    hf: transformers.PreTrainedModel,
    kinds: Iterable[Kind] = (Kind.F32,),
    keys: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
) -> None:
    """Write a model with make_bpe's tokenizer. kinds: of the matrices, in turn. keys: metadata to
    change; None leaves one out. extra: more tensors."""
    name = hf.config.model_type
    writer = gguf.GGUFWriter(path, name)
    metadata = model_keys(name, hf.config.to_dict()) | tokenizer_keys() | (keys or {})
    for key, value in metadata.items():
        add_key(writer, key, value)
    kinds = list(kinds)
    matrices = 0
    for tensor_name, values in converted(hf).items():
        if values.ndim == 1:
            writer.add_tensor(tensor_name, values)
            continue
        add_matrix(writer, tensor_name, values, kinds[matrices % len(kinds)])
        matrices += 1
    for tensor_name, values in (extra or {}).items():
        writer.add_tensor(tensor_name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Write one key of the metadata, with the type that llama.cpp's converter gives it."""
    types = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    if value is not None:
        getattr(writer, f"add_{types[type(value)]}")(key, value)


def model_keys(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return what a file says of a model's shape."""
    if name == "gpt2":
        keys = {
            "context_length": config["n_positions"],
            "block_count": config["n_layer"],
            "embedding_length": config["n_embd"],
            "feed_forward_length": 4 * config["n_embd"],
            "attention.head_count": config["n_head"],
            "attention.layer_norm_epsilon": config["layer_norm_epsilon"],
        }
    else:
        keys = {
            "context_length": config["max_position_embeddings"],
            "block_count": config["num_hidden_layers"],
            "embedding_length": config["hidden_size"],
            "feed_forward_length": config["intermediate_size"],
            "attention.head_count": config["num_attention_heads"],
            "attention.head_count_kv": config["num_key_value_heads"],
            "attention.key_length": config.get("head_dim", 64),
            "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
            "rope.freq_base": config["rope_parameters"]["rope_theta"],
        }
    return {f"{name}.{key}": value for key, value in keys.items()}


def tokenizer_keys(pre: str = "gpt-2") -> dict[str, Any]:
    """Return what a file says of make_bpe's tokenizer and its chats."""
    model = json.loads(make_bpe().to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    padding = [f"[PAD{i}]" for i in range(len(tokens), SIZES["vocab_size"])]
    kinds = [3 if token in SPECIAL else 1 for token in tokens] + [5] * len(padding)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens + padding,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }


def converted(hf: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    """Return a model's tensors by llama.cpp's names, rearranged as its converter does it."""
    name = hf.config.model_type
    [arch] = [arch for arch, value in gguf.MODEL_ARCH_NAMES.items() if value == name]
    names = gguf.get_tensor_name_map(arch, 2)
    tensors = {}
    for theirs, tensor in hf.state_dict().items():
        values = tensor.float().numpy()
        if theirs == "lm_head.weight" and hf.config.tie_word_embeddings:
            continue
        if name == "llama" and ".q_proj." in theirs:
            values = turned(values, hf.config.num_attention_heads)
        if name == "llama" and ".k_proj." in theirs:
            values = turned(values, hf.config.num_key_value_heads)
        if name == "gpt2" and values.ndim == 2 and ".h." in theirs:
            values = values.T
        tensors[names.get_name(theirs, (".weight", ".bias"))] = np.ascontiguousarray(values)
    return tensors


def turned(values: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows of q or k as llama.cpp has them: halves of a head become pairs."""
    halves = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def add_matrix(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: Kind) -> None:
    """Write a matrix in some quantisation: random blocks of those that gguf cannot make."""
    if kind not in RANDOM_BLOCKS:
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        return
    size, floats = RANDOM_BLOCKS[kind]
    rng = np.random.default_rng(len(name))
    blocks = rng.integers(256, size=(values.size // 256, size), dtype=np.uint8)
    for at in floats:
        numbers = rng.normal(0, 0.01, (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = numbers.view(np.uint8)
    writer.add_tensor(name, blocks.reshape(len(values), -1), raw_dtype=kind)
