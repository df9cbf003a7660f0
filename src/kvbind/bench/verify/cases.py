"""The calls that `kvbind bench verify` holds to float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from kvbind.bench.harness.operands import Size
from kvbind.bench.layers.operators import LayerOperator, pieces
from kvbind.forms.evaluate import Form
from kvbind.forms.obstacles import best_form, parallel_obstacles
from kvbind.forms.on_kernels import fla
from kvbind.inner import systems
from kvbind.inner.head import LayerNormHead
from kvbind.inner.networks import MLP, Linear, SwiGLU
from kvbind.inner.orthogonalize import NewtonSchulz
from kvbind.inner.spec import InnerLoop


@dataclass(frozen=True)
class VerifyCase:
    """One inner loop at one size.

    Attributes:
        name: of the case.
        spec: the inner loop.
        size: of the call.
        form: that is verified.
        reference: form of the float64 reference.
        hidden: hidden width, where it is not the keys'.
        value_width: width of the values, where it is not the keys'.
        splits: places at which the sequence is cut into calls that hand on their state.
        cu_seqlens: boundaries of packed sequences.
        update_tokens: tokens that write, of visibility "full".
        wide_newton_schulz: Newton-Schulz runs in float32 for bfloat16 operands too.
        small_gates: gates are between 1 and 1e-30, many of them small.
        layout: of queries, keys and values, of `kvbind.bench.harness.named_operands.LAYOUTS`.
        also: dtypes in which it is verified besides `DTYPES`.
        fla: ours is what runs on flash-linear-attention's operator, which takes bfloat16 alone.
    """

    name: str
    spec: InnerLoop
    size: Size
    form: Form
    reference: Form = "recurrent"
    hidden: int | None = None
    value_width: int | None = None
    splits: tuple[int, ...] = ()
    cu_seqlens: tuple[int, ...] | None = None
    update_tokens: slice | None = None
    wide_newton_schulz: bool = False
    small_gates: bool = False
    layout: str = "tokens"
    also: tuple[str, ...] = ()
    fla: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `ttt` that are no operands."""
        given = {"cu_seqlens": self.cu_seqlens, "update_tokens": self.update_tokens}
        return {name: x for name, x in given.items() if x is not None}

    @property
    def facts(self) -> dict[str, Any]:
        """What a row says of it."""
        return {"form": self.form, "reference": self.reference, "newton_schulz": self.spec.orthogonalize is not None}

    def spec_in(self, dtype: torch.dtype) -> InnerLoop:
        """The inner loop for operands of `dtype`."""
        if self.spec.orthogonalize is None:
            return self.spec
        if self.wide_newton_schulz and dtype == torch.bfloat16:
            dtype = torch.float32
        return self.spec.replace(orthogonalize=self.spec.orthogonalize.replace(dtype=dtype))


@dataclass(frozen=True)
class CaseScale:
    """The sizes that cases are made of.

    Attributes:
        width: of a head; that of the 760M model's layer.
        heads: fast heads.
        chunk: tokens in a chunk.
        narrow: a small width, a power of two.
        odd: a small width that is none.
        many: sequences in a batch of many.
        short: tokens of cases that keep a state for every token or loop over tokens.
        grid: side of an image in tokens.
    """

    width: int
    heads: int
    chunk: int
    narrow: int
    odd: int
    many: int
    short: int
    grid: int


FULL = CaseScale(width=384, heads=4, chunk=2048, narrow=64, odd=96, many=8, short=293, grid=14)

SMALL = CaseScale(width=32, heads=2, chunk=64, narrow=16, odd=24, many=2, short=133, grid=8)


