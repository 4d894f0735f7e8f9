"""Score a model with lm-evaluation-harness:
python eval_harness.py --init_from=gpt2 --tasks=hellaswag

The harness asks for the probability of continuations of contexts. All requests are packed into
rows that are tries (evaluation/tries.py), so that what several of them share is computed once.

Read JAXNanoGPT._loglikelihood_tokens, then pack in evaluation/tries.py, then score.

Shapes: B rows, T tokens of a row, C n_embd, V padded vocabulary.
"""

import cli
from config import Dtype, EngineConfig, EvalConfig

if __name__ == "__main__":
    cli.run("eval_harness", EvalConfig)

import dataclasses
import json
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import lm_eval
import numpy as np
from flax import nnx
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.tasks import TaskManager
from lm_eval.utils import (
    get_rolling_token_windows,
    handle_non_serializable,
    make_disjoint_window,
    make_table,
)
from tqdm import tqdm

from engine import Engine
from errors import UserError, require
from evaluation.tries import PackedRows, Row, Trie, arrays, pack, row_lengths
from kernels.cpu_kernels import choose_packing
from model import GPT
from sequence import SamplingParams
from utils import open_model, write_atomically

# As many tokens at a time as keep the device busy.
TOKENS_ON_CPU = 1024
TOKENS_ON_ACCELERATOR = 16384
HEAD_CHUNKS = 8  # parts of B T places for which logits, V float32 numbers each, exist at a time

# A request to be scored: its key in lm-eval's cache, if it has one, context and continuation.
TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]


