"""ServedModel: how the model answers requests, once FastAPI has read them.

Read `complete` and `chat`, then `_generate`, in which a request's way through the engine can be
followed from end to end.
"""

import asyncio
import time

from starlette.types import Receive

from config import ServeConfig
from engine import Engine, Stats
from errors import UserError
from sequence import SamplingParams
from serving import protocol
from serving.answers import (
    AnswerWriter,
    ChatChoiceWriter,
    ChoiceWriter,
    CompletionChoiceWriter,
    EventStream,
    cancel_on_disconnect,
)
from serving.api_errors import APIError
from serving.chat import ChatTemplate
from serving.job import Job
from serving.log import current_request
from serving.worker import Worker
from tokenizer import Tokenizer


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
        self.created = int(time.time())  # seconds since 1970

    async def complete(
        self, body: protocol.CompletionRequest, receive: Receive
    ) -> EventStream | protocol.Answer:
        """Answer a completion. receive: the request's channel, on which its client's end comes."""
        given_prompts = body.prompts()
        self._check_common(body)
        check_limit("prompt", len(given_prompts), self.config.max_prompts)
        check_limit("logprobs", body.logprobs, self.config.max_logprobs)
        check_limit("prompt_logprobs", body.prompt_logprobs, self.config.max_logprobs)
        prompts = []
        for prompt in given_prompts:
            prompts.append(await self._encode(prompt) if isinstance(prompt, str) else prompt)
        params = body.sampling_params()
        return await self._generate(CompletionChoiceWriter, body, prompts, params, receive)

    async def chat(
        self, body: protocol.ChatRequest, receive: Receive
    ) -> EventStream | protocol.Answer:
        """Answer a chat. receive: the request's channel, on which its client's end comes."""
        assert self.template is not None, "without a template, there is no route that leads here"
        self._check_common(body)
        check_limit("top_logprobs", body.top_logprobs, self.config.max_logprobs)
        self.worker.require_ready()  # the pages are counted once the engine is warm
        messages = [message.for_template() for message in body.messages]
        add_generation_prompt = body.add_generation_prompt is not False
        try:
            prompt = await asyncio.to_thread(self.template.encode, messages, add_generation_prompt)
        except ValueError as error:
            raise APIError(400, str(error), param="messages") from error
        params = body.sampling_params(self._room_after(prompt))
        return await self._generate(ChatChoiceWriter, body, [prompt], params, receive)

    async def tokenize(self, body: protocol.TokenizeRequest) -> protocol.Tokens:
        """Return the token ids of a text."""
        self._check_model(body.model)
        tokens = await self._encode(body.prompt)
        return protocol.Tokens(tokens=tokens, count=len(tokens), max_model_len=self.max_model_len)

    def detokenize(self, body: protocol.DetokenizeRequest) -> protocol.Text:
        """Return the text of token ids."""
        self._check_model(body.model)
        last = self.tokenizer.vocab_size - 1
        unknown = [token for token in body.tokens if token > last]
        if unknown:
            raise UserError(
                f"tokens has token {unknown[0]}, and the vocabulary ends at {last}", param="tokens"
            )
        return protocol.Text(prompt=self.tokenizer.decode(body.tokens))

    def card(self) -> protocol.ModelCard:
        """Return what /v1/models says."""
        return protocol.ModelCard(
            id=self.config.model_name, created=self.created, max_model_len=self.max_model_len
        )

    async def pool(self) -> protocol.Pool:
        """Return who holds which page of the KV cache, as of now."""
        stats, pages, requests = await self.worker.ask(self._look_at_pool)
        used = [
            protocol.Page(page=number, holders=holders, cached=cached)
            for number, (holders, cached) in enumerate(pages)
            if holders or cached
        ]
        return protocol.Pool(
            pages=len(pages),
            page_size=self.config.engine.page_size,
            running=stats.running,
            waiting=stats.waiting,
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
        if body.stream_options and not body.stream:
            raise UserError("stream_options: only for stream=true", param="stream_options")

    async def _encode(self, text: str) -> list[int]:
        """Return the token ids of text, made on another thread: a long one must not hold up the
        other requests."""
        try:
            return await asyncio.to_thread(self.tokenizer.encode, text)
        except ValueError as error:
            raise APIError(400, str(error), param="prompt") from error

    def _room_after(self, prompt: list[int]) -> int:
        """Return how many tokens may follow the prompt, by the context and by the whole pool.

        Where there is no room at all, 1: the engine refuses that in a sentence with its numbers."""
        stats = self.worker.stats
        assert stats is not None, "the worker is ready, so its engine has statistics"
        pool_tokens = stats.pages * self.config.engine.page_size
        return max(1, min(self.max_model_len, pool_tokens) - len(prompt))

    async def _generate(
        self,
        choice_writer: type[ChoiceWriter],
        body: protocol.GenerationRequest,
        prompts: list[list[int]],
        params: SamplingParams,
        receive: Receive,
    ) -> EventStream | protocol.Answer:
        """Bring the prompts to the engine, and what comes of them into an answer."""
        request_log = current_request.get()
        job = Job(request_log.request_id, prompts, params, bool(body.stream))
        writer = AnswerWriter(
            choice_writer, body, job, self.tokenizer, self.config.model_name, request_log
        )
        await self.worker.submit(job)
        if body.stream:
            return EventStream(writer.events(), self.worker, job)
        async with cancel_on_disconnect(self.worker, job, receive):
            return await writer.whole()


def check_limit(name: str, value: int | None, limit: int) -> None:
    """Raise UserError if more is asked for than this server allows."""
    if value is not None and value > limit:
        raise UserError(f"{name}: {value} asked for, and this server allows {limit}", param=name)
