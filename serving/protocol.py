"""What the server takes and gives: OpenAI's completions and chat API as pydantic models.

What OpenAI does not have goes by vLLM's names. FastAPI checks requests against these models and
makes the OpenAPI page of them. A field that is not here is refused by its name.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, Strict

from errors import require
from sequence import MAX_LOGPROBS, SamplingParams

TokenId = Annotated[int, Field(ge=0)]
StopString = Annotated[str, Field(min_length=1, max_length=128)]
TokenIdKey = Annotated[int, Strict(False), Field(ge=0)]  # JSON's keys are strings
Logprob = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
FinishReason = Literal["stop", "length"]

TOKEN_TEXT = "a token that is no whole UTF-8 reads bytes:\\xe2\\x82"


class RequestModel(BaseModel):
    """What a client sends: of exactly these types, and nothing else."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(RequestModel):
    """What a stream has besides the choices."""

    include_usage: bool = Field(False, description="a last chunk without choices tells the usage")


class GenerationRequest(RequestModel):
    """null means the default. See SamplingParams for what each field does and in which order they
    act."""

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
        given["stop"] = self.stop_strings()
        given["stop_token_ids"] = tuple(self.stop_token_ids or ())
        return given


class CompletionRequest(GenerationRequest):
    """The body of /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]] = Field(description="texts or token ids")
    logprobs: Logprob | None = None
    prompt_logprobs: Logprob | None = None
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


class TextPart(RequestModel):
    """A part of a message: the only kind there is here."""

    type: Literal["text"]
    text: str


class Message(RequestModel):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] = Field(description="parts are joined by line breaks")

    def for_template(self) -> dict[str, str]:
        """Return the message as chat templates expect it."""
        if isinstance(self.content, str):
            text = self.content
        else:
            text = "\n".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatRequest(GenerationRequest):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0, description="another name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: Logprob | None = Field(None, description="only with logprobs")
    add_generation_prompt: bool | None = Field(
        None, description="default true: the prompt ends as an assistant's turn begins"
    )

    def sampling_params(self, room: int) -> SamplingParams:
        """Return what the engine is asked for; max_tokens is `room`, if the request has none.

        Raises UserError where fields do not go together."""
        given = {"max_tokens": room} | self.given_params()
        if self.max_completion_tokens is not None:
            require(
                self.max_tokens is None,
                f"max_completion_tokens={self.max_completion_tokens} and "
                f"max_tokens={self.max_tokens} are one parameter: give one of them",
                param="max_completion_tokens",
            )
            given["max_tokens"] = self.max_completion_tokens
        require(
            bool(self.logprobs) or self.top_logprobs is None,
            f"top_logprobs={self.top_logprobs} needs logprobs=true",
            param="top_logprobs",
        )
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
    decoded_token: str


class Choice(BaseModel):
    """One sample of a completion, or a piece of one."""

    index: int = Field(description="prompt i of a request has the indices i * n ... i * n + n - 1")
    text: str
    logprobs: LogprobLists | None = None
    finish_reason: FinishReason | None = None
    prompt_logprobs: list[dict[int, PromptLogprob] | None] | None = None
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
    content: str


class ChatDelta(BaseModel):
    """A piece of the assistant's turn."""

    role: Literal["assistant"] | None = Field(None, description="on a sample's first chunk")
    content: str


class ChatPart(BaseModel):
    """What a choice and a piece of one have in common."""

    index: int
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
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


class ChatChunk(Answer):
    """A piece of a streamed answer."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]


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


class TokenizeRequest(RequestModel):
    """The body of /tokenize."""

    model: str | None = None
    prompt: str


class Tokens(BaseModel):
    """The token ids of a text, and how many the model can take."""

    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeRequest(RequestModel):
    """The body of /detokenize."""

    model: str | None = None
    tokens: list[TokenId]


class Text(BaseModel):
    """The text of token ids."""

    prompt: str


class Health(BaseModel):
    """The server would serve a request now."""

    status: Literal["ok"] = "ok"


class Version(BaseModel):
    """Of the server, and of what it computes with."""

    version: str
    jax: str


class Page(BaseModel):
    """One page of the KV cache that is in use."""

    page: int
    holders: list[tuple[int, int]] = Field(
        description="(request, sample) of each sequence that has the page in its table"
    )
    cached: bool = Field(description="other prompts can find it")


class Pool(BaseModel):
    """The pages of the KV cache, and who holds them."""

    pages: int = Field(description="in the pool; page 0 is the null page")
    page_size: int
    running: int
    waiting: int
    requests: dict[int, str] = Field(description="X-Request-Id of each request that has not ended")
    used: list[Page] = Field(description="all other pages are free and empty")


class ErrorDetail(BaseModel):
    """What is wrong, and with which field of the request."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(BaseModel):
    """OpenAI's error form."""

    error: ErrorDetail
