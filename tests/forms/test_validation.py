import pytest
import torch

import kvbind
from kvbind import InnerLoop, Linear, SwiGLU, systems
from kvbind.forms.on_kernels.planned import key_of
from kvbind.forms.validation import check_cu_seqlens
from strategies import operands

LACT = systems.lact_llm(chunk=4)
PLAIN = InnerLoop(network=Linear(), chunk=4)
FULL = systems.vittt()


def call(spec, change=lambda arguments: None, **sizes):
    """`ttt` on operands that fit, after `change` has spoiled them."""
    o = operands(spec, **({"batch": 2, "tokens": 6} | sizes))
    arguments = {"spec": spec, "weights": dict(o.weights), "q": o.q, "k": o.k, "v": o.v, **o.options}
    change(arguments)
    return kvbind.ttt(**arguments)


def put(**values):
    return lambda arguments: arguments.update({name: value(arguments) for name, value in values.items()})


def spoil_weight(name, value):
    return lambda arguments: arguments["weights"].update({name: value(arguments["weights"].get(name))})


def nan(x):
    y = x.clone()
    y[0, 0, 0] = float("nan")
    return y


def state_of(spec, **sizes):
    return call(spec, **sizes)[1]


CASES = [
    (LACT, put(q=lambda a: a["q"][0]), "q must have 4 axes, .B, T, H, Dk.; got shape .6, 2, 3."),
    (LACT, put(v=lambda a: a["v"].flatten(2)), "v must have 4 axes"),
    (LACT, put(k=lambda a: a["k"].numpy()), "k must be a tensor"),
    (LACT, put(k=lambda a: a["k"].long()), "k must be floating-point; got torch.int64"),
    (LACT, put(k=lambda a: a["k"][:, :, :1]), "q and k must have equal head counts"),
    (LACT, put(k=lambda a: a["k"][:, :5]), "q and k must have equal token counts"),
    (LACT, put(v=lambda a: a["v"][:, :, :1]), "v and k must have equal head counts"),
    (LACT, put(v=lambda a: a["v"][:1]), "v and k must have equal batch counts"),
    (LACT, put(q=lambda a: a["q"][..., :2]), "q and k must have equal channel counts"),
    (
        LACT,
        put(momentum=lambda a: None),
        "momentum must be a number or a tensor .B, T, H., as the inner loop has momentum=True; got None",
    ),
    (PLAIN, put(momentum=lambda a: torch.ones(2, 6, 2)), "momentum must be None, as the inner loop has momentum=False"),
    (PLAIN, put(retention=lambda a: torch.ones(2, 6, 2)), "retention must be None"),
    (PLAIN.replace(retention=True), put(retention=lambda a: None), "retention must be a number or a tensor"),
    (LACT, put(momentum=lambda a: a["momentum"][:, :5]), "momentum must be .B, T, H. = .2, 6, 2.; got shape .2, 5, 2."),
    (LACT, put(momentum=lambda a: "0.9"), "momentum must be a number or a tensor .B, T, H.; got str"),
    (LACT, put(momentum=lambda a: True), "momentum must be a number or a tensor .B, T, H.; got bool"),
    (LACT, put(momentum=lambda a: float("inf")), "momentum must be finite in torch.float64; got inf"),
    (LACT, put(momentum=lambda a: 10**400), "momentum must be finite in torch.float64"),
    (systems.comba(), put(erase=lambda a: 0.5), "erase must be a tensor .B, T, H, Dk.; got float"),
    (LACT, put(lr=lambda a: torch.ones(2, 6)), "lr must be .B, T, H."),
    (LACT, put(lr=lambda a: torch.ones(2, 6, 2, dtype=torch.long)), "lr must be floating-point"),
    (LACT, put(lr=lambda a: float("nan")), "lr must be finite in torch.float64; got nan"),
    (LACT, put(lr=lambda a: 10**400), "lr must be finite in torch.float64"),
    (LACT, put(lr=lambda a: 10**5000), "lr must be finite in torch.float64; got a int"),
    (LACT, put(lr=lambda a: float("-inf")), "lr must be finite in torch.float64; got -inf"),
    (LACT, put(lr=lambda a: "0.1"), "lr must be a number"),
    (LACT, put(lr=lambda a: {"gate": 1.0, "up": 1.0}), "lr lacks 'out'"),
    (
        LACT,
        put(lr=lambda a: {"gate": 1.0, "up": 1.0, "ouut": 1.0}),
        "lr has 'ouut', which is not updated .did you mean 'out'",
    ),
    (LACT.replace(update="last"), put(lr=lambda a: {"out": 1.0, "gate": 1.0}), "lr has 'gate', which is not updated"),
    (LACT, put(weights=lambda a: None), "weights must be given where there is no state"),
    (LACT, put(weights=lambda a: [1]), "weights must be a dict"),
    (LACT, spoil_weight("down", lambda x: torch.ones(1)), "weights has 'down', which SwiGLU has not"),
    (LACT, put(weights=lambda a: {"gate": a["weights"]["gate"]}), "weights lacks 'up'; SwiGLU needs gate, up, out"),
    (LACT, spoil_weight("gate", nan), "weights.'gate'. must be finite; got NaN or infinity"),
    (LACT, spoil_weight("gate", lambda x: x[0]), "weights.'gate'. must be .H, in, out. or .B, H, in, out."),
    (LACT, spoil_weight("gate", lambda x: x[:1]), "weights.'gate'. must end in"),
    (LACT, spoil_weight("out", lambda x: x.mT), "weights.'out'. must end in .2, 5, 4."),
    (LACT, spoil_weight("out", lambda x: x.expand(3, *x.shape)), "one entry for each of 2 sequences; got 3"),
    (LACT, spoil_weight("out", lambda x: x.long()), "weights.'out'. must be a floating-point tensor"),
    (systems.vittt("conv"), lambda a: None, "needs a square number of tokens; got 6"),
    (systems.vittt("conv", grid=(2, 3)), spoil_weight("out", lambda x: x[:, None]), "must end in .8, 3, 3."),
    (LACT, put(form=lambda a: "paralel"), "form must be one of 'auto', 'recurrent', 'parallel', 'dual'; got 'paralel'"),
    (LACT, put(spec=lambda a: "lact"), "spec must be a kvbind.InnerLoop; got str"),
    (
        LACT.replace(update="last", normalize=False),
        put(update_tokens=lambda a: slice(0, 2), form=lambda a: "parallel"),
        "form='parallel' takes no update_tokens under visibility='past'",
    ),
    (
        FULL,
        put(update_tokens=lambda a: torch.ones(5, dtype=torch.bool)),
        "update_tokens must be .T. = .6. or .B, T. = .2, 6.",
    ),
    (FULL, put(update_tokens=lambda a: [0, 1]), "update_tokens must be a slice or a bool tensor"),
    (FULL, put(update_tokens=lambda a: torch.tensor([0, 1])), "update_tokens must be a slice or a bool tensor"),
    (LACT, put(state=lambda a: {}), "state must be what ttt returned"),
    (LACT, put(state=lambda a: state_of(LACT.replace(normalize=False))), "its spec differs in normalize"),
    (LACT, put(state=lambda a: state_of(LACT, batch=3)), "one entry for each of 2 sequences; got 3"),
    (LACT, put(state=lambda a: state_of(LACT, heads=3)), "state's 'gate' must be .2, 2, 3, 5. for these q, k and v"),
    (LACT, put(state=lambda a: state_of(LACT, value_width=5)), "state's 'out' must be"),
]


