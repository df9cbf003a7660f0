"""A folder with a language model of transformers turned into one of that model with In-Place TTT."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from kvbind.files import inside, read_fields
from kvbind.models.convert import COPIED, check_apart
from kvbind.models.in_place.config import InPlaceConfig
from kvbind.models.in_place.model import InPlaceForCausalLM, tell_unread
from kvbind.models.saving import CONFIG, check_model_folder, without_bars


def in_place(source: str | Path, target: str | Path, **fields: Any) -> Path:
    """Write a model with fast MLPs made of a saved one, or of a released In-Place TTT checkpoint.

    Args:
        source: a folder as `save_pretrained` leaves it, with safetensors; a Llama or Qwen3 of the released In-Place TTT code
            is told from its configuration.
        target: the folder to write, made where it is missing. Tokenizer files go along.
        **fields: of `InPlaceConfig`, for a model that has no fast MLPs yet.

    Returns:
        `target`.

    Raises:
        FileNotFoundError: `source` holds no configuration.
        ValueError: a damaged folder, `source` and `target` within each other, a model whose layers do not fit, or fields
            beside a released checkpoint, which has its own.
    """
    source, target = Path(source), Path(target)
    if not (source / CONFIG).is_file():
        raise FileNotFoundError(f"source must be the folder of a model, with {CONFIG}; got {str(source)!r}")
    check_apart(source, source, target)
    check_model_folder(source)
    found = read_fields(source / CONFIG, wide=False)
    if "inner" in found:
        raise ValueError(
            f"source must be a Llama, Qwen3 or the like; {str(source)!r} has fast weights beside its MLPs already"
        )
    if found.get("model_type") == InPlaceConfig.model_type:
        raise ValueError(f"source must be a model without fast MLPs; {str(source)!r} has them already")
    copied = [inside(source, path.name) for pattern in COPIED for path in sorted(source.glob(pattern)) if path.is_file()]
    with without_bars():
        if any(name.startswith("ttt_") for name in found):
            if fields:
                raise ValueError(f"{', '.join(fields)} must be left out, as the released checkpoint in source says them")
            model = InPlaceForCausalLM.from_released(str(source), dtype="auto", local_files_only=True)
            tell_unread(model.config)
        else:
            base = AutoModelForCausalLM.from_pretrained(
                source, dtype="auto", local_files_only=True, use_safetensors=True, trust_remote_code=False
            )
            model = InPlaceForCausalLM.from_base(base, **fields)
        target.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(target)
    for path in copied:
        shutil.copy2(path, target / path.name)
    return target
