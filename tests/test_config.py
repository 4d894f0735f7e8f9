"""What the configs of the programs say and refuse."""

import dataclasses
import json
from dataclasses import asdict

import pytest

import config
import pretrained
from bench import BENCHES
from config import EngineConfig, GPTConfig, SampleConfig, TrainConfig
from errors import UserError
from flags import field_docstrings
from formats.parameters import RopeScaling
from serving.config import ServeConfig
from train import tokens_per_update
from training.prepare_config import PrepareConfig
from training.presets import TRAIN_PRESETS

CONFIGS = [value for value in vars(config).values() if dataclasses.is_dataclass(value)]
LLAMA3 = RopeScaling(8.0, 1.0, 4.0, 8192)
BENCH_CONFIGS = [config_class for config_class, _ in BENCHES.values()]


def test_defaults_are_gpt2():
    """Catches a default that drifts from GPT-2 124M, on which from_pretrained and the gpt2 preset
    rely."""
    c = GPTConfig()
    assert (c.n_layer, c.n_head, c.n_embd, c.block_size, c.vocab_size) == (12, 12, 768, 1024, 50257)
    assert (c.head_dim, c.padded_vocab_size, c.num_params()) == (64, 50304, 124_439_808)


def test_the_number_of_parameters_without_biases_and_positions():
    """Catches a wrong count of what bias=False or embeddings=False leaves out."""
    with_biases = GPTConfig()
    C, L = with_biases.n_embd, with_biases.n_layer
    without = dataclasses.replace(with_biases, bias=False)
    biases = L * (9 * C + 2 * C) + C
    assert with_biases.num_params() - without.num_params() == biases
    positions = with_biases.num_params() - with_biases.num_params(embeddings=False)
    assert positions == with_biases.block_size * C


def test_a_config_survives_json():
    """Catches a field that comes back as another type, and a run of an older version, which wrote
    fewer fields, that cannot be opened or is another model."""
    modern = GPTConfig(positions="rotary", rope_scaling=LLAMA3, n_kv_head=3, norm="rmsnorm")
    for model in (GPTConfig(bias=False), modern):
        back = GPTConfig.from_json(json.loads(json.dumps(asdict(model))))
        assert back == model
        assert hash(back) == hash(model)
    new = ("norm", "positions", "rope_theta", "rope_scaling", "n_kv_head", "head_size", "mlp")
    new += ("mlp_width", "qkv_bias", "qk_norm", "tied_head")
    old = {name: value for name, value in asdict(GPTConfig()).items() if name not in new}
    assert GPTConfig.from_json(old) == GPTConfig()


def test_changed_is_what_differs_from_gpt2():
    """Catches an override of a pretrained model that is lost, or a default that overrides one."""
    assert pretrained.changed(GPTConfig()) == {}
    assert pretrained.changed(GPTConfig(bias=False, dropout=0.1)) == {"bias": False, "dropout": 0.1}


@pytest.mark.parametrize("config_class", CONFIGS + BENCH_CONFIGS, ids=lambda c: c.__name__)
def test_every_knob_says_what_it_is(config_class):
    """Catches a knob that --help only names, and a class without a sentence of its own."""
    hidden = {"preset", "train", "model", "engine"}  # not flags, but presets and parts
    fields = {field.name for field in dataclasses.fields(config_class)} - hidden
    assert fields <= field_docstrings(config_class).keys()
    assert not config_class.__doc__.startswith(f"{config_class.__name__}("), "dataclass wrote it"


@pytest.mark.parametrize(
    "name, sequences, tokens",
    [
        ("pystdlib_char", 12, 12 * 128),
        ("shakespeare_char", 64, 64 * 256),  # nanoGPT's baby GPT
        ("shakespeare_char_cpu", 12, 12 * 64),  # nanoGPT's recipe for a CPU
        ("finetune_shakespeare", 32, 32 * 1024),  # nanoGPT's batch_size 1, accumulated 32 times
        ("gpt2", 480, 491_520),  # nanoGPT's 12 sequences x 5 x 8 GPUs
    ],
)
def test_presets_learn_from_as_much_as_nanogpts(name, sequences, tokens):
    """Catches a recipe whose learning rate no longer fits its batch."""
    recipe = TRAIN_PRESETS[name].config
    assert recipe.batch_size * recipe.gradient_accumulation_steps == sequences
    assert tokens_per_update(recipe) == tokens


@pytest.mark.parametrize("name", TRAIN_PRESETS)
def test_presets_are_complete(name):
    """Catches a preset that overwrites another's output, or that says nothing of itself."""
    preset = TRAIN_PRESETS[name]
    others = [p.config.out_dir for n, p in TRAIN_PRESETS.items() if n != name]
    assert preset.config.out_dir not in others
    assert "parameters" in preset.description
    json.dumps(dataclasses.asdict(preset.config), default=str)  # train.py writes it


