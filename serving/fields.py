"""The fields of requests that ask for nothing: tables, and how they are taken out of a body.

Clients write out defaults, send null for what they leave out, and put back a message with all the
fields it came with. None of it asks for anything, so it is no mistake. A field whose value is not
in these tables stays in the body: there it is a field of protocol.py, or is refused by its name.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class SameAs(NamedTuple):
    """Stands for the value that another field of the same body has."""

    field: str


ANYTHING: tuple[Any, ...] = ()
"""Stands for every value: such a field changes no token."""

Neutral = Mapping[str, tuple[Any, ...]]
"""The values of each field that ask for nothing. null, which asks for nothing in any field, is not
listed."""

# What is common to completions and chats. First OpenAI's names, then vLLM's and SGLang's.
GENERATION: Neutral = {
    "best_of": (1, SameAs("n")),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "max_completion_tokens": (SameAs("max_tokens"),),
    "metadata": ANYTHING,
    "modalities": (["text"],),
    "prompt_cache_key": ANYTHING,
    "prompt_cache_retention": ANYTHING,
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "safety_identifier": ANYTHING,
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "top_logprobs": (0,),
    "user": ANYTHING,
    "verbosity": ("medium",),
    "add_special_tokens": (False,),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "early_stopping": (False,),
    "length_penalty": (1,),
    "priority": (0,),
    "return_cached_tokens_details": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "top_k": (-1, 0),
    "use_beam_search": (False,),
}

COMPLETION: Neutral = {
    **GENERATION,
    "parallel_tool_calls": (True, False),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
"""A chat has these fields."""

MESSAGE: Neutral = {
    "annotations": ([],),
    "name": ANYTHING,
    "tool_calls": ([],),
    "type": ("text", "message"),
}

# Obfuscation is padding, which hides the length of what is streamed. There is none here.
STREAM_OPTIONS: Neutral = {"include_obfuscation": (True, False)}

TOKENIZE: Neutral = {"add_special_tokens": (False,), "return_token_strs": (False,)}


def without_neutral(body: dict[str, Any], table: Neutral) -> dict[str, Any]:
    """Return the body without the fields that ask for nothing."""
    return {
        name: value
        for name, value in body.items()
        if value is not None and not (name in table and is_neutral(value, table[name], body))
    }


def is_neutral(value: Any, neutral: tuple[Any, ...], body: Mapping[str, Any]) -> bool:
    """Return whether a field's value is one of those that ask for nothing."""
    if neutral is ANYTHING:
        return True
    values = [body.get(v.field) if isinstance(v, SameAs) else v for v in neutral]
    return any(is_same(value, v) for v in values)


def is_same(value: Any, other: Any) -> bool:
    """Return whether two values are the same in JSON, where true is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)
