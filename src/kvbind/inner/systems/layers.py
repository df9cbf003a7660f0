"""What published systems put around their inner loop, as `Projections` by the system's name.

From the papers, and where these leave it open from fla-org/flash-linear-attention@bc3b101 `fla/layers/` ("fla") and the
authors' code. Not taken over are grouped values, block structure (the language model has its own MLP behind every mixer)
and initializations of projections, which are the model's. A system that is not here has no layer of its own: its inner loop
runs in the LaCT layer.
"""

from __future__ import annotations

from kvbind.inner.projections import Bounded, Constant, Decay, Learned, PerHead, Place, Projections, Sigmoid, Step

_LINEAR = Projections(start="zero", l2=False, scale=True, rate=Constant())
"""A linear recurrence: the state starts at zero, queries are divided by the root of their width, every write counts 1."""

_DELTA = Projections(start="zero", scale=True, conv=4, rate=Sigmoid(bias=False))
"""The delta rules of fla: silu and a convolution on q, k and v, L2-normed queries and keys, `beta = sig(W x)`."""

_TTT = Projections(
    tied=True,
    conv=4,
    conv_on=("q", "k"),
    conv_bias=True,
    activation="none",
    l2=False,
    rotary="span",
    start_std=0.02,
    rate=Sigmoid(over_width=True),
    read_rate=Place(),
    output_norm="layer",
    output_eps=1e-6,
    output_gate="gelu_tanh",
)
"""2407.04620; test-time-training/ttt-lm-pytorch@cd831db `ttt.py`, with the shared projection of its scripts. Rotary pairs
are the halves of a head here and neighbours there, one order of the channels of learned projections."""

_MEMORY = Projections(conv=4, rate=Sigmoid(scale=2.0, over_width=True), momentum=Sigmoid(), output_gate="silu")
"""2501.00663, section 4.4 (silu, convolutions and L2 norms on q, k and v; norm and gate on the output), with the rates of
lucidrains/titans-pytorch@cc016eb, `2/D sig()`. That retention starts near 1 is this library's."""

PROJECTIONS: dict[str, Projections] = {
    # 2307.08621; fla multiscale_retention.py: rotary positions, values twice as wide
    "retnet": _LINEAR.replace(
        activation="none", rotary="sequence", value_width=2.0, retention=PerHead(), output_gate="silu"
    ),
    # fla simple_gla.py: sig(W x + b)^(1/16) per head
    "simple_gla": _LINEAR.replace(conv=4, retention=Sigmoid(power=1 / 16), output_gate="silu"),
    # 2312.06635; fla gla.py: keys half as wide, sig() of a product of rank 16 per channel, to the power 1/16
    "gla": _LINEAR.replace(activation="none", key_width=0.5, retention=Sigmoid(rank=16, power=1 / 16), output_gate="silu"),
    # 2405.21060; fla mamba2.py: one B and C for all heads, written and forgotten by one step, skip D x, gate before the norm
    "mamba2": _LINEAR.replace(
        scale=False,
        conv=4,
        conv_bias=True,
        value_width=2.0,
        shared_keys=True,
        retention=Decay(rate=(1.0, 16.0)),
        write_gate=Step(),
        skip="value",
        output_norm="rms_all",
        output_gate="silu",
        gate_first=True,
    ),
    # 2406.06484; fla delta_net.py
    "delta_net": _DELTA,
    # 2412.06464; fla gated_deltanet.py: values twice as wide
    "gated_delta_net": _DELTA.replace(value_width=2.0, retention=Decay(), output_gate="silu"),
    # 2502.10297; fla gated_deltaproduct.py: beta up to 2
    "delta_product": _DELTA.replace(
        value_width=2.0, rate=Sigmoid(scale=2.0, bias=False), retention=Decay(), output_gate="silu"
    ),
    # 2510.26692; fla kda.py: decays and output gate by products of a head's rank
    "kda": _DELTA.replace(
        retention=Decay(rank="head", rate=(1.0, 16.0)), output_gate="sigmoid", gate_rank="head", gate_bias=True
    ),
    # 2605.22791; fla gdn2.py: erase and write gates per channel, rate 1
    "gdn2": _DELTA.replace(
        rate=Constant(),
        retention=Decay(rank="head", rate=(1.0, 16.0)),
        erase=Sigmoid(bias=False),
        write_gate=Sigmoid(bias=False),
        output_gate="sigmoid",
        gate_rank="head",
        gate_bias=True,
    ),
    # 2506.02475; fla comba.py: p = sig(d) k, queries q - D p. There p is L2-normed again, and d acts in the queries alone
    "comba": _DELTA.replace(value_width=2.0, retention=Decay(), erase=Learned(), correction=True, output_gate="sigmoid"),
    # 2503.14456; fla rwkv7.py with its ranks at a width of 768; values are not mixed with those of the first layer
    "rwkv7": Projections(
        start="zero",
        activation="none",
        l2=False,
        shift=True,
        rate=Constant(),
        retention=Bounded(rank=64, between="tanh"),
        removal=Sigmoid(rank=64),
        skip="bonus",
        output_norm="group",
        output_gate="linear",
        gate_rank=128,
        gate_between="sigmoid",
    ),
    "ttt_linear": _TTT,
    # rates of an MLP are a tenth
    "ttt_mlp": _TTT.replace(rate=Sigmoid(scale=0.1, over_width=True)),
    "titans": _MEMORY,
    # 2505.23735: powers of keys and queries with learned coefficients, here elementwise (the paper's are all monomials)
    "atlas": _MEMORY.replace(powers=2, step_rate=Sigmoid()),
}
"""By the names of `kvbind.inner.systems.SYSTEMS`."""
