"""Every system of `loops.py` as `kvbind.ttt` of `kvbind.systems.NAME()`: from a loop's operands to the library's, and its
state back.

Only here are the systems' own symbols translated. `Adapter.missing` says why one cannot be run by the library as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import loops
import torch
from comparing import Run
from torch import Tensor

import kvbind
from kvbind import MLP, InnerLoop, Linear, NewtonSchulz

MUON = NewtonSchulz(loops.VIEWS, dtype=torch.float64)

BIAS = "{}.bias"
"""The name of a matrix's fast bias among weights."""
GAMMA, BETA = "gamma", "beta"
"""The names of a head's LayerNorm among weights."""

FORMS = ("recurrent", "auto", "linearize")
"""How the library runs each."""

Operands = Mapping[str, Any]
Outcome = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Adapter:
    """How the library runs a system.

    Attributes:
        name: in `kvbind.systems`.
        call: takes the function of that name, operands of the loop, its settings, and options of `ttt`.
        needs: fields of `InnerLoop` without which the name means something else.
    """

    name: str
    call: Callable[..., Outcome]
    needs: tuple[str, ...] = ()

    def missing(self) -> str:
        """Why the library cannot run it; empty where it can."""
        lacking = [name for name in self.needs if name not in {f.name for f in fields(InnerLoop)}]
        if lacking:
            return f"kvbind.InnerLoop has no field {lacking[0]}"
        return "" if hasattr(kvbind.systems, self.name) else f"kvbind.systems has no {self.name}"

    def run(self, system: loops.System, **options: Any) -> Run:
        make = getattr(kvbind.systems, self.name)
        return lambda x: self.call(make, x, system.settings, **options)


