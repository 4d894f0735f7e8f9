"""The fields of a chat that offer the model functions to call, and how its prompt tells of them.

Names and meaning are OpenAI's. Start with ToolFields; what the model makes of the offer is in
tool_calls.py.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from errors import require
from serving.request_model import RequestModel
from structured.outputs import MAX_NESTING, nesting_of

MAX_TOOLS = 128
NO_PARAMETERS = {"type": "object", "properties": {}}

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Function(RequestModel):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = Field(None, description="what it does, for the model")
    parameters: dict[str, Any] | None = Field(
        None, description="the JSON schema of its arguments, an object; default: it has none"
    )
    strict: bool | None = Field(
        None,
        description="calls that tool_choice forces always fit the schema, also without; others "
        "need not, also with it",
    )

    def arguments_schema(self) -> dict[str, Any]:
        """Return the schema of its arguments. Raises UserError if they are no object."""
        schema = NO_PARAMETERS if self.parameters is None else {"type": "object"} | self.parameters
        require(
            schema["type"] == "object" and nesting_of(schema) <= MAX_NESTING,
            f"the parameters of function {self.name!r} are a JSON schema of type object, nested at "
            f"most {MAX_NESTING} deep",
            param="tools",
        )
        return schema


class Tool(RequestModel):
    """Something that the model may use: functions are the only kind there is here."""

    type: Literal["function"]
    function: Function


class FunctionChoice(RequestModel):
    """The function that the model shall call."""

    name: FunctionName


class ToolChoice(RequestModel):
    """A choice of one function by its name."""

    type: Literal["function"]
    function: FunctionChoice


class CalledFunction(RequestModel):
    """A function that was called, and with what."""

    name: FunctionName
    arguments: str = Field(description="a JSON object as text")


class ToolCall(RequestModel):
    """A call in an earlier turn of the assistant."""

    id: str | None = Field(None, description="the name by which a message of role tool answers")
    type: Literal["function"] = "function"
    index: int | None = Field(None, description="its number, which clients may put back")
    function: CalledFunction

    def as_template_has_it(self) -> dict[str, Any]:
        """Return the call as chat templates expect it: arguments are an object and no text."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        require(
            isinstance(arguments, dict) and nesting_of(arguments) <= MAX_NESTING,
            f"the arguments of a call of {self.function.name!r} are no JSON object",
            param="messages",
        )
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": self.type, "function": function}


class ToolFields(BaseModel):
    """The three fields of a chat."""

    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = Field(
        None, description="the functions that the model may call"
    )
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = Field(
        None,
        description="whether it calls them: none, auto (it decides; the default), required (one at "
        "least), or one by its name",
    )
    parallel_tool_calls: bool | None = Field(
        None, description="whether there may be several calls in one answer; default true"
    )

    def offered_tools(self) -> list[Tool]:
        """Return the tools that the model is told of. Raises UserError where the fields do not go
        together."""
        tools = self.tools or []
        for tool in tools:
            tool.function.arguments_schema()
        names = [tool.function.name for tool in tools]
        require(
            len(set(names)) == len(names),
            "tools has two functions of one name",
            param="tools",
        )
        require(
            self.tool_choice in (None, "none", "auto") or len(tools) > 0,
            "tool_choice asks for a call, and tools offers nothing to call",
            param="tool_choice",
        )
        if isinstance(self.tool_choice, ToolChoice):
            require(
                self.tool_choice.function.name in names,
                f"tool_choice names {self.tool_choice.function.name!r}, and tools has "
                + ", ".join(names),
                param="tool_choice",
            )
        return [] if self.tool_choice == "none" else tools

    def forced_tools(self) -> list[Tool]:
        """Return the tools of which the answer has to call one, none if it may be text."""
        if isinstance(self.tool_choice, ToolChoice):
            name = self.tool_choice.function.name
            return [tool for tool in self.offered_tools() if tool.function.name == name]
        return self.offered_tools() if self.tool_choice == "required" else []

    def may_call_several(self) -> bool:
        """Return whether an answer may have more than one call: of one function by name it has
        one."""
        return self.parallel_tool_calls is not False and not isinstance(
            self.tool_choice, ToolChoice
        )


OFFER = """You can call functions. Each line is one of them, as JSON:
{tools}
To call a function, write its name and its arguments between these marks and nothing after them:
<tool_call>
{{"name": "the function's name", "arguments": {{"parameter": "value"}}}}
</tool_call>"""
"""What the system prompt says to a model whose template knows no tools. The marks are those of Nous
Research's Hermes models, which Qwen and SmolLM have too."""


def as_plain_messages(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the messages for a template that knows neither tools nor calls: all is said in words.

    tools: as the request has them."""
    plain = [as_plain_message(message) for message in messages]
    if not tools:
        return plain
    lines = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools]
    offer = OFFER.format(tools="\n".join(lines))
    if plain[0]["role"] in ("system", "developer"):
        first = plain[0] | {"content": plain[0]["content"] + "\n\n" + offer}
        return [first, *plain[1:]]
    return [{"role": "system", "content": offer}, *plain]


def as_plain_message(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its calls, or what came of a call, in words."""
    if message["role"] == "tool":
        content = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": content}
    parts = [message["content"]] if message["content"] else []
    for call in message.get("tool_calls", []):
        written = json.dumps(call["function"], ensure_ascii=False)
        parts.append(f"<tool_call>\n{written}\n</tool_call>")
    return {"role": message["role"], "content": "\n".join(parts)}
