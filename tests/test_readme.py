"""What README prints is true: its script runs, its commands and files exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cli
from bench import BENCHES
from config import (
    EvalConfig,
    ExportConfig,
    SampleConfig,
    TrainConfig,
)
from serving.config import ServeConfig
from training.prepare_config import PrepareConfig
from training.presets import TRAIN_PRESETS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CONFIGS = {
    "train": (TrainConfig, TRAIN_PRESETS),
    "sample": (SampleConfig, None),
    "prepare": (PrepareConfig, None),
    "export": (ExportConfig, None),
    "server": (ServeConfig, None),
    "eval_harness": (EvalConfig, None),
}
COMMANDS = re.findall(r"^python (\w+)\.py (.+?)(?: +#.*)?$", README, re.MULTILINE)


def test_the_script_runs_as_printed(tmp_path):
    """Catches a name that a script of a user's imports and that was moved or renamed."""
    script = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    loss, tokens = re.fullmatch(r"loss ([\d.]+), tokens (\[.*\])\n", run.stdout).groups()
    assert 3 < float(loss) < 5 and len(eval(tokens)) == 10


@pytest.mark.parametrize("program, flags", COMMANDS, ids=[p for p, _ in COMMANDS])
def test_the_flags_of_the_commands_exist(program, flags):
    """Catches a command in README whose flag or preset is gone."""
    import shlex

    argv = shlex.split(flags)
    if program == "bench":
        config_class, presets = BENCHES[argv.pop(0)]
    else:
        config_class, presets = CONFIGS[program]
    assert cli.parse(config_class, presets, argv) is not None


def test_the_tree_is_the_tree():
    """Catches a file that README's tree does not name, and one that it names and that is gone."""
    tree = re.search(r"## The tree\n.*?```\n(.*?)```", README, re.DOTALL)[1]
    files = {path.name for path in ROOT.glob("*.py")}
    assert set(re.findall(r"\b\w+\.py\b", tree)) >= files
    named = set(re.findall(r"(?:benchmarks|serving)?/?\b\w+\.py\b", tree))
    existing = {path.name for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    assert {Path(name).name for name in named} <= existing


def test_contributing_names_what_exists():
    """Catches a walk through files or functions that have been renamed."""
    for name in set(re.findall(r"`([\w/]+\.(?:py|txt|html))`", CONTRIBUTING)):
        assert (ROOT / name).exists(), name
    source = "\n".join(
        p.read_text(encoding="utf-8") for p in ROOT.rglob("*.py") if ".venv" not in p.parts
    )
    for name in set(re.findall(r"`(?:[A-Z]\w+\.)?(_?[A-Za-z]\w+)`", CONTRIBUTING)):
        assert re.search(rf"\b{name}\b", source), name
