"""What a request may ask for: a tiny engine and each of SamplingParams, stops, logprobs,
refusals."""

import dataclasses
import math
import re
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine as engine_module
from engine import Engine
from errors import UserError
from model import GPT
from sampling import spell
from sequence import Output, SamplingParams, TextStream
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
    """Catches logprobs and ranks of other tokens, after penalties, or off by one; and prompts
    scored through a prefix hit."""
    [prompt] = prompts_of([21])
    for _ in range(times):
        output = generate(engine, prompt, **SCORED)
    tokens = prompt + output.token_ids
    [expected] = dense_logprobs(model, [tokens])
    entries = output.prompt_logprobs + output.logprobs
    assert entries[0] is None
    following = zip(tokens[1:], entries[1:], strict=True)
    for position, (token, entry) in enumerate(following):
        logprobs = expected[position]
        count = SCORED["prompt_logprobs"] if position < len(prompt) - 1 else SCORED["logprobs"]
        assert entry.token == token
        assert entry.logprob == pytest.approx(logprobs[token], abs=1e-5)
        assert entry.rank == 1 + (logprobs > logprobs[token]).sum()
        assert list(entry.top) == np.argsort(-logprobs)[:count].tolist()
        np.testing.assert_allclose(list(entry.top.values()), -np.sort(-logprobs)[:count], atol=1e-5)


def test_echo_and_scoring_alone(engine):
    """Catches an echo that is not the prompt's text or changes the new tokens, and a score without
    new tokens that differs from one with them."""
    [prompt] = prompts_of([21])
    output = generate(engine, prompt, **SCORED)
    assert len(output.token_ids) == 5
    assert output.text == Words().decode(prompt + output.token_ids)
    scored = generate(engine, prompt, max_tokens=0, prompt_logprobs=0)
    assert scored.prompt_logprobs[0] is None
    without_top = [entry._replace(top={}) for entry in output.prompt_logprobs[1:]]
    assert scored.prompt_logprobs[1:] == without_top
    assert (scored.token_ids, scored.text, scored.finish_reason) == ([], "", "length")


def text_of(engine, prompt: str, answer: str, **params) -> Output:
    """Return the one sample whose new tokens spell answer: each is made certain by a bias."""
    tokens = engine.tokenizer.encode(answer)
    assert len(set(tokens)) == len(tokens), "presence makes each come once, in order of the biases"
    biases = {token: 5000.0 - 100 * i for i, token in enumerate(tokens)}
    params = {"logit_bias": biases, "presence_penalty": 9000.0, "temperature": 0, **params}
    return generate(
        engine, engine.tokenizer.encode(prompt), **{"max_tokens": len(tokens), **params}
    )


def test_a_stop_string_in_an_echoed_prompt(char_engine):
    """Catches a sample that ends before it begins, because its own prompt has the stop string, or
    begins it; and one whose echo hides the stop string that is generated."""
    output = text_of(char_engine, "xST", "OPabcSTuv", stop=("ST", "STOP", "TO"), echo=True)
    assert (output.text, output.finish_reason) == ("xSTOPabc", "stop")
    assert output.stop_reason == "ST"
    assert output.token_ids == char_engine.tokenizer.encode("OPabcST")


@pytest.mark.parametrize(
    "stop, min_tokens, text",
    [
        ("bc", 2, "a"),  # "bc" ends with the third token
        ("bc", 3, "a"),
        ("bc", 4, "abcdefg"),
        ("b", 2, "a"),
        ("b", 3, "abcdefg"),
        ("cde", 4, "ab"),  # begun before min_tokens, and complete after them
        ("cde", 5, "ab"),
        ("cde", 6, "abcdefg"),
        ("g", 7, "abcdef"),
    ],
)
@pytest.mark.parametrize("other", [(), ("bcdz", "z")])
def test_stop_strings_and_min_tokens(char_engine, stop, min_tokens, text, other):
    """Catches a stop string that is overlooked because it ends exactly at min_tokens or began
    before, or one that ends a sample too early."""
    output = text_of(char_engine, "x", "abcdefg", stop=(stop, *other), min_tokens=min_tokens)
    assert output.text == text
    assert len(output.token_ids) >= min_tokens
    stopped = text != "abcdefg"
    assert output.finish_reason == ("stop" if stopped else "length")
    assert output.stop_reason == (stop if stopped else None)


