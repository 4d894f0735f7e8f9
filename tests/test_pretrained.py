"""Weights in from Hugging Face's form and out to it: against transformers, and what does not fit.

How the single files are opened is tested in test_formats.py, tokenizers in test_tokenizer.py."""

import http.server
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

import pretrained
from config import GPTConfig
from formats.hub import one_hub_warning
from hugging_face import (
    Tiny,
    flat,
    hf_logits,
    make_hf,
    make_tiny,
    our_logits,
    random_params,
    refused,
    same,
)
from model import GPT
from tokenizer import CharTokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("hf") / "tiny")


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    """A copy of the tiny directory, to damage."""
    return Path(shutil.copytree(tiny.directory, tmp_path / "copy"))


Change = Callable[[dict[str, np.ndarray]], None]


def change_tensors(directory: Path, change: Change) -> None:
    """Rewrite model.safetensors after `change` was at the tensors."""
    file = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})


# The head counts of small, medium, large and XL, with narrow heads; odd vocabularies and lengths;
# all activations.
@pytest.mark.parametrize(
    "n_head, n_embd, n_layer, vocab_size, n_positions, activation",
    [
        (12, 96, 3, 131, 100, "gelu_new"),
        (16, 128, 2, 257, 33, "gelu"),
        (20, 160, 2, 1009, 64, "relu"),
        (25, 200, 2, 64, 17, "silu"),
    ],
)
def test_logits_equal_transformers(
    tmp_path, n_head, n_embd, n_layer, vocab_size, n_positions, activation
):
    """Catches a wrong name, a transposed square kernel, and a wrong split of q, k and v, epsilon,
    activation or padding of the vocabulary."""
    hf = make_hf(
        n_head=n_head,
        n_embd=n_embd,
        n_layer=n_layer,
        vocab_size=vocab_size,
        n_positions=n_positions,
        activation_function=activation,
        layer_norm_epsilon=1e-3,
    )
    hf.save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, vocab_size, (2, n_positions))
    theirs = hf_logits(hf, tokens)
    assert np.abs(theirs).max() > 1  # so that 1e-4 means something
    np.testing.assert_allclose(our_logits(model, tokens), theirs, rtol=0, atol=1e-4)


def test_greedy_tokens_equal_transformers(tmp_path):
    """Catches a cache or position that is off for one row of a batch of unequal prompts."""
    hf = make_hf(n_positions=96)
    hf.save_pretrained(tmp_path)
    prompts = [np.random.default_rng(n).integers(0, 131, n).tolist() for n in (1, 7, 30)]
    ours = GPT.from_pretrained(tmp_path).generate(prompts, 64, temperature=0)
    for prompt, row in zip(prompts, ours, strict=True):
        theirs = hf.generate(
            torch.tensor([prompt]),
            max_new_tokens=64,
            do_sample=False,
            pad_token_id=0,
            attention_mask=torch.ones(1, len(prompt), dtype=int),
        )
        assert row == theirs[0].tolist()


def test_overrides(tiny):
    """Catches a block_size that is ignored or crops the wrong end."""
    model = GPT.from_pretrained(
        tiny.directory, block_size=9, dropout=0.25, vocab_multiple=7, n_head=4
    )
    assert model.config.block_size == 9
    assert model.config.dropout == 0.25
    assert model.config.padded_vocab_size == 133
    tokens = np.arange(18).reshape(2, 9)
    theirs = hf_logits(tiny.hf, tokens)
    np.testing.assert_allclose(our_logits(model, tokens), theirs, rtol=0, atol=1e-4)


def test_overrides_that_do_not_fit_are_refused(tiny):
    """Catches a conflict that is silently resolved."""
    for override, words in (
        ({"block_size": 41}, ("41", "40")),
        ({"n_head": 6}, ("n_head=6", "n_head=4")),
        ({"activation": "relu"}, ("relu", "gelu_new")),
        ({"bias": False}, ("bias=False",)),
        ({"vocab_size": 65}, ("65", "131")),
    ):
        with pytest.raises(ValueError) as e:
            pretrained.read(tiny.directory, **override)
        assert all(word in str(e.value) for word in words), e.value


