"""Score a model with lm-evaluation-harness: python eval_harness.py --init_from=gpt2 --tasks=hellaswag

The harness asks for the probability of continuations of contexts. Here all requests are sorted as token
sequences and packed into rows that are tries: a beginning that several requests share (the context of four
endings, the examples of a few-shot task) is computed once. The model sees a trie as a cache of an unusual
kind (Trie, below).
"""

import cli
from config import EvalConfig

if __name__ == "__main__":
    cli.run("eval_harness", EvalConfig)

import dataclasses
import json
from functools import cached_property, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import lm_eval
import numpy as np
from flax import nnx
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
from errors import require
from ops import einsum
from sequence import SamplingParams
from utils import open_model, write_atomically


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trie:
    """Takes a cache's place in GPT.hidden where rows hold tries in depth-first order; keeps nothing."""

    depth: jax.Array  # (B, T) int32, the position of each token in its sequence
    visible: (
        jax.Array
    )  # (B, T, T) bool: [b, t, s] is whether token t sees s: whether s is on its path
    dtype: str = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def create(cls, depth: jax.Array, end: jax.Array, dtype: str) -> "Trie":
        """depth, end (B, T) int32: the tokens that continue token s are those from s + 1 to end[s] - 1."""
        t = jnp.arange(depth.shape[1])[:, None]
        return cls(depth, (t >= t.T) & (t < end[:, None, :]), dtype)

    def positions(self, T: int) -> jax.Array:
        return self.depth

    def attend(self, layer, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, "Trie"]:
        """Each token attends to its path. q, k, v (B, T, H, D); returns (B, T, H, D) float32."""
        q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))  # (B, H, T, D)
        scores = jnp.where(
            self.visible[:, None], einsum("bhtd,bhsd->bhts", q, k, self.dtype), -jnp.inf
        )
        return einsum("bhts,bhsd->bhtd", jax.nn.softmax(scores), v, self.dtype).swapaxes(1, 2), self

    def advance(self, T: int) -> "Trie":
        return self


class Row:
    """A row of T tokens that is being packed: what it holds and what is to be scored in it."""

    def __init__(self, T: int):
        self.T = T
        self.tokens, self.depth, self.end = [], [], []
        self.path = []  # indices in the row of the tokens of the last sequence
        self.scored = []  # (request, index in the row, the token that shall follow there)

    def add(self, request: int, sequence: list[int], targets: list[int]) -> bool:
        """Add a sequence and score the targets that follow its last tokens; False, and no change, if it is
        too long for the row."""
        shared = 0
        for at, token in zip(self.path, sequence):
            if self.tokens[at] != token:
                break
            shared += 1
        if max(len(self.tokens) + len(sequence) - shared, len(self.scored) + len(targets)) > self.T:
            return False
        self.close(shared)
        for depth, token in enumerate(sequence[shared:], shared):
            self.path.append(len(self.tokens))
            self.tokens.append(token)
            self.depth.append(depth)
            self.end.append(None)
        self.scored += [
            (request, at, target) for at, target in zip(self.path[-len(targets) :], targets)
        ]
        return True

    def close(self, depth: int = 0) -> None:
        """No more tokens will continue those of the path below depth."""
        for at in self.path[depth:]:
            self.end[at] = len(self.tokens)
        del self.path[depth:]


def pack(sequences: list[list[int]], targets: list[list[int]], T: int) -> list[Row]:
    """Rows of T tokens with all sequences. Neighbours in sorted order share the most."""
    rows = [Row(T)]
    for i in sorted(range(len(sequences)), key=sequences.__getitem__):
        if not rows[-1].add(i, sequences[i], targets[i]):
            rows[-1].close()
            rows.append(Row(T))
            fits = rows[-1].add(i, sequences[i], targets[i])
            assert fits, f"{len(sequences[i])} tokens do not fit a row of {T}"
    rows[-1].close()
    return rows


