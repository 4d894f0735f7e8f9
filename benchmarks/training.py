"""Speed and compilation of train_step: start with bench_train and bench_compile.

Shapes: A micro-batches of an update, B sequences, T tokens.
"""

import contextlib
import dataclasses
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import numpy as np
import tyro

from benchmarks.contender import (
    Contender,
    ContenderProcess,
    in_words,
    milliseconds,
    ratio,
    take_turns,
)
from config import GPTConfig, TrainConfig
from errors import require, require_at_least
from training.presets import TRAIN_PRESETS

CHARACTERS = 65  # vocabulary of nanoGPT's shakespeare_char
GPT2_TOKENS = 50257
# --help lists train.py's flags among the others, under no heading of their own.
Inlined = Annotated[TrainConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class BenchTrainConfig:
    """Speed of train_step for a preset of train.py, whose flags are accepted too."""

    preset: Annotated[str, tyro.conf.Suppress] = "shakespeare_char_cpu"
    train: Inlined = TRAIN_PRESETS["shakespeare_char_cpu"].config
    nanogpt: Path | None = None
    """a checkout of nanoGPT to race against, eager and compiled (needs torch)"""
    rounds: int = 7
    """turns of each contender; medians count"""
    steps: int = 30
    """updates per turn"""

    def __post_init__(self):
        require_at_least(self, 1, "rounds", "steps")


@dataclass(frozen=True)
class BenchCompileConfig:
    """Time to compile train_step for a preset of train.py, with its flags, over several depths."""

    preset: Annotated[str, tyro.conf.Suppress] = "gpt2"
    train: Inlined = TRAIN_PRESETS["gpt2"].config
    layers: tuple[int, ...] = (2, 12, 48)
    """numbers of layers, separated by spaces"""
    rounds: int = 3
    """turns of each number of layers; medians count"""

    def __post_init__(self):
        require_at_least(self, 1, "rounds")


class OursTraining(Contender):
    """Our train_step with its data loading. A unit of work is one update."""

    def __init__(self, config: TrainConfig, tokens: Path):
        """tokens: a file of token ids, uint16."""
        import train
        from mesh import training_mesh, whole_sequences
        from ops import choose_attention
        from training.processes import use_cpu_cores
        from utils import TrainState

        use_cpu_cores(config)
        self.mesh = training_mesh(config)
        model = choose_attention(config.model, whole_sequences(self.mesh))
        self.config = dataclasses.replace(config, model=model)
        self.state = TrainState.create(self.config, mesh=self.mesh)
        file = train.TokenFile(tokens, "uint16")
        self.batches = train.batches(file, self.config, 0, self.mesh)
        self.train_step = train.train_step

    def run(self, n: int) -> None:
        """Do n updates."""
        import jax

        for _ in range(n):
            self.state, metrics = self.train_step(self.state, next(self.batches), self.config)
        jax.block_until_ready(self.state)
        float(metrics["loss"])  # waits for the loss as well, as a run that logs it does

    def report(self) -> dict:
        """Return the attention that was chosen and, where they are known, the device's limits."""
        import jax

        from mesh import PEAK_FLOPS

        device = jax.devices()[0]
        figures: dict[str, Any] = {"attention": self.config.model.training_attention}
        memory = device.memory_stats()
        if memory:
            figures["peak_device_mib"] = memory["peak_bytes_in_use"] >> 20
        if device.device_kind in PEAK_FLOPS:
            figures["peak_flops"] = PEAK_FLOPS[device.device_kind] * self.mesh.size
        return figures


class NanoGPTTraining(Contender):
    """nanoGPT's model and training step, as its train.py runs it, on our batches.

    A unit of work is one update."""

    def __init__(self, config: TrainConfig, tokens: Path, directory: Path, compiled: bool):
        """directory: a checkout of nanoGPT; compiled: whether its model goes through
        torch.compile."""
        import torch

        import train

        torch.manual_seed(config.seed)
        self.config = config
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        nanogpt = load_nanogpt(directory)
        with contextlib.redirect_stdout(None):  # it prints its number of parameters
            model = nanogpt.GPT(nanogpt_config(nanogpt, config.model)).to(self.device)
            betas = (config.beta1, config.beta2)
            self.optimizer = model.configure_optimizers(
                config.weight_decay, config.learning_rate, betas, self.device
            )
        self.model: Any = torch.compile(model) if compiled else model
        self.batches: Iterator[Any] = train.batches(train.TokenFile(tokens, "uint16"), config, 0)

    def run(self, n: int) -> None:
        """Do n updates."""
        for _ in range(n):
            loss = self._update(next(self.batches))
        loss.item()  # waits for the device

    def _update(self, batch: np.ndarray):
        """Do one update from batch (A, B, T + 1); return the loss of its last micro-batch."""
        import torch

        for tokens in torch.from_numpy(batch).long().to(self.device):
            inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
            with self._precision():
                _, loss = self.model(inputs, targets)
            (loss / self.config.gradient_accumulation_steps).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def _precision(self) -> contextlib.AbstractContextManager:
        """Return what nanoGPT's train.py runs its forward pass under: on a GPU bfloat16 by
        autocast, on a CPU float32."""
        import torch

        if self.device == "cuda":
            return torch.autocast("cuda", torch.bfloat16)
        return contextlib.nullcontext()

    def report(self) -> dict:
        """Return the GPU memory it took at most, where there is a GPU."""
        import torch

        if self.device != "cuda":
            return {}
        return {"peak_device_mib": torch.cuda.max_memory_allocated() >> 20}


def load_nanogpt(directory: Path) -> ModuleType:
    """Import model.py of a checkout under a name that does not hide our own model.py."""
    path = directory / "model.py"
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None and spec.loader is not None, f"{path} cannot be imported"
    nanogpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    return nanogpt


def nanogpt_config(nanogpt: ModuleType, config: GPTConfig):
    """Return nanoGPT's config of the same shape. It pads GPT-2's vocabulary, but not characters."""
    is_gpt2 = config.vocab_size > 1000
    return nanogpt.GPTConfig(
        block_size=config.block_size,
        vocab_size=config.padded_vocab_size if is_gpt2 else config.vocab_size,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
        dropout=config.dropout,
        bias=config.bias,
    )


def bench_train(config: BenchTrainConfig) -> dict:
    """Return the tokens per second of train_step, data loading included.

    With config.nanogpt, those of nanoGPT, eager and compiled, as well."""
    nanogpt = config.nanogpt
    require(
        nanogpt is None or (nanogpt / "model.py").exists(),
        f"--nanogpt={nanogpt} has no model.py",
        param="nanogpt",
    )
    vocab_size = CHARACTERS if config.train.dataset.endswith("char") else GPT2_TOKENS
    model = dataclasses.replace(config.train.model, vocab_size=vocab_size)
    train = dataclasses.replace(config.train, model=model)
    with tempfile.TemporaryDirectory() as directory:
        tokens = Path(directory) / "tokens.bin"
        write_random_tokens(tokens, train)
        contenders = training_contenders(train, tokens, nanogpt)
        take_turns(contenders, config.rounds, config.steps)
        figures = {name: training_figures(c, train) for name, c in contenders.items()}
    add_flops_utilization(figures, model)
    for name, each in figures.items():
        print(f"{name:16}{in_words(each)}")
    ours = contenders.pop("ours")
    return {
        "bench": "train",
        "preset": config.preset,
        "dtype": model.dtype,
        **figures,
        **ratio(ours.median, [peer.median for peer in contenders.values()]),
    }


def tokens_per_update(config: TrainConfig) -> int:
    """Return how many tokens one update learns from."""
    return config.gradient_accumulation_steps * config.batch_size * config.model.block_size


def write_random_tokens(path: Path, config: TrainConfig) -> None:
    """Write enough uint16 tokens for a few updates. Speed does not depend on what they are."""
    count = 4 * tokens_per_update(config) + 10**6
    rng = np.random.default_rng(0)
    rng.integers(config.model.vocab_size, size=count, dtype=np.uint16).tofile(path)


def training_contenders(
    config: TrainConfig, tokens: Path, nanogpt: Path | None
) -> dict[str, ContenderProcess]:
    """Start ours and, where there is a checkout of nanoGPT, both ways to run that."""
    contenders = {"ours": ContenderProcess(OursTraining, config, tokens)}
    if nanogpt is not None:
        for name, compiled in (("nanogpt_eager", False), ("nanogpt_compile", True)):
            contenders[name] = ContenderProcess(NanoGPTTraining, config, tokens, nanogpt, compiled)
    return contenders


def training_figures(contender: ContenderProcess, config: TrainConfig) -> dict:
    """Close a contender and return its figures."""
    return {
        "ms_per_step": milliseconds(contender.median),
        "tokens_per_s": round(tokens_per_update(config) / contender.median),
        **contender.close(),
    }


def add_flops_utilization(figures: dict[str, dict], model: GPTConfig) -> None:
    """Add to everyone's figures the model FLOPs utilization, if ours tell the device's peak.

    It is the FLOPs of a token times tokens per second, over the peak. The peak itself leaves the
    figures."""
    peak_flops = figures["ours"].pop("peak_flops", None)
    if peak_flops is None:
        return
    for each in figures.values():
        each["mfu"] = round(each["tokens_per_s"] * model.flops_per_token / peak_flops, 4)


def bench_compile(config: BenchCompileConfig) -> dict:
    """Return the seconds to trace, lower and compile train_step for several numbers of layers.

    Nothing is allocated or run."""
    seconds_to_compile(config.train, 1)  # pays for what only the first compilation does
    turns = [
        {n_layer: seconds_to_compile(config.train, n_layer) for n_layer in config.layers}
        for _ in range(config.rounds)
    ]
    medians = {}
    for n_layer in config.layers:
        medians[n_layer] = round(statistics.median(turn[n_layer] for turn in turns), 2)
        print(f"{n_layer:3} layers: {medians[n_layer]} s")
    return {"bench": "compile", "preset": config.preset, "seconds": medians}


def seconds_to_compile(config: TrainConfig, n_layer: int) -> float:
    """Compile train_step for a model of n_layer layers, with nothing in JAX's caches."""
    import jax

    from train import train_step
    from utils import TrainState

    model = dataclasses.replace(config.model, n_layer=n_layer)
    config = dataclasses.replace(config, model=model)
    state = jax.eval_shape(lambda: TrainState.create(config))
    A, B, T = config.gradient_accumulation_steps, config.batch_size, model.block_size
    batch = jax.ShapeDtypeStruct((A, B, T + 1), np.int32)
    jax.clear_caches()
    begin = time.perf_counter()
    train_step.lower(state, batch, config).compile()
    return time.perf_counter() - begin
