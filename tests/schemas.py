"""Random JSON schemas, by seed: not a test file itself. Start with `random_schema`.

Run it: python tests/schemas.py [--schemas=100] [--seeds=10]

It generates answers for each schema with a tiny model of random parameters, and ends with 1 if one
that is complete is no JSON or does not fit its schema, by jsonschema.
"""

import argparse
import json
import random
import string
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1]))
from config import EngineConfig, GPTConfig
from engine import Engine
from model import GPT
from sequence import Output, SamplingParams
from structured.outputs import StructuredOutput
from tokenizer import CharTokenizer

TOKENIZER = CharTokenizer(string.printable[:95] + "\n€äöüßéñ日本語")
CONFIG = GPTConfig(block_size=512, vocab_size=TOKENIZER.vocab_size, n_layer=1, n_head=2, n_embd=32)
LAYOUT = EngineConfig(page_size=16, kv_blocks=260, max_num_seqs=16, prefill_tokens=32)
PATTERNS = ("^[a-z]{2,5}$", "^(ja|nein|vielleicht)$", r"^\d{4}-\d{2}$", "^ä+x{1,3}$")
WORDS = ("red", "grün", "日本", "1 €", 'a "quote"', "back\\slash")

TREE = {
    "type": "object",
    "properties": {"v": {"type": "boolean"}, "next": {"$ref": "#/$defs/tree"}},
    "required": ["v"],
    "additionalProperties": False,
}


def random_schema(seed: int) -> dict[str, Any]:
    """Return a schema that is a function of the seed."""
    rng = random.Random(seed)
    if seed % 10 == 9:
        return {"$ref": "#/$defs/tree", "$defs": {"tree": TREE}}
    return {
        "type": "object",
        "properties": {name: value(rng, 2) for name in ("k0", "k1é", "k2")},
        "required": ["k0"] if seed % 2 else ["k1é"],
        "additionalProperties": False,
    }


def value(rng: random.Random, depth: int) -> dict[str, Any]:
    """Return a schema of a value with so many levels of containers at most."""
    leaves = (leaf_enum, leaf_string, leaf_number, leaf_pattern, leaf_union)
    containers = (array, nested) if depth else ()
    return rng.choice(leaves + containers)(rng, depth)


def leaf_enum(rng: random.Random, depth: int) -> dict[str, Any]:
    """Return a choice of values of several types."""
    return {"enum": rng.sample([*WORDS, 1, 2.5, None, True], 3)}


def leaf_string(rng: random.Random, depth: int) -> dict[str, Any]:
    """Return a string with limits."""
    least = rng.randrange(3)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randrange(9)}


def leaf_number(rng: random.Random, depth: int) -> dict[str, Any]:
    """Return an integer with limits."""
    low = rng.randrange(-500, 500)
    return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(1, 3000)}


def leaf_pattern(rng: random.Random, depth: int) -> dict[str, Any]:
    """Return a string by a regular expression."""
    return {"type": "string", "pattern": rng.choice(PATTERNS)}


def leaf_union(rng: random.Random, depth: int) -> dict[str, Any]:
    """Return one of two."""
    return {"anyOf": [leaf_number(rng, 0), {"type": "null"}, leaf_pattern(rng, 0)]}


def array(rng: random.Random, depth: int) -> dict[str, Any]:
    """Return a list with limits."""
    least = rng.randrange(3)
    items = value(rng, depth - 1)
    return {"type": "array", "items": items, "minItems": least, "maxItems": least + 2}


def nested(rng: random.Random, depth: int) -> dict[str, Any]:
    """Return an object in an object."""
    properties = {f"n{i}": value(rng, depth - 1) for i in range(2)}
    return {
        "type": "object",
        "properties": properties,
        "required": ["n1"],
        "additionalProperties": False,
    }


def make_engine() -> Engine:
    """Return an engine of the tiny model."""
    return Engine(GPT(CONFIG, rngs=nnx.Rngs(0)), TOKENIZER, LAYOUT, progress=False)


def answers(engine: Engine, schemas: list[dict], seeds: int) -> list[tuple[dict, Output]]:
    """Return each schema with each of its samples."""
    params = [
        SamplingParams(
            max_tokens=300, seed=0, n=seeds, structured=StructuredOutput.of_schema(schema)
        )
        for schema in schemas
    ]
    outputs = engine.generate([[1, 2, 3]] * len(schemas), params, progress=False)
    return [
        (schema, output)
        for schema, samples in zip(schemas, outputs, strict=True)
        for output in samples
    ]


def verdict(schema: dict, output: Output) -> str:
    """Return "valid", "cut off" or what is wrong with an answer."""
    if output.finish_reason == "length":
        return "cut off"
    try:
        jsonschema.validate(json.loads(output.text), schema)
    except (ValueError, jsonschema.ValidationError) as error:
        return f"wrong: {output.text!r}: {error}"
    return "valid"


def main() -> None:
    """Print how many answers are valid, cut off, and wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemas", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args()
    schemas = [random_schema(seed) for seed in range(args.schemas)]
    count = Counter(verdict(*pair) for pair in answers(make_engine(), schemas, args.seeds))
    print(dict(count))
    sys.exit(any(key.startswith("wrong") for key in count))


if __name__ == "__main__":
    main()