def test_peak_memory_is_about_one_copy(tmp_path):
    """Catches a reader that holds the file's tensors while it stacks them."""
    make_hf(n_layer=4, n_embd=256, vocab_size=1000).save_pretrained(tmp_path)
    pretrained.read(tmp_path)  # imports
    tracemalloc.start()
    params = pretrained.read(tmp_path)[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.3 * sum(a.nbytes for a in flat(params).values())


@pytest.mark.parametrize("bias", [True, False])
def test_round_trip_is_bit_identical(tmp_path, bias):
    """Catches padding that is exported, biases that are lost or invented, and ids of GPT-2 in a
    model without an end token."""
    config = GPTConfig(
        block_size=40,
        vocab_size=70,
        n_layer=3,
        n_head=4,
        n_embd=48,
        bias=bias,
        activation="gelu",
        layer_norm_epsilon=1e-4,
        dropout=0.1,
    )
    params = random_params(config)
    model = GPT.from_params(config, jax.device_put(params))
    tokenizer = CharTokenizer("".join(map(chr, range(40, 110))))
    model.save_pretrained(tmp_path / "out", tokenizer)
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]

    hf = load_with_transformers(tmp_path / "out")
    assert hf.config.vocab_size == 70
    tokens = np.random.default_rng(0).integers(0, 70, (2, 40))
    np.testing.assert_allclose(hf_logits(hf, tokens), our_logits(model, tokens), rtol=0, atol=1e-4)
    hf.save_pretrained(tmp_path / "again")
    for directory in ("out", "again"):
        back_config, back = pretrained.read(tmp_path / directory, bias=bias, dropout=0.1)
        assert back_config == config
        assert same(back, params)
    written_bias = pretrained.read(tmp_path / "out")[1]["h"]["attn"]["c_attn"]["bias"]
    trained_bias = params["h"]["attn"]["c_attn"]["bias"] if bias else np.zeros((3, 144))
    assert np.array_equal(written_bias, trained_bias)
    with pytest.raises(ValueError, match="exists already"):
        model.save_pretrained(tmp_path / "out", CharTokenizer("ab"))


def load_with_transformers(directory: Path) -> transformers.GPT2LMHeadModel:
    """Return what AutoModelForCausalLM loads: every tensor, and no special tokens."""
    hf, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True
    )
    assert not any(report.values()), report
    for special in (hf.config, hf.generation_config):
        assert special.eos_token_id is None
        assert special.bos_token_id is None
    return hf


def test_export_without_a_tokenizer(tmp_path):
    """Catches an export that needs a tokenizer, makes one up, or gives the model GPT-2's end."""
    config = GPTConfig(block_size=40, vocab_size=70, n_layer=3, n_head=4, n_embd=48)
    params = random_params(config)
    pretrained.write(tmp_path / "out", config, params, None)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"config.json", "generation_config.json", "model.safetensors"}
    hf = load_with_transformers(tmp_path / "out")
    tokens = np.random.default_rng(0).integers(0, 70, (2, 40))
    model = GPT.from_params(config, jax.device_put(params))
    np.testing.assert_allclose(hf_logits(hf, tokens), our_logits(model, tokens), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="tokenizer.json"):
        pretrained.load_tokenizer(tmp_path / "out")