def test_what_ends_a_sample_is_named_and_may_be_part_of_the_text(char_engine, engine):
    """Catches a stop_reason that is another's, one for the end-of-text token, and what has ended
    the sample in the text or left out of it against the request's will."""
    end_on_c = {"stop_token_ids": tuple(char_engine.tokenizer.encode("c"))}
    output = text_of(char_engine, "x", "abcde", stop=("cd", "zz"))
    assert (output.text, output.stop_reason) == ("ab", "cd")
    output = text_of(char_engine, "x", "abcde", stop=("zz", "cd"), include_stop_str_in_output=True)
    assert (output.text, output.stop_reason) == ("abcd", "cd")
    output = text_of(char_engine, "x", "abcde", **end_on_c)
    assert (output.text, output.stop_reason) == ("ab", *end_on_c["stop_token_ids"])
    output = text_of(char_engine, "x", "abcde", include_stop_str_in_output=True, **end_on_c)
    assert output.text == "abc"
    output = generate(engine, [1, 2], logit_bias={END: 100}, include_stop_str_in_output=True)
    assert (output.text, output.finish_reason, output.stop_reason) == ("<end>", "stop", None)


class SpecialWords(Words):
    """Words whose end-of-text token, and token 7, are special."""

    special_tokens = {"<end>": END, "<seven>": 7}


def test_special_tokens_are_no_text(model):
    """Catches a special token in the text that nobody asked for, or missing where it is asked for;
    ordinary tokens of the same text that are lost."""
    engine = make_engine(model, SpecialWords())
    params = {"logit_bias": {7: 100, 8: 101}, "frequency_penalty": 1.0, "max_tokens": 9}
    plain = generate(engine, [7, 1], **params, temperature=0, echo=True)
    whole = generate(engine, [7, 1], **params, temperature=0, echo=True, skip_special_tokens=False)
    assert plain.token_ids == whole.token_ids and {7, 8} == set(plain.token_ids)
    words = SpecialWords()
    assert whole.text == words.decode([7, 1, *whole.token_ids])
    assert plain.text == words.decode([t for t in [1, *whole.token_ids] if t != 7])


def test_samples_without_a_seed_differ(engine):
    """Catches a default seed that all requests share, and seeds whose high half is lost."""
    [prompt] = prompts_of([9])
    same = {"max_tokens": 12, "ignore_eos": True}
    assert generate(engine, prompt, **same).token_ids != generate(engine, prompt, **same).token_ids
    [[first], [second]] = engine.generate([prompt] * 2, SamplingParams(**same), progress=False)
    assert first.token_ids != second.token_ids
    low = generate(engine, prompt, seed=5, **same)
    high = generate(engine, prompt, seed=5 + 2**32, **same)
    assert low.token_ids != high.token_ids


def test_allowed_tokens_and_bad_words(model, char_engine):
    """Catches an allowed set or a bad word that does not reach the device, that takes tokens from
    another request of the same step, or that compiles something."""
    allowed = tuple(char_engine.tokenizer.encode("abX"))
    some = SamplingParams(max_tokens=24, seed=1, allowed_token_ids=allowed)
    free = SamplingParams(max_tokens=24, seed=1)
    no_pairs = dataclasses.replace(some, bad_words=("aa", "ab", "XX"))
    prompts = [[5, 6]] * 3
    programs = char_engine.programs()
    [[one], [two], [three]] = char_engine.generate(prompts, [some, free, no_pairs], progress=False)
    assert char_engine.programs() == programs == char_engine.programs_at_start
    assert set(one.text) == set("abX")
    assert two == dataclasses.replace(
        generate(char_engine, [5, 6], max_tokens=24, seed=1),
        request_id=two.request_id,
        times=two.times,
    )
    assert set(three.text) == set("abX")
    for word, count in (("aa", 0), ("ab", 0), ("XX", 0)):
        assert three.text.count(word) == count
    assert "aa" in one.text or "ab" in one.text or "XX" in one.text, "nothing was at stake"
    greedy = generate(char_engine, [5, 6], max_tokens=3, temperature=0)
    banned = generate(char_engine, [5, 6], max_tokens=3, temperature=0, bad_words=(greedy.text[0],))
    assert greedy.text[0] not in banned.text


