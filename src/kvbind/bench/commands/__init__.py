"""One module per command of `kvbind bench`; a new module is a new command (see `kvbind.commands.add_commands`)."""

ORDER = (
    "forms", "accuracy", "growth", "compile", "decode", "serving", "step", "graphs", "models", "kernels", "peers", "verify",
    "views", "layer", "attention", "vision", "scaling",
)  # fmt: skip
"""Of the help; a command that is not named here comes after these."""
