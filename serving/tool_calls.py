"""Calls of functions in what a model writes: the grammar that forces one, and how they are read.

A model marks a call as its family does; `style_of` tells by the chat template. CallReader takes the
text as it comes and tells calls from words.
"""

import json
import re
import uuid
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, Field

from serving.tools import Function, Tool
from structured.grammar import JSON_OPTIONS
from structured.outputs import StructuredOutput
from structured.schemas import closed

ESCAPE_OR_QUOTE = re.compile(r'\\.|"', re.DOTALL)


class WrittenFunction(BaseModel):
    """A function that the model calls, and with what."""

    name: str
    arguments: str = Field(description="a JSON object as text")


class WrittenCall(BaseModel):
    """A call that the model has written."""

    id: str
    type: Literal["function"] = "function"
    function: WrittenFunction


class StreamedCall(WrittenCall):
    """A call in a stream: each comes whole, once it is complete."""

    index: int = Field(description="number of the call in its sample")


class Call(NamedTuple):
    """A call of a function, as it was read."""

    name: str
    arguments: str
    """a JSON object"""


class Said(NamedTuple):
    """What a text says."""

    words: str
    calls: list[Call]


def written_call(call: Call) -> WrittenCall:
    """Return a call as an answer has it, with a name of its own."""
    function = WrittenFunction(name=call.name, arguments=call.arguments)
    return WrittenCall(id=f"call_{uuid.uuid4().hex[:24]}", function=function)


@dataclass(frozen=True)
class CallStyle:
    """How a family of models writes a call, which is JSON with a name and arguments."""

    opening: str
    closing: str
    arguments: str
    """The key of the arguments."""
    several: bool
    """Whether one answer may have several calls."""


MARKED = CallStyle("<tool_call>", "</tool_call>", "arguments", several=True)
"""Hermes, Qwen, SmolLM, and what as_plain_messages asks for."""

BARE = CallStyle("", "", "parameters", several=False)
"""Llama 3: the answer is one call and nothing else."""


def style_of(template: str) -> CallStyle:
    """Return how the model of this chat template writes calls."""
    is_llama = "<tool_call>" not in template and "ipython" in template
    return BARE if is_llama else MARKED


def knows_tools(template: str) -> bool:
    """Return whether a chat template can tell the model of tools."""
    return re.search(r"\btools\b", template) is not None


def form_of_calls(
    tools: list[Tool], style: CallStyle, several: bool, otherwise: str | None = None
) -> StructuredOutput:
    """Return the form of an answer that calls one of the tools, or several if it may.

    otherwise: the JSON schema of an answer that calls none; without it, one must be called.
    Arguments always fit the function's schema. Each schema stands alone in the grammar, so that its
    references to "#/$defs/..." hold."""
    call = "function"
    if style.opening:
        call = f'"{style.opening}\\n" function "\\n{style.closing}"'
    lines = ["start: calls"]
    if otherwise is not None:
        lines = ["start: calls | answer", f"answer: %json {otherwise}"]
    lines += [
        'calls: call ("\\n" call)*' if several and style.several else "calls: call",
        f"call: {call}",
        "function: " + " | ".join(f"function_{number}" for number in range(len(tools))),
    ]
    for number, tool in enumerate(tools):
        lines += rules_of_function(number, tool.function, style)
    return StructuredOutput(grammar="\n".join(lines))


def rules_of_function(number: int, function: Function, style: CallStyle) -> list[str]:
    """Return the rules of a grammar for the JSON of a call of this function."""
    before = f'{{"name": "{function.name}", "{style.arguments}": '
    schema = closed(function.arguments_schema()) | {"x-guidance": JSON_OPTIONS}
    return [
        f'function_{number}: {json.dumps(before)} arguments_{number} "}}"',
        f"arguments_{number}: %json {json.dumps(schema, ensure_ascii=False)}",
    ]


