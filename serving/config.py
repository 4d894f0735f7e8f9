"""The knobs of server.py. No JAX in here: flags come first."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from config import EngineConfig, ModelConfig
from errors import require, require_at_least
from flags import MemorySize, default_is


@dataclass(frozen=True)
class ServeConfig(ModelConfig):
    """Serve a model, of --out_dir=DIR or --init_from=gpt2..., as OpenAI's API over HTTP."""

    engine: EngineConfig = EngineConfig()
    """The engine that runs it."""
    served_model_name: Annotated[str | None, default_is("the last part of its path")] = None
    """What clients call the model."""
    chat_template: Annotated[Path | None, default_is("the one in init_from, if any")] = None
    """A Jinja file that makes a prompt of a chat, for /v1/chat/completions."""
    # The port.
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 lets other machines in: set api_key too."""
    port: int = 8000
    """Port to listen on. 0 takes a free one; the log says which."""
    api_key: str | None = dataclasses.field(default=None, repr=False)
    """What clients must show on every route but /health. It is better in the environment, as
    NANOGPT_API_KEY: there `ps` does not show it."""
    cors_origins: tuple[str, ...] = ()
    """Pages of these origins may call the API from a browser."""
    log_format: Literal["auto", "text", "json"] = "auto"
    """json writes an object a line to stderr, text short lines for people; auto is text on a
    terminal and json elsewhere."""
    # What one client may ask for.
    max_waiting: int = 256
    """Prompts that may wait for the engine. With more, new requests are answered 429."""
    max_body_bytes: MemorySize = 2**20
    """Longest body of a request: bytes, or a number with a unit."""
    max_prompts: int = 64
    """Most prompts of a request."""
    max_n: int = 16
    """Most samples per prompt."""
    max_logprobs: int = 20
    """Most of the likeliest tokens reported per position; at most the engine's 20."""
    max_total_logprobs: int = 2**18
    """Most logprobs of an answer: prompts x n x positions x alternatives. These take 50 MB."""
    max_stop: int = 16
    """Most stop strings of a request."""
    # How it ends.
    drain_timeout: float = 30.0
    """Seconds that running requests have to finish after SIGTERM."""
    step_timeout: float = 60.0
    """Seconds after which a step of the engine counts as stuck, and /health says so."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "max_waiting", "max_body_bytes", "max_prompts", "max_n")
        require_at_least(self, 0, "max_stop", "max_total_logprobs", "drain_timeout", "step_timeout")
        for name, most in (("port", 2**16 - 1), ("max_logprobs", 20)):
            value = getattr(self, name)
            require(0 <= value <= most, f"{name}={value} must be from 0 to {most}", param=name)
        require(
            self.max_prompts <= self.max_waiting,
            f"max_prompts={self.max_prompts} must be at most max_waiting={self.max_waiting}: "
            "more could never be admitted",
            param="max_prompts",
        )
        require(self.api_key != "", "api_key must not be empty", param="api_key")

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return self.served_model_name or Path(self.init_from or str(self.out_dir)).resolve().name