class Spaces(Words):
    """A vocabulary in which "a" and " a" are tokens, and other characters are tokens of their own,
    the space among them."""

    def encode(self, text: str) -> list[int]:
        """Return a token for " a", and for each other character."""
        return [1 if piece == " a" else 2 + ord(piece) % 64 for piece in re.findall(" a|.", text)]


def test_bad_words_are_spelled_inside_a_text_too():
    """Catches a word that is banned at the beginning of a text only, or a space that is banned with
    it."""
    assert spell(("a", "  a", "b", " "), Spaces()) == [[35], [1], [35], [1], [36], [34]]
    assert spell(("ab",), CharTokenizer("ab")) == [[0, 1]]
    with pytest.raises(UserError, match="z") as caught:
        spell(("z",), CharTokenizer("ab"))
    assert caught.value.param == "bad_words"


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
        ([1] * 60, {"max_tokens": 5}, "max_tokens", "maximum context length is 64.*60.*5.*65"),
        ([1] * 64, {"max_tokens": 5}, "prompt", "64.*64.*5.*69"),
        ([1] * 65, {"max_tokens": 0, "echo": True}, "prompt", "64.*65.*0.*65"),
        ([1], {"allowed_token_ids": (1, 100)}, "allowed_token_ids", "100.*99"),
        ([1], {"allowed_token_ids": ()}, "allowed_token_ids", "at least 1"),
        ([1], {"allowed_token_ids": (END,), "min_tokens": 1}, "allowed_token_ids", "of 1 .*1 at"),
        ([1], {"bad_words": "word"}, "bad_words", "sequence"),
        ([1], {"bad_words": ("",)}, "bad_words", "empty"),
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


def test_bad_words_have_limits(char_engine, engine):
    """Catches bad words that are cut off, or that leave a request without any token."""
    for prompt, words, numbers in (
        ([1], tuple("x" * 100 for _ in range(6)), "600 tokens.* 6 spellings.*512"),
        ([1], tuple(string.printable), "of 100 .*100 at once"),
        ([1], ("a", *(f"b{c}" for c in string.printable if c != "a")), "of 100 .*100 at once"),
    ):
        with pytest.raises(UserError, match=numbers) as caught:
            char_engine.add(prompt, SamplingParams(bad_words=words))
        assert caught.value.param == "bad_words"
    fits = SamplingParams(bad_words=tuple("x" * 128 for _ in range(4)), max_tokens=1)
    char_engine.generate([[1]], fits, progress=False)


def found_stops(so_far: str, new_from: int, stop_strings: list[str]) -> list[tuple[int, int]]:
    """Return where each occurrence of a stop string begins and ends that ends behind new_from."""
    spans = []
    for stop in stop_strings:
        begins = [i for i in range(len(so_far)) if so_far.startswith(stop, i)]
        spans += [(i, i + len(stop)) for i in begins if i + len(stop) > new_from]
    return spans


@given(
    st.lists(st.text("ab", min_size=1, max_size=3), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.integers(0, 4),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_text_stops_at_the_first_stop_string_and_takes_nothing_back(
    words, stop_strings, min_tokens, include
):
    """Catches a stop string missed across tokens, or found before min_tokens; text given out that a
    stop string cuts off, and text withheld for ever, or withheld although it is included."""
    tokenizer = Words()
    tokenizer.words = words
    params = SamplingParams(stop=tuple(stop_strings), include_stop_str_in_output=include)
    stream = TextStream(tokenizer, params)
    given_out = so_far = ""
    for i, word in enumerate(words):
        searches = i + 1 >= min_tokens
        given_out += stream.push([i], last=i == len(words) - 1, search=searches)
        spans = found_stops(so_far + word, len(so_far), stop_strings) if searches else []
        so_far += word
        assert (stream.stop_string is not None) == bool(spans)
        if spans:
            begin, end = min(spans)
            assert stream.stop_string == so_far[begin:end]
            assert given_out == so_far[: end if include else begin]
            return
        assert so_far.startswith(given_out)
        withheld = so_far[len(given_out) :]
        assert withheld == "" or any(string.startswith(withheld) for string in stop_strings)
        assert not (include and withheld)
    assert given_out == "".join(words)
