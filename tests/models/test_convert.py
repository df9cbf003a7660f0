"""Checkpoints of ViTTT and view synthesis, from the released layout and back; language models are in test_lact_released."""

import argparse
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from kvbind.inner.orthogonalize import VIEWS_COEFFICIENTS, NewtonSchulz
from kvbind.models import lact_nvs, vittt
from kvbind.models.convert import convert
from kvbind.models.lact_nvs import LactNvs, LactNvsConfig
from kvbind.models.vittt import VitttConfig, VitttForImageClassification
from released import released, weights_of

HIERARCHICAL = {"dim": [8, 16, 16], "depths": [1, 2, 1], "num_heads": [2, 2, 4], "num_classes": 5}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def released_vittt(folder, state=None, fields=None, **beside):
    folder.mkdir()
    torch.save({"model": state or weights_of(released("vittt")[1]), **beside}, folder / "checkpoint.pth")
    if fields is not None:
        (folder / "config.json").write_text(json.dumps(fields))
    return folder


def released_views(folder, edit=lambda fields: fields):
    folder.mkdir()
    fields, tensors = released("lact_nvs")
    torch.save({"model": weights_of(tensors)}, folder / "model.pt")
    (folder / "config.yaml").write_text(yaml.safe_dump(edit(fields)))
    return folder


def test_vittt_comes_out_of_its_weights_alone_and_gives_the_released_logits(tmp_path):
    # whatever training left beside the weights, and the names that wrappers give them
    state = {f"module.{name}": x for name, x in weights_of(released("vittt")[1]).items()}
    source = released_vittt(tmp_path / "released", state, epoch=3, args=argparse.Namespace(lr=0.1))
    model = AutoModelForImageClassification.from_pretrained(convert(source, tmp_path / "ours")).eval()
    assert isinstance(model, VitttForImageClassification)
    tensors = released("vittt")[1]
    with torch.no_grad():
        torch.testing.assert_close(model(tensors["image"]).logits, tensors["logits"], rtol=0, atol=1e-5)


def test_vittt_there_and_back_gives_the_released_checkpoint_again(tmp_path):
    config, tensors = released("vittt")
    back = convert(
        convert(released_vittt(tmp_path / "released", fields=config), tmp_path / "ours"), tmp_path / "back", to="released"
    )
    assert same(torch.load(back / "checkpoint.pth")["model"], weights_of(tensors))
    fields = json.loads((back / "config.json").read_text())
    assert {name: fields[name] for name in config} == config
    vittt.from_released_config(fields).load_state_dict(torch.load(back / "checkpoint.pth")["model"])


def test_hierarchical_vittt_is_told_from_its_weights(tmp_path):
    torch.manual_seed(0)
    model = vittt.from_released_config(HIERARCHICAL)
    state = dict(model.state_dict())
    rotations = {"layers.0.blocks.0.rope.rotations": torch.zeros(4, 4, 2, 2)}
    source = released_vittt(tmp_path / "released", {**state, **rotations})
    ours = VitttForImageClassification.from_pretrained(convert(source, tmp_path / "ours"))
    assert [ours.config.embed_dim, ours.config.depth, ours.config.num_heads] == [[8, 16, 16], [1, 2, 1], [2, 2, 4]]
    assert same(ours.vittt.state_dict(), state)
    back = convert(tmp_path / "ours", tmp_path / "back", to="released")
    assert same(torch.load(back / "checkpoint.pth")["model"], state)


@pytest.mark.parametrize("name", [name for name in vittt.SIZES if "base" not in name])
def test_every_published_size_of_vittt_is_told_from_its_weights(name):
    from kvbind.models.families import vittt_fields

    with torch.device("meta"):
        fields = vittt_fields(vittt.build(name).state_dict())
        named = {key: list(x) if isinstance(x, tuple) else x for key, x in vittt.SIZES[name].items()}
    assert {key: fields[key] for key in named} == named
    assert (fields["num_classes"], fields["mlp_ratio"], fields["qkv_bias"], fields["in_chans"]) == (1000, 4, True, 3)


