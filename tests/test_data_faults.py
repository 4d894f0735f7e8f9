"""Damaged data sets: each fault is found where it costs nothing, and named by file and figures."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import prepare
import train
from config import TrainConfig
from errors import UserError
from mesh import make_mesh
from tiny_training import TINY, TRAIN_TOKENS, VOCAB_SIZE
from training import token_files
from training.prepare_config import PrepareConfig
from training.token_files import TokenFile, get_batch, load_data, windows_in_order

pytestmark = pytest.mark.slow


@pytest.fixture
def prepared(tmp_path) -> Path:
    """A data set of characters that prepare.py wrote: 1,080 tokens to train on, 120 to validate."""
    text = tmp_path / "text.txt"
    text.write_text("abcdefghijkl" * 100)
    directory = tmp_path / "letters"
    prepare.main(PrepareConfig("text", input=(text,), tokenizer="char", out_dir=directory))
    return directory


def cut_short(directory: Path) -> None:
    """Leave out the last byte of train.bin."""
    file = directory / "train.bin"
    file.write_bytes(file.read_bytes()[:-1])


def cut_by_a_token(directory: Path) -> None:
    """Leave out the last token of val.bin."""
    file = directory / "val.bin"
    file.write_bytes(file.read_bytes()[:-2])


def swap_splits(directory: Path) -> None:
    """Put the wrong file in train.bin's place."""
    shutil.copy(directory / "val.bin", directory / "train.bin")


def empty(directory: Path) -> None:
    """Empty train.bin, and count no tokens in meta.json."""
    (directory / "train.bin").write_bytes(b"")
    change_meta(directory, train_tokens=0)


def lose(directory: Path) -> None:
    """Delete val.bin."""
    (directory / "val.bin").unlink()


def change_meta(directory: Path, **values: object) -> None:
    """Change fields of meta.json."""
    file = directory / "meta.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def change_token(file: Path, position: int, token: int) -> None:
    """Write another token into a file."""
    ids = np.fromfile(file, np.uint16)
    ids[position] = token
    ids.tofile(file)


@pytest.mark.parametrize(
    "damage, words",
    [
        (cut_short, ["train.bin", "2159 bytes", "1080 tokens", "2160"]),
        (cut_by_a_token, ["val.bin", "238 bytes", "120 tokens", "240"]),
        (swap_splits, ["train.bin", "240 bytes", "1080 tokens", "2160"]),
        (empty, ["train.bin", "is empty"]),
        (lose, ["there is no file", "val.bin"]),
        (lambda d: change_meta(d, dtype="uint32"), ["2160 bytes", "1080 tokens", "4320"]),
        (lambda d: change_meta(d, dtype="float64"), ["meta.json", "'float64'", "uint16"]),
        (lambda d: change_meta(d, vocab_size="12"), ["meta.json", "vocab_size='12'", "int"]),
        (lambda d: change_meta(d, vocab_size=0), ["meta.json", "vocab_size=0", "1"]),
        (lambda d: (d / "meta.json").write_text('{"vocab'), ["meta.json", "not JSON"]),
        (lambda d: (d / "meta.json").write_text("[]"), ["meta.json", "vocab_size"]),
    ],
)
def test_damage_is_found_at_the_start(prepared, tmp_path, damage: Callable, words):
    """Catches numpy's "Size of available data is not a multiple of the data-type size", a
    traceback, and a run that trains on what is left of a file."""
    damage(prepared)
    config = dataclasses.replace(TINY, data_dir=prepared, out_dir=tmp_path / "out")
    with pytest.raises(UserError) as error:
        train.main(config)
    for word in words:
        assert word in str(error.value)
    assert "prepare the data again" in str(error.value)
    assert not config.out_dir.exists()


def test_files_of_other_programs_need_no_counts(data_dir, tmp_path):
    """Catches a check of sizes that refuses a meta.json without train_tokens, and no check at all
    where there are no counts."""
    directory = tmp_path / "letters"
    shutil.copytree(data_dir, directory)
    files, meta = load_data(directory)
    assert "train_tokens" not in meta
    assert len(files["train"].read()) == TRAIN_TOKENS
    cut_short(directory)
    with pytest.raises(UserError, match="train.bin has 5999 bytes.*uint16.*2 bytes.*cut short"):
        load_data(directory)