@pytest.mark.parametrize(("spec", "change", "message"), CASES)
def test_bad_input_is_refused_by_name(spec, change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(spec, change)


@pytest.mark.parametrize("form", ["auto", "recurrent"])
@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rate_of_the_tokens_that_write_has_the_precision_of_the_state(dtype, default, form):
    spec, make = systems.lact_llm(chunk=4).replace(momentum=False), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 6, 2, 4, generator=make, dtype=dtype) for _ in range(3))
    weights = spec.network.initial(2, 4, 4, 4, generator=make, dtype=dtype)
    rate, chosen = torch.full((2, 6, 2), 0.1, dtype=dtype), torch.tensor([True, False, True, True, True, False])
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        number, state = kvbind.ttt(spec, weights, q, k, v, lr=0.1, update_tokens=chosen, form=form)
        tensor, same = kvbind.ttt(spec, weights, q, k, v, lr=rate, update_tokens=chosen, form=form)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(number, tensor)
    assert all(torch.equal(x, same.weights[name]) for name, x in state.weights.items())


def test_a_logarithm_may_be_any_number_below_0():
    spec = PLAIN.replace(retention=True)
    none, some = ({"retention": lambda a: None, "log_retention": lambda a, x=x: x} for x in (float("-inf"), -(10**400)))
    assert torch.equal(call(spec, put(**none))[0], call(spec, put(**some))[0])
    with pytest.raises(ValueError, match=r"log_retention must be at most 0, as a retention is at most 1; got 10{79}\.\.\."):
        call(spec, put(retention=lambda a: None, log_retention=lambda a: 10**400))


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([1, 6], "cu_seqlens must start at 0; got 1"),
        ([0, 5], "cu_seqlens must end at the number of tokens, 6; got 5"),
        ([0, 4, 3, 6], "cu_seqlens must never fall"),
        ([0], "cu_seqlens must have at least two entries"),
        (torch.tensor([[0, 6]]), "cu_seqlens must be a 1-d tensor of integers"),
        (torch.tensor([0.0, 6.0]), "cu_seqlens must be a 1-d tensor of integers"),
    ],
)
def test_bad_boundaries_are_refused_by_name(bounds, message):
    with pytest.raises(ValueError, match=message):
        call(LACT, put(cu_seqlens=lambda a: bounds), batch=1)


