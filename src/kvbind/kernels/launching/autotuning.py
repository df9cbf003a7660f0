"""Kernels that choose among a few configurations at their first call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from kvbind.kernels.common.devices import interpreted
from kvbind.kernels.launching.launcher import Launcher
from kvbind.kernels.launching.warm_up import compiling_ahead, is_new, warming_up


class Tuned:
    """A kernel with a short list of configurations, of which each combination of widths takes the fastest.

    Triton's autotuner chooses, at the first call, and keeps its choice on disk beside the compiled kernels; later calls go
    past it, as it takes longer than a launch. What it chooses from is compiled all at once.
    """

    def __init__(self, autotuner: Any) -> None:
        self.autotuner = autotuner
        self.launcher = Launcher(autotuner.fn)
        self.chosen: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.tuned: set[tuple[Any, ...]] = set()
        self.places = [place for place, name in enumerate(autotuner.arg_names) if name in autotuner.keys]
        # Triton's autotuner is for one thread, and gradients are computed in others
        self.lock = threading.Lock()

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return partial(self.launch, grid)

    def launch(self, grid: Any, *args: Any, **constants: Any) -> None:
        """Launch on `grid`, a function of the constants; constants are given by keyword."""
        chooses = [args[place] for place in self.places if place < len(args)]
        key = (args[0].dtype, args[0].device, *constants, *constants.values(), *chooses)
        config = self.chosen.get(key)
        if config is not None:
            self.launcher.launch(grid, *args, **constants, **config)
        elif not warming_up():
            with self.lock:
                self.tune(grid, args, constants, chooses)
                self.chosen[key] = self.autotuner.best_config.all_kwargs()
        elif not self.launcher.interpreted and is_new((self, key)):
            with self.lock:
                self.autotuner.warmup(*args, grid=grid, **constants)

    def tune(self, grid: Any, args: tuple[Any, ...], constants: dict[str, Any], chooses: list[Any]) -> None:
        """Launch with what the autotuner chooses."""
        dtypes = [x.dtype for x in args if isinstance(x, Tensor)]
        choice = (*dtypes, *chooses, *(x for name, x in constants.items() if name in self.autotuner.keys))
        if choice not in self.tuned and args[0].is_cuda and not self.launcher.interpreted:
            with compiling_ahead():
                self.autotuner.warmup(*args, grid=grid, **constants)
        self.autotuner.run(*args, grid=grid, warmup=False, **constants)
        self.tuned.add(choice)


def tuned(configs: Sequence[Any], key: Sequence[str], wide: Any = None) -> Callable[[Any], Tuned]:
    """Make a kernel choose among configurations; it may run more than once on the same arguments.

    All compile-time constants must be given by keyword. `key` must name widths, which a model has few of, and never a number
    of tokens, so that a new length neither compiles nor tunes. The interpreter takes the first configuration.

    Args:
        configs: `triton.Config`s.
        key: names of kernel arguments whose values choose.
        wide: the one configuration for a first argument in float32, whose tiles take twice the room; None for those above.
    """
    import triton

    def fitting(listed: list[Any], arguments: dict[str, Any], **_: Any) -> list[Any]:
        first = next(iter(arguments.values()))
        return [wide] if wide is not None and first.dtype.itemsize > 2 else [c for c in listed if c is not wide]

    def time(call: Callable[[], Any], quantiles: Sequence[float]) -> Any:
        return triton.testing.do_bench(call, warmup=3, rep=12, quantiles=quantiles)

    def choose(kernel: Any) -> Tuned:
        if interpreted():
            return Tuned(triton.autotune(configs=list(configs)[:1], key=list(key))(kernel))
        listed = [*configs, *([wide] if wide is not None else [])]
        prune = {"early_config_prune": fitting}
        return Tuned(triton.autotune(listed, list(key), prune_configs_by=prune, do_bench=time, cache_results=True)(kernel))

    return choose
