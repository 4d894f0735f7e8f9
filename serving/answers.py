"""From the engine's outputs to answers: choices with text and logprobs, whole or streamed.

AnswerWriter writes the answer to one request; it has a ChoiceWriter for each sample, which turns
the engine's outputs into the choices of the completions or of the chat API.
"""

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from itertools import islice
from typing import Any, ClassVar, Literal

from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from sequence import Logprobs, Output
from serving import protocol
from serving.api_errors import APIError
from serving.job import Job
from serving.log import RequestLog
from serving.protocol import GenerationRequest, Usage
from serving.worker import Worker
from tokenizer import StreamDecoder, Tokenizer

CLIENT_LEFT = 499  # nginx's number for it; only the log sees it


class ChoiceWriter(ABC):
    """Writes the choices of one sample: one of a whole answer, or many of a streamed one."""

    id_prefix: ClassVar[str]
    """what the answer's id begins with"""
    answer_type: ClassVar[type[protocol.Answer]]
    """of a whole answer"""
    chunk_type: ClassVar[type[protocol.Answer]]
    """of a piece of a streamed answer"""

    def __init__(
        self, body: GenerationRequest, tokenizer: Tokenizer, prompt: list[int], index: int
    ) -> None:
        """index: of the choice in the answer."""
        self.body = body
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.index = index
        self.completion_tokens = 0  # written so far

    def write(self, output: Output) -> BaseModel | None:
        """Return the choice that tells of this output.

        Returns None if there is nothing to tell: text is withheld while it could begin a stop
        string."""
        self.completion_tokens += len(output.token_ids)
        token_ids = output.token_ids if self.body.return_token_ids else None
        scores = output.logprobs or output.prompt_logprobs
        if not (output.text or token_ids or scores or output.finish_reason):
            return None
        common_fields = {
            "index": self.index,
            "finish_reason": output.finish_reason,
            "token_ids": token_ids,
        }
        return self.make_choice(output, common_fields)

    @abstractmethod
    def make_choice(self, output: Output, common_fields: dict[str, Any]) -> BaseModel:
        """Return output as a choice of this API; common_fields are those of all kinds of choice."""

    def token_text(self, token: int) -> str:
        """Return the text of one token as OpenAI writes it: bytes that are no whole UTF-8
        characters by their numbers."""
        token_bytes = self.tokenizer.token_bytes(token)
        try:
            return token_bytes.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)


