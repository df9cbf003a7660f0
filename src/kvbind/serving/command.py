"""`kvbind serve`: what is given to `vllm serve` for a folder of ours. Nothing here needs vLLM until it starts."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from kvbind.files import inside, read_fields
from kvbind.models.saving import CONFIG, check_model_folder
from kvbind.serving.names import ARCHITECTURE, SLOTS
from kvbind.train.unfinished import CONFIG as RUN
from kvbind.train.unfinished import WEIGHTS, unfinished

logger = logging.getLogger(__name__)

INSTALL = "install kvbind's extra vllm (docs/serving.md says how, also without a GPU)"

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
"""Any of these is a tokenizer."""

TEMPLATE = Path(__file__).with_name("chat.jinja")
"""How a conversation becomes a prompt where the tokenizer does not say."""


def serve_arguments(folder: str | Path, slots: int | None = None, further: Sequence[str] = ()) -> list[str]:
    """The arguments of `vllm serve` for a model.

    Args:
        folder: as `LactForCausalLM.save_pretrained` left it, or of a training run, whose `model/` that is.
        slots: how many requests may run at once, which must fit the memory.
        further: of vLLM's own arguments those that the user gives; they stand last and prevail.

    Raises:
        ValueError: a folder of no such model, or a configuration that cannot be served.
        OSError: a file that cannot be read.
    """
    folder = Path(folder)
    if (folder / RUN).is_file():
        if not (folder / WEIGHTS / CONFIG).is_file():
            raise ValueError(f"folder must be of a finished run; {unfinished(folder)}")
        folder = folder / WEIGHTS
    if not (folder / CONFIG).is_file():
        raise ValueError(f"folder must be one of a language model, which holds {CONFIG}; got {str(folder)!r}")
    check_model_folder(folder)
    fields = read_fields(inside(folder, CONFIG))
    if fields.get("architectures") != [ARCHITECTURE] or "inner" not in fields:
        raise ValueError(
            f"folder must be one of a {ARCHITECTURE} (kvbind convert makes one of a released checkpoint); "
            f"{str(folder / CONFIG)!r} says {fields.get('architectures')}"
        )
    from kvbind.models.lact import LactConfig
    from kvbind.serving.checks import check_servable

    check_servable(LactConfig.from_dict(fields))

    arguments = [str(folder)]
    if not any((folder / name).is_file() for name in TOKENIZERS):
        logger.warning("%s has no tokenizer: prompts must be token ids, and so will the answers be", folder)
        arguments.append("--skip-tokenizer-init")
    elif not _has_template(folder):
        arguments += ["--chat-template", str(TEMPLATE)]
    if slots is not None:
        arguments += ["--max-num-seqs", str(slots), "--additional-config", json.dumps({SLOTS: slots})]
    return [*arguments, *further]


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and "chat_template" in read_fields(settings)


def serve(folder: str | Path, slots: int | None = None, further: Sequence[str] = ()) -> NoReturn:
    """Become `vllm serve`; arguments as `serve_arguments` takes them.

    Raises:
        ImportError: vLLM is not installed.
        ValueError, OSError: as `serve_arguments`.
    """
    check_installed("kvbind serve")
    arguments = serve_arguments(folder, slots, further)
    os.execv(sys.executable, [sys.executable, "-m", *_server(), *arguments])


def _server() -> tuple[str, ...]:
    """The module that `vllm serve` is, and what it takes before a folder."""
    try:
        version("vllm")
    except PackageNotFoundError:
        # the build for CPUs has another name, by which its own command does not find itself
        return ("vllm.entrypoints.openai.api_server", "--model")
    return ("vllm.entrypoints.cli.main", "serve")


def check_installed(what: str) -> None:
    """Raise `ImportError` where vLLM is not installed.

    Args:
        what: what needs it, for the message.
    """
    if find_spec("vllm") is None:
        raise ImportError(f"{what} needs vLLM, which is not installed: {INSTALL}")
