"""Job: the prompts of one HTTP request on their way through the engine and back."""

import asyncio
import time
from dataclasses import dataclass

from sequence import Output, SamplingParams
from serving.api_errors import APIError

Sample = tuple[int, int]
"""Names a sample of a job: number of its prompt, index among the prompt's samples."""


@dataclass
class Progress:
    """How far a sample has come."""

    new_tokens: int = 0
    last_output_at: float | None = None
    """time.perf_counter(); None until there is an output"""


class Job:
    """The prompts of one HTTP request, and the outputs that wait for their reader.

    Lives on the event loop; only `engine_ids` belongs to the engine's thread. At most max_tokens
    outputs wait for each sample, merged into one, so a slow reader cannot fill the memory."""

    def __init__(
        self, request_id: str, prompts: list[list[int]], params: SamplingParams, stream: bool
    ) -> None:
        self.request_id = request_id
        self.prompts = prompts
        self.params = params
        self.stream = stream
        self.logprobs = count_logprobs(prompts, params)
        self.unfinished = len(prompts) * params.n  # samples
        self.error: APIError | None = None
        self.changed = asyncio.Event()  # set when the engine accepts the job, then at each change
        self.engine_ids: list[int] = []  # one per prompt: what the engine calls them
        self.arrived = time.perf_counter()
        self._outputs: dict[Sample, Output] = {}  # what has not been read, one for each sample
        self._progress: dict[Sample, Progress] = {}
        self._longest = [0] * len(prompts)  # new tokens of the longest sample that has ended
        self._running = [params.n] * len(prompts)  # samples of each prompt that have not ended

    @property
    def has_outputs(self) -> bool:
        """Whether outputs wait for their reader."""
        return bool(self._outputs)

    @property
    def is_done(self) -> bool:
        """Whether all samples have ended and everything has been read."""
        return not self.unfinished and not self._outputs

    def fail(self, error: APIError) -> None:
        """Let the reader meet this error."""
        self.error = error
        self.changed.set()

    def note_output(self, prompt: int, output: Output, now: float) -> float | None:
        """Note that a sample brought something at `now` (time.perf_counter()).

        Returns the seconds since it last did, None if this is the first time."""
        progress = self._progress.setdefault((prompt, output.index), Progress())
        previous = progress.last_output_at
        progress.last_output_at = now
        progress.new_tokens += len(output.token_ids)
        return None if previous is None else now - previous

    def new_tokens(self, prompt: int, output: Output) -> int:
        """Return how many tokens the sample has had, up to this output."""
        return self._progress[prompt, output.index].new_tokens

    def note_end(self, prompt: int, output: Output) -> int | None:
        """Note that a sample has ended with this output.

        Returns, with the last sample of a prompt, the new tokens of the longest of them."""
        self._longest[prompt] = max(self._longest[prompt], self.new_tokens(prompt, output))
        self._running[prompt] -= 1
        return None if self._running[prompt] else self._longest[prompt]

    def put(self, prompt: int, output: Output) -> None:
        """Store an output for the reader and wake it, if there is something for it to do."""
        unread = self._outputs.setdefault((prompt, output.index), output)
        if unread is not output:
            unread.absorb(output)
        if output.finish_reason is not None:
            self.unfinished -= 1
        if self.stream or not self.unfinished:
            self.changed.set()

    async def next_outputs(self) -> list[tuple[int, Output]]:
        """Wait, and return what is new of a streamed job; of another, everything, once it is done.

        There is one output for each sample, with the number of its prompt. Raises APIError if the
        job has failed."""
        while not self._is_readable():
            await self.changed.wait()
            self.changed.clear()
        if self.error:
            raise self.error
        outputs = self._outputs
        self._outputs = {}
        return [(prompt, output) for (prompt, _), output in outputs.items()]

    def _is_readable(self) -> bool:
        if self.error or not self.unfinished:
            return True
        return self.stream and self.has_outputs


def count_logprobs(prompts: list[list[int]], params: SamplingParams) -> int:
    """Return how many logprobs an answer has at most: for each position those of the likeliest
    tokens that were asked for, and that of the token itself."""
    per_prompt_token = 0 if params.prompt_logprobs is None else params.prompt_logprobs + 1
    per_new_token = 0 if params.logprobs is None else params.logprobs + 1
    prompt_tokens = sum(len(prompt) for prompt in prompts)
    new_tokens = len(prompts) * params.max_tokens
    return params.n * (prompt_tokens * per_prompt_token + new_tokens * per_new_token)
