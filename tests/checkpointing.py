"""Checkpointing of transformers' models by the name that the installed transformers has for it."""


def enable_checkpointing(model, **options):
    """Recompute the blocks in the backward pass, by the installed transformers' name of that."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")(**({f"{name}_checkpointing_kwargs": options} if options else {}))


def disable_checkpointing(model):
    """Undo `enable_checkpointing`."""
    name = "activation" if hasattr(model, "activation_checkpointing_disable") else "gradient"
    getattr(model, f"{name}_checkpointing_disable")()
