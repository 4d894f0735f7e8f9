"""Measure, in one run, against peers: python bench.py COMMAND [--key=value ...]

Contenders run in processes of their own and take turns, so that a machine whose speed drifts is
fair to all; medians count. The last line printed is one JSON object. Its `ratio` is ours over the
best peer: above 1, ours is faster.

Each command is a file of benchmarks/, which holds its flags and what it measures.
"""

import json
from collections.abc import Callable
from typing import Any

import cli
from benchmarks.checkpoints import BenchCheckpointConfig, bench_checkpoint
from benchmarks.evaluation import BenchEvalConfig, bench_eval
from benchmarks.generation import BenchGenerateConfig, bench_generate
from benchmarks.kernels import BenchKernelConfig, bench_kernel
from benchmarks.serving import BenchServeConfig, bench_serve
from benchmarks.speedrun import BenchSpeedrunConfig, bench_speedrun
from benchmarks.training import BenchCompileConfig, BenchTrainConfig, bench_compile, bench_train
from training.presets import TRAIN_PRESETS


def of_train_presets(config_class: type) -> dict[str, cli.Preset]:
    """Return the presets of train.py for a bench whose field `train` holds such a config."""
    return {
        name: cli.Preset(preset.description, config_class(preset=name, train=preset.config))
        for name, preset in TRAIN_PRESETS.items()
    }


# Command -> the class that holds its flags, and its presets if it has any.
BENCHES: dict[str, tuple[type, dict[str, cli.Preset] | None]] = {
    "train": (BenchTrainConfig, of_train_presets(BenchTrainConfig)),
    "compile": (BenchCompileConfig, of_train_presets(BenchCompileConfig)),
    "speedrun": (BenchSpeedrunConfig, None),
    "checkpoint": (BenchCheckpointConfig, of_train_presets(BenchCheckpointConfig)),
    "generate": (BenchGenerateConfig, None),
    "kernel": (BenchKernelConfig, None),
    "serve": (BenchServeConfig, None),
    "eval": (BenchEvalConfig, None),
}

# What a command runs, by the class of its flags; it returns the JSON object.
RUN: dict[type, Callable[[Any], dict]] = {
    BenchTrainConfig: bench_train,
    BenchCompileConfig: bench_compile,
    BenchSpeedrunConfig: bench_speedrun,
    BenchCheckpointConfig: bench_checkpoint,
    BenchGenerateConfig: bench_generate,
    BenchKernelConfig: bench_kernel,
    BenchServeConfig: bench_serve,
    BenchEvalConfig: bench_eval,
}


def main() -> None:
    """Read the command line, run its bench and print its report."""
    config = cli.parse_command(BENCHES)
    with cli.interrupt_is_quiet(), cli.user_errors():
        print(json.dumps(RUN[type(config)](config)))


if __name__ == "__main__":
    main()