def test_export_is_complete_or_invisible(tmp_path, monkeypatch):
    """Catches a directory that appears under its name before everything is in it."""
    config = GPTConfig(block_size=8, vocab_size=3, n_layer=1, n_head=1, n_embd=8)
    model = GPT.from_params(config, random_params(config))

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(pretrained, "write_tokenizer", full_disk)
    with pytest.raises(OSError):
        model.save_pretrained(tmp_path / "out", CharTokenizer("abc"))
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    model.save_pretrained(tmp_path / "out", CharTokenizer("abc"))  # what was left is no obstacle
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "field, value, word",
    [
        ("model_type", "mistral", "mistral"),
        ("model_type", None, "model_type"),
        ("scale_attn_by_inverse_layer_idx", True, "inverse_layer"),
        ("scale_attn_weights", False, "scale_attn"),
        ("add_cross_attention", True, "add_cross_attention"),
        ("tie_word_embeddings", False, "missing lm_head.weight"),
        ("tie_word_embeddings", "no", "tie_word"),
        ("activation_function", "mish", "mish"),
        ("n_inner", 100, "c_fc.weight is (48, 192), not (48, 100)"),
        ("n_layer", 2, "unexpected h.2"),
        ("n_layer", 4, "missing h.3"),
        ("n_layer", 10**12, "n_layer=1000000000000"),
        ("n_layer", "3", "n_layer='3'"),
        ("n_layer", None, "n_layer"),
        ("n_layer", True, "n_layer"),
        ("n_embd", 48 * 10**30, "(48,), not"),
        ("n_embd", -48, "n_embd"),
        ("n_head", 5, "n_head=5"),
        ("n_head", 0, "n_head"),
        ("vocab_size", 130, "(131, 48)"),
        ("n_positions", 10**9, "wpe.weight"),
        ("layer_norm_epsilon", float("nan"), "epsilon=nan"),
        ("layer_norm_epsilon", "1e-5", "epsilon"),
        ("layer_norm_epsilon", -1e-5, "epsilon"),
    ],
)
def test_config_that_does_not_fit_is_refused(copy, field, value, word):
    """Catches a field that is assumed instead of read, and sizes that are believed unchecked."""
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {field: value}))
    refused(copy, word)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\udcff"])
def test_config_that_is_no_object_is_refused(copy, text):
    """Catches a parser's own exception reaching the user."""
    (copy / "config.json").write_text(text, errors="surrogateescape")
    refused(copy, "config.json")


def without(name: str) -> Change:
    """Return a change that takes a tensor out."""
    return lambda tensors: tensors.pop(name)


def put(name: str, value: np.ndarray) -> Change:
    """Return a change that puts a tensor in."""
    return lambda tensors: tensors.update({name: value})


def put_one(value: float) -> Change:
    """Return a change of one weight."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["transformer.h.1.mlp.c_fc.weight"][5, 7] = value

    return change


@pytest.mark.parametrize(
    "change, words",
    [
        (without("transformer.h.1.ln_1.bias"), ["missing h.1.ln_1.bias"]),
        (
            put("transformer.h.0.attn.rotary", np.ones(3, np.float32)),
            ["unexpected h.0.attn.rotary"],
        ),
        (put("a\n\33[2J" + 999 * "b", np.ones(3, np.float32)), ["unexpected a\\n\\x1b[2Jbbb"]),
        (put("wte.weight", np.zeros((131, 48), np.float32)), ["wte.weight is there twice"]),
        (
            put("transformer.h.2.attn.c_attn.weight", np.zeros((144, 48), np.float32)),
            ["(144, 48)", "(48, 144)"],
        ),
        (put("transformer.ln_f.weight", np.ones(48)), ["ln_f.weight", "F64"]),
        (put("transformer.ln_f.weight", np.ones(48, np.int32)), ["ln_f.weight", "I32"]),
        (
            put("lm_head.weight", np.zeros((131, 48), np.float32)),
            ["lm_head.weight is not wte.weight"],
        ),
        (put("lm_head.weight", np.zeros((130, 48), np.float32)), ["lm_head.weight is (130, 48)"]),
        (put_one(np.nan), ["h.1.mlp.c_fc.weight", "NaN"]),
        (put_one(-np.inf), ["h.1.mlp.c_fc.weight", "infinity"]),
    ],
)
def test_tensors_that_do_not_fit_are_refused(copy, change, words):
    """Catches a check that is missing; the sentence names the tensor."""
    change_tensors(copy, change)
    refused(copy, *words)


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the Hub's protocol that a download uses: HEAD and GET of
    REPO/resolve/REVISION/FILE. Of weights, the server leaves the last `cut` bytes out."""

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        self.server.asked.append(self.path)
        file = self.server.root / self.path.split("/")[-1]
        found = self.path.startswith("/openai-community/gpt2/resolve/main/") and file.is_file()
        data = file.read_bytes() if found else b""
        self.send_response(200 if found else 404)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(data)))
        if found:
            self.send_header("ETag", f'"{hash(data) % 2**64:016x}"')
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if file.suffix == ".safetensors":
            data = data[: len(data) - self.server.cut]
        if body:
            self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def hub(copy):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.root = copy
    server.cut = 0
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def read_from_hub(address: str, home: Path) -> tuple[str, str]:
    """Return what a fresh process says, and warns, when it calls pretrained.read("gpt2").

    The client's pauses between retries are left out."""
    code = (
        "import time; time.sleep = lambda s: None\n"
        "import pretrained\n"
        "try: print('read', float(pretrained.read('gpt2')[1]['wte']['embedding'].sum()))\n"
        "except ValueError as e: print('refused:', e)"
    )
    env = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr.strip()


