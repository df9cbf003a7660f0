"""The MLP of a language model's block as fast weights: In-Place TTT (arXiv 2604.06169).

The inner loop is `kvbind.systems.in_place_ttt`: of `f(x) = phi(x) W`, with `phi(x) = act(x W_gate) * (x W_up)`, the last
layer `W` is updated once per chunk, `W <- W + lr sum_i phi(x_i)^T v_i`, and a chunk reads what earlier chunks wrote.

The writes do not read W. So with `W = W_0 + D` the output is `phi(x) W_0 + phi(x) D`, where the first term is the MLP as it
was and D is the same inner loop's from zero, on features in place of inputs. That is how it is evaluated: the MLP's own
layers are called, each once for every token, so that adapters, hooks, biases and quantized weights count, no matrix is
copied, and D alone is kept per sequence, in float32 whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvbind.forms.api import ttt
from kvbind.forms.autocast import without_autocast
from kvbind.forms.evaluate import FORMS, Form
from kvbind.inner.networks import Linear
from kvbind.inner.systems import in_place_ttt
from kvbind.inner.value import check_choice, check_positive, check_positive_int
from kvbind.layers.in_place.chunk_plan import ChunkPlan, PendingColumns, plan_of
from kvbind.layers.inner_call import InnerCall, check_input
from kvbind.layers.plain_modules import input_dtype, is_a_product

PROJECTION_STD = 0.02
"""Of the projection's diagonal at the start."""

SPAN = 8
"""Chunks that are run at once where no gradient is wanted, to bound the memory of their states."""


@dataclass(frozen=True)
class InPlaceState:
    """What sequences have left behind in one layer.

    Attributes:
        written: what chunks have added to the last layer, float32 `[B, 1, hidden, d]`; None before the first is complete.
        pending: features `[B, n, hidden]` and value sources `[B, n, d]` of tokens whose chunk is not complete.
    """

    written: Tensor | None = None
    pending: PendingColumns = field(default_factory=PendingColumns)

    def select(self, index: Tensor) -> InPlaceState:
        """The sequences at `index` (int64 `[n]`), in that order."""
        written = None if self.written is None else self.written.index_select(0, index.to(self.written.device))
        return InPlaceState(written, self.pending.select(index))


@dataclass(frozen=True)
class Call:
    """What one call of a model means to its layers; handed down to them beside the hidden states.

    Attributes:
        plan: where tokens sit.
        source: what values are made of, `[B, T, d]`; None for each MLP's own input.
        states: by layer, what earlier calls left behind.
        after: by layer, what this one leaves behind, filled in as layers run; None where nobody asks.
    """

    plan: ChunkPlan
    source: Tensor | None = None
    states: dict[int, InPlaceState] = field(default_factory=dict)
    after: dict[int, InPlaceState] | None = None


