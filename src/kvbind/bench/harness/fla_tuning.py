"""Autotuners of Triton's that compile all that they choose from at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def compiling_configurations() -> Iterator[None]:
    """Inside, all that an autotuner of Triton's chooses from is compiled at once, at its first launch.

    fla's kernels of linear attention choose from up to 48 configurations each, some 120 in all, compiled one by one.
    """
    from triton.runtime.autotuner import Autotuner

    from kvbind.kernels.launching.warm_up import compiling_ahead

    before, met = Autotuner.run, set()

    def run(self: Any, *args: Any, warmup: bool = False, **kwargs: Any) -> Any:
        if self not in met:
            met.add(self)
            with compiling_ahead():
                self.warmup(*args, **kwargs)
        return before(self, *args, warmup=warmup, **kwargs)

    Autotuner.run = run
    try:
        yield
    finally:
        Autotuner.run = before
