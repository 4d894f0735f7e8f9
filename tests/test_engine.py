"""The engine on a tiny model: against the dense model, and against itself in other circumstances.

What a request may ask for is tested in test_requests.py. The scheduler and the block manager, which
need no model, have test files of their own.
"""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from block_manager import BlockManager
from engine import Engine
from model import GPT
from model_runner import smallest_at_least
from same_bits import compare, run
from sequence import SamplingParams, State
from tiny_engine import (
    CONFIG,
    GREEDY,
    LAYOUT,
    Words,
    dense_logprobs,
    generate,
    make_engine,
    make_model,
    prompts_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.optimised]


@pytest.fixture(scope="module")
def model() -> GPT:
    return make_model()


@pytest.fixture
def engine(model) -> Engine:
    return make_engine(model, Words())


@pytest.mark.parametrize(
    "lengths, max_tokens",
    [
        pytest.param(range(1, 60), 5, id="shorter than the context"),
        pytest.param(range(60, 64), 1, id="up to the context"),
    ],
)
def test_greedy_tokens_and_logprobs_are_the_dense_models(engine, model, lengths, max_tokens):
    """Catches tokens at wrong positions, keys of other sequences and lost prompt tokens, for
    prompts of every length."""
    prompts = prompts_of(lengths)
    params = SamplingParams(max_tokens=max_tokens, temperature=0, logprobs=0, ignore_eos=True)
    outputs = [output for [output] in engine.generate(prompts, params, progress=False)]
    whole = [prompt + output.token_ids for prompt, output in zip(prompts, outputs, strict=True)]
    assert whole == model.generate(prompts, max_tokens, temperature=0)
    expected = dense_logprobs(model, [tokens + [0] * (64 - len(tokens)) for tokens in whole])
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        positions = np.arange(len(prompt) - 1, len(prompt) + max_tokens - 1)
        np.testing.assert_allclose(
            [entry.logprob for entry in output.logprobs],
            expected[row, positions, output.token_ids],
            rtol=0,
            atol=1e-5,
        )
    assert engine.stats().pages_held == 0


def test_several_steps_in_a_call_give_the_same_tokens(model):
    """Catches a step that reads the token before last, a row that goes on past its own end into
    another's slot, and outputs out of order."""
    config = dataclasses.replace(LAYOUT, num_scheduler_steps=5)
    prompts = prompts_of([1, 3, 4, 17, 30, 2, 9])
    params = [
        SamplingParams(max_tokens=n, temperature=0, ignore_eos=True, seed=n, **more)
        for n, more in zip(
            [1, 2, 5, 6, 7, 11, 23],
            [{}, {}, {"repetition_penalty": 1.3}, {"logprobs": 3}, {"n": 2}, {"stop": ["aa"]}, {}],
            strict=True,
        )
    ]
    one_by_one, together = (
        Engine(model, Words(), layout, progress=False) for layout in (LAYOUT, config)
    )
    expected = one_by_one.generate(prompts, params, progress=False)
    outputs = together.generate(prompts, params, progress=False)
    for samples, expected_samples in zip(outputs, expected, strict=True):
        for sample, expected_sample in zip(samples, expected_samples, strict=True):
            assert sample.token_ids == expected_sample.token_ids
            assert sample.text == expected_sample.text
            assert sample.finish_reason == expected_sample.finish_reason
    assert together.stats().pages_held == 0
    together.add([1, 2, 3], SamplingParams(max_tokens=9, temperature=0, ignore_eos=True))
    steps_of_calls = []
    while together.busy:
        together.step()
        steps_of_calls += [call.num_steps for call in together.in_flight]
    assert steps_of_calls == [1, 5, 3]


