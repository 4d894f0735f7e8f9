"""What server.py takes and gives: OpenAI's completions and chat API as types, with vLLM's names for what OpenAI does not have.

FastAPI checks requests against these and makes the OpenAPI page of them. A field that is not here is refused by its name.
"""

import dataclasses
import re
from typing import Annotated, Literal

from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, Strict

from errors import require
from sequence import MAX_LOGPROBS, SamplingParams

TokenId = Annotated[int, Field(ge=0)]
StopString = Annotated[str, Field(min_length=1, max_length=128)]
TokenIdKey = Annotated[int, Strict(False), Field(ge=0)]  # JSON's keys are strings
Logprob = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


class Form(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Form):
    include_usage: bool = Field(False, description="a last chunk without choices tells the usage")


class GenerationRequest(Form):
    """null means the default. See SamplingParams for what each field does and in which order they act."""

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
    logit_bias: dict[TokenIdKey, float] | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: StopString | list[StopString] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    n: int | None = Field(None, ge=1)
    return_token_ids: bool | None = Field(
        None, description="also give token_ids, the prompt's among them if echo"
    )

    def given(self) -> dict:
        """The fields of SamplingParams that are not left out."""
        fields = {
            f.name: value
            for f in dataclasses.fields(SamplingParams)
            if (value := getattr(self, f.name, None)) is not None
        }
        stop = fields.pop("stop", ())
        fields["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        return fields | {"stop_token_ids": tuple(self.stop_token_ids or ())}


class CompletionRequest(GenerationRequest):
    prompt: str | list[int] | list[str] | list[list[int]] = Field(description="texts or token ids")
    logprobs: Logprob | None = None
    prompt_logprobs: Logprob | None = None
    echo: bool | None = None

    def sampling_params(self) -> SamplingParams:
        """Raises ValueError where fields do not go together."""
        given = self.given()
        if self.echo and self.logprobs is not None:
            given["prompt_logprobs"] = max(self.logprobs, self.prompt_logprobs or 0)
        return SamplingParams(**given)


class TextPart(Form):
    type: Literal["text"]
    text: str


class Message(Form):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] = Field(description="parts are joined by line breaks")

    def plain(self) -> dict[str, str]:
        """As chat templates expect it."""
        content = (
            self.content
            if isinstance(self.content, str)
            else "\n".join(part.text for part in self.content)
        )
        return {"role": self.role, "content": content}


class ChatRequest(GenerationRequest):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0, description="another name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: Logprob | None = Field(None, description="only with logprobs")
    add_generation_prompt: bool | None = Field(
        None, description="default true: the prompt ends as an assistant's turn begins"
    )

    def sampling_params(self, room: int) -> SamplingParams:
        """room: max_tokens, if nothing else is asked for. Raises ValueError where fields do not go together."""
        given = {"max_tokens": room} | self.given()
        if self.max_completion_tokens is not None:
            require(
                self.max_tokens is None,
                f"max_completion_tokens={self.max_completion_tokens} and "
                f"max_tokens={self.max_tokens} are one parameter: give one of them",
            )
            given["max_tokens"] = self.max_completion_tokens
        require(
            self.logprobs or self.top_logprobs is None,
            f"top_logprobs={self.top_logprobs} needs logprobs=true",
        )
        given["logprobs"] = (self.top_logprobs or 0) if self.logprobs else None
        return SamplingParams(**given)


class LogprobLists(BaseModel):
    tokens: list[str] = Field(description="a token that is no whole UTF-8 reads bytes:\\xe2\\x82")
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="characters of the text before the token")


class PromptLogprob(BaseModel):
    logprob: float
    decoded_token: str


class Choice(BaseModel):
    index: int = Field(description="prompt i of a request has the indices i * n ... i * n + n - 1")
    text: str
    logprobs: LogprobLists | None = None
    finish_reason: Literal["stop", "length"] | None = None
    prompt_logprobs: list[dict[int, PromptLogprob] | None] | None = None
    token_ids: list[int] | None = None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Answer(BaseModel):
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
    token: str = Field(description="a token that is no whole UTF-8 reads bytes:\\xe2\\x82")
    logprob: float
    bytes: list[int]


class ScoredToken(LikelyToken):
    top_logprobs: list[LikelyToken]


class ChatLogprobs(BaseModel):
    content: list[ScoredToken]


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = Field(None, description="on a sample's first chunk")
    content: str


class ChatPart(BaseModel):
    """What a choice and a piece of one have in common."""

    index: int
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    token_ids: list[int] | None = None


class ChatChoice(ChatPart):
    message: ChatMessage


class ChatChunkChoice(ChatPart):
    delta: ChatDelta


class ChatCompletion(Answer):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class ChatChunk(Answer):
    """A piece of a streamed answer."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "jax-nanogpt-vllm"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeRequest(Form):
    model: str | None = None
    prompt: str


class Tokens(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeRequest(Form):
    model: str | None = None
    tokens: list[TokenId]


class Text(BaseModel):
    prompt: str


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Version(BaseModel):
    version: str
    jax: str


class Page(BaseModel):
    page: int
    holders: list[tuple[int, int]] = Field(
        description="(request, sample) of each sequence that has the page in its table"
    )
    cached: bool = Field(description="other prompts can find it")


class Pool(BaseModel):
    pages: int = Field(description="in the pool; page 0 is the null page")
    page_size: int
    running: int
    waiting: int
    requests: dict[int, str] = Field(description="X-Request-Id of each request that has not ended")
    used: list[Page] = Field(description="all other pages are free and empty")


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(BaseModel):
    error: ErrorDetail


class APIError(Exception):
    """An answer in OpenAI's error form."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        kind = (
            "server_error"
            if status >= 500
            else "rate_limit_error"
            if status == 429
            else "invalid_request_error"
        )
        self.status, self.headers = status, headers
        # JSON may hold half a surrogate pair, which UTF-8 has no bytes for.
        clean = lambda text: text and text.encode("utf-8", "backslashreplace").decode()[:2000]
        self.body = Error(
            error=ErrorDetail(message=clean(message), type=kind, param=clean(param), code=code)
        )

    def response(self) -> Response:
        return JSONResponse(self.body.model_dump(), self.status, self.headers)


def unavailable(message: str) -> APIError:
    return APIError(503, message, headers={"Retry-After": "1"})


def refused(error: ValueError) -> APIError:
    """400. The sentences of SamplingParams and Engine.add begin with what they are about, as in top_p=2."""
    named = re.match(r"(?:the )?(\w+)(?:=| is empty| has token)", str(error))
    return APIError(400, str(error), param=named and named[1])


def invalid_request(errors: list[dict]) -> APIError:
    """400, from what pydantic has found wrong. Where several types are allowed, what came closest went deepest."""
    nearest = max(errors, key=lambda e: len(e["loc"]))
    is_type = lambda part: (
        isinstance(part, str) and ("[" in part or part == "str")
    )  # which of several was tried
    path = [part for part in nearest["loc"][1:] if not is_type(part)]
    name = next((part for part in path if isinstance(part, str)), None)
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(
        "."
    )
    message = (
        "there is no such parameter" if nearest["type"] == "extra_forbidden" else nearest["msg"]
    )
    if nearest["loc"] == ("body",):
        message = "its body must be a JSON object, with the header Content-Type: application/json"
    return APIError(400, f"{where or 'the request'}: {message}", param=name)
