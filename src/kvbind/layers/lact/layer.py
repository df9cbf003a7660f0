"""The mixer of the LaCT language model: sliding-window attention and fast weights that share queries, keys and values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kvbind.forms.autocast import without_autocast
from kvbind.forms.evaluate import FORMS, Form
from kvbind.forms.pending import PendingState
from kvbind.forms.state import State
from kvbind.forms.tokens import Tokens
from kvbind.inner.gates import GATES, Gate
from kvbind.inner.spec import InnerLoop
from kvbind.inner.value import check_choice, check_positive_int
from kvbind.kernels.elementwise.gated_output import add_gated, gated_output
from kvbind.layers.attention.window_attention import halo_of, window_attention
from kvbind.layers.attention.window_cache import WindowCache, window_cache_after
from kvbind.layers.fast_matrices import LowRankMatrix, inverse_softplus, lact_parameter, with_released_parameters
from kvbind.layers.fitting import check_built, check_fits_causal_layer, check_rates_built
from kvbind.layers.inner_call import InnerCall, check_input, check_state, run_rows
from kvbind.layers.lact.slots import DecodeStep, Slots
from kvbind.layers.lact.token_writer import TokenWriter, ValueWriter
from kvbind.layers.layout import Layout
from kvbind.layers.norm import NORM_EPS, RMSNorm
from kvbind.layers.operands import Paths, make_operands, split_heads
from kvbind.layers.plain_modules import is_a_product, is_plain
from kvbind.layers.rotary import Tables, rotary_tables
from kvbind.sequence.exchanges import Exchanges


@dataclass(frozen=True)
class LactState:
    """Where some sequences stopped in one layer: of a size that has a bound, whatever their length.

    A pytree of the fast weights with their pending chunk, all of whose tokens are in their places, and the keys and values.

    Attention's values and those that the fast weights will be written with come from one projection. Where the window is as
    long as a chunk, or longer, it has all of them, and the pending chunk has none.

    Attributes:
        pending: fast weights and pending chunk, of which the latest tokens may not be in their places yet.
        cache: the last `window - 1` keys and values.
        seen: how many tokens each sequence has had.
        values: makes pending tokens' values of those in the cache; None where the pending chunk has them.
    """

    pending: PendingState
    cache: WindowCache
    seen: tuple[int, ...]
    values: ValueWriter | None = None

    @property
    def held(self) -> State:
        """What it has of fast weights and pending chunk, all tokens in their places."""
        return self.pending.settled()

    @property
    def fast(self) -> State:
        """Fast weights and pending chunk, as `kvbind.ttt` returns them."""
        state = self.held
        if self.values is None or not state.has_room:
            return state
        held, room, lengths = self.cache.values, state.spec.room, state.pending_lengths
        length = max(lengths, default=0)
        if length == min(lengths, default=0):
            latest = self.values.make(held[:, held.shape[1] - length :])
            return state.with_values(F.pad(latest.transpose(1, 2), (0, 0, 0, room - length)).contiguous())
        ends, places = torch.tensor(lengths, device=held.device)[:, None], torch.arange(room, device=held.device)
        where = (held.shape[1] - ends + places).clamp(max=held.shape[1] - 1)
        latest = self.values.make(held.take_along_dim(where[:, :, None, None], dim=1))
        return state.with_values(latest.masked_fill((places >= ends)[:, :, None, None], 0).transpose(1, 2).contiguous())

    def tensors(self) -> list[Tensor]:
        """All that it holds, in their places."""
        rounded = self.pending.rounded or {}
        return [*self.held.tensors.values(), *rounded.values(), self.cache.keys, self.cache.values]

    def select(self, index: Tensor) -> LactState:
        """The sequences at `index` (int64 `[n]`), in that order, as often as they are named."""
        rows, where = index.tolist(), index.to(self.cache.keys.device)
        fast = PendingState.of(self.held[index])
        return LactState(fast, self.cache.select(rows, where), tuple(self.seen[i] for i in rows), self.values)


pytree.register_pytree_node(
    LactState,
    lambda state: ([state.held, state.cache], (state.seen, state.values)),
    lambda parts, context: _state_of(parts, *context),
    serialized_type_name="kvbind.LactState",
)


def _state_of(parts: Iterable[Any], seen: tuple[int, ...], values: ValueWriter | None) -> LactState:
    fast, cache = parts
    return LactState(PendingState.of(fast), cache, seen, values)


class LactLayer(nn.Module):
    """Window attention plus fast weights on one set of queries, keys and values (specification, section 5; 2505.23884).

    `q, k, v = qkv(x)`. Attention takes them with rotary positions. The fast weights take q and k with a scale and offset
    per channel, silu, L2 norm per fast head and rotary positions, and v with silu; their output is RMS-normed per head,
    times `silu(ttt_scale_proj(x))`, and joins the attention's before `o_proj`. Rates, gates and scale read `x`, which the
    block has normalized.

    Parameters have the released names and layouts (specification, section 6), so that released checkpoints load. What an
    inner loop has no use for is not built: `lr_proj` needs `inner.token_lr`, and `G_proj` a gate G among `inner.gates`. In
    place of a `G_proj` any module may stand that makes a gate `[B, T, heads]` of `x`: one that is fixed, or has parameters
    of its own.

    Args:
        hidden_size: width d of the residual stream.
        num_attn_heads: attention heads.
        num_lact_heads: fast heads, each `d / num_lact_heads` wide.
        inner: the inner loop. Its visibility must be causal.
        window_size: tokens that attention sees, itself among them.
        form: how `kvbind.ttt` evaluates the inner loop: "auto", "recurrent" or "parallel".
        hidden_multiplier: hidden width of the fast network over its head width.
        low_rank: rank of the gate and up matrices' `left @ right + I / 2`; None for full matrices.
        init_gain: of the low-rank factors at the start.
        base_lr: the learning rate where `lr_proj` gives 0; the rate is `softplus(lr_proj(x) + softplus^-1(base_lr))`.
        qkv_bias: a bias in the `qkv` projection.
        qk_norm: RMS norms over all channels of q and of k, for both paths.
        silu_qk: silu on fast queries and keys.
        silu_v: silu on fast values.
        rotary: rotary positions on fast queries and keys; attention always has them.
        rope_theta: base of the rotary wavelengths.
        output_scale: the learned scale `silu(ttt_scale_proj(x))`.
        released_parameters: build what released checkpoints hold, a SwiGLU's matrices with learned rates for each, whether
            or not `inner` has a use for them.
        decode_dtype: "bfloat16" for decoding steps that read float32 fast weights rounded to it, where tokens see the last
            update (`visibility="past"`) and no gradients are wanted; updates stay in float32. None: as they are.

    Attributes:
        inner: the inner loop; assigning one that asks for parameters that were not built raises.
        form: as above; may be assigned.
        decode_dtype: as above; may be assigned.

    Raises:
        ValueError: widths that do not divide, or an inner loop that cannot run in a causal layer.
        TypeError: `inner` is no InnerLoop.
    """

    def __init__(
        self,
        hidden_size: int,
        num_attn_heads: int,
        num_lact_heads: int,
        inner: InnerLoop,
        window_size: int,
        *,
        form: Form = "auto",
        hidden_multiplier: float = 1,
        low_rank: int | None = 32,
        init_gain: float = 0.5,
        base_lr: float = 1e-3,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        silu_qk: bool = True,
        silu_v: bool = True,
        rotary: bool = True,
        rope_theta: float = 1e6,
        output_scale: bool = True,
        released_parameters: bool = False,
        decode_dtype: DecodeDtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("hidden_size", hidden_size),
            ("num_attn_heads", num_attn_heads),
            ("num_lact_heads", num_lact_heads),
            ("window_size", window_size),
        ):
            check_positive_int(name, value)
        for name, heads in (("num_attn_heads", num_attn_heads), ("num_lact_heads", num_lact_heads)):
            if hidden_size % heads:
                raise ValueError(f"{name} must divide hidden_size = {hidden_size}; got {heads}")
        if hidden_size // num_attn_heads % 2:
            raise ValueError(
                f"num_attn_heads must leave an even head width for rotary positions; got {num_attn_heads} heads of "
                f"{hidden_size // num_attn_heads} channels"
            )
        check_choice("form", form, FORMS)
        check_fits_lact_layer(inner)

        self.hidden_size, self.window_size, self.form = hidden_size, window_size, form
        self.decode_dtype = check_decode_dtype(decode_dtype)
        self.num_attn_heads, self.num_lact_heads = num_attn_heads, num_lact_heads
        self.head_width, self.fast_width = hidden_size // num_attn_heads, hidden_size // num_lact_heads
        self.silu_v, self.rope_theta = silu_v, rope_theta
        self.paths = Paths(num_attn_heads, num_lact_heads, NORM_EPS, silu_qk, rotary)
        self.base_lr_inverse = inverse_softplus(base_lr)
        self.low_rank = low_rank

        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=qkv_bias)
        self.q_norm = RMSNorm(hidden_size, eps=NORM_EPS) if qk_norm else None
        self.k_norm = RMSNorm(hidden_size, eps=NORM_EPS) if qk_norm else None
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.qk_scale = nn.Parameter(torch.empty(hidden_size, 2))
        self.qk_offset = nn.Parameter(torch.empty(hidden_size, 2))
        self.ttt_norm = RMSNorm(self.fast_width, eps=NORM_EPS)
        self.ttt_scale_proj = nn.Linear(hidden_size, num_lact_heads) if output_scale else None

        self.hidden_width = int(self.fast_width * hidden_multiplier)
        built = with_released_parameters(inner) if released_parameters else inner
        self._built_shapes = self._shapes_for(built)
        self._built_vectors, self._built_head = self._vectors_for(built), built.network.output_head
        check_built("inner", inner, self._shapes_for(inner), self._built_shapes)
        for matrix, (inputs, outputs) in self._built_shapes.items():
            self._build_matrix(matrix, inputs, outputs, init_gain)
        for vector, shape in self._built_vectors.items():
            self.register_parameter(lact_parameter(vector), nn.Parameter(torch.empty(num_lact_heads, *shape)))
        # the released order: gate, out, up; vectors take the rates of their matrices
        learned = [name for name in built.updated if name in self._built_shapes]
        self.rate_names = tuple(sorted(learned, key=lact_parameter)) if built.token_lr else ()
        self.lr_proj = nn.Linear(hidden_size, num_lact_heads * len(self.rate_names)) if built.token_lr else None
        for gate in GATES:
            setattr(self, f"{gate.name}_proj", self._gate(inner.gates[gate.name]) if gate.name in inner.gates else None)
        self._inner = inner
        self.reset_parameters()

    def _shapes_for(self, inner: InnerLoop) -> dict[str, tuple[int, ...]]:
        """The `(in, out)` of each fast matrix that `inner` needs."""
        network = inner.network
        return network.shapes(self.fast_width, self.fast_width, (self.hidden_width,) * network.hidden_layers)

    def _vectors_for(self, inner: InnerLoop) -> dict[str, tuple[int, ...]]:
        """The shape of each bias, and of what the head has, that `inner` needs."""
        network = inner.network
        return network.vector_shapes(self.fast_width, self.fast_width, (self.hidden_width,) * network.hidden_layers)

    def _build_matrix(self, matrix: str, inputs: int, outputs: int, gain: float) -> None:
        heads, name = self.num_lact_heads, lact_parameter(matrix)
        if self.low_rank and matrix in ("gate", "up"):
            setattr(self, name, LowRankMatrix(heads, outputs, inputs, self.low_rank, gain))
        else:
            self.register_parameter(name, nn.Parameter(torch.empty(heads, outputs, inputs)))

    def _gate(self, gate: Gate) -> nn.Sequential:
        outputs = self.num_lact_heads * (self.fast_width if gate.per == "key" else 1)
        return nn.Sequential(nn.Linear(self.hidden_size, outputs), nn.Sigmoid())

    def reset_parameters(self) -> None:
        """Draw the layer's own parameters anew: fast weights, scale and offset, and the biases of gates."""
        nn.init.ones_(self.qk_scale)
        nn.init.zeros_(self.qk_offset)
        for matrix in self._built_shapes:
            held = getattr(self, lact_parameter(matrix))
            if isinstance(held, LowRankMatrix):
                held.reset_parameters()
            else:
                nn.init.normal_(held, std=1 / math.sqrt(held.shape[-1]))
        head = self._built_head
        for vector in self._built_vectors:
            ones = vector == "gamma" and head is not None and not head.fast
            nn.init.constant_(self.get_parameter(lact_parameter(vector)), float(ones))
        for gate, module in self._gates().items():
            start = next(declared.start for declared in GATES if declared.name == gate)
            if start is not None and is_a_gate(module):
                nn.init.constant_(module.get_parameter("0.bias"), math.log(start / (1 - start)))

    def _gates(self) -> dict[str, nn.Module]:
        """The modules that make gates, by gate."""
        found = {gate.name: getattr(self, f"{gate.name}_proj") for gate in GATES}
        return {name: module for name, module in found.items() if module is not None}

    @property
    def inner(self) -> InnerLoop:
        """The inner loop that the layer runs."""
        return self._inner

    @inner.setter
    def inner(self, inner: InnerLoop) -> None:
        check_fits_lact_layer(inner)
        check_built("inner", inner, self._shapes_for(inner), self._built_shapes)
        check_built("inner", inner, self._vectors_for(inner), self._built_vectors)
        for gate in inner.gates:
            if gate not in self._gates():
                raise ValueError(f"inner has {gate}=True, but this layer was built without a {gate} gate")
        check_rates_built(inner, (name for name in inner.updated if name in inner.network.matrices), self.rate_names)
        self._inner = inner

    def start_weights(self) -> dict[str, Tensor]:
        """The fast weights that every sequence starts from, `[heads, in, out]` by matrix name."""
        weights = {}
        with without_autocast(self.qk_scale.device.type):
            for matrix in self._inner.network.matrices:
                held = getattr(self, lact_parameter(matrix))
                weights[matrix] = (held() if isinstance(held, nn.Module) else held).mT
        weights |= {vector: self.get_parameter(lact_parameter(vector)) for vector in self._inner.network.vectors}
        return weights

    @property
    def writing(self) -> TokenWriter:
        """How projections become what tokens write."""
        called = tuple(name for name, gate in self._gates().items() if not is_a_gate(gate))
        network, updated = self._inner.network, self._inner.updated
        followers = tuple((name, network.rate_of(name)) for name in updated if name in network.vectors)
        return TokenWriter(
            self.num_lact_heads, self.rate_names, updated, self.base_lr_inverse, self.silu_v, called, followers
        )

    @property
    def pending_values(self) -> ValueWriter | None:
        """What makes the values of a chunk that is not complete of those in the cache, where that has all of them.

        None where it has not, and where each token sees more than the last update and would have to make them again.
        """
        has_all = 0 < self._inner.room < self.window_size and self._inner.visibility == "past"
        return self.writing.values if has_all else None

    def _logits(self, x: Tensor) -> dict[str, Tensor]:
        """What the inner loop's rates ("lr") and gates, and the output's scale ("scale"), are made of: `[B, T, n]` each.

        Gates that are no plain linear layer and sigmoid come as they are (`TokenWriter.called`).
        """
        layers: dict[str, nn.Module] = {}
        if self._inner.token_lr and self.lr_proj is not None:
            layers["lr"] = self.lr_proj
        for name, gate in self._gates().items():
            if name in self._inner.gates:
                layers[name] = gate[0] if is_a_gate(gate) else gate
        if self.ttt_scale_proj is not None:
            layers["scale"] = self.ttt_scale_proj
        return dict(zip(layers, side_by_side(x, list(layers.values())), strict=True))

    def rate_rows(self, matrix: str) -> range:
        """The rows of `lr_proj` that make the rates of a fast matrix, one for each head."""
        count = len(self.rate_names)
        return range(self.rate_names.index(matrix), self.num_lact_heads * count, count)

    def learning_rates(self, x: Tensor) -> float | dict[str, Tensor]:
        """Rates per token, head and updated matrix, float32 `[B, T, H]`, or the constant 1 without `inner.token_lr`."""
        logits = self._logits(x)
        return self.writing.rates(logits["lr"]) if "lr" in logits else 1.0

    def call(self, x: Tensor, layout: Layout | None = None, tables: Tables | None = None) -> InnerCall:
        """What the layer gives to `kvbind.ttt` for sequences from their first token on; arguments as `forward` takes them.

        Raises:
            ValueError: a slice of a row that is cut over ranks, which is no call of its own, or boundaries of packed rows
                that the device alone knows.
        """
        check_input(x, self.hidden_size)
        if layout is None:
            layout = Layout.rows(x.shape[1], x.device)
        if layout.sequence is not None:
            raise ValueError("layout must be of whole rows; got one that is cut over ranks")
        if tables is None:
            tables = rotary_tables(layout.positions, self.head_width, self.rope_theta)
        q, k, v = self._project(x)
        _, _, q, k = make_operands(q, k, v, self.qk_scale, self.qk_offset, tables, self.paths)
        made, bounds = self.writing.tokens({"k": k, "v": v, **self._logits(x)}), layout.known_bounds
        return InnerCall(self._inner, self.start_weights(), q, k, made.v, made.rates, made.gates, bounds)

    def forward(
        self,
        x: Tensor,
        layout: Layout | None = None,
        tables: Tables | None = None,
        state: LactState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, LactState | None]:
        """Mix the tokens of `x`.

        Args:
            x: normalized input `[B, T, d]`.
            layout: where its tokens sit; by default rows of equal length that go on from `state`.
            tables: the rotary tables of `layout.positions`, where a model has made them for all its layers.
            state: where earlier tokens of the same sequences left off.
            return_state: also return where these tokens leave off.

        Returns:
            `[B, T, d]`, of no meaning at padding, and the state or None.

        Raises:
            ValueError: an input without a sequence or of another shape; a state together with packed sequences or a slice of
                a row, or of another batch or inner loop.
            TypeError: a state of another kind of layer.
        """
        check_input(x, self.hidden_size)
        batch, length, _ = x.shape
        seen = check_state(x, layout, state, LactState, return_state)
        if layout is None:
            layout = Layout.rows(length, x.device, seen)
        if tables is None:
            tables = rotary_tables(layout.positions, self.head_width, self.rope_theta)

        q, k, v = self._project(x)
        q, k, fast_q, fast_k = make_operands(q, k, v, self.qk_scale, self.qk_offset, tables, self.paths)
        written, v = v, split_heads(v, self.num_attn_heads)
        cache, seen_k, seen_v = None if state is None else state.cache, k, v
        if cache is not None:
            seen_k, seen_v = cache.extend(k, v)
        if layout.sequence is not None and layout.sequence.connected:
            exchanges = Exchanges(layout.sequence, (q, k, v, fast_k))
            wanted = layout.sequence.reaching(halo_of(self.window_size))
            seen_k, seen_v = exchanges.extended((k, v), wanted, axis=1)
            # backward, what the fast weights exchange comes first on every rank
            fast_k = exchanges.tie(fast_k)
        ahead, held = seen_k.shape[1] - length, None if cache is None else cache.held
        mixed = window_attention(
            q, seen_k, seen_v, self.window_size, cu_seqlens=layout.cu_seqlens, ahead=ahead, held=held
        ).flatten(2)

        made = self._logits(x)
        scale = made.pop("scale", None)
        fast, pending = self._fast_weights(fast_q, {"k": fast_k, "v": written, **made}, layout, state, return_state)
        output = self.o_proj(self._join(fast, scale, mixed))

        if pending is None:
            return output, None
        after = window_cache_after(cache, seen_k, seen_v, self.window_size, length, layout.lengths)
        values = self.pending_values
        if values is not None:
            pending = pending.values_apart()
        return output, LactState(pending, after, layout.after(seen or (0,) * batch, length), values)

    def slots(self, state: LactState) -> Slots:
        """Room for rows like those of a state, for `step`; nothing in it yet."""
        settled, cache = state.held, state.cache
        held = {name: x for name, x in settled.tensors.items() if not name.startswith("pending.")}
        heads, widths = self.num_lact_heads, (self.fast_width, self.fast_width)
        k, v = (cache.keys.new_empty(1, heads, 1, width) for width in widths)
        wide = k.new_empty(1, heads, 1, dtype=torch.promote_types(k.dtype, torch.float32))
        like = Tokens(k, v, dict.fromkeys(self._inner.updated, wide), dict.fromkeys(self._inner.gates, wide))
        return Slots(
            self._inner, self.window_size, held, cache, like, self.pending_values, rounds=self.decode_dtype is not None
        )

    def step(self, x: Tensor, tables: Tables, place: DecodeStep, slots: Slots) -> Tensor:
        """Mix one more token of each row, and take it in where the rows are: `forward` without a shape that depends on them.

        A chunk that the token completes is left to `Slots.complete`.

        Args:
            x: normalized input `[B, 1, d]`.
            tables: the rotary tables of `place.positions`.
            place: where the tokens go.
            slots: where the rows are, which this changes.

        Returns:
            `[B, 1, d]`.
        """
        q, k, v = self._project(x)
        q, k, fast_q, fast_k = make_operands(q, k, v, self.qk_scale, self.qk_offset, tables, self.paths)
        mixed = slots.attend(place, q, k, split_heads(v, self.num_attn_heads)).flatten(2)
        made = self._logits(x)
        scale = made.pop("scale", None)
        fast = slots.read(fast_q, fast_k)
        writing = self.writing
        if slots.value_writer is not None:
            # the ring has the values, of which nothing is made before the chunk's end
            writing = replace(writing, silu_v=False)
        tokens = writing.tokens({"k": fast_k, "v": v, **made})
        slots.put(place, tokens.map(lambda y: y.transpose(1, 2)))
        output: Tensor = self.o_proj(self._join(fast, scale, mixed))
        return output

    def _join(self, fast: Tensor, scale: Tensor | None, mixed: Tensor) -> Tensor:
        """The fast weights' output `[B, T, H, D]`, normed and scaled, added to attention's `[B, T, H D]`."""
        if is_plain(self.ttt_norm, RMSNorm):
            return gated_output(fast, self.ttt_norm.weight, scale, mixed, NORM_EPS)
        return add_gated(self.ttt_norm(fast), scale, mixed)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v `[B, T, d]` of both paths."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _fast_weights(
        self, q: Tensor, made: dict[str, Tensor], layout: Layout, state: LactState | None, return_state: bool
    ) -> tuple[Tensor, PendingState | None]:
        """Run the inner loop: outputs `[B, T, H, D]`, and its state where wanted; `made` as `TokenWriter` takes it."""
        inner, writing = self._inner, self.writing
        answer = before = None
        rounds = self.decode_dtype is not None
        if state is not None:
            going_on = return_state and layout.lengths is None
            found = state.pending.read(inner, q, made, writing, rounds) if going_on else None
            if found is not None:
                return found
            before = state.fast
            if going_on:
                # what was rounded of these weights is at hand
                pending = replace(state.pending, state=before, later=(), count=0, make=None)
                found = pending.complete(inner, q, made, writing, rounds)
                if found is not None:
                    return found
                answer = pending.answer(inner, q, made["k"], rounds)
        weights, tokens = self.start_weights() if before is None else None, writing.tokens(made)
        output, after = run_rows(
            inner, weights, q, tokens.k, tokens.v, tokens.rates, tokens.gates, layout, form=self.form, state=before,
            return_state=return_state,
        )  # fmt: skip
        return output if answer is None else answer, None if after is None else PendingState.of(after)

    def extra_repr(self) -> str:
        """What `print` shows beside the modules."""
        return f"inner={self._inner!r}, window_size={self.window_size}, form={self.form!r}"


