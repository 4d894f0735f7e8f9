import dataclasses
import json

import jax
import numpy as np
import pytest

import export
import pretrained
from checkpoints import Checkpoints
from config import ExportConfig, GPTConfig, TrainConfig
from model import GPT
from tokenizer import CharTokenizer
from utils import TrainState, load_model


def test_export_is_the_checkpoint(tmp_path, capsys):
    """Catches another checkpoint than the best, and a parameter that changes on the way out or back in."""
    model = GPTConfig(block_size=8, vocab_size=5, n_layer=2, n_head=2, n_embd=8, bias=False)
    config = TrainConfig(model=model, max_iters=10, warmup_iters=1)
    state, tok = TrainState.create(config), CharTokenizer("abcd\n")
    checkpoints = Checkpoints(tmp_path / "run")
    for step, loss in ((1, 2.0), (2, 3.0)):
        params = jax.tree.map(lambda a: a + step, state.params)
        checkpoints.save(dataclasses.replace(state, step=state.step + step, params=params), loss)
    checkpoints.close()
    (tmp_path / "run/config.json").write_text(json.dumps({"model": dataclasses.asdict(model)}))
    (tmp_path / "run/meta.json").write_text(json.dumps(tok.meta()))

    export.main(ExportConfig(out_dir=tmp_path / "run", to=tmp_path / "hf"))
    assert "step 1" in capsys.readouterr().out
    ours, back = load_model(tmp_path / "run")[0], GPT.from_pretrained(tmp_path / "hf", bias=False)
    assert back.config == ours.config
    rows = lambda params: jax.tree.map(np.asarray, params | {"wte": params["wte"]["embedding"][:5]})
    assert all(
        jax.tree.leaves(jax.tree.map(np.array_equal, rows(ours.params()), rows(back.params())))
    )
    assert pretrained.load_tokenizer(tmp_path / "hf").meta() == tok.meta()
    with pytest.raises(ValueError, match="exists already"):
        export.main(ExportConfig(out_dir=tmp_path / "run", to=tmp_path / "hf"))
