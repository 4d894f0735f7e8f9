"""JSON schemas as answers should keep to them: see `closed`."""

from collections.abc import Iterator
from typing import Any

SAYS_WHAT_ELSE = {"additionalProperties", "patternProperties", "unevaluatedProperties"}
"""Keywords of an object that say which properties it may have besides those it names."""

OF_AN_OBJECT = SAYS_WHAT_ELSE | {"properties", "required"}
COMBINE = {"$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "if", "not", "dependentSchemas"}
"""Keywords by which other schemas hold for the same object."""

HOLD_SCHEMAS_BY_NAME = {"properties", "patternProperties", "$defs", "definitions"}
HOLD_SCHEMAS = {"items", "prefixItems", "additionalProperties", "anyOf", "oneOf"}


def closed(schema: Any) -> Any:
    """Return a schema whose objects have only the properties that it names.

    Where a schema does not say `additionalProperties`, JSON Schema allows any others, and a small
    model goes on to invent them until its tokens are used up. vLLM closes such objects too, and
    whatever fits the result fits the schema. A schema in which several hold for one object stays as
    it is: to close one of them would rule out what the others name."""
    return schema if combines_objects(schema) else _close(schema)


def combines_objects(schema: Any) -> bool:
    """Return whether, anywhere in a schema, more than one may hold for the same object."""
    for item in dicts_in(schema):
        has_own = bool(OF_AN_OBJECT & item.keys())
        if isinstance(item.get("allOf"), list) or (has_own and COMBINE & item.keys()):
            return True
    return False


def dicts_in(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every dict of a JSON value, however deep it lies."""
    level = [value]
    while level:
        item = level.pop()
        if isinstance(item, list):
            level += item
        elif isinstance(item, dict):
            yield item
            level += item.values()


def _close(schema: Any) -> Any:
    """Do what `closed` says of a schema, or of a list of them. What is no schema stays as it is."""
    if isinstance(schema, list):
        return [_close(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {}
    for keyword, value in schema.items():
        if keyword in HOLD_SCHEMAS_BY_NAME and isinstance(value, dict):
            value = {name: _close(item) for name, item in value.items()}
        elif keyword in HOLD_SCHEMAS:
            value = _close(value)
        result[keyword] = value
    if names_all_it_needs(schema):
        result["additionalProperties"] = False
    return result


def names_all_it_needs(schema: dict[str, Any]) -> bool:
    """Return whether an object can do with the properties it names, and says nothing of others."""
    properties = schema.get("properties")
    required = schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        return False
    return not SAYS_WHAT_ELSE & schema.keys() and all(name in properties for name in required)
