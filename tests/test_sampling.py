"""The sampler: which tokens it keeps, how it draws among them, and that all draw with it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import generation
import sample
from config import EngineConfig, GPTConfig, SampleConfig
from engine import Engine
from generation import Sampling
from model import GPT
from sampling import (
    Slots,
    StepNeeds,
    adjust_logits,
    ban_tokens,
    draw,
    invert_cumulative,
    mask_tokens,
    restrict_logits,
    sample_tokens,
    seed_words,
    slot_row,
    spell,
)
from sequence import SampleKey, SamplingParams, Sequence
from tokenizer import CharTokenizer

pytestmark = [pytest.mark.slow, pytest.mark.optimised]

V = 100
MODEL = GPTConfig(block_size=64, vocab_size=V, n_layer=2, n_head=2, n_embd=32)
ENGINE = EngineConfig(page_size=4, kv_blocks=51, max_num_seqs=1, prefill_tokens=32)
TOKENIZER = CharTokenizer("".join(map(chr, range(32, 127))) + "\näöüß")  # V characters
sample_tokens_jit = jax.jit(sample_tokens)
NOTHING = StepNeeds.of([], prompt_logprobs=False)._replace(draws=True)
PROMPT = 12  # tokens of the prompts of sequences that have new tokens too


@pytest.fixture(scope="module")
def model() -> GPT:
    """Return a tiny GPT whose probabilities are far from uniform."""
    fresh = GPT(MODEL, rngs=nnx.Rngs(0))
    return GPT.from_params(MODEL, jax.tree.map(lambda a: 4 * a, fresh.params()))


@pytest.fixture(scope="module")
def engine(model) -> Engine:
    return Engine(model, TOKENIZER, ENGINE, progress=False)


def top_k_of(params: SamplingParams) -> int:
    return V if params.top_k is None else params.top_k


def slots_of(rows: list[SamplingParams], tokens: list[list[int]] | None = None) -> Slots:
    """Return one slot for each of rows: after a prompt of one token or, with tokens, after these,
    of which the first PROMPT are the prompt."""
    sequences = []
    for i, row in enumerate(rows):
        prompt = [0] if tokens is None else tokens[i][:PROMPT]
        seq = Sequence(SampleKey(0, 0), prompt, row)
        seq.tokens = prompt if tokens is None else tokens[i]
        seq.bad_words = spell(row.bad_words, TOKENIZER)
        seq.stop_ids = set(row.stop_token_ids)
        sequences.append(seq)
    slots = [slot_row(seq, MODEL) for seq in sequences]
    return jax.device_put(jax.tree.map(lambda *columns: np.stack(columns), *slots))


def random_logits(rows: int, seed: int = 0) -> np.ndarray:
    """Return logits (rows, V), some rows flat and some peaked."""
    rng = np.random.default_rng(seed)
    spread = rng.uniform(0.1, 4, size=(rows, 1))
    return (rng.normal(size=(rows, V)) * spread).astype(np.float32)


def probabilities_by_sorting(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Return the probabilities that top_k, top_p and min_p leave, by sorting in float64."""
    order = np.argsort(-logits, kind="stable")
    x = logits[order].astype(np.float64) / params.temperature
    x[top_k_of(params) :] = -np.inf
    p = np.exp(x - x.max())
    p /= p.sum()
    before = np.cumsum(p) - p
    p[before >= params.top_p] = 0
    p[p < params.min_p * p.max()] = 0
    probabilities = np.zeros(len(x))
    probabilities[order] = p / p.sum()
    return probabilities


