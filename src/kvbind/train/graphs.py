"""Work of training that repeats, captured once as a CUDA graph and replayed.

A step of a small model is hundreds of launches that cost the host more than the GPU. Captured, it is one. Work that is
captured reads its batch from buffers that stay where they are, which each batch is copied into, and leaves what it comes to
in tensors that exist before. Whatever the host decides while it is captured is decided for good: shapes, Python numbers, and
branches on values. Nothing that the host reads of a tensor can be captured.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Hashable
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kvbind.train.parallel import clip_

WARMUP = 2
"""Plain calls with a shape before it is captured: they compile and tune kernels, and make the optimizer's averages."""

MOST = 4
"""Shapes that are captured."""

LARGEST = 1 << 26
"""The most bytes of a tensor that a graph may read and that something else may forget."""

log = logging.getLogger(__name__)


class _Shape:
    """What is kept for one shape of batches: buffers, and how often they were used; then what replays the work."""

    def __init__(self, batch: Any, device: torch.device) -> None:
        leaves, self.tree = pytree.tree_flatten(batch)
        made: dict[int, Tensor] = {}
        for x in leaves:
            if isinstance(x, Tensor) and id(x) not in made:
                made[id(x)] = torch.empty_like(x, device=device, requires_grad=False)
        self.leaves = [made[id(x)] if isinstance(x, Tensor) else x for x in leaves]
        self.batch = pytree.tree_unflatten(self.leaves, self.tree)
        self.calls = 0
        self.replay: Callable[[], object] | None = None
        self.read: list[Tensor] = []

    def fill(self, batch: Any) -> None:
        """Copy a batch into the buffers; from pinned memory without waiting for it."""
        filled = set()
        for buffer, x in zip(self.leaves, pytree.tree_leaves(batch), strict=True):
            if isinstance(x, Tensor) and id(buffer) not in filled:
                buffer.copy_(x, non_blocking=True)
                filled.add(id(buffer))


