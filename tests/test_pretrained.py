"""Weights in from Hugging Face's form and out to it: against transformers, and against files that are
wrong."""

import http.server
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import threading
import tracemalloc
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from flax import nnx

import pretrained
import tokenizer
from config import GPTConfig
from model import GPT

ROOT = Path(__file__).parent.parent


def make_hf(seed=0, **fields) -> transformers.GPT2LMHeadModel:
    """A GPT-2 of transformers in which every parameter is random, so that none can be swapped or left out
    unnoticed."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(seed)
    sizes = dict(n_embd=48, n_layer=3, n_head=4, n_positions=40, vocab_size=131)
    config = transformers.GPT2Config(bos_token_id=None, eos_token_id=None, **sizes | fields)
    hf = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, p in hf.named_parameters():
            p.normal_(1.0 if "ln_" in name and "weight" in name else 0.0, 0.15)
    return hf


def hf_logits(hf, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return hf(torch.tensor(tokens)).logits.numpy()


def our_logits(model, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(lambda m, t: m(t)[0])(model, tokens))[..., : model.config.vocab_size]


def flat(params: dict) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): np.asarray(a) for path, a in leaves}


def random_params(config: GPTConfig) -> dict:
    """Parameters as numpy arrays; the padding of wte is 0."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0)).params())
    params = jax.tree.map(lambda a: rng.normal(0, 0.2, a.shape).astype(np.float32), shapes)
    params["wte"]["embedding"][config.vocab_size :] = 0
    return params


def same(a: dict, b: dict) -> bool:
    a, b = flat(a), flat(b)
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(a model of transformers, its directory, what pretrained.read makes of it)"""
    directory = tmp_path_factory.mktemp("hf") / "tiny"
    hf = make_hf()
    hf.save_pretrained(directory)
    return hf, directory, pretrained.read(directory)[1]


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of the tiny directory, to damage."""
    return Path(shutil.copytree(tiny[1], tmp_path / "copy"))


def change_tensors(directory: Path, change) -> None:
    file = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})


def refused(directory: Path, *words: str) -> None:
    with pytest.raises(ValueError) as e:
        pretrained.read(directory)
    assert all(word in str(e.value) for word in words), e.value
    assert "\n" not in str(e.value)


# The head counts of small, medium, large and XL with narrow heads; odd vocabularies and lengths; all activations.
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
    """Catches any wrong name, transposed square kernel, split of q, k and v, epsilon, activation or padding
    of the vocabulary."""
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
    for prompt, row in zip(prompts, ours):
        theirs = hf.generate(
            torch.tensor([prompt]),
            max_new_tokens=64,
            do_sample=False,
            pad_token_id=0,
            attention_mask=torch.ones(1, len(prompt), dtype=int),
        )
        assert row == theirs[0].tolist()


@pytest.mark.parametrize(
    "form", ["no prefix", "shards", "bin", "old bin", "bin shards", "buffers and head"]
)
def test_every_form_gives_the_same_parameters(tiny, copy, form):
    """Catches a form of checkpoint that is refused or read differently."""
    hf, _, params = tiny
    (copy / "model.safetensors").unlink()
    state = {name: t.clone() for name, t in hf.state_dict().items()}
    if form == "no prefix":
        hf.transformer.save_pretrained(copy)
    elif form == "shards":
        hf.save_pretrained(copy, max_shard_size="100KB")
        assert (copy / "model-00002-of-00005.safetensors").exists()
    elif form == "bin shards":
        names = sorted(state)
        halves = {"a.bin": names[::2], "b.bin": names[1::2]}
        for file, some in halves.items():
            torch.save({name: state[name] for name in some}, copy / file)
        index = {"weight_map": {name: file for file, some in halves.items() for name in some}}
        (copy / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        if form == "buffers and head":
            for i in range(3):
                state[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 40, 40, dtype=torch.uint8)
                state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-float("inf"))
        else:
            del state["lm_head.weight"]
        torch.save(
            state, copy / "pytorch_model.bin", _use_new_zipfile_serialization=form != "old bin"
        )
    assert same(pretrained.read(copy)[1], params)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_half_precision_is_widened_exactly(tiny, copy, dtype, kind):
    """Catches half-precision bits read as another type, or rounded once more."""
    state = {
        name: t.to(dtype) for name, t in tiny[0].state_dict().items() if name != "lm_head.weight"
    }
    (copy / "model.safetensors").unlink()
    if kind == "bin":
        torch.save(state, copy / "pytorch_model.bin")
    else:
        safetensors.torch.save_file(state, copy / "model.safetensors")
    rounded = jax.tree.map(lambda a: torch.tensor(a).to(dtype).float().numpy(), tiny[2])
    assert same(pretrained.read(copy)[1], rounded)


