import sys
import types

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageClassification

from checkpointing import disable_checkpointing, enable_checkpointing
from kvbind import systems
from kvbind.models import vittt
from kvbind.models.vittt import zoo
from kvbind.models.vittt.blocks import StochasticDepth
from kvbind.models.vittt.plain import PatchEmbed, Vittt

PLAIN = {"embed_dim": 16, "depth": 3, "num_heads": 2, "patch_size": 4, "num_classes": 5}
HIERARCHICAL = {"dim": (8, 16, 16, 24), "depths": (1, 2, 1, 1), "num_heads": (2, 2, 4, 3), "num_classes": 5}


def plain(**fields):
    torch.manual_seed(0)
    return vittt.Vittt(**{**PLAIN, **fields})


def hierarchical(**fields):
    torch.manual_seed(0)
    return vittt.HierarchicalVittt(**{**HIERARCHICAL, **fields})


@pytest.mark.parametrize(
    ("patch", "size", "tokens"),
    [(4, (16, 16), 16), (7, (28, 14), 8), ((2, 8), (10, 24), 15), (4, (4, 4), 1), (2, (34, 2), 17)],
)
def test_any_image_that_the_patches_tile_is_classified(patch, size, tokens):
    model = plain(patch_size=patch).eval()
    image = torch.randn(2, 3, *size)
    assert model.forward_features(image).shape == (2, tokens, 16)
    assert model(image).shape == (2, 5)
    assert model(image).isfinite().all()


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (50, 37), (32, 32), (3, 5)])
def test_the_hierarchical_model_takes_images_of_any_size(size):
    model = hierarchical().eval()
    image = torch.randn(2, 3, *size)
    grid = size
    for _ in range(5):
        grid = tuple(-(-side // 2) for side in grid)
    assert model.forward_features(image).shape == (2, grid[0] * grid[1], 24)
    assert model(image).isfinite().all()


def test_the_logits_are_the_head_of_the_mean_of_the_features():
    for model in (plain().eval(), hierarchical().eval()):
        image = torch.randn(2, 3, 32, 32)
        features = model.forward_features(image)
        torch.testing.assert_close(model(image), model.head(features.mean(1)))
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.mean(1))


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="image's height must be a multiple of the patch's, 4; got 18"):
        plain()(torch.randn(1, 3, 18, 16))
    with pytest.raises(ValueError, match="image's width"):
        plain()(torch.randn(1, 3, 16, 2))
    for model in (plain(), hierarchical()):
        message = r"image must be \[B, 3, height, width\] with at least one image; got shape \[1, 1, 16, 16\]"
        with pytest.raises(ValueError, match=message):
            model(torch.randn(1, 1, 16, 16))
    assert plain(in_chans=1)(torch.randn(1, 1, 16, 16)).shape == (1, 5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 3}, "heads must divide dim = 16; got 3"),
        ({"patch_size": (4, 4, 4)}, "patch_size must be a number or"),
        ({"num_classes": -1}, "num_classes must be an int of at least 0"),
        ({"drop_path_rate": 1.0}, "rate must be at least 0 and below 1"),
        ({"global_pool": "max"}, "global_pool must be one of"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        plain(**fields)


def test_stages_must_agree():
    with pytest.raises(ValueError, match="one entry per stage"):
        hierarchical(depths=(1, 2))
    with pytest.raises(ValueError, match="multiples of 4"):
        hierarchical(dim=(6, 16, 16, 24))


def test_positions_matter_though_nothing_is_embedded():
    for model in (plain().eval(), hierarchical().eval()):
        for layer in model.mixers:
            layer.w3.data.normal_()
            layer.qkv.weight.data.normal_()
            layer.proj.weight.data.normal_()
        image = torch.randn(1, 3, 32, 32)
        assert (model(image) - model(image.flip(-1))).abs().max() > 1e-3


def test_a_new_head_has_the_classes_asked_for_and_the_body_stays():
    model = plain().eval()
    image = torch.randn(2, 3, 16, 16)
    features = model.forward_features(image)
    model.reset_classifier(11)
    assert model(image).shape == (2, 11)
    assert model.num_classes == 11
    torch.testing.assert_close(model.forward_features(image), features)
    assert model.get_classifier().weight.std() < 0.05
    model.reset_classifier(0)
    torch.testing.assert_close(model(image), features.mean(1))
    model.reset_classifier(3, global_pool="")
    assert model(image).shape == (2, 16, 3)
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(3, global_pool="token")


def test_intermediate_layers_of_the_plain_model_are_its_blocks():
    model, image = plain().eval(), torch.randn(2, 3, 8, 12)
    every = model.get_intermediate_layers(image, 3)
    assert [x.shape for x in every] == [(2, 6, 16)] * 3
    torch.testing.assert_close(model.get_intermediate_layers(image, [0, 2])[0], every[0])
    torch.testing.assert_close(model.get_intermediate_layers(image)[0], every[2])
    (normed,) = model.get_intermediate_layers(image, norm=True)
    torch.testing.assert_close(normed, model.forward_features(image))
    (image_like,) = model.get_intermediate_layers(image, [1], reshape=True)
    assert image_like.shape == (2, 16, 2, 3)
    torch.testing.assert_close(image_like[:, :, 1, 2], every[1][:, 5])


def test_intermediate_layers_of_the_hierarchical_model_are_its_stages():
    model, image = hierarchical().eval(), torch.randn(2, 3, 64, 32)
    shapes = [x.shape for x in model.get_intermediate_layers(image, 4, reshape=True)]
    assert shapes == [(2, 8, 16, 8), (2, 16, 8, 4), (2, 16, 4, 2), (2, 24, 2, 1)]
    torch.testing.assert_close(model.get_intermediate_layers(image, norm=True)[0], model.forward_features(image))
    with pytest.raises(ValueError, match="norm must be False for layer 0, of width 8"):
        model.get_intermediate_layers(image, [0], norm=True)


@pytest.mark.parametrize("n", [0, 4, [], [3], [-4]])
def test_layers_that_do_not_exist_are_refused(n):
    with pytest.raises(ValueError, match="n must"):
        plain().get_intermediate_layers(torch.randn(1, 3, 8, 8), n)


def test_stochastic_depth_drops_whole_images_and_keeps_the_mean():
    torch.manual_seed(0)
    drop, x = StochasticDepth(0.25), torch.ones(4000, 2, 3)
    y = drop(x)
    assert sorted(set(y.flatten().tolist())) == pytest.approx([0, 1 / 0.75])
    assert (y[:, :1, :1] == y).all()
    assert y.mean().item() == pytest.approx(1, abs=0.03)
    assert drop.eval()(x) is x


def test_stochastic_depth_grows_linearly_and_acts_in_training_alone():
    model = plain(drop_path_rate=0.4)
    assert [block.drop_path.rate for block in model.blocks] == pytest.approx([0, 0.2, 0.4])
    image = torch.randn(4, 3, 16, 16)
    assert (model(image) - model(image)).abs().max() > 0
    model.eval()
    torch.testing.assert_close(model(image), model(image), rtol=0, atol=0)
    # the same weights without it
    torch.testing.assert_close(plain().eval()(image), model(image))


def test_an_inner_loop_given_to_the_model_is_given_to_every_layer():
    model = plain()
    for name, (inner, inner_conv) in vittt.INNER_LOOPS.items():
        model.inner, model.inner_conv = inner, inner_conv
        assert [layer.inner for layer in model.mixers] == [inner] * 3, name
        assert [layer.inner_conv for layer in model.mixers] == [inner_conv] * 3, name
    model.mixers[0].inner = systems.vittt()
    assert model.mixers[1].inner != model.inner


@pytest.mark.parametrize("row", vittt.INNER_LOOPS)
@pytest.mark.parametrize("build", [plain, hierarchical])
def test_every_row_trains_every_parameter(build, row):
    inner, inner_conv = vittt.INNER_LOOPS[row]
    model = build(inner=inner, inner_conv=inner_conv)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        unread = row == "key" and "qkv" in name
        assert unread or parameter.grad.abs().max() > 0, name


def test_a_model_learns_to_tell_images_apart():
    model = plain(embed_dim=32, num_heads=2, depth=2, num_classes=4)
    image, label = torch.randn(8, 3, 16, 16), torch.arange(8) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2


@pytest.mark.parametrize("build", [plain, hierarchical])
def test_recomputing_blocks_changes_no_gradient(build):
    image = torch.randn(2, 3, 32, 32)
    gradients = []
    for recompute in (False, True):
        model = build(drop_path_rate=0.0)
        model.set_grad_checkpointing(recompute)
        model(image).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_training_has_finite_gradients(dtype):
    model = plain()
    # activations as trained models have them: norms scale up, values grow
    for block in model.blocks:
        block.norm1.weight.data.fill_(30)
        block.attn.qkv.weight.data.mul_(5)
    with torch.autocast("cpu", dtype=dtype):
        loss = model(torch.randn(2, 3, 32, 32) * 5).float().square().mean()
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_transformers_saves_and_loads_the_model(tmp_path):
    inner, inner_conv = vittt.INNER_LOOPS["rung3"]
    config = vittt.VitttConfig(
        embed_dim=16,
        depth=2,
        num_heads=2,
        patch_size=4,
        num_labels=5,
        inner=inner,
        inner_conv=inner_conv.replace(clip=False),
    )
    model = vittt.VitttForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, vittt.VitttForImageClassification)
    assert loaded.vittt.inner == inner
    assert loaded.vittt.inner_conv == inner_conv.replace(clip=False)
    image = torch.randn(2, 3, 8, 12)
    torch.testing.assert_close(loaded(image).logits, model(image).logits)
    assert AutoConfig.from_pretrained(tmp_path).num_labels == 5


