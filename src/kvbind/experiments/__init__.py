"""One module per table and figure of the paper, and per study beyond it."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

EXPERIMENTS = {
    "table1": "the full system beside gradient ascent and the key in place of the query",
    "table2": "the ladder: from the full system down to linear attention, one change at a time",
    "theorems": "every inner loop beside the linear attention that it is, compared in float64",
    "figure1": "more steps of the inner loop at test time: the inner loss against the metric",
    "figure2": "queries beside keys and outputs beside values: t-SNE, and numbers that need no eyes",
    "figure3": "loss by position in the sequence, every row of table 2",
    "figure4": "the recurrent and the parallel form of rung 2 in training, by the clock",
    "gaps": "every row's gap to the full system along its training: does it close?",
    "sizes": "the gap of rungs 2 and 6 to the full system, at three sizes of the language model",
    "chunks": "view synthesis whose input views come in 1, 2, 4 or 8 chunks, plain and elastic",
    "capacity": "associative recall by bytes of state: the ladder, every causal system and softmax attention",
    "systems": "language models of one size: loss, speed, decoding and state of systems side by side",
    "simplify": "a trained full system with a simpler inner loop, fine-tuned: how much of training from scratch that saves",
    "explorer": "every row's layers on a held-out input, prepared for the explorer of kvbind report",
}
"""What `kvbind reproduce` knows, and what each shows; a module below has the same name, and a function `reproduce`."""


def open_experiment(name: str) -> ModuleType:
    """The module of an experiment among `EXPERIMENTS`, in whichever folder it is."""
    here = Path(__file__).parent
    folders = {"": here, **{f"{folder.name}.": folder for folder in here.iterdir()}}
    (place,) = (place for place, x in folders.items() if name in {module.name for module in pkgutil.iter_modules([str(x)])})
    return importlib.import_module(f"{__name__}.{place}{name}")