def test_overrides(tiny):
    """Catches a block_size that is ignored or crops the wrong end, and a conflict that is silently
    resolved."""
    hf, directory, _ = tiny
    model = GPT.from_pretrained(directory, block_size=9, dropout=0.25, vocab_multiple=7, n_head=4)
    assert (model.config.block_size, model.config.dropout, model.config.padded_vocab_size) == (
        9,
        0.25,
        133,
    )
    tokens = np.arange(18).reshape(2, 9)
    np.testing.assert_allclose(our_logits(model, tokens), hf_logits(hf, tokens), rtol=0, atol=1e-4)
    for override, words in (
        ({"block_size": 41}, ("41", "40")),
        ({"n_head": 6}, ("n_head=6", "n_head=4")),
        ({"activation": "relu"}, ("relu", "gelu_new")),
        ({"bias": False}, ("bias=False",)),
        ({"vocab_size": 65}, ("65", "131")),
    ):
        with pytest.raises(ValueError) as e:
            pretrained.read(directory, **override)
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
    """Catches padding that is exported, biases that are lost or invented, and ids of GPT-2 in a model without
    an end token."""
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
    model.save_pretrained(
        tmp_path / "out", tokenizer.CharTokenizer("".join(map(chr, range(40, 110))))
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]

    hf, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert (
        not any(report.values()) and hf.config.vocab_size == 70 and hf.config.eos_token_id is None
    )
    tokens = np.random.default_rng(0).integers(0, 70, (2, 40))
    np.testing.assert_allclose(hf_logits(hf, tokens), our_logits(model, tokens), rtol=0, atol=1e-4)
    hf.save_pretrained(tmp_path / "again")
    for directory in ("out", "again"):
        back_config, back = pretrained.read(tmp_path / directory, bias=bias, dropout=0.1)
        assert back_config == config and same(back, params)
    with_biases = pretrained.read(tmp_path / "out")[1]
    assert same(
        {"b": flat(with_biases)["['h']['attn']['c_attn']['bias']"]},
        {"b": params["h"]["attn"]["c_attn"]["bias"] if bias else np.zeros((3, 144), np.float32)},
    )
    with pytest.raises(ValueError, match="exists already"):
        model.save_pretrained(tmp_path / "out", tokenizer.CharTokenizer("ab"))


def test_export_is_complete_or_invisible(tmp_path, monkeypatch):
    """Catches a directory that appears under its name before everything is in it."""
    config = GPTConfig(block_size=8, vocab_size=3, n_layer=1, n_head=1, n_embd=8)
    model = GPT.from_params(config, random_params(config))

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(pretrained, "write_tokenizer", full_disk)
    with pytest.raises(OSError):
        model.save_pretrained(tmp_path / "out", tokenizer.CharTokenizer("abc"))
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    model.save_pretrained(
        tmp_path / "out", tokenizer.CharTokenizer("abc")
    )  # what was left is no obstacle
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


TEXT = "Hello, world!  It's 12345 o'clock\n\n\tdéjà vu 世界 🙂 \u0000 don't\r\n   "


def test_exported_char_tokenizer(tmp_path):
    """Catches tokens joined by spaces, lost whitespace, and ids in another order than the checkpoint's."""
    tok = tokenizer.CharTokenizer("".join(sorted(set(TEXT))))
    pretrained.write_tokenizer(tmp_path, tok, 16)
    pretrained.save_json(tmp_path / "config.json", {"model_type": "gpt2"})
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert hf(TEXT).input_ids == tok.encode(TEXT) and hf.decode(tok.encode(TEXT)) == TEXT
    assert pretrained.load_tokenizer(tmp_path).meta() == tok.meta()


