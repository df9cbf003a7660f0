"""A mixer of fast weights alone, with the projections, gates and output of published linear recurrences."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvbind.forms.evaluate import FORMS, Form
from kvbind.forms.state import State
from kvbind.inner.gates import GATES, decays
from kvbind.inner.projections import DEFAULTS, Constant, Making, Projections, Step
from kvbind.inner.spec import InnerLoop
from kvbind.inner.value import check_choice, check_positive_int
from kvbind.layers.fast_weights.convolution import Behind, OnRanks, ShortConvolution, Tails
from kvbind.layers.fast_weights.output import Made, joined, output_norm
from kvbind.layers.fast_weights.projection_fit import check_fits_projections, fast_widths, making_of, rate_of
from kvbind.layers.fast_weights.state import FastWeightState
from kvbind.layers.fitting import check_built, check_fits_causal_layer
from kvbind.layers.gates import DecayMaker, GateMaker, SigmoidMaker, Sizes, draw, maker_of, projection
from kvbind.layers.inner_call import InnerCall, check_input, check_state, run_rows
from kvbind.layers.layout import Layout
from kvbind.layers.operands import split_heads, wide
from kvbind.layers.rotary import Tables, rotary_tables, rotate

UNIT_EPS = 1e-6
"""Added to the squared L2 norm of queries and keys."""

KAPPA, ALPHA, RHO, CORRECTION = 0.71, 1.02, -0.04, 1.0
"""Before training: RWKV-7's factors on removal keys, of writing keys, and of its bonus (the first without its slope over
channels); Comba's D."""


