"""The loops of `loops.py` beside other people's code, where its packages are installed.

Code that computes in float32 whatever it is given is lifted to float64 (`comparing.InDouble`), so that rounding hides
nothing. Left out, as they are no oracles: `fla.ops.comba.naive.naive_recurrent_comba`, which decays before the read where
the package's chunk form and kernels decay after; the gradient through LayerNorm in `fla.ops.titans.naive`, which lacks a
parenthesis (the rest of that function is held, with the gradient as it is there).
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import loops
import torch
import torch.nn.functional as F
from comparing import InDouble, Run
from loops import B, Draw, H, Source, T
from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """One loop beside one function.

    Attributes:
        name: of the loop's system.
        package: that has the function, as its distribution is called.
        function: with its module.
        ours: the loop.
        theirs: the function, imported where it is called.
        draw: operands of both.
        note: what a reader must know.
    """

    name: str
    package: str
    function: str
    ours: Run
    theirs: Run
    draw: Draw
    note: str = ""

    def missing(self) -> str:
        """Why it cannot run here; empty where it can."""
        return absent(self.package, self.function)


@cache
def absent(package: str, function: str) -> str:
    """Why a function cannot be called here; empty where it can."""
    try:
        version(package)
    except PackageNotFoundError:
        return f"{package} is not installed"
    try:
        load(function)
    except ImportError as error:
        return f"{package} {version(package)} cannot be imported: {error}"
    except AttributeError:
        return f"{package} {version(package)} has no {function}"
    return ""


def load(function: str) -> Any:
    module, _, name = function.rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Triton on a machine without a GPU
        found = getattr(importlib.import_module(module), name)
    # transformers puts another package's kernels in front of its own functions
    return inspect.unwrap(found)


def by_loop(loop: Callable[..., Any], **settings: Any) -> Run:
    return lambda x: loop(**x, **settings)


def states(state: Tensor, like: Tensor) -> Tensor:
    """Starting states `[H, ...]` as `[B, H, ...]`, in memory of their own."""
    return state.expand(like.shape[0], *state.shape).clone()


# flash-linear-attention and transformers: linear recurrences


def recurrence(function: str, call: Callable[[Any, Mapping[str, Tensor]], tuple[Tensor, Tensor]]) -> Run:
    def run(x: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        with InDouble():
            output, state = call(load(function), x)
        return output, {"out": state}

    return run


def tokens_first(function: str, *names: str, scaled: bool = True, **more: Any) -> Run:
    """Functions on `[B, T, H, D]` whose arguments are q, k, v and operands of these names, `decay` as a log gate `g`.

    Where they take no scale they multiply queries by `Dk^-1/2`, which is undone.
    """

    def call(f: Any, x: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        given = {argument: x[name].log() if name == "decay" else x[name] for name, argument in map(split, names)}
        start = {"initial_state": states(x["state"], x["q"]), "output_final_state": True}
        scale = {"scale": 1.0} if scaled else {}
        q = x["q"] if scaled else x["q"] * x["q"].shape[-1] ** 0.5
        return f(q, x["k"], x["v"], **given, **start, **scale, **more)

    return recurrence(function, call)


def split(name: str) -> tuple[str, str]:
    """`operand=argument`, or one name for both; the argument of `decay` is g."""
    operand, _, argument = name.partition("=")
    return operand, argument or {"decay": "g"}.get(operand, operand)


def heads_first(function: str, *names: str, **more: Any) -> Run:
    """Functions on `[B, H, T, D]`, which multiply queries by `Dk^-1/2`; positional arguments q, k, v and these operands."""

    def call(f: Any, x: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        given = [x[name].transpose(1, 2) for name in ("k", "v", *names)]
        q = x["q"].transpose(1, 2) * x["q"].shape[-1] ** 0.5
        output, state = f(q, *given, **({"initial_state": states(x["state"], x["q"])} if "state" in x else {}), **more)
        return output.transpose(1, 2), state

    return recurrence(function, call)


def retention(x: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    with InDouble():
        q, k, v = (x[name].transpose(1, 2) for name in "qkv")
        output = load("fla.ops.retention.naive.naive_retention")(q * q.shape[-1] ** 0.5, k, v)
    return output.transpose(1, 2), {}


def by_retnet(x: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    q = x["q"]
    gates = loops.retention_of_retnet(q.shape[2]).expand(q.shape[:3])
    return loops.gated_linear_attention(
        torch.zeros(q.shape[2], q.shape[3], x["v"].shape[3], dtype=q.dtype), **x, decay=gates
    )


def without_state(draw: Draw) -> Draw:
    return lambda source: {name: x for name, x in draw(source).items() if name != "state"}


def from_zero(loop: Callable[..., Any]) -> Run:
    """A recurrence whose state starts at zero."""
    return lambda x: loop(torch.zeros(H, x["k"].shape[3], x["v"].shape[3], dtype=x["k"].dtype), **x)


def dplr(function: str, **more: Any) -> Run:
    """RWKV-7 as the general rule `S = a o S + k^T v + y^T (x S)`."""
    f = heads_first(function, "x", "y", "log", **more)

    def run(x: Mapping[str, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        removal = x["removal"]
        return f({**x, "x": -removal, "y": removal * x["rate"], "log": x["decay"].log()})

    return run


def mamba2(x: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """transformers' scan, one group per head: `A dt` are the log gates, values `dt x`, keys B, queries C."""
    with InDouble():
        scan = load("transformers.models.mamba2.modeling_mamba2.mamba2_chunk_scan")
        rates = torch.tensor([-0.7, -1.3], dtype=torch.float64)
        dt = x["decay"].log() / rates
        start = states(x["state"], x["q"]).mT
        output, state = scan(
            x["v"] / dt[..., None], dt, rates, x["k"], x["q"], chunk_size=8, initial_states=start, return_final_states=True
        )
    return output, {"out": state.mT}


