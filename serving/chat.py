"""A chat as a prompt: the Jinja templates that Hugging Face's models bring, rendered by transformers in Jinja's sandbox.

A special token in the template is that token. The same characters in what a user says are ordinary text, so that nobody can
end his turn and speak in another's name.
"""

import re
from pathlib import Path

import pretrained
from config import ServeConfig
from errors import require
from tokenizer import Tokenizer

MARK = "\ufdd0"  # a noncharacter, put before what looks like a special token in a message, and taken out again
NAMES = {"bos_token", "eos_token"}  # by which templates call special tokens


class ChatTemplate:
    """Renders messages and encodes them."""

    def __init__(self, source: str, tokenizer: Tokenizer, names: dict[str, str]):
        """names: what the template may call eos_token and so on. Raises ValueError if source is no Jinja template."""
        from jinja2 import (
            TemplateSyntaxError,  # here, as transformers takes a second, and most servers need neither
        )
        from transformers.utils.chat_template_utils import render_jinja_template

        self.source, self.tokenizer, self.names, self.render_jinja = (
            source,
            tokenizer,
            names,
            render_jinja_template,
        )
        longest_first = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self.special = "|".join(map(re.escape, longest_first)) or "(?!)"
        try:
            self.render([{"role": "user", "content": "Hello"}], True)
        except TemplateSyntaxError as e:
            raise ValueError(f"the chat template is no Jinja: line {e.lineno}: {e.message}") from e
        except Exception:
            pass  # it may want another chat than this one

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        texts, _ = self.render_jinja(
            [messages],
            chat_template=self.source,
            add_generation_prompt=add_generation_prompt,
            **self.names,
        )
        return texts[0]

    def encode(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> list[int]:
        """The prompt's token ids. Raises ValueError if the template refuses the messages, or the vocabulary their characters."""
        mark = lambda text: re.sub(f"(?={self.special})", MARK, text.replace(MARK, ""))
        try:
            text = self.render(
                [m | {"content": mark(m["content"])} for m in messages], add_generation_prompt
            )
        except Exception as e:  # whatever Python raises in a template: to the client it has refused
            raise ValueError(f"the chat template does not take these messages: {e}") from e
        ids = []
        for i, piece in enumerate(
            re.split(f"(?<!{MARK})({self.special})", text)
        ):  # text, special token, text, ..., text
            ids += (
                [self.tokenizer.special_tokens[piece]]
                if i % 2
                else self.tokenizer.encode(piece.replace(MARK, ""))
            )
        return ids


def load_template(config: ServeConfig, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template of the file config.chat_template or else of the directory config.init_from; None if neither has one."""
    directory = (
        Path(config.init_from)
        if config.init_from and config.init_from not in pretrained.HUB
        else None
    )
    settings = {}
    if directory and (directory / "tokenizer_config.json").is_file():
        settings = pretrained.load_json(directory / "tokenizer_config.json")
    source = settings.get("chat_template")
    if config.chat_template:
        source = config.chat_template.read_text(encoding="utf-8")
    elif directory and (directory / "chat_template.jinja").is_file():
        source = (directory / "chat_template.jinja").read_text(encoding="utf-8")
    if source is None:
        return None
    require(
        isinstance(source, str),
        f"{directory} has several chat templates: say which with --chat_template=FILE",
    )
    names = {
        name: text
        for text, token in tokenizer.special_tokens.items()
        if token == tokenizer.eos_id
        for name in NAMES
    }
    for name in NAMES.intersection(settings):
        names[name] = (
            settings[name]["content"] if isinstance(settings[name], dict) else settings[name]
        )
    return ChatTemplate(source, tokenizer, names)
