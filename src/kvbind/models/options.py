"""Options that the models inherit from transformers: each works as in transformers' own models, or is refused.

transformers' base classes take many options that a model may have no use for. Those that would be accepted and do nothing
are refused here, in a configuration's constructor and, as configurations can be edited, in the model's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from kvbind.inner.value import nearest

Refusals = Mapping[str, tuple[tuple[Any, ...], str]]
"""By name of an option: the values that mean nothing special, and why others are refused."""

NOT_FOR_US: Refusals = {
    "output_attentions": ((False, None), "attention weights are never formed"),
    "chunk_size_feed_forward": ((0, None), "MLPs are not cut into pieces"),
    "is_encoder_decoder": ((False, None), "it has no encoder"),
    "per_layer_config": ((None, {}), "all layers have one configuration"),
    "tie_last_hidden_states": ((None,), "which state is the last is fixed"),
    "experts_implementation": ((None, "eager"), "it has no experts"),
    "pruned_heads": ((None, {}), "heads cannot be pruned"),
}

METADATA = frozenset(
    {
        "attn_implementation",
        "auto_map",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "per_layer_config",
        "quantization_config",
        "tie_last_hidden_states",
        "tokenizer_class",
        "torch_dtype",
    }
)
"""Fields that transformers' `PretrainedConfig` takes but does not list when asked."""


MOST_LABELS = 10**6
"""transformers makes a name for each label."""


def check_labels(fields: Mapping[str, Any]) -> None:
    """Refuse more labels than anything could name.

    Raises:
        ValueError: a number that is none, or above `MOST_LABELS`.
    """
    for name in ("num_labels", "num_classes"):
        count = fields.get(name)
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MOST_LABELS):
            raise ValueError(f"{name} must be an int from 0 to {MOST_LABELS}; got {count!r}")


def check_options(config: PretrainedConfig, refusals: Refusals) -> None:
    """Refuse options of a configuration that its model would not heed.

    Raises:
        ValueError: such an option.
    """
    for name, (allowed, reason) in refusals.items():
        # what transformers stores under names of its own
        value: Any = getattr(config, f"_{name}" if name.endswith("_implementation") else name, None)
        if name == "per_layer_config" and not getattr(config, "is_heterogeneous", False):
            value = None
        if not any(value is x or value == x for x in allowed):
            raise ValueError(f"{name} must be {allowed[0]!r} in {type(config).__name__}, as {reason}; got {value!r}")


def inherited_fields(owner: str, fields: Mapping[str, Any], refusals: Refusals, own: Collection[str]) -> dict[str, Any]:
    """Of a constructor's further fields those that belong to transformers.

    Args:
        owner: the configuration's class, for messages.
        fields: by name.
        refusals: as `check_options` takes them.
        own: the configuration's own fields, of which a message names the nearest.

    Raises:
        ValueError: an option that would do nothing, a setting of generation, or an unknown field that is set.
    """
    check_labels(fields)
    listed, generation = PretrainedConfig().to_dict(), GenerationConfig().to_dict()
    usual = GenerationConfig._get_default_generation_params()
    passed = {}
    for name, value in fields.items():
        if name in refusals:
            allowed, reason = refusals[name]
            if value not in allowed:
                raise ValueError(f"{name} must be {allowed[0]!r} in {owner}, as {reason}; got {value!r}")
        elif name in generation and name not in listed and value is not None and value != usual.get(name):
            raise ValueError(
                f"{name} is a setting of generation, not of {owner}; set {value!r} in the model's generation_config or give "
                "it to generate()"
            )
        known = name in listed or name in generation or name in METADATA or name.startswith("_")
        if known:
            passed[name] = value
        elif name not in refusals and value is not None and value is not False:
            raise ValueError(
                f"{name} is no field of {owner}, and set to {value!r} it may change what is computed{nearest(name, own)}"
            )
    return passed


def known_by_name(names: MutableMapping[str, Any], cls: type) -> None:
    """Put a class among those that transformers knows a task by, as its Trainer and pipelines look for names of classes.

    Classes derived from it, by users or by wrappers such as FSDP, count as it does.

    Args:
        names: transformers' names of classes by type of model.
        cls: the class.
    """
    if cls.__name__ not in names.values():
        names[f"kvbind/{cls.__name__}"] = cls.__name__
