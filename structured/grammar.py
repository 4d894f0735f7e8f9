"""Masks of tokens from a StructuredOutput, by llguidance: which tokens may come next.

Start with `compile_matcher`, then Matcher. llguidance does its work without Python's lock and under
limits of its own, which count steps and not seconds, so that the same grammar is always refused or
never. Nothing in here is on the device.
"""

import json
import threading
from collections import OrderedDict
from functools import lru_cache
from typing import Any

import numpy as np

from errors import UserError, require
from structured.outputs import MAX_NESTING, StructuredOutput, nesting_of
from structured.schemas import closed, dicts_in
from tokenizer import Tokenizer

WORD_BITS = 32
CACHED_GRAMMARS = 64
TRIED_TOKENS = 8  # of a new grammar, before it is accepted

LIMITS: dict[str, Any] = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 1_000_000,  # 20 ms
    "step_lexer_fuel": 200_000,  # 14 ms
    "step_max_items": 50_000,  # 3 ms
    "max_lexer_states": 50_000,  # 1 to 2 KB each
    "max_grammar_size": 100_000,  # symbols
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}
"""Arguments of llguidance's ParserLimits, with the times that its documentation gives for them."""

JSON_OPTIONS: Any = {"whitespace_pattern": r"[\x20\x0A]{0,16}"}
"""Models write JSON with spaces and line breaks; without a bound some write nothing else."""


