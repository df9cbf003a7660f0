"""A CPU's stand-in for CUDA graphs: work is recorded operator by operator, and replayed on the memory it was recorded on.

As with a graph, nothing of Python runs again: a branch is what it was, a tensor that was made anew has the address it had,
and reading a value on the host is refused. Unlike a graph's capture, recording executes the work; `capture` undoes that.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recording(TorchDispatchMode):
    """Records operators, in order, with their operands and results."""

    def __init__(self):
        super().__init__()
        self.operators = []
        self.written = {}
        self.made = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing: a value is read on the host")
        for x, argument in zip(args, func._schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._before(x)
        for name, x in kwargs.items():
            argument = next(a for a in func._schema.arguments if a.name == name)
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._before(x)
        result = func(*args, **kwargs)
        leaves = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        kinds = [r.alias_info for r in func._schema.returns]
        view = any(k is not None and not k.is_write for k in kinds)
        fresh = all(k is None for k in kinds)
        if fresh:
            self.made.update(x.untyped_storage().data_ptr() for x in leaves)
        if not view:
            self.operators.append((func, args, kwargs, leaves if fresh else None))
        return result

    def _before(self, x):
        for t in tree_leaves(x):
            storage = t.untyped_storage()
            if storage.data_ptr() not in self.made and storage.data_ptr() not in self.written:
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                self.written[storage.data_ptr()] = (whole, whole.clone())

    def undo(self):
        """Put back what was written of memory that existed before."""
        for whole, before in self.written.values():
            whole.copy_(before)

    @property
    def kinds(self):
        """What ran, on what: operators with the shapes, strides and dtypes of their operands."""
        return tuple(
            (str(func), tuple(_kind(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)))
            for func, args, kwargs, _ in self.operators
        )

    def replay(self):
        """All of it again, in place."""
        for func, args, kwargs, fresh in self.operators:
            result = func(*args, **kwargs)
            if fresh is not None:
                for mine, new in zip(fresh, [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)], strict=True):
                    mine.copy_(new)


def _kind(x):
    # of an axis of one place no stride is of any meaning
    strides = tuple(stride if size > 1 else 0 for stride, size in zip(x.stride(), x.shape, strict=True))
    return tuple(x.shape), strides, x.dtype


def capture(work, *_):
    """What replays `work`; as with a graph, it has not been done."""
    recording = Recording()
    with recording:
        work()
    recording.undo()
    return recording.replay
