"""Text to token ids: bytes as they are, or any tokenizer of transformers."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Tokenizer(Protocol):
    """What the language task asks of a tokenizer."""

    vocab_size: int
    end: int
    """The token that ends every document."""

    def encode(self, text: str) -> NDArray[np.int64]:
        """The ids of a text, `[n]`, without the end token."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of some ids."""
        ...


class Bytes:
    """UTF-8 bytes; documents end with the byte 0, which no text holds."""

    vocab_size = 256
    end = 0

    def encode(self, text: str) -> NDArray[np.int64]:
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


class Pretrained:
    """A tokenizer that transformers loads, by name on the Hugging Face hub or by folder."""

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        self.inner: Any = AutoTokenizer.from_pretrained(name)
        if self.inner.eos_token_id is None:
            raise ValueError(f"data.tokenizer must have an end-of-text token; {name!r} has none")
        self.vocab_size, self.end = len(self.inner), int(self.inner.eos_token_id)

    def encode(self, text: str) -> NDArray[np.int64]:
        # verbose=False: documents may well be longer than what the tokenizer's own model could read
        return np.asarray(self.inner(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids)


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of that name: "bytes", or whatever transformers' `AutoTokenizer` knows.

    Raises:
        ValueError: a tokenizer without an end-of-text token.
        OSError: a name that transformers cannot find.
    """
    return Bytes() if name == "bytes" else Pretrained(name)