class ValueConv(nn.Module):
    """A depthwise convolution over the tokens of a chunk, centred, with zeros beyond its ends.

    The output at a token sees `width // 2` tokens ahead, of its own chunk alone, which is read when it is complete.

    Args:
        channels: d.
        width: tokens that an output sees; odd.
    """

    def __init__(self, channels: int, width: int, **where: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, width, **where))

    def start(self) -> Tensor:
        """A starting value: zero, with which nothing is written."""
        return torch.zeros_like(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Of whole chunks `[N, chunk, d]`."""
        channels, _, width = self.weight.shape
        return F.conv1d(x.mT.to(self.weight.dtype), self.weight, padding=width // 2, groups=channels).mT

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.weight.shape[0]}, width={self.weight.shape[2]}"


class ValueProjection(nn.Module):
    """`x P`, with P as stored: not `nn.Linear`, whose weight is transposed.

    Args:
        channels: d.
    """

    def __init__(self, channels: int, **where: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, channels, **where))
        with torch.no_grad():
            self.weight.copy_(self.start())

    def start(self) -> Tensor:
        """A starting value: zero but for a diagonal drawn from a normal distribution of standard deviation 0.02."""
        return torch.diag(torch.randn_like(self.weight[0]) * PROJECTION_STD)

    def forward(self, x: Tensor) -> Tensor:
        """Of `[..., d]`."""
        return x.to(self.weight.dtype) @ self.weight

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.weight.shape[0]}"


class InPlaceMLP(nn.Module):
    """A gated MLP whose down projection is written while it reads.

    Parameters have the released names: `gate_proj`, `up_proj` and `down_proj`, which are the given MLP's own modules,
    `ttt_conv` and `ttt_proj`. At the start the convolution is zero, and so is what is written: outputs are the MLP's.

    Args:
        mlp: an MLP that computes `down_proj(act_fn(gate_proj(x)) * up_proj(x))`.
        layer: its number in the model, under which a `Call` holds its state.
        chunk: tokens between updates.
        lr: the inner learning rate.
        conv_width: tokens that a value sees; odd.
        projection: values are projected behind the convolution.
        form: how `kvbind.ttt` evaluates the inner loop.

    Attributes:
        inner: the inner loop.
        call: what the next `forward` belongs to; taken by it.

    Raises:
        ValueError: an MLP that computes something else, or an argument that does not fit; the message names it.
    """

    def __init__(
        self,
        mlp: nn.Module,
        layer: int,
        *,
        chunk: int,
        lr: float,
        conv_width: int = 5,
        projection: bool = True,
        form: Form = "auto",
    ) -> None:
        super().__init__()
        check_choice("form", form, FORMS)
        check_positive_int("chunk", chunk)
        check_positive("lr", lr)
        check_positive_int("conv_width", conv_width)
        if conv_width % 2 == 0:
            raise ValueError(f"conv_width must be odd, as the convolution is centred; got {conv_width}")
        for name in ("gate_proj", "up_proj", "down_proj", "act_fn"):
            if not hasattr(mlp, name):
                raise ValueError(
                    f"layer {layer} must have an MLP of gate_proj, up_proj, act_fn and down_proj; its {type(mlp).__name__} "
                    f"has no {name}"
                )
        self.gate_proj, self.up_proj, self.down_proj = (_linear(mlp, name) for name in ("gate_proj", "up_proj", "down_proj"))
        self.act_fn: Callable[[Tensor], Tensor] = mlp.act_fn  # type: ignore[assignment]
        self.layer, self.lr, self.form = layer, float(lr), form
        self.inner = in_place_ttt(chunk)
        width, held = self.down_proj.out_features, next(self.down_proj.parameters())
        where = {"device": held.device, "dtype": input_dtype(self.down_proj, torch.get_default_dtype())}
        self.ttt_conv = ValueConv(width, conv_width, **where)
        self.ttt_proj = ValueProjection(width, **where) if projection else None
        self.call: Call | None = None
        self.train(mlp.training)
        self._check_same(mlp, width)

    def _check_same(self, mlp: nn.Module, width: int) -> None:
        """Refuse an MLP that computes something else than this one does from its layers."""
        weight = self.ttt_conv.weight
        if weight.is_meta:
            return
        probe = torch.linspace(-1, 1, 2 * width, device=weight.device, dtype=weight.dtype).view(1, 2, width)
        devices = [weight.device] if weight.is_cuda else []
        trained = [(module, module.training) for module in mlp.modules()]
        try:
            # in training mode, as dropout may be part of it
            mlp.train()
            with torch.no_grad(), torch.random.fork_rng(devices):
                expected, got = mlp(probe), self.down_proj(self._features(probe))
        finally:
            for module, mode in trained:
                module.training = mode
        if not torch.allclose(expected, got, equal_nan=True):
            raise ValueError(
                f"layer {self.layer} must have an MLP that computes down_proj(act_fn(gate_proj(x)) * up_proj(x)) and, in "
                f"training, nothing more; its {type(mlp).__name__} computes something else"
            )

    def _features(self, x: Tensor) -> Tensor:
        return self.act_fn(self.gate_proj(x)) * self.up_proj(x)

    def _values(self, chunks: Tensor) -> Tensor:
        """What whole chunks `[N, chunk, d]` of value sources write."""
        values: Tensor = self.ttt_conv(chunks)
        return values if self.ttt_proj is None else self.ttt_proj(values)

    def start_weights(self) -> dict[str, Tensor]:
        """The fast weights that every sequence starts from, `[1, in, out]` by matrix name: the MLP's own parameters.

        Raises:
            ValueError: they are not to be read: the MLP's layers have biases, adapters or hooks, or another activation than
                silu. It is run all the same.
        """
        weights: dict[str, Tensor] = {}
        for name, layer in {"gate": self.gate_proj, "up": self.up_proj, "out": self.down_proj}.items():
            if not is_a_product(layer) or layer.bias is not None:
                raise ValueError(f"the {name} matrix must be that of a plain linear layer without a bias; got {layer}")
            weights[name] = layer.weight.mT[None]
        probe = torch.linspace(-3, 3, 8)
        if not torch.equal(self.act_fn(probe), F.silu(probe)):
            raise ValueError(f"act_fn must be silu in a SwiGLU; got {self.act_fn}")
        return weights

    def inner_call(self, x: Tensor, source: Tensor | None = None) -> InnerCall:
        """What the layer is as one call of `kvbind.ttt`, for sequences from their first token on, without padding.

        Args:
            x: the MLP's input `[B, T, d]`.
            source: what values are made of, `[B, T, d]`; by default `x`.

        Raises:
            ValueError: as `start_weights`.
        """
        source = x if source is None else source
        values = self._values_of_rows(source, x.shape[1] // (self.inner.chunk or 1))
        return InnerCall(self.inner, self.start_weights(), x[:, :, None], x[:, :, None], values[:, :, None], self.lr)

    def from_start(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """The output `[B, T, d]` for sequences from their first token on, without padding: the layer in a model of your own.

        Args:
            x: the MLP's input `[B, T, d]`, of the parameters' dtype.
            source: what values are made of, `[B, T, d]`; by default `x`.

        Raises:
            ValueError: tensors of other shapes, or without a sequence.
        """
        check_input(x, self.down_proj.out_features)
        if source is not None and source.shape != x.shape:
            raise ValueError(f"source must have the shape of x, {list(x.shape)}; got {list(source.shape)}")
        self.call = Call(plan_of((x.shape[0], x.shape[1]), self.inner.chunk or 1), source)
        output: Tensor = self(x)
        return output

    def forward(self, x: Tensor) -> Tensor:
        """The MLP's output with what earlier chunks wrote, `[B, T, d]` to `[B, T, d]`.

        Raises:
            RuntimeError: the MLP is called without the model around it, which says whose tokens these are.
        """
        call, self.call = self.call, None
        if call is None:
            raise RuntimeError(
                f"the fast weights of layer {self.layer} are told whose tokens they get by InPlaceForCausalLM alone: call "
                "that, not the model inside it (in a model of your own, from_start). Where it was called, the model inside "
                "does not hand keyword arguments on to its layers' self_attn, and cannot have fast weights"
            )
        features = self._features(x)
        output: Tensor = self.down_proj(features)
        source = x if call.source is None else call.source.to(x.device)
        read = self._read_fast(features, source, call)
        return output if read is None else output + read

    def _read_fast(self, features: Tensor, source: Tensor, call: Call) -> Tensor | None:
        """What earlier chunks add to the output; None where that is nothing."""
        plan = call.plan
        if plan.documents is not None:
            return self._documents(features, source, plan)
        state = call.states.get(self.layer, InPlaceState())
        pending = state.pending.append((features, source))
        read: Tensor | None
        if plan.completing:
            joined = pending.joined()
            run = self._rows_alike if plan.alike else self._rows
            read, written = run(joined[0], joined[1], features, state.written, plan)
            state, pending = replace(state, written=written), PendingColumns((joined,))
        else:
            read = self._read(features, state.written)
        if call.after is not None:
            call.after[self.layer] = replace(state, pending=_left_over(pending, plan))
        return read

    def _read(self, features: Tensor, written: Tensor | None) -> Tensor | None:
        """Features `[B, T, hidden]` times what was written."""
        if written is None:
            return None
        with without_autocast(features.device.type):
            return (features.to(written.dtype) @ written.squeeze(1)).to(features.dtype)

    def _run(
        self, features: Tensor, values: Tensor, written: Tensor | None, bounds: tuple[int, ...] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The inner loop from what was written on: outputs `[B, T, d]`, and what is written then."""
        if written is None:
            dtype = torch.promote_types(features.dtype, torch.float32)
            written = features.new_zeros(1, 1, 1, dtype=dtype).expand(1, features.shape[-1], values.shape[-1])
        features, values = features[:, :, None], values[:, :, None]
        inner = self.inner.replace(network=Linear())
        output, state = ttt(
            inner, {"out": written}, features, features, values, lr=self.lr, cu_seqlens=bounds, form=self.form
        )
        return output.squeeze(2), state.weights["out"]

    def _values_of_rows(self, source: Tensor, complete: int) -> Tensor:
        """Values `[B, T, d]` of rows with as many complete chunks; zero behind those."""
        chunk = self.inner.chunk or 1
        batch, length, width = source.shape
        values = self._values(source[:, : complete * chunk].reshape(batch * complete, chunk, width))
        return F.pad(values.reshape(batch, complete * chunk, -1), (0, 0, 0, length - complete * chunk))

    def _rows_alike(
        self, features: Tensor, source: Tensor, new: Tensor, written: Tensor | None, plan: ChunkPlan
    ) -> tuple[Tensor, Tensor]:
        """All rows at once, of joined columns: outputs at the new ones, and what is written then."""
        values = self._values_of_rows(source, plan.totals[0] // plan.chunk).to(features.dtype)
        size = features.shape[1] if torch.is_grad_enabled() else SPAN * plan.chunk
        outputs = []
        for f, v in zip(features.split(size, dim=1), values.split(size, dim=1), strict=True):
            output, written = self._run(f, v, written)
            outputs.append(output)
        assert written is not None
        return torch.cat(outputs, dim=1)[:, features.shape[1] - new.shape[1] :], written

    def _rows(
        self, features: Tensor, source: Tensor, new: Tensor, written: Tensor | None, plan: ChunkPlan
    ) -> tuple[Tensor, Tensor]:
        """As `_rows_alike`, for rows whose tokens are in different columns: those that complete a chunk, end to end."""
        device, batch = features.device, features.shape[0]
        rows = torch.tensor(plan.completing, device=device)
        places = plan.valid.to(device)[rows]
        found, after = self._sequences(
            features[rows][places][None], source[rows][places][None], None if written is None else written[rows], plan
        )
        outputs = found.new_zeros(*places.shape, found.shape[-1])
        outputs[places] = found[0]
        outputs = outputs[:, plan.pending_columns :]
        if len(plan.completing) == batch:
            return outputs, after
        before = self._read(new, written)
        if written is None:
            written = after.new_zeros(batch, *after.shape[1:])
        if before is None:
            before = outputs.new_zeros(batch, *outputs.shape[1:])
        return before.index_copy(0, rows, outputs), written.index_copy(0, rows, after)

    def _sequences(self, features: Tensor, source: Tensor, written: Tensor | None, plan: ChunkPlan) -> tuple[Tensor, Tensor]:
        """Sequences laid end to end, `[1, n, ...]` each."""
        complete = plan.complete.to(features.device)
        chunks = self._values(source[0, complete].unflatten(0, (-1, plan.chunk))).flatten(0, 1).to(features.dtype)
        values = chunks.new_zeros(source.shape[1], chunks.shape[-1]).index_copy(0, complete, chunks)[None]
        return self._run(features, values, written, plan.ends)

    def _documents(self, features: Tensor, source: Tensor, plan: ChunkPlan) -> Tensor | None:
        """Packed documents, each from its first token on; None where none is longer than a chunk."""
        if not len(plan.complete):
            return None
        output, _ = self._sequences(features.flatten(0, 1)[None], source.flatten(0, 1)[None], None, plan)
        return output.view(*features.shape[:2], -1)

    def extra_repr(self) -> str:
        """What `print` shows beside the modules."""
        return f"inner={self.inner!r}, lr={self.lr}, form={self.form!r}"


def _left_over(pending: PendingColumns, plan: ChunkPlan) -> PendingColumns:
    """Of all joined columns those of tokens that are pending after a call."""
    if plan.real is None and not plan.completing:
        return pending
    if not any(plan.rest):
        return PendingColumns()
    joined = pending.joined()
    if plan.alike:
        # a copy, so that what is done with is not kept in memory
        return PendingColumns((tuple(x[:, x.shape[1] - plan.rest[0] :].clone() for x in joined),))
    return PendingColumns((tuple(x.take_along_dim(plan.left_over.to(x.device)[..., None], dim=1) for x in joined),))


def _linear(mlp: nn.Module, name: str) -> nn.Linear:
    """A linear layer of an MLP, or what has been put in its place.

    Raises:
        ValueError: another module.
    """
    layer = getattr(mlp, name)
    if not isinstance(layer, nn.Module) or not isinstance(getattr(layer, "out_features", None), int):
        raise ValueError(f"{name} must be a linear layer, with out_features; got {layer}")
    return layer  # type: ignore[return-value]
