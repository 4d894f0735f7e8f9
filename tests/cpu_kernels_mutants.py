"""What the tests of the native CPU kernels kill: python tests/cpu_kernels_mutants.py

Plants each fault below in the C++ source, builds that, runs one test of test_cpu_kernels.py on it,
prints a table, and exits with 1 if a mutant survives. Start reading at MUTANTS.
"""

import os
import sys
import tempfile
import time
import types
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import test_cpu_kernels as tests  # noqa: E402 - found on the path set above
from kernels import cpu_kernels as ck  # noqa: E402

FILES = (ck.SOURCE.name, *ck.HEADERS)
GQA = {"H": 9, "KV": 3, "D": 64, "P": 16, "dtype": "bfloat16"}


class Mutant(NamedTuple):
    """One fault, planted by replacing `old`, which one file holds once, by `new`."""

    fault: str
    check: str  # the key in CHECKS of the test that should see it
    old: str
    new: str


def check_row_bits(kind: str) -> None:
    request = types.SimpleNamespace(node=types.SimpleNamespace(name="other"))
    tests.test_rows_have_the_same_bits(None, kind, request)


CHECKS = {
    "float32": partial(tests.test_product, None, "float32"),
    "bfloat16": partial(tests.test_product, None, "bfloat16"),
    "int8": partial(tests.test_product, None, "int8"),
    "row bits": partial(check_row_bits, "float32"),
    "bad row": partial(tests.test_a_bad_row_is_seen_and_stays_alone, None, "float32", float("nan")),
    "gelu": partial(tests.test_gelu_new, None),
    "attention": partial(tests.test_attention, None, GQA),
    "token bits": partial(tests.test_tokens_have_the_same_bits, None),
    "logits": partial(tests.test_rows_of_logits, None, 65),
    "later token": partial(tests.test_a_later_token_changes_nothing, None),
}