def cases(scale: CaseScale) -> list[VerifyCase | LayerOperator]:
    """Everything that is verified: inner loops over four chunks each, or four and an incomplete one; pieces of the layer."""
    s = scale
    found: list[VerifyCase | LayerOperator] = []
    chunk, small_chunk = s.chunk, max(s.chunk // 4, 64)
    whole, ragged = 4 * chunk, 4 * chunk + chunk // 3 + 1
    full = Size(1, whole, s.heads, s.width)

    def add(name: str, spec: InnerLoop, size: Size = full, *, both: bool = True, **fields: Any) -> None:
        forms: list[Form] = ["recurrent"]
        if not parallel_obstacles(spec) and spec.visibility != "full":
            forms = ["recurrent", "parallel"] if both else ["parallel"]
        found.extend(VerifyCase(f"{name}, {form}", spec, size, form, **fields) for form in forms)

    def at(width: int, batch: int = 1, tokens: int = ragged) -> Size:
        return Size(batch, tokens, s.heads, width)

    rungs = systems.ladder(systems.lact_llm(chunk))
    small = systems.ladder(systems.lact_llm(small_chunk))
    rung0, rung2, rung6 = rungs["rung0"], rungs["rung2"], rungs["rung6"]
    for name, spec in rungs.items():
        add(name.replace("rung", "rung "), spec)
    add("rung 2, Newton-Schulz in float32", rung2, wide_newton_schulz=True)

    for name, spec in (("rung 0", rung0), ("rung 2", rung2), ("rung 6", rung6)):
        add(f"{name}, ragged end", spec, replace(full, tokens=ragged))
        add(f"{name}, visibility chunk", spec.replace(visibility="chunk"), replace(full, tokens=ragged))
        add(f"{name}, ascent", spec.replace(direction="ascent"))
        cuts = (chunk - chunk // 4, chunk - chunk // 4 + 1, 3 * chunk + 1)
        add(f"{name}, state through four calls", spec, replace(full, tokens=ragged), splits=cuts)
        bounds = (0, 1, 1, chunk // 2, 2 * chunk + chunk // 2, ragged)
        add(f"{name}, packed sequences", spec, replace(full, tokens=ragged), cu_seqlens=bounds)
    add("rung 0, reads keys", rung0.replace(query="key"))
    add("rung 0, two steps", rung0.replace(steps=2))
    add("rung 0, norms of what is read", rung0.replace(normalize="read"))
    add("rung 2, norms of what is read", rung2.replace(normalize="read"))
    add("rung 2, clipped", rung2.replace(orthogonalize=None, clip=True))
    add("rung 2, retention", rung2.replace(retention=True))
    add("rung 6, retention and momentum", rung6.replace(retention=True, momentum=True))

    ends = {
        name: replace(at(s.width), tokens=4 * small_chunk + small_chunk // 3 + 1) for name in ("rung0", "rung2", "rung6")
    }
    for name, size in ends.items():
        title = name.replace("rung", "rung ")
        add(f"{title}, width {s.narrow}", small[name], replace(size, width=s.narrow))
        add(f"{title}, width {s.odd}", small[name], replace(size, width=s.odd))
        add(f"{title}, batch {s.many}", small[name], replace(size, width=s.narrow, batch=s.many))
        add(f"{title}, values half as wide", small[name], size, value_width=s.width // 2)
    for name in ("rung0", "rung2"):
        title = name.replace("rung", "rung ")
        add(f"{title}, hidden twice as wide", small[name], ends[name], hidden=2 * s.width)

    plain = InnerLoop(network=SwiGLU(), chunk=small_chunk)
    add("SwiGLU, no shaping", plain.replace(update="last"), ends["rung2"])
    add("MLP, last layer", plain.replace(network=MLP(), update="last", momentum=True), ends["rung2"])
    memory = InnerLoop(network=MLP("silu"), loss="squared", momentum=True, retention=True, chunk=64)
    for name, spec in (
        ("MLP, momentum and retention", memory),
        ("MLP of depth 2, momentum and retention", memory.replace(network=MLP("silu", 2))),
        ("MLP, momentum, retention and orthogonalization", memory.replace(orthogonalize=NewtonSchulz())),
    ):
        add(name, spec, at(s.odd, tokens=s.short))

    # narrow operands of equal chunks are fetched by the accelerator, wherever tokens lie
    three = Size(3, ends["rung2"].tokens, max(s.heads // 2, 1), s.width // 2)
    for title in ("rung 2", "rung 3", "rung 4", "rung 5", "rung 6"):
        spec, short = (of[title.replace(" ", "")] for of in (rungs, small))
        equal: dict[str, Any] = {"both": False, "also": ("float16",)}
        add(f"equal chunks, {title}, head by head", spec, layout="heads", **equal)
        add(f"equal chunks, {title}, visibility chunk", spec.replace(visibility="chunk"), layout="heads", **equal)
        add(f"equal chunks, {title}, three ragged rows", short, three, **equal)
        every = short.replace(retention=True, momentum=True, token_lr=True)
        add(f"equal chunks, {title}, every gate", every, replace(three, tokens=4 * small_chunk), layout="heads", **equal)
        add(f"equal chunks, {title}, every gate, ascent", every.replace(direction="ascent"), three, layout="heads", **equal)

    # the recurrent form keeps a state for every token, or loops over them
    narrow, causal = at(s.narrow, 2, s.short), systems.linear_attention()
    gated = InnerLoop(network=Linear(), chunk=1, visibility="token", retention=True)
    add("linear attention", causal, narrow)
    add("linear attention in chunks", causal.replace(chunk=16, token_lr=True), narrow, both=False)
    add("linear attention, momentum and retention", gated.replace(momentum=True), narrow, both=False)
    add("linear attention, retention", gated, narrow, both=False)
    add("linear attention, retention gates of all sizes", gated, narrow, both=False, small_gates=True)
    for split in (1, 3, 6):
        size = replace(full, heads=split * s.heads, width=s.width // split)
        add(f"linear attention, {size.heads} heads", causal, size, both=False, reference="parallel")
    add("linear attention, state through three calls", causal, narrow, both=False, splits=(1, s.short // 2))
    packed = (0, 3, 3, s.short // 2, s.short)
    add("linear attention, packed sequences", causal, replace(narrow, batch=1), both=False, cu_seqlens=packed)
    add("SwiGLU under token visibility", plain.replace(update="last", visibility="token", chunk=16), narrow, both=False)
    add("DeltaNet", systems.delta_net(), narrow)
    add("DeltaNet with retention", systems.delta_net().replace(retention=True), narrow, both=False)
    add("DeltaNet in chunks", systems.delta_net(16), narrow, both=False)
    add("MLP under squared error, by tokens", systems.delta_net(16).replace(network=MLP("gelu_tanh")), narrow)

    # one state after another is what these are, and the kernels go by chunks
    token = Size(2, s.short, s.heads, 2 * s.narrow)
    packed_delta: dict[str, Any] = {"both": False, "cu_seqlens": packed}
    rules = {
        "delta rule": systems.delta_net(),
        "delta rule, gated": systems.gated_delta_net(),
        "delta rule, erased elsewhere": systems.comba(),
        "delta rule, gates by channel": systems.kda(),
        "delta rule, erased elsewhere by channel": systems.gdn2(),
    }
    for name, spec in rules.items():
        add(name, spec, token, both=False, also=("float16",))
        add(f"{name}, packed sequences", spec, replace(token, batch=1), **packed_delta)
        if spec.retention:
            add(f"{name}, gates of all sizes", spec, token, both=False, small_gates=True)
    add("delta rule, several writes", systems.delta_product(), replace(token, width=s.narrow), both=False)
    add("delta rule, several writes by channel", systems.rwkv7(), replace(token, width=s.narrow), both=False)
    add("delta rule, ascent", rules["delta rule"].replace(direction="ascent"), token, both=False)
    gated_delta, by_channel = rules["delta rule, gated"], rules["delta rule, gates by channel"]
    for name, spec in (("gated", gated_delta), ("gates by channel", by_channel)):
        add(f"delta rule, {name}, head by head", spec, token, both=False, layout="heads")
        add(f"delta rule, {name}, width {s.odd}", spec, replace(token, width=s.odd), both=False)
        add(f"delta rule, {name}, width {2 * token.width}", spec, replace(token, width=2 * token.width), both=False)
        add(f"delta rule, {name}, values half as wide", spec, token, both=False, value_width=s.narrow)
        add(f"delta rule, {name}, state through three calls", spec, token, both=False, splits=(2, s.short // 2))
    add("linear attention, retention by channel", systems.gla(), token, both=False)

    # gradients taken once per mini-batch
    memory_size, least = Size(2, s.short, s.heads, s.narrow), max(s.narrow // 2, 16)
    memories = {
        "TTT-Linear": (systems.ttt_linear(), None),
        "TTT-MLP": (systems.ttt_mlp(), s.narrow),
        "TTT-MLP, exact gelu": (systems.ttt_mlp().replace(network=MLP("gelu", bias=True, head=LayerNormHead())), s.narrow),
        "Titans": (systems.titans(), least),
        "Titans, retention alone": (systems.titans().replace(momentum=False), s.narrow),
        "Titans, one matrix": (systems.titans().replace(network=Linear()), None),
        "Titans, one matrix and a head": (systems.titans().replace(network=Linear(head=LayerNormHead())), None),
    }
    for name, (spec, hidden) in memories.items():
        each: dict[str, Any] = {"form": best_form(spec), "hidden": hidden}
        found.append(VerifyCase(name, spec, memory_size, **each))
        found.append(VerifyCase(f"{name}, state through three calls", spec, memory_size, splits=(5, s.short // 2), **each))
        found.append(VerifyCase(f"{name}, packed sequences", spec, replace(memory_size, batch=1), cu_seqlens=packed, **each))
        if spec.retention:
            found.append(VerifyCase(f"{name}, gates of all sizes", spec, memory_size, small_gates=True, **each))
    found.append(VerifyCase("TTT-MLP, four times as wide", systems.ttt_mlp(), memory_size, "dual", hidden=4 * s.narrow))

    views = Size(2, ragged, s.heads, s.width)
    add("LaCT view synthesis", systems.lact_nvs(), views, hidden=2 * s.width, update_tokens=slice(0, whole // 2))
    wide = Size(2, small_chunk * 4, 1, 2 * s.width)
    add(
        "LaCT view synthesis, one wide head",
        systems.lact_nvs(),
        wide,
        hidden=4 * s.width,
        update_tokens=slice(0, 2 * small_chunk),
    )
    image = Size(s.many, s.grid**2, s.heads, s.narrow)
    add("ViTTT, GLU", systems.vittt(), image)
    add("ViTTT, GLU, last layer", systems.vittt().replace(update="last"), image)
    add("GLU in chunks", systems.vittt().replace(visibility="past", chunk=64, update="last"), image)
    add("ViTTT, depthwise convolution", systems.vittt("conv"), replace(image, heads=1))
    return found + fla_cases(narrow) + pieces(ragged, s.heads, s.width)


def fla_cases(narrow: Size) -> list[VerifyCase]:
    """What flash-linear-attention's operators compute, where they are installed.

    Args:
        narrow: a batch of more than one, that keeps a state for every token.
    """
    if fla.unusable() is not None:
        return []
    specs = {
        "linear attention": systems.linear_attention(),
        "simple GLA": systems.simple_gla(),
        "GLA": systems.gla(),
        "DeltaNet": systems.delta_net(),
        "gated DeltaNet": systems.gated_delta_net(),
        "KDA": systems.kda(),
    }
    found = []
    for name, spec in specs.items():
        title, half = f"flash-linear-attention, {name}", narrow.tokens // 2
        found.append(VerifyCase(title, spec, narrow, "parallel", fla=True))
        found.append(VerifyCase(f"{title}, state through three calls", spec, narrow, "parallel", splits=(2, half), fla=True))
        packed = (0, 3, half, narrow.tokens)
        found.append(
            VerifyCase(f"{title}, packed sequences", spec, replace(narrow, batch=1), "parallel", cu_seqlens=packed, fla=True)
        )
    return found
