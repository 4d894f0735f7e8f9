"""DOC"""

import dataclasses
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from benchmarks.contender import Contender, take_turns
from config import TRAIN_PRESETS, TrainConfig
from errors import require


@dataclass(frozen=True)
class BenchTrainConfig:
    """Speed of train_step for a preset of train.py, whose flags are accepted too."""

    preset: Annotated[str, tyro.conf.Suppress] = "shakespeare_char_cpu"
    train: tyro.conf.OmitArgPrefixes[TrainConfig] = TRAIN_PRESETS["shakespeare_char_cpu"]
    nanogpt: Path | None = None
    """a checkout of nanoGPT to race against, eager and compiled (needs torch)"""
    rounds: int = 7
    """turns of each contender; medians count"""
    steps: int = 30
    """updates per turn"""


@dataclass(frozen=True)
class BenchCompileConfig:
    """Time to compile train_step for a preset of train.py, whose flags are accepted too, over several depths."""

    preset: Annotated[str, tyro.conf.Suppress] = "gpt2"
    train: tyro.conf.OmitArgPrefixes[TrainConfig] = TRAIN_PRESETS["gpt2"]
    layers: tuple[int, ...] = (2, 12, 48)
    """numbers of layers, separated by spaces"""
    rounds: int = 3
    """turns of each; medians count"""


def ours_train(config: TrainConfig, tokens: Path) -> Callable:
    import jax

    import train
    import utils
    from mesh import PEAK_FLOPS, training_mesh, use_cpu_cores, whole_sequences
    from ops import choose_attention

    use_cpu_cores(config)
    mesh = training_mesh(config)
    config = dataclasses.replace(
        config, model=choose_attention(config.model, whole_sequences(mesh))
    )
    state = utils.TrainState.create(config, mesh=mesh)
    batches = train.batches(train.TokenFile(tokens, "uint16"), config, 0, mesh)

    def run(n: int) -> None:
        nonlocal state
        for _ in range(n):
            state, metrics = train.train_step(state, next(batches), config)
        jax.block_until_ready(state)
        float(metrics["loss"])

    def memory() -> dict:
        device, told = jax.devices()[0], {"attention": config.model.training_attention}
        if stats := device.memory_stats():
            told["peak_device_mib"] = stats["peak_bytes_in_use"] >> 20
        if device.device_kind in PEAK_FLOPS:
            told["peak_flops"] = PEAK_FLOPS[device.device_kind] * mesh.size
        return told

    run.memory = memory
    return run


def nanogpt_train(config: TrainConfig, tokens: Path, directory: Path, compile_: bool) -> Callable:
    """nanoGPT's model and training step, as its train.py runs it, on our batches."""
    import contextlib

    import torch

    import train

    spec = importlib.util.spec_from_file_location("nanogpt_model", directory / "model.py")
    nanogpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    torch.manual_seed(config.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = config.model
    vocab_size = (
        shape.padded_vocab_size if shape.vocab_size > 1000 else shape.vocab_size
    )  # as nanoGPT pads 50257 to 50304
    with contextlib.redirect_stdout(None):
        model = nanogpt.GPT(
            nanogpt.GPTConfig(
                block_size=shape.block_size,
                vocab_size=vocab_size,
                n_layer=shape.n_layer,
                n_head=shape.n_head,
                n_embd=shape.n_embd,
                dropout=shape.dropout,
                bias=shape.bias,
            )
        ).to(device)
        optimizer = model.configure_optimizers(
            config.weight_decay, config.learning_rate, (config.beta1, config.beta2), device
        )
    if compile_:
        model = torch.compile(model)
    # nanoGPT's train.py computes in float32 on a CPU, in bfloat16 under autocast on a GPU.
    precision = (
        torch.autocast(device, torch.bfloat16) if device == "cuda" else contextlib.nullcontext()
    )
    batches = train.batches(train.TokenFile(tokens, "uint16"), config, 0)

    def run(n: int) -> None:
        for _ in range(n):
            for micro in torch.from_numpy(next(batches)).long().to(device):
                with precision:
                    _, loss = model(micro[:, :-1].contiguous(), micro[:, 1:].contiguous())
                (loss / config.gradient_accumulation_steps).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss.item()

    if device == "cuda":
        run.memory = lambda: {"peak_device_mib": torch.cuda.max_memory_allocated() >> 20}
    return run


def bench_train(config: BenchTrainConfig) -> dict:
    """Tokens per second of train_step, data loading included; with config.nanogpt, of nanoGPT eager and compiled as well."""
    vocab_size = 65 if config.train.dataset.endswith("char") else 50257
    model = dataclasses.replace(config.train.model, vocab_size=vocab_size)
    train = dataclasses.replace(config.train, model=model)
    per_step = train.gradient_accumulation_steps * train.batch_size * model.block_size
    with tempfile.TemporaryDirectory() as directory:
        tokens = Path(directory) / "tokens.bin"  # speed does not depend on what the tokens are
        np.random.default_rng(0).integers(
            vocab_size, size=4 * per_step + 10**6, dtype=np.uint16
        ).tofile(tokens)
        contenders = {"ours": Contender(ours_train, train, tokens)}
        if config.nanogpt:
            require(
                (config.nanogpt / "model.py").exists(),
                f"--nanogpt={config.nanogpt} has no model.py",
            )
            for name, compile_ in (("nanogpt_eager", False), ("nanogpt_compile", True)):
                contenders[name] = Contender(nanogpt_train, train, tokens, config.nanogpt, compile_)
        take_turns(contenders, config.rounds, config.steps)
        results = {
            name: {
                "ms_per_step": round(contender.median * 1e3, 2),
                "tokens_per_s": round(per_step / contender.median),
                **contender.close(),
            }
            for name, contender in contenders.items()
        }
    peak = results["ours"].pop("peak_flops", None)
    for name, result in results.items():
        if peak:  # model FLOPs utilization: flops_per_token * tokens per second / the device's peak
            result["mfu"] = round(result["tokens_per_s"] * model.flops_per_token / peak, 4)
        print(f"{name:16}" + ", ".join(f"{key} {value}" for key, value in result.items()))
    peers = [c.median for name, c in contenders.items() if name != "ours"]
    ratio = {"ratio": round(min(peers) / contenders["ours"].median, 3)} if peers else {}
    return {"bench": "train", "preset": config.preset, "dtype": model.dtype, **results, **ratio}


def bench_compile(config: BenchCompileConfig) -> dict:
    """Seconds to trace, lower and compile train_step for several numbers of layers. Nothing is allocated or run."""
    import jax

    import train
    import utils

    def compile_(n_layer: int) -> float:
        c = dataclasses.replace(
            config.train, model=dataclasses.replace(config.train.model, n_layer=n_layer)
        )
        state = jax.eval_shape(lambda: utils.TrainState.create(c))
        shape = (c.gradient_accumulation_steps, c.batch_size, c.model.block_size + 1)
        jax.clear_caches()
        begin = time.perf_counter()
        train.train_step.lower(state, jax.ShapeDtypeStruct(shape, np.int32), c).compile()
        return time.perf_counter() - begin

    compile_(1)  # what only the first compilation does
    turns = [
        {n_layer: compile_(n_layer) for n_layer in config.layers} for _ in range(config.rounds)
    ]
    seconds = {
        n_layer: round(statistics.median(turn[n_layer] for turn in turns), 2)
        for n_layer in config.layers
    }
    for n_layer, each in seconds.items():
        print(f"{n_layer:3} layers: {each} s")
    return {"bench": "compile", "preset": config.preset, "seconds": seconds}
