"""When weights may be read past a layer's `forward`."""

import copy

import pytest
import torch
from torch import nn

from kvbind.layers.plain_modules import input_dtype, is_a_product, is_plain, matrix_of


class Derived(nn.Linear):
    pass


class Packed(torch.Tensor):
    pass


class Adapted(nn.Module):
    """As an adapter: `weight` is the base layer's, what it computes is not."""

    def __init__(self, base):
        super().__init__()
        self.base, self.more = base, nn.Linear(base.in_features, base.out_features, bias=False)
        self.drop = nn.Dropout(0.5)

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + self.more(self.drop(x))


def put_forward(layer):
    layer.forward = lambda x: nn.Linear.forward(layer, x) + 1


CHANGES = {
    "forward hook": lambda layer: layer.register_forward_hook(lambda *_: None),
    "hook before": lambda layer: layer.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda layer: layer.register_full_backward_hook(lambda *_: None),
    "hook before backward": lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
    "another forward": put_forward,
    "another class": lambda layer: setattr(layer, "__class__", Derived),
    "parametrization": lambda layer: nn.utils.parametrizations.orthogonal(layer),
    "old-style parametrization": lambda layer: nn.utils.spectral_norm(layer),
    "packed weight": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach().as_subclass(Packed))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_is_put_on_a_layer_makes_it_its_own(change):
    layer = nn.Linear(4, 4)
    assert is_a_product(layer)
    CHANGES[change](layer)
    assert not is_a_product(layer)


def test_a_hook_that_is_gone_again_or_that_all_modules_have_counts_as_it_stands():
    layer = nn.Linear(4, 4)
    handle = layer.register_forward_hook(lambda *_: None)
    assert not is_plain(layer, nn.Linear)
    handle.remove()
    assert is_plain(layer, nn.Linear)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not is_plain(layer, nn.Linear)
    finally:
        handle.remove()
    assert is_plain(layer, nn.Linear)
    assert not is_plain(None, nn.Linear)


def test_weights_that_are_plain_tensors_for_a_call_are_read():
    layer, found = nn.Linear(4, 4), []

    def forward(x):
        found.append(is_a_product(layer))
        return x

    weights = {f"0.{name}": x.detach().clone() for name, x in layer.named_parameters()}
    both = nn.Sequential(layer, nn.Identity())
    both[1].forward = forward
    torch.func.functional_call(both, weights, (torch.randn(2, 4),))
    assert found == [True]


def test_the_matrix_of_a_layer_is_what_it_multiplies_by():
    plain = nn.Linear(6, 4, bias=False)
    assert matrix_of(plain, 6) is plain.weight
    adapted = Adapted(copy.deepcopy(plain)).train()
    torch.testing.assert_close(matrix_of(adapted, 6), plain.weight + adapted.more.weight)
    assert all(module.training for module in adapted.modules())


def test_a_layer_takes_input_in_the_dtype_of_a_floating_point_weight():
    layer = nn.Linear(4, 4, dtype=torch.float64)
    assert input_dtype(layer, torch.bfloat16) == torch.float64
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    assert input_dtype(layer, torch.bfloat16) == torch.bfloat16
    assert input_dtype(nn.Identity(), torch.bfloat16) == torch.bfloat16
