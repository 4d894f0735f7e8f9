"""The tokenizer in a GGUF file, as Hugging Face's library has it.

Start with `read_tokenizer`. llama.cpp stores the vocabulary, the merges and the name of the way in
which text is cut before; the rules behind each name are in its source (llama-vocab.cpp) and, the
same, in the tokenizer.json of the models that brought them. Only byte-level BPE, as GPT-2 has it,
is implemented. What is wrong with a file raises UserError.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from errors import UserError, require
from formats.gguf_file import Metadata
from formats.hugging_face import first_line, quote_some

if TYPE_CHECKING:
    import tokenizers

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Types of tokens: what merges make; what no text becomes; what stands in text for itself."""

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

SPLITS = {
    "gpt-2": (GPT2_SPLIT,),
    "smollm": (r"\p{N}", GPT2_SPLIT),
    "llama-bpe": (LLAMA3_SPLIT,),
    "qwen2": (QWEN2_SPLIT,),
}
"""The regular expressions by which text is cut, one after the other, by the names of
tokenizer.ggml.pre."""

ALIASES = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
}
"""Names of the same rules."""

WHOLE_WORDS_FIRST = ("llama-bpe",)
"""The rules under which a word that is in the vocabulary is one token, whatever the merges say."""

BEGIN_BY_DEFAULT = ("llama-bpe",)
"""The rules under which a text begins with the token for that, if the file does not say."""

END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>")
"""Control tokens that end an answer in every model that has them: many files name one alone."""


class GGUFTokenizer(NamedTuple):
    """A file's tokenizer."""

    json: str
    """The content of a tokenizer.json."""
    eos_id: int | None
    """The token that ends a document or a turn."""
    bos_id: int | None
    """The token that begins a document."""
    more_stop_ids: frozenset[int]
    """Tokens that end an answer as eos_id does."""


def read_tokenizer(metadata: Metadata, path: Path) -> GGUFTokenizer:
    """Return the tokenizer of a file's metadata; path stands in messages. Raises UserError."""
    rules = rules_of(metadata, path)
    tokens = texts(metadata, "tokens", path)
    kinds = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    require(
        isinstance(kinds, list) and len(kinds) == len(tokens),
        f"{path}: tokenizer.ggml.token_type must be a list of {len(tokens)}, as there are tokens",
    )
    require(len(set(tokens)) == len(tokens), f"{path}: tokenizer.ggml.tokens has one twice")
    bpe = make_bpe(rules, tokens, texts(metadata, "merges", path), path)
    add_whole_tokens(bpe, tokens, kinds)
    bos_id = token_id(metadata, "bos", tokens, path)
    if flag(metadata, "add_bos_token", rules in BEGIN_BY_DEFAULT, path):
        add_begin(bpe, tokens, bos_id, path)
    ends = [token_id(metadata, name, tokens, path) for name in ("eot", "eom")]
    ends += [i for i, text in enumerate(tokens) if kinds[i] == CONTROL and text in END_TOKENS]
    return GGUFTokenizer(
        bpe.to_str(),
        token_id(metadata, "eos", tokens, path),
        bos_id,
        frozenset(i for i in ends if i is not None),
    )


def read_chat_settings(metadata: Metadata, path: Path) -> dict[str, str]:
    """Return what tokenizer_config.json would say of chats: the template, and special tokens by
    the names that it may call them by."""
    tokens = texts(metadata, "tokens", path)
    settings = {}
    for name in ("bos", "eos"):
        token = token_id(metadata, name, tokens, path)
        if token is not None:
            settings[f"{name}_token"] = tokens[token]
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        require(isinstance(template, str), f"{path}: tokenizer.chat_template is no text")
        settings["chat_template"] = template
    return settings


def rules_of(metadata: Metadata, path: Path) -> str:
    """Return the name in SPLITS of the rules by which text is cut. Raises UserError for others."""
    model = metadata.get("tokenizer.ggml.model")
    require(
        model == "gpt2",
        f"{path}: tokenizer.ggml.model is {str(model)[:40]!r}, only byte-level BPE, 'gpt2', is "
        "implemented",
    )
    name = metadata.get("tokenizer.ggml.pre")
    rules = ALIASES.get(str(name), str(name))
    require(
        rules in SPLITS,
        f"{path}: tokenizer.ggml.pre is {str(name)[:40]!r}, only {', '.join([*SPLITS, *ALIASES])} "
        "are implemented",
    )
    require(
        not flag(metadata, "add_eos_token", False, path),
        f"{path}: tokenizer.ggml.add_eos_token, an end after each prompt, is not implemented",
    )
    return rules


def texts(metadata: Metadata, name: str, path: Path) -> list[str]:
    """Return a list of texts of the metadata. Raises UserError if it is none."""
    value = metadata.get(f"tokenizer.ggml.{name}")
    is_list = isinstance(value, list) and all(isinstance(text, str) for text in value)
    if not is_list or not value:
        raise UserError(f"{path} has no list of texts tokenizer.ggml.{name}")
    return value


def flag(metadata: Metadata, name: str, default: bool, path: Path) -> bool:
    """Return what is true or false in the metadata. Raises UserError if it is neither."""
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    require(isinstance(value, bool), f"{path}: tokenizer.ggml.{name} must be true or false")
    return value


def token_id(metadata: Metadata, name: str, tokens: list[str], path: Path) -> int | None:
    """Return the token that a file names for a purpose, None if it names none."""
    key = f"tokenizer.ggml.{name}_token_id"
    token = metadata.get(key)
    require(
        token is None or (type(token) is int and 0 <= token < len(tokens)),
        f"{path}: {key}={str(token)[:40]}, but the tokens are 0 to {len(tokens) - 1}",
    )
    return token


def make_bpe(
    rules: str, tokens: list[str], merges: list[str], path: Path
) -> "tokenizers.Tokenizer":
    """Return byte-level BPE with this vocabulary, without added tokens."""
    import tokenizers
    from tokenizers import pre_tokenizers

    wrong = [merge for merge in merges if merge.count(" ") != 1]
    require(not wrong, f"{path}: tokenizer.ggml.merges has no pair in {quote_some(wrong, 1)}")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        model = tokenizers.models.BPE(vocabulary, pairs, ignore_merges=rules in WHOLE_WORDS_FIRST)
    except Exception as e:  # the library raises nothing more special
        raise UserError(f"{path}: tokenizer.ggml.merges: {first_line(e)}") from e
    bpe = tokenizers.Tokenizer(model)
    cuts: list[Any] = [
        pre_tokenizers.Split(tokenizers.Regex(split), behavior="isolated")
        for split in SPLITS[rules]
    ]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    return bpe


def add_whole_tokens(bpe: "tokenizers.Tokenizer", tokens: list[str], kinds: list[int]) -> None:
    """Add the tokens that are not made by merges: control tokens, and those that are found in a
    text before it is cut."""
    from tokenizers import AddedToken

    added = [
        AddedToken(text, normalized=False, special=kind == CONTROL)
        for text, kind in zip(tokens, kinds, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
    bpe.add_tokens(added)


def add_begin(
    bpe: "tokenizers.Tokenizer", tokens: list[str], bos_id: int | None, path: Path
) -> None:
    """Let a text begin with the token for that."""
    from tokenizers.processors import TemplateProcessing

    if bos_id is None:
        raise UserError(
            f"{path}: a text shall begin with a token, but tokenizer.ggml.bos_token_id is missing"
        )
    begin = tokens[bos_id]
    bpe.post_processor = TemplateProcessing(single=[begin, "$A"], special_tokens=[(begin, bos_id)])
