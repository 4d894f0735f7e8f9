"""From the engine's outputs to answers: choices with text and logprobs, whole or as server-sent events."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from itertools import islice
from typing import ClassVar

from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from sequence import Logprobs, Output
from serving import protocol
from serving.protocol import APIError, GenerationRequest, Usage
from serving.worker import Job, Worker
from tokenizer import StreamDecoder, Tokenizer


class Sample:
    """One sample on its way out."""

    prefix: ClassVar[str]  # of the answer's id
    whole: ClassVar[type[protocol.Answer]]
    piece: ClassVar[type[protocol.Answer]]

    def __init__(
        self, body: GenerationRequest, tokenizer: Tokenizer, prompt: list[int], index: int
    ):
        self.body, self.tokenizer, self.prompt, self.index = body, tokenizer, prompt, index
        self.tokens = 0  # generated so far

    def choice(self, out: Output) -> BaseModel | None:
        """None if a stream has nothing to say of it: text is withheld while it could begin a stop string."""
        self.tokens += len(out.token_ids)
        tokens = out.token_ids if self.body.return_token_ids else None
        if out.text or tokens or out.logprobs or out.prompt_logprobs or out.finish_reason:
            return self.form(
                out, dict(index=self.index, finish_reason=out.finish_reason, token_ids=tokens)
            )

    def form(self, out: Output, fields: dict) -> BaseModel:
        """fields: what choices of all kinds have."""
        raise NotImplementedError

    def text(self, token: int) -> str:
        """Of one token, as OpenAI writes it: bytes that are no whole UTF-8 by their numbers."""
        text = self.tokenizer.token_bytes(token)
        try:
            return text.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in text)


class TextSample(Sample):
    """Of /v1/completions."""

    prefix, whole, piece = "cmpl", protocol.Completion, protocol.Completion

    def __init__(self, body: protocol.CompletionRequest, *args):
        super().__init__(body, *args)
        self.decoder, self.offset = StreamDecoder(self.tokenizer), 0
        if body.echo:
            self.tokens = -len(self.prompt)  # outputs begin with them

    def form(self, out: Output, fields: dict) -> protocol.Choice:
        prompt = list(
            zip(self.prompt, out.prompt_logprobs or ())
        )  # on the first output, if asked for
        logprobs = prompt_logprobs = None
        if self.body.logprobs is not None:
            logprobs = self.lists(
                (prompt if self.body.echo else [])
                + [(entry.token, entry) for entry in out.logprobs]
            )
        if prompt and self.body.prompt_logprobs is not None:
            prompt_logprobs = [
                entry
                and {
                    t: protocol.PromptLogprob(logprob=p, decoded_token=self.text(t))
                    for t, p in likeliest(entry, self.body.prompt_logprobs).items()
                }
                for _, entry in prompt
            ]
        return protocol.Choice(
            text=out.text, logprobs=logprobs, prompt_logprobs=prompt_logprobs, **fields
        )

    def lists(self, entries: list[tuple[int, Logprobs | None]]) -> protocol.LogprobLists:
        offsets = []
        for token, _ in entries:
            offsets.append(self.offset)
            self.offset += len(self.decoder.push([token]))
        tops = [entry and likeliest(entry, self.body.logprobs) for _, entry in entries]
        return protocol.LogprobLists(
            tokens=[self.text(token) for token, _ in entries],
            text_offset=offsets,
            token_logprobs=[entry and entry.logprob for _, entry in entries],
            top_logprobs=[top and {self.text(t): p for t, p in top.items()} for top in tops],
        )


def likeliest(entry: Logprobs, k: int) -> dict[int, float]:
    """The k likeliest tokens, and the one that was taken."""
    return {**dict(islice(entry.top.items(), k)), entry.token: entry.logprob}


class ChatSample(Sample):
    """Of /v1/chat/completions."""

    prefix, whole, piece = "chatcmpl", protocol.ChatCompletion, protocol.ChatChunk
    role = "assistant"  # None once a chunk has said it

    def form(self, out: Output, fields: dict) -> protocol.ChatPart:
        if out.logprobs is not None:
            fields["logprobs"] = protocol.ChatLogprobs(
                content=[self.scored(entry) for entry in out.logprobs]
            )
        if not self.body.stream:
            return protocol.ChatChoice(message=protocol.ChatMessage(content=out.text), **fields)
        role, self.role = self.role, None
        return protocol.ChatChunkChoice(
            delta=protocol.ChatDelta(role=role, content=out.text), **fields
        )

    def scored(self, entry: Logprobs) -> protocol.ScoredToken:
        named = lambda t, p: dict(
            token=self.text(t), logprob=p, bytes=list(self.tokenizer.token_bytes(t))
        )
        top = [
            protocol.LikelyToken(**named(t, p))
            for t, p in islice(entry.top.items(), self.body.top_logprobs or 0)
        ]
        return protocol.ScoredToken(top_logprobs=top, **named(entry.token, entry.logprob))


class Writer:
    """Writes the answer to a job."""

    def __init__(
        self,
        kind: type[Sample],
        body: GenerationRequest,
        job: Job,
        tokenizer: Tokenizer,
        model_name: str,
        log: dict,
    ):
        """log: what will be logged of the request."""
        self.body, self.job, self.log = body, job, log
        self.samples = [
            kind(body, tokenizer, prompt, i * job.params.n + k)
            for i, prompt in enumerate(job.prompts)
            for k in range(job.params.n)
        ]
        self.answer = partial(
            kind.piece if body.stream else kind.whole,
            id=f"{kind.prefix}-{job.request_id}",
            created=int(time.time()),
            model=model_name,
        )

    def choices(self, outputs: list[tuple[int, Output]]) -> list[BaseModel]:
        made = (
            self.samples[prompt * self.job.params.n + out.index].choice(out)
            for prompt, out in outputs
        )
        return [choice for choice in made if choice]

    def usage(self) -> Usage:
        """Of the whole job, at its end."""
        prompt, completion = sum(map(len, self.job.prompts)), sum(s.tokens for s in self.samples)
        self.log.update(prompt_tokens=prompt, completion_tokens=completion)
        return Usage(
            prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
        )

    async def whole(self) -> protocol.Answer:
        choices = self.choices(await self.job.next())
        return self.answer(choices=sorted(choices, key=lambda c: c.index), usage=self.usage())

    async def events(self) -> AsyncIterator[str]:
        event = lambda body: f"data: {body.model_dump_json()}\n\n"
        try:
            while self.job.unfinished or self.job.outputs:
                for choice in self.choices(await self.job.next()):
                    yield event(self.answer(choices=[choice]))
            usage = self.usage()
            if self.body.stream_options and self.body.stream_options.include_usage:
                yield event(self.answer(choices=[], usage=usage))
            yield "data: [DONE]\n\n"
        except APIError as e:
            self.log["error"] = str(e)
            yield event(e.body)


@contextlib.asynccontextmanager
async def attended(worker: Worker, job: Job, receive: Callable) -> AsyncIterator[None]:
    """Inside, the job fails as soon as its client goes away; at the end of it nothing of the job remains in the engine."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        job.fail(
            APIError(499, "the client has gone")
        )  # nginx's number for it; only the log sees it

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        worker.end(job)


class EventStream(StreamingResponse):
    """Server-sent events from a job."""

    def __init__(self, events: AsyncIterator[str], worker: Worker, job: Job):
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self.worker, self.job = worker, job

    async def __call__(self, scope, receive, send) -> None:
        async with attended(self.worker, self.job, receive):
            await self.stream_response(send)