def test_transformers_saves_and_loads_the_hierarchical_model(tmp_path):
    config = vittt.VitttConfig(embed_dim=(8, 16), depth=(1, 1), num_heads=(2, 2), num_labels=3)
    model = vittt.VitttForImageClassification(config).eval()
    model.vittt.norm.running_mean.fill_(0.25)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    image = torch.randn(2, 3, 16, 24)
    torch.testing.assert_close(loaded(image).logits, model(image).logits)


def test_transformers_model_starts_as_the_model_itself_does():
    # loading goes through an empty model whose missing weights transformers draws
    model = vittt.VitttForImageClassification(vittt.VitttConfig(embed_dim=64, depth=1, num_heads=2, num_labels=3))
    block = model.vittt.blocks[0]
    for weight in (block.attn.w1, block.attn.w3, block.mlp.fc1.weight, model.vittt.head.weight):
        assert 0.01 < weight.std() < 0.03
    assert block.norm1.weight.eq(1).all()
    assert block.cpe.weight.abs().max() > 0.1


def test_transformers_model_gives_loss_hidden_states_and_tuples():
    config = vittt.VitttConfig(embed_dim=16, depth=2, num_heads=2, patch_size=4, num_labels=5)
    model = vittt.VitttForImageClassification(config)
    image, labels = torch.randn(4, 3, 8, 12), torch.tensor([0, 1, 2, 4])
    output = model(image, labels=labels, output_hidden_states=True)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    assert [x.shape for x in output.hidden_states] == [(4, 16, 2, 3)] * 2
    soft = model(image, labels=torch.nn.functional.one_hot(labels, 5).float(), return_dict=False)
    torch.testing.assert_close(soft[0], output.loss)
    torch.testing.assert_close(soft[1], output.logits)
    enable_checkpointing(model)
    assert model.vittt.gradient_checkpointing
    model.train()(image, labels=labels).loss.backward()
    disable_checkpointing(model)
    assert not model.vittt.gradient_checkpointing


