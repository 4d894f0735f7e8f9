"""A chat as a prompt: the Jinja templates of Hugging Face's models, in Jinja's sandbox.

A special token that the template writes is that token. The same characters in what a user says are
ordinary text, so that nobody can end his turn and speak in another's name. Start with
ChatTemplate.encode.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from config import SampleConfig
from errors import UserError, read_text, require
from formats import hugging_face
from formats.gguf_file import is_gguf, open_gguf
from formats.gguf_tokenizer import read_chat_settings
from formats.hub import HUB
from serving.config import ServeConfig
from serving.tool_calls import knows_tools, style_of
from serving.tools import as_plain_messages
from tokenizer import Tokenizer

MARK = "\ufdd0"
"""A noncharacter, put before what looks like a special token in a message, and taken out again."""

SPECIAL_NAMES = {"bos_token", "eos_token"}
"""By these names templates call special tokens."""

NO_CHAT_TEMPLATE = (
    "this model has no chat template: start with --chat_template=FILE, or with an --init_from=DIR "
    "that brings one in tokenizer_config.json or chat_template.jinja, or with a GGUF file or an "
    "--out_dir=DIR that has one"
)

MATCHES_NOTHING = "(?!)"
"""The regular expression for the special tokens of a vocabulary that has none."""


class ChatTemplate:
    """Makes token ids of a chat's messages."""

    def __init__(self, source: str, tokenizer: Tokenizer, special_names: dict[str, str]) -> None:
        """source: the template. special_names: the text of the special tokens that it may call by
        name, such as {"eos_token": "<|im_end|>"}. Raises UserError if source is no Jinja."""
        # Imported here, because transformers takes a second, and most servers have no template.
        from transformers.utils.chat_template_utils import render_jinja_template

        self.source = source
        self.knows_tools = knows_tools(source)
        self.call_style = style_of(source)
        self.tokenizer = tokenizer
        self.special_names = special_names
        self.render_jinja_template: Callable[..., Any] = render_jinja_template
        longest_first = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self.special_tokens = "|".join(map(re.escape, longest_first)) or MATCHES_NOTHING
        self._check_syntax()

    def encode(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
    ) -> list[int]:
        """Return the token ids of the prompt, which tells of the tools if there are any.

        It ends as an assistant's turn begins, or within the last message, whose turn is left open,
        or, with neither, with the last turn. Raises UserError if the template refuses the messages
        or makes nothing of them, and ValueError if the vocabulary lacks their characters."""
        if not self.knows_tools:
            messages = as_plain_messages(messages, tools or [])
            tools = None
        marked = self._mark_all(messages)
        marked_tools = self._mark_all(tools)
        try:
            text = self._render(marked, add_generation_prompt, continue_final_message, marked_tools)
        except Exception as error:  # a template may raise anything: to the client it has refused
            raise UserError(f"the chat template does not take these messages: {error}") from error
        token_ids = self._encode_marked(text)
        require(len(token_ids) > 0, "the chat template makes an empty prompt of these messages")
        return token_ids

    def _check_syntax(self) -> None:
        from jinja2 import TemplateSyntaxError

        try:
            self._render([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
        except TemplateSyntaxError as error:
            raise UserError(
                f"the chat template is no Jinja: line {error.lineno}: {error.message}",
                param="chat_template",
            ) from error
        except Exception:
            pass  # it may want another chat than this one

    def _render(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        texts, _ = self.render_jinja_template(
            [messages],
            tools=tools or None,
            chat_template=self.source,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **self.special_names,
        )
        return texts[0]

    def _mark_all(self, said: Any) -> Any:
        """Return JSON with all its texts marked: contents, arguments, descriptions of tools."""
        if isinstance(said, str):
            return self._mark(said)
        if isinstance(said, list):
            return [self._mark_all(item) for item in said]
        if isinstance(said, dict):
            return {self._mark(key): self._mark_all(value) for key, value in said.items()}
        return said

    def _mark(self, text: str) -> str:
        """Return what a user says with a MARK before all that looks like a special token."""
        return re.sub(f"(?={self.special_tokens})", MARK, text.replace(MARK, ""))

    def _encode_marked(self, text: str) -> list[int]:
        """Return the ids of a rendered template: special tokens where no MARK stands before."""
        # The pieces are text, special token, text, ..., special token, text.
        pieces = re.split(f"(?<!{MARK})({self.special_tokens})", text)
        token_ids = []
        for number, piece in enumerate(pieces):
            is_special = number % 2 == 1
            if is_special:
                token_ids.append(self.tokenizer.special_tokens[piece])
            else:
                token_ids += self.tokenizer.encode(piece.replace(MARK, ""))
        return token_ids


def load_template(config: ServeConfig | SampleConfig, tokenizer: Tokenizer) -> ChatTemplate | None:
    """Return the template of the file config.chat_template or else of the model: a directory or
    GGUF file, or a run of train.py on conversations; None if neither has one.

    Raises UserError if the directory has several, or one that is no Jinja."""
    directory = model_directory(config)
    settings = load_settings(config, directory)
    source = find_source(config, directory, settings)
    if source is None:
        return None
    require(
        isinstance(source, str),
        f"{directory} has several chat templates: say which with --chat_template=FILE",
        param="chat_template",
    )
    return ChatTemplate(source, tokenizer, find_special_names(settings, tokenizer))


def model_directory(config: ServeConfig | SampleConfig) -> Path | None:
    """Return the Hugging Face directory that the model comes from, None if it comes from none."""
    if config.init_from is None or config.init_from in HUB or is_gguf(config.init_from):
        return None
    return Path(config.init_from)


def load_settings(config: ServeConfig | SampleConfig, directory: Path | None) -> dict[str, Any]:
    """Return the content of the directory's tokenizer_config.json, which it need not have, or what
    a GGUF file or a run of train.py says of the same."""
    if config.out_dir is not None and (config.out_dir / "meta.json").is_file():
        return hugging_face.load_json(config.out_dir / "meta.json").get("chat", {})
    if config.init_from is not None and is_gguf(config.init_from):
        file = open_gguf(config.init_from)
        return read_chat_settings(file.metadata, file.path)
    if directory is None or not (directory / "tokenizer_config.json").is_file():
        return {}
    return hugging_face.load_json(directory / "tokenizer_config.json")


def find_source(
    config: ServeConfig | SampleConfig, directory: Path | None, settings: dict[str, Any]
) -> Any:
    """Return the template's text, None if there is none, or the list that old settings may have."""
    if config.chat_template is not None:
        return read_text(config.chat_template, param="chat_template")
    if directory is not None and (directory / "chat_template.jinja").is_file():
        return read_text(directory / "chat_template.jinja", param="init_from")
    return settings.get("chat_template")


def find_special_names(settings: dict[str, Any], tokenizer: Tokenizer) -> dict[str, str]:
    """Return the text of bos_token and eos_token: what the settings say or, without them, the
    tokenizer's end-of-text token for both, as GPT-2 has it."""
    special_names = {}
    for text, token in tokenizer.special_tokens.items():
        if token == tokenizer.eos_id:
            special_names = dict.fromkeys(SPECIAL_NAMES, text)
    for name in SPECIAL_NAMES.intersection(settings):
        value = settings[name]  # a text, or an added token with all its properties
        special_names[name] = value["content"] if isinstance(value, dict) else value
    return special_names
