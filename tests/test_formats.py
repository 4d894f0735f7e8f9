"""Files of weights: every form that is read, and files that are damaged or hostile."""

import json
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.torch
import torch

import pretrained
from hugging_face import Tiny, make_tiny, refused, same


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("hf") / "tiny")


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    """A copy of the tiny directory, to damage."""
    return Path(shutil.copytree(tiny.directory, tmp_path / "copy"))


@pytest.mark.parametrize(
    "form", ["no prefix", "shards", "bin", "old bin", "bin shards", "buffers and head"]
)
def test_every_form_gives_the_same_parameters(tiny, copy, form):
    """Catches a form of checkpoint that is refused or read differently."""
    (copy / "model.safetensors").unlink()
    if form == "no prefix":
        tiny.hf.transformer.save_pretrained(copy)
    elif form == "shards":
        tiny.hf.save_pretrained(copy, max_shard_size="100KB")
        assert (copy / "model-00002-of-00005.safetensors").exists()
    else:
        save_bin(tiny.hf, copy, form)
    assert same(pretrained.read(copy)[1], tiny.params)


def save_bin(hf: torch.nn.Module, directory: Path, form: str) -> None:
    """Save weights as torch saves them, in one of four forms."""
    state = {name: t.clone() for name, t in hf.state_dict().items()}
    if form == "bin shards":
        names = sorted(state)
        halves = {"a.bin": names[::2], "b.bin": names[1::2]}
        for file, names_in_file in halves.items():
            torch.save({name: state[name] for name in names_in_file}, directory / file)
        weight_map = {name: file for file, names in halves.items() for name in names}
        index = directory / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        return
    if form == "buffers and head":
        for i in range(3):
            state[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 40, 40, dtype=torch.uint8)
            state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-float("inf"))
    else:
        del state["lm_head.weight"]
    as_zip = form != "old bin"
    torch.save(state, directory / "pytorch_model.bin", _use_new_zipfile_serialization=as_zip)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_half_precision_is_widened_exactly(tiny, copy, dtype, kind):
    """Catches half-precision bits read as another type, or rounded once more."""
    state = {name: t.to(dtype) for name, t in tiny.hf.state_dict().items()}
    del state["lm_head.weight"]
    (copy / "model.safetensors").unlink()
    if kind == "bin":
        torch.save(state, copy / "pytorch_model.bin")
    else:
        safetensors.torch.save_file(state, copy / "model.safetensors")
    rounded = jax.tree.map(lambda a: torch.tensor(a).to(dtype).float().numpy(), tiny.params)
    assert same(pretrained.read(copy)[1], rounded)


def test_index_that_leads_elsewhere_is_refused(tiny, copy):
    """Catches an index.json that makes us read outside the directory, and a missing shard."""
    (copy / "model.safetensors").rename(copy / "a.safetensors")
    index = copy / "model.safetensors.index.json"
    for file, word in (
        ("../tiny/model.safetensors", "beside"),
        ("b.safetensors", "missing"),
        ("..", "missing"),
        (str(tiny.directory / "model.safetensors"), "beside"),
    ):
        index.write_text(json.dumps({"weight_map": {"wte.weight": file}}))
        refused(copy, file, word)
    index.write_text(json.dumps({"weight_map": ["a.safetensors"]}))
    refused(copy, "weight_map")


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_fuzzed_files_raise_nothing_else(tiny, copy, kind):
    """Catches a parser's own exception on files that are cut short or have bytes changed."""
    if kind == "pytorch_model.bin":
        (copy / "model.safetensors").unlink()
        torch.save(tiny.hf.transformer.state_dict(), copy / kind)
    data = (copy / kind).read_bytes()
    rng = np.random.default_rng(0)
    for i in range(60):
        damage = ("cut short", "bytes changed", "bytes and end changed")[i % 3]
        damaged = damage_bytes(data, damage, rng)
        (copy / kind).write_bytes(damaged)
        try:
            pretrained.read(copy)
            assert len(damaged) == len(data)
        except ValueError as e:
            assert str(copy) in str(e) and "\n" not in str(e)


def damage_bytes(data: bytes, damage: str, rng: np.random.Generator) -> bytes:
    """Return data with the named damage at random places."""
    if damage == "cut short":
        return data[: rng.integers(len(data))]
    damaged = bytearray(data)
    head = min(len(data), 6000)  # headers and names; changed weights are other weights
    for position in rng.integers(0, head, 3):
        damaged[position] = rng.integers(256)
    if damage == "bytes and end changed":
        damaged[-200:] = rng.bytes(200)  # a zip's table of contents
    return bytes(damaged)


class Evil:
    """Unpickled by a careless reader, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize("form", ["zip", "old", "plain pickle"])
def test_nothing_in_a_bin_is_executed(tiny, copy, form):
    """Catches torch.load without weights_only."""
    (copy / "model.safetensors").unlink()
    file = copy / "pytorch_model.bin"
    mark = copy / "mark"
    evil = {**tiny.hf.transformer.state_dict(), "x": Evil(mark)}
    if form == "plain pickle":
        file.write_bytes(pickle.dumps({"x": Evil(mark)}, protocol=2))
    else:
        torch.save(evil, file, _use_new_zipfile_serialization=form == "zip")
    refused(copy, "pytorch_model.bin", "none of it was run")
    assert not mark.exists()
    if form == "plain pickle":
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert mark.exists()  # the trap works


def test_bombs_are_refused(tiny, copy):
    """Catches a small file that fills the memory.

    It is a packed zip, a tensor of stride 0, or a header of any length."""
    state = tiny.hf.transformer.state_dict()
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
