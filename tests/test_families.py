"""Llama, Qwen2 and Qwen3 against transformers: logits, generated tokens, in and out again.

GPT-2 is in test_pretrained.py, with all that can be wrong with files.

FAMILIES=all python -m pytest tests/test_families.py    generates with all models, not just two.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import pretrained
from config import EngineConfig, GPTConfig
from engine import Engine
from errors import UserError
from evaluation.tries import Trie, arrays, pack
from formats.parameters import EMBEDDINGS, RopeScaling, parameter_shapes
from hugging_face import hf_logits, our_logits, random_params, refused, same
from kernels import cpu_kernels
from model import GPT
from sequence import SamplingParams
from training.run_start import MODEL_FIELDS

pytestmark = pytest.mark.slow

# Heads and heads of keys; widths that divide by nothing.
NINE_THREE = {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3}
FOUR_ONE = {"num_attention_heads": 4, "num_key_value_heads": 1}
SIX_TWO = {"num_attention_heads": 6, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TIED = {"tie_word_embeddings": True}
CASES: dict[str, dict[str, Any]] = {
    "llama groups": NINE_THREE | TIED | {"vocab_size": 257},
    "llama one head of keys": FOUR_ONE | {"head_dim": 10, "rope_parameters": LLAMA3},
    "llama biases": SIX_TWO | {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    "llama no groups": {"num_attention_heads": 3, "intermediate_size": 192, "vocab_size": 64},
    "qwen2 groups": NINE_THREE | TIED | {"vocab_size": 67},
    "qwen2 one head of keys": FOUR_ONE | {"rope_parameters": LLAMA3},
    "qwen2 wide heads": SIX_TWO | {"head_dim": 14, "rms_norm_eps": 1e-3},
    "qwen2 no groups": {"num_attention_heads": 3, "num_key_value_heads": 3},
    "qwen3 groups": NINE_THREE | TIED | {"head_dim": 16},
    "qwen3 one head of keys": FOUR_ONE | {"head_dim": 6, "rope_parameters": LLAMA3},
    "qwen3 odd": {
        "hidden_size": 50,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "vocab_size": 1009,
    },
    "qwen3 no groups": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 24},
}


GENERATED = list(CASES)
if os.environ.get("FAMILIES") != "all":
    GENERATED = ["llama groups", "qwen3 one head of keys"]


def make(case: str) -> transformers.PreTrainedModel:
    """Return a model of transformers whose every parameter is random.

    So none can be swapped or left out unnoticed."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 100,
        "num_hidden_layers": 2,
        "max_position_embeddings": 96,
        "vocab_size": 131,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = transformers.AutoConfig.for_model(case.split()[0], **sizes | CASES[case])
    hf = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in hf.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.15)
    return hf


@pytest.fixture(params=CASES)
def hf(request) -> transformers.PreTrainedModel:
    """A model of each of CASES."""
    return make(request.param)


@pytest.fixture
def llama(tmp_path) -> Path:
    """The directory of a Llama, to damage."""
    make("llama one head of keys").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def change_config(directory: Path, **fields: Any) -> None:
    """Change fields of config.json; those that are ... are left out."""
    config = json.loads((directory / "config.json").read_text()) | fields
    config = {name: value for name, value in config.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(config))


def test_logits_and_the_way_back(hf, tmp_path):
    """Catches heads that meet the keys of others, pairs of a head that are neighbours, a gate taken
    for what it gates, a norm, bias, scaling or epsilon left out, and what is lost on the way out.
    """
    hf.save_pretrained(tmp_path / "in")
    model = GPT.from_pretrained(tmp_path / "in")
    tokens = np.random.default_rng(0).integers(0, hf.config.vocab_size, (2, 96))
    theirs = hf_logits(hf, tokens)
    assert np.abs(theirs).max() > 1  # so that 1e-4 means something
    np.testing.assert_allclose(our_logits(model, tokens), theirs, rtol=0, atol=1e-4)

    model.save_pretrained(tmp_path / "out")
    back, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(back) is type(hf)
    assert np.array_equal(hf_logits(back, tokens), theirs)
    config, params = pretrained.read(tmp_path / "out")
    assert config == model.config
    assert same(params, model.params())


@pytest.mark.parametrize("case", GENERATED)
def test_greedy_tokens_equal_transformers(case, tmp_path):
    """Catches a cache of keys that are not rotated, or rotated twice, and a position that is off
    for one row of a batch of unequal prompts."""
    hf = make(case)
    hf.save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, hf.config.vocab_size, n).tolist() for n in (1, 7, 30)]
    theirs = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        rows = hf.generate(
            tokens,
            max_new_tokens=64,
            do_sample=False,
            pad_token_id=0,
            attention_mask=torch.ones_like(tokens),
        )
        theirs.append(rows[0].tolist())
    assert model.generate(prompts, 64, temperature=0) == theirs
    if cpu_kernels.unavailable_because() is not None:
        pytest.skip("no native code for the engine")
    layout = EngineConfig(page_size=32, kv_blocks=12, max_num_seqs=3, prefill_tokens=32)
    engine = Engine(model, None, layout, progress=False)
    outputs = engine.generate(prompts, SamplingParams(max_tokens=64, temperature=0), progress=False)
    assert [p + o.token_ids for p, [o] in zip(prompts, outputs, strict=True)] == theirs


