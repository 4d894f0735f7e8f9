"""How a config class becomes flags: what the words of a flag mean, and what --help says of it.

tyro makes a flag of each field of a dataclass. `RULES` tells it how: `fields_of_config` hands it
each field with its docstring, and `values_of_words` turns words into values, with a sentence for
the words that mean nothing. A config class uses `default_is` and `MemorySize` in its annotations.
"""

import ast
import contextlib
import dataclasses
import functools
import inspect
import itertools
import math
import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from errors import UserError

RULES = ConstructorRegistry()

UNIT_BYTES = {
    "": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
"""Bytes of each unit of memory, in lower case; a number alone counts bytes."""


@dataclass(frozen=True)
class Flag:
    """A field of a config class as a user sees it."""

    name: str
    """Name of the field."""
    kind: Any
    """Type of the value, without annotations."""
    rule: PrimitiveConstructorSpec
    """How the words of a value are read."""
    required: bool
    """Whether it has no default."""
    positional: bool
    """Whether it is a word alone, without --name."""

    @property
    def usage(self) -> str:
        """The flag as it is written: --n_layer=INT, --prompt_tokens INT INT."""
        joint = " " if is_tuple(self.kind) else "="
        return f"--{self.name}{joint}{self.rule.metavar}"

    @property
    def meaning(self) -> str:
        """What its value is, for a sentence."""
        return describe(self.kind)

    @property
    def least_values(self) -> int:
        """How many words its value has at least. A boolean alone is True, an open tuple empty."""
        if self.kind is bool or is_open_tuple(self.kind):
            return 0
        return len(get_args(self.kind)) if is_tuple(self.kind) else 1

    @property
    def most_values(self) -> float:
        """How many words its value has at most."""
        if is_open_tuple(self.kind):
            return math.inf
        return max(1, self.least_values)

    def read(self, words: list[str]) -> Any:
        """Return the value that the words mean. UserError if they mean none."""
        return self.rule.instance_from_str(words)


def flags_of(config_class: type) -> dict[str, Flag]:
    """Return the flags of a config class by name, with those of the configs in it."""
    flags: dict[str, Flag] = {}
    hints = get_type_hints(config_class, include_extras=True)
    for field in dataclasses.fields(config_class):
        kind, marks = without_annotations(hints[field.name])
        if tyro.conf.Suppress in marks:
            continue
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            flags |= flags_of(kind)
            continue
        flags[field.name] = Flag(
            name=field.name,
            kind=kind,
            rule=rule_of(kind, marks),
            required=field.default is field.default_factory is dataclasses.MISSING,
            positional=tyro.conf.Positional in marks,
        )
    return flags


def without_annotations(hint: Any) -> tuple[Any, tuple]:
    """Split Annotated[kind, *marks] into kind and marks; any other type has no marks."""
    if get_origin(hint) is Annotated:
        kind, *marks = get_args(hint)
        return kind, tuple(marks)
    return hint, ()


# What --help says.


def default_is(text: str, of: str = "None") -> Any:
    """Say in --help what a default stands for that does not say it itself: None, an empty tuple.

    `of` is that default as tyro writes it. A preset may bring another, which --help then shows."""

    def hint(shown: str) -> str:
        return f"(default: {text if shown in ('', shlex.quote(of)) else shown})"

    return tyro.conf.arg(help_behavior_hint=hint)


NO_DEFAULT = default_is("none")


@RULES.struct_rule
def fields_of_config(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Tell tyro the fields of a dataclass, with each docstring as one paragraph.

    tyro's own rule would keep the line breaks that the source has in a docstring."""
    if not dataclasses.is_dataclass(info.type):
        return None
    hints = get_type_hints(info.type, include_extras=True)
    fields = []
    for field in dataclasses.fields(info.type):
        kind, marks = without_annotations(hints[field.name])
        annotated: Any = Annotated[kind, NO_DEFAULT, *marks]  # what marks say comes later, and wins
        spec = StructFieldSpec(
            name=field.name,
            type=annotated,
            default=default_of(field, info.default),
            helptext=functools.partial(field_docstring, info.type, field.name),
        )
        fields.append(spec)
    return StructConstructorSpec(instantiate=info.type, fields=tuple(fields))


def default_of(field: dataclasses.Field, config: Any) -> Any:
    """Return the field's value in a config, such as a preset; without one, the class's default."""
    if dataclasses.is_dataclass(config):
        return getattr(config, field.name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return tyro.MISSING if field.default is dataclasses.MISSING else field.default


def field_docstring(config_class: type, name: str) -> str | None:
    """Return what the source says of a field, or None."""
    return field_docstrings(config_class).get(name)


@functools.cache
def field_docstrings(config_class: type) -> dict[str, str]:
    """Return the string below each field of a class and of its bases, in one line each."""
    docstrings = {}
    for owner in reversed(config_class.__mro__[:-1]):
        source = textwrap.dedent(inspect.getsource(owner))
        definition = ast.parse(source).body[0]
        assert isinstance(definition, ast.ClassDef)
        for field, below in itertools.pairwise(definition.body):
            match field, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    docstrings[name] = " ".join(text.split())
    return docstrings


# What words mean.


@RULES.primitive_rule
def values_of_words(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Tell tyro how to read a value that is one word, or a tuple of such values."""
    if is_tuple(info.type) or all(is_one_word(option) for option in options_of(info.type)):
        return rule_of(info.type)
    return None


def rule_of(kind: Any, marks: tuple = ()) -> PrimitiveConstructorSpec:
    """Return how to read a value of that type; the marks of an annotation may say it."""
    for mark in marks:
        if isinstance(mark, PrimitiveConstructorSpec):
            return mark
    if is_tuple(kind):
        return tuple_rule(kind)
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar(kind),
        instance_from_str=lambda words: value_of(kind, words[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )


def tuple_rule(kind: Any) -> PrimitiveConstructorSpec:
    """Return how to read a tuple whose items are all of one type."""
    items = get_args(kind)
    return PrimitiveConstructorSpec(
        nargs="*" if is_open_tuple(kind) else len(items),
        metavar=metavar(kind),
        instance_from_str=lambda words: tuple(value_of(items[0], word) for word in words),
        is_instance=lambda values: True,
        str_from_instance=lambda values: [str(value) for value in values],
    )


def value_of(kind: Any, word: str) -> Any:
    """Return the value of that type that the word means. UserError if it means none."""
    for option in options_of(kind):
        named = named_values(option)
        spelling = word.capitalize() if option is bool else word
        if spelling in named:
            return named[spelling]
        if not named:
            with contextlib.suppress(ValueError):
                return path_of(word) if option is Path else option(word)
    raise UserError(f"{word!r} is not {describe(kind)}")


def path_of(word: str) -> Path:
    """Return the path. ValueError if the word is empty, which Path takes for "."."""
    if not word:
        raise ValueError("as in --out_dir=$UNSET")
    return Path(word)


def is_tuple(kind: Any) -> bool:
    """Whether values of that type are written as words separated by spaces."""
    return get_origin(kind) is tuple


def is_open_tuple(kind: Any) -> bool:
    """Whether there may be any number of those words."""
    return is_tuple(kind) and get_args(kind)[-1] is Ellipsis


def options_of(kind: Any) -> tuple:
    """Return the types of a union, None first because "None" is a path and a text too."""
    if get_origin(kind) in (Union, UnionType):
        return tuple(sorted(get_args(kind), key=lambda option: option is not NoneType))
    return (kind,)


def is_one_word(kind: Any) -> bool:
    """Whether one word is enough to write any value of that type."""
    return kind in (int, float, str, Path) or bool(named_values(kind))


def named_values(kind: Any) -> dict[str, Any]:
    """Return the few values of a type by the words that name them; {} if there are many."""
    if kind is NoneType:
        return {"None": None}
    if kind is bool:
        return {"True": True, "False": False}
    if get_origin(kind) is Literal:
        return {str(value): value for value in get_args(kind)}
    return {}


def metavar(kind: Any) -> str:
    """Return what stands for a value in --help: INT, PATH, {float32,bfloat16}, INT INT."""
    if is_open_tuple(kind):
        return f"[{metavar(get_args(kind)[0])} ...]"
    if is_tuple(kind):
        return " ".join(metavar(item) for item in get_args(kind))
    words = []
    for option in options_of(kind):
        if option is not NoneType:
            names = ",".join(named_values(option))
            words.append(f"{{{names}}}" if names else option.__name__.upper())
    return "|".join(words)


def describe(kind: Any) -> str:
    """Return what a value of that type is, for a sentence: "a whole number or None"."""
    plain = {int: "a whole number", float: "a number", str: "a text", Path: "a path"}
    words: list[str] = []
    none_last = sorted(options_of(kind), key=lambda option: option is NoneType)
    for option in none_last:
        words += named_values(option) or [plain[option]]
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


# Memory.


def memory_size(text: str) -> int:
    """Return the bytes that a text such as 1GB, 1.5 GiB or 1073741824 stands for.

    UserError with the accepted forms if it stands for none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-z]*)", text.lower())
    if match is None or match[2] not in UNIT_BYTES:
        raise UserError(
            f"{text!r} is not an amount of memory: write bytes, or a number and a unit of "
            "kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024), "
            "as in 1073741824, 512MB or 1.5GiB"
        )
    number, unit = match.groups()
    return round(float(number) * UNIT_BYTES[unit])


def memory_text(size: int) -> str:
    """Return bytes as a text that memory_size understands: 1GiB, 512MiB, 1000."""
    for unit in ("GiB", "MiB", "KiB"):
        if size and size % UNIT_BYTES[unit.lower()] == 0:
            return f"{size // UNIT_BYTES[unit.lower()]}{unit}"
    return str(size)


MemorySize = Annotated[
    int,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="BYTES",
        instance_from_str=lambda words: memory_size(words[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [memory_text(value)],
    ),
]
"""A number of bytes, on the command line also with a unit."""
