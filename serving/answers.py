"""From the engine's outputs to answers: choices with text and logprobs, whole or streamed.

AnswerWriter writes the answer to one request; it has a ChoiceWriter for each sample, which turns
the engine's outputs into the choices of the completions or of the chat API. Lists of logprobs can
be long: in their places choices have iterators, whose items are made when they are sent, see
pieces.py.
"""

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from itertools import islice
from operator import attrgetter
from typing import Any, ClassVar, Literal, NamedTuple

from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from sequence import Logprobs, Output
from serving import protocol
from serving.api_errors import APIError
from serving.job import Job
from serving.log import RequestLog
from serving.pieces import in_turns, joined, json_fragments, json_response
from serving.protocol import GenerationRequest, Usage
from serving.tool_calls import MARKED, Call, CallReader, CallStyle, Said, StreamedCall, written_call
from serving.turns import Turns
from serving.worker import Worker
from tokenizer import StreamDecoder, Tokenizer

CLIENT_LEFT = 499  # nginx's number for it; only the log sees it


class Piece(NamedTuple):
    """One choice, and what is to be said beside it if it has an answer of its own."""

    choice: Any
    prompt_fields: dict[str, Any]
    """Fields of the whole answer that tell of its prompt, by name."""
    usage: Usage
    """The tokens of its prompt and, so far, of its sample."""


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
        self.has_written = False

    def write(self, output: Output) -> Piece | None:
        """Return the choice that tells of this output.

        Returns None if there is nothing to tell: text is withheld while it could begin a stop
        string."""
        self.completion_tokens += len(output.token_ids)
        token_ids = output.token_ids if self.body.return_token_ids else None
        scores = output.logprobs or output.prompt_logprobs
        said = self.read(output)
        if not (said.words or said.calls or token_ids or scores or output.finish_reason):
            return None
        common_fields = {
            "index": self.index,
            "finish_reason": self.finish_reason(output),
            "stop_reason": output.stop_reason,
            "token_ids": token_ids,
        }
        prompt_fields = {} if self.has_written else self._prompt_fields(output)
        self.has_written = True
        return self.make_piece(output, said, common_fields, prompt_fields)

    def read(self, output: Output) -> Said:
        """Return what the output says: its text."""
        return Said(output.text, [])

    def finish_reason(self, output: Output) -> str | None:
        """Return why the sample has ended, None if it goes on."""
        return output.finish_reason

    @abstractmethod
    def make_piece(
        self,
        output: Output,
        said: Said,
        common_fields: dict[str, Any],
        prompt_fields: dict[str, Any],
    ) -> Piece:
        """Return output, and what it says, as a choice of this API.

        common_fields are those of all kinds of choice. prompt_fields tell of the prompt; they are
        empty but for the first choice of a sample."""

    def usage(self) -> Usage:
        """Return the tokens of the prompt, and those of the sample that have been written."""
        return make_usage(len(self.prompt), self.completion_tokens)

    def _prompt_fields(self, output: Output) -> dict[str, Any]:
        """Return what a sample's first output tells of the prompt, as far as it was asked for."""
        fields: dict[str, Any] = {}
        if self.body.return_token_ids:
            fields["prompt_token_ids"] = self.prompt
        if output.prompt_logprobs and self.body.prompt_logprobs is not None:
            fields["prompt_logprobs"] = map(self._prompt_logprob, output.prompt_logprobs)
        return fields

    def _prompt_logprob(self, entry: Logprobs | None) -> dict[int, protocol.PromptLogprob] | None:
        if entry is None:
            return None
        ranks = {token: rank for rank, token in enumerate(entry.top, start=1)}
        ranks.setdefault(entry.token, entry.rank)
        likeliest = likeliest_tokens(entry, self.body.prompt_logprobs or 0)
        return {
            token: protocol.PromptLogprob(
                logprob=logprob, rank=ranks[token], decoded_token=self.token_text(token)
            )
            for token, logprob in likeliest.items()
        }

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
        self.decoder = StreamDecoder(tokenizer, body.skip_special_tokens is not False)
        self.text_offset = 0  # characters of the tokens whose logprobs have been written

    def make_piece(
        self,
        output: Output,
        said: Said,
        common_fields: dict[str, Any],
        prompt_fields: dict[str, Any],
    ) -> Piece:
        """Return output as a choice with text. It tells of its prompt itself: there are several."""
        prompt_entries: list[tuple[int, Logprobs | None]] = []
        if output.prompt_logprobs:  # on the first output, if they were asked for
            prompt_entries = list(zip(self.prompt, output.prompt_logprobs, strict=True))
        choice = protocol.Choice.model_construct(
            text=said.words,
            logprobs=self._logprobs(output, prompt_entries),
            **common_fields,
            **prompt_fields,
        )
        return Piece(choice, {}, self.usage())

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
        return protocol.LogprobLists.model_construct(
            tokens=map(self.token_text, tokens),
            token_logprobs=[None if entry is None else entry.logprob for entry in scores],
            top_logprobs=map(self._top_logprobs, scores),
            text_offset=self._text_offsets(tokens),
        )

    def _text_offsets(self, tokens: list[int]) -> Iterator[int]:
        """Yield how many characters of the text come before each token.

        A character is counted with the token that completes it."""
        for token in tokens:
            yield self.text_offset
            self.text_offset += len(self.decoder.push([token]))

    def _top_logprobs(self, entry: Logprobs | None) -> dict[str, float] | None:
        if entry is None:
            return None
        likeliest = likeliest_tokens(entry, self.body.logprobs or 0)
        return {self.token_text(token): logprob for token, logprob in likeliest.items()}


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
        self,
        body: protocol.ChatRequest,
        tokenizer: Tokenizer,
        prompt: list[int],
        index: int,
        call_style: CallStyle = MARKED,
    ) -> None:
        """call_style: how the model writes calls of functions."""
        super().__init__(body, tokenizer, prompt, index)
        self.role_is_written = False
        names = {tool.function.name for tool in body.offered_tools()}
        self.call_reader = CallReader(call_style, names, body.may_call_several()) if names else None
        self.calls_written = 0

    def read(self, output: Output) -> Said:
        """Return what the output says: words, and calls of functions if the request offers any."""
        if self.call_reader is None:
            return super().read(output)
        said = self.call_reader.push(output.text)
        if output.finish_reason is None:
            return said
        rest = self.call_reader.finish()
        return Said(said.words + rest.words, said.calls + rest.calls)

    def finish_reason(self, output: Output) -> str | None:
        """Return why the sample has ended, None if it goes on."""
        has_called = self.call_reader is not None and self.call_reader.has_called
        if has_called and output.finish_reason == "stop":
            return "tool_calls"
        return output.finish_reason

    def make_piece(
        self,
        output: Output,
        said: Said,
        common_fields: dict[str, Any],
        prompt_fields: dict[str, Any],
    ) -> Piece:
        """Return output as a message or, of a stream, as the piece of one.

        The answer tells of the prompt, because all samples have the same; the first does so."""
        choice = self._choice(output, said, common_fields)
        return Piece(choice, prompt_fields if self.index == 0 else {}, self.usage())

    def _choice(
        self, output: Output, said: Said, common_fields: dict[str, Any]
    ) -> protocol.ChatPart:
        logprobs = None
        if output.logprobs is not None:
            scored = map(self._scored_token, output.logprobs)
            logprobs = protocol.ChatLogprobs.model_construct(content=scored)
        if not self.body.stream:
            calls = [written_call(call) for call in said.calls] or None
            content = None if calls and not said.words else said.words
            message = protocol.ChatMessage(content=content, tool_calls=calls)
            return protocol.ChatChoice(message=message, logprobs=logprobs, **common_fields)
        role: Literal["assistant"] | None = None if self.role_is_written else "assistant"
        self.role_is_written = True
        delta = protocol.ChatDelta(
            role=role, content=said.words, tool_calls=self._streamed_calls(said.calls)
        )
        return protocol.ChatChunkChoice(delta=delta, logprobs=logprobs, **common_fields)

    def _streamed_calls(self, calls: list[Call]) -> list[StreamedCall] | None:
        """Return the calls with their numbers, None if there are none."""
        if not calls:
            return None
        first = self.calls_written
        self.calls_written += len(calls)
        return [
            StreamedCall(index=index, **dict(written_call(call)))
            for index, call in enumerate(calls, start=first)
        ]

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


