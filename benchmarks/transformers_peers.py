"""Hugging Face transformers as a contender of `bench.py generate`, with random weights.

A unit of work is the whole job.
"""

from benchmarks.contender import Contender
from benchmarks.workload import Request, padded_batches
from config import GPTConfig


def random_gpt2(config: GPTConfig):
    """Return transformers' GPT-2 of that shape, on a GPU if there is one. It never ends early."""
    import torch
    import transformers

    shape = transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
    )
    model = transformers.GPT2LMHeadModel(shape).to(getattr(torch, config.dtype)).eval()
    model.config.eos_token_id = None
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


class TransformersPadded(Contender):
    """transformers' generate on left-padded batches."""

    def __init__(self, config: GPTConfig, requests: list[Request], batch_size: int):
        self.batches = padded_batches(requests, batch_size)
        self.model = random_gpt2(config)

    def warm_up(self) -> None:
        """Generate a few tokens. Nothing compiles here; memory is allocated."""
        self._generate(self.batches[0].prompts, 4)

    def run(self, n: int) -> None:
        """Do the job n times."""
        for prompts, longest_output in self.batches * n:
            self._generate(prompts, longest_output)

    def _generate(self, prompts: list[list[int]], output_tokens: int) -> None:
        import torch

        T = max(map(len, prompts))
        padding = [T - len(prompt) for prompt in prompts]
        rows = zip(padding, prompts, strict=True)
        tokens = [[0] * pad + prompt for pad, prompt in rows]
        mask = [[0] * pad + [1] * (T - pad) for pad in padding]
        output = self.model.generate(
            torch.tensor(tokens, device=self.model.device),
            attention_mask=torch.tensor(mask, device=self.model.device),
            do_sample=False,
            max_new_tokens=output_tokens,
        )
        assert output.shape[1] == T + output_tokens, (
            f"transformers made {output.shape[1] - T} tokens instead of {output_tokens}"
        )


class TransformersContinuous(Contender):
    """transformers' own continuous batching, with pages for all requests at once."""

    def __init__(self, config: GPTConfig, requests: list[Request]):
        from transformers import ContinuousBatchingConfig

        self.requests = requests
        self.model = random_gpt2(config)
        page_size = 256
        pages = sum(-(-(len(r.prompt) + r.output_tokens) // page_size) for r in requests)
        self.settings = ContinuousBatchingConfig(
            page_size=page_size,
            num_blocks=pages + 1,
            # In a step all requests may decode, and half a page of prompt may be read.
            max_batch_tokens=len(requests) + page_size // 2,
        )

    def warm_up(self) -> None:
        """Generate a few tokens for two of the prompts."""
        self._generate([Request(r.prompt, 4) for r in self.requests[:2]])

    def run(self, n: int) -> None:
        """Do the job n times."""
        for _ in range(n):
            self._generate(self.requests)

    def _generate(self, requests: list[Request]) -> None:
        batching = self.model.continuous_batching_context_manager(
            continuous_batching_config=self.settings
        )
        with batching as manager:
            for prompt, output_tokens in requests:
                manager.add_request(prompt, max_new_tokens=output_tokens)
            for _ in requests:
                result = manager.get_result()
                assert result is not None, "continuous batching ended before its requests did"
                assert not result.error, f"continuous batching: {result.error}"
