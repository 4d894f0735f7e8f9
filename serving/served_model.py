"""ServedModel: how the model answers requests, once FastAPI has read them.

Read `complete` and `chat`, then `_generate`, in which a request's way through the engine can be
followed from end to end.
"""

import asyncio
import dataclasses
import time
from collections.abc import Callable
from collections.abc import Sequence as AnySequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from fastapi.responses import Response

from engine import Engine, Stats
from errors import ContextLengthExceeded, UserError, require
from sequence import SamplingParams, require_context
from serving import protocol, status
from serving.answers import (
    AnswerWriter,
    ChatChoiceWriter,
    CompletionChoiceWriter,
    EventStream,
    WholeAnswer,
    WriterMaker,
)
from serving.api_errors import APIError
from serving.chat import NO_CHAT_TEMPLATE, ChatTemplate
from serving.config import ServeConfig
from serving.job import Job
from serving.log import current_request
from serving.messages import ChatForm, Message
from serving.pieces import json_response
from serving.tool_calls import form_of_calls
from serving.turns import Turns
from serving.worker import Worker
from structured.grammar import matcher_for
from tokenizer import Tokenizer

Result = TypeVar("Result")

SHORT_TEXT = 1 << 12
"""Characters, or tokens, that are turned into the other in about a millisecond."""

LONG_TEXT = 1 << 17
"""Characters, or tokens, that take a tenth of a second or more. They wait for each other, so that
they keep nobody else waiting: a megabyte takes 0.6 s and 150 MB to encode."""

ENCODERS = 2
"""Threads for texts between the two. More would hold Python's lock for most of the time."""


