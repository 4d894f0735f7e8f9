"""Tests of structured output in the engine: the form of texts, the same bits, hostile grammars."""

import json
import re
import time
from collections import Counter

import pytest

import schemas
from errors import UserError
from schemas import TOKENIZER, make_engine, random_schema
from sequence import SamplingParams
from structured.grammar import matcher_for
from structured.outputs import MAX_GRAMMAR, StructuredOutput

pytest.importorskip("llguidance")
pytestmark = pytest.mark.slow
PROMPT = [1, 2, 3]


@pytest.fixture(scope="module")
def engine():
    """Return the engine of the tiny model."""
    return make_engine()


def generate(engine, prompts, params):
    """Return tokens, logprobs and finish reasons of all samples."""
    outputs = engine.generate(prompts, params, progress=False)
    return [[(o.token_ids, o.logprobs, o.text, o.finish_reason) for o in s] for s in outputs]


def mixed(structured: StructuredOutput, count: int) -> list[SamplingParams]:
    """Return params of requests, every other one with structured output."""
    return [
        SamplingParams(max_tokens=40, seed=i, logprobs=2, structured=structured if i % 2 else None)
        for i in range(count)
    ]


def test_complete_answers_fit_their_schemas(engine):
    """Catches: an answer that is called complete and is no JSON, or does not fit its schema; a
    program that is compiled after the start."""
    some = [random_schema(seed) for seed in range(12)]
    count = Counter(schemas.verdict(*pair) for pair in schemas.answers(engine, some, 2))
    assert set(count) <= {"valid", "cut off"}, count
    assert count["valid"] > 10
    assert engine.programs() == engine.programs_at_start


def test_regular_expressions_and_choices(engine):
    """Catches: a text that does not match; a sample that does not end when nothing can follow."""
    expression = r"(ab|c){2,4}-\d{3}"
    choices = ("grün", "red", "日本")
    forms = [StructuredOutput(regex=expression), StructuredOutput(choice=choices)]
    params = [SamplingParams(max_tokens=30, seed=0, n=8, structured=form) for form in forms]
    matching, chosen = engine.generate([PROMPT] * 2, params, progress=False)
    assert all(re.fullmatch(expression, o.text) for o in matching), matching
    assert {o.text for o in chosen} <= set(choices)
    assert len({o.text for o in chosen}) > 1, "the samples of a request are one"
    assert {o.finish_reason for o in matching + chosen} == {"stop"}


def test_what_is_cut_off_is_not_called_complete(engine):
    """Catches: half a JSON that ends with "stop"."""
    form = StructuredOutput(regex="[a-z]{20}")
    [[output]] = engine.generate(
        [PROMPT], SamplingParams(max_tokens=5, structured=form), progress=False
    )
    assert (output.finish_reason, len(output.text)) == ("length", 5)
    form = StructuredOutput(regex="[a-z]{5};")
    params = SamplingParams(max_tokens=10, structured=form, stop=(";",))
    [[output]] = engine.generate([PROMPT], params, progress=False)
    assert (output.finish_reason, len(output.text)) == ("length", 5)


def test_the_same_bits(engine):
    """Catches: a mask of a neighbour's row, one that changes a neighbour's bits, or a matcher that
    did not come back from a preemption."""
    form = StructuredOutput.of_schema(random_schema(1))
    params = mixed(form, 12)
    prompts = [[i, i + 1] for i in range(12)]
    together = generate(engine, prompts, params)
    alone = [generate(engine, [p], [q])[0] for p, q in zip(prompts, params, strict=True)]
    assert together == alone
    plain = generate(engine, prompts[::2], params[::2])
    assert together[::2] == plain
    assert generate(engine, prompts[::-1], params[::-1]) == together[::-1]


def test_preempted(engine):
    """Catches: a matcher that has lost its place where a sequence left its pages and came back."""
    form = StructuredOutput(regex=r"(ab|cd|ef){35}")
    params = [SamplingParams(max_tokens=70, seed=i, logprobs=2, structured=form) for i in range(12)]
    prompts = [[i, i + 1] for i in range(12)]
    expected = generate(engine, prompts, params)
    free = engine.blocks.num_free
    before = engine.stats().preemptions
    held = engine.blocks
    held.open("others", [0], False)
    assert held.write("others", 0, (free - 33) * 16) is not None  # leave 33 pages
    got = generate(engine, prompts, params)
    held.free("others")
    assert engine.stats().preemptions > before
    assert got == expected
    assert all(re.fullmatch("(ab|cd|ef){35}", sample[2]) for [sample] in got)


NUMBER = {"type": "integer"}
NAMED = {"type": "object", "properties": {"a": NUMBER}}


