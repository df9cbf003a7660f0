"""The paper's ablations by their released names: each against a loop written plainly from the specification, in float64.

Weights are drawn in the released layout, as a checkpoint of the full system has them, and loaded by name; the loops read
from them what the specification says. One row of `RULES` says what a name changes.
"""

import json
import logging
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvbind import Linear, NewtonSchulz, systems
from kvbind.inner.orthogonalize import VIEWS_COEFFICIENTS
from kvbind.models import LactConfig, LactForCausalLM, ablations, vittt
from kvbind.models.convert import convert
from kvbind.models.lact_nvs import LactNvs, LactNvsConfig

LAST, STRAIGHT = {"updated": ("w1",)}, {"updated": ("w1",), "linear": True}

RULES = {
    "dot_product": {},
    "ga_dot_product": {"ascent": True},
    "no_query_dot_product": {"key": True},
    "mse": {"squared": True},
    "only_w1": LAST,
    "only_w1_no_wn": {**LAST, "norm": False},
    "only_w1_no_wn_parallel": {**LAST, "norm": False},
    "only_w1_straight_qk": STRAIGHT,
    "only_w1_straight_qk_no_wn": {**STRAIGHT, "norm": False},
    "only_w1_straight_qk_no_lr1": {**STRAIGHT, "rates": False},
    "only_w1_straight_qk_no_lr1_no_wn": {**STRAIGHT, "norm": False, "rates": False},
    "only_w1_straight_qk_no_wn_no_lr1": {**STRAIGHT, "norm": False, "rates": False},
}
RUNG6 = {**STRAIGHT, "norm": False, "rates": False, "muon": False}
VIEWS_RULES = {name: rule for name, rule in RULES.items() if "parallel" not in name} | {
    "only_w1_straight_qk_no_lr1_no_muon": {**STRAIGHT, "rates": False, "muon": False},
    "only_w1_straight_qk_no_lr1_no_wn_muon": RUNG6,
}

SMALL = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attn_heads": 4, "num_lact_heads": 2, "vocab_size": 11,
    "lact_chunk_size": 5, "window_size": 4, "use_muon": True, "use_momentum": True, "intermediate_size": 8,
    "w0_w2_low_rank": -1, "qkv_silu": False, "ttt_nope": True,
}  # fmt: skip


def newton_schulz(g: Tensor, coefficients) -> Tensor:
    x = g / (g.norm() + 1e-7)
    for a, b, c in coefficients:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def network(x: Tensor, w: dict[str, Tensor], linear: bool) -> Tensor:
    """Rows x, matrices `[in, out]`."""
    return x @ w["w1"] if linear else (torch.nn.functional.silu(x @ w["w0"]) * (x @ w["w2"])) @ w["w1"]


def inner_loop(q, k, v, rates, gates, w, spans, coefficients, *, reads_first, ascent=False, key=False, squared=False,
               updated=("w0", "w1", "w2"), linear=False, norm=True, muon=True):  # fmt: skip
    """One head: `rates` `[T]` by matrix, `gates` `[T]` or None. Spans are read before they update, or all after the last."""
    start = {n: w[n].norm(dim=0, keepdim=True) for n in w}
    momentum, outputs, asks = dict.fromkeys(updated, 0.0), [], k if key else q
    for begin, end, whole in spans:
        if reads_first:
            outputs.append(network(asks[begin:end], w, linear))
        if not whole:
            continue
        leaves = {n: w[n].detach().clone().requires_grad_() for n in w}
        for n in updated:
            with torch.enable_grad():
                f = network(k[begin:end], leaves, linear)
                bound = -0.5 * (f - v[begin:end]).square().sum(1) if squared else (f * v[begin:end]).sum(1)
                (step,) = torch.autograd.grad((rates[n][begin:end] * bound).sum(), leaves[n])
            if gates is not None:
                step = momentum[n] = step + gates[begin:end].mean() * momentum[n]
            step = newton_schulz(step, coefficients) if muon else step
            new = w[n] - step if ascent else w[n] + step
            w = {**w, n: new / (new.norm(dim=0, keepdim=True) + 1e-5) * start[n] if norm else new}
    return torch.cat(outputs) if reads_first else network(asks, w, linear)