def ran(spec: InnerLoop, weights: Mapping[str, Tensor], q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Outcome:
    """Outputs, and of the state weights and momentum; what a loop has no name for is not compared.

    A third form beside those of `ttt` is "linearize": the linear attention that the inner loop is, which has no state.
    """
    if given.get("form") == "linearize":
        return kvbind.linearize(
            spec, weights, q, k, v, **{name: x for name, x in given.items() if name != "form"}
        ).output(), {}
    output, state = kvbind.ttt(spec, weights, q, k, v, **given)

    def stored(name: str, x: Tensor) -> Tensor:
        # a state holds vectors as matrices of one row
        return x.squeeze(-2) if weights[name].dim() == 2 and x.dim() == 4 else x

    momenta = {f"{name}.momentum": stored(name, x) for name, x in state.momentum.items()}
    return output, {name: stored(name, x) for name, x in state.weights.items()} | momenta


# linear recurrences


def recurrence(make: Callable[[], InnerLoop], x: Operands, settings: Operands, **options: Any) -> Outcome:
    """`beta` is the rate, `decay` the gate."""
    given = {"lr": x["beta"]} if "beta" in x else {}
    given |= {"retention": x["decay"]} if "decay" in x else {}
    return ran(make(), {"out": x["state"]}, x["q"], x["k"], x["v"], **given, **options)


def delta_product(make: Callable[[], InnerLoop], x: Operands, settings: Operands, **options: Any) -> Outcome:
    """The number of writes is that of keys for a query."""

    def product() -> InnerLoop:
        return make().replace(writes=x["k"].shape[1] // x["q"].shape[1], **({} if "decay" in x else {"retention": False}))

    return recurrence(product, x, settings, **options)


def gdn2(make: Callable[[], InnerLoop], x: Operands, settings: Operands, **options: Any) -> Outcome:
    given = {"retention": x["decay"], "erase": x["erase"] * x["k"]}
    return ran(make(), {"out": x["state"]}, x["q"], x["k"], x["write"] * x["v"], **given, **options)


def comba(make: Callable[[], InnerLoop], x: Operands, settings: Operands, **options: Any) -> Outcome:
    given = {"lr": x["beta"], "retention": x["decay"], "erase": x["p"]}
    return ran(make(), {"out": x["state"]}, x["q"], x["k"], x["v"], **given, **options)


def rwkv7(make: Callable[[], InnerLoop], x: Operands, settings: Operands, **options: Any) -> Outcome:
    """Two writes: what `r o x` takes away from where r reads, then the key and value, which take nothing away."""

    def pairs(first: Tensor, second: Tensor) -> Tensor:
        return torch.stack((first, second), dim=2).flatten(1, 2)

    k, v, removal = x["k"], x["v"], x["removal"]
    keys, values = pairs(removal * x["rate"], k), pairs(torch.zeros_like(v), v)
    given = {"retention": x["decay"], "erase": pairs(removal, torch.zeros_like(k))}
    return ran(make(), {"out": x["state"]}, x["q"], keys, values, **given, **options)


def preconditioned(make: Callable[[], InnerLoop], x: Operands, settings: Operands, **options: Any) -> Outcome:
    """Gated DeltaNet that reads where it erases at the key, and writes at the key times P."""
    given = {"lr": x["beta"], "retention": x["decay"], "erase": x["k"]}
    return ran(make().replace(erase=True), {"out": x["state"]}, x["q"], x["scale"] * x["k"], x["v"], **given, **options)


def momentum_delta(make: Callable[[], InnerLoop], x: Operands, settings: Operands, **options: Any) -> Outcome:
    """Comba with momentum and a rate for each step."""
    names = {"lr": "lr", "retention": "decay", "erase": "p", "momentum": "momentum", "step_rate": "step_rate"}
    spec = make().replace(momentum=True, step_rate=True)
    given = {argument: x[name] for argument, name in names.items()}
    return ran(spec, {"out": x["state"]}, x["q"], x["k"], x["v"], **given, **options)


# TTT, Titans, Atlas


def ttt(make: Callable[[], InnerLoop], x: Operands, settings: Operands, **options: Any) -> Outcome:
    spec = make()
    renamed = {name: BIAS.format(name.removesuffix("_bias")) if name.endswith("_bias") else name for name in x["weights"]}
    weights = {renamed[name]: w for name, w in x["weights"].items()} | {GAMMA: x["ln_weight"], BETA: x["ln_bias"]}
    output, state = ran(spec, weights, x["q"], x["k"], x["v"], lr=x["lr"], read_rate=x["reader"], **options)
    return output, {ours: state[name] for ours, name in renamed.items() if state}


def network(settings: Operands) -> Linear | MLP:
    predict = settings["predict"]
    return Linear() if predict is loops.linear else MLP(activation="silu" if predict is loops.SILU else "gelu")


def titans(make: Callable[[], InnerLoop], x: Operands, settings: Operands, **options: Any) -> Outcome:
    """Their loss has no 1/2, and alpha is what is lost."""
    spec = make().replace(network=network(settings), refresh=settings["batch"])
    given = {"lr": 2 * x["theta"], "momentum": x["eta"], "retention": 1 - x["alpha"]}
    output, state = ran(spec, x["weights"], x["q"], x["k"], x["v"], **given, **options)
    # tokens of a batch that is not complete wait in the state, where the loop's has them in already
    return output, {} if x["q"].shape[1] % settings["batch"] else state


def titans_pytorch(make: Callable[[], InnerLoop], x: Operands, settings: Operands, **options: Any) -> Outcome:
    """Their loss is a mean without 1/2; token t reads what token t + 1 of a "past" reads, so a token is put in front of
    queries.
    """
    chunk, batch = settings["chunk"], settings["batch"]
    head = "gamma" in x["weights"]
    inner: Any = MLP(activation="gelu")
    if head:
        inner = inner.replace(head=kvbind.LayerNormHead(residual=True, where="both", eps=1e-5, fast=True))
    spec = make().replace(network=inner, chunk=chunk, refresh="call" if batch is None else batch, visibility="past")
    if "window" in settings:
        spec = spec.replace(window=kvbind.Window(settings["window"], on="update"))
    assert x["q"].shape[1] % chunk != chunk - 1, "the token that is added would complete a chunk"

    def longer(y: Tensor, front: bool = False) -> Tensor:
        blank = torch.zeros_like(y[:, :1])
        return torch.cat((blank, y) if front else (y, blank), dim=1)

    def by_token(y: Tensor) -> Tensor:
        every = y.repeat_interleave(chunk, dim=1)
        return torch.cat((every, every.new_ones(y.shape[0], x["q"].shape[1] + 1 - every.shape[1], y.shape[2])), dim=1)

    given = {"lr": longer(2 / x["v"].shape[3] * x["lr"])}
    given |= {"momentum": by_token(x["momentum"]), "retention": by_token(1 - x["decay"])}
    q, k, v = longer(x["q"], front=True), longer(x["k"]), longer(x["v"])
    output, state = ran(spec, x["weights"], q, k, v, **given, **options)
    return output[:, 1:], state


def atlas(make: Callable[[], InnerLoop], x: Operands, settings: Operands, **options: Any) -> Outcome:
    """phi is the layer's."""
    spec = make().replace(
        network=network(settings),
        refresh=settings["batch"],
        window=settings["window"],
        orthogonalize=MUON,
        visibility="token",
    )
    q, k = (loops.monomials(x[name], x["coefficients"]) for name in "qk")
    given = {"lr": 2 * x["gamma"], "momentum": x["theta"], "step_rate": x["eta"], "retention": x["alpha"]}
    return ran(spec, x["weights"], q, k, x["v"], **given, **options)


# LaCT and its descendants


def lact_video(make: Callable[[], InnerLoop], x: Operands, settings: Operands, **options: Any) -> Outcome:
    """Tokens that do not write are put in front, so that the first ones, which read the starting weights, fill a block."""
    block, clean = settings["block"], settings["clean"]
    spec = make().replace(chunk=block, orthogonalize=MUON if settings.get("orthogonalize") else None)

    def padded(y: Tensor) -> Tensor:
        return torch.cat((y.new_zeros(y.shape[0], clean, *y.shape[2:]), y), dim=1)

    place = torch.arange(x["q"].shape[1] + clean)
    writes = (place >= block) & (place % block < clean)
    rates = {name: padded(y) for name, y in x["lr"].items()}
    q, k, v = (padded(x[name]) for name in "qkv")
    output, state = ran(spec, x["weights"], q, k, v, lr=rates, update_tokens=writes, **options)
    return output[:, clean:], state


def zipmap(make: Callable[[], InnerLoop], x: Operands, settings: Operands, **options: Any) -> Outcome:
    window = settings.get("window")
    spec = make().replace(orthogonalize=MUON, **({"visibility": "chunk", "chunk": window} if window else {}))
    return ran(spec, x["weights"], x["q"], x["k"], x["v"], lr=dict(x["lr"]), **options)


def tttlrm(make: Callable[[], InnerLoop], x: Operands, settings: Operands, **options: Any) -> Outcome:
    spec = make().replace(orthogonalize=MUON, chunk=settings["chunk"])
    if "strength" in settings:
        peak = "batch" if settings["joint"] else "head"
        spec = spec.replace(
            anchor=kvbind.Anchor(
                importance="square", weight="rest", follow=0.8, strength=settings["strength"], peak=peak,
                detach=("importance", "follow"),
            )
        )  # fmt: skip
    return ran(spec, x["weights"], x["q"], x["k"], x["v"], lr=dict(x["lr"]), **options)


def elastic(make: Callable[[], InnerLoop], x: Operands, settings: Operands, **options: Any) -> Outcome:
    follow = {"fixed": 1.0, "copy": 0.0, "average": 0.5}[settings["anchor"]]
    importance = {"update": "absolute", "squared": "square", "path": "drift"}[settings["importance"]]
    spec = make()
    anchor = spec.anchor.replace(importance=importance, follow=follow, start=0.0)
    spec = spec.replace(orthogonalize=MUON, chunk=settings["chunk"], visibility=settings["sees"], anchor=anchor)
    return ran(spec, x["weights"], x["q"], x["k"], x["v"], lr=dict(x["lr"]), **options)


def in_place_ttt(make: Callable[[], InnerLoop], x: Operands, settings: Operands, **options: Any) -> Outcome:
    """The MLP's input is query and key."""
    spec = make().replace(chunk=settings["chunk"])
    return ran(spec, x["weights"], x["x"], x["x"], x["v"], lr=settings["lr"], **options)


FIELDS = ("refresh", "erase", "writes", "read_rate", "step_rate", "window", "anchor", "detach_norms")
"""The fields that came with the systems; where one is missing, names that were there before mean something else."""

ADAPTERS = {
    "ttt_linear": Adapter("ttt_linear", ttt, FIELDS),
    "ttt_mlp": Adapter("ttt_mlp", ttt, FIELDS),
    "titans": Adapter("titans", titans, FIELDS),
    "titans/titans-pytorch": Adapter("titans", titans_pytorch, FIELDS),
    "atlas": Adapter("atlas", atlas, FIELDS),
    "simple_gla": Adapter("simple_gla", recurrence),
    "retnet": Adapter("retnet", recurrence),
    "mamba2": Adapter("mamba2", recurrence),
    "gla": Adapter("gla", recurrence),
    "delta_net": Adapter("delta_net", recurrence),
    "gated_delta_net": Adapter("gated_delta_net", recurrence, FIELDS),
    "delta_product": Adapter("delta_product", delta_product),
    "kda": Adapter("kda", recurrence),
    "gdn2": Adapter("gdn2", gdn2),
    "comba": Adapter("comba", comba),
    "rwkv7": Adapter("rwkv7", rwkv7),
    "preconditioned": Adapter("gated_delta_net", preconditioned, FIELDS),
    "momentum_delta_rule": Adapter("comba", momentum_delta),
    "lact_video": Adapter("lact_video", lact_video),
    "zipmap": Adapter("zipmap", zipmap),
    "tttlrm": Adapter("tttlrm", tttlrm),
    "elastic_lact": Adapter("elastic_lact", elastic),
    "in_place_ttt": Adapter("in_place_ttt", in_place_ttt),
}
"""By the name of a system in `loops.SYSTEMS`, or what it starts with."""


def adapter(system: loops.System) -> Adapter:
    """The one whose name is the longest start of the system's."""
    fitting = [name for name in ADAPTERS if system.name == name or system.name.startswith((f"{name}/", f"{name},"))]
    return ADAPTERS[max(fitting, key=len)]
