import json

import pytest
import torch
from safetensors.torch import save_file
from test_lact_nvs_cameras import random_cameras

from kvbind import Anchor, NewtonSchulz
from kvbind.models import lact_nvs
from kvbind.models.lact_nvs import INNER_LOOPS, PRESETS, LactNvs, LactNvsConfig, Scene
from released import released, weights_of

SMALL = LactNvsConfig(dim=16, layers=2, patch_size=4, head_dim=8, fast_head_dim=16)


def in_full_precision(model):
    for layer in model.mixers:
        if layer.inner.orthogonalize is not None:
            layer.inner = layer.inner.replace(orthogonalize=layer.inner.orthogonalize.replace(dtype=torch.float32))
    return model.eval()


def small(inner=SMALL.inner, seed=0, **fields):
    """A model whose weights are large enough that everything it reads matters."""
    torch.manual_seed(seed)
    model = LactNvs(SMALL.replace(inner=inner, **fields))
    for name, parameter in model.named_parameters():
        if name.endswith(("qkv.weight", "proj.weight", "linear.weight", "decoder.1.weight", "fc.weight")):
            parameter.data.normal_(std=0.3)
    return in_full_precision(model)


def views(count, size=(8, 12), batch=2, seed=0):
    c2w, intrinsics = random_cameras(batch, count, seed=seed)
    image = torch.rand(batch, count, 3, *size, generator=torch.Generator().manual_seed(seed))
    return image, c2w.float(), intrinsics.float()


def targets(count, batch=2, seed=100):
    return views(count, batch=batch, seed=seed)[1:]


