"""Every knob, each with its reason: one class for each program (server.py: serving/config.py).

A class says what is allowed of its fields in `__post_init__`; the docstring of a field is what
`--help` prints. Flags have nanoGPT's names wherever nanoGPT has one. No JAX in here: flags come
first. The presets of train.py are in training/presets.py.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from errors import require, require_at_least, require_fraction
from flags import MemorySize, default_is
from formats.parameters import RopeScaling, number_of_parameters, require_possible_model

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT and how it computes. The defaults of the shape are GPT-2's, 124M."""

    block_size: int = 1024
    """Longest context in tokens: with learned positions, how many of them there are."""
    vocab_size: Annotated[int, tyro.conf.Fixed, tyro.conf.Suppress] = 50257
    """Number of tokens. It is no flag: it comes from the data set or the checkpoint."""
    n_layer: int = 12
    """Number of blocks."""
    n_head: int = 12
    """Attention heads per block; must divide n_embd, unless head_size is given."""
    n_kv_head: Annotated[int | None, default_is("n_head")] = None
    """Heads of keys and values; must divide n_head. Fewer than n_head share one among several heads
    of queries: the cache is smaller by as much."""
    head_size: Annotated[int | None, default_is("n_embd / n_head")] = None
    """Width of a head."""
    n_embd: int = 768
    """Width of the residual stream."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """rmsnorm is a LayerNorm without mean and bias, which loses nothing and is faster."""
    positions: Literal["learned", "rotary"] = "learned"
    """learned adds a vector for each position to the embedding, as GPT-2 does; rotary turns queries
    and keys by angles that grow with the position, so that attention sees distances."""
    rope_theta: float = 10000.0
    """Base of the rotary angles: larger ones turn more slowly, for longer contexts."""
    rope_scaling: Annotated[RopeScaling | None, tyro.conf.Fixed, tyro.conf.Suppress] = None
    """Llama 3's way to longer contexts. It is no flag: it comes from a checkpoint."""
    mlp: Literal["plain", "gated"] = "plain"
    """plain is activation(a x); gated is activation(g x) times (a x), with one more matrix."""
    mlp_width: Annotated[int | None, default_is("4 n_embd")] = None
    """Width within the MLP."""
    qkv_bias: Annotated[bool | None, default_is("as bias")] = None
    """Biases of queries, keys and values, where they differ from those of the other matrices."""
    qk_norm: bool = False
    """An RMSNorm on each head's queries and keys, which keeps their products from growing."""
    tied_head: bool = True
    """The token embedding is the head's matrix too. False gives the head its own."""
    dropout: float = 0.0
    """Probability of dropping an activation in training: 0 to pretrain, 0.1 or more to finetune."""
    bias: bool = True
    """Biases in Linear and LayerNorm, as GPT-2 has them; without is a bit better and faster."""
    activation: Literal["gelu_new", "gelu", "relu", "relu2", "silu"] = "gelu_new"
    """Activation of the MLP: gelu_new is GPT-2's tanh form, gelu the exact erf form, which takes
    about twice the time on a CPU; relu2 is the square of relu."""
    layer_norm_epsilon: float = 1e-5
    """Added to the variance in LayerNorm, and to the mean of squares in RMSNorm."""
    vocab_multiple: int = 64
    """The embedding is padded to a multiple of this (50257 to 50304), so that its matmuls tile
    well and divide over devices. The padding is masked and never sampled."""
    dtype: Dtype = "float32"
    """What matmul inputs are rounded to. Parameters, sums, softmax, LayerNorm and loss are float32
    always."""
    training_attention: Literal["auto", "xla", "cudnn"] = "auto"
    """cudnn is a FlashAttention kernel for NVIDIA GPUs, in bfloat16 and without dropout; xla is
    plain matmuls and a softmax. auto tries cudnn when training starts, and takes xla where it does
    not run."""
    remat: bool = False
    """Recompute each block in the backward pass: less memory for a third more work."""
    scan_unroll: int = 1
    """Blocks per iteration of the scan over layers: n_layer runs faster for small models on a CPU,
    1 compiles fastest."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "block_size", "vocab_size", "n_layer", "n_head", "n_embd")
        require_at_least(self, 1, "vocab_multiple", "scan_unroll")
        require_at_least(self, 1, "n_kv_head", "head_size", "mlp_width")
        require_possible_model(self)
        require_fraction(self, "dropout")
        cudnn_runs = self.dtype == "bfloat16" and self.dropout == 0
        require(
            self.training_attention != "cudnn" or cudnn_runs,
            "training_attention=cudnn computes in bfloat16 and without dropout, not in "
            f"{self.dtype} with dropout={self.dropout}",
            param="training_attention",
        )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to a multiple of vocab_multiple."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.n_embd // self.n_head if self.head_size is None else self.head_size

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values; n_head / kv_heads heads of queries share each."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def mlp_dim(self) -> int:
        """Width within the MLP."""
        return 4 * self.n_embd if self.mlp_width is None else self.mlp_width

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def qkv_parts(self) -> int:
        """Parts of c_attn's output, each kv_heads * head_dim wide: see CausalSelfAttention."""
        return self.n_head // self.kv_heads + 2

    def num_params(self, embeddings: bool = True) -> int:
        """Return the number of parameters, without the padding of the vocabulary.

        embeddings=False leaves out what is only looked up and never multiplied by, as nanoGPT
        counts N for FLOPs: the positions, and the token embedding unless it is the head too."""
        return number_of_parameters(self, embeddings)

    @property
    def flops_per_token(self) -> int:
        """FLOPs of training on a token, 6 N + 12 L H D T (Chowdhery et al. 2022, appendix B).

        H D is the width of all heads, n_embd in a GPT-2. Recomputation (remat) does not count."""
        attention = 12 * self.n_layer * self.n_head * self.head_dim * self.block_size
        return 6 * self.num_params(embeddings=False) + attention

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "GPTConfig":
        """Return the config that dataclasses.asdict has made these fields of, perhaps through JSON.

        A field that is missing, since the version that wrote it had none, has its default."""
        scaling = fields.get("rope_scaling")
        if scaling is not None:
            fields = fields | {"rope_scaling": RopeScaling(**scaling)}
        return cls(**fields)


