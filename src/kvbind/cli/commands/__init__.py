"""One module per command of `kvbind`; a new module is a new command (see `kvbind.commands.add_commands`)."""

ORDER = (
    "systems", "explain", "compare", "train", "eval", "generate", "render", "show", "serve", "convert", "in_place", "plan",
    "reproduce", "report", "probe", "simplify",
)  # fmt: skip
"""Of the help; a command that is not named here comes after these."""