def test_released_weights_give_the_released_images():
    config, tensors = released("lact_nvs")
    model = in_full_precision(lact_nvs.from_released_config(config))
    model.load_state_dict(weights_of(tensors))
    inputs = [tensors[f"input/{name}"] for name in ("image", "c2w", "fxfycxcy")]
    cameras = [tensors[f"target/{name}"] for name in ("c2w", "fxfycxcy")]
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs, *cameras), tensors["output"], rtol=0, atol=1e-5)
        torch.testing.assert_close(model.render(model.reconstruct(*inputs), *cameras), tensors["output"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("row", INNER_LOOPS)
def test_a_reconstructed_scene_renders_what_forward_gives(row):
    model = small(INNER_LOOPS[row])
    inputs, cameras = views(3), targets(5)
    with torch.no_grad():
        expected = model(*inputs, *cameras)
        scene = model.reconstruct(*inputs)
        for at_once in (1, 2, 16):
            torch.testing.assert_close(model.render(scene, *cameras, views_at_once=at_once), expected, rtol=0, atol=1e-5)
    assert expected.shape == (2, 5, 3, 8, 12)
    assert expected.min() >= 0
    assert expected.max() <= 1
    assert expected.std() > 0.01


def test_rows_give_different_images():
    inputs, cameras = views(3), targets(2)
    with torch.no_grad():
        images = {row: small(inner)(*inputs, *cameras) for row, inner in INNER_LOOPS.items()}
    for one in images:
        for other in images:
            assert one == other or (images[one] - images[other]).abs().max() > 1e-4, (one, other)


def test_inputs_matter_and_their_order_does_not():
    model, (image, c2w, intrinsics), cameras = small(INNER_LOOPS["rung1"]), views(4), targets(2)
    with torch.no_grad():
        expected = model(image, c2w, intrinsics, *cameras)
        order = [2, 0, 3, 1]
        torch.testing.assert_close(
            model(image[:, order], c2w[:, order], intrinsics[:, order], *cameras), expected, rtol=0, atol=1e-3
        )
        for changed in ((1 - image, c2w, intrinsics), (image, c2w.flip(1), intrinsics), (image, c2w, intrinsics * 1.3)):
            assert (model(*changed, *cameras) - expected).abs().max() > 1e-2


def test_targets_do_not_see_one_another():
    model, inputs, (c2w, intrinsics) = small(), views(3), targets(4)
    with torch.no_grad():
        together = model(*inputs, c2w, intrinsics)
        alone = model(*inputs, c2w[:, 2:3], intrinsics[:, 2:3])
    torch.testing.assert_close(alone, together[:, 2:3], rtol=0, atol=1e-5)


def test_a_pixel_comes_from_its_own_place_in_the_decoder():
    # tokens that are all the same make every patch the same, from the decoder's channels in the order row, column, channel
    model = small()
    pattern = torch.linspace(-2, 2, 4 * 4 * 3)
    model.image_token_decoder[1].weight.data = pattern[:, None] * torch.ones(16) / 16
    model.image_token_decoder[0] = torch.nn.Identity()
    x = torch.ones(1, 2 * 6, 16)
    image = model._pixels(x, (8, 12))
    assert image.shape == (1, 2, 3, 8, 12)
    expected = pattern.sigmoid().reshape(4, 4, 3).permute(2, 0, 1).repeat(1, 2, 3)
    torch.testing.assert_close(image[0, 1], expected)


def test_a_scene_has_one_size_whatever_the_number_of_views():
    model = small()
    one, many = model.reconstruct(*views(1)), model.reconstruct(*views(9))
    assert one.nbytes == many.nbytes > 0
    assert (one.views, many.views) == (1, 9)
    assert one.batch == many.batch == 2
    # gate, up, out of 16 x 32 and the norms of their 32, 32 and 16 channels, in 2 layers and 2 scenes
    assert one.nbytes == 2 * 2 * 4 * (3 * 16 * 32 + 32 + 32 + 16)


def test_a_saved_scene_renders_the_same(tmp_path):
    model, cameras = small(), targets(3)
    with torch.no_grad():
        scene = model.reconstruct(*views(3))
        scene.save(tmp_path / "scene.safetensors")
        loaded = Scene.load(tmp_path / "scene.safetensors")
        torch.testing.assert_close(model.render(loaded, *cameras), model.render(scene, *cameras), rtol=0, atol=0)
    assert (loaded.size, loaded.views, loaded.batch) == ((8, 12), 3, 2)
    assert "Scene(2 of 3 views at 8 x 12, 2 layers" in repr(loaded)


def test_a_file_that_holds_no_scene_is_refused(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"path must be a file that Scene\.save wrote"):
        Scene.load(tmp_path / "other.safetensors")


def test_scenes_of_a_batch_can_be_chosen():
    model, (c2w, intrinsics) = small(), targets(2)
    with torch.no_grad():
        scene = model.reconstruct(*views(3))
        both = model.render(scene, c2w, intrinsics)
        torch.testing.assert_close(model.render(scene[1], c2w[1:], intrinsics[1:]), both[1:], rtol=0, atol=1e-6)
        swapped = model.render(scene[[1, 0]], c2w, intrinsics)
        torch.testing.assert_close(model.render(scene[[1, 0]][[1, 0]], c2w, intrinsics), both, rtol=0, atol=1e-6)
    assert (swapped - both).abs().max() > 1e-3


def test_views_added_to_a_scene_change_it_and_leave_the_old_one():
    model, cameras = small(INNER_LOOPS["rung1"]), targets(2)
    (image, c2w, intrinsics) = views(4)
    with torch.no_grad():
        first = model.reconstruct(image[:, :2], c2w[:, :2], intrinsics[:, :2])
        before = model.render(first, *cameras)
        more = model.reconstruct(image[:, 2:], c2w[:, 2:], intrinsics[:, 2:], scene=first)
        assert (first.views, more.views, more.nbytes) == (2, 4, first.nbytes)
        torch.testing.assert_close(model.render(first, *cameras), before, rtol=0, atol=0)
        assert (model.render(more, *cameras) - before).abs().max() > 1e-3


def test_under_linear_attention_views_added_later_write_what_they_would_have_written_together():
    # in the first layer, as later ones read what the first has become by then
    model, (image, c2w, intrinsics) = small(INNER_LOOPS["rung6"]), views(4)
    with torch.no_grad():
        together = model.reconstruct(image, c2w, intrinsics)
        first = model.reconstruct(image[:, :2], c2w[:, :2], intrinsics[:, :2])
        later = model.reconstruct(image[:, 2:], c2w[:, 2:], intrinsics[:, 2:], scene=first)
    torch.testing.assert_close(later.states[0].weights["out"], together.states[0].weights["out"], rtol=1e-4, atol=1e-4)


def test_a_scene_renders_at_other_sizes():
    model, (c2w, intrinsics) = small(), targets(2)
    scene = model.reconstruct(*views(3))
    assert model.render(scene, c2w, intrinsics, size=(16, 20)).shape == (2, 2, 3, 16, 20)
    with pytest.raises(ValueError, match="size's height and width must be multiples of the patches' side, 4; got 10 x 12"):
        model.render(scene, c2w, intrinsics, size=(10, 12))


def test_scenes_of_another_model_are_refused(tmp_path):
    model, cameras = small(), targets(2)
    scene = model.reconstruct(*views(3))
    model.render(scene, *cameras)
    with pytest.raises(ValueError, match="scene must be one that this model reconstructed: this model has other weights"):
        small(seed=1).render(scene, *cameras)
    with pytest.raises(ValueError, match="it has layers = 2, this model 3"):
        small(layers=3).render(scene, *cameras)
    with pytest.raises(ValueError, match="the inner loop of layer 0 differs in update"):
        small(INNER_LOOPS["rung1"]).render(scene, *cameras)
    with pytest.raises(ValueError, match="other weights"):
        small(seed=1).reconstruct(*views(2), scene=scene)
    with pytest.raises(TypeError, match="scene must be what reconstruct returned"):
        model.render("scene.safetensors", *cameras)


def test_a_model_knows_its_scenes_in_other_precisions():
    model, cameras = small(), targets(2)
    scene = model.reconstruct(*views(3))
    expected = model.render(scene, *cameras)
    near = model.to(torch.bfloat16).render(scene, *cameras)
    assert near.dtype == torch.bfloat16
    assert (near.float() - expected).abs().mean() < 0.05


def swap(position, value):
    def change(arguments):
        arguments[position] = value(arguments[position])

    return change


BAD_VIEWS = {
    "a list of mixed sizes": (
        swap(0, lambda image: [image[0], image[1][..., :8]]),
        ValueError,
        r"image must hold views of one size.*\[3, 3, 8, 12\], \[3, 3, 8, 8\]",
    ),
    "sizes that no patches tile": (
        swap(0, lambda image: image[..., :10]),
        ValueError,
        "image's height and width.*got 8 x 10",
    ),
    "bytes": (swap(0, lambda image: (image * 255).byte()), TypeError, r"image must be floating-point.*torch.uint8"),
    "values to 255": (swap(0, lambda image: image * 255), ValueError, r"image must be RGB in \[0, 1\]; got values from"),
    "NaN": (swap(0, lambda image: image * float("nan")), ValueError, r"image must be RGB in \[0, 1\]"),
    "no views": (swap(0, lambda image: image[:, :0]), ValueError, "image must have at least one scene and one view"),
    "no scenes": (swap(0, lambda image: image[:0]), ValueError, "image must have at least one scene and one view"),
    "an alpha channel": (swap(0, lambda image: image[:, :, [0, 1, 2, 2]]), ValueError, r"image must be \[B, V, 3, h, w\]"),
    "one image": (
        swap(0, lambda image: image[0, 0]),
        ValueError,
        r"image must be \[B, V, 3, h, w\]; got shape \[3, 8, 12\]",
    ),
    "a path": (swap(0, lambda image: "scene/"), TypeError, "image must be a tensor .* got str"),
    "scaled poses": (swap(1, lambda c2w: c2w * 2), ValueError, "c2w must hold rigid motions"),
    "fewer poses than images": (
        swap(1, lambda c2w: c2w[:, :2]),
        ValueError,
        r"c2w must be \[2, 3, 4, 4\], one camera for each",
    ),
    "poses of one scene": (swap(1, lambda c2w: c2w[:1]), ValueError, r"c2w must be \[2, 3, 4, 4\]"),
    "3 x 4 poses": (
        swap(1, lambda c2w: c2w[..., :3, :]),
        ValueError,
        r"c2w must be \[B, V, 4, 4\]; got shape \[2, 3, 3, 4\]",
    ),
    "normalized intrinsics": (swap(2, lambda x: x / 40), ValueError, "fxfycxcy must be fx, fy, cx, cy in pixels"),
    "intrinsics of one scene": (swap(2, lambda x: x[0]), ValueError, r"fxfycxcy must be \[2, 3.*got shape \[3, 4\]"),
    "transposed target poses": (swap(3, lambda c2w: c2w.mT), ValueError, r"target_c2w must hold rigid motions"),
    "normalized target intrinsics": (
        swap(4, lambda x: x / 40),
        ValueError,
        "target_fxfycxcy must be fx, fy, cx, cy in pixels",
    ),
    "no targets": (swap(3, lambda c2w: c2w[:, :0]), ValueError, "target_c2w must have at least one camera"),
    "fewer target intrinsics": (swap(4, lambda x: x[:, :1]), ValueError, r"target_fxfycxcy must be \[2, 2, 4\]"),
}


@pytest.mark.parametrize("case", BAD_VIEWS)
def test_bad_input_is_refused_by_name(case):
    change, error, message = BAD_VIEWS[case]
    arguments = [*views(3), *targets(2)]
    change(arguments)
    with pytest.raises(error, match=message):
        small()(*arguments)


def test_bad_input_to_scenes_is_refused_by_name():
    model, (image, c2w, intrinsics), cameras = small(), views(3), targets(2)
    scene = model.reconstruct(image, c2w, intrinsics)
    with pytest.raises(ValueError, match="image must be of the scene's size, 8 x 12; got 8 x 8"):
        model.reconstruct(image[..., :8], c2w, intrinsics, scene=scene)
    with pytest.raises(ValueError, match="scene must be a batch of 1, as image is; got 2"):
        model.reconstruct(image[:1], c2w[:1], intrinsics[:1], scene=scene)
    with pytest.raises(ValueError, match=r"c2w must be \[2, 2, 4, 4\]"):
        model.render(scene, cameras[0][:1], cameras[1])
    with pytest.raises(ValueError, match="views_at_once must be an int of at least 1; got 0"):
        model.render(scene, *cameras, views_at_once=0)


def test_lists_of_views_of_one_size_are_taken():
    model, (image, c2w, intrinsics), cameras = small(), views(3), targets(2)
    torch.testing.assert_close(model(list(image), c2w, intrinsics, *cameras), model(image, c2w, intrinsics, *cameras))


def test_released_fields_become_the_configuration():
    config, _ = released("lact_nvs")
    read = LactNvsConfig.from_released_config(config)
    assert read == LactNvsConfig(dim=32, layers=2, patch_size=4, head_dim=16, fast_head_dim=16)
    assert read.inner.orthogonalize == NewtonSchulz(((3.4445, -4.7750, 2.0315),) * 5)
    fast = config["block_config"][1]["params"]
    del fast["inter_multi"], fast["base_lr"]
    fast["muon_update_steps"] = 3
    read = LactNvsConfig.from_released_config(config)
    assert (read.inter_multi, read.base_lr, len(read.inner.orthogonalize.coefficients)) == (1, 0.01, 3)


def change_block(place, **fields):
    config, _ = released("lact_nvs")
    config["block_config"][place]["params"].update(fields)
    return config


def reordered():
    config, _ = released("lact_nvs")
    config["block_config"].reverse()
    return config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (change_block(0, causal=True), "SelfAttention's causal must be False"),
        (change_block(2, bias=True), "MLP's bias must be False"),
        (change_block(1, muon_update_steps=0), "muon_update_steps must be at least 1; got 0"),
        (change_block(1, heads=4), "got 'heads'"),
        (reordered(), "block_config must be attention inside each image"),
        ({"dim": 64, "layers": 2, "block_config": []}, "must have patch_size"),
        ({**released("lact_nvs")[0], "layer": 2}, "got 'layer' \\(did you mean 'layers'"),
    ],
)
def test_released_fields_that_are_not_supported_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        lact_nvs.from_released_config(fields)


