"""`TrainConfig`, and typed configurations in general: YAML presets, `key=value` overrides, a hash of what matters."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf, TupleConfig
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from kvbind.files import read_yaml, shortened, yaml_lines
from kvbind.inner.value import check_choice, nearest

T = TypeVar("T")

RECOMPUTE = ("auto", "none", "block", "selective", "offload")
"""What `train.activation_checkpointing` can be."""

_INDIFFERENT = {
    "device", "evaluate_at", "checkpoint_every", "checkpoint_minutes", "keep", "tensorboard", "parallel",
    "activation_checkpointing", "graphs",
}  # fmt: skip


@dataclass
class ParallelConfig:
    """How a model is spread over the processes that `torchrun` starts. A run's result depends on it by rounding alone.

    Attributes:
        strategy: "ddp" (every process holds the whole model), "fsdp" (FSDP2: each holds a shard of it), or "auto": "fsdp"
            from half a billion parameters on. A single process needs neither.
        shard: data ranks among which one copy of the model is divided, each such group holding a copy; 0 for all of them.
        sequence: ranks that share each sequence; the task must be able to cut its batches.
        reshard: give up a block's gathered weights between its forward and backward pass, for memory.
    """

    strategy: str = "auto"
    shard: int = 0
    sequence: int = 1
    reshard: bool = True

    def __post_init__(self) -> None:
        check_choice("train.parallel.strategy", self.strategy, ("auto", "ddp", "fsdp"))
        for name, least in {"shard": 0, "sequence": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"train.parallel.{name} must be at least {least}; got {getattr(self, name)}")


@dataclass
class TrainConfig:
    """How a model is trained.

    Attributes:
        steps: optimizer steps.
        accumulate: batches whose gradients are averaged into one step. Processes divide a step's batches, and their rows,
            among them: how many there are changes nothing of what a step learns from.
        learning_rate: its peak.
        warmup: steps of linear warm-up.
        final: the cosine's end, as a fraction of the peak.
        betas: of AdamW.
        weight_decay: of AdamW, on matrices alone: not on norms, biases and other vectors.
        clip: the largest gradient norm.
        ema: decay, per step, of an exponential average of the weights, which is then what is evaluated and saved in the end;
            0 for none. It starts from the weights after the first step.
        precision: "float32", "bfloat16" (autocast), or "auto": bfloat16 on GPUs.
        gather: the dtype in which FSDP sends weights to those that compute with them. "bfloat16" halves that traffic and
            rounds all weights, those outside of matrix products too, where `precision` is bfloat16; "float32" computes as a
            single process would.
        tf32: on GPUs, let matrix products of float32 operands, those of the fast weights among them, run in TF32.
        device: "auto", or any torch device.
        evaluate_every: steps between evaluations; 0 for at the start and the end only.
        evaluate_at: further evaluations, at fractions of the steps between 0 and 1. The rates there are those of the whole
            schedule: a model on its way is not what a shorter training would have come to.
        checkpoint_every: steps between checkpoints; 0 for none by steps.
        checkpoint_minutes: minutes between checkpoints; 0 for none by time.
        keep: how many checkpoints to keep.
        max_skipped: steps with non-finite loss or gradient in a row that end the run.
        tensorboard: also write TensorBoard's event files, where it is installed.
        activation_checkpointing: what is computed again in the backward pass, for memory: "none"; "block", everything but
            each block's input; "selective", everything but that and the outputs of matrix products, attention and kernels;
            "offload", as "block", with the inputs in host memory; "auto", on GPUs as many blocks as must be, as a batch
            shows before the first step, and elsewhere none.
        graphs: replay steps as CUDA graphs: "auto", on one GPU, wherever they can be captured; "off"; "on", which on a CPU
            takes the same steps, on fixed buffers and with decisions of the device, without capturing them.
        parallel: over several processes.
    """

    steps: int = 1000
    accumulate: int = 1
    learning_rate: float = 1e-3
    warmup: int = 100
    final: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    ema: float = 0.0
    precision: str = "auto"
    gather: str = "float32"
    tf32: bool = True
    device: str = "auto"
    evaluate_every: int = 0
    evaluate_at: list[float] = field(default_factory=list)
    checkpoint_every: int = 0
    checkpoint_minutes: float = 5.0
    keep: int = 2
    max_skipped: int = 10
    tensorboard: bool = False
    activation_checkpointing: str = "auto"
    graphs: str = "auto"
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        # YAML reads on and off as booleans
        self.graphs = {"True": "on", "False": "off"}.get(str(self.graphs), self.graphs)
        check_choice("train.precision", self.precision, ("auto", "float32", "bfloat16"))
        check_choice("train.gather", self.gather, ("float32", "bfloat16"))
        check_choice("train.graphs", self.graphs, ("auto", "on", "off"))
        check_choice("train.activation_checkpointing", self.activation_checkpointing, RECOMPUTE)
        for name, least in {"steps": 1, "accumulate": 1, "keep": 1, "max_skipped": 1, "warmup": 0, "final": 0,
                            "evaluate_every": 0, "checkpoint_every": 0, "checkpoint_minutes": 0,
                            "weight_decay": 0}.items():  # fmt: skip
            # not (x >= least) is also true of NaN
            if not getattr(self, name) >= least:
                raise ValueError(f"train.{name} must be at least {least}; got {getattr(self, name)}")
        for fraction in self.evaluate_at:
            if not 0 < fraction <= 1:
                raise ValueError(
                    f"train.evaluate_at must hold fractions above 0 and at most 1; got {list(self.evaluate_at)}"
                )
        if not 0 <= self.ema < 1:
            raise ValueError(f"train.ema must be at least 0 and below 1; got {self.ema}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas must be at least 0 and below 1; got {tuple(self.betas)}")
        for name in ("learning_rate", "final", "weight_decay", "checkpoint_minutes"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"train.{name} must be finite; got {getattr(self, name)}")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"train.{name} must be greater than 0; got {getattr(self, name)}")


def step_at(fraction: float, steps: int) -> int:
    """The step at which so much of a training of `steps` is done."""
    return max(round(fraction * steps), 1)


def check_seed(seed: int) -> None:
    """Raise `ValueError` for a seed that generators of random numbers do not take."""
    if seed < 0:
        raise ValueError(f"seed must be at least 0; got {seed}")
    if seed >= 2**63:
        raise ValueError(f"seed must have at most 63 bits; got {seed}")


def read_config(schema: type[T], presets: Mapping[str, Path], preset: str, overrides: Sequence[str] = ()) -> T:
    """A configuration from a preset and edits.

    Args:
        schema: a dataclass of dataclasses, which gives every key its type and default.
        presets: YAML files by name.
        preset: a name among them, or the path of a YAML file.
        overrides: "dotted.key=value" edits, later ones winning.

    Raises:
        ValueError: an unknown preset or key (the message gives the nearest known one), or a value that does not fit.
    """
    if preset in presets:
        path = presets[preset]
    elif preset.endswith((".yaml", ".yml")) and Path(preset).expanduser().is_file():
        path = Path(preset).expanduser()
    else:
        raise ValueError(
            f"preset must be one of {', '.join(presets)}, or a YAML file; got {preset!r}{nearest(preset, presets)}"
        )
    return load_config(schema, path, overrides)


def load_config(schema: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """A configuration from the YAML that `to_yaml` gave, with edits.

    A schema may have a static method `beneath(file, edits)`, which says as plain data what the edits leave of the file: not
    what belongs to something that they replace.
    """
    file, edits = load_yaml(path), parse_overrides(overrides)
    try:
        base = merge(OmegaConf.structured(schema), left_of(schema, file, edits))
    except ConfigKeyValueError as error:
        line = yaml_lines(path).get(error.key)
        raise ValueError(f"{path}{f', line {line}' if line else ''}: {error}") from error
    return to_object(merge(base, edits), schema)


def edited(config: T, overrides: Sequence[str]) -> T:
    """A configuration with edits, which say the same of it as of a file that holds it.

    Raises:
        ValueError: an unknown key (the message gives the nearest known one), or a value that does not fit.
    """
    schema, edits = type(config), parse_overrides(overrides)
    file = left_of(schema, OmegaConf.create(to_plain(config)), edits)
    return to_object(merge(OmegaConf.structured(schema), file, edits), schema)


def left_of(schema: type[Any], file: DictConfig, edits: DictConfig) -> DictConfig:
    """What edits leave of a file's keys, as the schema's `beneath` says."""
    beneath = getattr(schema, "beneath", None)
    if beneath is None:
        return file
    return cast(DictConfig, OmegaConf.create(beneath(*(OmegaConf.to_container(tree) for tree in (file, edits)))))


class ConfigKeyValueError(ValueError):
    """A key that is none, or whose value does not fit.

    Attributes:
        key: dotted.
    """

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def from_plain(schema: type[T], plain: dict[str, Any]) -> T:
    """A configuration from what `to_plain` gave."""
    return to_object(merge(OmegaConf.structured(schema), OmegaConf.create(plain)), schema)


def load_yaml(path: Path) -> DictConfig:
    """A YAML file's configuration keys.

    Raises:
        ValueError: a file that is no YAML, or holds no mapping.
    """
    loaded = read_yaml(path)
    if not isinstance(loaded, dict):
        held = "it is empty" if loaded is None else f"it holds {shortened(loaded)}"
        raise ValueError(f"{path} must hold a mapping of configuration keys, such as 'train: {{steps: 100}}'; {held}")
    try:
        return OmegaConf.create(loaded)
    except OmegaConfBaseException as error:  # a text that looks like an interpolation and is none
        raise ValueError(f"{path} must hold plain values: {str(error).splitlines()[0]}") from error


def parse_overrides(overrides: Sequence[str]) -> DictConfig:
    """`key=value` edits as a nested configuration; values are read as YAML."""
    for override in overrides:
        if "=" not in override or not all(override.partition("=")[0].split(".")):
            raise ValueError(f"an override must be key=value, such as train.steps=100; got {override!r}")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except Exception as error:  # whatever YAML makes of a malformed value
        reason = " ".join(str(error).split())
        raise ValueError(f"overrides must be key=value with a YAML value; got {list(overrides)}: {reason}") from error


KINDS = {int: "a whole number", float: "a number", bool: "true or false"}
"""What values of a type are called."""


def merge(base: Any, *changes: DictConfig) -> Any:
    """`base` with changes, each checked against its keys and types."""
    for change in changes:
        refuse_interpolations(change)
        try:
            base = OmegaConf.merge(base, change)
        except ConfigKeyError as error:
            known = known_keys(str(error.full_key), dotted_keys(OmegaConf.to_container(base)))
            raise ConfigKeyValueError(
                str(error.full_key), f"no configuration key is named {error.full_key!r}{known}"
            ) from error
        except (OmegaConfBaseException, TypeError) as error:
            # the library may name a section around what does not fit, or no key at all
            found, named = failing_key(base, change), str(getattr(error, "full_key", None) or "")
            where = named if not found or named.startswith(f"{found}[") else found
            old = OmegaConf.select(base, where)
            got = OmegaConf.select(change, where)
            if OmegaConf.is_dict(old) and not OmegaConf.is_dict(got):
                keys = ", ".join(map(str, old)) or "any"
                message = f"configuration key {where!r} must be a mapping, of keys {keys}; got {got!r}"
                raise ConfigKeyValueError(str(where), message) from error
            if OmegaConf.is_config(old) and not OmegaConf.is_dict(old):
                count = f" of {len(old)}" if isinstance(old, TupleConfig) else ""
                message = f"configuration key {where!r} must be a list{count}, such as {[*old]}; got {got!r}"
                raise ConfigKeyValueError(str(where), message) from error
            if type(old) in KINDS:
                message = f"configuration key {where!r} must be {KINDS[type(old)]}, such as {old!r}; got {got!r}"
                raise ConfigKeyValueError(str(where), message) from error
            raise ConfigKeyValueError(str(where), f"configuration key {where!r}: {str(error).splitlines()[0]}") from error
    return base


def failing_key(base: Any, change: DictConfig) -> str:
    """The dotted key whose part of `change` does not fit `base`, as deep as one can be named."""
    path: list[str] = []
    old, part = base, change
    while isinstance(old, DictConfig) and isinstance(part, DictConfig):
        for key in part:
            nested: Any = part[key]
            for name in (key, *reversed(path)):
                nested = {name: nested}
            try:
                OmegaConf.merge(base, nested)
            except (OmegaConfBaseException, TypeError):
                path.append(str(key))
                old, part = old.get(key), part[key]
                break
        else:
            break
    return ".".join(path)


def refuse_interpolations(config: Any, prefix: str = "") -> None:
    """Raise `ValueError` for a value that stands for another one.

    What such a value comes to, of an environment variable for one, would be printed and saved with the run.
    """
    keys: Iterable[Any] = config if isinstance(config, DictConfig) else range(len(config))
    for key in keys:
        if OmegaConf.is_interpolation(config, key):
            name, raw = f"{prefix}{key}", cast(Any, OmegaConf.to_container(config, resolve=False))[key]
            raise ValueError(f"configuration key {name!r} must be a value, not an interpolation; got {raw!r}")
        if OmegaConf.is_missing(config, key):
            raise ValueError(f"configuration key {prefix}{key} must have a value; got '???', which stands for none")
        if OmegaConf.is_config(config[key]):
            refuse_interpolations(config[key], f"{prefix}{key}.")


def known_keys(unknown: str, known: Iterable[str]) -> str:
    """A clause on what an unknown key may stand for: the nearest beside it, one of its name elsewhere, or all beside it."""
    section, _, name = unknown.rpartition(".")
    keys = [key.rpartition(".") for key in known]
    beside = [last for where, _, last in keys if where == section]
    near = nearest(name, beside)
    if near:
        return near.replace("'", f"'{section}.", 1) if section else near
    elsewhere = [f"{where}.{last}" for where, _, last in keys if last == name]
    if elsewhere:
        return f" (did you mean {elsewhere[0]!r}?)"
    return f"; {section or 'the configuration'} has {', '.join(beside)}"


def to_object(config: Any, schema: type[T]) -> T:
    """The dataclass that a checked configuration describes."""
    built = OmegaConf.to_object(config)
    if not isinstance(built, schema):
        raise TypeError(f"expected a configuration of {schema.__name__}; got {type(built).__name__}")
    return built


def dotted_keys(tree: Any, prefix: str = "") -> Iterator[str]:
    """Every key of a nested mapping, branches and leaves, dotted."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield f"{prefix}{key}"
            yield from dotted_keys(value, f"{prefix}{key}.")


