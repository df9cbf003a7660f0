"""Files from elsewhere: paths that stay inside their folder, and JSON, YAML and tensors that can be wrong but do nothing.

Whatever such a file holds, reading it runs no code, follows no name out of its folder and takes memory in proportion to the
file. It ends in plain data, or in a `ValueError` of one line that names the file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

DEPTH = 64
"""How deep lists and mappings may lie in each other."""

WHOLE = 2**63
"""Whole numbers of 64 bits lie below this, and above its negative; sizes are such, as everything takes them so."""

NODES = 100_000
"""How many values a YAML file may hold, each counted as often as it is referred to."""

JSON_LIMIT, YAML_LIMIT = 256 * 2**20, 2**20
"""The largest files of each kind that are read, in bytes."""

EXPANSION, ALWAYS = 100, 2**20
"""How many times its own size a file compressed by gzip may expand to, and how many bytes whatever its size."""

LINKED_FOLDERS = ("additional_chat_templates",)
"""Folders inside a model's that loaders read."""


def inside(folder: str | Path, name: object, source: object = None) -> Path:
    """The path of a file in a folder that a file from elsewhere names; it need not exist.

    Links may lead to other places of the folder, and from a snapshot in the Hugging Face hub's cache to that repository's
    `blobs`, as they do there.

    Args:
        folder: which the file must not leave.
        name: the file, relative to the folder; of any type, as it stands in what names it.
        source: what names it, for the message; default the folder.

    Raises:
        ValueError: a name that is no relative path, or that leads out of the folder by `..` or by a link.
    """
    where = folder if source is None else source
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{where} must name files inside {folder}; got {shortened(name)}")
    # the other system's separators and drives are refused too, so that a file means the same everywhere
    pure = PureWindowsPath(name)
    if pure.anchor or ".." in pure.parts:
        raise ValueError(f"{where} must name files inside {folder}; got {shortened(name)}, which leaves it")
    path = Path(folder) / name
    try:
        home, real = Path(folder).resolve(), path.resolve()
    except RuntimeError as error:  # a link that leads to itself
        raise ValueError(f"{path} must be a file; it is a link that leads nowhere") from error
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not real.is_relative_to(home) and not real.is_relative_to(blobs):
        raise ValueError(f"{path} must be a file inside {folder}; it is a link that leaves it, to {str(real)!r}")
    return path