class ServedModel:
    """The model as the routes see it: its name, its tokenizer, its limits, and its answers.

    Methods raise APIError, or UserError, which the routes answer as a 400."""

    def __init__(
        self,
        config: ServeConfig,
        worker: Worker,
        tokenizer: Tokenizer,
        max_model_len: int,
        template: ChatTemplate | None = None,
    ) -> None:
        """max_model_len: tokens of the model's context. Without a template there are no chats."""
        self.config = config
        self.worker = worker
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.template = template
        self.turns = Turns()
        self.encoders = ThreadPoolExecutor(ENCODERS, thread_name_prefix="encoder")
        self.long_encoder = ThreadPoolExecutor(1, thread_name_prefix="long_encoder")
        self.compilers = ThreadPoolExecutor(1, thread_name_prefix="compiler")
        self.created = int(time.time())  # seconds since 1970

    async def complete(self, body: protocol.CompletionRequest) -> Response:
        """Answer a completion."""
        given_prompts = body.prompts()
        self._check_common(body)
        check_limit("prompt", len(given_prompts), self.config.max_prompts)
        check_limit("logprobs", body.logprobs, self.config.max_logprobs)
        params = body.sampling_params()
        if body.truncate_prompt_tokens is None:
            for prompt in given_prompts:
                self._require_room(self._fewest_tokens(prompt), "prompt")
        prompts = await self._encode(given_prompts)
        prompts = [self._truncate(prompt, body, params.max_tokens) for prompt in prompts]
        for prompt in prompts:
            require_context(len(prompt), params.max_tokens, self.max_model_len)
        return await self._generate(CompletionChoiceWriter, body, prompts, params)

    async def chat(self, body: protocol.ChatRequest) -> Response:
        """Answer a chat."""
        self._check_common(body)
        check_limit("top_logprobs", body.top_logprobs, self.config.max_logprobs)
        self.worker.require_ready()  # the pages are counted once the engine is warm
        if body.truncate_prompt_tokens is None:
            # Templates take spaces away from the ends of what is said, but not the words.
            said = "".join(message.text().strip() for message in body.messages)
            self._require_room(self.tokenizer.fewest_tokens(said), "messages")
        prompt = await self._encode_chat(body.messages, body)
        prompt = self._truncate(prompt, body, body.limit() or 1)
        params = self._with_calls(body, body.sampling_params(self._room_after(prompt)))
        names = ("messages", body.name_of_limit())
        require_context(len(prompt), params.max_tokens, self.max_model_len, *names)
        make_writer = partial(ChatChoiceWriter, call_style=self._require_template().call_style)
        return await self._generate(make_writer, body, [prompt], params)

    def _with_calls(self, body: protocol.ChatRequest, params: SamplingParams) -> SamplingParams:
        """Return the parameters with a form that has calls in it, where the answer has to be a
        call, or may be one instead of the JSON that is asked for."""
        tools = body.forced_tools()
        schema = None
        if not tools and params.structured is not None:
            schema = params.structured.json
            tools = body.offered_tools() if schema is not None else []
        if not tools:
            return params
        style = self._require_template().call_style
        try:
            form = form_of_calls(tools, style, body.may_call_several(), otherwise=schema)
        except UserError as error:
            raise UserError(str(error), param="tools") from error
        return dataclasses.replace(params, structured=form)

    def _require_template(self) -> ChatTemplate:
        """Return the chat template. Raises UserError where there is none."""
        if self.template is None:
            raise UserError(NO_CHAT_TEMPLATE, param="messages")
        return self.template

    async def tokenize(self, body: protocol.TokenizeRequest) -> Response:
        """Return the token ids of a text, or of a chat, which may be longer than the model's
        context."""
        self._check_model(body.model)
        given = body.text_or_chat()
        if isinstance(given, str):
            [tokens] = await self._encode([given])
        else:
            tokens = await self._encode_chat(given, body)
        answer = protocol.Tokens(tokens=tokens, count=len(tokens), max_model_len=self.max_model_len)
        return json_response(answer, self.turns)

    async def detokenize(self, body: protocol.DetokenizeRequest) -> protocol.Text:
        """Return the text of token ids."""
        self._check_model(body.model)
        decode = partial(decode_tokens, self.tokenizer, body.tokens)
        text = await self._work(decode, size=len(body.tokens), param="tokens")
        return protocol.Text(prompt=text)

    def card(self, name: str | None = None) -> protocol.ModelCard:
        """Return what /v1/models says of the model. Raises APIError if its name is another."""
        self._check_model(name)
        return protocol.ModelCard(
            id=self.config.model_name, created=self.created, max_model_len=self.max_model_len
        )

    async def pool(self) -> status.Pool:
        """Return who holds which page of the KV cache, as of now."""
        stats, pages, requests = await self.worker.ask(self._look_at_pool)
        used = [
            status.Page(page=number, holders=holders, cached=cached)
            for number, (holders, cached) in enumerate(pages)
            if holders or cached
        ]
        return status.Pool(
            pages=len(pages),
            page_size=self.config.engine.page_size,
            running=stats.running,
            waiting=stats.waiting,
            queried_tokens=stats.queried_tokens,
            hit_tokens=stats.hit_tokens,
            requests=requests,
            used=used,
        )

    def _look_at_pool(self, engine: Engine) -> tuple[Stats, list, dict[int, str]]:
        """Return all that `pool` needs at one moment; runs on the engine's thread."""
        return engine.stats(), engine.snapshot(), self.worker.holders()

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.config.model_name):
            raise APIError(
                404,
                f"there is no model {name!r} here, only {self.config.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def _check_common(self, body: protocol.GenerationRequest) -> None:
        """Check what completions and chats have in common against this server's limits."""
        self._check_model(body.model)
        check_limit("n", body.n, self.config.max_n)
        check_limit("stop", len(body.stop_strings()), self.config.max_stop)
        check_limit("prompt_logprobs", body.prompt_logprobs, self.config.max_logprobs)
        if body.stream_options and not body.stream:
            raise UserError("stream_options: only for stream=true", param="stream_options")

    async def _encode(self, prompts: AnySequence[str | list[int]]) -> list[list[int]]:
        """Return the prompts with the token ids of those that are texts."""
        size = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
        encode = partial(encode_texts, self.tokenizer, prompts)
        return await self._work(encode, size, param="prompt")

    async def _encode_chat(self, messages: list[Message], form: ChatForm) -> list[int]:
        """Return the token ids of a chat. Raises UserError where there is no template."""
        template = self._require_template()
        for_template = [message.for_template() for message in messages]
        tools = [tool.model_dump(exclude_none=True) for tool in form.offered_tools()]
        size = sum(map(text_length, (for_template, tools)))
        encode = partial(
            template.encode, for_template, form.opens_turn(), form.continues_turn(), tools
        )
        return await self._work(encode, size, param="messages")

    def _truncate(
        self, prompt: list[int], body: protocol.GenerationRequest, max_tokens: int
    ) -> list[int]:
        """Return as many tokens of the prompt's end as the request wants, all if it says nothing.

        max_tokens: how many shall follow at least."""
        wanted = body.truncate_prompt_tokens
        if wanted is None:
            return prompt
        if wanted == -1:
            wanted = max(1, self._most_tokens() - max_tokens)
        return prompt[max(0, len(prompt) - wanted) :]

    async def _work(self, work: Callable[[], Result], size: int, param: str) -> Result:
        """Return work(), done on another thread if it is much: nobody else must wait for it.

        size: characters or tokens. A ValueError becomes a 400 that is about `param`."""
        try:
            if size <= SHORT_TEXT:
                return work()
            threads = self.encoders if size <= LONG_TEXT else self.long_encoder
            return await asyncio.get_running_loop().run_in_executor(threads, work)
        except ValueError as error:
            raise APIError(400, str(error), param=param) from error

    def _fewest_tokens(self, prompt: str | list[int]) -> int:
        """Return how many tokens a prompt has at least, without encoding it."""
        return self.tokenizer.fewest_tokens(prompt) if isinstance(prompt, str) else len(prompt)

    def _require_room(self, fewest_tokens: int, param: str) -> None:
        """Raise UserError if so many tokens are more than the context, before they are made."""
        if fewest_tokens > self.max_model_len:
            raise ContextLengthExceeded(
                self.max_model_len,
                f"{param} makes at least {fewest_tokens}: send less",
                param=param,
            )

    def _room_after(self, prompt: list[int]) -> int:
        """Return how many tokens may follow the prompt.

        Where there is no room at all, 1: that is refused in a sentence with both numbers."""
        return max(1, self._most_tokens() - len(prompt))

    def _most_tokens(self) -> int:
        """Return how many tokens a sequence may have, by the context and by the whole pool.

        Raises APIError 503 while the engine is not warm."""
        self.worker.require_ready()
        stats = self.worker.stats
        assert stats is not None, "the worker is ready, so its engine has statistics"
        return min(self.max_model_len, stats.pages * self.config.engine.page_size)

    async def _generate(
        self,
        make_writer: WriterMaker,
        body: protocol.GenerationRequest,
        prompts: list[list[int]],
        params: SamplingParams,
    ) -> Response:
        """Bring the prompts to the engine, and what comes of them into an answer."""
        request_log = current_request.get()
        job = Job(request_log.request_id, prompts, params, bool(body.stream))
        self._check_logprobs(job)
        await self._compile_form(body, params)
        writer = AnswerWriter(
            make_writer,
            body,
            job,
            self.tokenizer,
            self.config.model_name,
            request_log,
            self.turns,
        )
        await self.worker.submit(job)
        if body.stream:
            return EventStream(writer, self.worker, job)
        return WholeAnswer(writer, self.worker, job)

    async def _compile_form(self, body: protocol.GenerationRequest, params: SamplingParams) -> None:
        """Compile structured output on a thread, so that the engine finds it compiled.

        Raises UserError, about the request's field, if it cannot be."""
        if params.structured is None:
            return
        compile_form = partial(matcher_for, params.structured, self.tokenizer)
        try:
            await asyncio.get_running_loop().run_in_executor(self.compilers, compile_form)
        except UserError as error:
            raise UserError(str(error), param=body.name_of_form()) from error

    def _check_logprobs(self, job: Job) -> None:
        """Raise UserError if the answer would have more logprobs than this server allows."""
        limit = self.config.max_total_logprobs
        require(
            job.logprobs <= limit,
            f"the answer could have {job.logprobs} logprobs, and this server allows {limit}: ask "
            "for fewer prompts, samples, tokens or alternatives",
            param="logprobs" if job.params.prompt_logprobs is None else "prompt_logprobs",
        )


def encode_texts(tokenizer: Tokenizer, prompts: AnySequence[str | list[int]]) -> list[list[int]]:
    """Return the prompts with the token ids of those that are texts."""
    return [
        tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts
    ]


def decode_tokens(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """Return the text of token ids. Raises UserError if the vocabulary does not have them all."""
    last = tokenizer.vocab_size - 1
    largest = max(tokens, default=0)
    require(
        largest <= last,
        f"tokens has token {largest}, and the vocabulary ends at {last}",
        param="tokens",
    )
    return tokenizer.decode(tokens)


def text_length(said: Any) -> int:
    """Return the characters of all texts in JSON: a measure of what it takes to encode them."""
    if isinstance(said, str):
        return len(said)
    if isinstance(said, list):
        return sum(map(text_length, said))
    if isinstance(said, dict):
        return sum(map(text_length, said)) + sum(map(text_length, said.values()))
    return 0


def check_limit(name: str, value: int | None, limit: int) -> None:
    """Raise UserError if more is asked for than this server allows."""
    if value is not None and value > limit:
        raise UserError(f"{name}: {value} asked for, and this server allows {limit}", param=name)