def test_exported_gpt2_tokenizer(tmp_path, shared):
    """Catches merges that were not recovered as OpenAI published them, and an id that moved."""
    cache = shared / "tiktoken_cache"
    tok = tokenizer.GPT2Tokenizer()
    pretrained.write_tokenizer(tmp_path, tok, 1024)
    pretrained.save_json(tmp_path / "config.json", {"model_type": "gpt2"})
    vocab, merges = next(cache.glob("6c7e*")), next(cache.glob("6d1c*"))  # as published
    assert json.loads((tmp_path / "vocab.json").read_text()) == json.loads(vocab.read_text())
    pairs = lambda path: path.read_text(encoding="utf-8").splitlines()[1:]
    assert pairs(tmp_path / "merges.txt") == pairs(merges)
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (
        hf(TEXT).input_ids == tok.encode(TEXT) == pretrained.load_tokenizer(tmp_path).encode(TEXT)
    )
    assert hf.decode(tok.encode(TEXT)) == TEXT and hf.eos_token_id == tok.eos_id
    pretrained.write_tokenizer(tmp_path / "..", pretrained.load_tokenizer(tmp_path), 1024)
    pretrained.save_json(tmp_path / "../config.json", {"model_type": "gpt2"})
    again = pretrained.load_tokenizer(tmp_path / "..")
    assert again.encode(TEXT) == tok.encode(TEXT) and again.eos_id == tok.eos_id


@pytest.mark.parametrize(
    "field, value, word",
    [
        ("model_type", "llama", "llama"),
        ("model_type", None, "model_type"),
        ("scale_attn_by_inverse_layer_idx", True, "inverse_layer"),
        ("scale_attn_weights", False, "scale_attn"),
        ("add_cross_attention", True, "add_cross_attention"),
        ("tie_word_embeddings", False, "tie_word"),
        ("activation_function", "mish", "mish"),
        ("n_inner", 100, "n_inner"),
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
    """Catches a field that is assumed instead of read, and sizes that are believed before they are
    compared."""
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {field: value}))
    refused(copy, word)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\udcff"])
def test_config_that_is_no_object_is_refused(copy, text):
    """Catches a parser's own exception reaching the user."""
    (copy / "config.json").write_text(text, errors="surrogateescape")
    refused(copy, "config.json")


