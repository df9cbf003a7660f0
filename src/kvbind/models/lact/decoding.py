"""Generation's next token as one CUDA graph, which the model's `forward` replays by itself.

A token of a decoding step is some thirty launches in every layer, which take the host ten times what they take the GPU.
Here all of them are one replay: of the step function `token`, plain PyTorch and kernels on tensors that stay where they are
(`kvbind.layers.lact.slots`). Where a chunk of some rows ends, a second graph updates their fast weights: one for all rows,
where all are due, and one for a single row that is replayed for each, where prompts had different lengths. Calls update by
the same rule, layer by layer, with the same operators (`kvbind.forms.pending`), so that tokens do not depend on who runs
them.

Who owns what:

- a `Rows` is one set of such tensors with its graphs, for one batch size. A `LactCache` that goes on by single tokens moves
  into it (`Rows.admit`), and its states are then there and nowhere else. It moves out (`LactCache.states`) when anybody
  looks at them, copies or saves them, or when the rows are needed by another cache: what it then has is what eager decoding
  would have left, in tensors of its own, and it moves in again with its next token. Reordering (beams) happens in place.
- a `Decoder` holds the sets of a model, those alone that a cache is in and the one used last; it goes with the model, which
  nothing here holds.

A graph holds addresses of parameters and what Python decided while it was captured. Before each replay the host looks at
whether that still holds (`Model.same`): modules, parameters and their addresses, hooks, inner loops, PyTorch's precision of
products. If not, all is captured anew, or decoding goes on without graphs and a log line says why.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kvbind.forms.autocast import autocasts
from kvbind.kernels.common.tracing import is_eager
from kvbind.kernels.launching import cuda_graphs
from kvbind.layers.attention.modules import WindowAttention
from kvbind.layers.fast_weights.layer import FastWeightLayer
from kvbind.layers.lact.layer import LactLayer, LactState
from kvbind.layers.lact.slots import DecodeStep, Slots
from kvbind.layers.plain_modules import WEIGHTS
from kvbind.layers.rotary import rotary_tables

if TYPE_CHECKING:
    from kvbind.models.lact.cache import MixerState

log = logging.getLogger(__name__)

SOON = 64
"""Tokens before a chunk's end at which its update is captured at the latest."""

MOST_MOVES = 3
"""How often a cache may be sent out of rows that it shares with others before it stays out."""