def test_transformers_configuration_checks_its_fields():
    with pytest.raises(ValueError, match="all three alike"):
        vittt.VitttConfig(embed_dim=(8, 16), depth=2, num_heads=2)
    with pytest.raises(TypeError, match=r"inner must be a kvbind\.InnerLoop or its dict; got str"):
        vittt.VitttConfig(inner="rung3")
    config = vittt.VitttConfig.from_released_config(
        {"dim": [8, 16], "depths": [1, 1], "num_heads": [2, 2], "num_classes": 7}
    )
    assert (config.hierarchical, config.num_labels) == (True, 7)
    assert isinstance(config.build(), vittt.HierarchicalVittt)


def test_timm_gets_entry_points_that_build_the_published_sizes():
    entries = {}
    assert zoo.register(lambda entry: entries.setdefault(entry.__name__, entry))
    assert list(entries) == [*vittt.SIZES, "vittt_folder"]
    # with what timm.create_model passes beside a caller's own arguments
    extra = {"pretrained_cfg": None, "pretrained_cfg_overlay": None, "cache_dir": None}
    with torch.device("meta"):
        model = entries["vittt_small"](pretrained=False, num_classes=10, img_size=64, drop_path_rate=0.1, **extra)
        stages = entries["h_vittt_base"](num_classes=0, **extra)
    assert (model.embed_dim, model.num_classes, model.mixers[0].heads) == (384, 10, 6)
    assert stages.dim == (96, 192, 448, 640)
    assert model.pretrained_cfg["input_size"] == (3, 64, 64)
    assert stages.pretrained_cfg["input_size"] == (3, 224, 224)
    assert stages.default_cfg["num_classes"] == 0
    assert dict(model.named_modules())[model.pretrained_cfg["first_conv"]].in_channels == 3
    assert dict(stages.named_modules())[stages.pretrained_cfg["first_conv"]].in_channels == 3
    with pytest.raises(ValueError, match="pretrained must be False"):
        entries["vittt_tiny"](pretrained=True)


