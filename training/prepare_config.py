"""The knobs of prepare.py. No JAX in here: flags come first."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from errors import require, require_at_least
from flags import default_is


@dataclass(frozen=True)
class PrepareConfig:
    """Turn text into the token files that train.py reads."""

    name: tyro.conf.Positional[
        Literal["pystdlib_char", "shakespeare_char", "shakespeare", "openwebtext", "text", "chat"]
    ]
    """pystdlib_char: this Python's own standard library, by characters, which needs no network;
    shakespeare_char and shakespeare: Tiny Shakespeare, by characters and in GPT-2's tokens;
    openwebtext: 8 million web pages, in GPT-2's tokens; text: your own files;
    chat: conversations, in the tokens and with the chat template of the model of init_from."""
    input: tuple[Path, ...] = ()
    """UTF-8 files: what text is made of, or your Tiny Shakespeare if there is no network. Of chat:
    JSON lines, each a conversation as OpenAI has it: {"messages": [{"role": ..., "content": ...},
    ...]}."""
    val_input: Annotated[tuple[Path, ...], default_is("every tenth of input", of="()")] = ()
    """Of chat: files like input, with the conversations to validate on."""
    init_from: Annotated[str | None, default_is("none; chat needs one")] = None
    """Of chat: the model to be taught, a Hugging Face directory or a GGUF file."""
    tokenizer: Annotated[Literal["char", "gpt2"] | None, default_is("gpt2")] = None
    """Tokens of text: characters, or GPT-2's BPE. The other names say theirs."""
    out_dir: Annotated[Path | None, default_is("data/NAME")] = None
    """Directory for train.bin, val.bin and meta.json, in place of those of an earlier run."""
    num_proc: Annotated[int | None, default_is("half the CPU cores")] = None
    """Processes that tokenize openwebtext."""
    verify: bool = False
    """Write nothing: compare the files that are there with the sizes and SHA-256 in meta.json, and
    every token with the vocabulary."""

    def __post_init__(self) -> None:
        require(
            self.tokenizer in (None, self.tokenizer_name),
            f"{self.name} has tokenizer={self.tokenizer_name}: "
            f"use text for tokenizer={self.tokenizer}",
            param="tokenizer",
        )
        require(
            bool(self.input) or self.verify or self.name not in ("text", "chat"),
            f"{self.name} needs the files it is made of: --input FILE ...",
            param="input",
        )
        require(
            not self.input or self.name not in ("pystdlib_char", "openwebtext"),
            f"{self.name} takes no input: use text for your own files",
            param="input",
        )
        require(
            self.num_proc is None or self.name == "openwebtext",
            "num_proc is for openwebtext alone",
            param="num_proc",
        )
        require_at_least(self, 1, "num_proc")
        self._check_chat()

    def _check_chat(self) -> None:
        """Raise UserError where the model of a chat is missing, or another name has one."""
        if self.name == "chat":
            require(
                self.init_from is not None or self.verify,
                "chat needs the model that shall learn: --init_from=FILE.gguf, or a Hugging Face "
                "directory",
                param="init_from",
            )
            return
        for name in ("init_from", "val_input"):
            require(not getattr(self, name), f"{name} is for chat alone", param=name)

    @property
    def tokenizer_name(self) -> str:
        """Tokenizer of the data set: char, gpt2, or hf, a model's own."""
        if self.name == "text":
            return self.tokenizer or "gpt2"
        if self.name == "chat":
            return "hf"
        return "char" if self.name.endswith("_char") else "gpt2"

    @property
    def data_path(self) -> Path:
        """Directory for train.bin, val.bin and meta.json."""
        return self.out_dir or Path("data") / self.name