def check_links(folder: Path) -> None:
    """Refuse a folder of a model or tokenizer in which a file is a link that leaves it, or is none.

    Other libraries read such folders, follow every link and wait for every pipe. Folders that none of them reads are not
    looked into.

    Raises:
        ValueError: such a link, a pipe or a device; the message names it.
        OSError: a folder that cannot be listed.
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        read = entry.name in LINKED_FOLDERS
        if entry.is_symlink() and (read or not entry.is_dir()):
            inside(folder, entry.name)
        if read and entry.is_dir():
            check_links(Path(entry.path))
        elif not entry.is_dir() and os.path.exists(entry.path):
            check_regular(entry.path)


def check_regular(path: str | Path) -> Path:
    """The path, where it is a regular file or a link to one: reading a pipe would wait, and a device never end.

    Raises:
        ValueError: something else.
        OSError: nothing there.
    """
    path = Path(path)
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} must be a file; it is {'a folder' if path.is_dir() else 'none'}")
    return path


def read_text(path: str | Path, limit: int = JSON_LIMIT) -> str:
    """A UTF-8 file; one whose name ends on ".gz" is expanded.

    Args:
        path: the file.
        limit: the most bytes that it may have, before and after.

    Raises:
        ValueError: a file that is larger, that expands to more or to more than `EXPANSION` times its size, that gzip has not
            written whole, or that is no text.
        OSError: a file that cannot be read.
    """
    with check_regular(path).open("rb") as file:
        # to read up to a limit would take memory for all of it
        large = os.fstat(file.fileno()).st_size > limit
        content = b"" if large else file.read()
    if large:
        raise ValueError(f"{path} must have at most {limit / 2**20:g} MiB; it has more")
    if Path(path).suffix == ".gz":
        content = _expanded(content, path, min(limit, max(EXPANSION * len(content), ALWAYS)))
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path} must be text in UTF-8; its byte {error.start}, in line {line}, is none") from error


def _expanded(content: bytes, path: str | Path, limit: int) -> bytes:
    """What gzip has compressed, once; never more than `limit` bytes are held."""
    stream = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        expanded = stream.decompress(content, limit + 1)
    except zlib.error as error:
        raise ValueError(f"{path} must be a gzip file; it is not: {error}") from error
    if len(expanded) > limit:
        raise ValueError(
            f"{path} must expand to at most {limit:,} bytes ({EXPANSION} times its size, or what such files may have)"
        )
    if not stream.eof or stream.unused_data:
        raise ValueError(f"{path} must be one whole gzip file; it is cut short or followed by something else")
    return expanded


def read_json(path: str | Path, *, finite: bool = True, limit: int = JSON_LIMIT) -> Any:
    """What a JSON file holds.

    Args:
        path: the file.
        finite: refuse numbers that are not finite, such as NaN.
        limit: as `read_text`.

    Raises:
        ValueError: a file that is no JSON, or as `read_text` and `check_plain`.
        OSError: a file that cannot be read.
    """
    return parse_json(read_text(path, limit), path, finite=finite)


def read_fields(path: str | Path, *, finite: bool = True, wide: bool = True) -> dict[str, Any]:
    """The mapping that a JSON or YAML file holds, as its suffix says.

    Args:
        path: the file.
        finite: of JSON, refuse numbers that are not finite.
        wide: let whole numbers pass that have more than 64 bits, as tokenizers have them, and no model's sizes.

    Raises:
        ValueError: as `read_json` and `read_yaml`; a file that holds no mapping.
        OSError: a file that cannot be read.
    """
    fields = read_json(path, finite=finite) if Path(path).suffix == ".json" else read_yaml(path)
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a mapping of fields; it holds {shortened(fields)} ({type(fields).__name__})")
    check_plain(fields, path, finite=False, wide=wide)
    return fields


def parse_json(text: str, source: object, *, finite: bool = True) -> Any:
    """What a JSON text holds.

    Args:
        text: the text.
        source: where it is from, for the message.
        finite: refuse numbers that are not finite.

    Raises:
        ValueError: a text that is no JSON, or as `check_plain`.
    """
    try:
        data = json.loads(text)
    except RecursionError:
        raise ValueError(f"{source} must be at most {DEPTH} levels deep; it is deeper") from None
    except ValueError as error:
        raise ValueError(f"{source} must be JSON; it is not: {error}") from error
    check_plain(data, source, finite=finite)
    return data


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds: numbers such as 1e-5 are numbers, dates are text, and keys are text, each given once.

    Raises:
        ValueError: a file that is no YAML, or as `check_plain`.
        OSError: a file that cannot be read.
    """
    return parse_yaml(read_text(path, YAML_LIMIT), path)


def parse_yaml(text: str, source: object, refusal: str | None = None) -> Any:
    """What a YAML text holds, as `read_yaml`.

    Args:
        text: the text.
        source: where it is from, for the message.
        refusal: how the message on a text that is no YAML begins, where not with the source.

    Raises:
        ValueError: as `read_yaml`.
    """
    refusal = f"{source} must be YAML" if refusal is None else refusal
    try:
        loader = _Loader(text)
        try:
            data = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        reason = f"{problem} in line {mark.line + 1}" if mark and problem else " ".join(str(error).split())
        raise ValueError(f"{refusal}: {reason}") from error
    except (ValueError, OverflowError, RecursionError) as error:  # a number or a time of day that is none
        raise ValueError(f"{refusal}: {error}") from error
    check_plain(data, source, finite=False)
    return data


def yaml_lines(path: str | Path) -> dict[str, int]:
    """The lines of a YAML file's keys, from 1, by their dotted names; none of a file that is no YAML."""
    found: dict[str, int] = {}

    def look(node: Any, prefix: str) -> None:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            found.setdefault(f"{prefix}{key.value}", key.start_mark.line + 1)
            look(value, f"{prefix}{key.value}.")

    try:
        loader = _Loader(read_text(path, YAML_LIMIT))
        try:
            look(loader.get_single_node(), "")
        finally:
            loader.dispose()
    except (ValueError, yaml.YAMLError):
        return {}
    return found


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, within limits: what aliases and merges expand to is counted before it is built."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.nodes, self.depth = 0, 0
        self.sizes: dict[int, int] = {}

    def fetch_flow_collection_start(self, kind: Any) -> None:
        # the scanner looks ahead, in time that grows with the square of the depth
        if self.flow_level >= DEPTH:
            raise _refusal(f"more than {DEPTH} levels", self.get_mark())
        super().fetch_flow_collection_start(kind)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        before, self.nodes, self.depth = self.nodes, self.nodes + 1, self.depth + 1
        if self.depth > DEPTH:
            raise _refusal(f"more than {DEPTH} levels", event.start_mark)
        node: Any = super().compose_node(parent, index)
        if isinstance(event, yaml.events.AliasEvent):
            if id(node) not in self.sizes:
                raise _refusal("a value that holds itself", event.start_mark)
            self.nodes = before + self.sizes[id(node)]
        else:
            self.sizes[id(node)] = self.nodes - before
        if self.nodes > NODES:
            raise _refusal(f"more than {NODES} values", event.start_mark)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        known = set()
        for place, _ in node.value:
            if place.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(place, deep=True)
            if not isinstance(key, str):
                raise _refusal(f"a key that is no text, {shortened(key)}", place.start_mark)
            if key in known:
                raise _refusal(f"a key that is given twice, {shortened(key)}", place.start_mark)
            known.add(key)
        return super().construct_mapping(node, deep)


