"""Text to token ids and back: characters, GPT-2's BPE, or a Hugging Face directory's tokenizer.

Start with `Tokenizer`, which says what all three offer, and `CharTokenizer`, the plainest of them.
Each token stands for fixed bytes, whatever its neighbours, so decoding is concatenation and can be
streamed: see `StreamDecoder`. There is no JAX in here.
"""

import codecs
import itertools
import operator
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import UserError, require
from formats.byte_level import bytes_of, written
from formats.hugging_face import first_line, load_json, save_json

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"  # GPT-2's only special token, as text
UNKNOWN = "character outside of the vocabulary"  # what an exported CharTokenizer says it misses


class Tokenizer(ABC):
    """What every tokenizer offers. Ids are 0 ... vocab_size - 1."""

    name: str
    """The kind of tokenizer, as meta.json has it."""
    vocab_size: int
    """The number of ids."""
    eos_id: int | None
    """The token that ends a document, if the vocabulary has one."""
    bos_id: int | None = None
    """The token that begins a document, if the vocabulary has one for that alone."""
    prompt_prefix: tuple[int, ...] = ()
    """The tokens that stand before a prompt that is given as text: the one that begins a document,
    where the model was trained with it."""
    special_tokens: dict[str, int]
    """The tokens that no text becomes, by the text they are written as."""
    longest_token: int
    """Bytes of the longest token that text becomes."""
    hf_class = "PreTrainedTokenizerFast"
    """The class of transformers that loads what to_hf() returns."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of text. "<|endoftext|>" in it is ordinary text, not the special token."""

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of text as a prompt: with what the model wants to stand before it."""
        return [*self.prompt_prefix, *self.encode(text)]

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end an answer: eos_id, if there is one, and others of its kind."""
        return frozenset() if self.eos_id is None else frozenset([self.eos_id])

    def fewest_tokens(self, text: str) -> int:
        """Return a number of tokens that text has at least.

        It takes a millisecond where to encode a long text takes a second."""
        num_bytes = len(text.encode("utf-8", "surrogatepass"))
        return -(-num_bytes // self.longest_token)

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that one token stands for: not always whole UTF-8 characters."""

    @abstractmethod
    def meta(self) -> dict[str, Any]:
        """Return what from_meta needs to make this tokenizer again; it can be written as JSON."""

    def to_hf(self) -> "tokenizers.Tokenizer":
        """Return this tokenizer in the form that Hugging Face's library saves and loads.

        Only the tokenizers that can be exported have this form. It encodes as this one does, except
        that it reads the text of a special token as that token."""
        raise NotImplementedError(f"a {type(self).__name__} cannot be exported")

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids. Bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")


class CharTokenizer(Tokenizer):
    """One token per character: id i is chars[i]."""

    name = "char"

    def __init__(self, chars: str) -> None:
        self.chars = chars
        self.ids = {c: i for i, c in enumerate(chars)}
        assert len(self.ids) == len(chars), f"a character occurs twice in {chars!r}"
        self.vocab_size = len(chars)
        self.eos_id = None
        self.special_tokens = {}
        self.longest_token = max((len(c.encode("utf-8")) for c in chars), default=1)

    def encode(self, text: str) -> list[int]:
        """Return the ids of text. Raises UserError, naming them, if it has unknown characters."""
        try:
            return [self.ids[c] for c in text]
        except KeyError:
            unknown = "".join(sorted(set(text) - self.ids.keys()))
            raise UserError(
                f"the vocabulary of {self.vocab_size} characters does not have {unknown!r}: "
                "leave these out of the text"
            ) from None

    def token_bytes(self, token: int) -> bytes:
        """Return the character in UTF-8."""
        return self.chars[token].encode("utf-8")

    def meta(self) -> dict[str, Any]:
        """Return the kind and the characters."""
        return {"tokenizer": self.name, "chars": self.chars}

    def to_hf(self) -> "tokenizers.Tokenizer":
        """Return a BPE without merges, so that each character stays a token.

        Its unknown token is not in the vocabulary, so that it refuses what is unknown, and names
        that token; without one it would drop what is unknown."""
        import tokenizers

        hf = tokenizers.Tokenizer(tokenizers.models.BPE(self.ids, [], unk_token=UNKNOWN))
        hf.decoder = tokenizers.decoders.Fuse()  # joins the characters without spaces
        return hf


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE, through tiktoken, which downloads two files at first use."""

    name = "gpt2"
    hf_class = "GPT2Tokenizer"

    def __init__(self) -> None:
        """Raises UserError if the files are neither in tiktoken's cache nor to be downloaded."""
        import tiktoken  # here, because characters do not need it

        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except OSError as e:  # the errors of requests are OSErrors
            raise UserError(
                f"cannot download GPT-2's BPE files ({type(e).__name__}): without a network, "
                "set TIKTOKEN_CACHE_DIR to a tiktoken cache that holds them"
            ) from e
        self.vocab_size = self.bpe.n_vocab
        self.eos_id = self.bpe.eot_token
        self.special_tokens = {END_OF_TEXT: self.eos_id}
        self.longest_token = max(map(len, self.bpe.token_byte_values()))

    def encode(self, text: str) -> list[int]:
        """Return the ids of text, all of it ordinary. Other threads run meanwhile."""
        return self.bpe.encode_ordinary(text)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes as OpenAI's ranks have them."""
        return self.bpe.decode_single_token_bytes(token)

    def meta(self) -> dict[str, Any]:
        """Return the kind alone: there is one GPT-2 BPE."""
        return {"tokenizer": self.name}

    def to_hf(self) -> "tokenizers.Tokenizer":
        """Return the same BPE with the vocabulary and the merges that OpenAI published."""
        import tokenizers

        ranks = {self.token_bytes(i): i for i in range(self.vocab_size) if i != self.eos_id}
        vocab = {written(token): i for token, i in ranks.items()}
        vocab[END_OF_TEXT] = self.bpe.eot_token
        merges = []
        for token in ranks:  # in the order of their ranks, which is the order of the merges
            if len(token) > 1:
                left, right = last_merge(token, ranks)
                merges.append((written(left), written(right)))
        hf = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
        hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        hf.decoder = tokenizers.decoders.ByteLevel()
        end_of_text = tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=False)
        hf.add_special_tokens([end_of_text])
        return hf


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two tokens that BPE merges last to make token, which has at least two bytes.

    tiktoken has ranks; merges.txt wants pairs."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [left + right for left, right in zip(parts, parts[1:], strict=False)]
        pair_ranks = [ranks.get(pair, len(ranks)) for pair in pairs]
        first = pair_ranks.index(min(pair_ranks))
        parts[first : first + 2] = [pairs[first]]
    left, right = parts
    return left, right


