"""The model of the language task: built from a configuration, and a saved one opened or described."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvbind.models.opening import open_exported
from kvbind.tasks.language.config import (
    LEAST_LENGTH,
    LanguageConfig,
    LanguageDataConfig,
    LanguageModelConfig,
    inner_loop,
    model_fields,
)
from kvbind.tasks.tokenizers import Bytes, Tokenizer, open_tokenizer
from kvbind.train.unfinished import CONFIG as RUN
from kvbind.train.unfinished import WEIGHTS, unfinished

if TYPE_CHECKING:
    from kvbind.models import LactForCausalLM


def build_model(config: LanguageConfig, tokenizer: Tokenizer) -> Any:
    """A model with fresh weights, drawn from the run's seed: a `LactForCausalLM`, or what `model.mixer` names.

    Raises:
        ValueError, TypeError: a configuration that describes no model.
    """
    from kvbind.models import LactConfig, LactForCausalLM

    room = config.model.fields.get("vocab_size", tokenizer.vocab_size)
    if room < tokenizer.vocab_size:
        raise ValueError(
            f"model.fields must have a vocab_size of at least {tokenizer.vocab_size}, as data.tokenizer has; got {room}"
        )
    fields = model_fields(config.model) | {
        "vocab_size": room,
        "bos_token_id": None,
        "eos_token_id": tokenizer.end,
        "inner": inner_loop(config.model),
        "ttt_form": config.model.ttt_form,
    }
    torch.manual_seed(config.seed)
    if config.model.mixer == "fast":
        model: Any = LactForCausalLM(LactConfig(**fields))
    else:
        from kvbind.models.peers import in_place_llama

        model = in_place_llama(LactConfig(**fields))
        model.generation_config.eos_token_id = tokenizer.end
    # of prompts alone: in training nothing is padding, and every embedding learns
    model.generation_config.pad_token_id = tokenizer.end
    return model


DESCRIBED_ELSEWHERE = frozenset({
    "inner", "ttt_form", "pad_token_id", "bos_token_id", "eos_token_id", "lact_chunk_size", "use_muon", "use_momentum",
    "ttt_prenorm", "ttt_loss_type",
})  # fmt: skip
"""Arguments of `LactConfig` that `model.fields` has no use for."""


def describe(model: LactForCausalLM, folder: Path) -> LanguageConfig:
    """The configuration of a run whose model is a saved one; its data are to be named.

    Samples are eight chunks of the inner loop long, at least 512 tokens and at most what the model was made for.

    Args:
        model: as its folder holds it.
        folder: the model's, with its tokenizer; without one, of as many tokens as there are bytes, it reads those.

    Raises:
        ValueError: a folder without a tokenizer.
    """
    config = model.config
    plain, known = config.to_dict(), inspect.signature(type(config).__init__).parameters
    fields = {name: plain[name] for name in known if name in plain and name not in DESCRIBED_ELSEWHERE}
    length = min(config.max_position_embeddings, max(LEAST_LENGTH, 8 * (config.inner.chunk or 1)))
    return LanguageConfig(
        model=LanguageModelConfig(inner=config.inner.to_dict(), fields=fields, ttt_form=config.ttt_form),
        data=LanguageDataConfig(tokenizer=tokenizer_of(folder, config.vocab_size), length=length),
    )


def open_trained(folder: Path, tokenizer: str | None = None) -> tuple[Any, Tokenizer]:
    """A trained model and its tokenizer, without any text. Weights come from safetensors alone.

    Args:
        folder: of a finished training run, or a model in transformers' format, such as the run's `model/`.
        tokenizer: its name; default the model folder's own, or bytes where it has none and the vocabulary is theirs.

    Raises:
        ValueError: a folder that holds neither, or a model without a tokenizer where none is named.
    """
    home = folder / WEIGHTS if (folder / RUN).is_file() else folder
    if not (home / "config.json").is_file():
        if home != folder:
            raise ValueError(f"run must be finished; {unfinished(folder)}")
        raise ValueError(f"run must be the folder of a training run or of a model; got {str(folder)!r}")
    model = open_exported(home)
    if not getattr(model, "can_generate", bool)():
        raise ValueError(f"run must be of a language model; {str(home)!r} holds a {type(model).__name__}")
    # of a model around another one, that one's
    room = model.config.get_text_config().vocab_size
    opened = open_tokenizer(tokenizer_of(home, room) if tokenizer is None else tokenizer)
    if opened.vocab_size > room:
        raise ValueError(
            f"tokenizer must have at most the {room} tokens that the model in {str(home)!r} knows; "
            f"{tokenizer!r} has {opened.vocab_size}"
        )
    return model, opened


def tokenizer_of(folder: Path, vocabulary: int) -> str:
    """The tokenizer beside a model, or bytes where there is none and the vocabulary is theirs.

    Raises:
        ValueError: neither.
    """
    if any(folder.glob("tokenizer*")):
        return str(folder)
    if vocabulary == Bytes.vocab_size:
        return "bytes"
    raise ValueError(f"tokenizer must be 'bytes' or a tokenizer by name, as {str(folder)!r} holds none")