@pytest.mark.parametrize("bounds", [[0, 5.5, 6], 6])
def test_boundaries_that_are_no_integers_are_refused_by_name(bounds):
    with pytest.raises(TypeError, match=r"cu_seqlens must be integers, \[n \+ 1\]; got"):
        check_cu_seqlens(bounds, 1, 6)


def test_packed_sequences_need_one_row_and_a_state_for_each():
    with pytest.raises(ValueError, match="so the batch must be 1; got 2"):
        call(LACT, put(cu_seqlens=lambda a: [0, 6]))
    with pytest.raises(ValueError, match="state must have one entry for each of 2 sequences; got 1"):
        call(LACT, put(cu_seqlens=lambda a: [0, 3, 6], state=lambda a: state_of(LACT, batch=1)), batch=1)


def test_parallel_form_of_an_inner_loop_without_one_raises_its_analysis():
    spec = LACT.replace(network=SwiGLU(), steps=2)
    with pytest.raises(kvbind.NoParallelFormError, match="updated gate and up") as caught:
        call(spec, put(form=lambda a: "parallel"))
    explanation = caught.value.explanation
    assert [obstacle.field for obstacle in explanation.obstacles] == ["update", "normalize", "steps"]
    assert explanation.nearest == spec.replace(update="last", normalize=False, steps=1)


def test_tensors_on_another_device_are_refused():
    with pytest.raises(ValueError, match="k must be on q's device, cpu; got meta"):
        call(LACT, put(k=lambda a: a["k"].to("meta")))
    with pytest.raises(ValueError, match=r"must be on q's device, cpu; weights\.gate is on meta"):
        call(LACT, put(weights=lambda a: {name: x.to("meta") for name, x in a["weights"].items()}))


GATED = {
    name: spec
    for name, spec in {name: make() for name, make in systems.SYSTEMS.items()}.items()
    if any(gate.writes != "itself" for gate in spec.gates.values())
}


@pytest.mark.parametrize("name", GATED)
def test_a_number_is_the_gate_of_all_tokens_and_heads(name):
    spec = GATED[name]
    o = operands(spec, value_width=3)
    rest = {"lr": torch.rand(2, 7 * spec.writes, 2, dtype=torch.float64) if spec.token_lr else 0.2}
    rest |= {gate: o.options[gate] for gate, declared in spec.gates.items() if declared.writes == "itself"}
    numbers = {gate: 0.25 + 0.25 * i for i, gate in enumerate(gate for gate in spec.gates if gate not in rest)}
    tensors = {gate: torch.full_like(o.options[gate], number) for gate, number in numbers.items()}
    scalars = {gate: torch.tensor(number) for gate, number in numbers.items()}
    expected, state = kvbind.ttt(spec, dict(o.weights), o.q, o.k, o.v, **rest, **tensors)
    loss = kvbind.inner_loss(spec, dict(o.weights), o.k, o.v, **rest, **tensors)
    for gates in (numbers, scalars):
        y, after = kvbind.ttt(spec, dict(o.weights), o.q, o.k, o.v, **rest, **gates)
        assert torch.equal(y, expected)
        assert all(torch.equal(x, state.tensors[key]) for key, x in after.tensors.items())
        assert torch.equal(kvbind.inner_loss(spec, dict(o.weights), o.k, o.v, **rest, **gates), loss)
    z = kvbind.linearize(spec, dict(o.weights), o.q, o.k, o.v, **rest, **numbers).output()
    assert torch.allclose(z, expected, rtol=1e-9, atol=1e-12)


def test_calls_with_gates_that_are_numbers_have_no_plan():
    spec, tensor = PLAIN.replace(momentum=True), torch.full((2, 6, 2), 0.5)
    x, weights = torch.zeros(2, 6, 2, 3), {"out": torch.zeros(2, 3, 3)}
    keys = [key_of(spec, weights, x, x, x, 1.0, {"momentum": gate}, "auto") for gate in (tensor, 0.5, tensor[0, 0, 0])]
    assert keys[0] is not None
    assert keys[1:] == [None, None]
