"""Language-model checkpoints of the released code (arXiv 2505.23884) turned into this library's, and back.

Both give parameters the same names and layouts; they differ in the configuration and in the files.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvbind.inner.value import check_choice
from kvbind.models.lact import LactConfig, LactForCausalLM

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "model.pt", "checkpoint.pt")
"""The single files in which a folder may hold its weights, in the order in which they are looked for."""

INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
"""The indices of weights in several files."""

WRAPPERS = ("model", "state_dict", "module")
"""Keys under which training code stores the weights beside other things."""

COPIED = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "generation_config.json")
"""Files that go along unchanged."""


def convert(source: str | Path, target: str | Path, to: Literal["kvbind", "released"] = "kvbind") -> Path:
    """Convert a language-model checkpoint.

    Args:
        source: a folder with config.json and weights (safetensors or `.bin`, in one file or several, or `.pt`), or a
            `.pt` or `.bin` file with config.json beside it.
        target: the folder to write, made where it is missing.
        to: "kvbind" from a released checkpoint, or "released" from one of this library's.

    Returns:
        `target`: config.json, model.safetensors (several where it is large), and tokenizer files that `source` had. Weights
        keep their dtype.

    Raises:
        FileNotFoundError: `source` lacks its configuration or weights.
        ValueError: the checkpoint is of the target's kind already, its configuration is not supported by the target, or
            its weights do not fit its configuration.
    """
    check_choice("to", to, ("kvbind", "released"))
    source, target = Path(source), Path(target)
    folder = source if source.is_dir() else source.parent
    fields = _read_fields(folder)
    kind = "kvbind" if "inner" in fields else "released"
    if kind == to:
        raise ValueError(f"source must be a {'released' if to == 'kvbind' else 'kvbind'} checkpoint; {source} is {kind}")
    config: LactConfig = LactConfig.from_dict(fields)
    released_fields = config.to_released_config() if to == "released" else None
    weights = read_weights(source)
    model = _model_with(config, weights, source)

    target.mkdir(parents=True, exist_ok=True)
    if released_fields is None:
        model.save_pretrained(target)
    else:
        (target / "config.json").write_text(json.dumps(released_fields, indent=2) + "\n", encoding="utf-8")
        named = {name: x.detach().contiguous() for name, x in model.state_dict().items()}
        if config.tie_word_embeddings:
            del named["lm_head.weight"]
        save_file(named, target / "model.safetensors", metadata={"format": "pt"})
    for pattern in COPIED:
        for path in folder.glob(pattern):
            shutil.copy2(path, target / path.name)
    return target


def read_weights(source: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint, by name.

    Args:
        source: the folder or file.

    Raises:
        FileNotFoundError: there are none.
    """
    if source.is_file():
        return _read_file(source)
    for name in WEIGHT_FILES[:1] + INDEX_FILES + WEIGHT_FILES[1:]:
        path = source / name
        if not path.exists():
            continue
        if name not in INDEX_FILES:
            return _read_file(path)
        parts = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        return {key: x for part in parts for key, x in _read_file(source / part).items()}
    raise FileNotFoundError(f"source must hold weights ({', '.join((*WEIGHT_FILES, *INDEX_FILES))}); {source} has none")


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    held: Any = torch.load(path, map_location="cpu", weights_only=True)
    while not any(isinstance(x, Tensor) for x in held.values()):
        inside = next((held[name] for name in WRAPPERS if isinstance(held.get(name), dict)), None)
        if inside is None:
            raise ValueError(
                f"source must hold a state dict, alone or under {' or '.join(WRAPPERS)}; {path} has {list(held)}"
            )
        held = inside
    # what torch.compile and DistributedDataParallel put before every name
    return {name.replace("_orig_mod.", "").removeprefix("module."): x for name, x in held.items()}


def _read_fields(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"source must have a config.json; {folder} has none")
    fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return fields


def _model_with(config: LactConfig, weights: dict[str, Tensor], source: Path) -> LactForCausalLM:
    """The model of `config` with `weights` in their own dtypes."""
    with torch.device("meta"):
        model = LactForCausalLM(config)
    needed = model.state_dict()
    if config.tie_word_embeddings:
        weights = {"lm_head.weight": weights.get("model.embeddings.weight"), **weights}  # type: ignore[dict-item]
    missing, extra = sorted(needed.keys() - weights.keys()), sorted(weights.keys() - needed.keys())
    if missing or extra:
        raise ValueError(f"the weights of {source} do not fit its configuration: missing {missing}, not expected {extra}")
    for name, x in weights.items():
        if x.shape != needed[name].shape:
            raise ValueError(
                f"the weights of {source} do not fit its configuration: {name} must be {list(needed[name].shape)}; got "
                f"{list(x.shape)}"
            )
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model