@partial(jax.jit, static_argnums=0)
def score(
    graphdef: nnx.GraphDef, params: Any, rows: PackedRows, count: int
) -> tuple[jax.Array, jax.Array]:
    """Return the log-probability (B T,) float32 of each of the first `count` targets, and
    whether it is the likeliest token (B T,) bool.

    The head is computed for a part of the places at a time, and only for those that are
    scored."""
    model = nnx.merge(graphdef, params)
    x, _ = model.hidden(rows.tokens, Trie.create(rows.depth, rows.end, model.config.dtype))
    x = x.reshape(-1, x.shape[-1])  # (B T, C)
    chunk = -(-rows.places.size // HEAD_CHUNKS)

    def score_chunk(i, out):
        # Where the last chunk would pass the end, slice and update both begin a bit earlier.
        places = jax.lax.dynamic_slice_in_dim(rows.places, i * chunk, chunk)
        targets = jax.lax.dynamic_slice_in_dim(rows.targets, i * chunk, chunk)
        logits = model.logits(x[places][None])[0]  # (chunk, V)
        target_logits = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        logprobs = target_logits - jax.nn.logsumexp(logits, axis=1)
        likeliest = logits.argmax(1) == targets
        return (
            jax.lax.dynamic_update_slice_in_dim(out[0], logprobs, i * chunk, 0),
            jax.lax.dynamic_update_slice_in_dim(out[1], likeliest, i * chunk, 0),
        )

    empty = jnp.zeros(rows.places.size), jnp.zeros(rows.places.size, bool)
    return jax.lax.fori_loop(0, -(-count // chunk), score_chunk, empty)


@register_model("jax-nanogpt")
class JAXNanoGPT(TemplateLM):
    """A GPT as lm-evaluation-harness drives it, also by name:
    simple_evaluate(model="jax-nanogpt", ...)."""

    def __init__(
        self,
        out_dir: str | Path | None = None,
        init_from: str | None = None,
        dtype: Dtype = "float32",
        batch_size: int | str = "auto",
        cpu_kernels: Literal["auto", "off"] = "auto",
        weights: Literal["int8"] | None = None,
    ):
        """lm-eval passes what a user wrote as model_args: paths and numbers may be strings."""
        super().__init__()
        config = EvalConfig(
            out_dir=Path(out_dir) if out_dir else None,
            init_from=init_from,
            dtype=dtype,
            batch_size="auto" if batch_size == "auto" else int(batch_size),
            cpu_kernels=cpu_kernels,
            weights=weights,
        )
        self.model, self.text, self.name = open_model(config)
        self.packing = choose_packing(dtype, weights, cpu_kernels)
        self.engine_config = EngineConfig(cpu_kernels=cpu_kernels, weights=weights)
        self.max_length = self.model.config.block_size
        self.batch_size = config.batch_size

    @cached_property
    def engine(self) -> Engine:
        """The engine that generates. It is made, and compiled, for the first task that asks."""
        return Engine(self.model, self.text, self.engine_config)

    @cached_property
    def scoring_model(self) -> GPT:
        """The model that scores. It is packed for the native CPU kernels, where there are any."""
        if self.packing is None:
            return self.model
        return self.model.for_inference(packing=self.packing)

    @property
    def eot_token_id(self) -> int | None:
        """The end-of-text token, if the tokenizer has one."""
        return self.text.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: as with lm-eval's hf, what begins a document
        or else ends one; a newline, if there is neither."""
        if self.text.bos_id is not None:
            return self.text.bos_id
        if self.eot_token_id is None:
            return self.text.encode("\n")[0]
        return self.eot_token_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        """Return the tokens of a string, as a prompt unless add_special_tokens is False.

        As with lm-eval's hf, models that want a token before a prompt get it."""
        if add_special_tokens is False:
            return self.text.encode(string)
        return self.text.encode_prompt(string)

    def rows_at_a_time(self, T: int) -> int:
        """Return how many rows of T tokens to compute at a time."""
        if self.batch_size != "auto":
            return self.batch_size
        tokens = TOKENS_ON_CPU if jax.default_backend() == "cpu" else TOKENS_ON_ACCELERATOR
        return max(1, tokens // T)

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        """Return of each continuation its log-probability, and whether greedy decoding would
        give it. As in lm-eval, too long a context loses its beginning."""
        sequences = [self._model_input(request) for request in requests]
        targets = [continuation for _, _, continuation in requests]
        logprobs = np.zeros(len(requests))
        greedy = np.ones(len(requests), bool)
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as bar:
            for rows in self._pack(sequences, targets):
                for owners, target_logprobs, likeliest in self._score_rows(rows):
                    np.add.at(logprobs, owners, target_logprobs.astype(np.float64))
                    np.logical_and.at(greedy, owners, likeliest)
                    bar.update(len(set(owners)))
        answers = list(zip(logprobs.tolist(), greedy.tolist(), strict=True))
        for (key, _, _), answer in zip(requests, answers, strict=True):
            if key is not None:  # parts of a rolling request have none
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def _model_input(self, request: TokenRequest) -> list[int]:
        """Return the tokens that the model reads to score a request: all that fit, but the last,
        which is only a target."""
        _, context, continuation = request
        L = self.max_length
        require(
            0 < len(continuation) <= L and len(context) > 0,
            f"a continuation of {len(continuation)} tokens after {len(context)} cannot be scored "
            f"with block_size={L}",
        )
        return (context + continuation)[-L - 1 : -1]

    def _pack(self, sequences: list[list[int]], targets: list[list[int]]) -> Iterator[list[Row]]:
        """Yield the rows of each length that has any; a sequence is in the shortest it fits."""
        shorter = 0
        for T in row_lengths(self.max_length):
            chosen = [i for i, s in enumerate(sequences) if shorter < len(s) <= T]
            if chosen:
                yield pack(chosen, sequences, targets, T)
            shorter = T

    def _score_rows(self, rows: list[Row]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield, for one batch of rows after the other, an entry for each token that is scored:
        its request, its log-probability, and whether it is the likeliest."""
        graphdef, params = nnx.split(self.scoring_model)
        B = min(self.rows_at_a_time(rows[0].length), len(rows))
        for start in range(0, len(rows), B):
            batch = rows[start : start + B]
            owners = np.array([scored.request for row in batch for scored in row.scored])
            count = len(owners)
            logprobs, likeliest = score(graphdef, params, arrays(batch, B), count)
            yield owners, np.asarray(logprobs)[:count], np.asarray(likeliest)[:count]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability of whole texts in lm-eval's windows, each token once."""
        windows: list[TokenRequest] = []
        owners = []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                context, continuation = make_disjoint_window(pair)
                windows.append((None, context, continuation))
                owners.append(i)
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens(windows, disable_tqdm)
        for i, (logprob, _) in zip(owners, answers, strict=True):
            totals[i] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text generated after each context up to the first of its stop strings,
        which is left out."""
        prompts, params = [], []
        for seed, request in enumerate(requests):
            context, gen_kwargs = request.args
            params.append(self._sampling_params(gen_kwargs, seed))
            prompts.append(self._prompt(context, params[-1].max_tokens))
        outputs = self.engine.generate(prompts, params, progress=not disable_tqdm)
        texts = []
        for request, samples, how in zip(requests, outputs, params, strict=True):
            text = postprocess_generated_text(samples[0].text, how.stop, None)
            texts.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _sampling_params(self, gen_kwargs: dict, seed: int) -> SamplingParams:
        """Return what a task's generation_kwargs ask for, with transformers' defaults."""
        kwargs = normalize_gen_kwargs(gen_kwargs, 256)
        max_tokens = kwargs.pop("max_gen_toks")
        end_of_text = None if self.eot_token_id is None else self.text.decode([self.eot_token_id])
        stops = handle_stop_sequences(kwargs.pop("until"), end_of_text)
        do_sample = kwargs.pop("do_sample")
        temperature = kwargs.pop("temperature", 1.0)
        top_k = kwargs.pop("top_k", 50)
        top_p = kwargs.pop("top_p", 1.0)
        require(not kwargs, f"not implemented among the generation_kwargs: {kwargs}")
        require(
            max_tokens < self.max_length,
            f"max_gen_toks={max_tokens} leaves no context in block_size={self.max_length}",
        )
        return SamplingParams(
            max_tokens=max_tokens,
            stop=tuple(stop for stop in stops if stop),
            seed=seed,
            temperature=temperature if do_sample else 0.0,
            top_k=top_k,
            top_p=top_p,
        )

    def _prompt(self, context: str, max_tokens: int) -> list[int]:
        """Return a context that leaves room for max_tokens. As in lm-eval, too long a one loses
        its beginning."""
        room = self.max_length - max_tokens
        return self.tok_encode(context)[-room:] or [self.prefix_token_id]


def load_tasks(names: list[str], include_path: Path | None) -> TaskManager:
    """Return lm-eval's tasks and those in include_path.

    Raises UserError unless all that are named can be loaded."""
    require(
        include_path is None or include_path.is_dir(),
        f"include_path={include_path} is no directory",
        param="include_path",
    )
    manager = TaskManager(include_path=include_path)
    for name in names:
        require(
            name in manager.all_tasks,
            f"there is no task {name!r}: `lm_eval ls tasks` lists those of lm-eval; "
            "--include_path=DIR adds your own",
            param="tasks",
        )
        try:
            manager.load([name])
        except OSError as e:  # no network, or no such file or data set
            raise UserError(
                f"cannot get the data of task {name}: {e}. For a local file, copy the task's "
                "YAML, give it another name, `dataset_path: json` and `dataset_kwargs: "
                "{data_files: {validation: FILE.jsonl}}`, and pass its directory as "
                "--include_path",
                param="tasks",
            ) from e
    return manager


def write_results(path: Path, results: dict, config: EvalConfig) -> None:
    """Write lm-eval's results, samples and all, and the config that they belong to."""
    results["config"]["model_args"] = dataclasses.asdict(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(results, indent=2, default=handle_non_serializable))


def main(config: EvalConfig) -> None:
    """Score the model on all tasks, write the results if asked for, and print their table."""
    names = config.tasks.split(",")
    manager = load_tasks(names, config.include_path)
    lm = JAXNanoGPT(
        config.out_dir,
        config.init_from,
        config.dtype,
        config.batch_size,
        config.cpu_kernels,
        config.weights,
    )
    results = lm_eval.simple_evaluate(
        lm,
        tasks=names,
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        task_manager=manager,
        batch_size=config.batch_size,
    )
    if config.output_path:
        write_results(config.output_path, results, config)
    print(f"{lm.name}, {config.dtype}")
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