def test_a_configuration_survives_plain_data():
    config = SMALL.replace(inner=INNER_LOOPS["rung3"])
    assert LactNvsConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"fast_head_dim": 5}, ValueError, "fast_head_dim must divide dim = 16; got 5"),
        ({"layers": 0}, ValueError, "layers must be an int of at least 1"),
        ({"base_lr": 0}, ValueError, "base_lr must be above 0"),
        ({"inter_multi": "2"}, TypeError, "inter_multi must be a number"),
        ({"inner": INNER_LOOPS["full"].replace(momentum=True)}, ValueError, "momentum=False"),
        ({"heads": 2}, TypeError, "no field 'heads'"),
    ],
)
def test_a_configuration_checks_its_fields(fields, error, message):
    with pytest.raises(error, match=message):
        SMALL.replace(**fields)


def test_a_model_needs_a_configuration():
    with pytest.raises(TypeError, match="config must be a LactNvsConfig"):
        LactNvs("114m")


def test_presets_have_the_sizes_they_are_named_by():
    def count(name):
        with torch.device("meta"):
            model = LactNvs(PRESETS[name])
        fast = sum(weight.numel() for layer in model.mixers for weight in layer.start_weights().values())
        return model, sum(parameter.numel() for parameter in model.parameters()) - fast

    model, outside = count("114m")
    assert round(outside / 1e6) == 114
    assert (len(model.blocks), model.config.dim) == (12, 768)
    for name, multiplier in (("24x768", 2), ("24x768-4x", 4)):
        model, _ = count(name)
        assert (len(model.blocks), model.config.dim) == (24, 768)
        assert model.blocks[0].fast.w0.shape == (1, 768, 768 * multiplier)
    assert count("tiny")[1] < count("small")[1] < outside


