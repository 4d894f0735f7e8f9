"""What the tests of attention over pages kill: python tests/mutants.py

Applies each mutant below to the source of a file of FILES, runs one test of test_paged_attention.py
on it, prints a table, and exits with 1 if a mutant survives. Start reading at MUTANTS, then at
`survives`.
"""

import contextlib
import io
import sys
import time
import types
from pathlib import Path
from typing import NamedTuple

import jax

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import test_paged_attention as tests  # noqa: E402 - found on the path set above

# Modules to mutate; each may import those before it.
FILES = ("kernels.softmax_sums", "kernels.pallas", "kernels.xla_attention", "paged_attention")


class Mutant(NamedTuple):
    """One fault, planted by replacing all occurrences of `old`, which one file holds, by `new`."""

    implementation: str
    fault: str
    check: str  # the key in CHECKS of the test that should see it
    old: str
    new: str


class Captured(io.StringIO):
    """Stands in for pytest's capsys: the race detector prints."""

    def readouterr(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(out=self.getvalue())


def check_decode(name: str) -> None:
    with contextlib.redirect_stdout(Captured()) as captured:
        tests.test_decode(name, 64, "float32", captured)


def check_prefill(name: str) -> None:
    D = 32 if name == "mosaic_tpu" else 64  # on TPU, several heads side by side
    tests.test_prefill(name, D, "float32")


def check_bits(name: str) -> None:
    tests.test_same_bits(name, 1, 1)


def check_groups(name: str) -> None:
    """Three groups of three, so that axes exchanged by mistake still fit each other.

    In chunks, in which each query of a group has a mask of its own."""
    run_groups(name, is_decode=False)


def check_decode_groups(name: str) -> None:
    run_groups(name, is_decode=True)


def run_groups(name: str, *, is_decode: bool) -> None:
    with contextlib.redirect_stdout(Captured()) as captured:
        tests.test_groups(name, 9, 3, 64, "float32", is_decode, captured)


def check_cache(name: str) -> None:
    tests.test_cache_writes_then_attends(name, "float32")


DECODE, PREFILL, BITS, CACHE = "decode", "prefill", "bits", "cache"
GROUPS, DECODE_GROUPS = "groups", "groups1"
CHECKS = {
    DECODE: check_decode,
    PREFILL: check_prefill,
    BITS: check_bits,
    CACHE: check_cache,
    GROUPS: check_groups,
    DECODE_GROUPS: check_decode_groups,
}

MUTANTS = [
    Mutant(
        "reference", "last token dropped", DECODE, "<= position[..., None]", "< position[..., None]"
    ),
    Mutant(
        "reference",
        "no causal mask in a chunk",
        PREFILL,
        "<= position[..., None]",
        "< (context_lens + new_lens)[:, None, None]",
    ),
    Mutant(
        "reference", "K for V", DECODE, "_gather_rows(v_pages[layer]", "_gather_rows(k_pages[layer]"
    ),
    Mutant("reference", "wrong layer", DECODE, "_pages[layer]", "_pages[0]"),
    Mutant(
        "reference", "heads taken for positions", DECODE, ".swapaxes(2, 3)  # (B, M, P, KV, D)", ""
    ),
    Mutant(
        "reference",
        "stale tail",
        DECODE,
        "v = jnp.where(is_written[..., None, None], v, 0)",
        "v = v",
    ),
    Mutant(
        "reference",
        "padding attends",
        DECODE,
        "jnp.where(is_real[..., None, None, None], y, 0)",
        "y",
    ),
    Mutant("reference", "zero output", DECODE, 'y = dot("bkgts', 'y = 0 * dot("bkgts'),
    Mutant(
        "reference",
        "unscaled scores",
        DECODE,
        "q.astype(jnp.float32), k) * scale",
        "q.astype(jnp.float32), k)",
    ),
    Mutant(
        "reference",
        "scale applied twice",
        DECODE,
        "q.astype(jnp.float32), k) * scale",
        "q.astype(jnp.float32), k) * scale * scale",
    ),
    Mutant(
        "reference",
        "weights not over positions",
        DECODE,
        "scores, -jnp.inf))",
        "scores, -jnp.inf), axis=1)",
    ),
    Mutant(
        "xla",
        "last token dropped",
        DECODE,
        "context_lens[:, None] + token + 1, 0)",
        "context_lens[:, None] + token, 0)",
    ),
    Mutant(
        "xla",
        "null page attended by padding",
        DECODE,
        "context_lens[:, None] + token + 1, 0)",
        "context_lens[:, None] + token + 1, 1)",
    ),
    Mutant(
        "xla",
        "mask off by one",
        DECODE,
        "position < rows_of(batch.length)",
        "position <= rows_of(batch.length)",
    ),
    Mutant(
        "xla",
        "no causal mask in a chunk",
        PREFILL,
        "jnp.repeat(length[order], G, axis=1)",
        "jnp.repeat(jnp.repeat(length.max(1, keepdims=True), T, 1)[order], G, axis=1)",
    ),
    Mutant(
        "xla",
        "K and V swapped",
        DECODE,
        "return k.reshape(rows, KV, -1, D), v.reshape(rows, KV, -1, D)",
        "return v.reshape(rows, KV, -1, D), k.reshape(rows, KV, -1, D)",
    ),
    Mutant(
        "xla",
        "wrong page",
        DECODE,
        "(tables, chunk * count, count",
        "(tables, chunk * count + 1, count",
    ),
    Mutant("xla", "wrong layer", DECODE, "tables=tables + layer * N", "tables=tables"),
    Mutant("xla", "stale tail", DECODE, "v = jnp.where(seen.any(2)[..., None], v, 0)", "v = v"),
    Mutant("xla", "zero output", DECODE, "y = sums.values / ", "y = 0 * sums.values / "),
    Mutant("xla", "unscaled q", DECODE, "swapaxes(1, 2) * scale", "swapaxes(1, 2)"),
    Mutant(
        "xla",
        "scale applied twice",
        DECODE,
        "swapaxes(1, 2) * scale",
        "swapaxes(1, 2) * scale * scale",
    ),
    Mutant(
        "xla",
        "first pages lost",
        DECODE,
        "fori_loop(0, chunks, add_chunk",
        "fori_loop(1, chunks, add_chunk",
    ),
    Mutant("xla", "shortest rows first", DECODE, "descending=True", "descending=False"),
    Mutant("xla", "results in the order of lengths", DECODE, "y[jnp.argsort(order)]", "y"),
    Mutant(
        "xla",
        "a row that reaches further lost",
        DECODE,
        "steps = pl.cdiv(rows, batch.rows_per_step)",
        "steps = rows // batch.rows_per_step",
    ),
    Mutant(
        "xla", "older values not rescaled", DECODE, "before.values * rescale + ", "before.values + "
    ),
    Mutant(
        "xla",
        "order of a sum by batch size",
        BITS,
        "denominator = sum(sums.weights[..., i] for i in range(S))",
        "denominator = sums.weights.sum(-1)",
    ),
    Mutant(
        "xla",
        "padding written to a row's page",
        CACHE,
        "page = jnp.where(is_real, page, 0)",
        "page = page",
    ),
    Mutant(
        "xla",
        "write off by one",
        CACHE,
        "(position % P)[..., None]",
        "((position + 1) % P)[..., None]",
    ),
    Mutant("xla", "lengths advance by T", CACHE, "jnp.minimum(self.new_lens, T)", "T"),
    Mutant(
        "triton",
        "mask off by one",
        DECODE,
        "seen = position < length\n",
        "seen = position <= length\n",
    ),
    Mutant(
        "triton",
        "K and V swapped",
        DECODE,
        "k_ref: Ref,  # (L, N, KV, P, D)\n    v_ref: Ref,",
        "v_ref: Ref,  # (L, N, KV, P, D)\n    k_ref: Ref,",
    ),
    Mutant(
        "triton",
        "another row's page",
        DECODE,
        "tables_ref.at[row, position // P]",
        "tables_ref.at[row - 1, position // P]",
    ),
    Mutant(
        "triton",
        "a split lost",
        DECODE,
        "pl.cdiv(lengths_ref[row], sizes.split)",
        "jnp.maximum(1, lengths_ref[row] // sizes.split)",
    ),
    Mutant(
        "triton",
        "a tile lost",
        DECODE,
        "tiles = pl.cdiv(jnp.minimum(length - start, sizes.split), sizes.tile)",
        "tiles = jnp.minimum(length - start, sizes.split) // sizes.tile",
    ),
    Mutant(
        "triton",
        "partial sums in bfloat16",
        DECODE,
        "split, at_d], sums.values, mask",
        "split, at_d], sums.values.astype(jnp.bfloat16).astype(jnp.float32), mask",
    ),
    Mutant(
        "triton",
        "splits merged at unequal maxima",
        DECODE,
        "later.values * rescale_later[..., None]",
        "later.values",
    ),
    Mutant(
        "triton",
        "scale applied twice",
        PREFILL,
        'dot("qd,pd->qp", q.astype(k.dtype), k) * scale',
        'dot("qd,pd->qp", q.astype(k.dtype), k) * scale * scale',
    ),
    Mutant(
        "triton",
        "causal mask off by one",
        PREFILL,
        "position[None] < length[:, None]",
        "position[None] <= length[:, None]",
    ),
    Mutant(
        "triton",
        "second tile of queries is the first",
        PREFILL,
        "query = pl.program_id(2) * tile_size + ",
        "query = ",
    ),
    Mutant(
        "mosaic_tpu",
        "last token dropped",
        DECODE,
        "seen = (position <= context + token)",
        "seen = (position < context + token)",
    ),
    Mutant(
        "mosaic_tpu",
        "a head's token mistaken",
        PREFILL,
        "token = token_of(first_query + jax.lax.broadcasted_iota(jnp.int32, (1, R, 1), 1))",
        "token = first_query + jax.lax.broadcasted_iota(jnp.int32, (1, R, 1), 1)",
    ),
    Mutant(
        "mosaic_tpu",
        "stale tail",
        DECODE,
        "v = jnp.where(written, v_buffer[half_of(i)], 0)",
        "v = v_buffer[half_of(i)]",
    ),
    Mutant("mosaic_tpu", "half of the buffer mistaken", DECODE, "half = half_of(step)", "half = 0"),
    Mutant("mosaic_tpu", "one half of the buffer for both", DECODE, "return step % 2", "return 0"),
    Mutant("mosaic_tpu", "copies not waited for", DECODE, "        for_each_copy(i, _wait)\n", ""),
    Mutant(
        "mosaic_tpu",
        "last page not copied",
        DECODE,
        "pl.when(page * P < stop)",
        "pl.when(page * P + P < stop)",
    ),
    Mutant("reference", "group's axes exchanged", GROUPS, '"btkgd,bskd->', '"btgkd,bskd->'),
    Mutant(
        "xla",
        "wrong group's head",
        GROUPS,
        "+ jnp.arange(KV)[:, None]",
        "+ jnp.zeros((KV, 1), int)",
    ),
    Mutant(
        "xla",
        "mask of another query",
        GROUPS,
        "jnp.repeat(length[order], G, axis=1)",
        "jnp.tile(length[order], (1, G))",
    ),
    Mutant(
        "xla",
        "group's axes exchanged",
        GROUPS,
        "reshape(B, KV, T, G, D)",
        "reshape(B, KV, T, G, D).swapaxes(1, 3)",
    ),
    Mutant(
        "xla",
        "groups dealt out in turn",
        CACHE,
        "q.reshape(B, T, KV, -1, D)",
        "q.reshape(B, T, -1, KV, D).swapaxes(2, 3)",
    ),
    Mutant(
        "triton",
        "page of the wrong head",
        DECODE_GROUPS,
        "at = layer, page[:, None], head,",
        "at = layer, page[:, None], 0,",
    ),
    Mutant(
        "triton",
        "first query for the whole group",
        DECODE_GROUPS,
        "plgpu.load(q_ref.at[row, head, at_g, at_d]",
        "plgpu.load(q_ref.at[row, head, 0 * at_g, at_d]",
    ),
    Mutant(
        "triton",
        "group and heads exchanged",
        DECODE_GROUPS,
        "plgpu.load(q_ref.at[row, head, at_g, at_d]",
        "plgpu.load(q_ref.at[row, at_g, head, at_d]",
    ),
    Mutant(
        "triton",
        "another query's sums merged",
        DECODE_GROUPS,
        "values_ref.at[row, *head, i, d]",
        "values_ref.at[row, *head[::-1], i, d]",
    ),
    Mutant(
        "triton",
        "mask of another query",
        GROUPS,
        "lengths_ref.at[row, token]",
        "lengths_ref.at[row, query % T]",
    ),
    Mutant(
        "triton",
        "wrong query of the group",
        GROUPS,
        "q = plgpu.load(q_ref.at[query_at]",
        "q = plgpu.load(q_ref.at[row, token[:, None], head, (query + 1)[:, None] % G, d[None]]",
    ),
    Mutant(
        "mosaic_tpu",
        "another token's mask",
        GROUPS,
        "queries_per_token=side_by_side * q.shape[3]",
        "queries_per_token=side_by_side",
    ),
    Mutant(
        "mosaic_tpu",
        "lanes of the wrong head",
        DECODE_GROUPS,
        "jnp.eye(n, dtype=q.dtype)[:, None, :, None]",
        "jnp.eye(n, dtype=q.dtype)[::-1, None, :, None]",
    ),
    Mutant(
        "mosaic_tpu",
        "result for the head beside",
        DECODE_GROUPS,
        '"bhtngnd->bthngd", y)',
        '"bhtngnd->bthngd", y[:, :, :, :, :, ::-1])',
    ),
    Mutant(
        "mosaic_tpu",
        "group's axes exchanged",
        DECODE_GROUPS,
        "q = q.reshape(B, T, pool_heads, n, G, 1, D)",
        "q = q.swapaxes(2, 3).reshape(B, T, pool_heads, n, G, 1, D)",
    ),
]


def mutated(sources: dict[str, str], mutant: Mutant) -> dict[str, str]:
    """Return the sources with the mutant's fault in the one file that holds its old text."""
    holders = [name for name, source in sources.items() if mutant.old in source]
    assert len(holders) == 1, (
        f"{mutant.implementation}, {mutant.fault}: {holders} hold {mutant.old!r}, not one file"
    )
    (name,) = holders
    return {**sources, name: sources[name].replace(mutant.old, mutant.new)}


def survives(sources: dict[str, str], implementation: str, check: str) -> bool:
    """Return whether these sources pass a check."""
    for name, source in sources.items():
        module = types.ModuleType(name)
        sys.modules[name] = module  # where the next file's import finds it
        exec(compile(source, f"mutated {name}.py", "exec"), module.__dict__)
    tests.pa = sys.modules["paged_attention"]
    jax.clear_caches()
    try:
        CHECKS[check](implementation)
    except AssertionError:
        return False
    return True


def main() -> None:
    """Check the sources as they are, then every mutant."""
    sources = {name: (ROOT / (name.replace(".", "/") + ".py")).read_text() for name in FILES}
    all_mutated = [mutated(sources, mutant) for mutant in MUTANTS]
    for implementation, check in dict.fromkeys((m.implementation, m.check) for m in MUTANTS):
        assert survives(sources, implementation, check), (
            f"{implementation} fails {check} without a mutation"
        )
    survivors = 0
    for mutant, mutated_sources in zip(MUTANTS, all_mutated, strict=True):
        start = time.time()
        survived = survives(mutated_sources, mutant.implementation, mutant.check)
        seconds = time.time() - start
        survivors += survived
        verdict = "SURVIVES" if survived else "killed"
        what = f"{mutant.implementation:11}{mutant.fault:38}{mutant.check:8}"
        print(f"{verdict:9}{what}{seconds:5.1f} s", flush=True)
    print(f"{len(MUTANTS) - survivors} of {len(MUTANTS)} killed")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