def _refusal(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def check_plain(data: object, source: object, *, finite: bool = True, values: bool = False, wide: bool = True) -> None:
    """Refuse data that would break what goes through them.

    Args:
        data: nested lists and mappings.
        source: where they are from, for the message.
        finite: refuse numbers that are not finite.
        values: let objects pass that are no plain data.
        wide: let whole numbers pass that have more than 64 bits.

    Raises:
        ValueError: data deeper than `DEPTH`, such as those that hold themselves; keys that are no text; text that is no
            Unicode; numbers that are not finite, or whole ones of more than 64 bits; objects.
    """
    level: list[Any] = [data]
    for _ in range(DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                for key in value:
                    if not isinstance(key, str):
                        raise ValueError(f"{source} must have keys that are text; got {shortened(key)}")
                below += value
                below += value.values()
            elif isinstance(value, list | tuple):
                below += value
            elif isinstance(value, str):
                if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
                    raise ValueError(f"{source} must hold text in Unicode; got {shortened(value)}")
            elif isinstance(value, float):
                if finite and not math.isfinite(value):
                    raise ValueError(f"{source} must hold finite numbers; got {value}")
            elif isinstance(value, int):
                if not wide and not -WHOLE < value < WHOLE:
                    raise ValueError(f"{source} must hold whole numbers of 64 bits; got {shortened(value)}")
            elif not values and value is not None:
                raise ValueError(f"{source} must hold plain data; got a {type(value).__name__}")
        if not below:
            return
        if values and len(below) > NODES:  # what holds itself twice
            break
        level = below
    raise ValueError(f"{source} must be at most {DEPTH} levels deep; it is deeper")


def read_tensors(path: str | Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata.

    Args:
        path: the file.
        device: where to put them.

    Raises:
        ValueError: a file that is none, such as one that was cut short.
        OSError: a file that cannot be read.
    """
    check_regular(path)
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file; it is not: {error}") from error


def read_shapes(path: str | Path) -> dict[str, list[int]]:
    """The shapes of the tensors of a safetensors file by name, from its header alone.

    Raises:
        ValueError, OSError: as `read_tensors`.
    """
    check_regular(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file; it is not: {error}") from error


def read_pickled(path: str | Path) -> Any:
    """What a file of `torch.save` holds, read by the loader that runs no code: tensors and plain data.

    Besides these, `argparse.Namespace` is read, as training scripts like to keep their command line beside the weights.

    Raises:
        ValueError: a file that is none, that is compressed, or that holds anything else.
        OSError: a file that cannot be read.
    """
    path = check_regular(path)
    with path.open("rb"):  # what the system refuses is not the file's fault
        pass
    try:
        # torch.save compresses nothing; what does may expand to any size
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("it is compressed")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # the loader raises whatever a damaged or hostile file leads to, `OSError` too
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} must be a file that torch.load reads safely; it is not: {reason}") from error


@contextmanager
def blaming(source: object, what: str) -> Iterator[None]:
    """Take apart data from elsewhere in here: whatever their types and sizes lead to ends in one line that names them.

    Args:
        source: where they are from.
        what: what they must be, in words.

    Raises:
        ValueError: for any error but of the system (`OSError`), of memory, and of packages that are not installed.
    """
    try:
        yield
    except (OSError, ImportError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        said = reason if isinstance(error, ValueError) else f"{type(error).__name__} {reason}"
        raise ValueError(f"{source} must be {what}; it is not: {said}") from error


def shortened(value: object, most: int = 80) -> str:
    """The `repr` of a value from elsewhere, cut to a length that fits a line."""
    if isinstance(value, str | bytes):
        value = value[: most + 1]
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # what nests too deeply, an int of thousands of digits
        return f"a {type(value).__name__}"
    return text if len(text) <= most + 2 else f"{text[:most]}..."