def test_a_batch_with_an_id_past_the_vocabulary_is_refused(tmp_path):
    """Catches a loss of nan, with the advice to lower the learning rate; a check of the first rows
    alone; another position than the file's; an id that int32 makes negative; the largest id taken
    for the vocabulary's size."""
    positions = np.arange(1000) % VOCAB_SIZE
    positions[777] = VOCAB_SIZE
    file = TokenFile(tmp_path / "x.bin", "uint32", VOCAB_SIZE)
    positions.astype(np.uint32).tofile(file.path)
    reasons = set()
    refused = 0
    batches = 13  # of 8 windows of 10 tokens: a bit more than the 99 of an epoch
    for t in range(batches):
        try:
            get_batch(file, t, (2, 4, 10), seed=1)
        except UserError as error:
            refused += 1
            reasons.add(str(error))
    assert 1 <= refused <= 4  # the last token of a window is the first of another
    (reason,) = reasons
    assert f"{file.path} has token 23 at position 777" in reason
    assert "only 23 tokens" in reason

    past_int32 = positions.astype(np.uint32)
    past_int32[777] = 2**32 - 1
    past_int32.tofile(file.path)
    with pytest.raises(UserError, match=f"token {2**32 - 1} at position 777"):
        list(windows_in_order(file, (4, 10)))


def test_training_and_evaluation_refuse_the_token(data_dir, tmp_path, monkeypatch):
    """Catches a check that the loader's thread keeps for itself, an evaluation without one, and
    files that are opened without their vocabulary."""
    shutil.copytree(data_dir, tmp_path / "letters")
    files, _ = load_data(tmp_path / "letters")
    epoch = dataclasses.replace(TINY, max_iters=50, eval_full=True)
    evaluated = dataclasses.replace(epoch, eval_iters=50)
    no_model = SimpleNamespace(mesh=make_mesh("data:1", jax.devices()[:1]))
    monkeypatch.setattr(train, "eval_step", lambda state, tokens, config: 0.0)

    def estimate(split: str, config: TrainConfig) -> None:
        train.estimate_loss(no_model, config, {split: files[split]})

    change_token(files["train"].path, 100, 60_000)
    with pytest.raises(UserError, match="train.bin has token 60000 at position 100,"):
        list(train.batches(files["train"], epoch, 0))
    with pytest.raises(UserError, match="train.bin has token 60000 at position 100,"):
        estimate("train", evaluated)
    change_token(files["val"].path, 400, 23)
    with pytest.raises(UserError, match="val.bin has token 23 at position 400,"):
        estimate("val", epoch)


def test_verify_proves_the_files(prepared, capsys):
    """Catches --verify that writes, that needs --input, or that says nothing."""
    before = {path: path.read_bytes() for path in prepared.iterdir()}
    capsys.readouterr()
    prepare.main(PrepareConfig("text", verify=True, out_dir=prepared))
    assert capsys.readouterr().out == (
        f"{prepared}: verified, vocabulary of 12 (char), 1,080 tokens to train on, "
        "120 to validate\n"
    )
    assert {path: path.read_bytes() for path in prepared.iterdir()} == before


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda d: change_token(d / "train.bin", 1079, 3), ["train.bin", "SHA-256"]),
        (lambda d: change_token(d / "val.bin", 0, 3), ["val.bin", "SHA-256"]),
        (lambda d: change_token(d / "val.bin", 119, 12), ["val.bin", "token 12 at position 119"]),
        (lambda d: change_meta(d, val_sha256="0" * 64), ["val.bin", "0" * 64]),
        (cut_short, ["2159 bytes"]),
    ],
)
def test_verify_finds_every_changed_byte(prepared, monkeypatch, damage: Callable, words):
    """Catches a digest of the first piece alone, or of one split; a position within its piece."""
    monkeypatch.setattr(token_files, "TOKENS_AT_ONCE", 100)
    damage(prepared)
    with pytest.raises(UserError) as error:
        prepare.main(PrepareConfig("text", verify=True, out_dir=prepared))
    for word in words:
        assert word in str(error.value)


def test_verify_needs_something_to_compare_with(data_dir, prepared):
    """Catches a data set called verified that has no digest, and --input silently unused."""
    with pytest.raises(UserError, match="no train_sha256"):
        prepare.main(PrepareConfig("text", verify=True, out_dir=data_dir))
    with pytest.raises(UserError, match="leave out --input"):
        prepare.main(PrepareConfig("text", verify=True, input=(prepared,), out_dir=prepared))
    with pytest.raises(UserError, match="there is no data in"):
        prepare.main(PrepareConfig("text", verify=True, out_dir=prepared / "nowhere"))
