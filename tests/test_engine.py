"""The engine on a tiny model: against the dense model, against itself in other circumstances, and each SamplingParams."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from same_bits import compare, run

import engine as engine_module
import sampling
from config import EngineConfig, GPTConfig
from engine import Engine
from model import GPT
from sampling import Slots, StepNeeds
from sequence import SamplingParams, TextStream
from tokenizer import Tokenizer

CONFIG = GPTConfig(block_size=64, vocab_size=100, n_layer=2, n_head=2, n_embd=64)
LAYOUT = EngineConfig(
    page_size=4, kv_blocks=51, max_num_seqs=4, prefill_tokens=32
)  # as compare() below has it: compiled once
GREEDY = SamplingParams(max_tokens=8, temperature=0)


class Words(Tokenizer):
    """Token i is a short word; 99 ends the text."""

    name, vocab_size, eos_id = "words", 100, 99
    words = [chr(97 + i % 7) + chr(97 + i % 5) + " " * (i % 3 == 0) for i in range(99)] + ["<end>"]

    def encode(self, text):
        raise NotImplementedError

    def token_bytes(self, token):
        return self.words[token].encode()

    def meta(self):
        return {}


@pytest.fixture(scope="module")
def model():
    return GPT(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture
def engine(model):
    return Engine(model, Words(), LAYOUT, progress=False)


def prompts_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(90, size=n).tolist() for n in lengths]


def generate(engine, prompt, **params):
    [[out]] = engine.generate([prompt], SamplingParams(**params), progress=False)
    return out


def dense_logprobs(model, rows):
    """(B, T, V) of what follows each of the tokens (B, T), in one uncached forward pass."""
    return np.asarray(jax.nn.log_softmax(model(jnp.array(rows))[0]))


def test_greedy_tokens_and_logprobs_are_the_dense_models(engine, model):
    """Catches tokens at wrong positions, keys of other sequences and lost prompt tokens, for prompts of every length."""
    for lengths, max_tokens in ((range(1, 60), 5), (range(60, 64), 1)):
        prompts = prompts_of(lengths)
        params = SamplingParams(max_tokens=max_tokens, temperature=0, logprobs=0, ignore_eos=True)
        outputs = engine.generate(prompts, params, progress=False)
        whole = model.generate(prompts, max_tokens, temperature=0)
        assert [p + out.token_ids for p, [out] in zip(prompts, outputs)] == whole
        expected = dense_logprobs(model, [tokens + [0] * (64 - len(tokens)) for tokens in whole])
        for b, (prompt, [out]) in enumerate(zip(prompts, outputs)):
            at = np.arange(len(prompt) - 1, len(prompt) + max_tokens - 1)
            np.testing.assert_allclose(
                [l.logprob for l in out.logprobs], expected[b, at, out.token_ids], rtol=0, atol=1e-5
            )
    assert engine.stats().pages_held == 0


def test_greedy_tokens_are_transformers(tmp_path):
    """Catches what our dense model and the engine would get wrong alike: 100 prompts of 1 to 63 tokens."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    hf = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=100,
            n_positions=64,
            n_embd=64,
            n_layer=2,
            n_head=2,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(torch.randn_like(p) * 0.1)  # no near ties, no bias left at 0
    hf.save_pretrained(tmp_path)
    engine = Engine(GPT.from_pretrained(tmp_path), None, LAYOUT, progress=False)
    for lengths, max_tokens in ((list(range(1, 57)) + [7] * 37, 8), (range(57, 64), 1)):
        prompts = prompts_of(lengths)
        padded = [[0] * (64 - len(p)) + p for p in prompts]
        mask = [[0] * (64 - len(p)) + [1] * len(p) for p in prompts]
        expected = hf.generate(
            torch.tensor(padded),
            attention_mask=torch.tensor(mask),
            do_sample=False,
            max_new_tokens=max_tokens,
        )
        outputs = engine.generate(
            prompts, SamplingParams(max_tokens=max_tokens, temperature=0), progress=False
        )
        assert [out.token_ids for [out] in outputs] == expected[:, 64:].tolist()