def arrays(rows: list[Row], B: int) -> tuple[np.ndarray, ...]:
    """What `score` takes of rows, filled up to B: tokens, depth, end (B, T), at, targets (B T,), all int32. A
    token that fills up a row sees only itself."""
    T = rows[0].T
    tokens, depth = np.zeros((2, B, T), np.int32)
    end = np.tile(np.arange(1, T + 1, dtype=np.int32), (B, 1))
    at, targets = np.zeros((2, B * T), np.int32)
    for b, row in enumerate(rows):
        n = len(row.tokens)
        tokens[b, :n], depth[b, :n], end[b, :n] = row.tokens, row.depth, row.end
    scored = [
        (b * T + index, target) for b, row in enumerate(rows) for _, index, target in row.scored
    ]
    at[: len(scored)], targets[: len(scored)] = zip(*scored)
    return tokens, depth, end, at, targets


@partial(jax.jit, static_argnums=0)
def score(graphdef, params, tokens, depth, end, at, targets, count):
    """Log-probability (B T,) float32, and whether it is the likeliest, of each of the first `count` targets.

    tokens, depth, end (B, T): tries. at, targets (B T,): indices into the B T tokens, and the tokens that
    follow there. The head is computed for an eighth of B T places at a time, and only for those that are
    scored."""
    model = nnx.merge(graphdef, params)
    x, _ = model.hidden(tokens, Trie.create(depth, end, model.config.dtype))
    x = x.reshape(-1, x.shape[-1])  # (B T, C)
    chunk = -(-at.size // 8)

    def score_chunk(i, out):
        part = lambda a: jax.lax.dynamic_slice_in_dim(a, i * chunk, chunk)
        logits = model.logits(x[part(at)][None])[0]  # (chunk, V)
        target = jnp.take_along_axis(logits, part(targets)[:, None], axis=1)[:, 0]
        new = target - jax.nn.logsumexp(logits, axis=1), logits.argmax(1) == part(targets)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(a, b, i * chunk, 0) for a, b in zip(out, new)
        )

    empty = jnp.zeros(at.size), jnp.zeros(at.size, bool)
    return jax.lax.fori_loop(0, -(-count // chunk), score_chunk, empty)


@register_model("jax-nanogpt")
class JAXNanoGPT(TemplateLM):
    """A GPT as lm-evaluation-harness drives it, also by name: simple_evaluate(model="jax-nanogpt", ...)."""

    def __init__(
        self,
        out_dir: str | None = None,
        init_from: str | None = None,
        dtype: str = "float32",
        batch_size: int | str = "auto",
    ):
        super().__init__()
        config = EvalConfig(
            out_dir=out_dir, init_from=init_from, dtype=dtype, batch_size=batch_size
        )
        self.model, self.text, self.name = open_model(config)
        self.max_length = self.model.config.block_size
        self.batch_size = config.batch_size

    @cached_property
    def engine(self) -> Engine:
        return Engine(self.model, self.text)

    @property
    def eot_token_id(self) -> int | None:
        return self.text.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the end of another or, if there is no such token, a
        newline."""
        return self.tok_encode("\n")[0] if self.eot_token_id is None else self.eot_token_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        return self.text.encode(string)  # GPT-2 adds no special tokens

    def rows(self, T: int) -> int:
        """How many rows of T tokens to compute at a time. auto: as many tokens as keep the device busy."""
        if self.batch_size != "auto":
            return self.batch_size
        return max(1, (1024 if jax.default_backend() == "cpu" else 16384) // T)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs,
    ) -> list[tuple[float, bool]]:
        """(log-probability, would greedy decoding give it) of each continuation; requests: (cache key,
        context, continuation). As in lm-eval, too long a context loses its beginning."""
        L = self.max_length
        for _, context, continuation in requests:
            require(
                0 < len(continuation) <= L and len(context) > 0,
                f"a continuation of {len(continuation)} "
                f"tokens after {len(context)} cannot be scored with block_size={L}",
            )
        # The last token is only a target.
        sequences = [(context + continuation)[-L - 1 : -1] for _, context, continuation in requests]
        graphdef, params = nnx.split(self.model)
        logprob, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
        bar = tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm)
        sizes = sorted({min(L, 512 << i) for i in range(20)})
        for low, T in zip([0] + sizes, sizes):
            chosen = [i for i, s in enumerate(sequences) if low < len(s) <= T]
            rows = (
                pack([sequences[i] for i in chosen], [requests[i][2] for i in chosen], T)
                if chosen
                else []
            )
            B = min(self.rows(T), len(rows))
            for start in range(0, len(rows), B or 1):
                batch = rows[start : start + B]
                owners = np.array([chosen[i] for row in batch for i, _, _ in row.scored])
                got = score(graphdef, params, *arrays(batch, B), len(owners))
                new, likeliest = (np.asarray(a)[: len(owners)] for a in got)
                np.add.at(logprob, owners, new.astype(np.float64))
                np.logical_and.at(greedy, owners, likeliest)
                bar.update(len(set(owners)))
        bar.close()
        answers = [(float(p), bool(g)) for p, g in zip(logprob, greedy)]
        for (key, _, _), answer in zip(requests, answers):
            if key is not None:  # parts of a rolling request have none
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts in lm-eval's windows, each token once."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm)):
            totals[i] += logprob
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Text generated after each context up to the first of its stop strings, which is left out."""
        prompts, params = zip(
            *(self.generation(*request.args, seed) for seed, request in enumerate(requests))
        )
        outputs = self.engine.generate(prompts, list(params), progress=not disable_tqdm)
        texts = [
            postprocess_generated_text(output.text, p.stop, None)
            for (output,), p in zip(outputs, params)
        ]
        for request, text in zip(requests, texts):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def generation(
        self, context: str, gen_kwargs: dict, seed: int
    ) -> tuple[list[int], SamplingParams]:
        """What the engine is asked for. As in lm-eval, too long a context loses its beginning."""
        kwargs = normalize_gen_kwargs(gen_kwargs, 256)
        n, eos = kwargs.pop("max_gen_toks"), self.eot_token_id
        stops = handle_stop_sequences(
            kwargs.pop("until"), None if eos is None else self.text.decode([eos])
        )
        how = {
            "temperature": kwargs.pop("temperature", 1.0) if kwargs.pop("do_sample") else 0.0,
            "top_k": kwargs.pop("top_k", 50),
            "top_p": kwargs.pop("top_p", 1.0),
        }  # transformers' defaults
        require(not kwargs, f"not implemented among the generation_kwargs: {kwargs}")
        require(
            n < self.max_length,
            f"max_gen_toks={n} leaves no context in block_size={self.max_length}",
        )
        prompt = self.tok_encode(context)[n - self.max_length :] or [self.prefix_token_id]
        return prompt, SamplingParams(
            max_tokens=n, stop=tuple(filter(None, stops)), seed=seed, **how
        )


def load_tasks(names: list[str], include_path: Path | None) -> TaskManager:
    """lm-eval's tasks and those in include_path. Raises ValueError unless all that are named can be
    loaded."""
    require(
        include_path is None or include_path.is_dir(),
        f"include_path={include_path} is no directory",
    )
    manager = TaskManager(include_path=include_path)
    for name in names:
        require(
            name in manager.all_tasks,
            f"there is no task {name!r}: `lm_eval ls tasks` lists those of "
            "lm-eval; --include_path=DIR adds your own",
        )
        try:
            manager.load([name])
        except OSError as e:  # no network, or no such file or data set
            raise ValueError(
                f"cannot get the data of task {name}: {e}. For a local file, copy the task's YAML, give it another"
                " name, `dataset_path: json` and `dataset_kwargs: {data_files: {validation: FILE.jsonl}}`, and pass"
                " its directory as --include_path"
            ) from e
    return manager


def main(config: EvalConfig) -> None:
    names = config.tasks.split(",")
    manager = load_tasks(names, config.include_path)
    lm = JAXNanoGPT(config.out_dir, config.init_from, config.dtype, config.batch_size)
    results = lm_eval.simple_evaluate(
        lm,
        tasks=names,
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        task_manager=manager,
        batch_size=config.batch_size,
    )
    if config.output_path:
        results["config"]["model_args"] = dataclasses.asdict(config)
        config.output_path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(
            config.output_path, json.dumps(results, indent=2, default=handle_non_serializable)
        )
    print(f"{lm.name}, {config.dtype}")
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
