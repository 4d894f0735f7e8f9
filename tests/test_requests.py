"""What a request may ask for: a tiny engine and each of SamplingParams, stops, logprobs,
refusals."""

import dataclasses
import math
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine as engine_module
from engine import Engine
from errors import UserError
from model import GPT
from sequence import SamplingParams, TextStream
from tiny_engine import (
    END,
    GREEDY,
    Words,
    dense_logprobs,
    generate,
    make_engine,
    make_model,
    prompts_of,
)
from tokenizer import CharTokenizer


@pytest.fixture(scope="module")
def model() -> GPT:
    return make_model()


@pytest.fixture
def engine(model) -> Engine:
    return make_engine(model, Words())


@pytest.fixture
def char_engine(model) -> Engine:
    """An engine whose vocabulary is the 100 printable characters."""
    return make_engine(model, CharTokenizer(string.printable))


@pytest.mark.parametrize("n", [1, 3])
def test_generate_takes_texts_and_tokens(char_engine, n):
    """Catches a text that is not the tokens it encodes to, and prompts that change places."""
    texts = ["To be", "or not", "x"]
    tokens = [char_engine.tokenizer.encode(text) for text in texts]
    params = SamplingParams(max_tokens=6, seed=1, n=n)

    def results(prompts):
        outputs = char_engine.generate(prompts, params, progress=False)
        return [[(out.token_ids, out.text) for out in samples] for samples in outputs]

    expected = results(tokens)
    assert len({str(samples) for samples in expected}) == 3
    assert [len(samples) for samples in expected] == [n] * 3
    assert results(texts) == results([texts[0], tokens[1], texts[2]]) == expected


@pytest.mark.parametrize(
    "prompts, sentence",
    [
        pytest.param(["text", ""], "the prompt is empty", id="the empty string"),
        pytest.param("text", "give a list of prompts", id="no list"),
        pytest.param([[1, 2], [100]], "100.*99", id="a token too large"),
    ],
)
def test_generate_refuses_all_or_nothing(char_engine, prompts, sentence):
    """Catches one text that is taken for a list of its characters, and requests that stay in the
    queue when one behind them is refused."""
    with pytest.raises(UserError, match=sentence) as caught:
        char_engine.generate(prompts, GREEDY, progress=False)
    assert caught.value.param == "prompt"
    assert not char_engine.busy and char_engine.stats().waiting == 0


def test_texts_need_a_tokenizer(model):
    """Catches a text that ends in a TypeError."""
    engine = make_engine(model, None)
    with pytest.raises(UserError, match="no tokenizer") as caught:
        engine.generate([[1, 2], "text"], GREEDY, progress=False)
    assert caught.value.param == "prompt" and not engine.busy


@pytest.fixture
def likeliest(engine):
    """Return the 12 likeliest tokens after a prompt of 9, given some SamplingParams."""
    [prompt] = prompts_of([9])

    def tokens(**params):
        defaults = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
        return generate(engine, prompt, **{**defaults, **params}).token_ids

    return tokens


@pytest.fixture
def drawn(engine):
    """Return 12 tokens drawn after a prompt of 9, given some SamplingParams."""
    [prompt] = prompts_of([9])

    def tokens(**params):
        defaults = {"max_tokens": 12, "seed": 1, "ignore_eos": True}
        return generate(engine, prompt, **{**defaults, **params}).token_ids

    return tokens


def test_what_draws_depend_on(likeliest, drawn):
    """Catches a seed, a temperature or a restriction that is accepted and ignored."""
    plain = likeliest()
    assert likeliest(seed=5) == plain != drawn()
    assert drawn() == drawn() != drawn(seed=2)
    for restriction in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1}, {"temperature": 1e-4}):
        assert drawn(**restriction) == plain, restriction
    for restriction in ({"top_k": 5}, {"top_p": 0.3}, {"min_p": 0.5}):
        assert drawn(**restriction) != drawn(), restriction