MUTANTS = [
    Mutant(
        "slabs backwards for odd rows",
        "row bits",
        "for (int64_t slab = 0; slab < p.slabs; slab++) {\n    int64_t w",
        "for (int64_t i = 0; i < p.slabs; i++) {\n"
        "    int64_t slab = ROWS % 2 ? i : p.slabs - 1 - i;\n    int64_t w",
    ),
    Mutant(
        "a row of each block lost",
        "float32",
        "r < ROWS; r++) {\n      sums",
        "r < ROWS - 1; r++) {\n      sums",
    ),
    Mutant(
        "bias of the first panel",
        "float32",
        "load<Floats>(p.bias + column)",
        "load<Floats>(p.bias + column % PANEL)",
    ),
    Mutant("inputs past the row's end", "bad row", "k < depth; k++", "k < Kind::DEPTH; k++"),
    Mutant(
        "pairs swapped",
        "bfloat16",
        "words[k] = to_bfloat16(x[2 * k]) | uint32_t(to_bfloat16(x[2 * k + 1])) << 16",
        "words[k] = to_bfloat16(x[2 * k + 1]) | uint32_t(to_bfloat16(x[2 * k])) << 16",
    ),
    Mutant(
        "bfloat16 cut off",
        "bfloat16",
        "(bits + 0x7fff + (bits >> 16 & 1)) >> 16",
        "bits >> 16",
    ),
    Mutant("scales of the first columns", "int8", "p.scales + w + i % 2 * LANES", "p.scales + w"),
    Mutant("the first slab's scale", "int8", "x_scales[slab * ROWS + i / 2]", "x_scales[i / 2]"),
    Mutant("sums of slabs not cleared", "int8", "      sum = typename Kind::Sums{};\n", ""),
    Mutant("coefficient of e^x", "gelu", "4.1665795894e-2f", "4.1e-2f"),
    Mutant(
        "no causal mask",
        "attention",
        "return seen + i % a_head / a.G;",
        "return stop;",
    ),
    Mutant(
        "padding written", "attention", "if (t >= a.real_tokens(b)) return;", "if (b < 0) return;"
    ),
    Mutant(
        "K for V", "attention", "a.v + i * a.KV * a.D, a.v_pages", "a.k + i * a.KV * a.D, a.v_pages"
    ),
    Mutant("wrong layer", "attention", "layer * N + tables", "0 * N + tables"),
    Mutant(
        "another row's pages", "attention", "tables[b * M + position / P];", "tables[position / P];"
    ),
    Mutant(
        "heads of queries interleaved",
        "attention",
        "* a.KV + head) * a.G + i % a.G) * a.D;",
        "* a.G + i % a.G) * a.KV + head) * a.D;",
    ),
    Mutant(
        "weights past the end",
        "attention",
        "  std::fill_n(scores + n, -n & (LANES - 1), -INFINITY);\n",
        "",
    ),
    Mutant(
        "maximum over tokens not seen",
        "token bits",
        "std::max_element(scores, scores + n)",
        "std::max_element(scores, scores + (n + LANES - 1) / LANES * LANES)",
    ),
    Mutant(
        "values of later tokens times 0",
        "later token",
        "std::clamp<int64_t>(visible(i) - start, 0, LANES)",
        "std::min<int64_t>(stop - start, LANES)",
    ),
    Mutant(
        "the first head's pages",
        "attention",
        "head * head_numbers * number_bytes",
        "0 * head_numbers * number_bytes",
    ),
    Mutant("a part's last head lost", "attention", "(part + 1) / parts -", "part / parts + 1 -"),
    Mutant("exponents not shifted", "logits", "n, -INFINITY) - shift)", "n, -INFINITY) - 0)"),
    Mutant("the last columns lost", "logits", "if (start < n) std", "if (start + LANES < n) std"),
]
if "amx_bf16" in ck.cpu_model():
    MUTANTS += [
        Mutant("the left columns twice", "bfloat16", "ps(1, 4, 7)", "ps(1, 4, 6)"),
        Mutant("the upper rows twice", "bfloat16", "inputs + TILE_ROWS * SLAB", "inputs"),
        Mutant("half of a slab twice", "bfloat16", " + half % 2 * HALF", ""),
        Mutant("sums of the block before", "bfloat16", "_tile_zero(3);", ""),
    ]


def plant(mutant: Mutant, directory: Path) -> Path:
    """Write the sources with the fault into a directory; return the path of the first."""
    sources = {name: (ck.SOURCE.parent / name).read_text() for name in FILES}
    holders = [name for name, source in sources.items() if source.count(mutant.old) == 1]
    assert len(holders) == 1, f"{mutant.fault}: {holders} hold {mutant.old!r} once, not one file"
    sources[holders[0]] = sources[holders[0]].replace(mutant.old, mutant.new)
    for name, source in sources.items():
        (directory / name).write_text(source)
    return directory / FILES[0]


def survives(library: ck.Library, check: str) -> bool:
    """Return whether a build passes a check."""
    ck.library = lambda: library
    try:
        CHECKS[check]()
    except AssertionError:
        return False
    return True


def main() -> None:
    """Check the sources as they are, then every mutant."""
    library = ck.library()
    for check in CHECKS:
        assert survives(library, check), f"{check} fails without a mutation"
    survivors = 0
    with tempfile.TemporaryDirectory() as directory:
        os.environ["XDG_CACHE_HOME"] = directory
        for mutant in MUTANTS:
            start = time.time()
            survived = survives(
                ck.build_and_load(plant(mutant, Path(directory)), "-O1"), mutant.check
            )
            survivors += survived
            verdict = "SURVIVES" if survived else "killed"
            seconds = time.time() - start
            print(f"{verdict:9}{mutant.fault:32}{mutant.check:12}{seconds:5.1f} s", flush=True)
    print(f"{len(MUTANTS) - survivors} of {len(MUTANTS)} killed")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