@dataclass(frozen=True)
class TrainConfig:
    """Train a GPT on the token files that prepare.py wrote."""

    model: GPTConfig = GPTConfig(bias=False)
    """The model to train."""
    # Data and output.
    dataset: str = "openwebtext"
    """Name of a data set of prepare.py."""
    data_dir: Annotated[Path | None, default_is("data/DATASET")] = None
    """Directory of its train.bin, val.bin and meta.json."""
    out_dir: Path = Path("out")
    """Directory for checkpoints, config.json, meta.json, metrics.jsonl and loss.png."""
    init_from: str = "scratch"
    """scratch; or resume: go on from the latest checkpoint in out_dir, or start if there is none
    yet; or gpt2, gpt2-medium, gpt2-large, gpt2-xl or the path of a Hugging Face directory or a
    GGUF file: finetune that model."""
    # Evaluation and logging.
    eval_interval: int = 2000
    """Updates between evaluations. A checkpoint is saved after each."""
    keep_checkpoints: int = 3
    """Latest checkpoints to keep, beside the best: a run goes back to one if a later is damaged."""
    eval_iters: int = 200
    """Batches of each split in an evaluation: always the same ones, so that losses compare."""
    eval_only: bool = False
    """Evaluate once and stop. Nothing is written."""
    eval_full: bool = False
    """Evaluate on every token of the validation split instead of eval_iters batches."""
    log_interval: int = 10
    """Updates between lines of metrics.jsonl."""
    skip_nonfinite: int = 10
    """Updates in a row that may be lost to a loss or gradients that are not finite: they leave the
    parameters as they are. One more ends the run; 0 ends it at the first."""
    tensorboard: bool = True
    """Also write TensorBoard files, to out_dir/tensorboard."""
    wandb_log: bool = False
    """Also log to Weights & Biases (needs the package wandb)."""
    wandb_project: str = "jax-nanogpt"
    """Project of the run at Weights & Biases."""
    wandb_run_name: str = "gpt"
    """Name of the run at Weights & Biases."""
    profile: bool = False
    """Write a profiler trace of updates 10 to 20 to out_dir/profile."""
    # Batch and devices.
    batch_size: int = 12
    """Sequences in a micro-batch, over all devices."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per update: their gradients are averaged."""
    loss_chunks: int = 1
    """Compute the loss in this many pieces of the sequence, so that the float32 logits of a whole
    micro-batch are never held at once; must divide block_size."""
    dry_run: bool = False
    """Do not train: print what an update takes in memory, FLOPs and communication, on simulated
    devices if the mesh has more than there are. It needs no data and writes nothing."""
    mesh: Annotated[
        str | None,
        default_is("all devices share the batch, and the weights too if they are large"),
    ] = None
    """How devices share the work: AXIS:SIZE,... with the axes data, fsdp, tensor, context and
    layers (see docs/distributed.md). One size may be -1: all devices that are left."""
    coordinator_address: Annotated[str | None, default_is("one process, or found out")] = None
    """HOST:PORT of process 0, for a run in many processes of which neither SLURM, Open MPI nor a
    TPU pod tells."""
    num_processes: Annotated[int | None, default_is("one, or found out")] = None
    """Number of processes; goes with coordinator_address."""
    process_id: Annotated[int | None, default_is("0, or found out")] = None
    """Which of the processes this is, from 0; goes with coordinator_address."""
    # Optimizer.
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon orthogonalises the update of each matrix of a block and leaves the rest to AdamW."""
    learning_rate: float = 6e-4
    """Highest learning rate: the one after the warmup."""
    max_iters: int = 600_000
    """Updates of the whole run."""
    weight_decay: float = 1e-1
    """Weight decay of the matrices and embeddings. Biases and LayerNorms have none."""
    beta1: float = 0.9
    """AdamW's decay, per update, of the mean of the gradients."""
    beta2: float = 0.95
    """AdamW's decay, per update, of the mean of the squared gradients: higher for small batches,
    whose gradients are noisy."""
    grad_clip: float = 1.0
    """Largest global norm of the gradients: longer ones are scaled down to it. 0 clips nothing."""
    decay_lr: bool = True
    """Lower the learning rate as lr_schedule says. False: it stays as it is after the warmup."""
    lr_schedule: Literal["cosine", "wsd"] = "cosine"
    """cosine falls to min_lr in half a wave; wsd (warmup, stable, decay) is flat and falls to
    min_lr in a straight line over the last fifth."""
    warmup_iters: int = 2000
    """Updates in which the learning rate rises, in a straight line, from near 0. A run shorter
    than ten times this warms up for a tenth of itself instead."""
    lr_decay_iters: Annotated[int | None, default_is("max_iters")] = None
    """Update at which the learning rate arrives at min_lr; max_iters is right by Chinchilla."""
    min_lr: float = 6e-5
    """Lowest learning rate, after the decay; usually learning_rate / 10."""
    seed: int = 1337
    """Seed of the parameters, the batches and dropout."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "eval_interval", "eval_iters", "log_interval", "max_iters")
        require_at_least(self, 1, "batch_size", "gradient_accumulation_steps", "loss_chunks")
        require_at_least(self, 0, "learning_rate", "min_lr", "weight_decay", "grad_clip")
        require_at_least(self, 0, "warmup_iters", "seed", "skip_nonfinite")
        require_at_least(self, 1, "lr_decay_iters", "keep_checkpoints")
        require_fraction(self, "beta1", "beta2")
        self.check_processes()
        T = self.model.block_size
        require(
            T % self.loss_chunks == 0,
            f"block_size={T} must be divisible by loss_chunks={self.loss_chunks}",
            param="loss_chunks",
        )

    def check_processes(self) -> None:
        """Raise UserError unless the three flags of a run in many processes fit each other."""
        processes = (self.coordinator_address, self.num_processes, self.process_id)
        given = [value for value in processes if value is not None]
        require(
            len(given) in (0, len(processes)),
            "coordinator_address, num_processes and process_id go together: all three, or none",
        )
        if self.process_id is not None and self.num_processes is not None:
            require(
                0 <= self.process_id < self.num_processes,
                f"process_id={self.process_id} must be in [0, num_processes={self.num_processes})",
                param="process_id",
            )

    @property
    def warmup_steps(self) -> int:
        """Updates of the warmup: warmup_iters, but at most a tenth of the run and of the decay."""
        run = min(self.max_iters, self.decay_steps) if self.decay_lr else self.max_iters
        return min(self.warmup_iters, run // 10)

    @property
    def decay_steps(self) -> int:
        """Update at which the learning rate arrives at min_lr."""
        return self.max_iters if self.lr_decay_iters is None else self.lr_decay_iters

    @property
    def data_path(self) -> Path:
        """Directory of train.bin, val.bin and meta.json."""
        return self.data_dir or Path("data") / self.dataset


@dataclass(frozen=True)
class ModelConfig:
    """Which trained model to use."""

    out_dir: Path | None = None
    """A directory that train.py wrote: its best checkpoint is used."""
    init_from: str | None = None
    """Instead of out_dir: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a Hugging Face directory or a
    GGUF file."""
    dtype: Annotated[Dtype | None, default_is("as trained; float32 for init_from")] = None
    """What matmul inputs are rounded to."""

    def __post_init__(self) -> None:
        require(
            (self.out_dir is None) != (self.init_from is None),
            "say which model: either --out_dir=DIR or --init_from=gpt2...",
        )


@dataclass(frozen=True)
class CPUConfig:
    """How a model is computed on a CPU."""

    cpu_kernels: Literal["auto", "off"] = "auto"
    """auto computes products and attention in native code, which the machine's C++ compiler builds
    at the first use; off, or no compiler, leaves them to XLA, at about half the tokens/s."""
    weights: Annotated[Literal["int8"] | None, default_is("the model's dtype")] = None
    """What native code stores matrices in: int8 takes a quarter of float32's memory and time to
    read, with a scale for every 64 weights of a column."""


@dataclass(frozen=True)
class SampleConfig(CPUConfig, ModelConfig):
    """Write text with a trained model, of --out_dir=DIR or --init_from=gpt2..."""

    start: Annotated[str, default_is("a line break", of="\n")] = "\n"
    """The prompt; FILE:path reads it from a file."""
    num_samples: int = 10
    """Samples to draw, all in one batch on the device; printed one after the other."""
    max_new_tokens: int = 500
    """Tokens per sample. Past block_size the context slides: the model sees the latest tokens."""
    temperature: float = 0.8
    """1 samples from the model's distribution, less is safer, 0 takes the likeliest token."""
    top_k: int | None = 200
    """Sample from the k likeliest tokens only; None: from all."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens only whose probability is at least this."""
    seed: int = 1337
    """Sample i is drawn with seed + i."""
    chat: bool = False
    """Talk with the model in the terminal instead: /clear begins anew, Ctrl+D or /quit ends."""
    system: Annotated[str | None, default_is("none, or the chat template's own")] = None
    """What the model of a chat is told before the first question: its system prompt."""
    chat_template: Annotated[Path | None, default_is("the one in init_from, if any")] = None
    """A Jinja file that makes a prompt of a chat."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "num_samples", "max_new_tokens")
        require_at_least(self, 0, "temperature")
        require(
            self.top_k is None or self.top_k >= 1,
            f"top_k={self.top_k} must be at least 1, or None for all tokens",
            param="top_k",
        )
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must be in (0, 1]", param="top_p")


@dataclass(frozen=True)
class EngineConfig(CPUConfig):
    """How an engine lays out its memory and its steps."""

    page_size: int = 16
    """Tokens per page of the KV cache. Prefill computes whole pages."""
    kv_cache_memory: MemorySize = 2**30
    """Memory for keys and values, of each device: bytes, or a number with a unit, as in 512MB or
    1.5GiB."""
    kv_blocks: Annotated[int | None, default_is("what fits kv_cache_memory")] = None
    """Pages for keys and values, instead of kv_cache_memory; one of them is the null page."""
    kv_dtype: Annotated[Dtype | None, default_is("the model's dtype")] = None
    """What keys and values are stored in."""
    max_num_seqs: Annotated[int | None, default_is("32 on a CPU, 256 elsewhere")] = None
    """Sequences that run at once. 1 is fastest for a single stream; on a CPU twice as many take
    almost twice as long."""
    prefill_tokens: Annotated[int | None, default_is("256 on a CPU, 2048 elsewhere")] = None
    """Prompt tokens computed per step, over all sequences: always this shape, padded if there are
    fewer. A multiple of page_size."""
    chunk_size: Annotated[int | None, default_is("prefill_tokens")] = None
    """Prompt tokens of one sequence computed per step: a multiple of page_size."""
    num_scheduler_steps: Annotated[int | None, default_is("1 on a CPU, 8 elsewhere")] = None
    """Tokens that each sequence gets from one call of the device, one after the other, while nobody
    waits for a prompt: the host's work is done once for all of them. A sequence that ends within a
    call leaves its place unused until the next."""
    speculate: int = 0
    """Tokens that a sequence may guess ahead in a step, from what came after its newest tokens when
    they came before (prompt lookup). What is answered has the bits that it has without; a step
    with guesses takes longer, and each that is right saves one."""
    attention: Annotated[str | None, default_is("by device")] = None
    """Implementation of attention over pages: cpu, xla, triton, mosaic_tpu, or reference (slow)."""
    mesh: Annotated[str | None, default_is("one device")] = None
    """tensor:N cuts heads, MLP and vocabulary into N equal parts, each on a device of its own, so
    that a model need not fit on one; tensor:-1 takes all devices. On a CPU devices are simulated,
    and native code is off."""

    def __post_init__(self) -> None:
        require_at_least(self, 2, "page_size", "kv_blocks")
        require_at_least(self, 1, "kv_cache_memory", "max_num_seqs", "num_scheduler_steps")
        require_at_least(self, 0, "speculate")
        steps = self.num_scheduler_steps or 1
        require(
            self.speculate == 0 or steps == 1,
            f"speculate={self.speculate} and num_scheduler_steps={steps}: guesses are made on the "
            "host, between steps; leave one of them out",
            param="speculate",
        )
        for name in ("prefill_tokens", "chunk_size"):
            tokens = getattr(self, name)
            require(
                tokens is None or (tokens >= 1 and tokens % self.page_size == 0),
                f"{name}={tokens} must be a positive multiple of page_size={self.page_size}",
                param=name,
            )
        require(
            self.mesh is None or bool(re.fullmatch(r"tensor:(-1|[1-9]\d*)", self.mesh)),
            f"mesh={self.mesh}: an engine is cut along one axis: tensor:N, or tensor:-1 for all "
            "devices",
            param="mesh",
        )
        require(
            self.mesh is None or (self.weights is None and self.attention != "cpu"),
            f"mesh={self.mesh} goes neither with weights=int8 nor with attention=cpu: these are "
            "native code, which runs on one CPU",
            param="mesh",
        )


@dataclass(frozen=True)
class ExportConfig:
    """Make a Hugging Face directory of a trained model."""

    to: Path
    """New directory to write: transformers, vLLM and llama.cpp's converter load it as it is."""
    out_dir: Path = Path("out")
    """A directory that train.py wrote: its best checkpoint is used."""


@dataclass(frozen=True)
class EvalConfig(CPUConfig, ModelConfig):
    """Score a model, of --out_dir=DIR or --init_from=gpt2..., with lm-evaluation-harness."""

    tasks: str = "hellaswag"
    """Names of lm-eval's tasks, separated by commas."""
    include_path: Path | None = None
    """A directory with YAML files of more tasks, of your own or on local data."""
    num_fewshot: Annotated[int | None, default_is("as the task says")] = None
    """Examples before each question."""
    limit: Annotated[int | None, default_is("all")] = None
    """Score only the first so many items of each task."""
    batch_size: int | Literal["auto"] = "auto"
    """Rows to compute at a time: of 512 tokens or more, each with many requests."""
    dtype: Dtype = "float32"
    """What matmul inputs are rounded to. bfloat16 moves a log-likelihood in its third digit."""
    output_path: Path | None = None
    """A JSON file for lm-eval's results with every sample."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "limit")
        require_at_least(self, 0, "num_fewshot")
        require(
            self.batch_size == "auto" or self.batch_size >= 1,
            f"batch_size={self.batch_size} must be at least 1, or auto",
            param="batch_size",
        )