class FastWeightLayer(nn.Module):
    """Fast weights as a token mixer of their own: no attention, and everything around them as a `Projections` says.

    `q, k, v` are projections of the input, short-convolved, normalized and scaled; rates and gates come from projections of
    their own; what the fast weights say at the queries is normed, gated and projected. Queries and keys are
    `hidden_size / heads * projections.key_width` wide, values likewise.

    A depthwise convolution and `kvbind.ttt` go on from a state exactly where an earlier call stopped.

    Args:
        hidden_size: width d of the residual stream.
        heads: fast heads.
        inner: the inner loop. Its visibility must be causal.
        projections: how everything is made.
        form: how `kvbind.ttt` evaluates the inner loop: "auto", "recurrent" or "parallel".
        hidden_multiplier: hidden width of the fast network over its key width.
        base_lr: the rate before training, where `projections` leaves it to the layer.

    Attributes:
        inner: the inner loop; assigning one that asks for parameters that were not built raises.
        form: as above; may be assigned.

    Raises:
        ValueError: widths that do not divide or are odd under rotary positions, an inner loop that is not causal, or
            projections that do not fit it.
        TypeError: `inner` is no InnerLoop, `projections` no Projections.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        inner: InnerLoop,
        projections: Projections = DEFAULTS,
        *,
        form: Form = "auto",
        hidden_multiplier: float = 1,
        base_lr: float = 1e-3,
    ) -> None:
        super().__init__()
        check_positive_int("hidden_size", hidden_size)
        check_positive_int("heads", heads)
        if hidden_size % heads:
            raise ValueError(f"heads must divide hidden_size = {hidden_size}; got {heads}")
        if base_lr <= 0:
            raise ValueError(f"base_lr must be above 0; got {base_lr}")
        check_choice("form", form, FORMS)
        if not isinstance(projections, Projections):
            raise TypeError(f"projections must be a kvbind Projections; got {type(projections).__name__}")
        check_fits_causal_layer(inner)
        check_fits_projections(inner, projections)

        p = self.projections = projections
        self.hidden_size, self.heads, self.form = hidden_size, heads, form
        self.key_width, self.value_width, self.hidden_width = fast_widths(hidden_size, heads, projections, hidden_multiplier)
        if p.rotary != "none" and self.key_width % 2:
            raise ValueError(f"key_width must be even for rotary positions; got {self.key_width} channels for a head")
        head = inner.network.output_head
        if head is not None and head.residual and self.key_width != self.value_width:
            raise ValueError(
                f"projections must have key_width = value_width for a head with residual=True; got {p.key_width} and "
                f"{p.value_width}"
            )
        self.base_lr, self._inner, self._built = base_lr, inner, inner
        self.writes = 1 if p.removal is not None else inner.writes

        key_heads = 1 if p.shared_keys else heads
        self.widths = {
            "q": key_heads * self.key_width,
            "k": key_heads * self.key_width * self.writes,
            "v": heads * self.value_width * self.writes,
        }
        d, outputs = hidden_size, heads * self.value_width
        self.q_proj = None if p.tied else nn.Linear(d, self.widths["q"], bias=False)
        self.k_proj = nn.Linear(d, self.widths["k"], bias=False)
        self.v_proj = nn.Linear(d, self.widths["v"], bias=False)
        self.conv = ShortConvolution(sum(self.widths[x] for x in p.conv_on), p.conv, p.conv_bias) if p.conv else None
        self.powers = nn.Parameter(torch.empty(p.powers)) if p.powers > 1 else None
        self.output_gate = None
        if p.output_gate != "none":
            self.output_gate = projection(d, outputs, p.gate_rank, p.gate_between, p.gate_bias, self.value_width)
        self.output_norm = output_norm(p, heads, self.value_width)
        self.o_proj = nn.Linear(outputs, d, bias=False)

        self.makers = nn.ModuleDict()
        rate = rate_of(inner, p)
        if not isinstance(rate, Constant):
            self.makers["rate"] = self._maker(rate, self.writes if self.writes > 1 else None)
        for gate in GATES:
            if gate.name in inner.gates and (gate.name != "erase" or p.removal is None):
                channels = self.key_width if inner.gates[gate.name].per == "key" else None
                self.makers[gate.name] = self._maker(making_of(gate, inner, p), channels)
        if p.write_gate is not None and not isinstance(p.write_gate, Step):
            self.makers["write_gate"] = self._maker(p.write_gate, self.value_width)
        if p.removal is not None:
            self.makers["removal"] = self._maker(p.removal, self.key_width)
        decay = decays(dict(self.makers.items()))[1]
        if isinstance(decay, SigmoidMaker):
            decay.log = True

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape))

        streams = ["q", "k", "v", *self.makers, *(["output_gate"] if self.output_gate is not None else [])]
        self.shift = nn.ParameterDict({name: parameter(d) for name in streams}) if p.shift else None
        of_keys = (heads, self.key_width)
        self.kappa, self.alpha = (parameter(*of_keys) if p.removal is not None else None for _ in range(2))
        self.rho = parameter(*of_keys) if p.skip == "bonus" else None
        self.skip = parameter(heads) if p.skip == "value" else None
        self.correction = parameter(heads) if p.correction else None

        self._built_shapes = self._shapes_for(inner)
        self._vectors = self._vectors_for(inner)
        self.weights = nn.ParameterDict()
        if p.start == "learned":
            self.weights.update({_named(name): parameter(heads, *x) for name, x in self._built_shapes.items()})
        self.weights.update({_named(name): parameter(heads, *x) for name, x in self._vectors.items()})
        self.reset_parameters()

    def _maker(self, making: Making, channels: int | None) -> GateMaker:
        span = self._inner.span or self._inner.chunk or 1
        sizes = Sizes(self.hidden_size, self.heads, self.value_width, channels, span, self.base_lr)
        return maker_of(making, sizes)

    def _hidden(self, inner: InnerLoop) -> tuple[int, ...]:
        return (self.hidden_width,) * inner.network.hidden_layers

    def _shapes_for(self, inner: InnerLoop) -> dict[str, tuple[int, ...]]:
        """The `(in, out)` of each fast matrix that `inner` needs."""
        return inner.network.shapes(self.key_width, self.value_width, self._hidden(inner))

    def _vectors_for(self, inner: InnerLoop) -> dict[str, tuple[int, ...]]:
        """The widths of its biases and of its head's weights."""
        return inner.network.vector_shapes(self.key_width, self.value_width, self._hidden(inner))

    def reset_parameters(self) -> None:
        """Draw the layer's own parameters anew: fast weights, convolution, norms, what gates hold beside projections."""
        p = self.projections
        for name, shape in self._built_shapes.items():
            if p.start == "learned":
                nn.init.normal_(self.weights[_named(name)], std=p.start_std or 1 / math.sqrt(shape[0]))
        head = self._inner.network.output_head
        for name in self._vectors:
            ones = name == "gamma" and head is not None and not head.fast
            nn.init.constant_(self.weights[_named(name)], float(ones))
        if self.conv is not None:
            self.conv.reset_parameters()
        if self.powers is not None:
            coefficients = self.powers
            draw(coefficients, lambda: torch.tensor([1 / math.factorial(i + 1) for i in range(len(coefficients))]))
        if self.shift is not None:
            # as in RWKV, channels differ in how far they look back
            for share in self.shift.values():
                draw(share, lambda: 1 - (torch.arange(self.hidden_size) / self.hidden_size).sqrt())
        starts = ((self.kappa, KAPPA), (self.alpha, ALPHA), (self.rho, RHO), (self.skip, 1.0), (self.correction, CORRECTION))
        for held, start in starts:
            if held is not None:
                nn.init.constant_(held, start)
        if isinstance(self.output_norm, nn.LayerNorm | nn.GroupNorm):
            nn.init.ones_(self.output_norm.weight)
            nn.init.zeros_(self.output_norm.bias)
        for maker in self.makers.values():
            assert isinstance(maker, GateMaker)
            maker.reset_parameters()

    @property
    def inner(self) -> InnerLoop:
        """The inner loop that the layer runs."""
        return self._inner

    @inner.setter
    def inner(self, inner: InnerLoop) -> None:
        check_fits_causal_layer(inner)
        check_fits_projections(inner, self.projections)
        check_built("inner", inner, self._shapes_for(inner) | self._vectors_for(inner), self._built_shapes | self._vectors)
        built = self._built
        if (1 if self.projections.removal is not None else inner.writes) != self.writes:
            raise ValueError(f"inner must have writes={built.writes}, for which this layer was built; got {inner.writes}")
        for name, gate in inner.gates.items():
            if name not in built.gates or built.gates[name].per != gate.per:
                raise ValueError(f"inner has the gate {name} per {gate.per}, without which this layer was built")
        if inner.token_lr and not built.token_lr:
            raise ValueError("inner has token_lr=True, but this layer was built without a learned rate")
        if "read_rate" in inner.gates and inner.span != built.span:
            raise ValueError(f"inner must have spans of {built.span} tokens, whose read rates were built; got {inner.span}")
        self._inner = inner

    def start_weights(self) -> dict[str, Tensor]:
        """The fast weights that every sequence starts from: matrices `[heads, in, out]`, vectors `[heads, out]`."""
        weights: dict[str, Tensor] = {}
        like = self.k_proj.weight if isinstance(self.k_proj.weight, Tensor) else next(self.parameters())
        for name, shape in self._built_shapes.items():
            held = self.weights[_named(name)] if self.projections.start == "learned" else None
            weights[name] = like.new_zeros(self.heads, *shape, dtype=torch.float32) if held is None else held
        return weights | {name: self.weights[_named(name)] for name in self._vectors}

    def call(self, x: Tensor, layout: Layout | None = None, tables: Tables | None = None) -> InnerCall:
        """What the layer gives to `kvbind.ttt` for sequences from their first token on; arguments as `forward` takes them.

        Raises:
            ValueError: a slice of a row that is cut over ranks, which is no call of its own, or boundaries of packed rows
                that the device alone knows.
        """
        check_input(x, self.hidden_size)
        layout = Layout.rows(x.shape[1], x.device) if layout is None else layout
        if layout.sequence is not None:
            raise ValueError("layout must be of whole rows; got one that is cut over ranks")
        made = self._make(x, layout, layout.places((), x.shape[1]), Tails())
        return InnerCall(
            self._inner, self.start_weights(), made.q, made.k, made.v, made.lr, made.gates, layout.known_bounds
        )  # fmt: skip

    def forward(
        self,
        x: Tensor,
        layout: Layout | None = None,
        tables: Tables | None = None,
        state: FastWeightState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, FastWeightState | None]:
        """Mix the tokens of `x`.

        Args:
            x: normalized input `[B, T, d]`.
            layout: where its tokens sit; by default rows of equal length that go on from `state`.
            tables: not used: rotary tables of attention.
            state: where earlier tokens of the same sequences left off.
            return_state: also return where these tokens leave off.

        Returns:
            `[B, T, d]`, of no meaning at padding, and the state or None.

        Raises:
            ValueError: an input without a sequence or of another shape; a state together with packed sequences or a slice of
                a row, or of another batch or inner loop; a slice of a row for an inner loop that is not cut over ranks.
            TypeError: a state of another kind of layer.
        """
        check_input(x, self.hidden_size)
        batch, length, _ = x.shape
        seen = check_state(x, layout, state, FastWeightState, return_state)
        layout = Layout.rows(length, x.device, seen) if layout is None else layout
        tails = Tails(None if state is None else state.tails, layout.lengths, {} if return_state else None)
        made = self._make(x, layout, layout.places(seen, length), tails)
        fast, after = self._run(made, layout, None if state is None else state.fast, return_state)
        output: Tensor = self.o_proj(self._join(fast, made))
        if after is None:
            return output, None
        return output, FastWeightState(after, tails.latest or {}, layout.after(seen or (0,) * batch, length))

    def _run(self, made: Made, layout: Layout, before: State | None, return_state: bool) -> tuple[Tensor, State | None]:
        """Run the inner loop: outputs `[B, T, H, Dv]`, and its state where that is wanted."""
        return run_rows(
            self._inner, self.start_weights() if before is None else None, made.q, made.k, made.v, made.lr, made.gates,
            layout, form=self.form, state=before, return_state=return_state,
        )  # fmt: skip

    def _make(self, x: Tensor, layout: Layout, places: Tensor, tails: Behind) -> Made:
        """Everything that is made of the input.

        Args:
            x: normalized input `[B, T, d]`.
            layout: where its tokens sit.
            places: how many tokens of its sequence come before each, int64 `[B, T]` or `[1, T]`.
            tails: what stands before them, which is brought forward.
        """
        p = self.projections
        streams: dict[str, Tensor] = {}
        # what looks back must not look over the start of a document, nor of a row that is cut over ranks
        shard = layout.sequence if layout.sequence is not None and layout.sequence.connected else None
        masks = places if layout.cu_seqlens is not None or shard is not None else None
        ranks = None if shard is None else OnRanks(shard)
        tails = tails if ranks is None else ranks
        if self.shift is not None:
            before = tails.own(tails.behind("shift", x, 1)[:, :-1], 1)
            if masks is not None:
                before = before.masked_fill((masks < 1)[..., None], 0)
            streams = {name: x + (before - x) * share.to(x.dtype) for name, share in self.shift.items()}

        def of(name: str) -> Tensor:
            return streams.get(name, x)

        parts = {"k": self.k_proj(of("k")), "v": self.v_proj(of("v"))}
        parts["q"] = parts["k"] if self.q_proj is None else self.q_proj(of("q"))
        if self.conv is not None:
            joined = torch.cat([parts[name] for name in p.conv_on], dim=-1)
            ahead = self.conv.width - 1
            convolved = tails.own(self.conv(tails.behind("conv", joined, ahead), masks), ahead)
            parts |= dict(zip(p.conv_on, convolved.split([self.widths[name] for name in p.conv_on], dim=-1), strict=True))
        if p.activation == "silu":
            parts = {name: F.silu(y) for name, y in parts.items()}
        q, k = (self._heads(parts[name], self.key_width, 1 if p.shared_keys else self.heads) for name in ("q", "k"))
        v = self._heads(parts["v"], self.value_width, self.heads)
        if ranks is not None and ranks.exchanges is not None:
            # backward, what the fast weights exchange comes first on every rank
            k = ranks.exchanges.tie(k)
        return self._operands(q, k, v, of, layout, places)

    def _operands(self, q: Tensor, k: Tensor, v: Tensor, of: Any, layout: Layout, places: Tensor) -> Made:
        """From heads to what `ttt` takes; `of` gives the input of each maker."""
        p, inner, dtype = self.projections, self._inner, v.dtype
        made: dict[str, Tensor] = {}
        lr: Tensor | float = 1.0
        rate = rate_of(inner, p)
        if isinstance(rate, Constant):
            lr = rate.value
        for name, module in self.makers.items():
            assert isinstance(module, GateMaker)
            if name in DECLARED and name not in inner.gates:
                continue
            if isinstance(module, DecayMaker) and isinstance(p.write_gate, Step):
                step = module.step(of(name))
                made[name], made["write_gate"] = module.decay(step), step[..., None]
            else:
                made[name] = module(of(name), places)
        if "rate" in made:
            # [B, T, H] or [B, T, H, n] to a row for each write
            lr = made.pop("rate")
            lr = lr.transpose(2, 3).flatten(1, 2) if lr.dim() == 4 else lr
        share = self._rows(made.pop("erase")) if "erase" in made else None
        if share is not None and self.correction is not None:
            q = q - (wide(self.correction)[:, None] * share * k).to(q.dtype)
        beside: dict[str, Tensor] = {}
        erase: Tensor | None = None
        if self.skip is not None:
            beside["value"] = self.skip.to(dtype)[:, None] * v
        if "removal" in made:
            # what is read for and written by is told apart before norms
            k, erase, v = self._removing(k, v, made.pop("removal"))
            q = self._finished(q, layout, places)
        else:
            q, k = self._finished(q, layout, places), self._finished(k, layout, places)
            erase = None if share is None else share * k
        if self.rho is not None:
            each = 2 if p.removal is not None else 1
            writing, value = k[:, each - 1 :: each], v[:, each - 1 :: each]
            beside["bonus"] = (q * writing * wide(self.rho)).sum(-1, keepdim=True).to(dtype) * value
        if "write_gate" in made:
            v = v * self._rows(made.pop("write_gate")).to(dtype)
        if p.scale:
            q = q / math.sqrt(self.key_width)
        gates = {f"log_{name}" if self._maker_at(name).log else name: x for name, x in made.items()}
        if erase is not None:
            gates["erase"] = erase.to(dtype)
        if p.shared_keys:
            q, k = q.expand(-1, -1, self.heads, -1), k.expand(-1, -1, self.heads, -1)
            if "erase" in gates:
                gates["erase"] = gates["erase"].expand(-1, -1, self.heads, -1)
        gate = None if self.output_gate is None else split_heads(self.output_gate(of("output_gate")), self.heads)
        return Made(q.to(dtype), k.to(dtype), v, lr, gates, beside, gate)

    def _maker_at(self, name: str) -> GateMaker:
        maker = self.makers[name]
        assert isinstance(maker, GateMaker)
        return maker

    def _heads(self, x: Tensor, width: int, heads: int) -> Tensor:
        """`[B, T, n heads width]` to `[B, T n, heads, width]`."""
        each = x.unflatten(-1, (-1, heads, width))
        return each.flatten(1, 2)

    def _rows(self, x: Tensor) -> Tensor:
        """What is one for a token `[B, T, ...]`, for each of its writes."""
        return x if self.writes == 1 else x.repeat_interleave(self.writes, dim=1)

    def _finished(self, x: Tensor, layout: Layout, places: Tensor) -> Tensor:
        """Norm, powers and rotary positions of queries or keys `[B, T n, heads, Dk]`; float32 or wider."""
        p, x = self.projections, wide(x)
        if p.l2:
            x = unit(x)
        if self.powers is not None:
            x = sum(c * x ** (i + 1) for i, c in enumerate(wide(self.powers).unbind()))  # type: ignore[assignment]
        if p.rotary != "none":
            positions = layout.positions
            if p.rotary == "span":
                positions = places.remainder(self._inner.span or 1)
            if x.shape[1] != positions.shape[1]:
                positions = positions.repeat_interleave(self.writes, dim=1)
            x = rotate(x, rotary_tables(positions, self.key_width, p.rope_theta))
        return x

    def _removing(self, k: Tensor, v: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, keys at which residuals read, and values of two writes for each token: a removal, and what is written."""
        assert self.kappa is not None
        assert self.alpha is not None
        k = wide(k)
        removed = unit(k * wide(self.kappa))
        written = k * (1 + (factor - 1) * wide(self.alpha))

        def pairs(first: Tensor, second: Tensor) -> Tensor:
            return torch.stack((first, second), dim=2).flatten(1, 2)

        return (
            pairs(removed * factor, written),
            pairs(removed, torch.zeros_like(removed)),
            pairs(torch.zeros_like(v), v),
        )

    def _join(self, fast: Tensor, made: Made) -> Tensor:
        """The output of fast weights `[B, T, H, Dv]`, normed and gated: `[B, T, H Dv]`."""
        return joined(fast, made, self.projections, self.output_norm)

    def extra_repr(self) -> str:
        """What `print` shows beside the modules."""
        return f"inner={self._inner!r}, projections={self.projections!r}, form={self.form!r}"


DECLARED = frozenset(gate.name for gate in GATES)


def unit(x: Tensor) -> Tensor:
    """`x / sqrt(sum x^2 + eps)` over the last axis."""
    return x * (x.square().sum(-1, keepdim=True) + UNIT_EPS).rsqrt()


def _named(name: str) -> str:
    """The parameter that holds a fast weight: no name of a module has dots."""
    return name.replace(".", "_")
