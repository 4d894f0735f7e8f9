"""What the text of a sample may be: StructuredOutput, a field of SamplingParams.

Plain Python. What makes token masks of it is grammar.py, which alone needs llguidance.
"""

import json
from dataclasses import dataclass
from typing import Any

from errors import require

MAX_GRAMMAR = 1 << 17
"""Characters of a schema, a regular expression, all choices or a grammar. Larger ones are refused
without a look: to compile so many takes a fraction of a second."""

MAX_NESTING = 200
"""Levels of a schema's JSON. Each takes frames of the compiler's stack."""

KINDS = ("json", "regex", "choice", "grammar")


@dataclass(frozen=True)
class StructuredOutput:
    """The form of a sample's text. Exactly one field is given; the names are vLLM's."""

    json: str | None = None
    """A JSON schema as text; the sample is JSON that fits it. "{}" takes any JSON."""
    regex: str | None = None
    """A regular expression that the whole sample matches, without backreferences and lookaround."""
    choice: tuple[str, ...] | None = None
    """Texts of which the sample is one."""
    grammar: str | None = None
    """A context-free grammar in Lark's form, as llguidance reads it. It begins with `start`."""

    def __post_init__(self) -> None:
        """Raise UserError unless exactly one form is given, and it is not too large."""
        given = [name for name in KINDS if getattr(self, name) is not None]
        require(
            len(given) == 1,
            f"structured output has {len(given)} forms: give one of {', '.join(KINDS)}",
            param="structured_outputs",
        )
        if self.choice is not None:
            require(
                not isinstance(self.choice, str) and len(self.choice) > 0 and all(self.choice),
                "choice must be a list of at least 1 text, none of them empty",
                param="structured_outputs",
            )
        require(
            self.size <= MAX_GRAMMAR,
            f"{given[0]} has {self.size} characters, and {MAX_GRAMMAR} is the limit: send less",
            param="structured_outputs",
        )

    @property
    def size(self) -> int:
        """Characters of what is given."""
        texts = self.choice or (self.json, self.regex, self.grammar)
        return sum(len(text) for text in texts if text is not None)

    @classmethod
    def of_schema(cls, schema: Any) -> "StructuredOutput":
        """Return the form of a JSON schema, given as Python has it. Raises UserError."""
        require(
            nesting_of(schema) <= MAX_NESTING,
            f"the schema is nested more than {MAX_NESTING} deep: make it flatter",
            param="structured_outputs",
        )
        return cls(json=json.dumps(schema, ensure_ascii=False))


def nesting_of(value: Any) -> int:
    """Return how deep lists and dicts of value are nested, or MAX_NESTING + 1 if more."""
    level = [value]
    for depth in range(MAX_NESTING + 1):
        containers = [item for item in level if isinstance(item, (dict, list))]
        if not containers:
            return depth
        level = []
        for item in containers:
            level += item.values() if isinstance(item, dict) else item
    return MAX_NESTING + 1