class CallReader:
    """Tells calls from words in a text that comes in pieces: `push`, and at its end `finish`.

    What looks like a call and is none, because its JSON is broken or its function unknown, is given
    as the words it is. Nothing is lost but the space around calls."""

    def __init__(self, style: CallStyle, names: set[str], several: bool) -> None:
        """names: of the functions that there are. several: whether more than one call counts; the
        others are left out."""
        self.style = style
        self.names = names
        self.several = several
        self.pending = ""
        """What has come and is not told yet: the beginning of a call, or of what may become one."""
        self.has_called = False
        self.passed = 0
        """Characters of the call that have been looked at, once one has begun."""
        self.in_string = False
        """Whether they end within a string of its JSON."""
        self.quote_or_closing = re.compile(f'"|{re.escape(style.closing)}')

    def push(self, text: str) -> Said:
        """Take in the next piece; return the words and the calls that are certain by now."""
        self.pending += text
        if not self.style.opening:
            return self._push_bare()
        words: list[str] = []
        calls: list[Call] = []
        while self._take_block(words, calls):
            pass
        return Said("".join(words), calls)

    def finish(self) -> Said:
        """Return the words and calls that remain, once the text has ended."""
        rest, self.pending = self.pending, ""
        call = None if self.style.opening else self._read(rest)
        if call is not None:
            self.has_called = True
            return Said("", [call])
        return Said("" if self.has_called and not rest.strip() else rest, [])

    def _push_bare(self) -> Said:
        """Return words as they come; what begins as JSON waits for its end."""
        if self.pending.lstrip()[:1] in ("", "{"):
            return Said("", [])
        words, self.pending = self.pending, ""
        return Said(words, [])

    def _take_block(self, words: list[str], calls: list[Call]) -> bool:
        """Move what is certain from `pending` to words and calls, up to the end of a call.

        Returns whether there may be more to move."""
        before, opening, after = self.pending.partition(self.style.opening)
        if not opening:
            certain = len(self.pending) - length_of_possible_call(self.pending, self.style.opening)
            words.append(self.pending[:certain])
            self.pending = self.pending[certain:]
            return False
        if before.strip():
            words.append(before.rstrip())
        self.pending = opening + after
        end = self._end_of_call(after)
        if end is None:
            return False
        self.pending = after[end + len(self.style.closing) :]
        call = self._read(after[:end])
        if call is None:
            words.append(opening + after[:end] + self.style.closing)
        elif self.several or not self.has_called:
            calls.append(call)
            self.has_called = True
        return True

    def _end_of_call(self, text: str) -> int | None:
        """Return where the first closing mark stands that is in none of the JSON's strings.

        Goes on where the last call of it ended: arguments can be long, and come in small pieces."""
        closing = self.style.closing
        while True:
            pattern = ESCAPE_OR_QUOTE if self.in_string else self.quote_or_closing
            found = pattern.search(text, self.passed)
            if found is None:  # the last characters may be part of an escape or of the mark
                self.passed = max(self.passed, len(text) - len(closing))
                return None
            self.passed = found.end()
            if found[0] == closing:
                self.passed = 0
                return found.start()
            if found[0] == '"':
                self.in_string = not self.in_string

    def _read(self, text: str) -> Call | None:
        """Return the call that a text is, None if it is none."""
        try:
            call: Any = json.loads(text, parse_constant=refuse_constant)
        except (ValueError, RecursionError):
            return None
        if not isinstance(call, dict):
            return None
        name = call.get("name")
        arguments = call.get(self.style.arguments)
        if not isinstance(name, str) or name not in self.names or not isinstance(arguments, dict):
            return None
        # With escapes: a model may write half a surrogate pair, for which UTF-8 has no bytes.
        return Call(name, json.dumps(arguments))


def refuse_constant(name: str) -> None:
    """Raise ValueError: Python reads NaN and Infinity, which JSON does not have."""
    raise ValueError(f"{name} is no JSON")


def length_of_possible_call(text: str, opening: str) -> int:
    """Return how many characters at the end of a text may belong to a call: the beginning of its
    mark, and the space before it."""
    lengths = range(len(opening) - 1, 0, -1)
    partial = next((n for n in lengths if text.endswith(opening[:n])), 0)
    before = text[: len(text) - partial]
    return partial + len(before) - len(before.rstrip())
