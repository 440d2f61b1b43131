"""Text as tokens: the tokenizers that `model.tokenizer` names, and files of text. Knows neither torch nor megatron."""

import codecs
import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hptool import files
from hptool.base_config import BaseConfig
from hptool.errors import InputError

Tokens = NDArray[np.int64]

#: What is checked of a file at a time.
_PIECE_BYTES = 2**24

#: End of a document in vocabularies of Hugging Face's, where `model.tokenizer.eos_token` does not say it.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


class Tokenizer(Protocol):
    """Text to tokens and back. `end` stands behind each document."""

    vocab_size: int
    end: int

    def encode(self, text: str) -> list[int]:
        """The text's tokens, and no others around them."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of these tokens; what is none shows as a replacement character."""


class ByteTokenizer:
    """A token for each byte of UTF-8, and one for the end of a document."""

    end = 256
    vocab_size = 257

    def encode(self, text: str) -> list[int]:
        """As `Tokenizer.encode`."""
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        """As `Tokenizer.decode`; the ends of documents show as blank lines."""
        parts = [b"\n\n" if token == self.end else bytes([token]) if token < self.end else b"\xff" for token in tokens]
        return b"".join(parts).decode(errors="replace")


class HuggingFaceTokenizer:
    """A `tokenizer.json` of Hugging Face's, by their library."""

    def __init__(self, path: Path, end: str | None) -> None:
        tokenizers = importlib.import_module("tokenizers")  # an optional extra, see tokenizer_of

        text = files.read_text(path)
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # their Rust code knows no other kind
            raise InputError(f"{path}: not a tokenizer of Hugging Face's: {error}") from error
        wanted = [end] if end else _ENDS
        known = [token for token in wanted if self._tokenizer.token_to_id(token) is not None]
        if not known:
            raise InputError(
                f"model.tokenizer.eos_token: {end!r} given, allowed is a token of {path} that ends a document"
            )
        self.end: int = self._tokenizer.token_to_id(known[0])
        self.vocab_size: int = self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """As `Tokenizer.encode`."""
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """As `Tokenizer.decode`."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=False)
        return text


def tokenizer_of(config: BaseConfig) -> Tokenizer:
    """What `model.tokenizer` names. InputError for one that hptool has not, or that the vocabulary has no room for."""
    given = config.model.tokenizer
    library = given.get("library")
    tokenizer: Tokenizer
    if library == "byte-level":
        tokenizer = ByteTokenizer()
    elif library == "huggingface":
        if importlib.util.find_spec("tokenizers") is None:
            raise InputError(
                "model.tokenizer.library: 'huggingface' given, which needs tokenizers: pip install 'hptool[tokenizers]'"
            )
        path = Path(str(given.get("type")))
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise InputError(
                f"model.tokenizer.type: {given.get('type')!r} given, allowed with library huggingface is the path of "
                "a tokenizer.json"
            )
        tokenizer = HuggingFaceTokenizer(path, given.get("eos_token"))
    else:
        raise InputError(
            f"model.tokenizer.library: {library!r} given, allowed where hptool itself reads text is byte-level "
            "(a token a byte), or huggingface with the path of a tokenizer.json as model.tokenizer.type"
        )
    if tokenizer.vocab_size > config.shape.vocab_size:
        raise InputError(
            f"model.override_vocab_size: {config.shape.vocab_size} given, allowed with this tokenizer is "
            f"{tokenizer.vocab_size} or more"
        )
    return tokenizer


def is_text(prefix: str) -> bool:
    """It names a file of text: what has an .idx file beside it is a tokenised set, whatever it is called."""
    return not Path(f"{prefix}.idx").exists() and Path(prefix).is_file()


def check_text(path: Path) -> None:
    """InputError where the file is empty, cannot be read or is no UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    size = 0
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                decoder.decode(piece)
                size += len(piece)
            decoder.decode(b"", final=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason}); allowed are UTF-8 and .bin/.idx sets") from error
    if not size:
        raise InputError(f"{path}: empty, allowed is a text with at least one sample of tokens")


class TextTokens:
    """The tokens of a file of text, which is one document: they lie in memory, bytes only where they are looked at."""

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        self._end = tokenizer.end
        self._tokens: NDArray[Any]
        if isinstance(tokenizer, ByteTokenizer):
            self._tokens = np.memmap(path, dtype=np.uint8, mode="r")
        else:
            self._tokens = np.array(tokenizer.encode(files.read_text(path)), dtype=np.uint32)

    def read(self, start: int, count: int) -> Tokens:
        """So many tokens from `start` on; the last one is the end of the document."""
        found = np.asarray(self._tokens[start : start + count], dtype=np.int64)
        return np.append(found, self._end) if len(found) < count else found

    def cut(self, part: float) -> int:
        """How many tokens are the first `part` of it, from 0 to 1."""
        return round((len(self._tokens) + 1) * part)
