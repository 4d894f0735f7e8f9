"""Measure, in one run, against peers: python bench.py COMMAND [--key=value ...]

Contenders run in processes of their own and take turns, so that a machine whose speed drifts is
fair to all; medians count. The last line printed is one JSON object. Its `ratio` is ours over the
best peer: above 1, ours is faster.
"""

import json

import cli
from benchmarks.evaluation import BenchEvalConfig, bench_eval
from benchmarks.generation import BenchGenerateConfig, bench_generate
from benchmarks.kernels import BenchKernelConfig, bench_kernel
from benchmarks.serving import BenchServeConfig, bench_serve
from benchmarks.training import BenchCompileConfig, BenchTrainConfig, bench_compile, bench_train
from config import TRAIN_PRESETS

BENCHES = {
    "train": (
        BenchTrainConfig,
        {name: BenchTrainConfig(preset=name, train=t) for name, t in TRAIN_PRESETS.items()},
    ),
    "compile": (
        BenchCompileConfig,
        {name: BenchCompileConfig(preset=name, train=t) for name, t in TRAIN_PRESETS.items()},
    ),
    "generate": (BenchGenerateConfig, None),
    "kernel": (BenchKernelConfig, None),
    "serve": (BenchServeConfig, None),
    "eval": (BenchEvalConfig, None),
}

RUN = {
    BenchTrainConfig: bench_train,
    BenchCompileConfig: bench_compile,
    BenchGenerateConfig: bench_generate,
    BenchKernelConfig: bench_kernel,
    BenchServeConfig: bench_serve,
    BenchEvalConfig: bench_eval,
}


def main() -> None:
    config = cli.parse_command(BENCHES)
    with cli.user_errors():
        print(json.dumps(RUN[type(config)](config)))


if __name__ == "__main__":
    main()
