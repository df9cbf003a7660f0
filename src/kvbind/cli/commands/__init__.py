"""One module per command of `kvbind`; a new module is a new command (see `kvbind.commands.add_commands`)."""

ORDER = (
    "systems", "explain", "compare", "serve", "reproduce", "report", "train", "plan", "eval", "probe", "simplify",
    "generate", "convert", "in_place", "show", "render",
)  # fmt: skip
"""Of the help; a command that is not named here comes after these."""