def softplus_rates(logits: Tensor, base: float) -> Tensor:
    return torch.log1p(torch.exp(logits + math.log(math.expm1(base))))


def drawn(shapes: dict[str, tuple[int, ...]], scale: float = 0.5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) * scale for name, shape in shapes.items()}


def language_weights(**fields):
    """As a released checkpoint has them: every ablation holds what the full system does."""
    full = {**SMALL, **fields, "ttt_loss_type": "dot_product"}
    return drawn({name: tuple(x.shape) for name, x in LactForCausalLM.from_released_config(full).state_dict().items()})


def exact(inner):
    part = inner.orthogonalize
    return inner if part is None else inner.replace(orthogonalize=part.replace(dtype=torch.float64))


def fast_output(w: dict[str, Tensor], x: Tensor, fields: dict, rule: dict) -> Tensor:
    """What the fast weights of a language layer add to attention for one sequence `[T, d]`."""
    rule, heads, (tokens, d) = dict(rule), SMALL["num_lact_heads"], x.shape
    constant = not rule.pop("rates", True)
    q, k, v = (x @ w["qkv.weight"].T).chunk(3, 1)
    q, k = ((y * w["qk_scale"][:, i] + w["qk_offset"][:, i]) for i, y in enumerate((q, k)))
    # heads outermost; in each the rates of w0, w1, w2
    logits = (x @ w["lr_proj.weight"].T + w["lr_proj.bias"]).reshape(tokens, heads, 3)
    gates = torch.sigmoid(x @ w["momentum_proj.0.weight"].T + w["momentum_proj.0.bias"]) if fields["use_momentum"] else None
    scale = torch.nn.functional.silu(x @ w["ttt_scale_proj.weight"].T + w["ttt_scale_proj.bias"])
    spans = [(i, min(i + 5, tokens), i + 5 <= tokens) for i in range(0, tokens, 5)]
    out = []
    for h in range(heads):
        part = slice(h * d // heads, (h + 1) * d // heads)
        qh, kh = (y[:, part] / (y[:, part].norm(dim=1, keepdim=True) + 1e-5) for y in (q, k))
        rates = softplus_rates(logits[:, h], 1e-3)
        y = inner_loop(
            qh, kh, v[:, part],
            {n: torch.ones(tokens, dtype=x.dtype) if constant else rates[:, i] for i, n in enumerate(("w0", "w1", "w2"))},
            None if gates is None else gates[:, h], {n: w[n][h].T for n in ("w0", "w1", "w2")}, spans,
            NewtonSchulz().coefficients, reads_first=True, muon=fields["use_muon"], **rule,
        )  # fmt: skip
        out.append(y / torch.sqrt(y.square().mean(1, keepdim=True) + 1e-5) * w["ttt_norm.weight"] * scale[:, h, None])
    return torch.cat(out, 1) @ w["o_proj.weight"].T


@pytest.mark.parametrize(("muon", "momentum"), [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("name", RULES)
def test_every_name_of_the_language_model_computes_what_the_specification_says(name, muon, momentum):
    fields = {**SMALL, "ttt_loss_type": name, "use_muon": muon, "use_momentum": momentum}
    model = LactForCausalLM.from_released_config(fields).double()
    weights = language_weights(use_momentum=momentum)
    model.load_state_dict(weights)
    layer = model.model.layers[0].attn
    layer.inner = exact(layer.inner)
    own = {n.removeprefix("model.layers.0.attn."): x for n, x in weights.items()}
    x = drawn({"x": (13, SMALL["hidden_size"])}, 1.0)["x"]
    with torch.no_grad():
        output = layer(x[None])[0][0]
        # the same layer whose fast weights add nothing
        layer.ttt_norm.weight.zero_()
        found = output - layer(x[None])[0][0]
    expected = fast_output(own, x, fields, RULES[name])
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def views_fields(name="dot_product", **params):
    fast = {"head_dim": 6, "inter_multi": 1, "base_lr": 0.01, "muon_update_steps": 3, "ttt_loss_type": name, **params}
    return {
        "patch_size": 4, "dim": 12, "layers": 1,
        "block_config": [
            {"type": "model.SelfAttention", "length_dim": "l", "params": {"head_dim": 6, "use_qk_norm": True}},
            {"type": "lact_ttt.FastWeightGluMLPMultihead", "length_dim": "vl", "params": fast},
            {"type": "model.MLP", "length_dim": "vl", "params": {"inter_multi": 2}},
        ],
    }  # fmt: skip


def views_weights(queries=True):
    shapes = {name: tuple(x.shape) for name, x in LactNvs.from_released_config(views_fields()).state_dict().items()}
    weights = drawn(shapes)
    if not queries:
        weights["blocks.0.module_list.1.f.to_qkv.weight"] = weights["blocks.0.module_list.1.f.to_qkv.weight"][12:]
    return weights


VIEWS_CASES = {name: ({"name": name}, rule) for name, rule in VIEWS_RULES.items()} | {
    "no_query": ({"no_query": True}, {"key": True}),
    "no_query, fused": ({"name": "mse", "no_query": True, "use_fused": True}, {"key": True, "squared": True}),
    "fused": ({"name": "only_w1_straight_qk", "use_fused": True, "grad_calc_method": "mannual"}, STRAIGHT),
}


@pytest.mark.parametrize("case", VIEWS_CASES)
def test_every_name_of_view_synthesis_computes_what_the_specification_says(case):
    fields, rule = VIEWS_CASES[case]
    rule, queries = dict(rule), not fields.get("no_query", False)
    model = LactNvs.from_released_config(views_fields(**fields)).double()
    weights = views_weights(queries)
    model.load_state_dict(weights)
    layer = model.mixers[0]
    layer.inner = exact(layer.inner)
    w = {n.removeprefix("blocks.0.module_list.1.f."): x for n, x in weights.items()}
    x = drawn({"x": (9, 12)}, 1.0)["x"]
    with torch.no_grad():
        found = layer(x[None], slice(0, 6))[0][0]

    constant = not rule.pop("rates", True)
    parts = torch.nn.functional.silu(x @ w["to_qkv.weight"].T).split(12, 1)
    # matrices outermost, heads inside
    rates = softplus_rates(x @ w["lr_fc.weight"].T + w["lr_fc.bias"], 0.01).reshape(9, 3, 2)
    out = []
    for h in range(2):
        own = [y[:, 6 * h : 6 * h + 6] for y in parts]
        *qk, v = own
        q, k = (y / (y.norm(dim=1, keepdim=True) + 1e-5) for y in (qk[0], qk[-1]))
        by_name = {n: torch.ones(9, dtype=x.dtype) if constant else rates[:, i, h] for i, n in enumerate(("w0", "w1", "w2"))}
        y = inner_loop(
            q, k, v, by_name, None, {n: w[n][h] for n in ("w0", "w1", "w2")}, [(0, 6, True)], VIEWS_COEFFICIENTS[:3],
            reads_first=False, **rule,
        )  # fmt: skip
        out.append(y / torch.sqrt(y.square().mean(1, keepdim=True) + 1e-5) * w["o_norm.weight"])
    expected = torch.cat(out, 1) @ w["c_proj.weight"].T
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_the_ladder_of_the_language_model_has_released_names():
    names = {
        "rung0": "dot_product", "rung1": "only_w1", "rung2": "only_w1_no_wn", "rung3": "only_w1_straight_qk_no_wn",
        "rung4": "only_w1_straight_qk_no_lr1_no_wn", "rung5": "only_w1_straight_qk_no_lr1_no_wn",
        "rung6": "only_w1_straight_qk_no_lr1_no_wn",
    }  # fmt: skip
    for rung, inner in systems.ladder(systems.lact_llm(chunk=5)).items():
        flags = {"use_momentum": inner.momentum, "use_muon": inner.orthogonalize is not None}
        assert LactConfig.from_released_config({**SMALL, **flags, "ttt_loss_type": names[rung]}).inner == inner, rung
    ladder = systems.ladder(systems.lact_nvs())
    for rung, name in (
        ("rung3", "only_w1_straight_qk_no_wn"), ("rung6", "only_w1_straight_qk_no_lr1_no_wn_muon"),
    ):  # fmt: skip
        found = LactNvsConfig.from_released_config(views_fields(name, muon_update_steps=5)).inner
        assert found == ladder[rung]


REFUSED = {
    "only_w1_momentum_one": "momentum gate is the constant 1",
    "only_w1_momentum_one_no_norm": "momentum gate is the constant 1",
    "vp**2": "squared norm of the network's output",
    "design1": "averages the losses",
    "design2": "mean of query and key",
    "unroll1": "dot_product written out",
    "simplify7": "gradient of no loss",
    "only_w1_no_lr1": r"does not run 'only_w1' with 'no_lr1'",
    "dot_product_no_wn": r"does not run 'dot_product' with 'no_wn'",
    "only_w2": r"did you mean 'only_w1'",
}


@pytest.mark.parametrize("name", REFUSED)
def test_names_that_are_not_supported_are_refused_with_the_reason(name):
    pattern = rf"ttt_loss_type.*{name.replace('*', '.')}.*{REFUSED[name]}"
    with pytest.raises(ValueError, match=pattern):
        LactConfig.from_released_config({**SMALL, "ttt_loss_type": name})
    with pytest.raises(ValueError, match=pattern):
        LactNvsConfig.from_released_config(views_fields(name))


@pytest.mark.parametrize("name", ["design1", "design2", "only_w1_straight_qk_no_muon"])
def test_names_of_vittt_that_are_not_supported_are_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=f"ttt_loss_type='{name}' is not supported: "):
        vittt.from_released_config({"embed_dim": 16, "depth": 1, "num_heads": 2, "ttt_loss_type": name})


def test_fields_under_which_the_released_code_computes_something_else_are_refused():
    with pytest.raises(ValueError, match=r"ttt_prenorm must be False with ttt_loss_type='mse'"):
        LactConfig.from_released_config({**SMALL, "ttt_loss_type": "mse", "ttt_prenorm": True})
    with pytest.raises(ValueError, match=r"inter_multi must be 1 with ttt_loss_type='only_w1_straight_qk'.*; got 2"):
        LactConfig.from_released_config({**SMALL, "ttt_loss_type": "only_w1_straight_qk", "inter_multi": 2})
    for fields, message in (
        ({"name": "only_w1_no_wn", "use_fused": True}, "use_fused must be False with ttt_loss_type='only_w1_no_wn'"),
        ({"name": "mse", "no_query": True}, "no_query must be False with ttt_loss_type='mse'"),
        ({"grad_calc_method": "simplify2"}, r"grad_calc_method must be 'mannual'; got 'simplify2'.*gradient of no loss"),
        ({"name": "only_w1_straight_qk", "inter_multi": 2}, "inter_multi must be 1"),
        ({"muon_update_steps": 0}, "muon_update_steps must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            LactNvsConfig.from_released_config(views_fields(**fields))
    # without Muon there are no steps to count
    LactNvsConfig.from_released_config(views_fields("only_w1_straight_qk_no_lr1_no_wn_muon", muon_update_steps=0))


@pytest.mark.parametrize(
    ("name", "unused"),
    [
        ("mse", None),
        ("only_w1", "the rates of w0 and w2"),
        ("only_w1_straight_qk", "the matrices w0 and w2 and the rates of w0 and w2"),
        ("only_w1_straight_qk_no_lr1", "the matrices w0 and w2 and the projection to learned rates"),
    ],
)
def test_what_a_checkpoint_holds_without_a_use_is_said(caplog, name, unused):
    with caplog.at_level(logging.WARNING, "kvbind"):
        LactConfig.from_released_config({**SMALL, "ttt_loss_type": name})
        LactNvsConfig.from_released_config(views_fields(name))
    said = [record.getMessage() for record in caplog.records]
    assert said == ([] if unused is None else [f"ttt_loss_type={name!r} updates w1 alone: {unused} of a released checkpoint "
                                               "are loaded and not used"] * 2)  # fmt: skip


def test_unused_parameters_get_no_gradient():
    model = LactForCausalLM.from_released_config({**SMALL, "ttt_loss_type": "only_w1_straight_qk"})
    ids = torch.arange(11)[None]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    layer = model.model.layers[0].attn
    assert layer.w1.grad.abs().max() > 0
    assert layer.w0.grad is None
    assert layer.w2.grad is None


@pytest.mark.parametrize("name", ablations.LANGUAGE_NAMES)
def test_a_language_model_converts_there_and_back(tmp_path, name):
    source, fields = tmp_path / "released", {**SMALL, "ttt_loss_type": name}
    source.mkdir()
    weights = {n: x.float() for n, x in language_weights().items()}
    save_file(weights, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps(fields))
    ours = convert(source, tmp_path / "ours")
    model = LactForCausalLM.from_pretrained(ours)
    assert model.config.inner == LactConfig.from_released_config(fields).inner
    assert all(torch.equal(x, weights[n]) for n, x in model.state_dict().items())
    # a released folder loads without a conversion as well
    assert torch.equal(LactForCausalLM.from_pretrained(source).model.layers[0].attn.lr_proj.weight,
                       weights["model.layers.0.attn.lr_proj.weight"])  # fmt: skip
    back = convert(ours, tmp_path / "back", to="released")
    assert json.loads((back / "config.json").read_text())["ttt_loss_type"] == name
    again = load_file(back / "model.safetensors")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[n], x) for n, x in weights.items())


@pytest.mark.parametrize("name", [*ablations.VIEWS_NAMES, "no_query"])
def test_view_synthesis_converts_there_and_back(tmp_path, name):
    source, key = tmp_path / "released", name in ("no_query", "no_query_dot_product")
    fields = views_fields(no_query=True) if name == "no_query" else views_fields(name)
    source.mkdir()
    weights = {n: x.float() for n, x in views_weights(queries=not key).items()}
    torch.save({"model": weights}, source / "model.pt")
    (source / "config.yaml").write_text(yaml.safe_dump(fields))
    ours = convert(source, tmp_path / "ours")
    assert LactNvs.from_pretrained(ours).inner == LactNvsConfig.from_released_config(fields).inner
    back = convert(ours, tmp_path / "back", to="released")
    again = torch.load(back / "model.pt")["model"]
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[n], x) for n, x in weights.items())
    written = yaml.safe_load((back / "config.yaml").read_text())
    params = written["block_config"][1]["params"]
    assert params.get("no_query", False) == key
    assert params.get("ttt_loss_type", "dot_product") == ("dot_product" if key else name)
    assert LactNvsConfig.from_released_config(written).inner == LactNvs.from_pretrained(ours).inner


def test_a_model_that_was_built_without_released_parameters_is_not_released():
    config = LactConfig(**{**{n: x for n, x in SMALL.items() if n not in ("lact_chunk_size", "use_muon", "use_momentum")},
                           "inner": systems.lact_llm(5).replace(update="last")})  # fmt: skip
    with pytest.raises(ValueError, match=r"of ttt_loss_type='only_w1' hold the rates of w0 and w2 .*update='last'"):
        config.to_released_config()
    assert config.inner.network != Linear()
    assert not config.released_parameters