def without(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.update({name: value})


def put_one(value):
    def change(tensors):
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


def test_index_that_leads_elsewhere_is_refused(tiny, copy):
    """Catches an index.json that makes us read outside the directory, and a shard that is missing."""
    (copy / "model.safetensors").rename(copy / "a.safetensors")
    index = copy / "model.safetensors.index.json"
    for file, word in (
        ("../tiny/model.safetensors", "beside"),
        ("b.safetensors", "missing"),
        ("..", "missing"),
        (str(tiny[1] / "model.safetensors"), "beside"),
    ):
        index.write_text(json.dumps({"weight_map": {"wte.weight": file}}))
        refused(copy, file, word)
    index.write_text(json.dumps({"weight_map": ["a.safetensors"]}))
    refused(copy, "weight_map")


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_fuzzed_files_raise_nothing_else(tiny, copy, kind):
    """Catches an exception of a parser that is not a sentence, on files cut short or with bytes changed."""
    if kind == "pytorch_model.bin":
        (copy / "model.safetensors").unlink()
        torch.save(tiny[0].transformer.state_dict(), copy / kind)
    data, rng = (copy / kind).read_bytes(), np.random.default_rng(0)
    for i in range(60):
        if i % 3:
            bad = bytearray(data)
            head = min(len(data), 6000)  # headers and names; changed weights are other weights
            for at in rng.integers(0, head, 3):
                bad[at] = rng.integers(256)
            if i % 3 == 2:
                bad[-200:] = rng.bytes(200)  # a zip's table of contents
        else:
            bad = data[: rng.integers(len(data))]
        (copy / kind).write_bytes(bad)
        try:
            pretrained.read(copy)
            assert len(bad) == len(data)
        except ValueError as e:
            assert str(copy) in str(e) and "\n" not in str(e)


class Evil:
    """Unpickled by a careless reader, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize("form", ["zip", "old", "plain pickle"])
def test_nothing_in_a_bin_is_executed(tiny, copy, form):
    """Catches torch.load without weights_only."""
    (copy / "model.safetensors").unlink()
    file, mark = copy / "pytorch_model.bin", copy / "mark"
    evil = {**tiny[0].transformer.state_dict(), "x": Evil(mark)}
    if form == "plain pickle":
        file.write_bytes(pickle.dumps({"x": Evil(mark)}, protocol=2))
    else:
        torch.save(evil, file, _use_new_zipfile_serialization=form == "zip")
    refused(copy, "pytorch_model.bin", "none of it was run")
    assert not mark.exists()
    pickle.loads(file.read_bytes()) if form == "plain pickle" else torch.load(
        file, weights_only=False
    )
    assert mark.exists()  # the trap works


def test_bombs_are_refused(tiny, copy):
    """Catches a small file that fills the memory: a packed zip, a tensor of stride 0, a header of any
    length."""
    state = tiny[0].transformer.state_dict()
    (copy / "model.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{}")
    refused(copy, "model.safetensors")
    (copy / "model.safetensors").unlink()
    file = copy / "pytorch_model.bin"
    torch.save(state, copy / "plain")
    with (
        zipfile.ZipFile(copy / "plain") as plain,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in plain.infolist():
            bomb = entry.filename.endswith("/data/0")
            packed.writestr(entry.filename, b"\0" * 10**7 if bomb else plain.read(entry))
    refused(copy, "unpack")
    torch.save({name: torch.zeros(1).expand(t.shape) for name, t in state.items()}, file)
    refused(copy, "bytes")


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the Hub's protocol that a download uses: HEAD and GET of REPO/resolve/REVISION/FILE."""

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        self.server.asked.append(self.path)
        file = self.server.root / self.path.split("/")[-1]
        found = self.path.startswith("/openai-community/gpt2/resolve/main/") and file.is_file()
        data = file.read_bytes() if found else b""
        self.send_response(200 if found else 404)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(data)))
        etag = f'"{hash(data) % 2**64:016x}"'
        self.send_header(*(("ETag", etag) if found else ("X-Error-Code", "EntryNotFound")))
        self.end_headers()
        if body:
            self.wfile.write(
                data[: len(data) - self.server.cut] if file.suffix == ".safetensors" else data
            )

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(copy):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.root, server.cut, server.asked = copy, 0, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def read_from_hub(address: str, home: Path) -> str:
    """What a fresh process says after pretrained.read("gpt2"); the client's pauses between retries are left
    out."""
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
    return done.stdout.strip()


def test_download_from_the_hub(hub, tiny, tmp_path):
    """Catches a download that is not cached, a cache that is not found without a network, and a file that is
    half there."""
    address, home = f"http://127.0.0.1:{hub.server_port}", tmp_path / "home"
    hub.cut = 1000
    assert "refused: cannot get model.safetensors" in read_from_hub(address, home)
    (hub.root / "model.safetensors").rename(hub.root / "moved")
    said = read_from_hub(address, home)
    assert "refused: cannot get model.safetensors" in said and "404" in said
    (hub.root / "moved").rename(hub.root / "model.safetensors")
    hub.cut = 0
    read = f"read {float(tiny[2]['wte']['embedding'].sum())}"
    assert read_from_hub(address, home) == read
    hub.shutdown()
    hub.server_close()
    asked = len(hub.asked)
    assert read_from_hub(address, home) == read and len(hub.asked) == asked
    said = read_from_hub(address, tmp_path / "empty")
    assert "refused: cannot get config.json" in said and address in said and "connection" in said


def test_unknown_name_is_refused(tmp_path):
    """Catches a mistyped name that is looked for on the Hub."""
    refused(tmp_path / "gpt2-tiny", "gpt2-xl", "no directory")
    refused(tmp_path, "no", "config.json")