def test_without_timm_nothing_is_registered_and_nothing_fails(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.models", None)
    assert zoo.register() is False
    stand_in, seen = types.ModuleType("timm.models"), []
    stand_in.register_model = seen.append
    monkeypatch.setitem(sys.modules, "timm", types.ModuleType("timm"))
    monkeypatch.setitem(sys.modules, "timm.models", stand_in)
    assert zoo.register() is True
    assert len(seen) == len(vittt.SIZES) + 1


def test_an_unknown_size_is_named_with_the_nearest_known_one():
    with pytest.raises(ValueError, match="did you mean 'vittt_small'"):
        vittt.build("vittt_smal")


@pytest.mark.parametrize(
    "options", [{}, {"stride": (8, 4)}, {"stride": (16, 8), "padding": (0, 4)}, {"stride": (16, 8), "groups": 3}]
)
def test_patches_are_what_the_convolution_makes_of_them(options):
    """A stride below the patch's size is a usual way to denser tokens."""
    embed = PatchEmbed((16, 8), 3, 24)
    embed.proj = torch.nn.Conv2d(3, 24, (16, 8), **({"stride": (16, 8)} | options))
    image = torch.randn(2, 3, 48, 24)
    torch.testing.assert_close(embed(image), embed.proj(image))


def test_patches_may_have_an_adapter():
    peft = pytest.importorskip("peft")
    model = Vittt(embed_dim=24, depth=1, num_heads=2, patch_size=16, num_classes=3).eval()
    image = torch.randn(1, 3, 32, 32)
    before = model(image)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["patch_embed.proj"], r=2))
    torch.testing.assert_close(adapted(image), before)
    torch.nn.init.ones_(model.patch_embed.proj.lora_B.default.weight)
    assert not torch.equal(adapted(image), before)
    assert model.patch == (16, 16)
