"""What the suite of paged_attention.py kills: python tests/mutants.py applies each mutant below to the source, runs a few
tests of test_paged_attention.py on it until one fails, prints a table, and exits 1 if a mutant survives."""

import contextlib
import io
import sys
import time
import types
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import jax  # noqa: E402
import test_paged_attention as tests  # noqa: E402


class Captured(io.StringIO):
    """Stands in for pytest's capsys: the race detector prints."""

    def readouterr(self):
        return types.SimpleNamespace(out=self.getvalue())


def decode(name):
    with contextlib.redirect_stdout(Captured()) as captured:
        tests.test_decode(name, 64, "float32", captured)


DECODE, PREFILL, BITS, CACHE = "decode", "prefill", "bits", "cache"
CHECKS = {
    DECODE: decode,
    PREFILL: lambda name: tests.test_prefill(name, 32 if name == "mosaic_tpu" else 64, "float32"),
    BITS: lambda name: tests.test_same_bits(name, 1),
    CACHE: lambda name: tests.test_cache_writes_then_attends("float32"),
}

# implementation, what is broken, check that should see it, source (all of its occurrences), mutated source
MUTANTS = [
    (
        "reference",
        "last token dropped",
        DECODE,
        "context_lens[:, None] + t + 1, 0)",
        "context_lens[:, None] + t, 0)",
    ),
    (
        "reference",
        "null page attended by padding",
        DECODE,
        "context_lens[:, None] + t + 1, 0)",
        "context_lens[:, None] + t + 1, 1)",
    ),
    ("reference", "mask off by one", DECODE, "position < rows(length)", "position <= rows(length)"),
    (
        "reference",
        "no causal mask in a chunk",
        PREFILL,
        "length = length[order, None, :, None]",
        "length = length.max(1, keepdims=True)[order, None, :, None]",
    ),
    (
        "reference",
        "K and V swapped",
        DECODE,
        "for pool in (k_pages, v_pages)]",
        "for pool in (v_pages, k_pages)]",
    ),
    ("reference", "wrong page", DECODE, "(rows(tables), i * G, G", "(rows(tables), i * G + 1, G"),
    ("reference", "wrong layer", DECODE, " + layer * N\n", "\n"),
    ("reference", "stale tail", DECODE, "v = jnp.where(seen.any(2)[..., None], v, 0)", "v = v"),
    ("reference", "zero output", DECODE, "y = y / ", "y = 0 * y / "),
    ("reference", "unscaled q", DECODE, "swapaxes(1, 2) * scale", "swapaxes(1, 2)"),
    (
        "reference",
        "scale applied twice",
        DECODE,
        "swapaxes(1, 2) * scale",
        "swapaxes(1, 2) * scale * scale",
    ),
    (
        "reference",
        "first pages lost",
        DECODE,
        "fori_loop(0, pl.cdiv(longest[0]",
        "fori_loop(1, pl.cdiv(longest[0]",
    ),
    ("reference", "shortest rows first", DECODE, "descending=True", "descending=False"),
    ("reference", "results in the order of lengths", DECODE, "y[jnp.argsort(order)]", "y"),
    (
        "reference",
        "a row that reaches further lost",
        DECODE,
        "pl.cdiv((longest > i * G * P).sum(), R)",
        "(longest > i * G * P).sum() // R",
    ),
    ("reference", "older values not rescaled", DECODE, "y * a + dot(", "y + dot("),
    (
        "reference",
        "order of a sum by batch size",
        BITS,
        "l = sum(l[..., p] for p in range(G * P))",
        "l = l.sum(-1)",
    ),
    (
        "reference",
        "padding written to a row's page",
        CACHE,
        "page = jnp.where(jnp.arange(T) < self.new_lens[:, None], page, 0)",
        "page = page",
    ),
    ("reference", "write off by one", CACHE, "(pos % P)[..., None]", "((pos + 1) % P)[..., None]"),
    ("reference", "lengths advance by T", CACHE, "jnp.minimum(self.new_lens, T)", "T"),
    ("triton", "mask off by one", DECODE, "seen = pos < length\n", "seen = pos <= length\n"),
    (
        "triton",
        "K and V swapped",
        DECODE,
        "for ref in (k_ref, v_ref)]  # (TILE, d)",
        "for ref in (v_ref, k_ref)]",
    ),
    (
        "triton",
        "another row's page",
        DECODE,
        "tables_ref.at[b, pos // P]",
        "tables_ref.at[b - 1, pos // P]",
    ),
    (
        "triton",
        "a split lost",
        DECODE,
        "pl.cdiv(lengths_ref[b], SPLIT)",
        "jnp.maximum(1, lengths_ref[b] // SPLIT)",
    ),
    (
        "triton",
        "a tile lost",
        DECODE,
        "tiles = pl.cdiv(jnp.minimum(length - start, SPLIT), TILE)",
        "tiles = jnp.minimum(length - start, SPLIT) // TILE",
    ),
    (
        "triton",
        "partial sums in bfloat16",
        DECODE,
        "split, d], acc, mask",
        "split, d], acc.astype(jnp.bfloat16).astype(jnp.float32), mask",
    ),
    ("triton", "splits merged at unequal maxima", DECODE, "acc * b[..., None]", "acc"),
    (
        "triton",
        "scale applied twice",
        PREFILL,
        's = dot("td,pd->tp", q, k) * scale',
        's = dot("td,pd->tp", q, k) * scale * scale',
    ),
    (
        "triton",
        "causal mask off by one",
        PREFILL,
        "pos[None] < length[:, None]",
        "pos[None] <= length[:, None]",
    ),
    (
        "triton",
        "second tile of queries is the first",
        PREFILL,
        "t, d = pl.program_id(2) * tile_size + ",
        "t, d = ",
    ),
    (
        "mosaic_tpu",
        "last token dropped",
        DECODE,
        "seen = (pos <= context + t)",
        "seen = (pos < context + t)",
    ),
    (
        "mosaic_tpu",
        "a head's token mistaken",
        PREFILL,
        "t = token(first + jax.lax.broadcasted_iota(jnp.int32, (1, R, 1), 1))",
        "t = first + jax.lax.broadcasted_iota(jnp.int32, (1, R, 1), 1)",
    ),
    (
        "mosaic_tpu",
        "stale tail",
        DECODE,
        "v = jnp.where(written, v_buf[i % 2], 0)",
        "v = v_buf[i % 2]",
    ),
    ("mosaic_tpu", "half of the buffer mistaken", DECODE, "half = step % 2", "half = 0"),
    ("mosaic_tpu", "one half of the buffer for both", DECODE, " % 2", " * 0"),
    (
        "mosaic_tpu",
        "copies not waited for",
        DECODE,
        "        copies(i, lambda copy: copy.wait())\n",
        "",
    ),
    (
        "mosaic_tpu",
        "last page not copied",
        DECODE,
        "@pl.when(page * P < stop)",
        "@pl.when(page * P + P < stop)",
    ),
]


def survives(source: str, name: str, check: str) -> bool:
    module = types.ModuleType("paged_attention")
    sys.modules["paged_attention"] = module
    exec(compile(source, "mutated paged_attention.py", "exec"), module.__dict__)
    tests.pa = module
    jax.clear_caches()
    try:
        CHECKS[check](name)
    except AssertionError:
        return False
    return True


def main():
    source = (ROOT / "paged_attention.py").read_text()
    alive = []
    for name, check in dict.fromkeys((name, check) for name, _, check, _, _ in MUTANTS):
        assert survives(source, name, check), f"{name} fails {check} without a mutation"
    for name, what, check, old, new in MUTANTS:
        assert old in source, f"{what}: the source no longer holds {old!r}"
        start, survived = time.time(), survives(source.replace(old, new), name, check)
        alive += [what] * survived
        print(
            f"{'SURVIVES' if survived else 'killed':9}{name:11}{what:38}{check:8}{time.time() - start:5.1f} s",
            flush=True,
        )
    print(f"{len(MUTANTS) - len(alive)} of {len(MUTANTS)} killed")
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
