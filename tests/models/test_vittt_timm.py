"""What timm asks of a model, of the models alone; and timm itself, where it and torchvision are installed."""

import re

import pytest
import torch

from kvbind.models import vittt
from kvbind.models.vittt import VitttConfig, VitttForImageClassification, VitttImageProcessor, zoo


def plain(**fields):
    torch.manual_seed(0)
    return vittt.Vittt(**{"embed_dim": 8, "depth": 3, "num_heads": 2, "patch_size": 4, "num_classes": 3, **fields}).eval()


def hierarchical():
    torch.manual_seed(0)
    return vittt.HierarchicalVittt((8, 16, 16), (1, 2, 1), (2, 2, 2), num_classes=3).eval()


IMAGE = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
BUILD = {"plain": plain, "hierarchical": hierarchical}


@pytest.mark.parametrize("build", BUILD)
def test_intermediates_are_the_layers_and_the_features(build):
    model = BUILD[build]()
    final, every = model.forward_intermediates(IMAGE)
    torch.testing.assert_close(final, model.forward_features(IMAGE))
    logits, layers = model(IMAGE, return_layers=True)
    torch.testing.assert_close(list(layers), every)
    torch.testing.assert_close(model.forward_head(final), logits)
    for info, x in zip(model.feature_info, every, strict=True):
        assert x.shape == (2, info["num_chs"], *(side // info["reduction"] for side in IMAGE.shape[2:]))
        assert info["module"] in dict(model.named_modules())
    # negative indices, tokens, dicts, the norm, and no layer more than is asked for
    out = model.forward_intermediates(IMAGE, [0, -1], output_fmt="NLC", output_dict=True)
    torch.testing.assert_close(out["image_intermediates"][0], every[0].flatten(2).mT)
    torch.testing.assert_close(out["image_features"], final)
    (normed,) = model.forward_intermediates(IMAGE, 1, norm=True, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(normed, final)
    calls = []
    for i, name in enumerate(info["module"] for info in model.feature_info):
        model.get_submodule(name).register_forward_hook(lambda *_, i=i: calls.append(i))
    model.forward_intermediates(IMAGE, [0], stop_early=True, intermediates_only=True)
    assert calls == [0]


def test_intermediates_that_do_not_exist_are_refused():
    for given, message in (({"indices": [3]}, "n must"), ({"output_fmt": "NHWC"}, "output_fmt must be one of"),
                           ({"stop_early": True}, "stop_early must be False")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            plain().forward_intermediates(IMAGE, **given)
    with pytest.raises(ValueError, match="norm must be False for layer 0"):
        hierarchical().forward_intermediates(IMAGE, [0], norm=True)


@pytest.mark.parametrize("build", BUILD)
def test_pruning_leaves_what_the_features_need(build):
    model = BUILD[build]()
    expected = model.forward_intermediates(IMAGE, [0, 1], intermediates_only=True)
    assert model.prune_intermediate_layers([0, -2], prune_norm=True) == [0, 1]
    assert model.depth == len(model.feature_info) == 2
    found = model.forward_intermediates(IMAGE, [0, 1], intermediates_only=True)
    torch.testing.assert_close(found, expected)
    sum(x.sum() for x in found).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("build", "coarse", "count"), [("plain", False, 3), ("hierarchical", False, 4), ("hierarchical", True, 3)]
)
def test_every_parameter_is_of_one_group_but_the_heads(build, coarse, count):
    model = BUILD[build]()
    groups = model.group_matcher(coarse)
    blocks, layers = groups["blocks"], set()
    for name, _ in model.named_parameters():
        matched = [found.groups() for pattern, _ in blocks if (found := re.match(pattern, name))]
        matched += ["stem"] * bool(re.match(groups["stem"], name))
        assert len(matched) == (not name.startswith("head")), name
        layers |= {match for match in matched if match != "stem" and match and "downsample" not in name}
    assert len(layers) == count


def test_input_sizes_are_checked_and_told():
    model = plain(patch_size=(4, 8))
    model.set_input_size((32, 48), patch_size=(4, 8))
    assert model.default_cfg["input_size"] == (3, 32, 48)
    model.set_input_size(patch_size=None)
    for given, message in (
        ({"img_size": 36}, "width must be a multiple of the patch's, 8"),
        ({"patch_size": 4}, "patch_size must be 4 x 8"),
    ):
        with pytest.raises(ValueError, match=message):
            model.set_input_size(**given)
    hierarchical().set_input_size(33, patch_size=4)


@pytest.fixture
def trained(tmp_path):
    """A classifier of one linear layer as fast network, in the folder where a run leaves its model."""
    inner, conv = vittt.INNER_LOOPS["rung6"]
    torch.manual_seed(0)
    config = VitttConfig(8, 3, 2, 4, img_size=32, num_labels=3, inner=inner, inner_conv=conv, initializer_range=0.3)
    model = VitttForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "model")
    VitttImageProcessor(32, 3, [0.5] * 3, [0.25] * 3, 0.9).save_pretrained(tmp_path / "model")
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    return tmp_path, model


def test_a_trained_model_is_opened_from_its_run(trained):
    run, model = trained
    for folder in (run, run / "model"):
        found = zoo.vittt_folder(folder=folder, num_classes=None)
        torch.testing.assert_close(found(IMAGE), model(IMAGE).logits)
        assert found.inner == model.config.inner
    config = found.pretrained_cfg
    assert (config["mean"], config["std"], config["crop_pct"]) == ((0.5,) * 3, (0.25,) * 3, 0.9)
    assert (config["input_size"], config["num_classes"]) == ((3, 32, 32), 3)
    assert zoo.vittt_folder(folder=run, num_classes=7)(IMAGE).shape == (2, 7)
    with pytest.raises(TypeError, match="embed_dim"):
        zoo.vittt_folder(folder=run, embed_dim=16)


def test_weights_of_a_trained_model_load_into_the_model_itself(trained):
    from safetensors.torch import load_file

    run, model = trained
    inner, conv = vittt.INNER_LOOPS["rung6"]
    other = plain(inner=inner, inner_conv=conv)
    other.load_state_dict(load_file(run / "model/model.safetensors"))
    torch.testing.assert_close(other(IMAGE), model(IMAGE).logits)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({"vittt.head.weight": torch.zeros(3, 8)})


def test_what_timm_passes_is_heeded_or_refused():
    small = {"embed_dim": 8, "depth": 1, "num_heads": 2, "patch_size": 4}
    for dynamic in (True, False):
        assert zoo.vittt_tiny(**small, img_size=(8, 12), dynamic_img_size=dynamic).default_cfg["input_size"] == (3, 8, 12)
    assert zoo.vittt_tiny(**small, pretrained_cfg_overlay={"crop_pct": 1.0}).default_cfg["crop_pct"] == 1.0
    refused = {
        "multiple of the patch's": {"img_size": 9},
        "dynamic_img_size must": {"dynamic_img_size": "yes"},
        "out_indices must not be given without features_only": {"out_indices": [0]},
    }
    for message, given in refused.items():
        with pytest.raises(ValueError, match=message):
            zoo.vittt_tiny(**small, **given)


def test_timm_makes_the_models_where_it_is_installed(trained):
    timm = pytest.importorskip("timm", exc_type=ImportError)
    from timm.optim import param_groups_layer_decay

    model = timm.create_model("vittt_tiny", num_classes=4, img_size=32, patch_size=8)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 4)
    run, mine = trained
    inner, conv = vittt.INNER_LOOPS["rung6"]
    weights, sizes = run / "model/model.safetensors", {"embed_dim": 8, "depth": 3, "num_heads": 2, "patch_size": 4}
    loops = {"inner": inner, "inner_conv": conv}
    loaded = timm.create_model("vittt_tiny", num_classes=3, checkpoint_path=str(weights), **sizes, **loops)
    torch.testing.assert_close(loaded.eval()(IMAGE), mine(IMAGE).logits)
    features = timm.create_model("vittt_folder", folder=str(run), features_only=True, out_indices=[0, 2])
    found = features.eval()(IMAGE)
    torch.testing.assert_close(found, [mine.vittt(IMAGE, return_layers=True)[1][i] for i in (0, 2)])
    assert features.feature_info.channels() == [8, 8]
    assert features.feature_info.reduction() == [4, 4]
    scales = {group["lr_scale"] for group in param_groups_layer_decay(loaded, 0.05, layer_decay=0.5)}
    # the stem, three blocks, and the norm with the head
    assert scales == {0.5**i for i in range(5)}
