"""`kvbind generate`: text from a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvbind.cli import output

PROMPTS = ["import "]
"""What texts start with where nothing else is asked for."""


def command(
    run: Annotated[Path, typer.Argument(help="Folder of a finished training run, or of a model in transformers' format.")],
    prompts: Annotated[
        list[str],
        typer.Option("--prompt", help="What the text starts with; several times for several texts.", metavar="<str>"),
    ] = PROMPTS,
    tokens: Annotated[int, typer.Option(help="How many to write.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 always takes the likeliest token.", min=0.0)] = 0.8,
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest tokens that make up this probability.", min=0.0, max=1.0)
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    tokenizer: Annotated[
        str | None, typer.Option(help="For a model folder: 'bytes', or a tokenizer by name; default the folder's own.")
    ] = None,
) -> None:
    """Write text with a trained model.

    For example: [bold]kvbind generate runs/mine --prompt "def main(" --tokens 400[/]
    """
    import torch

    from kvbind.tasks.language import open_trained

    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must have at most 64 bits; got {seed}")
    model, words = open_trained(run, tokenizer)
    starts = [torch.from_numpy(words.encode(prompt))[None] for prompt in prompts]
    if not all(ids.numel() for ids in starts):
        raise ValueError("prompt must hold at least one token; got an empty text")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, screen = model.to(device), output.console()
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {"do_sample": False}
    )
    for number, ids in enumerate(starts):
        torch.manual_seed(seed)  # so each text is the one that its prompt gets alone
        written = model.generate(
            ids.to(device), max_new_tokens=tokens, pad_token_id=words.end, eos_token_id=words.end, **sampling
        )
        if number:
            screen.print()
        screen.print(words.decode(written[0].tolist()), soft_wrap=True)