def side_by_side(x: Tensor, layers: list[nn.Module]) -> tuple[Tensor, ...]:
    """What narrow layers make of `x`, `[..., n]` each, in one product, where each of its own would read all of x."""
    plain = [layer for layer in layers if is_a_product(layer) and layer.bias is not None]
    if len(layers) < 2 or len(plain) < len(layers):
        return tuple(layer(x) for layer in layers)
    joined = F.linear(x, torch.cat([layer.weight for layer in plain]), torch.cat([layer.bias for layer in plain]))
    return joined.split([layer.out_features for layer in plain], dim=-1)


def is_a_gate(gate: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether a gate is a layer and a sigmoid behind it, and no more, so that the layer alone may be called."""
    return is_plain(gate, nn.Sequential) and len(gate) == 2 and is_plain(gate[1], nn.Sigmoid)


DecodeDtype = Literal["bfloat16"]
"""What decoding may read fast weights in."""


def check_decode_dtype(given: object) -> DecodeDtype | None:
    """What decoding reads fast weights in, by name; `torch.bfloat16` is taken for its name.

    Raises:
        ValueError: anything else but None.
    """
    if given is None:
        return None
    if given not in ("bfloat16", torch.bfloat16):
        raise ValueError(f"decode_dtype must be 'bfloat16' or None; got {given!r}")
    return "bfloat16"


NOT_MADE = ("erase", "writes")
"""Fields for which `LactLayer` makes no keys; `kvbind.layers.fast_weights.layer.FastWeightLayer` does."""


def check_fits_lact_layer(inner: InnerLoop) -> None:
    """Refuse an inner loop that `LactLayer` cannot run.

    Raises:
        TypeError, ValueError: as `check_fits_causal_layer`; a field of `NOT_MADE`.
    """
    check_fits_causal_layer(inner)
    for name in NOT_MADE:
        if name in inner.extensions:
            raise ValueError(
                f"inner's {name} must have its default, as this layer makes no keys for it (a FastWeightLayer does); got "
                f"{name}={inner.extensions[name]!r}"
            )