def test_the_kept_tokens_are_those_that_sorting_keeps():
    """Catches an edge off by one in top_k, top_p or min_p, and another row's settings."""
    rng = np.random.default_rng(0)
    logits = random_logits(64)
    rows = [
        SamplingParams(
            seed=0,
            temperature=float(rng.uniform(0.3, 2)),
            top_k=[None, 1, 5, 50][i % 4],
            top_p=[1, 0.9, 0.5, 0.01][i // 4 % 4],
            min_p=[0, 0.02, 0.5, 1][i // 16],
        )
        for i in range(64)
    ]
    slots = slots_of(rows)
    scaled = jnp.asarray(logits) / slots.temperature[:, None]
    kept = restrict_logits(scaled, slots.top_k, slots.top_p, slots.min_p)
    for row, params, probabilities in zip(logits, rows, jax.nn.softmax(kept), strict=True):
        expected = probabilities_by_sorting(row, params)
        np.testing.assert_allclose(probabilities, expected, rtol=1e-4)


PENALTIES = [
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.4},
    {"frequency_penalty": 0.9},
    {"frequency_penalty": -0.9},
    {"presence_penalty": 1.3},
    {"presence_penalty": -1.3},
    {"logit_bias": {3: 2.5, 50: -7.0}},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": -0.25},
]


def penalised(logits: np.ndarray, params: SamplingParams, tokens: list[int]) -> np.ndarray:
    """Return logits (V,) after the biases and penalties of a sequence, token by token."""
    x = logits.astype(np.float64)
    for token, bias in params.logit_bias.items():
        x[token] += bias
    new = tokens[PROMPT:]
    for token in set(tokens):
        x[token] *= params.repetition_penalty if x[token] < 0 else 1 / params.repetition_penalty
    for token in set(new):
        x[token] -= params.frequency_penalty * new.count(token) + params.presence_penalty
    return x


def test_penalties_are_those_of_plain_arithmetic():
    """Catches a penalty with the wrong sign, one that favours tokens whose logit is negative, one
    that counts the prompt or counts twice, and another row's penalties or tokens."""
    rng = np.random.default_rng(0)
    tokens = [rng.integers(20, size=PROMPT + 9 + i).tolist() for i in range(len(PENALTIES))]
    rows = [SamplingParams(seed=0, **penalties) for penalties in PENALTIES]
    logits = random_logits(len(rows), seed=3)
    for row, sequence in zip(logits, tokens, strict=True):
        assert len(set(np.sign(row[sequence[:PROMPT]]))) == 2, "both signs in the prompt"
        assert len(set(np.sign(row[sequence[PROMPT:]]))) == 2, "both signs among the new tokens"
    length = jnp.array([len(sequence) for sequence in tokens])
    slots = slots_of(rows, tokens)
    adjusted = adjust_logits(jnp.asarray(logits), slots, jnp.arange(len(rows)), length)
    expected = [penalised(*row) for row in zip(logits, rows, tokens, strict=True)]
    np.testing.assert_allclose(adjusted, expected, rtol=1e-5, atol=1e-5)


def test_bans_are_exact():
    """Catches a token that is allowed next to one that is not, a bad word that is banned too early,
    never, or by tokens of the prompt, and bans of another row."""
    word = TOKENIZER.encode("abc")
    a, b, c = word
    history = [0] * PROMPT
    abc = {"bad_words": ("abc",)}
    cases = [
        ({"allowed_token_ids": (0, 31, 32, 99)}, history, set(range(V)) - {0, 31, 32, 99}),
        ({"bad_words": ("a", "xyz")}, history, {a}),
        (abc, history, set()),
        (abc, [*history, a], set()),
        (abc, [*history, a, b], {c}),
        (abc, [*history, b, a], set()),
        (abc, [*history, 5, a, b, c], set()),
        (abc, [*history[2:], a, b], set()),  # by the prompt
        ({"bad_words": ("abc", "bb", "b")}, [*history, a, b], {b, c}),
        (
            {"bad_words": ("abc",), "allowed_token_ids": (a, c)},
            [*history, a, b],
            set(range(V)) - {a},
        ),
        ({}, [*history, a, b], set()),
    ]
    rows = [SamplingParams(seed=0, **params) for params, _, _ in cases]
    tokens = [sequence for _, sequence, _ in cases]
    length = jnp.array([len(sequence) for sequence in tokens])
    logits = random_logits(len(rows))
    slots = slots_of(rows, tokens)
    slot = jnp.arange(len(rows))
    masked = mask_tokens(jnp.asarray(logits), slots, slot)
    banned = np.asarray(ban_tokens(masked, slots, slot, length))
    for row, before, (params, sequence, expected) in zip(banned, logits, cases, strict=True):
        assert set(np.flatnonzero(row == -np.inf)) == expected, (params, sequence)
        remaining = row != -np.inf
        assert (row[remaining] == before[remaining]).all()


def test_a_draw_at_zero_is_of_a_token_that_is_not_banned():
    """Catches the first token, or the first of its block, drawn at u = 0 although it is banned."""
    x = np.full((3, 200), -np.inf, np.float32)
    expected = [1, 70, 199]
    for row, token in zip(x, expected, strict=True):
        row[token] = 1
    drawn = invert_cumulative(jnp.asarray(x), jnp.zeros((3, 2)))
    assert drawn.tolist() == expected


SEEN = 17  # a token that was generated, and is not the likeliest
EXTREMES = [
    ({"temperature": 1e-320}, {"temperature": 0}),
    ({"temperature": 1e-46}, {"temperature": 0}),
    ({"temperature": 1e-40}, {"temperature": 0}),
    ({"temperature": 1e-37}, {"temperature": 0}),
    ({"temperature": 1e-20}, {"temperature": 0}),
    ({"temperature": 1e-38, "top_p": 0.9}, {"temperature": 0}),
    ({"temperature": 1 + 1e-12}, {}),
    ({"top_p": 1e-320}, {"top_k": 1}),
    ({"top_p": 1e-46}, {"top_k": 1}),
    ({"top_p": 1e-38}, {"top_k": 1}),
    ({"top_p": 2e-38}, {"top_k": 1}),
    ({"top_p": 1 - 1e-12}, {}),
    ({"min_p": 1 - 1e-12}, {"top_k": 1}),
    ({"min_p": 1e-320}, {}),
    ({"min_p": 1e-40}, {}),
    ({"top_k": 10**30}, {}),
    ({"repetition_penalty": 1e-320}, {"logit_bias": {SEEN: 100}}),
    ({"repetition_penalty": 1e-40}, {"logit_bias": {SEEN: 100}}),
    ({"repetition_penalty": 1e-40, "temperature": 1e-20}, {"logit_bias": {SEEN: 100}}),
    ({"repetition_penalty": 1e4, "temperature": 1e-20}, {"temperature": 0}),
    ({"frequency_penalty": 1e4, "temperature": 1e-20}, {"temperature": 0}),
    ({"frequency_penalty": -1e4, "presence_penalty": -1e4}, {"logit_bias": {SEEN: 100}}),
    ({"frequency_penalty": 1e-320, "presence_penalty": -1e-46}, {}),
    ({"logit_bias": {SEEN: 1e4}, "temperature": 1e-20}, {"logit_bias": {SEEN: 100}}),
    ({"logit_bias": {SEEN: 1e4}, "temperature": 1e-36}, {"logit_bias": {SEEN: 100}}),
    ({"logit_bias": {SEEN: 1e-320}}, {}),
]


@pytest.mark.parametrize("params, limit", EXTREMES, ids=[str(params) for params, _ in EXTREMES])
def test_values_beyond_float32_act_as_their_limits(params, limit):
    """Catches a temperature, a top_p or a penalty that becomes 0, infinity or NaN on the device:
    then it gives token 0."""
    n = 32
    [logits] = random_logits(1, seed=5)
    logits[SEEN] = logits.max() - 0.1
    assert logits.argmax() > 0

    def tokens(**settings) -> list[int]:
        rows = [SamplingParams(seed=seed, **settings) for seed in range(n)]
        slots = slots_of(rows, [[0] * PROMPT + [SEEN]] * n)
        needs = StepNeeds.of(rows, prompt_logprobs=False)
        length = jnp.full(n, PROMPT + 1)
        rows_of_logits = np.tile(logits, (n, 1))
        return sample_tokens_jit(rows_of_logits, slots, jnp.arange(n), length, needs).tolist()

    assert tokens(**params) == tokens(**limit)


def test_top_k_and_top_p_keep_the_right_tokens():
    """Catches top_p that drops the token that crosses p, or keeps one too many; top_k off by one; a
    temperature that comes after top_p."""
    probs = np.array([0.5, 0.25, 0.125, 0.0625, 0.0625 - 1e-4, 1e-4])
    n = 4000
    logits = jnp.tile(jnp.log(jnp.asarray(probs, jnp.float32)), (n, 1))

    def tokens(**settings) -> np.ndarray:
        sampling = Sampling.create(SamplingParams(**settings), 0, n, len(probs))
        return np.asarray(sampling.draw(logits, jnp.arange(n)))

    assert set(tokens(top_k=2)) == {0, 1}
    assert set(tokens(top_p=0.6)) == {0, 1}
    assert set(tokens(top_p=0.49)) == {0}
    assert set(tokens(top_p=0.76)) == {0, 1, 2}
    assert set(tokens(min_p=0.3)) == {0, 1}
    assert set(tokens(temperature=0.5, top_p=0.72)) == {0}, "the first token has 0.75 there"
    assert (tokens(temperature=0) == 0).all()
    frequencies = np.bincount(tokens(), minlength=6) / n
    assert np.abs(frequencies - probs).max() < 0.03


@pytest.fixture(scope="module")
def many_draws() -> tuple[np.ndarray, np.ndarray]:
    """Return the probabilities (V,), and tokens drawn at 20,000 positions of one sequence."""
    n = 20_000
    logits = np.random.default_rng(1).normal(size=V).astype(np.float32) * 2
    slots = slots_of([SamplingParams(seed=7)])

    @jax.jit
    def tokens_at(position):
        rows = jnp.broadcast_to(logits, (n, V))
        return sample_tokens(rows, slots, jnp.zeros(n, jnp.int32), position, NOTHING)

    p = np.exp(logits.astype(np.float64))
    return p / p.sum(), np.asarray(tokens_at(jnp.arange(n, dtype=jnp.int32)))


def test_draws_follow_the_distribution(many_draws):
    """Catches a biased draw: chi-square over 20,000 positions; tokens expected less than 10 times
    are taken together."""
    p, tokens = many_draws
    often = p * len(tokens) >= 10
    counts = np.bincount(tokens, minlength=V)
    observed = np.append(counts[often], counts[~often].sum())
    expected = np.append(p[often], p[~often].sum()) * len(tokens)
    freedom = len(expected) - 1
    chi2 = ((observed - expected) ** 2 / expected).sum()
    message = f"chi-square {chi2:.1f} at {freedom} degrees of freedom"
    assert abs(chi2 - freedom) < 4 * math.sqrt(2 * freedom), message


def test_draws_at_neighbouring_positions_are_independent(many_draws):
    """Catches keys of neighbouring positions that are alike: serial correlation of the tokens'
    quantiles at lags 1 to 16."""
    p, tokens = many_draws
    quantile = (np.cumsum(p) - p / 2)[tokens]
    quantile = (quantile - quantile.mean()) / quantile.std()
    for lag in range(1, 17):
        correlation = (quantile[lag:] * quantile[:-lag]).mean()
        message = f"correlation {correlation:.4f} at lag {lag}"
        assert abs(correlation) < 4 / math.sqrt(len(tokens)), message


def test_every_part_of_the_address_changes_the_token():
    """Catches a half of the seed, an index or a position that does not reach the draw."""
    n = 1000

    @jax.jit
    def draw_uniformly(seed, index, position):
        return draw(
            jnp.zeros((n, V)),
            jnp.broadcast_to(seed, (n, 2)),
            jnp.full(n, index, jnp.int32),
            position + jnp.arange(n, dtype=jnp.int32),
            temperature=jnp.ones(n),
            top_k=jnp.full(n, V),
            top_p=jnp.ones(n),
            min_p=jnp.zeros(n),
            draws=True,
            restricts=False,
        )

    def tokens(seed=0, index=0, position=0) -> np.ndarray:
        return np.asarray(draw_uniformly(seed_words(seed), index, position))

    plain = tokens()
    assert (tokens(position=1)[:-1] == plain[1:]).all()
    for other in (tokens(seed=1), tokens(seed=2**32), tokens(seed=-1), tokens(index=1)):
        assert (other == plain).mean() < 0.05


def test_seed_words_are_the_halves_of_64_bits():
    """Catches halves in the wrong order, and negative or large seeds that lose bits or fail."""
    assert seed_words(5).tolist() == [0, 5]
    assert seed_words(3 * 2**32 + 5).tolist() == [3, 5]
    assert seed_words(-1).tolist() == [2**32 - 1, 2**32 - 1]
    assert seed_words(-(2**63)).tolist() == [2**31, 0]
    assert seed_words(5).dtype == np.uint32


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0},
        {"temperature": 0.8, "top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_generation_draws_what_the_engine_draws(settings):
    """Catches a second sampler: one that counts positions, splits seeds, restricts or draws in
    another way."""
    n, seed = 200, 2**40 - 100
    logits = jnp.asarray(random_logits(n))
    position = jnp.arange(n, dtype=jnp.int32) % 50
    rows = [SamplingParams(seed=seed + b, **settings) for b in range(n)]
    needs = NOTHING._replace(restricts=rows[0].restricts)
    by_engine = sample_tokens_jit(logits, slots_of(rows), jnp.arange(n), position, needs)
    by_generation = Sampling.create(rows[0], seed, n, V).draw(logits, position)
    np.testing.assert_array_equal(by_generation, by_engine)


@pytest.mark.parametrize("settings", [{}, {"top_k": 20}, {"top_p": 0.8, "min_p": 0.01}])
def test_generate_gives_the_tokens_of_the_engine(model, engine, settings):
    """Catches a seed, an index or a position that GPT.generate and Engine.generate understand
    differently. One stream within block_size."""
    prompt = [3, 1, 4, 1, 5]
    [row] = model.generate([prompt], 59, temperature=0.8, seed=11, **settings)
    params = SamplingParams(max_tokens=59, temperature=0.8, seed=11, **settings)
    [[output]] = engine.generate([prompt], params, progress=False)
    assert row[len(prompt) :] == output.token_ids


def test_what_sample_prints_is_the_engines_text(model, engine, tmp_path, capsys):
    """Catches a sample.py whose text for a seed is not the text that the server gives for it."""
    model.save_pretrained(tmp_path / "model", TOKENIZER)
    config = SampleConfig(
        init_from=str(tmp_path / "model"),
        start="To be",
        num_samples=3,
        max_new_tokens=40,
        temperature=0.8,
        top_k=30,
        seed=1337,
    )
    sample.main(config)
    printed = capsys.readouterr().out

    first = SamplingParams(max_tokens=40, temperature=0.8, top_k=30, seed=1337)
    seeds = [dataclasses.replace(first, seed=1337 + b) for b in range(3)]
    outputs = engine.generate([TOKENIZER.encode("To be")] * 3, seeds, progress=False)
    texts = ["To be" + output.text for [output] in outputs]
    title, _, samples = printed.partition("\n\n")
    assert title.endswith("parameters")
    assert samples == f"\n{'-' * 15}\n".join(texts) + "\n"


def test_another_setting_compiles_nothing(model):
    """Catches a temperature, top_k, top_p or seed that is a constant of the compiled program."""

    def programs() -> int:
        return generation.prefill._cache_size() + generation.decode._cache_size()

    model.generate([[1]], 5, temperature=0.8, top_k=5)
    compiled = programs()
    for settings in ({"temperature": 0}, {"top_k": 7}, {"top_p": 0.5, "seed": 3}, {}):
        model.generate([[1]], 5, **settings)
    assert programs() == compiled
