"""Every knob of the project, each with its reason, and the command line that sets them. No JAX in here: flags come first.

A program calls `parse(SomeConfig)`; `python train.py PRESET --key=value` starts from a named preset. Flags are nanoGPT's names
wherever nanoGPT has one. A user's mistake ends in one sentence on stderr and exit code 2.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from errors import require

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT and how it computes. The defaults are GPT-2 124M."""

    block_size: int = 1024
    """longest context in tokens: the number of learned positions"""
    vocab_size: Annotated[int, tyro.conf.Fixed, tyro.conf.Suppress] = 50257
    """number of tokens; not a flag, it comes from the data set or the checkpoint"""
    n_layer: int = 12
    """number of blocks"""
    n_head: int = 12
    """attention heads per block; must divide n_embd"""
    n_embd: int = 768
    """width of the residual stream"""
    dropout: float = 0.0
    """probability of dropping an activation while training; 0 is good for pretraining, try 0.1+ for finetuning"""
    bias: bool = True
    """biases in Linear and LayerNorm, as GPT-2 has them; without is a bit better and faster"""
    activation: Literal["gelu_new", "gelu", "relu", "silu"] = "gelu_new"
    """of the MLP: gelu_new is GPT-2's tanh form, gelu the exact erf form (about twice the time on a CPU)"""
    layer_norm_epsilon: float = 1e-5
    """added to the variance in LayerNorm"""
    vocab_multiple: int = 64
    """the embedding is padded to a multiple of this (50257 -> 50304) so that its matmuls tile well and divide over
    devices; the padding is masked and never sampled"""
    dtype: Dtype = "float32"
    """what matmul inputs are rounded to; parameters, sums, softmax, LayerNorm and loss are float32 always"""
    training_attention: Literal["auto", "xla", "cudnn"] = "auto"
    """cudnn is a FlashAttention kernel for NVIDIA GPUs, in bfloat16, without dropout; auto tries it when training starts
    and takes xla, plain matmuls and a softmax, where it does not run"""
    remat: bool = False
    """recompute each block in the backward pass instead of storing its activations: less memory, a third more work"""
    scan_unroll: int = 1
    """blocks per iteration of the scan over layers: n_layer is faster for small models on CPU, 1 compiles fastest"""

    def __post_init__(self):
        for name in (
            "block_size",
            "vocab_size",
            "n_layer",
            "n_head",
            "n_embd",
            "vocab_multiple",
            "scan_unroll",
        ):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        require(
            self.n_embd % self.n_head == 0,
            f"n_embd={self.n_embd} must be divisible by n_head={self.n_head}",
        )
        require(0 <= self.dropout < 1, f"dropout={self.dropout} must be in [0, 1)")
        require(
            self.training_attention != "cudnn" or (self.dtype == "bfloat16" and self.dropout == 0),
            f"training_attention=cudnn computes in bfloat16 and without dropout, not in {self.dtype} with "
            f"dropout={self.dropout}",
        )

    @property
    def padded_vocab_size(self) -> int:
        """V of the embedding: vocab_size rounded up to vocab_multiple."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    def num_params(self, embeddings: bool = True) -> int:
        """Number of parameters without vocabulary padding; embeddings=False leaves the positions out, as nanoGPT
        counts N for FLOPs (the token embedding stays in: it is the head's weight too)."""
        C, b = self.n_embd, int(self.bias)
        block = 12 * C * C + b * 9 * C + 2 * (1 + b) * C
        return (
            self.n_layer * block
            + (1 + b) * C
            + self.vocab_size * C
            + embeddings * self.block_size * C
        )

    @property
    def flops_per_token(self) -> int:
        """Of training, 6 N + 12 L C T (Chowdhery et al. 2022, appendix B); recomputation does not count."""
        return (
            6 * self.num_params(embeddings=False)
            + 12 * self.n_layer * self.n_embd * self.block_size
        )


@dataclass(frozen=True)
class TrainConfig:
    """Train a GPT on the token files that prepare.py wrote: python train.py PRESET [--key=value ...]"""

    model: tyro.conf.OmitArgPrefixes[GPTConfig] = GPTConfig(bias=False)
    # Data and output.
    dataset: str = "openwebtext"
    """name of a data set of prepare.py"""
    data_dir: Path | None = None
    """where its train.bin, val.bin and meta.json are (default: data/<dataset>)"""
    out_dir: Path = Path("out")
    """checkpoints, config.json, meta.json, metrics.jsonl and loss.png go here"""
    init_from: str = "scratch"
    """scratch; resume: go on from out_dir's latest checkpoint, or start if it has none yet; gpt2, gpt2-medium, gpt2-large,
    gpt2-xl or the path of a Hugging Face GPT-2 directory: finetune it"""
    # Evaluation and logging.
    eval_interval: int = 2000
    """updates between evaluations; a checkpoint is saved after each"""
    eval_iters: int = 200
    """batches of each split in an evaluation: always the same ones, so that losses compare"""
    eval_only: bool = False
    """evaluate once and stop"""
    eval_full: bool = False
    """evaluate on every token of the validation split instead of eval_iters batches"""
    log_interval: int = 10
    """updates between lines of metrics.jsonl"""
    tensorboard: bool = True
    """also write TensorBoard files to out_dir/tensorboard"""
    wandb_log: bool = False
    """also log to Weights & Biases (needs wandb)"""
    wandb_project: str = "jax-nanogpt"
    wandb_run_name: str = "gpt"
    profile: bool = False
    """write a profiler trace of steps 10 to 20 to out_dir/profile"""
    # Batch.
    batch_size: int = 12
    """sequences in a micro-batch, over all devices"""
    gradient_accumulation_steps: int = 1
    """micro-batches per update"""
    loss_chunks: int = 1
    """compute the loss in this many pieces along T, so that float32 logits (B, T, V) are never held at once"""
    dry_run: bool = False
    """do not train: print what a step takes on that mesh in memory, FLOPs and communication, on simulated devices if there are
    too few; needs no data and writes nothing"""
    mesh: str | None = None
    """how devices share the work: AXIS:SIZE,... of data, fsdp, tensor, context, layers (see docs/distributed.md), -1 once for the
    rest; default: all devices share the batch, and the weights too if they are large"""
    coordinator_address: str | None = None
    """HOST:PORT of process 0, where this is one of many processes and neither SLURM, Open MPI nor a TPU pod says so"""
    num_processes: int | None = None
    """how many processes there are; goes with coordinator_address"""
    process_id: int | None = None
    """which of them this is, from 0; goes with coordinator_address"""
    # Optimizer.
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon orthogonalises the update of each block's matrices, the rest is AdamW"""
    learning_rate: float = 6e-4
    """the highest"""
    max_iters: int = 600_000
    """updates"""
    weight_decay: float = 1e-1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    """clip gradients to this global norm; 0 does not clip"""
    decay_lr: bool = True
    """False: the rate stays at learning_rate after the warmup"""
    lr_schedule: Literal["cosine", "wsd"] = "cosine"
    """cosine to min_lr, or warmup-stable-decay: flat, then linear to min_lr over the last fifth"""
    warmup_iters: int = 2000
    lr_decay_iters: int | None = None
    """step at which the rate arrives at min_lr (default: max_iters; about that, by Chinchilla)"""
    min_lr: float = 6e-5
    """usually learning_rate / 10"""
    seed: int = 1337
    """of the parameters, the batches and dropout"""

    def __post_init__(self):
        positive = (
            "eval_interval",
            "eval_iters",
            "log_interval",
            "batch_size",
            "gradient_accumulation_steps",
            "loss_chunks",
            "max_iters",
        )
        for name in positive:
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        for name in (
            "learning_rate",
            "min_lr",
            "weight_decay",
            "grad_clip",
            "warmup_iters",
            "seed",
        ):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} must be in [0, 1)")
        processes = (self.coordinator_address, self.num_processes, self.process_id)
        require(
            None not in processes or not any(p is not None for p in processes),
            "coordinator_address, num_processes and process_id go together: give all three, or none",
        )
        require(
            None in processes or 0 <= self.process_id < self.num_processes,
            f"process_id={self.process_id} must be in [0, num_processes={self.num_processes})",
        )
        require(
            self.model.block_size % self.loss_chunks == 0,
            f"block_size={self.model.block_size} must be divisible by loss_chunks={self.loss_chunks}",
        )
        require(
            not self.decay_lr or self.warmup_iters < self.decay_steps,
            f"warmup_iters={self.warmup_iters} must be less than lr_decay_iters={self.decay_steps}",
        )

    @property
    def decay_steps(self) -> int:
        return self.lr_decay_iters or self.max_iters

    @property
    def data_path(self) -> Path:
        return self.data_dir or Path("data") / self.dataset


