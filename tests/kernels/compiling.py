"""Compile kernels for GPUs that are not there: what a launch would have run, with its use of registers and shared memory."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from kvbind.kernels.launching.autotuning import Tuned

POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
    torch.bool: "*i1", torch.uint8: "*u8", torch.int8: "*i8",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """A kernel as it was compiled: registers per thread, bytes of stack per thread, bytes of shared memory per block."""

    name: str
    options: dict[str, Any]
    registers: int
    stack: int
    shared: int
    tensor_cores: str


def compile_call(fn: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any], capability: int) -> Compiled:
    """Compile what `fn[grid](*args, **kwargs)` would run."""
    options = {name: kwargs[name] for name in ("num_warps", "num_stages", "num_ctas", "maxnreg") if name in kwargs}
    values = dict(zip(fn.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in fn.arg_names}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(fn.params):
        name = parameter.name
        value = values.get(name, parameter.default)
        plain = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not plain):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            block = ", ".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{POINTERS[value.base.dtype][1:]}[{block}]>"
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(place,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i64" if abs(value) >= 2**31 else "i32"
            if value % 16 == 0 and not plain:
                attributes[(place,)] = [["tt.divisibility", 16]]
    kernel = triton.compile(
        ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {key: int(x) for key, x in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = kernel.asm["ptx"]
    named = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}
    units = next((unit for unit, instruction in named.items() if instruction in ptx), "none")
    shapes = {k: v for k, v in kwargs.items() if k.isupper() or k.startswith("num_")}
    return Compiled(fn.__name__, shapes, found["REG"], found["STACK"] + found["LOCAL"], kernel.metadata.shared, units)


@contextlib.contextmanager
def compiling(capability: int = 90, enough: Callable[[Compiled], bool] = lambda _: False) -> Iterator[list[Compiled]]:
    """Inside, launches compile instead of running; each configuration of a tuned kernel is compiled once.

    Of a tuned kernel, configurations after one that is `enough` are left out.
    """
    found: list[Compiled] = []
    seen: set[str] = set()

    def run(self: JITFunction, *args: Any, grid: Any = None, warmup: bool = False, **kwargs: Any) -> None:
        tensors = [str(a.dtype) for a in args if isinstance(a, torch.Tensor)]
        tensors += [f"{a.base.dtype}{a.block_shape}" for a in args if isinstance(a, TensorDescriptor)]
        key = f"{self.__name__} {tensors} {sorted(kwargs.items(), key=str)}"
        if key not in seen:
            seen.add(key)
            found.append(compile_call(self, args, kwargs, capability))

    def tune(self: Autotuner, *args: Any, **kwargs: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(kwargs):
            self.fn.run(*args, **kwargs, **config.all_kwargs())
            self.best_config = config
            if enough(found[-1]):
                break

    def choose(self: Tuned, grid: Any, *args: Any, **constants: Any) -> None:
        # what was chosen for another device, or is chosen here, is of no use to others
        self.autotuner.run(*args, grid=grid, warmup=False, **constants)

    before = JITFunction.run, Autotuner.run, Tuned.launch
    JITFunction.run, Autotuner.run, Tuned.launch = run, tune, choose  # type: ignore[method-assign]
    try:
        yield found
    finally:
        JITFunction.run, Autotuner.run, Tuned.launch = before  # type: ignore[method-assign]
