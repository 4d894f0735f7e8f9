"""What the tests of structured output kill: python tests/structured_mutants.py

Plants each mutant below in a copy of the sources, runs one test of test_structured.py on it, prints
a table, and exits with 1 if a mutant survives. Start reading at MUTANTS.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".*", "out*", "__pycache__", "data", "docs")


class Mutant(NamedTuple):
    """One fault, planted in a file by replacing `old`, which it holds once, by `new`."""

    fault: str
    check: str
    file: str
    old: str
    new: str


MUTANTS = (
    Mutant(
        "mask off by one position",
        "test_complete_answers_fit_their_schemas",
        "scheduler.py",
        "seq.state is State.RUNNING and not seq.awaits_token",
        "seq.state is State.RUNNING",
    ),
    Mutant(
        "mask of a neighbour's row",
        "test_the_same_bits",
        "structured/masks.py",
        "slot[i] = seq.occupied_slot",
        "slot[i] = seqs[i - 1].occupied_slot",
    ),
    Mutant(
        "end of text allowed too early",
        "test_the_end_of_text_comes_where_the_text_is_complete",
        "structured/grammar.py",
        "        if accepts:\n",
        "        if True:\n",
    ),
    Mutant(
        "matcher not advanced after preemption",
        "test_preempted",
        "engine.py",
        "    if seq.matcher is not None:\n",
        "    if seq.matcher is not None and seq.state.name != 'PREEMPTED':\n",
    ),
)


def survives(mutant: Mutant | None, check: str) -> bool:
    """Return whether the sources, with this mutant, pass a test."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "sources"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        if mutant is not None:
            file = copy / mutant.file
            source = file.read_text(encoding="utf-8")
            assert source.count(mutant.old) == 1, f"{mutant.file} does not hold {mutant.old!r} once"
            file.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
        test = f"tests/test_structured.py::{check}"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
        return subprocess.run(command, cwd=copy, capture_output=True).returncode == 0


def main() -> None:
    """Check the sources as they are, then every mutant."""
    for check in dict.fromkeys(mutant.check for mutant in MUTANTS):
        assert survives(None, check), f"{check} fails without a mutation"
    survivors = 0
    for mutant in MUTANTS:
        start = time.time()
        survived = survives(mutant, mutant.check)
        survivors += survived
        verdict = "SURVIVES" if survived else "killed"
        seconds = time.time() - start
        print(f"{verdict:9}{mutant.fault:40}{mutant.check:58}{seconds:5.1f} s", flush=True)
    print(f"{len(MUTANTS) - survivors} of {len(MUTANTS)} killed")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