@pytest.mark.parametrize(
    ("schema", "text", "fits"),
    [
        (NAMED, '{"a":1}', True),
        (NAMED, '{"b":1}', False),
        (NAMED | {"additionalProperties": True}, '{"b":1}', True),
        (NAMED | {"required": ["b"]}, '{"b":1}', True),
        (NAMED | {"patternProperties": {"^b$": NUMBER}}, '{"b":1}', True),
        ({"type": "object", "properties": {"o": NAMED}}, '{"o":{"b":1}}', False),
        ({"type": "object", "properties": {"allOf": NAMED}}, '{"allOf":{"b":1}}', False),
        ({"$ref": "#/$defs/o", "$defs": {"o": NAMED}}, '{"b":1}', False),
        ({"items": NAMED, "type": "array"}, '[{"b":1}]', False),
        ({"anyOf": [NAMED, {"type": "null"}]}, '{"b":1}', False),
        ({"allOf": [NAMED, {"properties": {"b": NUMBER}}]}, '{"a":1,"b":1}', True),
        (NAMED | {"anyOf": [{"properties": {"b": NUMBER}}]}, '{"a":1,"b":1}', True),
        ({"enum": [{"properties": {}, "b": 1}]}, '{"properties":{},"b":1}', True),
        ({"type": "object"}, '{"b":1}', True),
    ],
)
def test_objects_have_the_properties_that_are_named(schema, text, fits):
    """Catches objects to which a model adds properties without an end, and schemas that say what
    else may come and are closed nevertheless."""
    matcher = matcher_for(StructuredOutput.of_schema(schema), TOKENIZER)
    accepted = matcher.state.validate_tokens(TOKENIZER.encode(text)) == len(text)
    assert accepted == fits


HOSTILE = {
    "exponential": StructuredOutput.of_schema(
        {
            "allOf": [
                {"anyOf": [{"properties": {f"p{i}{j}": {"type": "string"}}} for j in range(4)]}
                for i in range(12)
            ]
        }
    ),
    "a loop": StructuredOutput(json='{"$ref": "#"}'),
    "another file": StructuredOutput(json='{"$ref": "http://example.org/x"}'),
    "no JSON": StructuredOutput(json='{"type"'),
    "what is not implemented": StructuredOutput(json='{"not": {}}'),
    "a reference back": StructuredOutput(regex=r"(a)\1"),
    "a letter that is not there": StructuredOutput(choice=("ж",)),
    "a grammar that names nothing": StructuredOutput(grammar="start: nothing"),
    "deep": StructuredOutput(json='{"items":' * 5000 + "{}" + "}" * 5000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_forms_are_refused_at_once(name):
    """Catches: a form that takes the compiler's time or stack, or is accepted and cannot be."""
    began = time.monotonic()
    with pytest.raises(UserError, match="compiled|nested"):
        matcher_for(HOSTILE[name], TOKENIZER)
    assert time.monotonic() - began < 2


def test_catastrophic_expressions_take_no_time():
    """Catches: a regular expression whose automaton is made as a whole, or that backtracks."""
    began = time.monotonic()
    for regex in ("(a+)+b", "(a|b)*a(a|b){60}", "((a{1,1000}){1,1000}){1,1000}"):
        matcher = matcher_for(StructuredOutput(regex=regex), TOKENIZER)
        for _ in range(50):
            if not matcher.stuck:
                matcher.advance(TOKENIZER.ids["a"])
    assert time.monotonic() - began < 5


def test_what_is_too_large_is_refused():
    """Catches: a megabyte given to the compiler; two forms of which one is ignored."""
    with pytest.raises(UserError, match=str(MAX_GRAMMAR)):
        StructuredOutput(regex="a" * (MAX_GRAMMAR + 1))
    with pytest.raises(UserError, match="2 forms"):
        StructuredOutput(regex="a", choice=("b",))
    with pytest.raises(UserError, match="stop_token_ids does not go"):
        SamplingParams(stop_token_ids=(1,), structured=StructuredOutput(regex="a"))


def test_the_end_of_text_comes_where_the_text_is_complete():
    """Catches: an end-of-text token that is allowed too early, or never."""
    from tokenizer import CharTokenizer

    class Ending(CharTokenizer):
        """The last character ends a text."""

        @property
        def stop_ids(self):
            return frozenset([2])

    matcher = matcher_for(StructuredOutput(regex="ab+"), Ending("ab~"))
    masks = [int(matcher.mask[0])]
    for token in (0, 1, 1):
        matcher.advance(token)
        masks.append(int(matcher.mask[0]))
    assert masks == [0b001, 0b010, 0b110, 0b110]
    matcher.advance(2)
    assert matcher.ended


def test_json_in_a_stream_of_text_is_whole(engine):
    """Catches: text that is withheld at the end of a sample that its grammar ends."""
    form = StructuredOutput.of_schema({"enum": [{"a": "é"}]})
    [[output]] = engine.generate(
        [PROMPT], SamplingParams(max_tokens=60, structured=form), progress=False
    )
    assert json.loads(output.text) == {"a": "é"}