def hugging_face_greedy(model, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Return the new tokens of prompts, which are padded on the left to the context's 64 tokens."""
    torch = pytest.importorskip("torch")
    padding = [64 - len(prompt) for prompt in prompts]
    padded = [[0] * n + prompt for n, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * n + [1] * (64 - n) for n in padding]
    tokens = model.generate(
        torch.tensor(padded),
        attention_mask=torch.tensor(mask),
        do_sample=False,
        max_new_tokens=max_tokens,
    )
    return tokens[:, 64:].tolist()


def test_greedy_tokens_are_transformers(tmp_path):
    """Catches what our dense model and the engine would get wrong alike: 100 prompts of 1 to 63
    tokens."""
    hugging_face = pytest.importorskip("hugging_face")  # skips where there is no torch
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 100}
    hf = hugging_face.make_hf(**sizes)
    hf.save_pretrained(tmp_path)
    engine = make_engine(GPT.from_pretrained(tmp_path), None)
    for lengths, max_tokens in (([*range(1, 57)] + [7] * 37, 8), (range(57, 64), 1)):
        prompts = prompts_of(lengths)
        params = SamplingParams(max_tokens=max_tokens, temperature=0)
        outputs = engine.generate(prompts, params, progress=False)
        expected = hugging_face_greedy(hf, prompts, max_tokens)
        assert [output.token_ids for [output] in outputs] == expected


@pytest.mark.parametrize("num_scheduler_steps", [1, 4])
def test_same_bits(model, num_scheduler_steps):
    """Catches anything but the request itself that reaches its numbers; see same_bits.py."""
    # The shapes of LAYOUT: compiled once for all tests.
    ways = compare(
        model,
        24,
        max_num_seqs=4,
        page_size=4,
        prefill_tokens=32,
        num_scheduler_steps=num_scheduler_steps,
        progress=False,
    )
    for way in ways:
        assert way.as_it_must_be, f"{way.name}: {way.different} of 24"


def test_what_free_pages_hold_changes_nothing(engine):
    """Catches attention over the null page, a stale tail of a page table and slots past a
    sequence's end: 0 * NaN is NaN."""
    params = dataclasses.replace(GREEDY, logprobs=3)
    requests = [(prompt, params) for prompt in prompts_of([1, 3, 4, 5, 17, 33, 2, 9, 30, 40])]
    clean = run(engine, requests)
    engine.blocks.forget()
    pool = engine.runner.pool
    engine.runner.pool = jax.tree.map(lambda pages: jnp.full_like(pages, jnp.nan), pool)
    assert run(engine, requests) == clean


@pytest.fixture
def compilations():
    """A list that grows by an entry whenever XLA compiles a program."""
    seen: list[str] = []

    def listen(name: str, duration: float, **_) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            seen.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def page_copies(monkeypatch):
    """A list that grows by each page copy that a block manager asks for."""
    seen = []
    write = BlockManager.write

    def recorded_write(*args):
        copies = write(*args)
        seen.extend(copies or ())
        return copies

    monkeypatch.setattr(BlockManager, "write", recorded_write)
    return seen


def random_request(rng: np.random.Generator) -> tuple[list[int], SamplingParams]:
    """Return a request in which any parameter may be used that a compiled program depends on."""

    def pick(*choices):
        return choices[rng.integers(len(choices))]

    prompt = rng.integers(90, size=rng.integers(1, 40)).tolist()
    params = SamplingParams(
        max_tokens=pick(1, 2, 5, 20),
        temperature=pick(0, 1),
        n=pick(1, 1, 3),
        top_k=pick(None, 3),
        min_tokens=pick(0, 1),
        frequency_penalty=pick(0, 1),
        logprobs=pick(None, 3),
        prompt_logprobs=pick(None, None, 3),
        seed=pick(None, 1),
    )
    return prompt, params


@pytest.mark.parametrize("committed", [False, True])  # to their device, as a restored checkpoint is
def test_nothing_compiles_after_the_start(model, committed, compilations, page_copies):
    """Catches a shape that depends on the requests, small operations outside the compiled programs,
    and state that is laid out otherwise after the first step than before."""
    if committed:
        model = GPT.from_params(CONFIG, jax.device_put(model.params(), jax.devices()[0]))
    engine = make_engine(model, Words())
    compilations.clear()
    # Hold 30 pages, so that 20 are left: some sequences must be preempted.
    engine.blocks.open("ballast", [0])
    engine.blocks.write("ballast", 0, 30 * LAYOUT.page_size)
    rng = np.random.default_rng(0)
    for _ in range(1000):
        engine.add(*random_request(rng))
        engine.step()
    while engine.busy:
        engine.step()
        swapped = jax.tree.leaves(engine.runner.swapped)
        assert all(isinstance(pages, np.ndarray) for pages in swapped), "not in host memory"
    assert engine.stats().preemptions > 0 and page_copies
    assert compilations == [] and engine.programs() == engine.programs_at_start
    jax.jit(lambda x: x + 41)(1)
    assert compilations, "the listener hears nothing"