class CompletionChoiceWriter(ChoiceWriter):
    """Writes the choices of /v1/completions."""

    body: protocol.CompletionRequest
    id_prefix = "cmpl"
    answer_type = protocol.Completion
    chunk_type = protocol.Completion

    def __init__(
        self,
        body: protocol.CompletionRequest,
        tokenizer: Tokenizer,
        prompt: list[int],
        index: int,
    ) -> None:
        super().__init__(body, tokenizer, prompt, index)
        self.decoder = StreamDecoder(tokenizer)
        self.text_offset = 0  # characters of the tokens whose logprobs have been written
        if body.echo:
            self.completion_tokens = -len(prompt)  # outputs begin with the prompt's tokens

    def make_choice(self, output: Output, common_fields: dict[str, Any]) -> protocol.Choice:
        """Return output as a choice with text."""
        prompt_entries: list[tuple[int, Logprobs | None]] = []
        if output.prompt_logprobs:  # on the first output, if they were asked for
            prompt_entries = list(zip(self.prompt, output.prompt_logprobs, strict=True))
        return protocol.Choice(
            text=output.text,
            logprobs=self._logprobs(output, prompt_entries),
            prompt_logprobs=self._prompt_logprobs(prompt_entries),
            **common_fields,
        )

    def _logprobs(
        self, output: Output, prompt_entries: list[tuple[int, Logprobs | None]]
    ) -> protocol.LogprobLists | None:
        """Return the logprobs of the text, which begins with the prompt if it is echoed."""
        if self.body.logprobs is None:
            return None
        entries = prompt_entries if self.body.echo else []
        new_entries = [(entry.token, entry) for entry in output.logprobs or []]
        return self._logprob_lists([*entries, *new_entries])

    def _logprob_lists(self, entries: list[tuple[int, Logprobs | None]]) -> protocol.LogprobLists:
        """Return tokens with their logprobs; the first token of a prompt has none."""
        tokens = [token for token, _ in entries]
        scores = [entry for _, entry in entries]
        return protocol.LogprobLists(
            tokens=[self.token_text(token) for token in tokens],
            token_logprobs=[None if entry is None else entry.logprob for entry in scores],
            top_logprobs=[None if entry is None else self._top_logprobs(entry) for entry in scores],
            text_offset=self._text_offsets(tokens),
        )

    def _text_offsets(self, tokens: list[int]) -> list[int]:
        """Return how many characters of the text come before each token.

        A character is counted with the token that completes it."""
        offsets = []
        for token in tokens:
            offsets.append(self.text_offset)
            self.text_offset += len(self.decoder.push([token]))
        return offsets

    def _top_logprobs(self, entry: Logprobs) -> dict[str, float]:
        likeliest = likeliest_tokens(entry, self.body.logprobs or 0)
        return {self.token_text(token): logprob for token, logprob in likeliest.items()}

    def _prompt_logprobs(
        self, entries: list[tuple[int, Logprobs | None]]
    ) -> list[dict[int, protocol.PromptLogprob] | None] | None:
        if not entries or self.body.prompt_logprobs is None:
            return None
        return [None if entry is None else self._prompt_logprob(entry) for _, entry in entries]

    def _prompt_logprob(self, entry: Logprobs) -> dict[int, protocol.PromptLogprob]:
        likeliest = likeliest_tokens(entry, self.body.prompt_logprobs or 0)
        return {
            token: protocol.PromptLogprob(logprob=logprob, decoded_token=self.token_text(token))
            for token, logprob in likeliest.items()
        }


def likeliest_tokens(entry: Logprobs, k: int) -> dict[int, float]:
    """Return the logprobs of the k likeliest tokens and of the one that was taken, by token."""
    return {**dict(islice(entry.top.items(), k)), entry.token: entry.logprob}


class ChatChoiceWriter(ChoiceWriter):
    """Writes the choices of /v1/chat/completions."""

    body: protocol.ChatRequest
    id_prefix = "chatcmpl"
    answer_type = protocol.ChatCompletion
    chunk_type = protocol.ChatChunk

    def __init__(
        self, body: protocol.ChatRequest, tokenizer: Tokenizer, prompt: list[int], index: int
    ) -> None:
        super().__init__(body, tokenizer, prompt, index)
        self.role_is_written = False

    def make_choice(self, output: Output, common_fields: dict[str, Any]) -> protocol.ChatPart:
        """Return output as a message or, of a stream, as the piece of one."""
        logprobs = None
        if output.logprobs is not None:
            scored = [self._scored_token(entry) for entry in output.logprobs]
            logprobs = protocol.ChatLogprobs(content=scored)
        if not self.body.stream:
            message = protocol.ChatMessage(content=output.text)
            return protocol.ChatChoice(message=message, logprobs=logprobs, **common_fields)
        role: Literal["assistant"] | None = None if self.role_is_written else "assistant"
        self.role_is_written = True
        delta = protocol.ChatDelta(role=role, content=output.text)
        return protocol.ChatChunkChoice(delta=delta, logprobs=logprobs, **common_fields)

    def _scored_token(self, entry: Logprobs) -> protocol.ScoredToken:
        likeliest = islice(entry.top.items(), self.body.top_logprobs or 0)
        return protocol.ScoredToken(
            top_logprobs=[
                protocol.LikelyToken(**self._likely_token(token, logprob))
                for token, logprob in likeliest
            ],
            **self._likely_token(entry.token, entry.logprob),
        )

    def _likely_token(self, token: int, logprob: float) -> dict[str, Any]:
        """Return the fields of a LikelyToken."""
        return {
            "token": self.token_text(token),
            "logprob": logprob,
            "bytes": list(self.tokenizer.token_bytes(token)),
        }


