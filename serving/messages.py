"""The messages of a chat, and how a prompt is made of them."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from errors import require
from serving import fields
from serving.request_model import MAX_ITEMS, SHORT, RequestModel
from serving.tools import ToolCall, ToolFields


class TextPart(RequestModel):
    """A part of a message: the only kind there is here."""

    type: Literal["text"]
    text: str


class Message(RequestModel):
    """One turn of a chat."""

    asks_for_nothing = fields.MESSAGE

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], SHORT] | None = Field(
        None, description="parts are joined by line breaks; a turn of calls may have none"
    )
    tool_calls: Annotated[list[ToolCall], SHORT] | None = Field(
        None, description="what the assistant called in this turn"
    )
    tool_call_id: str | None = Field(None, description="the call that a message of a tool answers")

    @model_validator(mode="after")
    def say_something(self) -> "Message":
        """Raise unless there is content, or calls in its place; only the assistant calls."""
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("calls", "only the assistant's messages have tool_calls")
        if self.content is None and not self.tool_calls:
            raise PydanticCustomError("missing", "a message needs content")
        return self

    def text(self) -> str:
        """Return what is said, its parts joined by line breaks."""
        if self.content is None:
            return ""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)

    def for_template(self) -> dict[str, Any]:
        """Return the message as chat templates expect it. Raises UserError if a call in it has
        arguments that are no JSON object."""
        message: dict[str, Any] = {"role": self.role, "content": self.text()}
        if self.tool_calls:
            message["tool_calls"] = [call.as_template_has_it() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]


class ChatForm(RequestModel, ToolFields):
    """How a prompt is made of a chat's messages, and of the tools that it offers."""

    add_generation_prompt: bool | None = Field(
        None,
        description="the prompt ends as an assistant's turn begins; default true, unless "
        "continue_final_message",
    )
    continue_final_message: bool | None = Field(
        None, description="the prompt ends within the last message, whose turn is left open"
    )

    def continues_turn(self) -> bool:
        """Return whether the answer goes on with the last message."""
        return bool(self.continue_final_message)

    def opens_turn(self) -> bool:
        """Return whether the answer is a turn of its own. Raises UserError if it is told both."""
        if self.add_generation_prompt is None:
            return not self.continues_turn()
        require(
            not (self.add_generation_prompt and self.continues_turn()),
            "continue_final_message=true goes on with the last message, and "
            "add_generation_prompt=true begins another: ask for one of them",
            param="continue_final_message",
        )
        return self.add_generation_prompt