def test_one_wait_per_step_and_the_next_step_is_underway(engine, monkeypatch):
    """Catches further synchronisation with the device, and a host that works while the device
    waits."""
    events = []
    device_get = jax.device_get
    launch = engine._launch

    def recorded_device_get(arrays):
        events.append("wait")
        return device_get(arrays)

    def recorded_launch(plan):
        events.append("launch")
        return launch(plan)

    monkeypatch.setattr(jax, "device_get", recorded_device_get)
    monkeypatch.setattr(engine, "_launch", recorded_launch)
    engine.generate(prompts_of([5, 9]), GREEDY, progress=False)
    steps = len(events) // 2
    assert events == ["launch", "wait"] * steps and steps >= 8


def test_calls_are_counted_by_shape(engine):
    """Catches calls of the start-up among those counted, and shapes that are not those of the
    calls."""
    assert engine.calls == Counter()
    prompts = prompts_of([5, 9])
    engine.generate(prompts, GREEDY, progress=False)
    tiles = 2 + 3  # pages of the two prompts
    prefill_rows = smallest_at_least(tiles, engine.runner.prefill_sizes)
    decode_rows = smallest_at_least(len(prompts), engine.runner.decode_sizes)
    prefill_shape = prefill_rows, LAYOUT.page_size
    decode_shape = decode_rows, 1
    # Prefill samples the first of the 8 tokens.
    assert engine.calls == Counter({prefill_shape: 1, decode_shape: 7})


def test_cancel_frees_everything_at_once_and_others_go_on(engine):
    """Catches pages, slots or outputs of a cancelled request that live on, waiting, running and
    preempted alike."""
    prompts = prompts_of([60] * 12)
    alone = generate(engine, prompts[1], max_tokens=4, temperature=0).token_ids
    params = SamplingParams(max_tokens=4, temperature=0)
    ids = [engine.add(prompt, params) for prompt in prompts]
    for _ in range(4):
        engine.step()
    seqs = [seq for samples in engine.requests.values() for seq in samples]
    assert {State.WAITING, State.RUNNING} <= {seq.state for seq in seqs}
    survivor = ids[1]
    for request_id in ids:
        if request_id != survivor:
            engine.cancel(request_id)
    engine.cancel(ids[0])  # a second time
    assert engine.stats().running == 1 and engine.stats().waiting == 0
    tokens = []
    while engine.busy:
        for output in engine.step():
            assert output.request_id == survivor
            tokens += output.token_ids
    assert alone[-len(tokens) :] == tokens and engine.stats().pages_held == 0


def test_tokens_in_pages_are_counted(engine):
    """Catches places of a page that hold no token and are counted, or are counted for one sequence
    alone."""
    for prompt in prompts_of([5, 2]):  # 2 pages and 1, of 4 places each
        engine.add(prompt, GREEDY)
    held = []
    for _ in range(3):
        engine.step()
        held.append((engine.stats().pages_held, engine.stats().tokens_held))
    assert held == [(3, 7), (3, 9), (3, 11)]


def test_times_are_in_order(engine):
    """Catches a time that is taken twice, as when a preempted sequence is admitted again."""
    engine.blocks.open("ballast", [0])
    engine.blocks.write("ballast", 0, 30 * LAYOUT.page_size)
    outputs = engine.generate(prompts_of([20] * 8), GREEDY, progress=False)
    assert engine.stats().preemptions > 0
    for [output] in outputs:
        assert list(output.times) == sorted(output.times)
        assert output.times.first_token < output.times.finished