def test_what_biases_and_penalties_do(likeliest):
    """Catches one of them that is accepted and ignored, or looks at the wrong tokens."""
    [prompt] = prompts_of([9])
    plain = likeliest()
    assert len(set(plain)) < 12, "nothing is repeated: the penalties have nothing to do"
    assert likeliest(logit_bias={7: 100}) == [7] * 12
    assert likeliest(logit_bias={plain[0]: -100})[0] != plain[0]
    assert len(set(likeliest(frequency_penalty=100))) == 12
    assert len(set(likeliest(presence_penalty=100))) == 12
    # The prompt's tokens are repetitions too; presence is not about the prompt.
    assert not set(likeliest(repetition_penalty=1e4)) & set(prompt)
    assert set(likeliest(presence_penalty=100, logit_bias={prompt[0]: 50})) & set(prompt)
    # Two tokens are ahead of all others, 10 apart: frequency counts how often each was generated,
    # presence only whether.
    two = {0: 100, 8: 90}
    assert likeliest(logit_bias=two, frequency_penalty=20)[:4] == [0, 8, 0, 8]
    assert likeliest(logit_bias=two, presence_penalty=20)[:4] == [0, 8, 0, 0]


@pytest.fixture
def sample(engine):
    """Return one output of up to 12 tokens drawn after a prompt of 9, given some SamplingParams."""
    [prompt] = prompts_of([9])

    def output(**params):
        return generate(engine, prompt, **{"max_tokens": 12, "seed": 1, **params})

    return output


def test_the_end_of_text_token_ends_a_sample(sample):
    """Catches an end that is not looked at, too early, or that is part of the text."""
    certain_end = {END: 100}
    output = sample(logit_bias=certain_end)
    assert (output.token_ids, output.text, output.finish_reason) == ([END], "", "stop")
    assert sample(logit_bias=certain_end, ignore_eos=True).token_ids == [END] * 12
    output = sample(logit_bias=certain_end, min_tokens=5)
    assert len(output.token_ids) == 6
    assert output.token_ids.index(END) == 5
    assert output.finish_reason == "stop"


def test_stop_tokens_and_stop_strings_end_a_sample(sample):
    """Catches stop conditions that are not looked at, too early, or that leak what they cut off."""
    whole = sample(ignore_eos=True)
    assert (len(whole.token_ids), whole.finish_reason) == (12, "length")
    assert whole.text == Words().decode(whole.token_ids)

    token = whole.token_ids[2]
    first = whole.token_ids.index(token)
    output = sample(stop_token_ids=(token,))
    assert output.token_ids == whole.token_ids[: first + 1]
    assert output.text == Words().decode(whole.token_ids[:first])

    text = whole.text[5:9]
    before = whole.text[: whole.text.index(text)]
    output = sample(stop=("not there", text))
    assert (output.text, output.finish_reason) == (before, "stop")
    assert sample(stop=(text,), ignore_eos=True).text == before
    assert len(sample(stop=(text,), ignore_eos=True, min_tokens=12).token_ids) == 12


def test_samples_of_one_prompt(engine):
    """Catches samples that are all alike, depend on how many there are, or write to each other's
    pages."""
    prompts = prompts_of([10])
    params = SamplingParams(max_tokens=9, seed=3, n=6, logprobs=2)
    [six] = engine.generate(prompts, params, progress=False)
    [[one]] = engine.generate(prompts, dataclasses.replace(params, n=1), progress=False)
    assert [output.index for output in six] == list(range(6))
    assert len({tuple(output.token_ids) for output in six}) == 6
    assert (six[0].token_ids, six[0].logprobs) == (one.token_ids, one.logprobs)


SCORED = {
    "max_tokens": 5,
    "seed": 1,
    "temperature": 0.5,
    "top_k": 3,
    "frequency_penalty": 1,
    "logprobs": 4,
    "prompt_logprobs": 2,
    "echo": True,
}


@pytest.mark.parametrize("times", [1, 2])  # the second time the prefix is in the cache
def test_logprobs_are_the_dense_models(engine, model, times):
    """Catches logprobs of other tokens, after penalties, or off by one; and prompts scored through
    a prefix hit."""
    [prompt] = prompts_of([21])
    for _ in range(times):
        output = generate(engine, prompt, **SCORED)
    [expected] = dense_logprobs(model, [output.token_ids])
    entries = output.prompt_logprobs + output.logprobs
    assert entries[0] is None
    following = zip(output.token_ids[1:], entries[1:], strict=True)
    for position, (token, entry) in enumerate(following):
        logprobs = expected[position]
        count = SCORED["prompt_logprobs"] if position < len(prompt) - 1 else SCORED["logprobs"]
        assert entry.token == token
        assert entry.logprob == pytest.approx(logprobs[token], abs=1e-5)
        assert list(entry.top) == np.argsort(-logprobs)[:count].tolist()
        np.testing.assert_allclose(list(entry.top.values()), -np.sort(-logprobs)[:count], atol=1e-5)