def test_same_bits(model):
    """Catches anything but the request itself that reaches its numbers; see same_bits.py."""
    ways = list(compare(model, 24, max_num_seqs=4, page_size=4, prefill_tokens=32, progress=False))
    for way, different, must_agree in ways:
        assert (different == 0) == must_agree, f"{way}: {different} of 24"


def test_what_free_pages_hold_changes_nothing(engine):
    """Catches attention over the null page, a stale tail of a page table and slots past a sequence's end: 0 * NaN is NaN."""
    requests = [
        (p, dataclasses.replace(GREEDY, logprobs=3))
        for p in prompts_of([1, 3, 4, 5, 17, 33, 2, 9, 30, 40])
    ]
    clean = run(engine, requests)
    engine.blocks.forget()
    engine.pool = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), engine.pool)
    assert run(engine, requests) == clean


@pytest.mark.parametrize("committed", [False, True])  # to their device, as a restored checkpoint is
def test_nothing_compiles_after_the_start(model, committed):
    """Catches a shape that depends on the requests, small operations outside the compiled programs, and state that is laid
    out otherwise after the first step than before."""
    if committed:
        model = GPT.from_params(CONFIG, jax.device_put(model.params(), jax.devices()[0]))
    engine = Engine(model, Words(), LAYOUT, progress=False)
    compiled = []
    listen = lambda name, duration, **_: (
        compiled.append(name) if name == "/jax/core/compile/backend_compile_duration" else None
    )
    jax.monitoring.register_event_duration_secs_listener(listen)
    (
        engine.blocks.open("ballast", [0]),
        engine.blocks.write("ballast", 0, 30 * 4),
    )  # 20 pages are left: some must be preempted
    copies = []
    blocks_write = engine.blocks.write
    engine.blocks.write = lambda *args: (copies.extend((c := blocks_write(*args)) or ()), c)[1]
    rng = np.random.default_rng(0)
    pick = lambda *choices: choices[rng.integers(len(choices))]
    for _ in range(1000):
        engine.add(
            rng.integers(90, size=rng.integers(1, 40)).tolist(),
            SamplingParams(
                max_tokens=pick(1, 2, 5, 20),
                temperature=pick(0, 1),
                n=pick(1, 1, 3),
                top_k=pick(None, 3),
                min_tokens=pick(0, 1),
                frequency_penalty=pick(0, 1),
                logprobs=pick(None, 3),
                prompt_logprobs=pick(None, None, 3),
                seed=pick(None, 1),
            ),
        )
        engine.step()
    while engine.busy:
        engine.step()
        assert all(
            isinstance(a, np.ndarray)
            for pages in engine.swapped.values()
            for a in jax.tree.leaves(pages)
        ), "not in host memory"
    assert engine.stats().preemptions > 0 and copies
    assert compiled == [] and engine.programs() == engine.programs_at_start
    jax.jit(lambda x: x + 41)(1)
    assert compiled, "the listener hears nothing"
    jax.monitoring.unregister_event_duration_listener(listen)