WriterMaker = Callable[[Any, Tokenizer, list[int], int], ChoiceWriter]
"""ChoiceWriter's class, or a function with its arguments."""


class AnswerWriter:
    """Writes the answer to a job, whole or as server-sent events."""

    def __init__(
        self,
        make_writer: WriterMaker,
        body: GenerationRequest,
        job: Job,
        tokenizer: Tokenizer,
        model_name: str,
        request_log: RequestLog,
        turns: Turns,
    ) -> None:
        """make_writer makes the writer of a sample, of the arguments of ChoiceWriter. request_log
        is told how many tokens there were, and what broke off a stream."""
        self.body = body
        self.job = job
        self.request_log = request_log
        self.turns = turns
        self.samples_per_prompt = job.params.n
        self.choice_writers: list[ChoiceWriter] = []
        for prompt in job.prompts:
            for _ in range(self.samples_per_prompt):
                index = len(self.choice_writers)
                self.choice_writers.append(make_writer(body, tokenizer, prompt, index))
        first = self.choice_writers[0]
        self.answer_type: Callable[..., protocol.Answer] = first.answer_type
        if body.stream:
            self.answer_type = first.chunk_type
        self.answer_id = f"{first.id_prefix}-{job.request_id}"
        self.created = int(time.time())
        self.model_name = model_name

    async def whole(self) -> Response:
        """Wait for everything, and return it in one answer. Raises APIError if the job fails."""
        pieces = self._pieces(await self.job.next_outputs())
        choices = sorted((piece.choice for piece in pieces), key=attrgetter("index"))
        answer = self._answer(choices, self._usage())
        for piece in pieces:
            set_fields(answer, piece.prompt_fields)
        return json_response(answer, self.turns)

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the answer in pieces, as server-sent events, as the engine brings them."""
        options = self.body.stream_options or protocol.StreamOptions()
        try:
            while not self.job.is_done:
                pieces = self._pieces(await self.job.next_outputs())
                tells_usage = options.continuous_usage_stats
                answers = (self._chunk(piece, tells_usage) for piece in pieces)
                async for piece in in_turns(joined(event_fragments(answers)), self.turns):
                    yield piece
            usage = self._usage()
            if options.include_usage:
                yield event(self._answer([], usage))
            yield b"data: [DONE]\n\n"
        except APIError as error:
            self.request_log.error = str(error)
            yield event(error.body)

    def _pieces(self, outputs: list[tuple[int, Output]]) -> list[Piece]:
        pieces = []
        for prompt, output in outputs:
            writer = self.choice_writers[prompt * self.samples_per_prompt + output.index]
            piece = writer.write(output)
            if piece is not None:
                pieces.append(piece)
        return pieces

    def _chunk(self, piece: Piece, tells_usage: bool) -> protocol.Answer:
        """Return a piece as an answer of its own."""
        answer = self._answer([piece.choice], piece.usage if tells_usage else None)
        set_fields(answer, piece.prompt_fields)
        return answer

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
        return make_usage(prompt_tokens, completion_tokens)


def make_usage(prompt_tokens: int, completion_tokens: int) -> Usage:
    """Return so many tokens, and their sum."""
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )


def set_fields(model: BaseModel, values: dict[str, Any]) -> None:
    """Set fields of a model as they are: a list may be an iterator, see pieces.py."""
    for name, value in values.items():
        setattr(model, name, value)


def event_fragments(bodies: Iterable[BaseModel]) -> Iterator[bytes]:
    """Yield a server-sent event for each of the bodies, bit by bit."""
    for body in bodies:
        yield b"data: "
        yield from json_fragments(body)
        yield b"\n\n"


def event(body: BaseModel) -> bytes:
    """Return a server-sent event."""
    return b"".join(event_fragments([body]))


@contextlib.asynccontextmanager
async def watching_client(job: Job, receive: Receive) -> AsyncIterator[None]:
    """Inside, the job fails as soon as its client goes away.

    receive: the request's channel, whose body has been read, so that only the end is to come."""
    watcher = asyncio.create_task(fail_on_disconnect(job, receive))
    try:
        yield
    finally:
        watcher.cancel()


async def fail_on_disconnect(job: Job, receive: Receive) -> None:
    """Wait until the client has gone, then fail the job."""
    message = await receive()
    while message["type"] != "http.disconnect":
        message = await receive()
    job.fail(APIError(CLIENT_LEFT, "the client has gone"))


class WholeAnswer(Response):
    """The answer to a job in one JSON object; the job ends when its client goes away."""

    def __init__(self, writer: AnswerWriter, worker: Worker, job: Job) -> None:
        super().__init__()
        self.writer = writer
        self.worker = worker
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer once there is all of it. Raises APIError if the job fails.

        The job stays open until its client has the answer, because so long it takes memory."""
        try:
            async with watching_client(self.job, receive):
                response = await self.writer.whole()
            await response(scope, receive, send)
        finally:
            self.worker.close(self.job)


class EventStream(StreamingResponse):
    """Server-sent events from a job, which ends when its client goes away."""

    def __init__(self, writer: AnswerWriter, worker: Worker, job: Job) -> None:
        # Neither a cache nor nginx may hold back an event.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(writer.events(), media_type="text/event-stream", headers=headers)
        self.worker = worker
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            async with watching_client(self.job, receive):
                await self.stream_response(send)
        finally:
            self.worker.close(self.job)