class AnswerWriter:
    """Writes the answer to a job, whole or as server-sent events."""

    def __init__(
        self,
        choice_writer: type[ChoiceWriter],
        body: GenerationRequest,
        job: Job,
        tokenizer: Tokenizer,
        model_name: str,
        request_log: RequestLog,
    ) -> None:
        """request_log is told how many tokens there were, and what broke off a stream."""
        self.body = body
        self.job = job
        self.request_log = request_log
        self.samples_per_prompt = job.params.n
        self.choice_writers: list[ChoiceWriter] = []
        for prompt in job.prompts:
            for _ in range(self.samples_per_prompt):
                index = len(self.choice_writers)
                self.choice_writers.append(choice_writer(body, tokenizer, prompt, index))
        self.answer_type: Callable[..., protocol.Answer] = choice_writer.answer_type
        if body.stream:
            self.answer_type = choice_writer.chunk_type
        self.answer_id = f"{choice_writer.id_prefix}-{job.request_id}"
        self.created = int(time.time())
        self.model_name = model_name

    async def whole(self) -> protocol.Answer:
        """Wait for everything, and return it in one answer. Raises APIError if the job fails."""
        choices = self._choices(await self.job.next_outputs())
        choices.sort(key=lambda choice: choice.index)
        return self._answer(choices, self._usage())

    async def events(self) -> AsyncIterator[str]:
        """Yield the answer in pieces, as server-sent events, as the engine brings them."""
        try:
            while not self.job.is_done:
                for choice in self._choices(await self.job.next_outputs()):
                    yield event(self._answer([choice]))
            usage = self._usage()
            if self.body.stream_options and self.body.stream_options.include_usage:
                yield event(self._answer([], usage))
            yield "data: [DONE]\n\n"
        except APIError as error:
            self.request_log.error = str(error)
            yield event(error.body)

    def _choices(self, outputs: list[tuple[int, Output]]) -> list[Any]:
        choices = []
        for prompt, output in outputs:
            writer = self.choice_writers[prompt * self.samples_per_prompt + output.index]
            choice = writer.write(output)
            if choice is not None:
                choices.append(choice)
        return choices

    def _answer(self, choices: list[Any], usage: Usage | None = None) -> protocol.Answer:
        return self.answer_type(
            id=self.answer_id,
            created=self.created,
            model=self.model_name,
            choices=choices,
            usage=usage,
        )

    def _usage(self) -> Usage:
        """Return the tokens of the whole job, once it has ended, and tell them to the log."""
        prompt_tokens = sum(len(prompt) for prompt in self.job.prompts)
        completion_tokens = sum(writer.completion_tokens for writer in self.choice_writers)
        self.request_log.prompt_tokens = prompt_tokens
        self.request_log.completion_tokens = completion_tokens
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
        )


def event(body: BaseModel) -> str:
    """Return a server-sent event."""
    return f"data: {body.model_dump_json()}\n\n"


@contextlib.asynccontextmanager
async def cancel_on_disconnect(worker: Worker, job: Job, receive: Receive) -> AsyncIterator[None]:
    """Fail the job as soon as its client goes away; leave nothing of it in the engine at the end.

    receive: the request's channel, whose body has been read, so that only the end is to come."""
    watcher = asyncio.create_task(fail_on_disconnect(job, receive))
    try:
        yield
    finally:
        watcher.cancel()
        worker.close(job)


async def fail_on_disconnect(job: Job, receive: Receive) -> None:
    """Wait until the client has gone, then fail the job."""
    message = await receive()
    while message["type"] != "http.disconnect":
        message = await receive()
    job.fail(APIError(CLIENT_LEFT, "the client has gone"))


class EventStream(StreamingResponse):
    """Server-sent events from a job, which ends when its client goes away."""

    def __init__(self, events: AsyncIterator[str], worker: Worker, job: Job) -> None:
        # Neither a cache nor nginx may hold back an event.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.worker = worker
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        async with cancel_on_disconnect(self.worker, self.job, receive):
            await self.stream_response(send)