def test_older_and_newer_config_files(llama):
    """Catches a scaling or a base of the angles that is read from one form only."""
    config, params = pretrained.read(llama)
    values = dict(LLAMA3)
    del values["rope_type"], values["rope_theta"]
    assert (config.rope_theta, config.rope_scaling) == (5000.0, RopeScaling(**values))
    for kind in ("type", "rope_type"):
        scaling = {kind: "llama3", **values}
        change_config(llama, rope_parameters=..., rope_theta=5000, rope_scaling=scaling)
        older_config, older = pretrained.read(llama)
        assert older_config == config
        assert same(older, params)
    change_config(llama, rope_scaling=None)
    assert pretrained.read(llama)[0].rope_scaling is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_in_half_precision(tmp_path, dtype):
    """Catches a dtype that is read as another, and shards that are not all read."""
    hf = make("qwen3 groups").to(dtype)
    hf.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    params = pretrained.read(tmp_path)[1]
    up = hf.model.layers[1].mlp.up_proj.weight.detach().float().numpy()
    assert np.array_equal(params["h"]["mlp"]["c_fc"]["kernel"][1], up.T)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"model_type": "qwen3_moe"}, ["qwen3_moe", "qwen3"]),
        ({"sliding_window": 64}, ["sliding_window=64"]),
        ({"model_type": "qwen2", "use_sliding_window": True}, ["use_sliding_window=True"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["sliding_attention"]),
        ({"model_type": "qwen3", "attention_bias": True}, ["attention_bias=True"]),
        ({"attention_bias": True}, ["attention_bias=True", "mlp_bias=False"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ["yarn", "llama3"]),
        ({"rope_parameters": ..., "rope_scaling": {"type": "dynamic"}}, ["dynamic"]),
        ({"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}}}, ["sliding_attention"]),
        ({"rope_parameters": LLAMA3 | {"factor": None}}, ["factor=None"]),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 0.5}}, ["high_freq_factor=0.5"]),
        ({"rope_parameters": {"rope_theta": "1e4"}}, ["rope_theta='1e4'"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"num_local_experts": 8}, ["num_local_experts=8"]),
        ({"final_logit_softcapping": 30.0}, ["final_logit_softcapping=30.0"]),
        ({"hidden_act": "mish"}, ["hidden_act='mish'"]),
        ({"rms_norm_eps": 0.0}, ["rms_norm_eps=0.0"]),
        ({"num_key_value_heads": 3}, ["config.json", "n_kv_head=3"]),
        ({"num_key_value_heads": 2}, ["k_proj.weight is (10, 48), not (20, 48)"]),
        ({"intermediate_size": None}, ["intermediate_size=None"]),
        ({"tie_word_embeddings": True}, ["lm_head.weight is not embed_tokens.weight"]),
        ({"mlp_bias": True, "attention_bias": True}, ["missing", "gate_proj.bias"]),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(llama, fields, words):
    """Catches a variant that is loaded as if it were the plain model."""
    change_config(llama, **fields)
    refused(llama, *words)


class Lazy(Mapping):
    """Tensors that are made when they are looked up; knows whether the last one is gone."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self.tensors = tensors
        self.looked_up: list[str] = []

    def __getitem__(self, name: str) -> np.ndarray:
        self.looked_up.append(name)
        return np.array(self.tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def test_tensors_from_elsewhere(llama):
    """Catches tensors that are made all at once or twice, and names, shapes or numbers that do not
    fit and are taken."""
    hf = json.loads((llama / "config.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    tensors = {name: p.numpy() for name, p in model.state_dict().items()}
    lazy = Lazy(tensors)
    config, params = pretrained.read_family(hf, lazy, dtype="bfloat16")
    assert sorted(lazy.looked_up) == sorted(tensors)
    expected_config, expected = pretrained.read(llama, dtype="bfloat16")
    assert config == expected_config
    assert same(params, expected)

    name = "model.layers.1.self_attn.k_proj.weight"
    for value, words in (
        (None, "missing layers.1.self_attn.k_proj.weight"),
        (tensors[name].T, r"k_proj.weight is \(48, 10\), not \(10, 48\)"),
        (tensors[name] * np.nan, "k_proj.weight holds NaN"),
    ):
        others = {n: array for n, array in tensors.items() if n != name}
        with pytest.raises(UserError, match=f"the model.*{words}"):
            pretrained.read_family(hf, others if value is None else others | {name: value})


ODD_LLAMA = {
    "norm": "rmsnorm",
    "positions": "rotary",
    "mlp": "gated",
    "bias": False,
    "n_head": 3,
    "head_size": 4,
}


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"norm": "rmsnorm"}, "norm=layernorm, and the model rmsnorm"),
        ({"mlp": "gated"}, "mlp=plain, and the model gated"),
        ({"positions": "rotary"}, "positions"),
        ({"n_kv_head": 2}, "n_kv_head=None, and the model 2"),
        ({"head_size": 6}, "head_size=None, and the model 6"),
        (ODD_LLAMA, "n_embd=32 to be divisible by n_head=3"),
    ],
)
def test_what_no_family_has_is_not_exported(tmp_path, fields, words):
    """Catches an export that transformers loads as another model."""
    sizes = {"block_size": 8, "vocab_size": 9, "n_layer": 1, "n_head": 4, "n_embd": 32}
    config = GPTConfig(**sizes | fields)
    with pytest.raises(UserError, match=words):
        pretrained.write(tmp_path / "out", config, random_params(config))
    assert not (tmp_path / "out").exists()


def test_biases_cannot_be_made(llama):
    """Catches an override that asks for biases, gets none, and hears nothing of it."""
    with pytest.raises(UserError, match="bias=True, but the checkpoint has bias=False"):
        pretrained.read(llama, bias=True)


CHOICES: list[dict[str, Any]] = [
    {},
    {"bias": False, "qkv_bias": True, "norm": "rmsnorm", "positions": "rotary"},
    {"n_kv_head": 2, "mlp": "gated", "mlp_width": 50, "activation": "relu2", "tied_head": False},
    {"head_size": 6, "n_kv_head": 1, "qk_norm": True, "qkv_bias": False},
]


@pytest.mark.parametrize("fields", CHOICES)
def test_parameters_are_those_that_are_counted(fields):
    """Catches a count, or a table of shapes, that does not know what the model makes."""
    config = GPTConfig(block_size=8, vocab_size=70, n_layer=3, n_head=4, n_embd=32, **fields)
    params = jax.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0)).params())
    made = {".".join(path): a.shape for path, a in nnx.traversals.flatten_mapping(params).items()}
    shapes = {}
    for path, (rows, *columns) in parameter_shapes(config).items():
        layers = [3] if path.startswith("h.") else []
        padded = config.padded_vocab_size if path in EMBEDDINGS else rows
        shapes[path] = (*layers, padded, *columns)
    assert made == shapes
    padding = (config.padded_vocab_size - 70) * 32 * (1 if config.tied_head else 2)
    assert config.num_params() + padding == sum(map(math.prod, made.values()))


def test_flops_count_what_is_multiplied():
    """Catches N with an embedding that is only looked up, and attention as wide as n_embd."""
    shape = {"block_size": 16, "vocab_size": 70, "n_layer": 3, "n_head": 4, "n_embd": 32}
    plain = GPTConfig(**shape)
    own_head = GPTConfig(**shape, tied_head=False)
    assert own_head.flops_per_token == plain.flops_per_token
    rotary = GPTConfig(**shape, positions="rotary", head_size=16)
    kernels = 3 * (64 * 32 * 4 - 32 * 32 * 4) + 3 * 3 * 32  # twice as wide, and so are its biases
    assert rotary.flops_per_token - plain.flops_per_token == 6 * kernels + 12 * 3 * 32 * 16


def test_fields_of_a_run_are_compared():
    """Catches a run that is resumed as another model, because a field is not compared."""
    names = {field.name for field in dataclasses.fields(GPTConfig)}
    computed = {"dropout", "dtype", "training_attention", "remat", "scan_unroll"}
    assert set(MODEL_FIELDS) == names - computed


def test_tries_rotate_by_depth():
    """Catches angles, or groups of heads, that go by the place in a row instead of the depth."""
    config = GPTConfig(
        block_size=32,
        vocab_size=70,
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        n_embd=32,
        norm="rmsnorm",
        positions="rotary",
        mlp="gated",
    )
    model = GPT.from_params(config, jax.device_put(random_params(config)))
    sequences = [[1, 2, 3, 4, 5], [1, 2, 9, 8], [1, 2, 3, 7, 7, 7]]
    rows = pack([0, 1, 2], sequences, [[0], [0], [0]], 32)
    packed = arrays(rows, len(rows))
    x, _ = model.hidden(packed.tokens, Trie.create(packed.depth, packed.end, "float32"))
    for scored in rows[0].scored:
        alone = model.hidden(np.array([sequences[scored.request]]))[0][0, -1]
        np.testing.assert_allclose(x[0, scored.place], alone, rtol=0, atol=1e-5)