@dataclass(frozen=True)
class ModelConfig:
    """Which trained model to use."""

    out_dir: Path | None = None
    """a directory that train.py wrote: its best checkpoint is used"""
    init_from: str | None = None
    """instead: gpt2, gpt2-medium, gpt2-large, gpt2-xl or the path of a Hugging Face GPT-2 directory"""
    dtype: Dtype | None = None
    """what matmul inputs are rounded to (default: as trained; float32 for init_from)"""

    def __post_init__(self):
        require(
            (self.out_dir is None) != (self.init_from is None),
            "say which model: --out_dir=DIR or --init_from=gpt2...",
        )


@dataclass(frozen=True)
class SampleConfig(ModelConfig):
    """Write text with a trained model: python sample.py --out_dir=DIR | --init_from=gpt2... --start="..." """

    start: str = "\n"
    """the prompt; FILE:path reads it from a file"""
    num_samples: int = 10
    """samples to draw, one after the other on the screen, all in one batch on the device"""
    max_new_tokens: int = 500
    """tokens per sample; past block_size the context slides (see GPT.generate)"""
    temperature: float = 0.8
    """1 samples from the model's distribution, below 1 is safer, 0 always takes the likeliest token"""
    top_k: int | None = 200
    """keep only the k likeliest tokens (None keeps all)"""
    top_p: float = 1.0
    """keep the smallest set of tokens whose probability is at least p"""
    seed: int = 1337
    """sample i is drawn with seed + i"""

    def __post_init__(self):
        super().__post_init__()
        require(self.num_samples >= 1, f"num_samples={self.num_samples} must be at least 1")
        require(
            self.max_new_tokens >= 1, f"max_new_tokens={self.max_new_tokens} must be at least 1"
        )
        require(self.temperature >= 0, f"temperature={self.temperature} must not be negative")
        require(
            self.top_k is None or self.top_k >= 1,
            f"top_k={self.top_k} must be at least 1, or None for all",
        )
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must be in (0, 1]")


