"""What the server takes and gives: OpenAI's completions and chat API as pydantic models.

What OpenAI does not have goes by vLLM's names. FastAPI checks requests against these models and
makes the OpenAPI page of them. A field that is not here is refused by its name, unless its value
asks for nothing: see fields.py.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, Field, Strict
from pydantic_core import PydanticCustomError

from errors import require
from sequence import MAX_BAD_TOKENS, MAX_BIASES, MAX_LOGPROBS, SamplingParams, StopReason
from serving import fields
from serving.forms import FormFields
from serving.messages import ChatForm, Message, Messages
from serving.request_model import FAIL_FAST, SHORT, RequestModel
from serving.tool_calls import StreamedCall, WrittenCall

TokenId = Annotated[int, Field(ge=0)]
StopString = Annotated[str, Field(min_length=1, max_length=128)]
TokenIdKey = Annotated[int, Strict(False), Field(ge=0)]  # JSON's keys are strings
Logprob = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
FinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]

TokenIds = Annotated[list[int], FAIL_FAST]

STOP_REASON = "which of stop or stop_token_ids has ended the sample"
TOKEN_TEXT = "a token that is no whole UTF-8 reads bytes:\\xe2\\x82"


def require_few_biases(value: Any) -> Any:
    """Return the logit_bias of a request; raise if it is larger than any engine allows."""
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise PydanticCustomError(
            "too_long", "{given} entries, and {most} fit", {"given": len(value), "most": MAX_BIASES}
        )
    return value


FEW_BIASES = BeforeValidator(require_few_biases)
BAD_WORDS = Field(fail_fast=True, max_length=MAX_BAD_TOKENS)  # each has a token at least


class StreamOptions(RequestModel):
    """What a stream has besides the choices."""

    asks_for_nothing = fields.STREAM_OPTIONS

    include_usage: bool = Field(
        default=False, description="a last chunk without choices tells the usage"
    )
    continuous_usage_stats: bool = Field(
        default=False, description="each chunk tells the usage of its prompt and sample so far"
    )


class GenerationRequest(RequestModel, FormFields):
    """null means the default. See SamplingParams for what each field does and in which order they
    act."""

    asks_for_nothing = fields.GENERATION

    model: str | None = Field(None, description="the name that /v1/models gives; may be left out")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(
        None, ge=0, description="default 16; of a chat, what the context has room for"
    )
    min_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0)
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Annotated[dict[TokenIdKey, float], FEW_BIASES] | None = None
    allowed_token_ids: Annotated[list[TokenId], FAIL_FAST] | None = None
    bad_words: Annotated[list[StopString], BAD_WORDS] | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: StopString | Annotated[list[StopString], SHORT] | None = None
    stop_token_ids: Annotated[list[TokenId], FAIL_FAST] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    ignore_eos: bool | None = None
    n: int | None = Field(None, ge=1)
    prompt_logprobs: Logprob | None = None
    truncate_prompt_tokens: int | None = Field(
        None,
        ge=-1,
        description="take only so many tokens from the prompt's end; -1: as many as there is room "
        "for",
    )
    return_token_ids: bool | None = Field(
        None, description="also give token_ids, and prompt_token_ids"
    )

    def stop_strings(self) -> tuple[str, ...]:
        """Return the stop strings, which may be given as one or as a list."""
        if isinstance(self.stop, str):
            return (self.stop,)
        return tuple(self.stop or ())

    def given_params(self) -> dict[str, Any]:
        """Return the fields of SamplingParams that are not left out, by name."""
        given = {}
        for field in dataclasses.fields(SamplingParams):
            value = getattr(self, field.name, None)  # some are of the completions API only
            if value is not None:
                given[field.name] = value
                if isinstance(value, list):  # to name something twice says nothing more
                    given[field.name] = tuple(dict.fromkeys(value))
        given["stop"] = self.stop_strings()
        given["structured"] = self.structured_output()
        return given


class CompletionRequest(GenerationRequest):
    """The body of /v1/completions."""

    asks_for_nothing = fields.COMPLETION

    prompt: str | TokenIds | Annotated[list[str], SHORT] | Annotated[list[TokenIds], SHORT] = Field(
        description="texts or token ids"
    )
    logprobs: Logprob | None = None
    echo: bool | None = None

    def prompts(self) -> Sequence[str | list[int]]:
        """Return one text or list of token ids per prompt; a list of numbers is one prompt."""
        is_text = isinstance(self.prompt, str)
        is_one = is_text or not self.prompt or isinstance(self.prompt[0], int)
        prompts = [self.prompt] if is_one else self.prompt
        return cast("Sequence[str | list[int]]", prompts)

    def sampling_params(self) -> SamplingParams:
        """Return what the engine is asked for. Raises UserError where fields do not go together."""
        given = self.given_params()
        if self.echo and self.logprobs is not None:
            given["prompt_logprobs"] = max(self.logprobs, self.prompt_logprobs or 0)
        return SamplingParams(**given)


class ChatRequest(GenerationRequest, ChatForm):
    """The body of /v1/chat/completions."""

    asks_for_nothing = fields.GENERATION

    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=0, description="another name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: Logprob | None = Field(None, description="only with logprobs")

    def name_of_limit(self) -> str:
        """Return the name by which the request gives max_tokens."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def limit(self) -> int | None:
        """Return max_tokens by either name, if the request has it."""
        return getattr(self, self.name_of_limit())

    def sampling_params(self, room: int) -> SamplingParams:
        """Return what the engine is asked for; max_tokens is `room`, if the request has none.

        Raises UserError where fields do not go together."""
        require(
            self.max_completion_tokens is None or self.max_tokens is None,
            f"max_completion_tokens={self.max_completion_tokens} and "
            f"max_tokens={self.max_tokens} are one parameter: give one of them",
            param="max_completion_tokens",
        )
        require(
            bool(self.logprobs) or self.top_logprobs is None,
            f"top_logprobs={self.top_logprobs} needs logprobs=true",
            param="top_logprobs",
        )
        require(
            not self.forced_tools() or self.structured_output() is None,
            f"{self.name_of_form()} gives the answer a form, and tool_choice makes it a call: send "
            "one of them",
            param="tool_choice",
        )
        given = self.given_params()
        limit = self.limit()
        given["max_tokens"] = room if limit is None else limit
        given["logprobs"] = (self.top_logprobs or 0) if self.logprobs else None
        return SamplingParams(**given)


