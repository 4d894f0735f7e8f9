"""Tiny GPT-2s of transformers, and what the tests of loading compare: not a test file itself."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import pretrained
from config import GPTConfig
from model import GPT


class Tiny(NamedTuple):
    """A GPT-2 of transformers, the directory it was saved in, and what pretrained.read returns."""

    hf: transformers.GPT2LMHeadModel
    directory: Path
    params: dict[str, Any]


def make_tiny(directory: Path) -> Tiny:
    """Save a GPT-2 of three layers in directory."""
    hf = make_hf()
    hf.save_pretrained(directory)
    return Tiny(hf, directory, pretrained.read(directory)[1])


def make_hf(seed: int = 0, **fields: Any) -> transformers.GPT2LMHeadModel:
    """Return a GPT-2 of transformers.

    Every parameter is random, so that none can be swapped or left out unnoticed."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(seed)
    sizes = {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 40, "vocab_size": 131}
    config = transformers.GPT2Config(bos_token_id=None, eos_token_id=None, **sizes | fields)
    hf = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, p in hf.named_parameters():
            is_scale = "ln_" in name and "weight" in name
            p.normal_(1.0 if is_scale else 0.0, 0.15)
    return hf


def hf_logits(hf: transformers.GPT2LMHeadModel, tokens: np.ndarray) -> np.ndarray:
    """Return transformers' logits (B, T, V) for tokens (B, T)."""
    with torch.no_grad():
        return hf(torch.tensor(tokens)).logits.numpy()


def our_logits(model: GPT, tokens: np.ndarray) -> np.ndarray:
    """Return our logits (B, T, V) for tokens (B, T), without the padding of the vocabulary."""
    logits = jax.jit(lambda model, tokens: model(tokens)[0])(model, tokens)
    return np.asarray(logits)[..., : model.config.vocab_size]


def random_params(config: GPTConfig) -> dict[str, Any]:
    """Return parameters as numpy arrays. The padding of wte is 0."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0)).params())
    params = jax.tree.map(lambda a: rng.normal(0, 0.2, a.shape).astype(np.float32), shapes)
    params["wte"]["embedding"][config.vocab_size :] = 0
    return params


def flat(params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the leaves of nested dicts by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): np.asarray(a) for path, a in leaves}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Return whether two trees have the same leaves, bit by bit."""
    a, b = flat(a), flat(b)
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def refused(directory: Path, *words: str) -> None:
    """Check that reading the directory raises one line with all these words."""
    with pytest.raises(ValueError) as e:
        pretrained.read(directory)
    assert all(word in str(e.value) for word in words), e.value
    assert "\n" not in str(e.value)