class HFTokenizer(Tokenizer):
    """The byte-level BPE of a Hugging Face model directory, from the content of its tokenizer.json.

    meta() holds that whole content, so a checkpoint finetuned from a directory outlives it."""

    name = "hf"

    def __init__(
        self,
        tokenizer_json: str,
        eos_id: int | None,
        bos_id: int | None = None,
        more_stop_ids: Iterable[int] = (),
    ) -> None:
        """more_stop_ids: tokens that end an answer besides eos_id, such as the end of a turn.

        Raises UserError if the tokenizer is not byte-level BPE."""
        import tokenizers

        self.json = tokenizer_json
        self.eos_id = eos_id
        self.bos_id = bos_id
        self.more_stop_ids = frozenset(more_stop_ids)
        self.bpe = tokenizers.Tokenizer.from_str(tokenizer_json)
        require(
            isinstance(self.bpe.decoder, tokenizers.decoders.ByteLevel),
            f"the tokenizer decodes by {type(self.bpe.decoder).__name__}: "
            "only byte-level BPE, as GPT-2 has it, is supported",
        )
        self.bpe.encode_special_tokens = True  # that is: as ordinary text
        self.bpe.no_truncation()  # tokenizer.json may ask for truncation, and for padding
        self.bpe.no_padding()
        self.prompt_prefix = prefix_of(self.bpe)
        added = self.bpe.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in added.items() if token.special}
        self.bytes = {i: bytes_of(token) for token, i in self.bpe.get_vocab().items()}
        self.vocab_size = max(self.bytes) + 1
        ordinary = self.bytes.keys() - set(self.special_tokens.values())
        self.longest_token = max((len(self.bytes[i]) for i in ordinary), default=1)
        # What is normalised may become shorter, and some added tokens take spaces beside them.
        self.may_shorten = self.bpe.normalizer is not None or any(
            token.lstrip or token.rstrip for token in added.values()
        )

    @classmethod
    def from_directory(cls, directory: str | Path) -> "HFTokenizer":
        """Return the tokenizer of tokenizer.json, or of vocab.json and merges.txt.

        Raises UserError if directory has none of these, or a tokenizer of another kind."""
        directory = Path(directory)
        has_json = (directory / "tokenizer.json").is_file()
        has_bpe = (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file()
        # transformers makes an empty tokenizer, without a word, if config.json is all it finds.
        require(
            has_json or has_bpe,
            f"{directory} has no tokenizer.json, nor vocab.json and merges.txt",
        )
        from transformers import AutoTokenizer  # here, because its import takes seconds

        try:
            hf = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # the two libraries raise exceptions of many classes
            raise UserError(
                f"the tokenizer in {directory} cannot be read: {first_line(error)}"
            ) from error
        return cls(
            hf.backend_tokenizer.to_str(),
            hf.eos_token_id,
            hf.bos_token_id,
            read_stop_ids(directory, len(hf)),
        )

    @classmethod
    def from_gguf(cls, path: str | Path) -> "HFTokenizer":
        """Return the tokenizer of a GGUF file. Raises UserError if it is of another kind."""
        from formats.gguf_file import open_gguf  # here, because few models come as such files
        from formats.gguf_tokenizer import read_tokenizer

        file = open_gguf(path)
        return cls(*read_tokenizer(file.metadata, file.path))

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return super().stop_ids | self.more_stop_ids

    def encode(self, text: str) -> list[int]:
        """Return the ids of text. Half a surrogate pair, which JSON may hold, counts as U+FFFD.

        Other threads run meanwhile: encode_batch_fast does without Python's lock, and is faster
        than encode, because it does not note where in the text each token is."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        [encoding] = self.bpe.encode_batch_fast([text], add_special_tokens=False)
        return encoding.ids

    def fewest_tokens(self, text: str) -> int:
        """Return a number of tokens that text has at least; 0 where none is known."""
        return 0 if self.may_shorten else super().fewest_tokens(text)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that the token's characters stand for.

        None, if the vocabulary skips this id or ends before it, as that of a model may not: many
        models have rows to spare, which can be sampled."""
        return self.bytes.get(token, b"")

    def meta(self) -> dict[str, Any]:
        """Return the kind, the whole tokenizer.json and the ids of begin and end."""
        return {
            "tokenizer": self.name,
            "eos_id": self.eos_id,
            "bos_id": self.bos_id,
            "more_stop_ids": sorted(self.more_stop_ids),
            "tokenizer_json": self.json,
        }

    def to_hf(self) -> "tokenizers.Tokenizer":
        """Return the tokenizer that tokenizer.json describes, with its truncation and padding."""
        import tokenizers

        return tokenizers.Tokenizer.from_str(self.json)


def prefix_of(bpe: "tokenizers.Tokenizer") -> tuple[int, ...]:
    """Return the special tokens that a tokenizer puts before a text: the begin, or none."""
    encoding = bpe.encode("a", add_special_tokens=True)
    added = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
    return tuple(token for token, _ in itertools.takewhile(operator.itemgetter(1), added))


def read_stop_ids(directory: Path, vocab_size: int) -> frozenset[int]:
    """Return the tokens that end an answer by a directory's generation_config.json or, without
    one, config.json; often there are several, the end of a turn and that of a document.

    Raises UserError if they are no tokens."""
    file = directory / "generation_config.json"
    if not file.is_file():
        file = directory / "config.json"
    if not file.is_file():
        return frozenset()
    value = load_json(file).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        require(
            type(token) is int and 0 <= token < vocab_size,
            f"{file}: eos_token_id={value!r}, but the tokenizer's tokens are 0 to {vocab_size - 1}",
        )
    return frozenset(ids)


# From files and into them


def from_meta(meta: dict[str, Any], file: str | Path = "meta.json") -> Tokenizer:
    """Return the tokenizer whose meta() this is, or a part of. `file` is where it comes from.

    A vocab_size in it must be large enough; its other keys are not looked at. Raises UserError,
    naming file and key, if they are damaged or the tokenizer is none of the known ones."""
    tokenizer: Tokenizer
    match meta.get("tokenizer"):
        case "char":
            tokenizer = CharTokenizer(read_characters(meta, file))
        case "gpt2":
            tokenizer = GPT2Tokenizer()
        case "hf":
            tokenizer = read_hf(meta, file)
        case other:
            raise UserError(
                f"{file} names the tokenizer {other!r}; the known ones are char, gpt2 and hf"
            )
    if "vocab_size" in meta:
        vocab_size = field_of(meta, "vocab_size", int, file)
        fits = vocab_size >= tokenizer.vocab_size
        if isinstance(tokenizer, CharTokenizer):  # other vocabularies may have ids to spare
            fits = vocab_size == tokenizer.vocab_size
        require(
            fits,
            f"{file} has vocab_size={vocab_size}, and its tokenizer has {tokenizer.vocab_size} "
            "tokens: one of them is damaged",
        )
    return tokenizer


def field_of(meta: dict[str, Any], name: str, kind: type, file: str | Path) -> Any:
    """Return a field of a meta.json. Raises UserError if it is missing or of another type."""
    require(name in meta, f"{file} has no {name}, which its tokenizer needs: it is damaged")
    value = meta[name]
    require(
        type(value) is kind,  # not isinstance: true is an int to Python
        f"{file} has {name}={value!r:.60}, which is no {kind.__name__}: it is damaged",
    )
    return value


def read_characters(meta: dict[str, Any], file: str | Path) -> str:
    """Return the characters of a CharTokenizer, one for each id. Raises UserError."""
    chars = field_of(meta, "chars", str, file)
    require(len(chars) > 0, f"{file} has no character in chars: it is damaged")
    for c, times in Counter(chars).items():
        require(times == 1, f"{file} has {c!r} {times} times in chars: it is damaged")
    half = any("\ud800" <= c <= "\udfff" for c in chars)
    require(not half, f"{file} has half a surrogate pair in chars: it is damaged")
    return chars


def read_hf(meta: dict[str, Any], file: str | Path) -> HFTokenizer:
    """Return the HFTokenizer that a meta.json holds. Raises UserError."""
    tokenizer_json = field_of(meta, "tokenizer_json", str, file)
    ids: dict[str, int | None] = {}
    for name in ("eos_id", "bos_id"):  # older versions wrote no bos_id
        ids[name] = None
        if meta.get(name) is not None:
            ids[name] = field_of(meta, name, int, file)
    more_stop_ids = field_of({"more_stop_ids": [], **meta}, "more_stop_ids", list, file)
    try:
        tokenizer = HFTokenizer(tokenizer_json, ids["eos_id"], ids["bos_id"], more_stop_ids)
    except UserError:
        raise
    except Exception as error:  # the library has no class of its own for what it cannot read
        raise UserError(
            f"{file} has a tokenizer_json that is no tokenizer: {first_line(error)}"
        ) from error
    for name, value in [*ids.items(), *(("more_stop_ids", token) for token in more_stop_ids)]:
        require(
            value is None or (type(value) is int and 0 <= value < tokenizer.vocab_size),
            f"{file} has {name}={value}, and its tokenizer has {tokenizer.vocab_size} tokens",
        )
    return tokenizer


def read_tokenizer(directory: Path) -> Tokenizer:
    """Return the tokenizer of a model directory. Raises UserError.

    A run of train.py has a meta.json, and so has an exported CharTokenizer, see write_tokenizer;
    other directories have the files of Hugging Face's tokenizers."""
    meta = directory / "meta.json"
    if meta.is_file():
        return from_meta(load_json(meta), meta)
    return HFTokenizer.from_directory(directory)


def write_tokenizer(directory: Path, tokenizer: Tokenizer, block_size: int) -> None:
    """Write what transformers' AutoTokenizer and read_tokenizer make the tokenizer from again.

    The files are tokenizer.json, vocab.json, merges.txt and tokenizer_config.json; for a
    CharTokenizer meta.json too, because read_tokenizer knows byte-level BPE only. Tokenizer.to_hf
    says in what transformers' differs."""
    settings = {
        "tokenizer_class": tokenizer.hf_class,
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
    }
    hf = tokenizer.to_hf()
    if tokenizer.eos_id is not None:
        eos = hf.id_to_token(tokenizer.eos_id)
        bos = eos if tokenizer.bos_id is None else hf.id_to_token(tokenizer.bos_id)
        settings |= {"bos_token": bos, "eos_token": eos}
    hf.save(str(directory / "tokenizer.json"))
    hf.model.save(str(directory))
    save_json(directory / "tokenizer_config.json", settings)
    if isinstance(tokenizer, CharTokenizer):
        save_json(directory / "meta.json", tokenizer.meta())


# Piece by piece


class StreamDecoder:
    """Decodes tokens as they come, at constant cost per token.

    What push() and finish() return adds up to decode(all ids). A character whose bytes are spread
    over several tokens is held back until it is whole, so U+FFFD comes out only for bytes that no
    later token can complete."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = False) -> None:
        """skip_special_tokens: whether special tokens count as no text."""
        self.tokenizer = tokenizer
        self.skipped = set(tokenizer.special_tokens.values()) if skip_special_tokens else set()
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """Return the text that ids complete."""
        with_text = (token for token in ids if token not in self.skipped)
        return self.decoder.decode(b"".join(map(self.tokenizer.token_bytes, with_text)))

    def finish(self) -> str:
        """Return what was held back: no more tokens will come."""
        return self.decoder.decode(b"", final=True)
