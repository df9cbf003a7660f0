"""`InnerLoop`: a whole inner loop as one value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml

from kvbind.files import YAML_LIMIT, check_plain, parse_yaml, read_text, shortened
from kvbind.inner.fields import Anchor, Retention, Window
from kvbind.inner.gates import GATES, Gate
from kvbind.inner.head import LayerNormHead
from kvbind.inner.losses import Loss
from kvbind.inner.network import Network
from kvbind.inner.networks import NETWORKS, DepthwiseConv
from kvbind.inner.orthogonalize import NewtonSchulz
from kvbind.inner.value import LATER, Value, check_bool, check_choice, check_positive_int, nearest

Visibility = Literal["past", "chunk", "token", "full"]


@dataclass(frozen=True, repr=False)
class InnerLoop(Value):
    """An inner loop: a fast network, a binding loss, an update rule, and what each output sees.

    Section 1 of the specification; arXiv 2602.21204, section 3. Two systems that differ in fields differ in nothing else.

    Attributes:
        network: the fast network whose weights are the state.
        loss: "dot", `-<f(k), v>`, or "squared", `1/2 ||f(k) - v||^2`.
        update: "all" matrices or the "last" layer alone, the others staying as they start.
        momentum: the rule keeps a momentum buffer; `ttt` then needs a `momentum` gate.
        orthogonalize: a `NewtonSchulz` applied to each update, or None.
        clip: divide each output channel of an update by its norm plus one (ViTTT); excludes `orthogonalize`.
        retention: weights decay before each update, by a gate per head (True) or as a `Retention` says; `ttt` then needs a
            `retention` gate.
        normalize: after each update, every output channel gets back the norm it started the sequence with. With "read" the
            weights that are read and differentiated do, and updates accumulate in weights that are left as they are.
        direction: "descent" on the loss, or "ascent".
        query: outputs are `f("query")`, or `f("key")`.
        steps: how often the rule is applied to each chunk.
        chunk: tokens in a chunk, each of which is one write; None under `visibility="full"` for one write of all tokens.
        visibility: what the output of token t in chunk c uses: the weights before chunk c ("past"), after it ("chunk"),
            after the chunk's tokens up to t ("token"), or after the updates of all tokens that write ("full").
        token_lr: layers built on this spec give each token, head and matrix a learned rate; otherwise the rate is the
            constant 1. `ttt` takes the rates it is given either way.
        refresh: tokens between renewals of the weights that gradients are taken at, a multiple of `chunk`; None for `chunk`
            itself, "call" for one renewal at the start of each call.
        erase: the squared residual reads `f(e)` where the write goes through k; `ttt` then needs `erase`, the keys e.
        writes: how often each token writes, one key and value after the other, before it is read; needs `chunk=1`. Keys,
            values and rates are then `[B, T * writes, ..]`; retention acts on a token's first write.
        read_rate: a token sees `M_s + c_t sum U_i` over the writes of its span (the tokens since the last renewal) up to it,
            and the span leaves `M_s + c sum U_i` with the c of its last token; `ttt` then needs `read_rate`, the c.
        step_rate: a factor on each update after lines 2 and 3; `ttt` then needs `step_rate`, averaged over each chunk.
        window: gradients or updates are those of the last n writes: an int for `Window(n)`, or a `Window`.
        anchor: an `Anchor` that weights are drawn back to, or None.
        detach_norms: the starting norms of line 6 carry no gradient of the outer loop.

    Raises:
        ValueError: a field whose value is not among its choices, or fields that exclude each other.
        TypeError: a field of the wrong type.
    """

    network: Network
    loss: Loss = "dot"
    update: Literal["all", "last"] = "all"
    momentum: bool = False
    orthogonalize: NewtonSchulz | None = None
    clip: bool = False
    retention: bool | Retention = False
    normalize: bool | Literal["read"] = False
    direction: Literal["descent", "ascent"] = "descent"
    query: Literal["query", "key"] = "query"
    steps: int = 1
    chunk: int | None = None
    visibility: Visibility = "past"
    token_lr: bool = True
    refresh: int | Literal["call"] | None = field(default=None, metadata=LATER)
    erase: bool = field(default=False, metadata=LATER)
    writes: int = field(default=1, metadata=LATER)
    read_rate: bool = field(default=False, metadata=LATER)
    step_rate: bool = field(default=False, metadata=LATER)
    window: int | Window = field(default=1, metadata=LATER)
    anchor: Anchor | None = field(default=None, metadata=LATER)
    detach_norms: bool = field(default=False, metadata=LATER)

    # no fields, but made of them once, as calls that bring single tokens ask for them often: all as JSON, empty where the
    # network is of a class that is not known by name
    text = ""
    gates: ClassVar[Mapping[str, Gate]] = {}
    """The gates that are asked for, by name."""
    updated: ClassVar[tuple[str, ...]] = ()
    """The names of the weights that the rule updates: matrices, and the vectors that go with them."""
    extensions: ClassVar[Mapping[str, Any]] = {}
    """What there is beyond the six lines on whole chunks: fields by name, those of the network dotted."""
    room: ClassVar[int] = 0
    """The most tokens that a state has pending."""

    def __post_init__(self) -> None:
        if not isinstance(self.network, Network):
            raise TypeError(f"network must be one of {', '.join(f'{name}()' for name in NETWORKS)}; got {self.network!r}")
        if self.orthogonalize is not None and not isinstance(self.orthogonalize, NewtonSchulz):
            raise TypeError(f"orthogonalize must be a NewtonSchulz or None; got {self.orthogonalize!r}")
        check_choice("loss", self.loss, ("dot", "squared"))
        check_choice("update", self.update, ("all", "last"))
        check_choice("direction", self.direction, ("descent", "ascent"))
        check_choice("query", self.query, ("query", "key"))
        check_choice("visibility", self.visibility, ("past", "chunk", "token", "full"))
        if self.normalize != "read":
            check_bool("normalize (where it is not 'read')", self.normalize)
        if not isinstance(self.retention, Retention):
            check_bool("retention (where it is no Retention)", self.retention)
        if not isinstance(self.window, Window):
            check_positive_int("window (where it is no Window)", self.window)
        if self.anchor is not None and not isinstance(self.anchor, Anchor):
            raise TypeError(f"anchor must be an Anchor or None; got {self.anchor!r}")
        for name in ("momentum", "clip", "token_lr", "erase", "read_rate", "step_rate", "detach_norms"):
            check_bool(name, getattr(self, name))
        check_positive_int("steps", self.steps)
        check_positive_int("writes", self.writes)
        # one spelling each, so that equal inner loops are equal values
        if self.retention == Retention():
            object.__setattr__(self, "retention", True)
        if isinstance(self.window, Window) and (self.window.on == "gradient" or self.window.n == 1):
            object.__setattr__(self, "window", self.window.n)
        if self.visibility == "full" and self.chunk is None:
            pass
        elif self.chunk is None:
            raise ValueError(f"chunk must be an int of at least 1 under visibility={self.visibility!r}; got None")
        else:
            check_positive_int("chunk", self.chunk)
        updated = self.network.updated(self.network.matrices if self.update == "all" else ("out",))
        object.__setattr__(self, "updated", updated)
        asked = {gate.name: getattr(self, gate.name) for gate in GATES}
        object.__setattr__(self, "gates", {gate.name: gate.of(asked[gate.name]) for gate in GATES if asked[gate.name]})
        self._check_combinations()
        object.__setattr__(self, "extensions", self._extensions())
        object.__setattr__(self, "room", 0 if self.visibility == "full" or self.span is None else self.span - 1)
        # made here and not when asked: a compiler tells by one string whether it has compiled for this value
        if type(self.network) in NETWORKS.values():
            with suppress(TypeError):  # of a field that is no plain data, as a network that users entered may have
                object.__setattr__(self, "text", json.dumps(self.to_dict()))

    def _check_combinations(self) -> None:
        if self.clip and self.orthogonalize is not None:
            raise ValueError("clip and orthogonalize exclude each other; set clip=False or orthogonalize=None")
        if isinstance(self.network, DepthwiseConv):
            if self.visibility != "full":
                raise ValueError(f"DepthwiseConv needs visibility='full', the whole grid; got {self.visibility!r}")
            if self.chunk is not None:
                raise ValueError(f"DepthwiseConv needs chunk=None, the whole grid; got {self.chunk}")
            if self.orthogonalize is not None:
                raise ValueError("orthogonalize must be None for DepthwiseConv, whose kernels are no matrices")
        if self.visibility == "token" and self.chunk != 1:
            for name in ("orthogonalize", "clip"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name} acts on whole chunks of writes: under visibility='token' it needs chunk=1; "
                        f"got chunk={self.chunk}"
                    )
            if self.steps > 1:
                raise ValueError(
                    f"steps must be 1 under visibility='token' unless chunk=1, as gradients are taken at the chunk's "
                    f"starting weights; got steps={self.steps}, chunk={self.chunk}"
                )
        self._check_refresh()
        self._check_retention()
        self._check_writes()
        self._check_vectors()
        if self.erase and self.loss != "squared":
            raise ValueError(f"erase is where the residual of loss='squared' reads; got loss={self.loss!r}")
        if self.anchor is not None and self.visibility == "token" and self.chunk != 1:
            raise ValueError(
                f"anchor acts on whole chunks of writes: under visibility='token' it needs chunk=1; got chunk={self.chunk}"
            )
        if self.window_size > 1:
            if self.chunk is None:
                raise ValueError("window needs chunks, over whose writes it slides; got chunk=None")
            if self.steps > 1:
                raise ValueError(f"window and several steps on a chunk exclude each other; got steps={self.steps}")

    def _check_refresh(self) -> None:
        if self.refresh is None:
            return
        if self.chunk is None:
            raise ValueError(f"refresh must be None where there are no chunks (chunk=None); got {self.refresh!r}")
        if self.refresh != "call":
            if isinstance(self.refresh, str):
                raise ValueError(f"refresh must be an int, 'call' or None; got {self.refresh!r}")
            check_positive_int("refresh", self.refresh)
            if self.refresh % self.chunk:
                raise ValueError(f"refresh must be a multiple of chunk = {self.chunk}; got {self.refresh}")
        if self.steps > 1 and self.refresh != self.chunk:
            raise ValueError(
                f"steps must be 1 where gradients are renewed less than once per chunk; got steps={self.steps}, "
                f"refresh={self.refresh!r}"
            )

    def _check_retention(self) -> None:
        if not isinstance(self.retention, Retention):
            return
        vectors = len(self.updated) > len(self.network.matrices)
        if self.retention.per == "key" and (not self.network.rows_are_keys or vectors):
            raise ValueError(
                f"retention per key channel needs matrices whose rows are key channels, Linear() or GLU(), without bias or "
                f"fast head; got {self.network!r}"
            )
        if self.retention.order == "before":
            if self.refresh not in (None, self.chunk):
                raise ValueError(f"retention before the gradient needs refresh=None; got refresh={self.refresh!r}")
            if self.visibility == "token" and self.chunk != 1:
                raise ValueError(
                    f"retention before the gradient needs chunk=1 under visibility='token'; got chunk={self.chunk}"
                )
            if self.normalize == "read":
                raise ValueError("retention before the gradient and normalize='read' exclude each other")

    def _check_writes(self) -> None:
        if self.writes > 1:
            if self.chunk != 1 or self.visibility == "full":
                raise ValueError(
                    f"writes above 1 need chunk=1 and a causal visibility; got writes={self.writes}, chunk={self.chunk}, "
                    f"visibility={self.visibility!r}"
                )
            if self.query == "key":
                raise ValueError("writes above 1 need query='query': a token has several keys")
            if self.refresh not in (None, 1):
                raise ValueError(
                    f"writes above 1 need refresh=None, as each is taken at the weights before it; got {self.refresh!r}"
                )
        if not self.read_rate:
            return
        if self.visibility != "token":
            raise ValueError(f"read_rate needs visibility='token'; got {self.visibility!r}")
        excluded = {
            "momentum": False, "retention": False, "orthogonalize": None, "clip": False, "anchor": None,
            "normalize": False, "steps": 1, "writes": 1,
        }  # fmt: skip
        for name, needed in excluded.items():
            if getattr(self, name) != needed:
                raise ValueError(f"read_rate and {name} exclude each other; got {name}={getattr(self, name)!r}")

    def _check_vectors(self) -> None:
        head = self.network.output_head
        if self.network.has_bias:
            for name in ("orthogonalize", "clip", "normalize"):
                if getattr(self, name):
                    raise ValueError(f"{name} is of matrices: it excludes a network with bias=True; got {self.network!r}")
        if head is not None and head.fast:
            for name in ("clip", "normalize"):
                if getattr(self, name):
                    raise ValueError(f"{name} is of matrices: it excludes a head whose gamma is fast; got {self.network!r}")

    def same_as(self, other: InnerLoop) -> bool:
        """Whether `other` is equal to this value; a compiler for which numbers may vary cannot compare values by fields."""
        return self is other or (self.text == other.text if self.text and other.text else self == other)

    @property
    def span(self) -> int | None:
        """Tokens between points at which a state can stop: those where gradients are renewed, or between chunks."""
        return self.refresh if isinstance(self.refresh, int) else self.chunk

    @property
    def window_size(self) -> int:
        """How many writes a window holds."""
        return self.window.n if isinstance(self.window, Window) else self.window

    @property
    def sums_updates(self) -> bool:
        """Whether windows are over updates, and not gradients."""
        return isinstance(self.window, Window)

    @property
    def decays_before(self) -> bool:
        """Whether gradients are taken at the decayed weights (line 0)."""
        return isinstance(self.retention, Retention) and self.retention.order == "before"

    def _extensions(self) -> dict[str, Any]:
        defaults: dict[str, Any] = {"erase": False, "writes": 1, "read_rate": False, "step_rate": False, "anchor": None}
        found = {name: getattr(self, name) for name, default in defaults.items() if getattr(self, name) != default}
        if isinstance(self.retention, Retention):
            found["retention"] = self.retention
        if self.refresh not in (None, self.chunk):
            found["refresh"] = self.refresh
        if self.window_size > 1:
            found["window"] = self.window
        if self.visibility == "full" and self.chunk is not None:
            found["chunk"] = self.chunk
        if self.network.has_bias:
            found["network.bias"] = True
        if self.network.output_head is not None:
            found["network.head"] = self.network.output_head
        return found

    def one_write(self) -> Self:
        """One write of all tokens, seen by all: this inner loop without what needs several."""
        return self.replace(visibility="full", chunk=None, refresh=None, steps=1, writes=1, read_rate=False, window=1)

    @property
    def sign(self) -> int:
        """1 for descent, -1 for ascent: the sign with which an update enters the weights."""
        return 1 if self.direction == "descent" else -1

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The inner loop that `to_dict` wrote; fields that are left out take their defaults.

        Raises:
            TypeError: `data` is no dict, names an unknown field, or lacks `network`.
            ValueError: a field's value does not fit.
        """
        if not isinstance(data, dict):
            raise TypeError(f"InnerLoop.from_dict needs a dict; got {type(data).__name__}")
        check_plain(data, "InnerLoop.from_dict's dict", values=True, wide=False)
        fields = dict(data)
        if "network" not in fields:
            raise TypeError("an inner loop needs a field 'network', such as {kind: SwiGLU}")
        fields["network"] = network_from_dict(fields["network"])
        if isinstance(fields.get("orthogonalize"), str | dict):
            fields["orthogonalize"] = orthogonalize_from_dict(fields["orthogonalize"])
        for name, kind in (("retention", Retention), ("window", Window), ("anchor", Anchor)):
            if isinstance(fields.get(name), dict):
                fields[name] = kind.from_dict(fields[name])
        return super().from_dict(fields)

    def to_yaml(self, path: str | Path | None = None) -> str:
        """As YAML; also written to `path` where one is given."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_yaml(cls, source: str | Path) -> Self:
        """Read a YAML file (a `Path`, or a string that ends in .yaml or .yml) or YAML text.

        Raises:
            OSError: a file that cannot be read.
            TypeError: as `from_dict`; a source that is neither path nor text.
            ValueError: as `from_dict`; text that is no YAML, or holds no mapping.
        """
        if not isinstance(source, str | Path):
            raise TypeError(f"source must be a path or YAML text; got {type(source).__name__}")
        is_file = isinstance(source, Path) or source.endswith((".yaml", ".yml"))
        text, where = (read_text(source, YAML_LIMIT), str(source)) if is_file else (str(source), "the text")
        data = parse_yaml(text, where, f"source must be YAML; {where} is not")
        if not isinstance(data, dict):
            held = "it is empty" if data is None else f"it holds {shortened(data)}"
            raise ValueError(f"{where} must hold fields of an inner loop, such as {{network: SwiGLU, chunk: 512}}; {held}")
        return cls.from_dict(data)


def orthogonalize_from_dict(data: str | dict[str, Any]) -> NewtonSchulz:
    """What `to_dict` wrote, also with its kind: `{"kind": "NewtonSchulz", "dtype": "float32"}`, or a kind alone."""
    known = NewtonSchulz.__name__
    fields = {"kind": data} if isinstance(data, str) else dict(data)
    kind = fields.pop("kind", known)
    if kind != known:
        raise ValueError(f"orthogonalize's kind must be {known}; got {kind!r}{nearest(kind, [known])}")
    return NewtonSchulz.from_dict(fields)


def network_from_dict(data: Network | str | dict[str, Any]) -> Network:
    """The network that `to_dict` wrote: `{"kind": "MLP", "activation": "gelu"}`, or a kind alone."""
    if isinstance(data, Network):
        return data
    if not isinstance(data, str | dict):
        raise TypeError(f"network must be a kind, or a dict with one, such as {{kind: MLP}}; got {data!r}")
    fields: dict[str, Any] = {"kind": data} if isinstance(data, str) else dict(data)
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in NETWORKS:
        raise ValueError(f"network's kind must be one of {', '.join(NETWORKS)}; got {kind!r}{nearest(kind, NETWORKS)}")
    if isinstance(fields.get("head"), dict):
        fields["head"] = LayerNormHead.from_dict(fields["head"])
    return NETWORKS[kind].from_dict(fields)