@dataclass(frozen=True)
class PrepareConfig:
    """Turn text into the token files that train.py reads: python prepare.py NAME [--input FILE ...]"""

    name: tyro.conf.Positional[
        Literal["pystdlib_char", "shakespeare_char", "shakespeare", "openwebtext", "text"]
    ]
    """pystdlib_char: this Python's own standard library, by characters, needs no network; shakespeare_char and
    shakespeare: Tiny Shakespeare, by characters and in GPT-2's tokens; openwebtext: 8 million web pages, in GPT-2's
    tokens; text: your own files"""
    input: tuple[Path, ...] = ()
    """UTF-8 files: what text is made of, or your copy of Tiny Shakespeare where it cannot be downloaded"""
    tokenizer: Literal["char", "gpt2"] | None = None
    """of text: characters, or GPT-2's BPE (default: gpt2); the other names say theirs"""
    out_dir: Path | None = None
    """train.bin, val.bin and meta.json go here, in place of those of an earlier run (default: data/NAME)"""
    num_proc: int | None = None
    """processes that tokenize openwebtext (default: half the CPU cores)"""

    def __post_init__(self):
        require(
            self.tokenizer in (None, self.tokenizer_name),
            f"{self.name} has tokenizer={self.tokenizer_name}: use text for tokenizer={self.tokenizer}",
        )
        require(
            self.input or self.name != "text",
            "text needs the files it is made of: --input FILE ...",
        )
        require(
            not self.input or self.name not in ("pystdlib_char", "openwebtext"),
            f"{self.name} takes no input: use text for your own files",
        )
        require(
            self.num_proc is None or self.name == "openwebtext", "num_proc is for openwebtext alone"
        )
        require(
            self.num_proc is None or self.num_proc >= 1,
            f"num_proc={self.num_proc} must be at least 1",
        )

    @property
    def tokenizer_name(self) -> str:
        if self.name == "text":
            return self.tokenizer or "gpt2"
        return "char" if self.name.endswith("_char") else "gpt2"

    @property
    def data_path(self) -> Path:
        return self.out_dir or Path("data") / self.name