class LogprobLists(BaseModel):
    """The logprobs of a completion, one entry per token in each list."""

    tokens: list[str] = Field(description=TOKEN_TEXT)
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="characters of the text before the token")


class PromptLogprob(BaseModel):
    """What the model thinks of one token of the prompt, or of another in its place."""

    logprob: float
    rank: int = Field(description="1 for the likeliest token")
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]


class Choice(BaseModel):
    """One sample of a completion, or a piece of one."""

    index: int = Field(description="prompt i of a request has the indices i * n ... i * n + n - 1")
    text: str
    logprobs: LogprobLists | None = None
    finish_reason: FinishReason | None = None
    stop_reason: StopReason = Field(None, description=STOP_REASON)
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class Usage(BaseModel):
    """The tokens of a request, all its prompts and samples together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Answer(BaseModel):
    """What all answers have in common."""

    id: str
    object: str
    created: int = Field(description="seconds since 1970")
    model: str
    choices: list
    usage: Usage | None = None


class Completion(Answer):
    """A whole answer, or a piece of a streamed one."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[Choice]


class LikelyToken(BaseModel):
    """A token that could come at a position of a chat's answer."""

    token: str = Field(description=TOKEN_TEXT)
    logprob: float
    bytes: list[int]


class ScoredToken(LikelyToken):
    """A token that came, and those that could have."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(BaseModel):
    """The logprobs of a chat's answer, one entry per token."""

    content: list[ScoredToken]


class ChatMessage(BaseModel):
    """The assistant's turn."""

    role: Literal["assistant"] = "assistant"
    content: str | None = Field(description="null in a turn of nothing but calls")
    tool_calls: list[WrittenCall] | None = Field(None, description="what the model calls")


class ChatDelta(BaseModel):
    """A piece of the assistant's turn."""

    role: Literal["assistant"] | None = Field(None, description="on a sample's first chunk")
    content: str | None
    tool_calls: list[StreamedCall] | None = Field(None, description="what the model calls")


class ChatPart(BaseModel):
    """What a choice and a piece of one have in common."""

    index: int
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None = None
    stop_reason: StopReason = Field(None, description=STOP_REASON)
    token_ids: list[int] | None = None


class ChatChoice(ChatPart):
    """One sample of a chat's answer."""

    message: ChatMessage


class ChatChunkChoice(ChatPart):
    """A piece of one sample."""

    delta: ChatDelta


class ChatCompletion(Answer):
    """A whole answer."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class ChatChunk(Answer):
    """A piece of a streamed answer."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    prompt_logprobs: PromptLogprobs | None = Field(None, description="on the first chunk")
    prompt_token_ids: list[int] | None = Field(None, description="on the first chunk")


class ModelCard(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "jax-nanogpt-vllm"
    max_model_len: int


class ModelList(BaseModel):
    """The one model that is served, as a list."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeRequest(ChatForm):
    """The body of /tokenize: a prompt, or the messages of a chat."""

    asks_for_nothing = fields.TOKENIZE

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None

    def text_or_chat(self) -> str | list[Message]:
        """Return the prompt or the messages. Raises UserError unless there is one of them."""
        given = [value for value in (self.prompt, self.messages) if value is not None]
        require(len(given) == 1, "send a prompt or messages, and not both", param="prompt")
        return given[0]


class Tokens(BaseModel):
    """The token ids of a text, and how many the model can take."""

    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeRequest(RequestModel):
    """The body of /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], FAIL_FAST]


class Text(BaseModel):
    """The text of token ids."""

    prompt: str


class ErrorDetail(BaseModel):
    """What is wrong, and with which field of the request."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(BaseModel):
    """OpenAI's error form."""

    error: ErrorDetail
