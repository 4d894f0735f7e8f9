"""Guesses ahead: what is guessed, and that no guess changes a bit of what is answered."""

import dataclasses
import random

import pytest
from flax import nnx

from config import EngineConfig
from engine import Engine
from errors import UserError
from kernels import cpu_kernels
from model import GPT
from sequence import SamplingParams
from speculation.drafts import PAUSE, PromptLookup, Speculation
from structured.outputs import StructuredOutput
from tiny_engine import CONFIG, LAYOUT, Words, make_model, prompts_of
from tokenizer import CharTokenizer

pytestmark = pytest.mark.slow

NATIVE = pytest.mark.skipif(
    cpu_kernels.unavailable_because("auto") is not None, reason="there is no native code here"
)
SAMPLING = (
    {"temperature": 0},
    {"temperature": 0.3, "top_k": 2},
    {"temperature": 0, "repetition_penalty": 1.1},
    {"temperature": 0.2, "frequency_penalty": 0.1, "presence_penalty": 0.1, "top_k": 3},
    {"temperature": 0, "logit_bias": {3: 4.0, 5: 3.9}, "n": 2},
    {"temperature": 0.2, "n": 3, "top_p": 0.5},
    {"temperature": 0, "stop": ("dddd",), "min_tokens": 4},
    {"temperature": 0.3, "allowed_token_ids": tuple(range(40)), "min_p": 0.2},
)


def lookup_by_search(tokens: list[int], count: int) -> list[int]:
    """Return what PromptLookup.draft does, found by trying every place."""
    for size in (4, 3, 2):
        for end in range(len(tokens) - 1, size - 1, -1):
            if len(tokens) > size and tokens[end - size : end] == tokens[-size:]:
                extended = list(tokens)
                for i in range(count):
                    extended.append(extended[end + i])
                return extended[len(tokens) :]
    return []


def test_a_draft_is_what_followed_the_newest_tokens():
    """Catches an n-gram that finds itself, an older place where there is a newer one, a shorter
    n-gram before a longer, and tokens that are indexed twice or never."""
    rng = random.Random(0)
    found = 0
    for _ in range(200):
        lookup = PromptLookup()
        tokens: list[int] = []
        while len(tokens) < 30:
            tokens += [rng.randrange(3) for _ in range(rng.randrange(1, 5))]
            draft = lookup.draft(tokens, 5)
            assert draft == lookup_by_search(tokens, 5)
            found += bool(draft)
    assert found > 1000


def test_guesses_that_do_not_pay_pause():
    """Catches a sequence that goes on guessing wrong, or never tries again."""
    speculation = Speculation()
    tokens = [1, 2, 3] * 5
    wrong = 0
    while speculation.draft(tokens, 1):
        speculation.note(tokens, False)
        wrong += 1
    assert 5 < wrong < 20
    tokens += [1, 2, 3] * (PAUSE // 3)
    assert not speculation.draft(tokens, 1)
    assert speculation.draft([*tokens, 1, 2, 3], 1)
    for _ in range(100):
        speculation.note(tokens, True)
    assert speculation.draft([*tokens, 1, 2, 3], 1)


def requests():
    """Return prompts, most of which repeat themselves, and how each is to be sampled."""
    prompts = prompts_of([3, 11, 20])
    prompts += [prompt[:3] * 4 for prompt in prompts_of([3, 3, 3, 3, 3], seed=1)]
    params = [
        SamplingParams(max_tokens=24, seed=i, logprobs=2, ignore_eos=True, **how)
        for i, how in enumerate(SAMPLING)
    ]
    return prompts, params


def answers(engine: Engine, prompts, params):
    """Return what each request gets."""
    return [
        [(o.token_ids, o.text, o.logprobs, o.finish_reason) for o in samples]
        for samples in engine.generate(prompts, params, progress=False)
    ]


@pytest.mark.parametrize(
    "dtype, switch, num_pages",
    [
        ("float32", "off", 31),
        ("bfloat16", "off", 51),
        pytest.param("float32", "auto", 51, marks=NATIVE),
        pytest.param("bfloat16", "auto", 31, marks=NATIVE),
    ],
)
def test_no_guess_changes_a_bit(dtype, switch, num_pages):
    """Catches a guess that is taken although it is wrong, read or written at another position, or
    left in a page that another prompt finds; a draw whose key is used twice; penalties that count
    what was guessed; in a pool that preempts too."""
    model = GPT(dataclasses.replace(CONFIG, dtype=dtype), rngs=nnx.Rngs(0))
    layout = dataclasses.replace(LAYOUT, max_num_seqs=8, kv_blocks=num_pages, cpu_kernels=switch)
    plain, *guessing = (
        Engine(model, Words(), dataclasses.replace(layout, speculate=k), progress=False)
        for k in (0, 2, 7)
    )
    prompts, params = requests()
    expected = answers(plain, prompts, params)
    for engine in guessing:
        programs = engine.programs()
        assert answers(engine, prompts, params) == expected
        assert answers(engine, prompts, params) == expected  # the prompts are in the prefix cache
        alone = [
            answers(engine, [prompt], [p])[0] for prompt, p in zip(prompts, params, strict=True)
        ]
        assert alone == expected
        stats = engine.stats()
        assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
        assert stats.num_drafts <= stats.num_draft_tokens
        assert stats.pages_held == 0
        assert engine.programs() == programs
        engine.blocks.check()
    assert num_pages > 40 or plain.stats().preemptions > 0


@pytest.mark.parametrize("at_once", [{"speculate": 4}, {"num_scheduler_steps": 4}])
def test_a_form_beside_several_tokens_at_once(at_once):
    """Catches a sequence whose mask is another than that of its token, because it guessed or got
    several tokens from a call, and neighbours that it keeps from doing so for good."""
    tokenizer = CharTokenizer("abcd ")
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size)
    model = GPT(config, rngs=nnx.Rngs(0))
    engine = Engine(model, tokenizer, dataclasses.replace(LAYOUT, **at_once), progress=False)
    form = SamplingParams(max_tokens=20, structured=StructuredOutput(regex="(ab){8}"))
    free = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    [[formed], [repeats]] = engine.generate(
        [[0, 1, 0, 1], [1, 2] * 6], [form, free], progress=False
    )
    assert formed.text == "ab" * 8
    assert len(repeats.token_ids) == 24
    assert "speculate" not in at_once or engine.stats().num_accepted_tokens > 0


def test_right_guesses_save_steps():
    """Catches guesses that are made and never used."""
    steps = {}
    for speculate in (0, 4):
        layout = dataclasses.replace(LAYOUT, speculate=speculate)
        engine = Engine(make_model(), Words(), layout, progress=False)
        engine.add([5] * 8, SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))
        while engine.busy:
            engine.step()
        steps[speculate] = sum(n for (_, tokens), n in engine.calls.items() if tokens == 1)
    assert steps[0] == 39
    assert steps[4] < 20


def test_speculation_and_several_steps_exclude_one_another():
    """Catches one of two flags that is silently ignored."""
    with pytest.raises(UserError, match="speculate=2 and num_scheduler_steps=4"):
        EngineConfig(speculate=2, num_scheduler_steps=4)
    assert EngineConfig(speculate=2, num_scheduler_steps=1).speculate == 2
    assert EngineConfig(speculate=2).num_scheduler_steps is None
    with pytest.raises(UserError, match="speculate=-1"):
        EngineConfig(speculate=-1)