@dataclass(frozen=True)
class EngineConfig:
    """How an engine lays out its memory and its steps."""

    page_size: int = 16
    """tokens per page of the KV cache; prefill computes whole pages"""
    kv_cache_memory: int = 2**30
    """bytes for keys and values"""
    kv_blocks: int | None = None
    """pages for keys and values, one of them the null page; instead of kv_cache_memory"""
    kv_dtype: Dtype | None = None
    """of keys and values (default: the model's dtype)"""
    max_num_seqs: int | None = None
    """sequences that run at once; 1 is fastest for a single stream (default: 16 on a CPU, where twice as many take almost twice
    as long, 256 elsewhere)"""
    prefill_tokens: int | None = None
    """prompt tokens computed per step, over all sequences: always this shape, padded if there are fewer (default: 128 on a CPU,
    2048 elsewhere)"""
    chunk_size: int | None = None
    """prompt tokens of one sequence computed per step (default: prefill_tokens)"""
    attention: str | None = None
    """implementation of attention over pages (default: by device)"""

    def __post_init__(self):
        for name, least in (("page_size", 2), ("kv_cache_memory", 1), ("max_num_seqs", 1)):
            value = getattr(self, name)
            require(value is None or value >= least, f"{name}={value} must be at least {least}")
        for name, value in (
            ("prefill_tokens", self.prefill_tokens),
            ("chunk_size", self.chunk_size),
        ):
            require(
                value is None or (value >= 1 and value % self.page_size == 0),
                f"{name}={value} must be a positive multiple of page_size={self.page_size}",
            )


