"""Released checkpoints and configurations of ViTTT, and every inner loop against the plainly written reference."""

import pytest
import torch
import vittt_reference

from kvbind import Linear, systems
from kvbind.models import vittt
from released import released, weights_of

PLAIN = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4, "num_classes": 5}
HIERARCHICAL = {"dim": [8, 16, 16], "depths": [1, 2, 1], "num_heads": [2, 2, 4], "num_classes": 5, "drop_path_rate": 0.0}

VARIANTS = {
    "full": {},
    "ascent": {"ascent": True},
    "key": {"key": True, "conv_key": True},
    "rung1": {"last": True},
    "rung3": {"linear": True},
    "rung6": {"linear": True, "clip": False},
    "squared": {"squared": True, "conv_squared": True},
}

LOSSES = {
    "dot_product": "full",
    "ga_dot_product": "ascent",
    "no_query_dot_product": "key",
    "only_w1": "rung1",
    "only_w1_straight_qk": "rung3",
    "mse": "squared",
}


def scrambled(model):
    """Every parameter and statistic drawn anew, large enough that the inner loop matters."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).double() * 0.4
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.data = torch.rand(buffer.shape, generator=generator).double() + 0.5
    return model.double().eval()


def test_released_weights_give_the_released_logits():
    config, tensors = released("vittt")
    model = vittt.from_released_config(config).eval()
    model.load_state_dict(weights_of(tensors))
    with torch.no_grad():
        logits = model(tensors["image"])
    torch.testing.assert_close(logits, tensors["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("row", VARIANTS)
@pytest.mark.parametrize("kind", ["plain", "hierarchical"])
def test_every_row_computes_what_the_specification_says(kind, row):
    config = PLAIN if kind == "plain" else HIERARCHICAL
    model = vittt.from_released_config(config)
    model.inner, model.inner_conv = vittt.INNER_LOOPS[row]
    scrambled(model)
    # a grid of 3 x 5 tokens in the plain model, of 6 x 10, 3 x 5 and 2 x 3 in the hierarchical one
    image = torch.randn(3, *((12, 20) if kind == "plain" else (24, 40)), generator=torch.Generator().manual_seed(1)).double()
    reference = vittt_reference.plain_logits if kind == "plain" else vittt_reference.hierarchical_logits
    expected = reference(model.state_dict(), config, image, **VARIANTS[row])
    with torch.no_grad():
        logits = model(image[None])[0]
    assert expected.abs().max() > 0.1
    # rotary angles are float32
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9 if kind == "plain" else 1e-5)
    if row != "full":
        full = reference(model.state_dict(), config, image)
        assert (full - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.filterwarnings("ignore:ttt_loss_type")
def test_released_ablations_are_inner_loops_and_keep_every_released_parameter(name):
    model = vittt.from_released_config({**PLAIN, "ttt_loss_type": name})
    assert (model.inner, model.inner_conv) == vittt.INNER_LOOPS[LOSSES[name]]
    assert model.state_dict().keys() == vittt.from_released_config(PLAIN).state_dict().keys()


def test_the_rungs_of_the_heads_are_the_ladders():
    ladder = systems.ladder(systems.vittt())
    for rung in ("rung1", "rung3", "rung6"):
        assert vittt.INNER_LOOPS[rung] == (ladder[rung], systems.vittt("conv"))
    assert vittt.RELEASED_LOSSES["only_w1_no_muon"] == (ladder["rung1"].replace(clip=False), systems.vittt("conv"))


@pytest.mark.parametrize("name", ["only_w1_straight_qk", "mse"])
def test_names_whose_released_update_is_no_gradient_load_and_say_so(name):
    with pytest.warns(UserWarning, match=f"{name}.*not the gradient"):
        vittt.from_released_config({**PLAIN, "ttt_loss_type": name})


def test_an_unknown_loss_or_field_is_named_with_the_nearest_known_one():
    with pytest.raises(ValueError, match=r"only_w2.*did you mean 'only_w1'"):
        vittt.from_released_config({**PLAIN, "ttt_loss_type": "only_w2"})
    with pytest.raises(ValueError, match=r"'num_head'.*did you mean 'num_heads'"):
        vittt.from_released_config({**PLAIN, "num_head": 3})


def test_what_a_released_configuration_leaves_out_takes_the_released_default():
    with torch.device("meta"):
        plain = vittt.from_released_config({"num_classes": 7})
        stages = vittt.from_released_config({"depths": [1, 1, 1, 1]})
    assert (plain.embed_dim, plain.depth, plain.mixers[0].heads, plain.num_classes) == (768, 12, 12, 7)
    assert stages.dim == (96, 192, 384, 768)
    assert [block.drop_path.rate for stage in stages.layers for block in stage.blocks] == pytest.approx(
        [0, 1 / 30, 2 / 30, 0.1]
    )


def test_the_class_of_a_released_configuration_is_checked():
    assert isinstance(vittt.Vittt.from_released_config(PLAIN), vittt.Vittt)
    with pytest.raises(ValueError, match="HierarchicalVittt"):
        vittt.HierarchicalVittt.from_released_config(PLAIN)


# millions of parameters, as published with the checkpoints (arXiv 2512.01643)
PUBLISHED = {
    "vittt_tiny": 6,
    "vittt_small": 24,
    "vittt_base": 90,
    "h_vittt_tiny": 29,
    "h_vittt_small": 54,
    "h_vittt_base": 94,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = vittt.build(name)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == PUBLISHED[name]


def test_tables_of_rotary_positions_in_released_checkpoints_are_left_out():
    model = vittt.from_released_config(HIERARCHICAL)
    state = dict(model.state_dict())
    state["layers.0.blocks.0.rope.rotations"] = torch.zeros(6, 10, 4, 2)
    model.load_state_dict(state)
    state["layers.0.blocks.0.rope.else"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"rope\.else"):
        model.load_state_dict(state)


def test_a_model_built_for_one_linear_layer_has_no_gate():
    inner, inner_conv = vittt.INNER_LOOPS["rung3"]
    assert inner.network == Linear()
    model = vittt.Vittt(**PLAIN, inner=inner, inner_conv=inner_conv)
    assert not [name for name in model.state_dict() if name.endswith("w2")]
    with pytest.raises(ValueError, match="GLU needs a fast matrix 'gate'"):
        model.inner = systems.vittt()
