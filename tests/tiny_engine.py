"""A tiny model, an engine for it, and what the tests of the engine share: not a test file
itself."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from config import EngineConfig, GPTConfig
from engine import Engine
from model import GPT
from sequence import Output, SamplingParams
from tokenizer import Tokenizer

CONFIG = GPTConfig(block_size=64, vocab_size=100, n_layer=2, n_head=2, n_embd=64)
LAYOUT = EngineConfig(
    page_size=4, kv_blocks=51, max_num_seqs=4, prefill_tokens=32, num_scheduler_steps=1
)
GREEDY = SamplingParams(max_tokens=8, temperature=0)
END = 99  # the end-of-text token of Words


class Words(Tokenizer):
    """Token i is a short word; END ends the text."""

    name = "words"
    vocab_size = 100
    eos_id = END
    special_tokens = {}
    words = [chr(97 + i % 7) + chr(97 + i % 5) + " " * (i % 3 == 0) for i in range(END)] + ["<end>"]

    def encode(self, text: str) -> list[int]:
        """Raise: some words are the same, so a text has no tokens of its own."""
        raise NotImplementedError

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of a word."""
        return self.words[token].encode()

    def meta(self) -> dict:
        """Return nothing: it is not stored."""
        return {}


def make_model() -> GPT:
    """Return the tiny model with random parameters, always the same."""
    return GPT(CONFIG, rngs=nnx.Rngs(0))


def make_engine(model: GPT, tokenizer: Tokenizer | None) -> Engine:
    """Return an engine with few slots and pages. All of them share their compiled programs."""
    return Engine(model, tokenizer, LAYOUT, progress=False)


def prompts_of(lengths, seed: int = 0) -> list[list[int]]:
    """Return random prompts of these lengths, without the last ten tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(90, size=n).tolist() for n in lengths]


def generate(engine: Engine, prompt: list[int], **params) -> Output:
    """Return the one sample of one prompt."""
    [[output]] = engine.generate([prompt], SamplingParams(**params), progress=False)
    return output


def dense_logprobs(model: GPT, rows: list[list[int]]) -> np.ndarray:
    """(B, T, V) of what follows each of the tokens (B, T), in one uncached forward pass."""
    return np.asarray(jax.nn.log_softmax(model(jnp.array(rows))[0]))