def test_download_from_the_hub(hub, tiny, tmp_path):
    """Catches a download that is not cached, a cache that is not found without a network, and a
    file that is half there."""
    address = f"http://127.0.0.1:{hub.server_port}"
    home = tmp_path / "home"
    hub.cut = 1000
    said, warned = read_from_hub(address, home)
    assert "refused: cannot get model.safetensors" in said
    assert warned.count("\n") == 0, warned
    (hub.root / "model.safetensors").rename(hub.root / "moved")
    said, _ = read_from_hub(address, home)
    assert "refused: cannot get model.safetensors" in said
    assert "404" in said
    (hub.root / "moved").rename(hub.root / "model.safetensors")
    hub.cut = 0
    weights_are_read = (f"read {float(tiny.params['wte']['embedding'].sum())}", "")
    assert read_from_hub(address, home) == weights_are_read
    hub.shutdown()
    hub.server_close()
    asked = len(hub.asked)
    assert read_from_hub(address, home) == weights_are_read
    assert len(hub.asked) == asked


def test_unreachable_hub_warns_once(tmp_path):
    """Catches the two lines that the Hub's client writes for each of its retries."""
    address = "http://127.0.0.1:9"  # nothing listens on port 9
    said, warned = read_from_hub(address, tmp_path)
    assert said.startswith("refused: cannot get config.json")
    assert address in said
    assert "connection" in said
    assert said.count("\n") == 0, said
    assert "Connection refused" in warned
    assert warned.count("\n") == 0, warned


class Collector(logging.Handler):
    """Keeps the messages that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def test_one_hub_warning_leaves_others_alone(monkeypatch):
    """Catches other records lost, a warning shown by two handlers, and a filter that stays."""
    import huggingface_hub.utils  # noqa: F401  attaches its handler now, not over ours

    on_client, on_root = Collector(), Collector()
    client = logging.getLogger("huggingface_hub")
    monkeypatch.setattr(client, "handlers", [on_client])
    monkeypatch.setattr(logging.getLogger(), "handlers", [on_root])  # as the server has one
    with one_hub_warning():
        client.getChild("file_download").warning("cannot read %s\ntrying again", "x")
        client.getChild("utils._http").warning("cannot reach x")
        client.error("no space")
        logging.getLogger("another").warning("something else")
    assert len(on_client.messages) == 2
    assert on_client.messages[0].startswith("cannot read x (")
    assert "\n" not in on_client.messages[0]
    assert on_client.messages[1] == "no space"
    assert on_root.messages == ["no space", "something else"]
    client.warning("afterwards")
    assert on_client.messages[-1] == on_root.messages[-1] == "afterwards"


def test_unknown_name_is_refused(tmp_path):
    """Catches a mistyped name that is looked for on the Hub."""
    refused(tmp_path / "gpt2-tiny", "gpt2-xl", "no directory")


def test_directory_without_a_model_is_refused(copy, tmp_path):
    """Catches a sentence that does not say what was looked for, and a run not known as one."""
    looked_for = ["config.json", "model.safetensors", "pytorch_model.bin", "train.py"]
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, str(empty), *looked_for)
    (empty / "config.json").write_text('{"model": {}}')
    refused(empty, str(empty), *looked_for)
    (empty / "checkpoints").mkdir()
    refused(empty, str(empty), "run of train.py", "export.py")
    (copy / "config.json").unlink()
    refused(copy, "there is no", "config.json")