@pytest.mark.parametrize("loss", ["ga_dot_product", "no_query_dot_product", "only_w1", "only_w1_no_muon"])
def test_an_ablation_of_vittt_needs_its_name_and_keeps_it(tmp_path, loss):
    source = released_vittt(tmp_path / "released")
    (tmp_path / "ablation.yaml").write_text(f"ttt_loss_type: {loss}\n")
    target = convert(source, tmp_path / "ours", config=tmp_path / "ablation.yaml")
    config = VitttConfig.from_pretrained(target)
    assert (config.inner, config.inner_conv) == vittt.RELEASED_LOSSES[loss]
    back = convert(target, tmp_path / "back", to="released")
    assert json.loads((back / "config.json").read_text())["ttt_loss_type"] == loss


def test_an_ablation_that_does_not_use_the_gate_is_read_without_it(tmp_path):
    source = released_vittt(tmp_path / "released", fields={"ttt_loss_type": "only_w1_straight_qk"})
    with pytest.warns(UserWarning, match="not the gradient"):
        target = convert(source, tmp_path / "ours")
    assert not [name for name in load_file(target / "model.safetensors") if name.endswith("w2")]
    with pytest.raises(ValueError, match=r"inner and inner_conv must be those of a released ablation .*network=Linear"):
        convert(target, tmp_path / "back", to="released")
    assert not (tmp_path / "back").exists()


def test_view_synthesis_gives_the_released_images_and_comes_back(tmp_path):
    source = released_views(tmp_path / "released")
    target = convert(source, tmp_path / "ours")
    fields, tensors = released("lact_nvs")
    model = LactNvs.from_pretrained(target)
    model.inner = model.inner.replace(orthogonalize=model.inner.orthogonalize.replace(dtype=torch.float32))
    inputs = [tensors[f"input/{name}"] for name in ("image", "c2w", "fxfycxcy")]
    cameras = [tensors[f"target/{name}"] for name in ("c2w", "fxfycxcy")]
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs, *cameras), tensors["output"], rtol=0, atol=1e-5)
    back = convert(target, tmp_path / "back", to="released")
    assert same(torch.load(back / "model.pt")["model"], weights_of(tensors))
    again = yaml.safe_load((back / "config.yaml").read_text())
    assert again == fields
    assert LactNvsConfig.from_released_config(again) == LactNvsConfig.from_released_config(fields)


@pytest.mark.parametrize("name", lact_nvs.PRESETS)
def test_every_preset_of_view_synthesis_has_a_released_configuration(name):
    from kvbind.models.families import nvs_fields

    config = lact_nvs.PRESETS[name]
    assert LactNvsConfig.from_released_config(nvs_fields(config)) == config


@pytest.mark.parametrize(("steps", "rate"), [(3, 0.02), (7, 0.01)])
def test_what_view_synthesis_weights_do_not_say_is_read_from_the_file(tmp_path, steps, rate):
    def edit(fields):
        fields["block_config"][1]["params"] |= {"muon_update_steps": steps, "base_lr": rate}
        return fields

    model = LactNvs.from_pretrained(convert(released_views(tmp_path / "released", edit), tmp_path / "ours"))
    assert len(model.inner.orthogonalize.coefficients) == steps
    assert model.config.base_lr == rate


def test_view_synthesis_of_another_inner_loop_has_no_released_words(tmp_path):
    config = LactNvsConfig(dim=16, layers=1, head_dim=8, fast_head_dim=16, inner=lact_nvs.INNER_LOOPS["rung6"])
    LactNvs(config).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"hold the matrices w0 and w2 and .* update='last'.*orthogonalize=None"):
        convert(tmp_path / "ours", tmp_path / "back", to="released")
    assert not (tmp_path / "back").exists()


