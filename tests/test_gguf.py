"""Tests of formats/gguf_file.py: GGUF files against transformers, and files that are damaged."""

import random
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM

import pretrained
from errors import UserError
from formats.gguf_file import LLAMA3_SCALING, llama3_factors, open_gguf
from gguf_files import make_hf, write_gguf
from hugging_face import hf_logits, our_logits, same
from model import GPT

pytestmark = pytest.mark.slow

KINDS = [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.F16, Kind.BF16, Kind.Q4_K, Kind.Q6_K]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama of transformers whose queries share heads of keys, and its file."""
    path = tmp_path_factory.mktemp("gguf") / "llama.gguf"
    hf = make_hf("llama", tie_word_embeddings=True)
    write_gguf(path, hf)
    return hf, path


@pytest.mark.parametrize(
    "model_type, fields",
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"tie_word_embeddings": True, "head_dim": 128}),  # transformers assumes it
        ("gpt2", {"n_positions": 1024}),  # transformers assumes it
    ],
)
def test_tensors_are_those_of_transformers(model_type, fields, tmp_path):
    """Catches: rows of q and k that stay in llama.cpp's order or are reordered where they were not,
    a matrix that is not transposed, a quantisation that is read as another."""
    write_gguf(tmp_path / "model.gguf", make_hf(model_type, **fields), KINDS)
    peer = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    expected = {name: tensor.numpy() for name, tensor in peer.state_dict().items()}
    if peer.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    tensors = open_gguf(tmp_path / "model.gguf").tensors
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        values = tensor.read()
        assert values.dtype == np.float32
        assert values.shape == tensor.shape
        assert np.array_equal(values, expected[name]), name
        assert values.any()


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gpt2"])
def test_a_file_is_the_model_that_it_was_made_of(model_type, tmp_path):
    """Catches: a field of the config that is lost or taken for another, a tensor that goes to
    another parameter."""
    hf = make_hf(model_type)
    hf.save_pretrained(tmp_path / "hf")
    write_gguf(tmp_path / "model.gguf", hf)
    config, params = pretrained.read(tmp_path / "model.gguf")
    expected_config, expected = pretrained.read(tmp_path / "hf")
    assert same(params, expected)
    assert config.layer_norm_epsilon == pytest.approx(expected_config.layer_norm_epsilon, rel=1e-6)
    epsilon = {"layer_norm_epsilon": expected_config.layer_norm_epsilon}
    assert pretrained.dataclasses.replace(config, **epsilon) == expected_config


def test_logits_are_those_of_transformers(llama):
    """Catches a model that is computed in another way than it was meant."""
    hf, path = llama
    tokens = np.random.default_rng(0).integers(320, size=(2, 40))
    logits = our_logits(GPT.from_pretrained(path), tokens)
    expected = hf_logits(hf, tokens)
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


def test_llama_3_rotary_factors(llama, tmp_path):
    """Catches: long-context positions that are left unscaled, or scaled by another formula without
    a word."""
    hf, _ = llama
    scaling = LLAMA3_SCALING | {"factor": 32.0}
    factors = llama3_factors(scaling, 64, 50000.0).astype(np.float32)
    write_gguf(tmp_path / "a.gguf", hf, extra={"rope_freqs.weight": factors})
    config, _ = pretrained.read(tmp_path / "a.gguf")
    hf.config.rope_parameters = scaling | {"rope_theta": 50000.0}
    rotary = type(hf.model.rotary_emb)(hf.config)
    plain = 50000.0 ** -(np.arange(0, 64, 2) / 64)
    assert np.allclose(plain / rotary.inv_freq.numpy(), factors, rtol=1e-5)
    assert config.rope_scaling.factor == 32.0
    factors[3] = 2
    write_gguf(tmp_path / "b.gguf", hf, extra={"rope_freqs.weight": factors})
    with pytest.raises(UserError, match="b.gguf: only Llama 3's factors"):
        open_gguf(tmp_path / "b.gguf")


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"llama.block_count": None}, ["does not say llama.block_count"]),
        ({"llama.block_count": 10**9}, ["llama.block_count=1000000000", "20 tensors"]),
        ({"llama.block_count": 3}, ["layers.2."]),
        ({"llama.embedding_length": 128}, ["embed_tokens.weight", "(320, 256)"]),
        ({"llama.embedding_length": 2**31}, ["2147483648"]),
        ({"llama.attention.head_count": 0}, ["attention.head_count=0"]),
        ({"llama.attention.head_count": "many"}, ["attention.head_count=many"]),
        ({"llama.attention.head_count": [4, 4]}, ["attention.head_count=[4, 4]"]),
        ({"llama.attention.head_count_kv": 3}, ["n_kv_head=3"]),
        ({"llama.attention.layer_norm_rms_epsilon": 7}, ["rms_norm_eps=7"]),
        ({"llama.rope.scaling.type": "yarn"}, ["rope_type='yarn'"]),
        ({"llama.rope.dimension_count": 32}, ["rope.dimension_count=32", "64"]),
        ({"llama.expert_count": 8}, ["num_local_experts=8"]),
        ({"llama.attention.sliding_window": 64}, ["sliding_window=64"]),
        ({"llama.logit_scale": 2.0}, ["llama.logit_scale", "not implemented"]),
        ({"llama.vocab_size": 5}, ["vocab_size=5", "320"]),
    ],
)
def test_models_that_are_refused(keys, words, llama, tmp_path):
    """Catches: a model that is computed as another one, or that ends in a traceback or in all the
    memory there is."""
    hf, _ = llama
    path = tmp_path / "model.gguf"
    write_gguf(path, hf, keys=keys)
    refused(path, str(path), *words)


def test_tensors_that_are_refused(llama, tmp_path):
    """Catches: a tensor that is ignored, and a quantisation that ends in a traceback."""
    hf, _ = llama
    path = tmp_path / "model.gguf"
    write_gguf(path, hf, extra={"blk.0.attn_gate.weight": np.ones((2, 2), np.float32)})
    refused(path, "blk.0.attn_gate.weight", "not implemented")
    write_gguf(path, hf, extra={"blk.0.attn_norm.bias": np.ones(256, np.float32)})
    refused(path, "input_layernorm.bias")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("x", np.zeros((1, 66), np.uint8), raw_dtype=Kind.IQ2_XXS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(path, "x in ", "IQ2_XXS")
    gguf.GGUFWriter(path, "mamba").write_header_to_file()
    refused(tmp_path / "none.gguf", "there is no file")


def name_bytes(name: str) -> bytes:
    """Return a text as GGUF has it."""
    return struct.pack("<Q", len(name)) + name.encode()


def refused(path, *words: str) -> None:
    """Check that reading a file raises one sentence with all these words."""
    with pytest.raises(UserError) as e:
        pretrained.read(path)
    assert all(word in str(e.value) for word in words), e.value
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("count", [2**20, 2**40, 2**63, 2**64 - 1])
@pytest.mark.parametrize("what", ["tensors", "keys", "array", "text", "dimensions"])
def test_absurd_counts_take_no_memory(what, count, llama, tmp_path):
    """Catches a file of a few bytes that makes gguf build lists until the memory is full."""
    good = bytearray(llama[1].read_bytes())
    if what == "tensors":
        good[8:16] = struct.pack("<Q", count)
    elif what == "keys":
        good[16:24] = struct.pack("<Q", count)
    elif what == "array":
        at = good.index(name_bytes("tokenizer.ggml.token_type")) + 8 + 25 + 4 + 4
        good[at : at + 8] = struct.pack("<Q", count)
    elif what == "text":
        at = good.index(name_bytes("tokenizer.chat_template")) + 8 + 23 + 4
        good[at : at + 8] = struct.pack("<Q", count)
    else:
        at = good.index(name_bytes("blk.0.ffn_up.weight")) + 8 + 19 + 4
        good[at : at + 8] = struct.pack("<Q", count)
    path = tmp_path / "model.gguf"
    path.write_bytes(good)
    tracemalloc.start()
    refused(path, "model.gguf is truncated or no GGUF file")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6


def test_damaged_files_are_sentences(llama, tmp_path):
    """Catches: a file that was cut off or has changed and ends in a traceback, or is believed
    where it cannot be true."""
    good = llama[1].read_bytes()
    header = good.index(b"output_norm.weight") + 100
    path = tmp_path / "model.gguf"
    path.write_bytes(b"")
    refused(path, "model.gguf is truncated or no GGUF file")
    for end in [1, 3, 4, 8, 23, *range(24, header, header // 40), len(good) // 2, len(good) - 9]:
        path.write_bytes(good[:end])
        refused(path, f"model.gguf is truncated or no GGUF file: it ends at byte {end}, ")
    rng = random.Random(0)
    outcomes = set()
    for _ in range(150):
        damaged = bytearray(good[:header])
        damaged[rng.randrange(header)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged + good[header:])
        outcomes.add(outcome(path))
    assert outcomes == {"read", "refused"}
    for start in (b"GGML", b"PK\3\4", b"\0\0\0\0"):
        path.write_bytes(start + good[4:])
        refused(path, "no GGUF file")


def outcome(path) -> str:
    """Read a file; return whether it was refused. Anything but a UserError is raised."""
    try:
        pretrained.read(path)
    except UserError as error:
        assert "\n" not in str(error)
        return "refused"
    return "read"