def draw_mamba2(source: Source) -> dict[str, Any]:
    found = loops.draw_recurrence(T, beta=False)(source)
    return {**found, "decay": source.between(0.5, 0.95, B, T, H)}


def preconditioned(x: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    f = load("fla.ops.precond_gated_delta_rule.naive.naive_recurrent_precond_gated_delta_rule")
    with InDouble():
        output, state, _ = f(
            **{name: x[name] for name in "qkv"}, g_atk=x["log_a"], g=x["decay"].log(), beta_atk=x["beta_a"], beta=x["beta"],
            scale=1.0, initial_state=states(x["state"], x["q"]), output_final_state=True,
        )  # fmt: skip
    return output, {"out": state}


def by_preconditioned(x: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The preconditioner is the layer's: `A = e^g A + b k^2`, `P = 1.5^(-s)`, `s = r / (1 + |r|)`, `r = log(A + 1e-6) +
    0.2`.
    """
    k, total, scales = F.normalize(x["k"], dim=-1), 0.0, []
    for t in range(k.shape[1]):
        total = x["log_a"][:, t, :, None].exp() * total + x["beta_a"][:, t, :, None] * k[:, t].square()
        r = (total + 1e-6).log() + 0.2
        scales.append(1.5 ** (-r / (1 + r.abs())))
    operands = {name: x[name] for name in ("state", "v", "beta", "decay")}
    q = F.normalize(x["q"], dim=-1)
    return loops.preconditioned_delta_rule(**operands, q=q, k=k, scale=torch.stack(scales, dim=1))


draw_preconditioner = loops.draw_more(
    loops.draw_recurrence(T),
    lambda source, _: {"log_a": source.between(-1.0, 0.0, B, T, H), "beta_a": source.between(0.0, 1.0, B, T, H)},
)


def momentum_delta(function: str, **more: Any) -> Run:
    def run(x: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        start = states(x["state"], x["q"])
        given = {"p": x["p"], "log_alpha": x["decay"].log(), "log_mu": x["momentum"].log()}
        given |= {"beta": x["step_rate"], "eta": x["lr"]}
        with InDouble():
            output, both = load(function)(
                **{name: x[name] for name in "qkv"}, **given, scale=1.0, initial_S=start, output_final_state=True, **more
            )
        # their momentum has the gradient's sign
        return output, {"out": both[0], "out.momentum": -both[1]}

    return run


# flash-linear-attention: TTT and Titans


def fla_ttt(x: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Queries are scaled in place."""
    with InDouble():
        output, state, bias = load("fla.ops.ttt.naive.chunk_ttt_linear_ref")(
            x["q"].clone(), x["k"], x["v"], x["ln_weight"], x["ln_bias"], x["reader"][..., None], scale=1.0,
            initial_state=states(x["weights"]["out"], x["q"]),
            initial_state_bias=states(x["weights"]["out_bias"][:, None], x["q"]), output_final_state=True,
        )  # fmt: skip
    return output, {"out": state, "out_bias": bias.squeeze(2)}


def by_fla_ttt(x: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    return loops.ttt(**x, lr=torch.ones_like(x["reader"]), predict=loops.biased_linear, residual="prediction")


def draw_fla_ttt(source: Source) -> dict[str, Any]:
    return {name: x for name, x in loops.draw_ttt(48, None)(source).items() if name != "lr"}


def fla_titans(x: Mapping[str, Any], *, use_chunk: bool) -> tuple[Tensor, dict[str, Tensor]]:
    with InDouble():
        gates = {name: x[name][..., None] for name in ("theta", "alpha", "eta")}
        output, state = load("fla.ops.titans.naive.chunk_titans_linear_ref")(
            x["q"], x["k"], x["v"], x["ln_weight"], x["ln_bias"], **gates, chunk_size=8,
            initial_state=states(x["weights"]["out"], x["q"]), output_final_state=True, use_chunk=use_chunk,
        )  # fmt: skip
    return output, {"out": state}


def by_fla_titans(x: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loop with the gradient as it stands in that code: two of LayerNorm's three terms are divided by s D."""
    gamma, beta = x["ln_weight"][:, None], x["ln_bias"][:, None]

    def normed(z: Tensor) -> tuple[Tensor, Tensor]:
        s = (z.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return (z - z.mean(-1, keepdim=True)) / s, s

    def step(w: Mapping[str, Tensor], k: Tensor, v: Tensor) -> dict[str, Tensor]:
        hat, s = normed(k @ w["out"])
        g, d = (gamma * hat + beta - (v - k)) * gamma, k.shape[-1]
        wrong = d * g - (g.sum(-1, keepdim=True) + hat * (g * hat).sum(-1, keepdim=True)) / (s * d)
        return {"out": -k.mT @ wrong}

    def read(z: Tensor) -> Tensor:
        return z + normed(z)[0] * gamma + beta

    given = {name: x[name] for name in ("weights", "q", "k", "v", "eta", "alpha")}
    return loops.titans(**given, theta=2 * x["theta"], predict=loops.linear, batch=8, step=step, read=read)


def draw_fla_titans(source: Source) -> dict[str, Any]:
    found = loops.draw_titans(24, None)(source)
    found["weights"] = {"out": 0.2 * found["weights"]["out"]}
    # as small as keeps a loop that is not a gradient's from growing without bounds
    found["theta"] = 0.1 * found["theta"]
    return found | {"ln_weight": 1 + 0.2 * source.normal(H, loops.D), "ln_bias": 0.2 * source.normal(H, loops.D)}


# titans-pytorch


@dataclass(frozen=True)
class Memory:
    """A layer of titans-pytorch, or of what grew out of it, and the loop between the same projections.

    Attributes:
        tokens: of the sequences.
        chunk: of the layer.
        batch: of the layer.
        head: the residual and the LayerNorm with a fast gamma around the memory.
        orthogonalize: the layer's `spectral_norm_surprises`.
        window: of chunks whose updates are summed.
        paper: hold it against the loop of the paper, and not that of the package; of chunks of 1.
        make: the layer's class, and what it takes beside.
    """

    tokens: int
    chunk: int
    batch: int | None
    head: bool
    orthogonalize: bool = False
    window: int = 1
    paper: bool = False
    make: Callable[..., torch.nn.Module] | None = None

    @property
    def names(self) -> dict[str, str]:
        """The layer's name of each fast matrix."""
        prefix = "model." if self.head else ""
        return {"in": f"{prefix}weights.0", "out": f"{prefix}weights.1"} | ({"gamma": "norm.gamma"} if self.head else {})

    @cache  # noqa: B019, as there are few
    def layer(self) -> torch.nn.Module:
        """A layer of two heads; its parameters are drawn anew for each comparison."""
        made = (self.make or load("titans_pytorch.NeuralMemory"))(
            dim=8, dim_head=loops.D, heads=H, chunk_size=self.chunk, batch_size=self.batch, use_accelerated_scan=False,
            mem_model_norm_add_residual=self.head, spectral_norm_surprises=self.orthogonalize,
            default_model_kwargs={"depth": 2, "expansion_factor": 2.0},
        )  # fmt: skip
        return made.double()

    def draw(self, source: Source) -> dict[str, Any]:
        parameters = {
            name: source.normal(*p.shape) * (0.3 if p.dim() < 2 or "gamma" in name else p.shape[-1] ** -0.5)
            for name, p in self.layer().named_parameters()
            if not name.startswith("memory_model.")
        }
        return {"x": source.normal(B, self.tokens, 8), "parameters": parameters}

    def theirs(self, x: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        output, after = torch.func.functional_call(self.layer(), dict(x["parameters"]), (x["x"],))
        weights, momenta = after.states
        found = {}
        for name, theirs in self.names.items():
            for key, value in ((name, weights[theirs]), (f"{name}.momentum", momenta[theirs][0])):
                found[key] = value.unflatten(0, (B, H))
        return output, found

    def ours(self, x: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        p, x, n = x["parameters"], x["x"], self.tokens // self.chunk
        written = F.rms_norm(x, x.shape[-1:], p["store_norm.weight"])
        asked = F.rms_norm(x, x.shape[-1:], p["retrieve_norm.weight"])
        mean = written[:, : n * self.chunk].unflatten(1, (n, self.chunk)).mean(2)

        def affine(name: str, y: Tensor) -> Tensor:
            return torch.sigmoid(F.linear(y, p[f"{name}.0.weight"], p[f"{name}.0.bias"]))

        def heads(name: str, y: Tensor) -> Tensor:
            return F.linear(y, p[f"{name}.weight"]).unflatten(-1, (H, loops.D))

        q, k, v = heads("to_queries", asked), heads("to_keys", written), heads("to_values", written)
        lr, momentum, decay = (
            affine("to_adaptive_step", written),
            affine("to_momentum", mean),
            affine("to_decay_factor", mean),
        )
        weights = {name: p[f"memory_model_parameters.{i}"] for name, i in self.order().items()}
        predict = loops.fast_norm(loops.GELU) if self.head else loops.GELU
        if self.paper:
            output, state = loops.titans(
                weights, q, k, v, theta=lr / loops.D, eta=momentum, alpha=decay, predict=predict, batch=self.batch
            )
        else:
            output, state = loops.titans_pytorch(
                weights, q, k, v, lr, momentum, decay, predict=predict, chunk=self.chunk, batch=self.batch,
                orthogonalize=self.orthogonalize, window=self.window,
            )  # fmt: skip
        output = output * torch.sigmoid(F.linear(asked, p["retrieve_gate.0.weight"]))[..., None]
        return F.linear(output.flatten(2), p["combine_heads.weight"]), state

    def order(self) -> dict[str, int]:
        """The place of each fast matrix among the layer's parameters."""
        names = self.layer().memory_model_parameter_names
        return {name: names.index(theirs) for name, theirs in self.names.items()}

    def comparison(self, name: str, note: str) -> Comparison:
        return Comparison(name, "titans-pytorch", "titans_pytorch.NeuralMemory", self.ours, self.theirs, self.draw, note)


# all of them

FLA = "fla-core"


def linear(
    name: str, module: str, function: str, run: Callable[..., Run], *arguments: Any, note: str = "", **more: Any
) -> Comparison:
    """A system of `loops.SYSTEMS` beside a function on the same operands."""
    system = next(s for s in loops.SYSTEMS if s.name == name)
    path = f"{module}.{function}"
    package = "transformers" if module.startswith("transformers") else FLA
    return Comparison(name, package, path, system.run, run(path, *arguments, **more), system.draw, note)


QWEN = "transformers.models.qwen3_next.modeling_qwen3_next"
KIMI = "transformers.models.kimi_linear.modeling_kimi_linear"
MAMBA = "transformers.models.mamba2.modeling_mamba2"
MOMENTUM = "fla.ops.momentum_delta_rule.naive"

COMPARISONS = [
    Comparison(
        "ttt_linear",
        FLA,
        "fla.ops.ttt.naive.chunk_ttt_linear_ref",
        by_fla_ttt,
        fla_ttt,
        draw_fla_ttt,
        "its eta is the reader's rate, the writer's is 1; it reads z + LN(z)",
    ),
    *(
        Comparison(
            "titans/linear",
            FLA,
            f"fla.ops.titans.naive.{function}",
            by_fla_titans,
            partial(fla_titans, use_chunk=chunked),
            draw_fla_titans,
            "with the gradient as it is coded there, which is not the loss's",
        )
        for function, chunked in (("titans_linear", False), ("chunk_titans_linear", True))
    ),
    Memory(14, 1, 4, head=False, paper=True).comparison(
        "titans/MLP, batch 1", "chunks of 1, which is the paper's rule; batches of 4 tokens"
    ),
    Memory(26, 4, 8, head=True).comparison(
        "titans/titans-pytorch, batch of two chunks", "chunk 4, batch 8, residual and LayerNorm"
    ),
    Memory(26, 4, None, head=False).comparison(
        "titans/titans-pytorch, no batch, no head", "chunk 4, gradients at the call's first weights"
    ),
    Memory(26, 4, 4, head=True, orthogonalize=True).comparison(
        "titans/titans-pytorch, batch of two chunks", "chunk 4, batch 4, spectral_norm_surprises"
    ),
    linear("simple_gla", "fla.ops.simple_gla.naive", "naive_recurrent_simple_gla", tokens_first, "decay"),
    linear("simple_gla", "fla.ops.simple_gla.naive", "naive_chunk_simple_gla", tokens_first, "decay", chunk_size=8),
    Comparison(
        "retnet",
        FLA,
        "fla.ops.retention.naive.naive_retention",
        by_retnet,
        retention,
        lambda source: source.qkv(T),
        "constant gates 1 - 2^(-5-h)",
    ),
    Comparison(
        "mamba2",
        "transformers",
        f"{MAMBA}.mamba2_chunk_scan",
        by_loop(loops.gated_linear_attention),
        mamba2,
        draw_mamba2,
        "values dt x, log gates A dt",
    ),
    linear("gla", "fla.ops.gla.naive", "naive_recurrent_gla", tokens_first, "decay=gk", scaled=False),
    linear("delta_net", "fla.ops.delta_rule.naive", "delta_rule_recurrence", heads_first, "beta"),
    Comparison(
        "delta_net",
        FLA,
        "fla.ops.delta_rule.naive.delta_rule_chunkwise",
        from_zero(loops.delta_rule),
        heads_first("fla.ops.delta_rule.naive.delta_rule_chunkwise", "beta", chunk_size=7),
        without_state(loops.draw_recurrence(T, decay=False)),
    ),
    linear(
        "gated_delta_net",
        "fla.ops.gated_delta_rule.naive",
        "naive_recurrent_gated_delta_rule",
        tokens_first,
        "beta",
        "decay",
    ),
    linear(
        "gated_delta_net",
        "fla.ops.gated_delta_rule.naive",
        "naive_chunk_gated_delta_rule",
        tokens_first,
        "beta",
        "decay",
        chunk_size=8,
    ),
    linear("gated_delta_net", QWEN, "torch_recurrent_gated_delta_rule", tokens_first, "beta", "decay", scaled=False),
    linear(
        "gated_delta_net", QWEN, "torch_chunk_gated_delta_rule", tokens_first, "beta", "decay", scaled=False, chunk_size=8
    ),
    linear(
        "delta_product",
        "fla.ops.gated_delta_product.naive",
        "naive_recurrent_gated_delta_product",
        tokens_first,
        "beta",
        "decay",
        num_householder=2,
    ),
    linear(
        "delta_product/no decay",
        "fla.ops.gated_delta_product.naive",
        "naive_recurrent_gated_delta_product",
        tokens_first,
        "beta",
        num_householder=3,
        g=None,
    ),
    linear("kda", "fla.ops.kda.naive", "naive_recurrent_kda", tokens_first, "beta", "decay"),
    linear("kda", "fla.ops.kda.naive", "naive_chunk_kda", tokens_first, "beta", "decay", chunk_size=7),
    linear("kda", KIMI, "recurrent_kimi_delta_attention", tokens_first, "beta", "decay", scaled=False),
    linear("kda", KIMI, "chunk_kimi_delta_attention", tokens_first, "beta", "decay", scaled=False, chunk_size=8),
    linear("gdn2", "fla.ops.gdn2.naive", "naive_recurrent_gdn2", tokens_first, "decay", "erase=b", "write=w"),
    linear("gdn2", "fla.ops.gdn2.naive", "naive_chunk_gdn2", tokens_first, "decay", "erase=b", "write=w", chunk_size=8),
    linear(
        "comba",
        "fla.ops.comba.naive",
        "naive_chunk_comba",
        tokens_first,
        "p",
        "beta",
        "decay",
        chunk_size=8,
        note="its naive_recurrent_comba computes something else",
    ),
    linear("rwkv7", "fla.ops.generalized_delta_rule.dplr.naive", "dplr_recurrence", dplr),
    linear("rwkv7", "fla.ops.generalized_delta_rule.dplr.naive", "dplr_chunkwise", dplr, chunk_size=7),
    Comparison(
        "preconditioned",
        FLA,
        "fla.ops.precond_gated_delta_rule.naive.naive_recurrent_precond_gated_delta_rule",
        by_preconditioned,
        preconditioned,
        draw_preconditioner,
        "with the layer's preconditioner",
    ),
    Comparison(
        "momentum_delta_rule",
        FLA,
        f"{MOMENTUM}.recurrent_momentum_delta_rule_ref",
        by_loop(loops.momentum_delta_rule),
        momentum_delta(f"{MOMENTUM}.recurrent_momentum_delta_rule_ref"),
        loops.draw_momentum_delta,
        "its chunk form adds 1e-6 to beta",
    ),
]
"""Every loop beside what is installed of others' code."""