def to_yaml(config: Any) -> str:
    """A configuration in full, as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_plain(config: Any) -> dict[str, Any]:
    """A configuration as nested dicts, lists and numbers."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config)))


def what_matters(config: Any) -> dict[str, Any]:
    """A run's configuration without the keys that change nothing of its result.

    Those are the device, evaluations on the way, checkpoints, event files, and how the run is spread over processes; of
    other sections, what their dataclass lists as `INDIFFERENT`. What came later is left out where it says nothing, so that
    earlier runs are found: a section with `kvbind.inner.value.LATER`, and a model's fields at the value in its `LATER`.
    """
    plain = to_plain(config)
    for section in fields(config):
        held, name = getattr(config, section.name), section.name
        indifferent = _INDIFFERENT if name == "train" else getattr(held, "INDIFFERENT", ())
        if section.metadata.get("later") and held == type(held)():
            del plain[name]
        elif indifferent:
            plain[name] = {key: value for key, value in plain[name].items() if key not in indifferent}
    later = getattr(getattr(config, "model", None), "LATER", {})
    for name in [name for name, value in later.items() if plain["model"].get(name) == value]:
        del plain["model"][name]
    return plain


def config_hash(plain: Any) -> str:
    """Twelve hexadecimal digits that differ where the plain data do."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]