class Replays:
    """Work on batches, captured for a few shapes of them and replayed.

    On a CPU nothing is captured; the work then runs on the same buffers.

    Args:
        work: takes a batch, and returns nothing: it leaves its results in tensors that exist before.
        device: where it runs.
        prepare: called before the work runs plainly or is captured, such as to give up gradients; not before a replay.
        name: what messages call it.
        relieve: called where memory does not suffice for a capture; whether the work needs less from now on, so that
            another capture is worth trying.

    Attributes:
        broken: why it cannot be captured; None as long as it can, as far as is known.
    """

    def __init__(
        self,
        work: Callable[[Any], object],
        device: torch.device,
        prepare: Callable[[], object] = lambda: None,
        name: str = "training steps",
        relieve: Callable[[], bool] = lambda: False,
    ) -> None:
        self.work, self.device, self.prepare, self.name, self.relieve = work, device, prepare, name, relieve
        self.broken: str | None = None
        self._shapes: dict[Hashable, _Shape] = {}
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._told = False

    @property
    def captured(self) -> int:
        """How many shapes are replayed."""
        return sum(shape.replay is not None for shape in self._shapes.values())

    def accepts(self, batch: Any) -> bool:
        """Whether batches of this shape are, or are going to be, replayed; if not, that is said once."""
        if self.broken is not None:
            return False
        key = shape_of(batch)
        if key is not None and key in self._shapes:
            return True
        if key is None:
            self._tell("a batch holds values that are not hashable")
            return False
        if len(self._shapes) < MOST:
            return True
        self._tell(f"batches have more than {MOST} shapes")
        return False

    def __call__(self, batch: Any) -> None:
        """Do the work on a batch: plainly at first, by a replay from then on if it is accepted."""
        if not self.accepts(batch):
            self.plainly(batch)
            return
        key = shape_of(batch)
        shape = self._shapes.get(key)
        if shape is None:
            # a buffer made in inference mode could not be trained on
            with torch.inference_mode(False):
                shape = self._shapes[key] = _Shape(batch, self.device)
        shape.fill(batch)
        shape.calls += 1
        if shape.replay is None and self.broken is None and shape.calls > WARMUP:
            shape.replay = self._capture(shape)
        if shape.replay is not None:
            shape.replay()
        elif self.device.type != "cuda" or self.broken is not None:
            self.plainly(shape.batch)
        else:
            # on the stream that captures, whose workspaces this makes
            stream, current = self._side(), torch.cuda.current_stream(self.device)
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                self.plainly(shape.batch)
            current.wait_stream(stream)

    def release(self) -> bool:
        """Give up all graphs and the memory that they keep; their shapes are captured anew when they come again.

        Returns:
            Whether there was one.
        """
        had = self.captured > 0
        for shape in self._shapes.values():
            shape.replay, shape.read = None, []
        self._pool = None
        return had

    def plainly(self, batch: Any) -> None:
        """Do the work on a batch without a graph."""
        self.prepare()
        self.work(to_device(batch, self.device))

    def _side(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        return self._stream

    def _capture(self, shape: _Shape) -> Callable[[], object] | None:
        """What replays the work on a shape's buffers; None where it cannot be captured. Executes nothing of it."""
        if self.device.type != "cuda":
            return lambda: self.work(shape.batch)
        self.prepare()
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        generator, current = torch.cuda.default_generators[index], torch.cuda.current_stream(self.device)
        before = generator.clone_state()
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        gc.collect()
        shape.read = alive(self.device)
        collecting = gc.isenabled()
        # what the collector would free belongs to other work
        gc.disable()
        try:
            # other threads go on: what they ask of the GPU, such as copies for a checkpoint, is no part of this
            with torch.cuda.graph(graph, pool=self._pool, stream=self._side(), capture_error_mode="thread_local"):
                self.work(shape.batch)
        except Exception as error:
            # whatever cannot be captured; an error of the work's own comes again where it runs plainly
            # the end of a capture that failed fails too
            reason = error.__context__ or error
            self.broken = " ".join(str(reason).split())[:200] or type(reason).__name__
            for other in self._shapes.values():
                other.replay, other.read = None, []
            del graph
            self._recover(index, generator, before, current)
            if isinstance(reason, torch.OutOfMemoryError) and self.relieve():
                self.broken = None
                torch.cuda.empty_cache()
                return self._capture(shape)
            self._tell(self.broken)
            return None
        finally:
            if collecting:
                gc.enable()
        return graph.replay

    def _recover(self, index: int, generator: Any, before: Any, current: torch.cuda.Stream) -> None:
        """Put back what a capture that did not come to its end has left: stream, generator, allocator, the last error."""
        torch.cuda.set_stream(current)
        generator.graphsafe_set_state(before)
        with suppress(Exception):
            torch._C._cuda_endAllocateToPool(index, self._pool)
        self._pool = self._stream = None
        for _ in range(2):  # the first call after an error may be told of it
            with suppress(Exception):
                torch.cuda.synchronize(self.device)
                torch.zeros(1, device=self.device)

    def _tell(self, reason: str) -> None:
        if not self._told:
            self._told = True
            log.warning("%s are not replayed as CUDA graphs, or not all of them: %s", self.name, reason)


def shape_of(batch: Any) -> Hashable | None:
    """What a captured graph depends on of a batch: its tensors' shapes, dtypes and strides, and all that is no tensor.

    Returns:
        None where something that is no tensor is not hashable.
    """
    leaves, tree = pytree.tree_flatten(batch)
    first: dict[int, int] = {}
    key = (
        repr(tree),
        *(
            (tuple(x.shape), x.dtype, x.stride(), first.setdefault(id(x), i)) if isinstance(x, Tensor) else (type(x), x)
            for i, x in enumerate(leaves)
        ),
    )
    try:
        hash(key)
    except TypeError:
        return None
    return key


def alive(device: torch.device) -> list[Tensor]:
    """All tensors on a GPU that Python holds, up to `LARGEST`.

    A graph reads tables and masks that were made before it and that caches hold, by their addresses: they must outlive it,
    though a cache forgets them.
    """
    # by their types, as asking an object of another library for its class may do anything
    found = [x for x in gc.get_objects() if type(x) is Tensor or type(x) is nn.Parameter]
    return [x for x in found if x.device.type == device.type and x.layout == torch.strided and x.nbytes <= LARGEST]


def skipping_step(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """A step of a fused optimizer that changes nothing, step counts included, where `finite` (bool, a scalar) is False.

    The device alone decides, as it does for gradients that were scaled (`torch.amp`).
    """
    groups = [group for group in optimizer.param_groups if "capturable" in group]
    before = [group["capturable"] for group in groups]
    fused: Any = optimizer
    fused.found_inf = finite.logical_not().float()
    try:
        for group in groups:
            group["capturable"] = finite.is_cuda and torch.cuda.is_current_stream_capturing()
        optimizer.step()
    finally:
        del fused.found_inf
        for group, was in zip(groups, before, strict=True):
            group["capturable"] = was


class GraphedStep:
    """A whole training step of one's own loop as a CUDA graph: forward, backward, clipping and the optimizer.

    ```python
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    step = kvbind.train.GraphedStep(model, optimizer, lambda model, batch: model(**batch).loss, clip=1.0)
    for batch in loader:
        loss = step(batch)
    ```

    Batches may be on the CPU, best in pinned memory. The first two of each shape run plainly, the third is captured; after a
    few shapes, or where something cannot be captured, steps go on as they are and a warning says why. A step whose loss or
    gradients are not finite changes no parameter and no average of the optimizer. Learning rates become tensors, which
    torch's schedulers fill; to set one by hand, `group["lr"].fill_(rate)`. Python numbers in a batch are part of its shape.

    What `loss` does must not depend on values that the host reads from tensors: packed documents (`cu_seqlens`) and masks of
    padding are, and are refused by a capture. Random numbers of the GPU's default generator go on as without graphs.

    Args:
        model: any module, on its device, not distributed.
        optimizer: a fused one of torch's, such as `AdamW(..., fused=True)`, of the model's parameters.
        loss: takes the model and a batch (a pytree of tensors), returns a scalar.
        clip: the largest gradient norm; None for any.
        autocast: the dtype of matrix products, such as `torch.bfloat16`; None for that of the parameters.

    Raises:
        TypeError: an optimizer that is not fused.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[Any, Any], Tensor],
        *,
        clip: float | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            raise TypeError(
                "optimizer must be a fused one, such as torch.optim.AdamW(parameters, fused=True); got "
                f"{type(optimizer).__name__} without fused=True"
            )
        self.model, self.optimizer, self.loss, self.clip, self.autocast = model, optimizer, loss, clip, autocast
        self.device = next(model.parameters()).device
        self.outcome = torch.zeros((), device=self.device)
        self.norm = torch.zeros((), device=self.device)
        self._replays = Replays(self._work, self.device, self._begin)
        for group in optimizer.param_groups:
            if not isinstance(group["lr"], Tensor):
                group["lr"] = torch.tensor(group["lr"], dtype=rate_dtype(self.device), device=self.device)

    def __call__(self, batch: Any) -> Tensor:
        """Take a step.

        Args:
            batch: a pytree of tensors, on any device.

        Returns:
            The loss, a scalar float32 on the device, not waited for; `norm` holds that of the gradients before clipping.
        """
        self._replays(batch)
        return self.outcome.clone()

    @property
    def captured(self) -> int:
        """How many shapes of batches are replayed."""
        return self._replays.captured

    def _begin(self) -> None:
        # a capture makes gradients in its own memory
        self.optimizer.zero_grad(set_to_none=True)

    def _work(self, batch: Any) -> None:
        kind = self.autocast
        with nullcontext() if kind is None else torch.autocast(self.device.type, dtype=kind):
            loss = self.loss(self.model, batch)
        loss.backward()
        norm = clip_(self.model.parameters(), float("inf") if self.clip is None else self.clip, 1.0)
        skipping_step(self.optimizer, loss.detach().isfinite() & norm.isfinite())
        self.outcome.copy_(loss.detach())
        self.norm.copy_(norm)
        self.optimizer.zero_grad(set_to_none=True)


def to_device(batch: Any, device: torch.device) -> Any:
    """A pytree with its tensors on `device`."""
    return pytree.tree_map_only(Tensor, lambda x: x.to(device, non_blocking=True), batch)


def rate_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which fused optimizers take a learning rate that is a tensor."""
    return torch.float64 if device.type == "cpu" else torch.float32


def graph_trainer(trainer: Any) -> Any:
    """Let a transformers `Trainer` replay the forward and backward passes of its training steps as CUDA graphs.

    ```python
    trainer = kvbind.train.graph_trainer(Trainer(model, args, train_dataset=data))
    trainer.train()
    ```

    Clipping and the optimizer stay the Trainer's own; `TrainingArguments(optim="adamw_torch_fused")` makes few launches of
    them. Evaluation and generation are as before. Batches must have a few shapes (`dataloader_drop_last=True`) and no
    `attention_mask` or `cu_seqlens`, whose values the host reads; others run as before, and a warning says so once.

    Args:
        trainer: on one device, without DeepSpeed or FSDP.

    Returns:
        The same trainer.

    Raises:
        ValueError: a trainer on several devices.
    """
    devices = max(trainer.args.world_size, trainer.args.n_gpu)
    if devices > 1:
        raise ValueError(f"trainer must train on one device; it has {devices}")
    plain = trainer.training_step
    held: dict[str, Any] = {}

    def make(model: nn.Module) -> Replays:
        device = next(model.parameters()).device
        loss, gradients = torch.zeros((), device=device), Gradients(model)

        def work(batch: Any) -> None:
            loss.copy_(plain(model, dict(batch["inputs"]), batch["items"]).detach())
            gradients.adopt()

        held.update(loss=loss, gradients=gradients, model=model)
        return Replays(work, device, gradients.attach, "the Trainer's forward and backward passes")

    def training_step(model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if held.get("model") is not model:
            held["replays"] = make(model)
        # a share of a step is divided by a Python number, which a graph holds
        batch = {
            "inputs": dict(inputs),
            "items": num_items_in_batch,
            "shares": getattr(trainer, "current_gradient_accumulation_steps", 1),
        }
        replays: Replays = held["replays"]
        held["gradients"].attach()
        replays(batch)
        return held["loss"].clone()

    trainer.training_step = training_step
    return trainer


class Gradients:
    """Gradients that stay where they are, so that several graphs add to them.

    Args:
        model: whose they are. Which parameters have some is seen when they first do.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = list(model.parameters())
        self.kept: dict[int, Tensor] = {}

    def adopt(self) -> None:
        """Keep gradients that have come about outside of a capture."""
        if self.parameters and self.parameters[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return
        for i, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                self.kept.setdefault(i, parameter.grad)

    def attach(self) -> None:
        """Put kept gradients, zeroed, in place of those that were given up."""
        back = [i for i in self.kept if self.parameters[i].grad is not self.kept[i]]
        if back:
            torch._foreach_zero_([self.kept[i] for i in back])
        for i in back:
            self.parameters[i].grad = self.kept[i]

    def zero(self) -> None:
        """Zero all of them in place."""
        if self.kept:
            torch._foreach_zero_(list(self.kept.values()))
