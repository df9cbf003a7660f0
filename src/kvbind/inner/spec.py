"""`InnerLoop`: a whole inner loop as one value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml

from kvbind.files import YAML_LIMIT, check_plain, parse_yaml, read_text
from kvbind.inner.gates import GATES, Gate
from kvbind.inner.losses import Loss
from kvbind.inner.networks import NETWORKS, DepthwiseConv, Network
from kvbind.inner.orthogonalize import NewtonSchulz
from kvbind.inner.value import Value, check_bool, check_choice, check_positive_int, nearest

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
        retention: weights decay before each update; `ttt` then needs a `retention` gate.
        normalize: after each update, every output channel gets back the norm it started the sequence with. With "read" the
            weights that are read and differentiated do, and updates accumulate in weights that are left as they are.
        direction: "descent" on the loss, or "ascent".
        query: outputs are `f("query")`, or `f("key")`.
        steps: how often the rule is applied to each chunk.
        chunk: tokens in a chunk; None under `visibility="full"`.
        visibility: what the output of token t in chunk c uses: the weights before chunk c ("past"), after it ("chunk"),
            after the chunk's tokens up to t ("token"), or after one update from all update tokens ("full").
        token_lr: layers built on this spec give each token, head and matrix a learned rate; otherwise the rate is the
            constant 1. `ttt` takes the rates it is given either way.

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
    retention: bool = False
    normalize: bool | Literal["read"] = False
    direction: Literal["descent", "ascent"] = "descent"
    query: Literal["query", "key"] = "query"
    steps: int = 1
    chunk: int | None = None
    visibility: Visibility = "past"
    token_lr: bool = True

    # no fields: all of them as JSON, empty where the network is of a class that is not known by name; and the gates that are
    # asked for, by name
    text = ""
    gates: ClassVar[Mapping[str, Gate]] = {}

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
        for name in ("momentum", "clip", "retention", "token_lr"):
            check_bool(name, getattr(self, name))
        check_positive_int("steps", self.steps)
        if self.visibility == "full":
            if self.chunk is not None:
                raise ValueError(f"chunk must be None under visibility='full', which has no chunks; got {self.chunk}")
        elif self.chunk is None:
            raise ValueError(f"chunk must be an int of at least 1 under visibility={self.visibility!r}; got None")
        else:
            check_positive_int("chunk", self.chunk)
        self._check_combinations()
        object.__setattr__(self, "gates", {gate.name: gate for gate in GATES if getattr(self, gate.name)})
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

    def same_as(self, other: InnerLoop) -> bool:
        """Whether `other` is equal to this value; a compiler for which numbers may vary cannot compare values by fields."""
        return self is other or (self.text == other.text if self.text and other.text else self == other)

    @property
    def updated(self) -> tuple[str, ...]:
        """The names of the matrices that the rule updates."""
        return self.network.matrices if self.update == "all" else ("out",)

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
        check_plain(data, "InnerLoop.from_dict's dict", values=True)
        fields = dict(data)
        if "network" not in fields:
            raise TypeError("an inner loop needs a field 'network', such as {kind: SwiGLU}")
        fields["network"] = network_from_dict(fields["network"])
        if isinstance(fields.get("orthogonalize"), str | dict):
            fields["orthogonalize"] = orthogonalize_from_dict(fields["orthogonalize"])
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
            TypeError: as `from_dict`.
            ValueError: as `from_dict`; text that is no YAML.
        """
        is_file = isinstance(source, Path) or source.endswith((".yaml", ".yml"))
        text, where = (read_text(source, YAML_LIMIT), str(source)) if is_file else (str(source), "the text")
        return cls.from_dict(parse_yaml(text, where, f"source must be YAML; {where} is not"))


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
    fields = {"kind": data} if isinstance(data, str) else dict(data)
    kind = fields.pop("kind", None)
    if kind not in NETWORKS:
        raise ValueError(f"network's kind must be one of {', '.join(NETWORKS)}; got {kind!r}{nearest(kind, NETWORKS)}")
    return NETWORKS[kind].from_dict(fields)