@dataclass(frozen=True)
class ServeConfig(ModelConfig):
    """Serve a model over HTTP, as OpenAI's completions API: python server.py --out_dir=DIR | --init_from=gpt2..."""

    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = EngineConfig()
    served_model_name: str | None = None
    """what clients call the model (default: the last part of out_dir or init_from)"""
    chat_template: Path | None = None
    """a Jinja file that makes a prompt of a chat, for /v1/chat/completions (default: the one that the directory init_from
    brings)"""
    # The port.
    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 lets other machines in: set api_key too"""
    port: int = 8000
    """0 takes a free one; the log says which"""
    api_key: str | None = dataclasses.field(default=None, repr=False)
    """what clients must show on every route but /health; better in the environment, as NANOGPT_API_KEY, which ps does not
    show"""
    cors_origins: tuple[str, ...] = ()
    """pages of these origins may call the API from a browser"""
    # What one client may ask for.
    max_waiting: int = 256
    """prompts that may wait for the engine; with more, new requests are answered 429"""
    max_body_bytes: int = 2**20
    """longest request body"""
    max_prompts: int = 64
    """prompts in one request"""
    max_n: int = 16
    """samples per prompt"""
    max_logprobs: int = 20
    """likeliest tokens reported per position, at most the engine's 20"""
    max_stop: int = 16
    """stop strings of one request"""
    # How it ends.
    drain_timeout: float = 30.0
    """seconds that running requests have to finish after SIGTERM"""
    step_timeout: float = 60.0
    """seconds after which a step of the engine counts as stuck, and /health says so"""

    def __post_init__(self):
        super().__post_init__()
        for name in ("max_waiting", "max_body_bytes", "max_prompts", "max_n"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        require(0 <= self.port < 2**16, f"port={self.port} must be from 0 to {2**16 - 1}")
        require(
            0 <= self.max_logprobs <= 20, f"max_logprobs={self.max_logprobs} must be from 0 to 20"
        )
        require(
            self.max_prompts <= self.max_waiting,
            f"max_prompts={self.max_prompts} must be at most max_waiting={self.max_waiting}: more could never be admitted",
        )
        for name in ("max_stop", "drain_timeout", "step_timeout"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        require(self.api_key != "", "api_key must not be empty")

    @property
    def model_name(self) -> str:
        return self.served_model_name or Path(self.init_from or self.out_dir).resolve().name


@dataclass(frozen=True)
class ExportConfig:
    """Make a Hugging Face directory of a trained model: python export.py --out_dir=DIR --to=HF_DIR"""

    to: Path
    """the directory to write: transformers, vLLM and llama.cpp's converter load it as it is; must not exist"""
    out_dir: Path = Path("out")
    """a directory that train.py wrote: its best checkpoint is used"""


@dataclass(frozen=True)
class EvalConfig(ModelConfig):
    """Score a model with lm-evaluation-harness: python eval_harness.py --out_dir=DIR | --init_from=gpt2... --tasks=hellaswag"""

    tasks: str = "hellaswag"
    """names of lm-eval's tasks, separated by commas"""
    include_path: Path | None = None
    """a directory with YAML files of more tasks, of your own or on local data"""
    num_fewshot: int | None = None
    """examples before each question (default: as the task says)"""
    limit: int | None = None
    """only the first so many items of each task"""
    batch_size: int | Literal["auto"] = "auto"
    """rows of 512 tokens or more, of many requests each, to compute at a time"""
    dtype: Dtype = "float32"
    """what matmul inputs are rounded to; bfloat16 is faster and moves a log-likelihood in its third digit"""
    output_path: Path | None = None
    """write lm-eval's results with every sample to this JSON file"""

    def __post_init__(self):
        super().__post_init__()
        require(self.limit is None or self.limit >= 1, f"limit={self.limit} must be at least 1")
        require(
            self.num_fewshot is None or self.num_fewshot >= 0,
            f"num_fewshot={self.num_fewshot} must not be negative",
        )
        require(
            self.batch_size == "auto" or self.batch_size >= 1,
            f"batch_size={self.batch_size} must be at least 1, or auto",
        )


TRAIN_PRESETS = {
    # The Python standard library's own source, by characters: needs no network. What `make demo` trains.
    "pystdlib_char": TrainConfig(
        model=GPTConfig(
            block_size=128,
            n_layer=4,
            n_head=4,
            n_embd=128,
            bias=False,
            scan_unroll=4,
            dtype="bfloat16",
        ),
        dataset="pystdlib_char",
        out_dir=Path("out-pystdlib-char"),
        batch_size=12,
        eval_interval=500,
        eval_iters=20,
        learning_rate=2e-3,
        max_iters=4000,
        min_lr=2e-4,
        beta2=0.99,
        warmup_iters=100,
    ),
    # nanoGPT's "baby GPT", for one GPU: best validation loss 1.47.
    "shakespeare_char": TrainConfig(
        model=GPTConfig(
            block_size=256,
            n_layer=6,
            n_head=6,
            n_embd=384,
            dropout=0.2,
            bias=False,
            dtype="bfloat16",
        ),
        dataset="shakespeare_char",
        out_dir=Path("out-shakespeare-char"),
        batch_size=64,
        eval_interval=250,
        learning_rate=1e-3,
        max_iters=5000,
        min_lr=1e-4,
        beta2=0.99,
        warmup_iters=100,
    ),
    # nanoGPT's CPU recipe at twice its learning rate: loss 1.80 on the whole validation split where 1e-3 ends at 1.91, here and
    # in nanoGPT itself (whose 1.88 is a mean over 20 random batches).
    "shakespeare_char_cpu": TrainConfig(
        model=GPTConfig(
            block_size=64,
            n_layer=4,
            n_head=4,
            n_embd=128,
            bias=False,
            scan_unroll=4,
            dtype="bfloat16",
        ),
        dataset="shakespeare_char",
        out_dir=Path("out-shakespeare-char-cpu"),
        batch_size=12,
        eval_interval=250,
        eval_iters=20,
        learning_rate=2e-3,
        max_iters=2000,
        min_lr=2e-4,
        beta2=0.99,
        warmup_iters=100,
    ),
    # GPT-2 finetuned on Shakespeare in GPT-2's tokens: 32 sequences an update, a few updates, constant rate.
    "finetune_shakespeare": TrainConfig(
        model=GPTConfig(dtype="bfloat16"),
        dataset="shakespeare",
        out_dir=Path("out-finetune-shakespeare"),
        init_from="gpt2",
        eval_interval=5,
        eval_iters=40,
        log_interval=1,
        batch_size=1,
        gradient_accumulation_steps=32,
        loss_chunks=8,
        max_iters=20,
        learning_rate=3e-5,
        decay_lr=False,
        warmup_iters=0,
    ),
    # GPT-2 124M on OpenWebText: about 0.5M tokens an update, 300B in all. nanoGPT: loss 2.85, 4 days on 8 A100.
    "gpt2": TrainConfig(
        model=GPTConfig(bias=False, dtype="bfloat16"),
        dataset="openwebtext",
        out_dir=Path("out-gpt2"),
        batch_size=12 * 8,
        gradient_accumulation_steps=5,
        loss_chunks=8,
        eval_interval=1000,
    ),
}


def changed(config: GPTConfig) -> dict:
    """The fields of a GPTConfig that differ from GPT-2's defaults: what a user asks to override in a pretrained model."""
    return {
        f.name: v for f in dataclasses.fields(config) if (v := getattr(config, f.name)) != f.default
    }