@pytest.mark.parametrize(
    "config_class, values, param, words",
    [
        (GPTConfig, {"n_layer": 0}, "n_layer", "n_layer=0 must be at least 1"),
        (GPTConfig, {"n_embd": 100, "n_head": 12}, "n_embd", "n_embd=100"),
        (GPTConfig, {"n_kv_head": 5}, "n_kv_head", "n_head=12 .* n_kv_head=5"),
        (GPTConfig, {"n_kv_head": 0}, "n_kv_head", "n_kv_head=0 must be at least 1"),
        (GPTConfig, {"positions": "rotary", "head_size": 5}, "head_size", "a head of 5"),
        (GPTConfig, {"positions": "rotary", "rope_theta": 0.0}, "rope_theta", "rope_theta=0.0"),
        (GPTConfig, {"rope_theta": 5e5}, "rope_theta", "500000.0 is for positions=rotary"),
        (GPTConfig, {"rope_scaling": LLAMA3}, "rope_scaling", "is for positions=rotary"),
        (RopeScaling, {**asdict(LLAMA3), "factor": 0.5}, "factor", "factor=0.5"),
        (RopeScaling, {**asdict(LLAMA3), "high_freq_factor": 1.0}, "rope_scaling", "below"),
        (GPTConfig, {"dropout": 1.0}, "dropout", "dropout=1.0"),
        (GPTConfig, {"training_attention": "cudnn"}, "training_attention", "float32"),
        (TrainConfig, {"beta2": 1.0}, "beta2", "beta2=1.0"),
        (TrainConfig, {"learning_rate": float("nan")}, "learning_rate", "nan"),
        (TrainConfig, {"process_id": 1}, None, "all three, or none"),
        (TrainConfig, {"loss_chunks": 3}, "loss_chunks", "block_size=1024"),
        (TrainConfig, {"lr_decay_iters": 0}, "lr_decay_iters", "lr_decay_iters=0"),
        (SampleConfig, {}, None, "--out_dir=DIR or --init_from"),
        (SampleConfig, {"init_from": "gpt2", "top_k": 0}, "top_k", "None for all"),
        (SampleConfig, {"init_from": "gpt2", "top_p": 0}, "top_p", "top_p=0"),
        (PrepareConfig, {"name": "text"}, "input", "--input FILE"),
        (PrepareConfig, {"name": "shakespeare", "num_proc": 2}, "num_proc", "openwebtext alone"),
        (EngineConfig, {"page_size": 1}, "page_size", "at least 2"),
        (EngineConfig, {"kv_blocks": 1}, "kv_blocks", "kv_blocks=1 must be at least 2"),
        (EngineConfig, {"kv_cache_memory": 0}, "kv_cache_memory", "at least 1"),
        (EngineConfig, {"chunk_size": 24}, "chunk_size", "page_size=16"),
        (EngineConfig, {"mesh": "data:2"}, "mesh", "mesh=data:2: an engine is cut along one axis"),
        (EngineConfig, {"mesh": "tensor:0"}, "mesh", "tensor:N"),
        (EngineConfig, {"mesh": "tensor:2", "weights": "int8"}, "mesh", "weights=int8"),
        (EngineConfig, {"mesh": "tensor:2", "attention": "cpu"}, "mesh", "attention=cpu"),
        (ServeConfig, {"init_from": "gpt2", "port": 2**16}, "port", "65535"),
        (ServeConfig, {"init_from": "gpt2", "max_logprobs": 21}, "max_logprobs", "0 to 20"),
        (ServeConfig, {"init_from": "gpt2", "max_prompts": 999}, "max_prompts", "max_waiting=256"),
        (ServeConfig, {"init_from": "gpt2", "api_key": ""}, "api_key", "must not be empty"),
    ],
)
def test_what_cannot_be_is_refused(config_class, values, param, words):
    """Catches a check that is lost, or that does not name the field and the numbers."""
    with pytest.raises(UserError, match=words) as error:
        config_class(**values)
    assert error.value.param == param


def test_processes_go_together():
    """Catches a check of the three flags that takes process 0, or none at all, for missing."""
    TrainConfig()
    TrainConfig(coordinator_address="host:1", num_processes=2, process_id=0)
    with pytest.raises(UserError, match="process_id=2"):
        TrainConfig(coordinator_address="host:1", num_processes=2, process_id=2)


def test_as_many_prompts_as_may_wait():
    """Catches a limit that is off by one: a request that fills the queue can be admitted."""
    assert ServeConfig(out_dir="out", max_prompts=5, max_waiting=5).max_prompts == 5
    with pytest.raises(UserError, match="max_prompts=6 must be at most max_waiting=5"):
        ServeConfig(out_dir="out", max_prompts=6, max_waiting=5)
