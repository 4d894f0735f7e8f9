"""Text to token ids and back: characters, GPT-2's BPE, or a Hugging Face directory's tokenizer. No JAX.

Each token stands for fixed bytes, whatever its neighbours: decoding is concatenation, so it streams.
"""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path


class Tokenizer(ABC):
    """What every tokenizer offers; ids are 0 ... vocab_size - 1."""

    name: str
    vocab_size: int
    eos_id: int | None
    """the token that ends a document, if the vocabulary has one"""
    special_tokens: dict[str, int]
    """the tokens that no text becomes, by the text they are written as"""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of text. "<|endoftext|>" in it is ordinary text, never the special token."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token stands for: not always whole UTF-8 characters."""

    @abstractmethod
    def meta(self) -> dict:
        """What from_meta needs to make this tokenizer again; can be written as JSON."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")


class CharTokenizer(Tokenizer):
    """One token per character: id i is chars[i]."""

    name = "char"
    eos_id = None
    special_tokens = {}

    def __init__(self, chars: str):
        self.chars = chars
        self.ids = {c: i for i, c in enumerate(chars)}
        assert len(self.ids) == len(chars), f"a character occurs twice in {chars!r}"
        self.vocab_size = len(chars)

    def encode(self, text: str) -> list[int]:
        """Raises ValueError, naming them, if text has characters outside the vocabulary."""
        try:
            return [self.ids[c] for c in text]
        except KeyError:
            unknown = "".join(sorted(set(text) - self.ids.keys()))
            raise ValueError(
                f"the vocabulary of {self.vocab_size} characters does not have {unknown!r}: "
                "leave these out of the text"
            ) from None

    def token_bytes(self, token: int) -> bytes:
        return self.chars[token].encode("utf-8")

    def meta(self) -> dict:
        return {"tokenizer": self.name, "chars": self.chars}


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE, through tiktoken, which downloads two files at first use."""

    name = "gpt2"

    def __init__(self):
        import tiktoken  # here, because characters do not need it

        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except OSError as e:  # requests' errors are OSErrors
            raise ValueError(
                f"cannot download GPT-2's BPE files ({type(e).__name__}): without a network, "
                "set TIKTOKEN_CACHE_DIR to a tiktoken cache that holds them"
            ) from e
        self.vocab_size = self.bpe.n_vocab
        self.eos_id = self.bpe.eot_token
        self.special_tokens = {"<|endoftext|>": self.eos_id}

    def encode(self, text: str) -> list[int]:
        return self.bpe.encode_ordinary(text)

    def token_bytes(self, token: int) -> bytes:
        return self.bpe.decode_single_token_bytes(token)

    def meta(self) -> dict:
        return {"tokenizer": self.name}


class HFTokenizer(Tokenizer):
    """The byte-level BPE of a Hugging Face model directory (tokenizer.json, or vocab.json and merges.txt).

    meta() holds the whole tokenizer.json, so a checkpoint finetuned from that directory outlives it."""

    name = "hf"

    def __init__(self, directory: str | Path):
        """Raises ValueError if directory has no tokenizer, or one that is not byte-level BPE."""
        directory = Path(directory)
        # transformers makes an empty tokenizer, without a word, where config.json is all it finds.
        if not any(
            all((directory / f).is_file() for f in files)
            for files in (["tokenizer.json"], ["vocab.json", "merges.txt"])
        ):
            raise ValueError(f"{directory} has no tokenizer.json, nor vocab.json and merges.txt")
        from transformers import AutoTokenizer  # here, because its import takes seconds

        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        self._build(tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id)

    @classmethod
    def from_json(cls, tokenizer_json: str, eos_id: int | None) -> "HFTokenizer":
        """From the content of a tokenizer.json."""
        self = cls.__new__(cls)
        self._build(tokenizer_json, eos_id)
        return self

    def _build(self, tokenizer_json: str, eos_id: int | None) -> None:
        import tokenizers

        self.json, self.eos_id = tokenizer_json, eos_id
        self.bpe = tokenizers.Tokenizer.from_str(tokenizer_json)
        if not isinstance(self.bpe.decoder, tokenizers.decoders.ByteLevel):
            raise ValueError(
                f"the tokenizer decodes by {type(self.bpe.decoder).__name__}: "
                "only byte-level BPE, as GPT-2 has it, is supported"
            )
        self.bpe.encode_special_tokens = True  # that is: as ordinary text
        self.bpe.no_truncation()  # tokenizer.json may ask for either
        self.bpe.no_padding()
        self.special_tokens = {
            t.content: i for i, t in self.bpe.get_added_tokens_decoder().items() if t.special
        }
        self.bytes = {i: bytes_of(token) for token, i in self.bpe.get_vocab().items()}
        self.vocab_size = max(self.bytes) + 1

    def encode(self, text: str) -> list[int]:
        text = text.encode("utf-16", "surrogatepass").decode(
            "utf-16", "replace"
        )  # JSON may hold half a pair
        return self.bpe.encode(text, add_special_tokens=False).ids

    def token_bytes(self, token: int) -> bytes:
        return self.bytes[token]

    def meta(self) -> dict:
        return {"tokenizer": self.name, "eos_id": self.eos_id, "tokenizer_json": self.json}


# Byte-level BPE writes each byte as a printable character: those that are printable in Latin-1 as themselves,
# the others, in order, as the characters from U+0100 on (openai/gpt-2, encoder.py: bytes_to_unicode).
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF = {chr(b): b for b in PRINTABLE}
BYTE_OF |= {chr(0x100 + i): b for i, b in enumerate(sorted(set(range(256)) - set(PRINTABLE)))}


def bytes_of(token: str) -> bytes:
    """The bytes of a byte-level BPE token; an added token that is not written that way is its own text."""
    if all(c in BYTE_OF for c in token):
        return bytes(BYTE_OF[c] for c in token)
    return token.encode("utf-8")


def from_meta(meta: dict) -> Tokenizer:
    """The tokenizer whose meta() this is; the other keys that data/NAME/meta.json has are not looked at."""
    match meta.get("tokenizer"):
        case "char":
            return CharTokenizer(meta["chars"])
        case "gpt2":
            return GPT2Tokenizer()
        case "hf":
            return HFTokenizer.from_json(meta["tokenizer_json"], meta["eos_id"])
        case other:
            raise ValueError(
                f"meta.json names the tokenizer {other!r}; the known ones are char, gpt2 and hf"
            )


class StreamDecoder:
    """Decodes tokens as they come, at constant cost per token.

    What push() and finish() return adds up to decode(all ids). A character whose bytes are spread over tokens
    is held back until it is whole, so U+FFFD comes out only for bytes that no later token can complete."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that ids complete."""
        return self.decoder.decode(b"".join(map(self.tokenizer.token_bytes, ids)))

    def finish(self) -> str:
        """What was held back: no more tokens will come."""
        return self.decoder.decode(b"", final=True)
