"""A trained model as a Hugging Face directory."""

import dataclasses
import json
import os
import stat

import jax
import numpy as np
import pytest
from transformers import AutoTokenizer

import export
import pretrained
from config import ExportConfig, GPTConfig, TrainConfig
from errors import UserError
from formats.checksums import seal
from model import GPT
from tokenizer import CharTokenizer
from training.checkpoints import Checkpoints
from utils import TrainState, load_model

pytestmark = pytest.mark.slow

SHAPE = GPTConfig(block_size=8, vocab_size=5, n_layer=2, n_head=2, n_embd=8, bias=False)


@pytest.fixture
def run_dir(tmp_path):
    """A run with two checkpoints, of which the first is the best."""
    directory = tmp_path / "run"
    state = TrainState.create(TrainConfig(model=SHAPE, max_iters=10, warmup_iters=1))
    checkpoints = Checkpoints(directory)
    for step, loss in ((1, 2.0), (2, 3.0)):
        params = jax.tree.map(lambda a, step=step: a + step, state.params)
        at_step = dataclasses.replace(state, step=state.step + step, params=params)
        checkpoints.save(at_step, loss)
    checkpoints.close()
    meta = CharTokenizer("abcd\n").meta()
    (directory / "config.json").write_text(json.dumps(seal({"model": dataclasses.asdict(SHAPE)})))
    (directory / "meta.json").write_text(json.dumps(seal(meta)))
    return directory


def without_padding(model):
    """The parameters, without the rows of the embedding that belong to no token."""
    params = model.params()
    rows = params["wte"]["embedding"][: SHAPE.vocab_size]
    return jax.tree.map(np.asarray, params | {"wte": rows})


def test_export_is_the_checkpoint(tmp_path, run_dir, capsys):
    """Catches another checkpoint than the best, and a parameter that changes on the way out or
    back in."""
    exported = tmp_path / "hf"
    export.main(ExportConfig(out_dir=run_dir, to=exported))
    assert "step 1" in capsys.readouterr().out

    ours, tokenizer, _ = load_model(run_dir)
    back = GPT.from_pretrained(exported, bias=False)
    assert back.config == ours.config
    jax.tree.map(np.testing.assert_array_equal, without_padding(ours), without_padding(back))
    assert pretrained.load_tokenizer(exported).meta() == tokenizer.meta()


def test_an_existing_directory_is_not_overwritten(tmp_path, run_dir):
    """Catches an export that mixes its files with those of an earlier one."""
    with pytest.raises(UserError, match="exists already"):
        export.main(ExportConfig(out_dir=run_dir, to=tmp_path))


def test_a_server_of_another_user_can_read_all_of_it(tmp_path, run_dir):
    """Catches weights that only their owner may read, among files that all may."""
    exported = tmp_path / "hf"
    umask = os.umask(0o022)
    try:
        export.main(ExportConfig(out_dir=run_dir, to=exported))
    finally:
        os.umask(umask)
    modes = {path.name: stat.filemode(path.stat().st_mode) for path in exported.iterdir()}
    assert set(modes.values()) == {"-rw-r--r--"}, modes


def test_an_exported_character_tokenizer_refuses_what_it_does_not_know(tmp_path, run_dir):
    """Catches characters that transformers drops without a word."""
    export.main(ExportConfig(out_dir=run_dir, to=tmp_path / "hf"))
    exported = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert exported.encode("ab\nd") == [0, 1, 4, 3]
    assert exported.decode([0, 1, 4, 3]) == "ab\nd"
    assert len(exported) == SHAPE.vocab_size
    with pytest.raises(Exception, match="character outside of the vocabulary"):
        exported.encode("abX")
