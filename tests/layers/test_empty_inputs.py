"""Batches without a sequence are refused by the name of what was given; sequences without a token come back as they are."""

import pytest
import torch
from torch import nn

import kvbind
from kvbind.layers import FastWeightLayer, InPlaceMLP, LactLayer, LactNvsLayer, VitttLayer
from kvbind.models.in_place import InPlaceForCausalLM
from kvbind.models.lact import LactConfig, LactForCausalLM
from kvbind.models.vittt import HierarchicalVittt, Vittt, VitttConfig, VitttForImageClassification

D = 16
TEXT = kvbind.systems.lact_llm(chunk=4)
NO_SEQUENCE, NO_TOKEN = torch.zeros(0, 5, D), torch.zeros(2, 0, D)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(D, 24, bias=False), nn.Linear(D, 24, bias=False)
        self.down_proj, self.act_fn = nn.Linear(24, D, bias=False), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def lact():
    return LactLayer(D, num_attn_heads=2, num_lact_heads=2, inner=TEXT, window_size=4)


LAYERS = {
    "LactLayer": (lact, lambda layer, x: layer(x)[0]),
    "LactLayer.call": (lact, lambda layer, x: layer.call(x).run()[0].flatten(2)),
    "FastWeightLayer": (lambda: FastWeightLayer(D, 2, kvbind.systems.kda()), lambda layer, x: layer(x)[0]),
    "LactNvsLayer": (lambda: LactNvsLayer(D, 8), lambda layer, x: layer(x)[0]),
    "InPlaceMLP": (lambda: InPlaceMLP(Mlp(), 0, chunk=4, lr=0.1), lambda layer, x: layer.from_start(x)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    make, run = LAYERS[name]
    layer = make()
    with pytest.raises(ValueError, match=r"^x must be \[B, T, 16\] with at least one sequence; got shape \[0, 5, 16\]$"):
        run(layer, NO_SEQUENCE)
    for other in (torch.zeros(2, 5, D + 1), torch.zeros(5, D)):
        with pytest.raises(ValueError, match=r"^x must be \[B, T, 16\] with"):
            run(layer, other)
    assert run(layer, NO_TOKEN).shape == (2, 0, D)


def test_the_layer_of_images():
    with pytest.raises(ValueError, match=r"^x must be \[B, T, 16\] with at least one sequence; got shape \[0, 6, 16\]$"):
        VitttLayer(D, 2)(torch.zeros(0, 6, D), (2, 3))


def test_language_models():
    small = {"hidden_size": D, "num_hidden_layers": 1, "num_attn_heads": 2, "num_lact_heads": 2, "vocab_size": 20}
    model = LactForCausalLM(LactConfig(**small, inner=TEXT, window_size=4)).eval()
    with pytest.raises(ValueError, match=r"^input_ids must be \[B, T\] with at least one sequence; got shape \[0, 5\]$"):
        model(torch.zeros(0, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"^inputs_embeds must be \[B, T, d\] with at least one sequence"):
        model(inputs_embeds=NO_SEQUENCE)
    assert model(torch.zeros(2, 0, dtype=torch.long)).logits.shape == (2, 0, 20)


def test_in_place_models():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    model = InPlaceForCausalLM.from_base(LlamaForCausalLM(LlamaConfig(**sizes)), layers=[0], chunk=4).eval()
    with pytest.raises(ValueError, match=r"^input_ids must be \[B, T\] with at least one sequence; got shape \[0, 5\]$"):
        model(torch.zeros(0, 5, dtype=torch.long))


def test_vision_models():
    plain = {"embed_dim": D, "depth": 1, "num_heads": 2, "patch_size": 4, "num_classes": 3}
    stages = {"dim": [D, D], "depths": [1, 1], "num_heads": [2, 2], "num_classes": 3}
    nothing = torch.zeros(0, 3, 64, 64)
    for model in (Vittt(**plain), HierarchicalVittt(**stages)):
        with pytest.raises(
            ValueError, match=r"^image must be \[B, 3, height, width\] with at least one image; got shape \[0, 3"
        ):
            model(nothing)
    with pytest.raises(ValueError, match=r"^pixel_values must be \[B, 3, height, width\] with at least one image"):
        VitttForImageClassification(VitttConfig(**plain))(pixel_values=nothing)


def test_the_loss_of_no_chunk():
    spec = kvbind.systems.linear_attention()
    x = torch.zeros(2, 0, 3, 4)
    assert kvbind.inner_loss(spec, spec.network.initial(3, 4, 4), x, x).shape == (2, 3, 0)