def test_a_size_may_be_named_where_no_file_is(tmp_path):
    source = released_views(tmp_path / "released")
    (source / "config.yaml").unlink()
    with pytest.raises(FileNotFoundError, match="the weights do not say how often"):
        convert(source, tmp_path / "ours")
    with pytest.raises(ValueError, match=r"'24x76'.*did you mean '24x768'"):
        convert(source, tmp_path / "ours", config="24x76")
    with pytest.raises(ValueError, match="do not fit its configuration: missing"):
        convert(source, tmp_path / "ours", config="24x768")
    images = released_vittt(tmp_path / "images")
    with pytest.raises(ValueError, match=r"'vittt_tin'.*did you mean 'vittt_tiny'"):
        convert(images, tmp_path / "ours", config="vittt_tin")
    with pytest.raises(ValueError, match=r"do not fit its configuration: missing \['vittt\.blocks\.10"):
        convert(images, tmp_path / "ours", config="vittt_tiny")
    assert not (tmp_path / "ours").exists()


def test_what_is_no_checkpoint_of_any_family_is_said(tmp_path):
    (tmp_path / "theirs").mkdir()
    save_file({"encoder.weight": torch.zeros(2)}, tmp_path / "theirs" / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"LaCT language model, ViTTT classifier, .*none of their parameters, but encoder\.weight"
    ):
        convert(tmp_path / "theirs", tmp_path / "ours")
    torch.save({"model": {"x": 1}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"must hold a state dict, alone or under model"):
        convert(tmp_path / "other.pt", tmp_path / "ours")
    torch.save({"model": {"x": torch.zeros(1)}, "path": Path("here")}, tmp_path / "objects.pth")
    with pytest.raises(ValueError, match=r"must be a file of weights that torch\.load reads safely"):
        convert(tmp_path / "objects.pth", tmp_path / "ours")


@pytest.mark.parametrize("make", [released_vittt, released_views])
def test_what_is_converted_already_is_not_converted_again(tmp_path, make):
    source = make(tmp_path / "released")
    target = convert(source, tmp_path / "ours")
    with pytest.raises(ValueError, match=r"source must be a released checkpoint; .* is kvbind"):
        convert(target, tmp_path / "other")
    with pytest.raises(ValueError, match=r"source must be a kvbind checkpoint; .* is released"):
        convert(source, tmp_path / "other", to="released")


def test_an_inner_loop_that_was_assigned_goes_along(tmp_path):
    torch.manual_seed(0)
    model = LactNvs(LactNvsConfig(dim=16, layers=1, patch_size=4, head_dim=8, fast_head_dim=16))
    model.inner = model.inner.replace(orthogonalize=NewtonSchulz(VIEWS_COEFFICIENTS[:1] * 2))
    model.save_pretrained(tmp_path / "ours")
    back = convert(convert(tmp_path / "ours", tmp_path / "released", to="released"), tmp_path / "back")
    assert LactNvs.from_pretrained(back).config.inner == model.inner
    model.inner = model.inner.replace(steps=2)
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="they have no steps=2"):
        convert(tmp_path / "ours", tmp_path / "released", to="released")


def test_weights_that_are_no_safetensors_are_refused_and_a_runs_are_pointed_to(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"source must hold weights in safetensors; .* is not: "):
        convert(tmp_path / "theirs", tmp_path / "mine")
    (tmp_path / "run" / "model").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="has none; those of a training run are in its folder 'model'"):
        convert(tmp_path / "run", tmp_path / "mine")


def test_a_folder_is_not_converted_into_itself_by_whatever_name(tmp_path):
    released = released_vittt(tmp_path / "images")
    (tmp_path / "link").symlink_to(tmp_path / "images", target_is_directory=True)
    before = {path: path.read_bytes() for path in (tmp_path / "images").iterdir()}
    places = [tmp_path / "images", tmp_path / "link", tmp_path / "images" / "ours", tmp_path / "link" / "ours", tmp_path]
    for source in (tmp_path / "images", tmp_path / "link", released):
        for target in places:
            if source.is_dir() or target.name != "ours":  # a file's folder may be written into
                with pytest.raises(ValueError, match="target must be a folder apart from source"):
                    convert(source, target)
    assert {path: path.read_bytes() for path in (tmp_path / "images").iterdir()} == before