def test_starting_weights_are_as_released():
    torch.manual_seed(0)
    model = LactNvs(PRESETS["small"])
    block = model.blocks[2].module_list
    for weight, std in (
        (model.input_linear.weight, 0.02),
        (block[0]["f"].to_qkv.weight, 0.02),
        (block[0]["f"].c_proj.weight, 0.02 / 18**0.5),
        (block[1]["f"].c_proj.weight, 0.02 / 18**0.5),
        (block[2]["f"].c_proj.weight, 0.02 / 18**0.5),
        (block[1]["f"].w1, (2 / 768) ** 0.5),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.02)
    assert not model.blocks[0].fast.lr_fc.bias.any()


@pytest.mark.parametrize("row", INNER_LOOPS)
def test_every_row_trains_every_parameter(row):
    torch.manual_seed(0)
    model = LactNvs(SMALL.replace(inner=INNER_LOOPS[row]))
    model(*views(3), *targets(2)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_a_model_learns_to_repeat_a_view():
    torch.manual_seed(0)
    model = LactNvs(SMALL.replace(dim=32, head_dim=16, fast_head_dim=32))
    image, c2w, intrinsics = views(2, size=(8, 8), batch=4)
    image = image[..., :1, :1].expand_as(image)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.mse_loss(model(image, c2w, intrinsics, c2w[:, :1], intrinsics[:, :1]), image[:, :1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


def test_recomputing_blocks_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        model = small(INNER_LOOPS["rung1"]).train()
        model.set_grad_checkpointing(recompute)
        model(*views(3), *targets(2)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one)


def test_mixed_precision_training_has_finite_gradients():
    torch.manual_seed(0)
    model = LactNvs(SMALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(*views(3), *targets(2)).float().square().mean()
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_an_inner_loop_given_to_the_model_is_given_to_every_layer():
    model = small()
    model.inner = INNER_LOOPS["steps2"]
    assert [layer.inner for layer in model.mixers] == [INNER_LOOPS["steps2"]] * 2
    model.blocks[1].inner = INNER_LOOPS["ascent"]
    assert model.mixers[1].inner == INNER_LOOPS["ascent"] != model.inner


ELASTIC = SMALL.inner.replace(chunk=7, anchor=Anchor(detach=("importance", "start")), detach_norms=True)
"""Chunks that views do not divide into: 6 tokens each."""


def test_elastic_scenes_are_written_chunk_after_chunk(tmp_path):
    model, inputs, cameras = small(ELASTIC), views(4), targets(3)
    with torch.no_grad():
        images = model(*inputs, *cameras)
        scene = model.reconstruct(*inputs)
        scene.save(tmp_path / "scene.safetensors")
        for held in (scene, Scene.load(tmp_path / "scene.safetensors")):
            torch.testing.assert_close(model.render(held, *cameras), images, rtol=0, atol=1e-4)
        # the order of views counts, as it does not in one write
        turned = model(*(x.flip(1) for x in inputs), *cameras)
        assert (turned - images).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "model")
    read = LactNvs.from_pretrained(tmp_path / "model")
    assert read.inner == model.inner
    assert LactNvsConfig.from_dict(SMALL.replace(inner=ELASTIC).to_dict()).inner == ELASTIC


def test_elastic_models_train_every_parameter_and_recompute():
    model, inputs, cameras = small(ELASTIC).double().train(), views(3), targets(2)
    inputs, cameras = ([x.double() for x in part] for part in (inputs, cameras))

    def gradients():
        model.zero_grad()
        model(*inputs, *cameras).square().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    first = gradients()
    assert [name for name, grad in first.items() if not bool(grad.abs().sum() > 0)] == []
    model.gradient_checkpointing = True
    for name, grad in gradients().items():
        torch.testing.assert_close(grad, first[name], rtol=1e-8, atol=1e-10, msg=name)
