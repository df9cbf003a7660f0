"""Text to token ids: bytes as they are, or any tokenizer of transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvbind.files import blaming, check_links, inside, read_fields


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

        if Path(name).is_dir():
            check_tokenizer_folder(Path(name))
        with blaming(repr(name), "a tokenizer that transformers loads"):
            self.inner: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if self.inner.eos_token_id is None:
            raise ValueError(f"data.tokenizer must have an end-of-text token; {name!r} has none")
        self.vocab_size, self.end = len(self.inner), int(self.inner.eos_token_id)

    def encode(self, text: str) -> NDArray[np.int64]:
        # verbose=False: documents may well be longer than what the tokenizer's own model could read
        return np.asarray(self.inner(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids)


def check_tokenizer_folder(folder: Path) -> None:
    """Refuse a tokenizer whose files lead out of their folder.

    Raises:
        ValueError: a link, or a name in the configuration, that does; the message names it.
        OSError: a file that cannot be read.
    """
    check_links(folder)
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return
    fields = read_fields(config)
    named = fields.get("fast_tokenizer_files")
    for name in named if isinstance(named, list) else []:
        inside(folder, name, config)
    for key, name in fields.items():
        # names of files on its author's machine are common, and harmless where there are none such
        if key.endswith("_file") and isinstance(name, str) and os.path.exists(name):
            inside(folder, name, config)


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of that name: "bytes", or whatever transformers' `AutoTokenizer` knows.

    Raises:
        ValueError: a tokenizer without an end-of-text token, or a damaged one. None whose own code would have to be run.
        OSError: a name that transformers cannot find.
    """
    return Bytes() if name == "bytes" else Pretrained(name)