def test_one_wait_per_step_and_the_next_step_is_underway(engine, monkeypatch):
    """Catches further synchronisation with the device, and a host that works while the device waits."""
    waits, events = [], []
    get, launch = jax.device_get, engine._launch
    monkeypatch.setattr(
        engine_module.jax, "device_get", lambda x: (events.append("wait"), get(x))[1]
    )
    monkeypatch.setattr(engine, "_launch", lambda plan: (events.append("launch"), launch(plan))[1])
    engine.generate(prompts_of([5, 9]), GREEDY, progress=False)
    assert events == ["launch", "wait"] * (len(events) // 2) and len(events) >= 16


def test_cancel_frees_everything_at_once_and_others_go_on(engine):
    """Catches pages, slots or outputs of a cancelled request that live on, waiting, running and preempted alike."""
    prompts = prompts_of([60] * 12)
    alone = generate(engine, prompts[1], max_tokens=4, temperature=0).token_ids
    ids = [engine.add(p, SamplingParams(max_tokens=4, temperature=0)) for p in prompts]
    for _ in range(4):
        engine.step()
    for i in ids[:1] + ids[2:]:
        engine.cancel(i)
    engine.cancel(ids[0])
    assert engine.stats().running == 1 and engine.stats().waiting == 0
    tokens = []
    while engine.busy:
        for out in engine.step():
            assert out.request_id == ids[1]
            tokens += out.token_ids
    assert alone[-len(tokens) :] == tokens and engine.stats().pages_held == 0


def test_each_sampling_parameter_does_what_it_says(engine, model):
    """Catches a parameter that is accepted and ignored."""
    (prompt,) = prompts_of([9])
    plain = generate(engine, prompt, max_tokens=12, temperature=0, ignore_eos=True).token_ids
    likeliest = lambda **params: (
        generate(
            engine, prompt, **{**dict(max_tokens=12, temperature=0, ignore_eos=True), **params}
        ).token_ids
    )
    drawn = lambda **params: (
        generate(
            engine, prompt, **{**dict(max_tokens=12, seed=1, ignore_eos=True), **params}
        ).token_ids
    )
    assert len(set(plain)) < 12, "nothing is repeated: the penalties have nothing to do"
    assert likeliest(seed=5) == plain != drawn()
    assert drawn() == drawn() != drawn(seed=2)
    assert drawn(top_k=1) == drawn(top_p=1e-6) == drawn(min_p=1) == drawn(temperature=1e-4) == plain
    assert drawn(top_k=5) != drawn() and drawn(top_p=0.3) != drawn() and drawn(min_p=0.5) != drawn()
    assert (
        likeliest(logit_bias={7: 100}) == [7] * 12
        and likeliest(logit_bias={plain[0]: -100})[0] != plain[0]
    )
    assert (
        len(set(likeliest(frequency_penalty=100)))
        == 12
        == len(set(likeliest(presence_penalty=100)))
    )
    assert not set(likeliest(repetition_penalty=1e4)) & set(prompt), (
        "the prompt's tokens are repetitions too"
    )
    assert set(likeliest(presence_penalty=100, logit_bias={prompt[0]: 50})) & set(prompt), (
        "presence is not about the prompt"
    )
    # Two tokens ahead of all others, 10 apart: frequency counts how often each was generated, presence only whether.
    two = {0: 100, 8: 90}
    assert likeliest(logit_bias=two, frequency_penalty=20)[:4] == [0, 8, 0, 8]
    assert likeliest(logit_bias=two, presence_penalty=20)[:4] == [0, 8, 0, 0]


def test_what_ends_a_sample(engine):
    """Catches stop conditions that are not looked at, too early, or that leak what they cut off."""
    (prompt,) = prompts_of([9])
    run = lambda **params: generate(engine, prompt, **{**dict(max_tokens=12, seed=1), **params})
    end = {99: 100}
    assert (
        run(logit_bias=end).token_ids,
        run(logit_bias=end).text,
        run(logit_bias=end).finish_reason,
    ) == ([99], "", "stop")
    assert run(logit_bias=end, ignore_eos=True).token_ids == [99] * 12
    out = run(logit_bias=end, min_tokens=5)
    assert len(out.token_ids) == 6 and out.token_ids.index(99) == 5 and out.finish_reason == "stop"
    whole = run(ignore_eos=True)
    assert (len(whole.token_ids), whole.finish_reason) == (12, "length")
    assert whole.text == Words().decode(whole.token_ids)
    third = whole.token_ids[2]
    first = whole.token_ids.index(third)
    assert run(stop_token_ids=(third,)).token_ids == whole.token_ids[: first + 1]
    assert run(stop_token_ids=(third,)).text == Words().decode(whole.token_ids[:first])
    stop = whole.text[5:9]
    out = run(stop=("not there", stop))
    assert (out.text, out.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    assert run(stop=(stop,), ignore_eos=True).text == out.text
    assert len(run(stop=(stop,), ignore_eos=True, min_tokens=12).token_ids) == 12


def test_samples_of_one_prompt(engine):
    """Catches samples that are all alike, depend on how many there are, or write to each other's pages."""
    (prompt,) = prompts_of([10])
    params = SamplingParams(max_tokens=9, seed=3, n=6, logprobs=2)
    [six], [[two]] = (
        engine.generate([prompt], params, progress=False),
        engine.generate([prompt], dataclasses.replace(params, n=1), progress=False),
    )
    assert [out.index for out in six] == list(range(6)) and len(
        {tuple(out.token_ids) for out in six}
    ) == 6
    assert (six[0].token_ids, six[0].logprobs) == (two.token_ids, two.logprobs)


def test_logprobs_echo_and_scoring(engine, model):
    """Catches logprobs of other tokens, after penalties, or off by one; and prompts scored through a prefix hit."""
    (prompt,) = prompts_of([21])
    for _ in range(2):  # the second time the prefix is in the cache
        out = generate(
            engine,
            prompt,
            max_tokens=5,
            seed=1,
            temperature=0.5,
            top_k=3,
            frequency_penalty=1,
            logprobs=4,
            prompt_logprobs=2,
            echo=True,
        )
        new = out.token_ids[21:]
        assert out.token_ids[:21] == prompt and len(new) == 5
        assert out.text == Words().decode(out.token_ids)
        (expected,) = dense_logprobs(model, [out.token_ids])
        assert out.prompt_logprobs[0] is None
        for at, (token, entry) in enumerate(
            zip(out.token_ids[1:], out.prompt_logprobs[1:] + out.logprobs, strict=True)
        ):
            assert entry.token == token
            assert entry.logprob == pytest.approx(expected[at, token], abs=1e-5)
            assert list(entry.top) == np.argsort(-expected[at])[: 4 if at >= 20 else 2].tolist()
            np.testing.assert_allclose(
                list(entry.top.values()), -np.sort(-expected[at])[: len(entry.top)], atol=1e-5
            )
    scored = generate(engine, prompt, max_tokens=0, prompt_logprobs=0)
    assert scored.prompt_logprobs[1:] == [l._replace(top={}) for l in out.prompt_logprobs[1:]]
    assert (scored.token_ids, scored.text, scored.finish_reason) == ([], "", "length")


@pytest.mark.parametrize(
    "prompt, params, both",
    [
        ([], {}, "at least 1 token"),
        ([100], {}, "100.*99"),
        ([-1], {}, "-1.*99"),
        ([1] * 60, dict(max_tokens=5), "60.*5.*65.*64"),
        ([1], dict(logit_bias={100: 1}), "100.*99"),
        ([1], dict(stop_token_ids=(-5,)), "-5.*99"),
        (
            [1],
            dict(logit_bias=dict.fromkeys(range(90), 1), stop_token_ids=tuple(range(90))),
            "181.*180",
        ),
        ([1], dict(temperature=-1), "-1.* 0"),
        ([1], dict(temperature=math.nan), "nan"),
        ([1], dict(top_p=0), r"0.*\(0, 1\]"),
        ([1], dict(top_k=0), "0.*1"),
        ([1], dict(min_p=1.5), "1.5.*1"),
        ([1], dict(n=0), "0.*1"),
        ([1], dict(logprobs=21), "21.*20"),
        ([1], dict(prompt_logprobs=-1), "-1.*0"),
        ([1], dict(min_tokens=17), "17.*16"),
        ([1], dict(max_tokens=0), "0"),
        ([1], dict(repetition_penalty=0), "0"),
        ([1], dict(logit_bias={1: math.inf}), "1e4"),
        ([1], dict(stop=("",)), "empty"),
        ([1], dict(stop="word"), "sequence"),
        ([1], dict(seed=2**63), str(2**63)),
    ],
)
def test_what_cannot_be_served_is_refused(engine, monkeypatch, prompt, params, both):
    """Catches a mistake that is clamped, ignored, or found only when the request runs."""
    monkeypatch.setattr(
        engine_module, "MAX_BIASES", 180
    )  # more than that do not occur with 100 tokens
    with pytest.raises(ValueError, match=both):
        engine.add(prompt, SamplingParams(**params))
    assert not engine.busy


@given(
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_text_stops_at_the_first_stop_string_and_takes_nothing_back(words, stop):
    """Catches a stop string missed across tokens, text given out that a stop string cuts off, and text withheld for ever."""
    tokenizer = Words()
    tokenizer.words = words
    text, given_out = TextStream(tokenizer, tuple(stop)), ""
    for i in range(len(words)):
        given_out += text.push([i], last=i == len(words) - 1)
        so_far = "".join(words[: i + 1])
        found = [so_far.index(s) for s in stop if s in so_far]
        assert text.stopped == bool(found)
        if found:
            assert given_out == so_far[: min(found)]
            return
        assert so_far.startswith(given_out)
        withheld = so_far[len(given_out) :]
        assert withheld == "" or any(s.startswith(withheld) for s in stop)
    assert given_out == "".join(words)


def slots_of(rows: list[SamplingParams], tokens=(0,)) -> Slots:
    """Slots of sequences whose prompt is `tokens`, one for each of rows."""
    bare = Engine.__new__(Engine)
    bare.model_config = dataclasses.replace(CONFIG, vocab_multiple=1)
    each = [bare._slot_row(engine_module.Sequence((0, 0), list(tokens), p)) for p in rows]
    return jax.tree.map(lambda *a: jnp.stack([jnp.asarray(x) for x in a]), *each)


def kept_by_sorting(logits, p: SamplingParams):
    """The probabilities that top_k, top_p and min_p leave, by sorting in float64."""
    order = np.argsort(-logits, kind="stable")
    x = logits[order].astype(np.float64) / p.temperature
    x[p.top_k or len(x) :] = -np.inf
    prob = np.exp(x - x.max())
    prob /= prob.sum()
    before = np.cumsum(prob) - prob
    prob[before >= p.top_p] = 0
    prob[prob < p.min_p * prob.max()] = 0
    result = np.zeros(len(x))
    result[order] = prob / prob.sum()
    return result


def test_the_kept_tokens_are_those_that_sorting_keeps():
    """Catches an edge off by one in top_k, top_p or min_p, and one row's parameters applied to another."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(64, 100)).astype(np.float32) * rng.uniform(
        0.1, 4, size=(64, 1)
    ).astype(np.float32)
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
    scaled = logits / np.array([[p.temperature] for p in rows], np.float32)
    kept = np.asarray(jax.nn.softmax(sampling.keep(jnp.asarray(scaled), slots, jnp.arange(64))))
    for row, p, got in zip(logits, rows, kept):
        np.testing.assert_allclose(got, kept_by_sorting(row, p), rtol=1e-4)


@pytest.fixture(scope="module")
def many_draws():
    """20,000 positions of one sequence: probabilities (100,), and the tokens drawn."""
    logits = np.random.default_rng(1).normal(size=100).astype(np.float32) * 2
    slots, n = slots_of([SamplingParams(seed=7)]), 20_000
    draw = jax.jit(
        lambda l, at: sampling.sample(
            l, slots, jnp.zeros(n, jnp.int32), at, StepNeeds(False, False, False, False)
        )
    )
    tokens = np.asarray(draw(jnp.broadcast_to(logits, (n, 100)), jnp.arange(n, dtype=jnp.int32)))
    p = np.exp(logits.astype(np.float64))
    return p / p.sum(), tokens


def test_draws_follow_the_distribution(many_draws):
    """Catches a biased draw: chi-square over 20,000 positions, tokens expected less than 10 times taken together."""
    p, tokens = many_draws
    often = p * len(tokens) >= 10
    observed = np.append(np.bincount(tokens, minlength=100)[often], (~often[tokens]).sum())
    expected = np.append(p[often], p[~often].sum()) * len(tokens)
    freedom = len(expected) - 1
    chi2 = ((observed - expected) ** 2 / expected).sum()
    assert abs(chi2 - freedom) < 4 * math.sqrt(2 * freedom), (
        f"chi-square {chi2:.1f} at {freedom} degrees of freedom"
    )


def test_draws_at_neighbouring_positions_are_independent(many_draws):
    """Catches keys of neighbouring positions that are alike: serial correlation of the tokens' quantiles, lags 1 to 16."""
    p, tokens = many_draws
    quantile = (np.cumsum(p) - p / 2)[tokens]
    quantile = (quantile - quantile.mean()) / quantile.std()
    for lag in range(1, 17):
        correlation = (quantile[lag:] * quantile[:-lag]).mean()
        assert abs(correlation) < 4 / math.sqrt(len(tokens)), (
            f"correlation {correlation:.4f} at lag {lag}"
        )