def token(model: Any, ids: Tensor, seen: Tensor, layers: Sequence[Slots]) -> Tensor:
    """One more token of each row: the step function. Reads and writes tensors that stay where they are.

    Args:
        model: a `LactForCausalLM`.
        ids: the tokens, int64 `[B, 1]`.
        seen: how many each row has had, int64 `[B]`; counted on here.
        layers: where the rows are in each layer.

    Returns:
        Logits of what comes next, `[B, 1, vocab]`.
    """
    config, body = model.config, model.model
    place = DecodeStep.of(seen, layers[0].window, layers[0].chunk)
    tables = rotary_tables(place.positions, config.hidden_size // config.num_attn_heads, config.rope_theta)
    x = body.embeddings(ids)
    for block, slots in zip(body.layers, layers, strict=True):
        x = block.step(x, tables, place, slots)
    logits: Tensor = model.lm_head(body.norm(x))
    seen.add_(1)
    return logits


class Rows:
    """Room for the rows of one cache, and the graphs that work on it.

    Args:
        model: whose rows.
        batch: how many.

    Attributes:
        seen: how many tokens each row has had, as the host counts.
    """

    def __init__(self, model: Any, batch: int) -> None:
        self.device, self.batch = model.device, batch
        self.seen: tuple[int, ...] = ()
        self.holder: weakref.ref[Any] | None = None
        self.layers: list[Slots] = []
        self.ids = torch.zeros(self.batch, 1, dtype=torch.long, device=self.device)
        self.counts = torch.zeros(self.batch, dtype=torch.long, device=self.device)
        self.logits: Tensor | None = None
        self.row = torch.zeros(1, dtype=torch.long, device=self.device)
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self.graphs: dict[str, Callable[[], object]] = {}
        self.done = torch.cuda.Event() if self.device.type == "cuda" else None

    @property
    def cache(self) -> Any:
        """The cache that is in here, or None."""
        return None if self.holder is None else self.holder()

    def admit(self, model: Any, cache: Any, states: list[MixerState | None]) -> None:
        """Move a cache in; its states are given up one by one, so that there is never a second copy of all of them."""
        first = states[0]
        assert first is not None
        self.seen = first.seen
        self.counts.copy_(torch.tensor(self.seen))
        try:
            for i, block in enumerate(model.model.layers):
                state = states[i]
                assert isinstance(state, LactState)
                if i == len(self.layers):
                    self.layers.append(block.attn.slots(state))
                self.layers[i].load(state.held, state.cache, self.seen)
                states[i] = state = None
        except Exception:
            for i, slots in enumerate(self.layers):
                if states[i] is None:
                    states[i] = LactState(*slots.state(self.seen), self.seen, slots.value_writer)
            raise
        self.holder = weakref.ref(cache)

    def release(self) -> list[MixerState]:
        """Move the cache out: its states, in tensors of their own."""
        self.holder = None
        return [LactState(*slots.state(self.seen), self.seen, slots.value_writer) for slots in self.layers]

    def reorder(self, order: list[int]) -> None:
        """Have rows `order` in this order."""
        moved = [(a, b) for b, a in enumerate(order) if a != b]
        if moved:
            source, target = torch.tensor(moved, device=self.device).unbind(1)
            for slots in self.layers:
                slots.move(source, target)
            self.counts.index_copy_(0, target, self.counts.index_select(0, source))
            self.seen = tuple(self.seen[i] for i in order)

    def run(self, model: Any, ids: Tensor) -> Tensor:
        """One more token of each row; logits `[B, 1, vocab]`."""
        if self.done is not None:
            # callers may be on streams of their own
            torch.cuda.current_stream(self.device).wait_event(self.done)
        self.ids.copy_(ids)

        def work() -> None:
            self.logits = token(model, self.ids, self.counts, self.layers)

        if "token" not in self.graphs:
            # at first in earnest and as it comes, which compiles it
            self._aside(work)
            assert self.logits is not None
            logits = self.logits
            # what the graph writes logits to is the graph's
            self.graphs["token"] = cuda_graphs.capture(work, self.device, self.stream, self.pool)
        else:
            self.graphs["token"]()
            assert self.logits is not None
            logits = self.logits.clone()
        self.seen = tuple(n + 1 for n in self.seen)
        chunk = self.layers[0].chunk
        past = [n % chunk for n in self.seen]
        due = [i for i, n in enumerate(past) if n == 0]
        name = "all" if len(set(past)) == 1 else "one"
        if name not in self.graphs and (due or max(self.seen) >= chunk or chunk - max(past) <= SOON):
            self._prepare(name)
        for i in due if name == "one" else due[:1]:
            if name == "one":
                self.row.fill_(i)
            self.graphs[name]()
        if self.done is not None:
            self.done.record(torch.cuda.current_stream(self.device))
        return logits

    def _prepare(self, name: str) -> None:
        """Capture the update of all rows, or of one."""
        rows = None if name == "all" else self.row
        # layers are alike
        self._aside(lambda: self.layers[0].complete(self.counts, rows, store=False))

        def work() -> None:
            for slots in self.layers:
                slots.complete(self.counts, rows)

        try:
            self.graphs[name] = cuda_graphs.capture(work, self.device, self.stream, self.pool)
        except RuntimeError as error:
            log.info("chunks are not completed by a CUDA graph: %s", error)
            self.graphs[name] = work

    def _aside(self, work: Callable[[], object]) -> None:
        """Do work on the stream that captures, whose workspaces this makes."""
        if self.stream is None:
            work()
            return
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            work()
        current.wait_stream(self.stream)


class Model:
    """What a capture takes for granted of a model.

    Args:
        model: a `LactForCausalLM`.
    """

    def __init__(self, model: Any) -> None:
        self.modules: list[tuple[dict[str, Any], str, nn.Module]] = []
        self.parameters: list[tuple[dict[str, Any], str, Tensor, int]] = []
        for module in model.modules():
            self.modules += [(module._modules, name, x) for name, x in module._modules.items() if x is not None]
            for held in (module._parameters, module._buffers):
                self.parameters += [(held, name, x, x.data_ptr()) for name, x in held.items() if x is not None]
        self.layers = [(layer, *_of_layer(layer)) for layer in model.modules() if isinstance(layer, LactLayer)]
        self.hooks, self.settings = RemovableHandle.next_id, _settings(model)

    def same(self, model: Any) -> bool:
        """Whether all of it still holds."""
        if RemovableHandle.next_id != self.hooks:
            if hooked(model):
                return False
            self.hooks = RemovableHandle.next_id
        if any(held.get(name) is not x for held, name, x in self.modules):
            return False
        if any(held.get(name) is not x or x.data_ptr() != place for held, name, x, place in self.parameters):
            return False
        if self.settings != _settings(model):
            return False
        return all(layer._inner is inner and _of_layer(layer)[1:] == rest for layer, inner, *rest in self.layers)


def _of_layer(layer: LactLayer) -> list[Any]:
    """What is taken for granted of a layer beside its modules and parameters, its inner loop first."""
    return [layer._inner, layer.window_size, layer.decode_dtype]


def _settings(model: Any) -> tuple[Any, ...]:
    """What else decides which operators run, and on which numbers."""
    return (
        model.config.rope_theta,
        os.environ.get("KVBIND_KERNELS"),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
    )


def hooked(model: nn.Module) -> str | None:
    """Which module has hooks, or another `forward` in its place; None where none has."""
    if nn.modules.module._has_any_global_hook():
        return "all modules have a hook"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return f"{name or 'the model'} has a hook or another forward"
    return None


_kinds: list[type] = []
"""The classes whose forwards a captured step stands for, as `stands_for` notes them."""


def stands_for(causal_model: type, model: type, block: type) -> None:
    """Say which classes a captured step computes as: a model that derives from one, with a forward of its own, is not."""
    _kinds[:] = causal_model, model, block


def obstacle(model: Any) -> str | None:
    """Why a model's steps cannot be captured; None where they may be."""
    causal_model, inner_model, block_kind = _kinds

    def derived(module: Any, kind: type) -> bool:
        return not isinstance(module, kind) or type(module).forward is not kind.forward  # type: ignore[attr-defined]

    if derived(model, causal_model) or derived(model.model, inner_model):
        return "the model has a forward of its own"
    for block in model.model.layers:
        if isinstance(block.attn, FastWeightLayer | WindowAttention):
            return f"layers are {type(block.attn).__name__}s, of which no graph is made"
        if derived(block, block_kind) or derived(block.attn, LactLayer):
            return "a block has a forward of its own"
    found = hooked(model)
    if found is not None:
        return found
    device = model.device
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if type(x) not in WEIGHTS or x.device != device:
            return f"{name} is a {type(x).__name__} on {x.device}"
    specs = [block.inner for block in model.model.layers]
    if any(not spec.same_as(specs[0]) for spec in specs):
        return "layers have different inner loops"
    if specs[0].visibility != "past":
        return f"tokens see more than the last update (visibility={specs[0].visibility!r})"
    if specs[0].extensions:
        return f"inner loops have {', '.join(specs[0].extensions)}"
    return None


def can_capture(device: torch.device) -> bool:
    """Whether there are graphs on a device."""
    return device.type == "cuda"


class Decoder:
    """The rows of one model."""

    def __init__(self) -> None:
        self.rows: list[Rows] = []
        self.known: Model | None = None
        self.told: set[str] = set()
        self.lock = threading.RLock()

    def tell(self, reason: str) -> None:
        """Say once why decoding goes without graphs."""
        if reason not in self.told:
            self.told.add(reason)
            log.info("decoding does not run as CUDA graphs: %s", reason)

    def run(self, model: Any, cache: Any, ids: Tensor) -> Tensor | None:
        """One more token of each row of a cache; None where it cannot be captured, and the cache is then as it was."""
        with self.lock:
            reason = self._look(model)
            if reason is None and cache.moves > MOST_MOVES:
                reason = "caches of one batch size take turns token by token"
            if reason is None:
                try:
                    rows = self._rows_for(model, cache)
                    if rows is not None:
                        return rows.run(model, ids)
                    reason = "a cache is not what this model makes"
                except Exception as error:
                    if cache.rows is not None and "token" in cache.rows.graphs:
                        raise
                    # an error of the work's own comes again where it runs plainly; what a token writes does not count
                    # before the step is done
                    reason = f"{type(error).__name__}: {error}"
                    cache.settle()
                    self.rows = [x for x in self.rows if "token" in x.graphs]
            cache.refused = reason
            self.tell(reason)
            return None

    def _look(self, model: Any) -> str | None:
        """Forget what was captured of a model that has changed since; why it cannot be captured now."""
        if self.known is not None and self.known.same(model):
            return None
        for rows in self.rows:
            if rows.cache is not None:
                rows.cache.settle()
        self.rows.clear()
        self.known = None
        reason = obstacle(model)
        if reason is None:
            self.known = Model(model)
        return reason

    def _rows_for(self, model: Any, cache: Any) -> Rows | None:
        """Where a cache is, or where it now moves in."""
        rows: Rows | None = cache.rows
        if rows is not None:
            if any(rows is x for x in self.rows):
                return rows
            cache.settle()
        # nothing here holds on to states, which are given up one by one as they move in
        if not fits(model, cache.states):
            return None
        batch = len(cache.seen)
        # those that no cache is in are given up for others
        same = next((x for x in self.rows if x.batch == batch), None)
        self.rows = [x for x in self.rows if x is same or x.cache is not None]
        if same is None:
            with torch.inference_mode(False):
                same = Rows(model, batch)
            self.rows.append(same)
        elif same.cache is not None:
            same.cache.moves += 1
            same.cache.settle()
        with torch.inference_mode(False), torch.no_grad():
            cache.move_into(same, model)
        return same


def fits(model: Any, states: Sequence[MixerState]) -> bool:
    """Whether states are what a model's own calls leave."""
    if len(states) != len(model.model.layers):
        return False
    dtype = model.model.embeddings.weight.dtype
    for block, state in zip(model.model.layers, states, strict=True):
        if not isinstance(state, LactState):
            return False
        layer, fast, keys = block.attn, state.pending.state, state.cache.keys
        chunk = layer.inner.chunk
        if not fast.spec.same_as(layer.inner) or keys.dtype != dtype or keys.device != model.device:
            return False
        if keys.shape[1] != layer.window_size - 1 or state.seen != states[0].seen:
            return False
        pending = tuple(n + state.pending.count for n in fast.pending_lengths)
        if pending != tuple(n % chunk for n in state.seen) or (chunk > 1 and not fast.has_room):
            return False
        if any(x.dtype != fast.dtype for name, x in fast.tensors.items() if not name.startswith("pending.")):
            return False
    return True


_decoders: weakref.WeakKeyDictionary[nn.Module, Decoder] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def decoder_of(model: nn.Module) -> Decoder:
    """A model's decoder, which goes with it."""
    with _lock:
        found = _decoders.get(model)
        if found is None:
            found = _decoders[model] = Decoder()
        return found


def decode(
    model: Any, cache: Any, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
) -> Tensor | None:
    """Logits `[B, 1, vocab]` of one more token of each row of a cache, which they advance; None where that is for `forward`.

    Args:
        model: a `LactForCausalLM`.
        cache: of tokens before.
        input_ids: `[B, 1]`.
        attention_mask: as the model takes it.
        position_ids: `[B, 1]` as the model takes them, or None.
    """
    if cache.refused is not None or not is_eager() or not cuda_graphs.switched_on():
        return None
    decoder = decoder_of(model)
    if torch.is_grad_enabled():
        decoder.tell("gradients are on: call the model under torch.no_grad()")
        return None
    if not can_capture(input_ids.device):
        decoder.tell(f"there are none on {input_ids.device.type!r}")
        return None
    if autocasts(input_ids.device.type):
        decoder.tell("autocast is on")
        return None
    seen = cache.seen
    if len(seen) != len(input_ids) or input_ids.device != model.device or not plain(cache, attention_mask, position_ids):
        return None
    logits = decoder.run(model, cache, input_ids)
    if logits is not None:
        cache.columns += 1
    return logits


def plain(cache: Any, attention_mask: Tensor | None, position_ids: Tensor | None) -> bool:
    """Whether every row has a token now, at the position behind those that it has had."""
    wrong = []
    if attention_mask is not None:
        if tuple(attention_mask.shape) != (len(cache.seen), cache.columns + 1):
            return False
        wrong.append((attention_mask[:, -1] == 0).any())
    if position_ids is not None:
        if position_ids.shape[-1] != 1 or position_ids.dim() != 2 or len(position_ids) not in (1, len(cache.seen)):
            return False
        rows = cache.rows
        same = len(set(cache.seen)) == 1
        before = cache.seen[0] if same else None
        if before is None:
            before = rows.counts if rows is not None else torch.tensor(cache.seen, device=position_ids.device)
        wrong.append((position_ids[:, 0] != before).any())
    # one wait for the device at the most
    return not wrong or not bool(wrong[0] if len(wrong) == 1 else wrong[0] | wrong[1])
