"""RequestModel: what all bodies and their parts that clients send have in common."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serving import fields

MAX_ITEMS = 4096
"""A list of more texts or messages is refused without a look at them. ServeConfig's limits, which
are checked later, are much smaller."""

# Lists that pydantic leaves at their first mistake, see RequestModel.
FAIL_FAST = Field(fail_fast=True)
SHORT = Field(fail_fast=True, max_length=MAX_ITEMS)


class RequestModel(BaseModel):
    """What a client sends: of exactly these types, and nothing else.

    A body of a megabyte can hold half a million mistakes. pydantic would describe each of them,
    which takes seconds and gigabytes; so lists are left at their first mistake."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    asks_for_nothing: ClassVar[fields.Neutral] = {}
    """The values of its fields that ask for nothing."""

    @model_validator(mode="before")
    @classmethod
    def leave_what_asks(cls, body: Any) -> Any:
        """Return the body without fields that ask for nothing, and with one of the unknown fields
        at most: one is enough to refuse it."""
        if not isinstance(body, dict):
            return body
        body = fields.without_neutral(body, cls.asks_for_nothing)
        all_known = [field.alias or name for name, field in cls.model_fields.items()]
        if len(body) <= len(all_known):
            return body
        known = {name: body[name] for name in all_known if name in body}
        unknown = next(name for name in body if name not in all_known)
        return known | {unknown: None}
