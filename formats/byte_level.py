"""How byte-level BPE writes bytes in its files: each as one printable character."""


def byte_of_each_character() -> dict[str, int]:
    """Return the printable character that stands for each byte, by character.

    Bytes that are printable in Latin-1 are written as themselves, the others, in order, as the
    characters from U+0100 on (openai/gpt-2, encoder.py: bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(0x100 + i): byte for i, byte in enumerate(others)}
    return byte_of


BYTE_OF = byte_of_each_character()
CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}


def bytes_of(token: str) -> bytes:
    """Return the bytes of a byte-level BPE token.

    An added token that is not written that way is its own text."""
    if all(c in BYTE_OF for c in token):
        return bytes(BYTE_OF[c] for c in token)
    return token.encode("utf-8")


def written(token: bytes) -> str:
    """Return a token of these bytes as vocab.json and merges.txt write it."""
    return "".join(CHARACTER_OF[byte] for byte in token)