class Matcher:
    """Follows the tokens of one sample: `mask` says which may come next, `advance` takes one in."""

    def __init__(self, state: Any, end_ids: frozenset[int], virtual_end: int, words: int) -> None:
        """state: llguidance's matcher. end_ids: the tokens that end a sample. virtual_end: the id
        by which llguidance knows the end. words: uint32 of a mask."""
        self.state = state
        self.end_ids = end_ids
        self.virtual_end = virtual_end
        self.mask = np.zeros(words, np.uint32)
        """A bit for each token, 1 if it may come next, lowest of a word first."""
        self.ended = False
        """Whether the text is complete and nothing can follow."""
        self.stuck = False
        """Whether the text is not complete and nothing can follow: the vocabulary lacks it, or the
        grammar has become too complex."""

    def fork(self) -> "Matcher":
        """Return a matcher that stands where this one does."""
        other = Matcher(self.state.deep_copy(), self.end_ids, self.virtual_end, len(self.mask))
        other.mask, other.ended, other.stuck = self.mask, self.ended, self.stuck
        return other

    def advance(self, token: int) -> None:
        """Take in the token that has come, and make the mask of the next."""
        assert self.mask[token // WORD_BITS] >> np.uint32(token % WORD_BITS) & 1, (
            f"token {token} came, which the grammar does not allow"
        )
        if token in self.end_ids:
            self.ended = True
            return
        self.state.consume_token(token)
        self.look()

    def look(self) -> None:
        """Make the mask of the next token."""
        # A new array each time: the device may still read the one before.
        raw = np.frombuffer(self.state.compute_bitmask(), "<u4")
        mask = np.zeros(len(self.mask), np.uint32)
        common = min(len(raw), len(mask))
        mask[:common] = raw[:common]
        clear_bit(mask, self.virtual_end)
        goes_on = bool(mask.any()) and not self.state.is_error()
        accepts = self.state.is_accepting() and not self.state.is_error()
        self.ended = accepts and not goes_on
        self.stuck = not accepts and not goes_on
        if accepts:
            for token in self.end_ids:
                mask[token // WORD_BITS] |= np.uint32(1 << token % WORD_BITS)
        self.mask = mask


def try_out(matcher: Matcher) -> None:
    """Follow a grammar for some tokens. Raises UserError if it is too complex to go on so far."""
    for length in range(TRIED_TOKENS):
        words = np.flatnonzero(matcher.mask)
        if matcher.ended or not len(words):
            return
        bits = int(matcher.mask[words[0]])
        lowest = (bits & -bits).bit_length() - 1
        matcher.advance(int(words[0]) * WORD_BITS + lowest)
        if matcher.stuck:
            raise refusal(f"it is too complex, or the vocabulary lacks what follows token {length}")


def clear_bit(mask: np.ndarray, token: int) -> None:
    """Rule out a token, if the mask has a bit for it."""
    if token // WORD_BITS < len(mask):
        mask[token // WORD_BITS] &= ~np.uint32(1 << token % WORD_BITS)


class Vocabulary:
    """A tokenizer as llguidance wants it, which adds an end of its own to the tokens.

    So a vocabulary without an end-of-text token has one too, and one with several is as simple.
    Tokens that are no text are never allowed inside a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.bos_token_id = None
        self.eos_token_id = tokenizer.vocab_size
        no_text = set(tokenizer.special_tokens.values()) | tokenizer.stop_ids
        self.tokens = [
            b"\xff<special>" if token in no_text else tokenizer.token_bytes(token)
            for token in range(tokenizer.vocab_size)
        ] + [b"\xff<end>"]
        self.special_token_ids = sorted(no_text) + [self.eos_token_id]

    def __call__(self, text: str | bytes) -> list[int]:
        """Return the tokens of a text, none where the vocabulary lacks a part of it."""
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        try:
            return self.tokenizer.encode(text)
        except ValueError:
            return []


class Compiler:
    """Compiles grammars for one tokenizer, and keeps the newest of them. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises UserError where llguidance is not installed."""
        try:
            import llguidance  # here, because few programs need it
        except ImportError as error:
            raise UserError(
                "structured output needs llguidance: pip install -r requirements/serving.txt",
                param="structured_outputs",
            ) from error
        self.llguidance = llguidance
        self.tokenizer = tokenizer
        self.words = -(-tokenizer.vocab_size // WORD_BITS)
        vocabulary = llguidance.TokenizerWrapper(Vocabulary(tokenizer))
        self.vocabulary = llguidance.LLTokenizer(vocabulary)
        self.limits = llguidance.LLParserLimits(**LIMITS)
        self.lock = threading.Lock()
        self.compiled: OrderedDict[StructuredOutput, Matcher] = OrderedDict()

    def compile(self, form: StructuredOutput) -> Matcher:
        """Return a matcher at the beginning of a text. Raises UserError with the reason."""
        with self.lock:
            found = self.compiled.get(form)
        if found is None:
            found = self._compile(form)
            with self.lock:
                self.compiled[form] = found
                while len(self.compiled) > CACHED_GRAMMARS:
                    self.compiled.popitem(last=False)
        with self.lock:  # a matcher is not to be copied by two threads at once
            return found.fork()

    def _compile(self, form: StructuredOutput) -> Matcher:
        self._require_spelling(form)
        llguidance = self.llguidance
        try:
            state = llguidance.LLMatcher(
                self.vocabulary, self._source(form), log_level=0, limits=self.limits
            )
        except ValueError as error:
            raise refusal(str(error)) from error
        if state.is_error():
            raise refusal(state.get_error())
        stop_ids = frozenset(self.tokenizer.stop_ids)
        matcher = Matcher(state, stop_ids, self.tokenizer.vocab_size, self.words)
        matcher.look()
        if matcher.stuck:
            raise refusal("no token of this model's vocabulary can begin such a text")
        if matcher.ended:
            raise refusal("it takes the empty text alone")
        try_out(matcher.fork())
        return matcher

    def _source(self, form: StructuredOutput) -> str:
        """Return the grammar in llguidance's form. Raises ValueError or UserError."""
        matcher = self.llguidance.LLMatcher
        if form.regex is not None:
            return matcher.grammar_from_regex(form.regex)
        if form.grammar is not None:
            return matcher.grammar_from_lark(form.grammar)
        if form.choice is not None:
            texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in form.choice)
            return matcher.grammar_from_lark(f"start: {texts}")
        assert form.json is not None
        schema = json.dumps(closed(parse_schema(form.json)), ensure_ascii=False)
        return matcher.grammar_from_json_schema(schema, overrides=JSON_OPTIONS)

    def _require_spelling(self, form: StructuredOutput) -> None:
        """Raise UserError unless the vocabulary has the characters of what must be written."""
        if form.json is not None:
            schema = parse_schema(form.json)
            texts = [json.dumps(text, ensure_ascii=False) for text in fixed_texts(schema)]
        else:
            texts = list(form.choice or ())
        for text in texts:
            try:
                self.tokenizer.encode(text)
            except UserError as error:
                raise refusal(str(error)) from error


def parse_schema(text: str) -> Any:
    """Return a JSON schema that was given as text. Raises UserError if it is none."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refusal(f"the schema is no JSON: {error}") from error
    require(
        isinstance(schema, (dict, bool)) and nesting_of(schema) <= MAX_NESTING,
        f"a JSON schema is an object nested at most {MAX_NESTING} deep",
        param="structured_outputs",
    )
    return schema


def fixed_texts(schema: Any) -> list[Any]:
    """Return the values of a schema that an answer may have to hold as they are written."""
    found: list[Any] = []
    for item in dicts_in(schema):
        found += item["enum"] if isinstance(item.get("enum"), list) else []
        found += [item["const"]] if "const" in item else []
        found += item["properties"] if isinstance(item.get("properties"), dict) else []
    return found


def refusal(reason: str) -> UserError:
    """Return the error for a form that cannot be compiled."""
    first = " ".join(reason.split())[:500]
    return UserError(
        f"the structured output cannot be compiled: {first}", param="structured_outputs"
    )


@lru_cache(maxsize=4)
def compiler_of(tokenizer: Tokenizer) -> Compiler:
    """Return the compiler for a tokenizer, the same for every caller. The first call takes a second
    with a large vocabulary."""
    return Compiler(tokenizer)


def matcher_for(form: StructuredOutput | None, tokenizer: Tokenizer | None) -> Matcher | None:
    """Return a matcher for a model's next text, None if the text may be anything.

    Raises UserError, with the reason, if the form cannot be compiled."""
    if form is None:
        return None
    require(
        tokenizer is not None,
        "structured output needs an engine with a tokenizer",
        param="structured_outputs",
    )
    assert tokenizer is not None
    return compiler_of(tokenizer).compile(form)
