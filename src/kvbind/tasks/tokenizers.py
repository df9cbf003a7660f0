"""Text to token ids: bytes as they are, or any tokenizer of transformers."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jinja2 import TemplateError, TemplateSyntaxError
from numpy.typing import NDArray

from kvbind.files import blaming, check_links, inside, read_fields
from kvbind.tasks.files import read_text


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

    def for_transformers(self) -> Any:
        """The same tokenizer as transformers has it, to be saved beside a model.

        It pads with the end token where it had nothing else, and at the left, as generation asks for.
        """
        ...


class Bytes:
    """UTF-8 bytes; documents end with the byte 0, which no text holds."""

    vocab_size = 256
    end = 0

    def encode(self, text: str) -> NDArray[np.int64]:
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    def for_transformers(self) -> Any:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        # the end token is written as the byte that it is, so that ids and text agree at every byte
        end = chr(self.end)
        letters = {letter: byte for byte, letter in enumerate(byte_letters()) if byte != self.end} | {end: self.end}
        inner = Tokenizer(models.BPE(letters, []))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(
            tokenizer_object=inner, eos_token=end, pad_token=end, padding_side="left", clean_up_tokenization_spaces=False
        )


def byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level tokenizers.

    Printable Latin-1 stands for itself, and the rest, in order, for the characters from U+0100 on: so that a vocabulary can
    be written as text (the byte-level BPE of GPT-2).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


class Pretrained:
    """A tokenizer that transformers loads, by name on the Hugging Face hub or by folder."""

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        if Path(name).is_dir():
            check_tokenizer_folder(Path(name))
        try:
            with blaming(repr(name), "a tokenizer that transformers loads"):
                self.inner: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except OSError as error:  # in several lines, which need not say what was looked for
            said = " ".join(str(error).split())
            raise OSError(f"tokenizer {name!r} must be 'bytes', a folder or a name on the hub: {said}") from error
        if self.inner.eos_token_id is None:
            raise ValueError(f"data.tokenizer must have an end-of-text token; {name!r} has none")
        self.vocab_size, self.end = len(self.inner), int(self.inner.eos_token_id)

    def encode(self, text: str) -> NDArray[np.int64]:
        # half a pair of UTF-16 is no text; verbose=False: documents may well be longer than the tokenizer's own model reads
        text = text.encode("utf-8", errors="replace").decode()
        return np.asarray(self.inner(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids)

    def for_transformers(self) -> Any:
        tokenizer = copy.deepcopy(self.inner)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer


PLAIN_CHAT = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""The chat template "plain": each message with its role before it, and a blank line behind it."""


def read_chat_template(where: str, tokenizer: Tokenizer) -> str | None:
    """The chat template that `data.chat_template` names, in Jinja.

    Args:
        where: "plain", the path of a file, or "" for the tokenizer's own, if it has one.
        tokenizer: what it is tried with.

    Raises:
        ValueError: a file that is no template; the message names it and the line.
        OSError: a file that cannot be read.
    """
    if where in ("", "plain"):
        return PLAIN_CHAT if where else None
    if not Path(where).is_file():
        raise ValueError(f"data.chat_template must be 'plain' or a file of a Jinja template; got {where!r}")
    text = read_text(Path(where))
    try:
        # by transformers, whose templates have tags of their own
        tokenizer.for_transformers().apply_chat_template(
            [{"role": "user", "content": "hello"}], chat_template=text, tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        line = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
        raise ValueError(f"data.chat_template must be a Jinja template of messages; {where}{line}: {error}") from error
    return text


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
