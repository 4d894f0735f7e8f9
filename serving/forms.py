"""The fields of a request that ask for structured output: OpenAI's response_format and vLLM's
structured_outputs. Start with `FormFields.structured_output`.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from errors import UserError, require
from serving.request_model import FAIL_FAST, RequestModel
from structured.outputs import StructuredOutput

ANY_OBJECT = {"type": "object"}
"""What json_object asks for."""


class NamedSchema(RequestModel):
    """The schema of response_format, with what OpenAI's clients say of it."""

    name: str | None = Field(None, description="a name, which nothing depends on")
    description: str | None = Field(None, description="words that the model does not see")
    json_schema: dict[str, Any] | None = Field(
        None, alias="schema", description="the JSON schema that the answer fits"
    )
    strict: bool | None = Field(None, description="the answer always fits, also without")


class ResponseFormat(RequestModel):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="any text, any JSON object, or JSON that fits json_schema"
    )
    json_schema: NamedSchema | None = Field(
        None, description="the schema, with the type json_schema alone"
    )

    def structured_output(self) -> StructuredOutput | None:
        """Return the form, None if any text will do. Raises UserError."""
        schema = self.json_schema and self.json_schema.json_schema
        require(
            (self.type == "json_schema") == (schema is not None),
            f'response_format of type "{self.type}": json_schema with a schema belongs to the type '
            '"json_schema", and to it alone',
            param="response_format",
        )
        if self.type == "text":
            return None
        return StructuredOutput.of_schema(ANY_OBJECT if schema is None else schema)


class StructuredOutputs(RequestModel):
    """vLLM's way to ask for a form. Exactly one field is given."""

    json_schema: str | dict[str, Any] | None = Field(
        None, alias="json", description="a JSON schema, or the text of one"
    )
    regex: str | None = Field(None, description="a regular expression that all of it matches")
    choice: Annotated[list[str], FAIL_FAST] | None = Field(
        None, description="the texts of which it is one"
    )
    grammar: str | None = Field(None, description="in Lark's form")

    def structured_output(self) -> StructuredOutput:
        """Return the form. Raises UserError unless there is exactly one."""
        if isinstance(self.json_schema, dict):
            schema = StructuredOutput.of_schema(self.json_schema).json
        else:
            schema = self.json_schema
        choice = None if self.choice is None else tuple(dict.fromkeys(self.choice))
        return StructuredOutput(schema, self.regex, choice, self.grammar)


class FormFields(BaseModel):
    """The two fields, in every request that generates."""

    response_format: ResponseFormat | None = Field(
        None, description="the answer is JSON: json_object, or json_schema with a schema"
    )
    structured_outputs: StructuredOutputs | None = Field(
        None, description="the answer has a form: json, regex, choice or grammar"
    )

    def structured_output(self) -> StructuredOutput | None:
        """Return the form that is asked for. Raises UserError, about the field, if it is none."""
        require(
            self.response_format is None or self.structured_outputs is None,
            "response_format and structured_outputs both give the answer's form: send one of them",
            param="response_format",
        )
        field = self.response_format or self.structured_outputs
        try:
            return None if field is None else field.structured_output()
        except UserError as error:
            raise UserError(str(error), param=self.name_of_form()) from error

    def name_of_form(self) -> str:
        """Return the field that gives the form: where none of these two does, it is tools."""
        if self.response_format is not None:
            return "response_format"
        return "tools" if self.structured_outputs is None else "structured_outputs"
