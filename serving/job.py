"""Job: the prompts of one HTTP request on their way through the engine and back."""

import asyncio
import time

from sequence import Output, SamplingParams
from serving.api_errors import APIError


class Job:
    """The prompts of one HTTP request, and the outputs that wait for their reader.

    Lives on the event loop; only `engine_ids` belongs to the engine's thread. At most max_tokens
    outputs wait for each sample, so a slow reader cannot fill the memory.

    A sample is named by (number of its prompt, its index among the prompt's samples)."""

    def __init__(
        self, request_id: str, prompts: list[list[int]], params: SamplingParams, stream: bool
    ) -> None:
        self.request_id = request_id
        self.prompts = prompts
        self.params = params
        self.stream = stream
        self.unfinished = len(prompts) * params.n  # samples
        self.error: APIError | None = None
        self.changed = asyncio.Event()  # set when the engine accepts the job, then at each change
        self.engine_ids: list[int] = []  # one per prompt: what the engine calls them
        self.arrived = time.perf_counter()
        self._outputs: list[tuple[int, Output]] = []  # with the number of the prompt
        self._last_output_at: dict[tuple[int, int], float] = {}  # by sample

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
        sample = (prompt, output.index)
        previous = self._last_output_at.get(sample)
        self._last_output_at[sample] = now
        return None if previous is None else now - previous

    def put(self, prompt: int, output: Output) -> None:
        """Store an output for the reader and wake it, if there is something for it to do."""
        self._outputs.append((prompt, output))
        if output.finish_reason is not None:
            self.unfinished -= 1
        if self.stream or not self.unfinished:
            self.changed.set()

    async def next_outputs(self) -> list[tuple[int, Output]]:
        """Wait, and return what is new of a streamed job; of another, everything, once it is done.

        Outputs of the same sample are merged. Raises APIError if the job has failed."""
        while not self._is_readable():
            await self.changed.wait()
            self.changed.clear()
        if self.error:
            raise self.error
        merged: dict[tuple[int, int], Output] = {}
        for prompt, output in self._outputs:
            sample = (prompt, output.index)
            earlier = merged.get(sample)
            merged[sample] = output if earlier is None else earlier + output
        self._outputs = []
        return [(prompt, output) for (prompt, _), output in merged.items()]

    def _is_readable(self) -> bool:
        if self.error or not self.unfinished:
            return True
        return self.stream and self.has_outputs