def test_echo_and_scoring_alone(engine):
    """Catches an echo that is not the prompt, and a score without new tokens that differs from one
    with them."""
    [prompt] = prompts_of([21])
    output = generate(engine, prompt, **SCORED)
    assert output.token_ids[:21] == prompt and len(output.token_ids) == 21 + 5
    assert output.text == Words().decode(output.token_ids)
    scored = generate(engine, prompt, max_tokens=0, prompt_logprobs=0)
    assert scored.prompt_logprobs[0] is None
    without_top = [entry._replace(top={}) for entry in output.prompt_logprobs[1:]]
    assert scored.prompt_logprobs[1:] == without_top
    assert (scored.token_ids, scored.text, scored.finish_reason) == ([], "", "length")


TOO_MANY_BIASES = {
    "logit_bias": dict.fromkeys(range(90), 1),
    "stop_token_ids": tuple(range(90)),
}


@pytest.mark.parametrize(
    "prompt, params, param, numbers",
    [
        ([], {}, "prompt", "at least 1 token"),
        ([100], {}, "prompt", "100.*99"),
        ([-1], {}, "prompt", "-1.*99"),
        ([1] * 60, {"max_tokens": 5}, None, "60.*5.*65.*64"),
        ([1], {"logit_bias": {100: 1}}, "logit_bias", "100.*99"),
        ([1], {"stop_token_ids": (-5,)}, "stop_token_ids", "-5.*99"),
        ([1], TOO_MANY_BIASES, "logit_bias", "181.*180"),
        ([1], {"temperature": -1}, "temperature", "-1.* 0"),
        ([1], {"temperature": math.nan}, "temperature", "nan"),
        ([1], {"top_p": 0}, "top_p", r"0.*\(0, 1\]"),
        ([1], {"top_k": 0}, "top_k", "0.*1"),
        ([1], {"min_p": 1.5}, "min_p", "1.5.*1"),
        ([1], {"n": 0}, "n", "0.*1"),
        ([1], {"logprobs": 21}, "logprobs", "21.*20"),
        ([1], {"prompt_logprobs": -1}, "prompt_logprobs", "-1.*0"),
        ([1], {"min_tokens": 17}, "min_tokens", "17.*16"),
        ([1], {"max_tokens": 0}, "max_tokens", "0"),
        ([1], {"repetition_penalty": 0}, "repetition_penalty", "0"),
        ([1], {"logit_bias": {1: math.inf}}, "logit_bias", "1e4"),
        ([1], {"stop": ("",)}, "stop", "empty"),
        ([1], {"stop": "word"}, "stop", "sequence"),
        ([1], {"seed": 2**63}, "seed", str(2**63)),
    ],
)
def test_what_cannot_be_served_is_refused(engine, monkeypatch, prompt, params, param, numbers):
    """Catches a mistake that is clamped, ignored, found only when the request runs, or that does
    not say which field it is about."""
    # More biases than that do not occur with 100 tokens.
    monkeypatch.setattr(engine_module, "MAX_BIASES", 180)
    with pytest.raises(UserError, match=numbers) as caught:
        engine.add(prompt, SamplingParams(**params))
    assert caught.value.param == param
    assert not engine.busy


@given(
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_text_stops_at_the_first_stop_string_and_takes_nothing_back(words, stop_strings):
    """Catches a stop string missed across tokens, text given out that a stop string cuts off, and
    text withheld for ever."""
    tokenizer = Words()
    tokenizer.words = words
    stream = TextStream(tokenizer, tuple(stop_strings))
    given_out = ""
    for i in range(len(words)):
        given_out += stream.push([i], last=i == len(words) - 1)
        so_far = "".join(words[: i + 1])
        found = [so_far.index(string) for string in stop_strings if string in so_far]
        assert stream.stopped == bool(found)
        if found:
            assert given_out == so_far[: min(found)]
            return
        assert so_far.startswith(given_out)
        withheld = so_far[len(given_out) :]
        assert withheld == "" or any(string.startswith(withheld) for string in stop_strings)
    assert given_out == "".join(words)
